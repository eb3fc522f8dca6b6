"""Mutations of binary files that know their layout: zip archives of torch.save, pickles, safetensors, tar shards."""

import copy
import io
import json
import pickle
import pickletools
import struct
import tarfile
import zipfile
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

from .documents import mutate_json
from .pictures import mutate_picture
from .values import ODD_TEXT, change_document, odd_value, to_json

SYSTEM = b"cos\nsystem\n(S'touch executed'\ntR"  # os.system, as a pickle calls it
_DOUBLED = b"]q\x01" + b"".join(b"]q%c(h%ch%ce" % (k + 1, k, k) for k in range(1, 60))  # each list holds the last twice
PICKLES = {  # whole pickles
    "calls os.system": b"\x80\x02" + SYSTEM + b".",
    "calls os.system within a mapping": b"\x80\x02}X\x05\x00\x00\x00model" + SYSTEM + b"s.",
    "calls eval": b'\x80\x02cbuiltins\neval\n(S\'open("executed", "w")\'\ntR.',
    "builds with a hostile state": b"\x80\x02ctorch.nn.modules.linear\nLinear\n)\x81" + SYSTEM + b"b.",
    "lists that hold the last twice": b"\x80\x02" + _DOUBLED + b".",
    "a list within itself": b"\x80\x02]q\x00h\x00a.",
    "a mapping within itself": b"\x80\x02}q\x00X\x05\x00\x00\x00modelh\x00s.",
    "tuples 100,000 deep": b"\x80\x02" + b")" + b"\x85" * 100_000 + b".",
    "lists 100,000 deep": b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
    "a text of 2**40 bytes": b"\x80\x04\x8d" + struct.pack("<Q", 2**40) + b"x.",
    "a number of 2**30 bytes": b"\x80\x02\x8b" + struct.pack("<i", 2**30) + b"x.",
    "a bytearray of 2**40 bytes": b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"x.",
    "a frame of 2**60 bytes": b"\x80\x04\x95" + struct.pack("<Q", 2**60) + b"N.",
    "a memo index of 2**31": b"\x80\x02Nr\xff\xff\xff\x7f.",
    "a persistent id that is a number": b"\x80\x02K\x01Q.",
    "a persistent id of odd parts": b"\x80\x02(X\x07\x00\x00\x00storageNNNNtQ.",
    "protocol 99": b"\x80\x63N.",
    "no end": b"\x80\x02}",
    "nothing": b"",
    "a mark too few": b"\x80\x02u.",
    "an extension code": b"\x80\x02\x82\x01.",
}


def mutate_bytes(rng: Random, content: bytes) -> tuple[bytes, str]:
    """Cut, overwrite, insert, repeat or zero some bytes."""
    at = rng.randrange(max(len(content), 1))
    length = rng.choice((1, 4, 20, 1000))
    noise = rng.randbytes(length)
    kind = rng.randrange(7)
    new = (
        content[:at],
        content[:at] + noise + content[at + length :],
        content[:at] + noise + content[at:],
        content[:at] + content[at + length :],
        content[:at] + bytes(length) + content[at + length :],
        content + content[-at:],
        content[: rng.choice((0, 1, 4, 8, 16))],
    )[kind]
    words = ("cut off", "overwritten", "inserted", "taken out", "zeroed", "repeated at the end", "cut to a few bytes")[
        kind
    ]
    return new, f"{length} bytes {words} at {at} of {len(content)}"


# Files of torch.save


def mutate_zip(rng: Random, content: bytes) -> tuple[bytes, str, bool]:
    """Change an archive of ``torch.save``; return it, what was done, and whether it must be refused."""
    kind = rng.randrange(9)
    members = _members(content)
    name = rng.choice(list(members))
    if kind < 2:  # the checksum tells
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            info = rng.choice([entry for entry in archive.infolist() if entry.file_size])
        at = content.index(members[info.filename], info.header_offset + 30) + rng.randrange(info.file_size)
        bit = 1 << rng.randrange(8)
        return (
            content[:at] + bytes([content[at] ^ bit]) + content[at + 1 :],
            f"a bit of {info.filename} is flipped",
            True,
        )
    if kind == 2:
        pickles = [member for member in members if member.endswith("data.pkl")]
        members[pickles[0]], what = mutate_pickle(rng, members[pickles[0]])
        return _archive(members), f"data.pkl, its checksum right: {what}", False
    if kind == 3:
        members[name], what = mutate_bytes(rng, members[name])
        return _archive(members), f"{name}, its checksum right: {what}", False
    if kind == 4:
        del members[name]
        return _archive(members), f"{name} is dropped", False
    if kind == 5:
        new = rng.choice(
            (*ODD_TEXT[:12], "../x", "archive/data.pkl", "archive/constants.pkl", f"{name}/", name.upper())
        )
        members[new] = members.pop(name) if rng.random() < 0.5 else members[name]
        return _archive(members), f"{name} is called {new!r}", False
    if kind == 6:
        return _archive(members, zipfile.ZIP_DEFLATED), "compressed", False
    if kind == 7:  # a field of the index: flags, method, times, checksum, sizes, lengths, attributes, offset
        start = rng.choice([k for k in range(len(content) - 46) if content[k : k + 4] == b"PK\x01\x02"])
        field, form = rng.choice(
            ((8, "H"), (10, "H"), (16, "I"), (20, "I"), (24, "I"), (28, "H"), (30, "H"), (38, "I"), (42, "I"))
        )
        value = rng.choice((0, 1, 2**15, 2**16 - 1, 2**31, 2**32 - 1)) % (2**16 if form == "H" else 2**32)
        new = bytearray(content)
        struct.pack_into(f"<{form}", new, start + field, value)
        return bytes(new), f"field {field} of an index entry is {value}", False
    return *mutate_bytes(rng, content), False


def mutate_pickle(rng: Random, content: bytes) -> tuple[bytes, str]:
    """Change a pickle: another in its place, an opcode more or less, or bytes."""
    kind = rng.randrange(4)
    if kind < 2:
        what = rng.choice(list(PICKLES))
        return PICKLES[what], what
    if kind == 2:
        return mutate_bytes(rng, content)
    ops = [(op, position) for op, _, position in pickletools.genops(content)]
    k = rng.randrange(1, len(ops))
    start, end = ops[k][1], ops[k + 1][1] if k + 1 < len(ops) else len(content)
    if rng.random() < 0.5:
        return content[:start] + content[end:], f"without its opcode {k}, {ops[k][0].name}"
    piece = rng.choice(
        (
            b"N",
            b"0",
            b"2" * 1000,
            b"(" * 1000,
            b")",
            b"]",
            b"}",
            b"R",
            b"b",
            b"Q",
            b"s",
            b"a",
            b"t",
            SYSTEM,
            content[start:end],
        )
    )
    return content[:start] + piece + content[start:], f"{piece[:20]!r} is put before opcode {k}"


def mutate_saved(rng: Random, content: Any) -> tuple[Any, str]:
    """Change one place in what ``torch.save`` is to write: a value, or a tensor's numbers, type or shape."""
    content = copy.deepcopy(content)
    return change_document(
        rng, content, odd=lambda rng: odd_tensor(rng) if rng.random() < 0.4 else _sayable(odd_value(rng))
    )


def _sayable(value: Any) -> Any:
    return 10**400 if isinstance(value, str) and value.startswith("<") else value


def odd_tensor(rng: Random) -> Tensor:
    """Return a tensor that may fit nowhere."""
    return rng.choice(
        (
            lambda: torch.full((16, 3, 3, 3), float("nan")),
            lambda: torch.tensor(float("inf")),
            lambda: torch.zeros(0),
            lambda: torch.zeros(()),
            lambda: torch.zeros(1, dtype=torch.complex64),
            lambda: torch.zeros(8, dtype=torch.int8),
            lambda: torch.zeros(8, dtype=torch.bool),
            lambda: torch.zeros(8, dtype=torch.float64),
            lambda: torch.zeros(8, dtype=torch.bfloat16),
            lambda: torch.zeros(1).expand(2**40),  # four bytes in the file
            lambda: torch.zeros(1).expand(2**10, 2**20),
            lambda: torch.zeros(2, 2).to_sparse(),
            lambda: torch.zeros((1,) * 60),
            lambda: torch.nn.Parameter(torch.zeros(3)),
        )
    )()


def save(content: Any, path: Path, **options: Any) -> None:
    """Write what ``torch.save`` would, however deep it is."""
    buffer = io.BytesIO()
    torch.save(content, buffer, pickle_protocol=pickle.DEFAULT_PROTOCOL if options else 2, **options)
    path.write_bytes(buffer.getvalue())


def _members(content: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {entry.filename: archive.read(entry) for entry in archive.infolist()}


def _archive(members: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name.encode(errors="replace").decode() or "x", data)
    return buffer.getvalue()


# safetensors


def mutate_safetensors(rng: Random, content: bytes) -> tuple[bytes, str]:
    """Change what the header of a detkit checkpoint says, the places of its tensors, or bytes."""
    length = struct.unpack("<Q", content[:8])[0]
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    about = json.loads(header.get("__metadata__", {}).get("detkit", "null"))
    kind = rng.randrange(12)
    if about is not None and kind < 7:
        keys = (
            "cfg.backbone",
            "cfg.neck",
            "cfg.head",
            "cfg.image_size",
            "cfg.model",
            "cfg.data",
            "class_names",
            "part",
            "metrics",
            "",
        )
        about, what = change_document(rng, about, below=rng.choice(keys))
        header["__metadata__"]["detkit"] = to_json(about)
        return safetensors(header, data), what
    if kind == 7:
        names = [name for name in header if name != "__metadata__"]
        header, what = change_document(rng, header, below=rng.choice(names))
        return safetensors(header, data), what
    if kind == 8:
        header.pop("__metadata__", None)
        if rng.random() < 0.7:
            header["__metadata__"] = rng.choice(
                ({}, {"detkit": ""}, {"detkit": "null"}, {"detkit": "[" * 100_000}, {"detkit": "{}"}, {"a": "\x1b"})
            )
        return safetensors(header, data), f"metadata are {header.get('__metadata__')!r:.60}"
    if kind == 9:
        claimed = rng.choice((0, 1, length - 1, length + 1, len(content), 2**27, 2**32, 2**63, 2**64 - 1))
        return struct.pack("<Q", claimed) + content[8:], f"the header claims {claimed} bytes"
    if kind == 10:
        new = bytearray(data)
        value = rng.choice(
            (b"\x00\x00\xc0\x7f", b"\x00\x00\x80\x7f", b"\xff\xff\x7f\x7f")
        )  # NaN, infinite, the largest
        new[:] = value * (len(new) // 4) + bytes(len(new) % 4)
        return safetensors(header, bytes(new)), f"all weights are {struct.unpack('<f', value)[0]}"
    return mutate_bytes(rng, content)


def safetensors(header: Any, data: bytes) -> bytes:
    """Return a safetensors file."""
    text = to_json(header).encode()
    return struct.pack("<Q", len(text)) + text + data


# Tar shards


def mutate_tar(rng: Random, content: bytes) -> tuple[bytes, str]:
    """Change a member's content, its header or its kind, or bytes of a shard."""
    if rng.random() < 0.2:
        return mutate_bytes(rng, content)
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        members = [(info, archive.extractfile(info).read()) for info in archive]
    info, data = rng.choice(members)
    k = members.index((info, data))
    kind = rng.randrange(5)
    if kind < 2:
        data, what = mutate_json(rng, data.decode()) if info.name.endswith(".json") else mutate_picture(rng, data)
        what = f"{info.name}: {what}"
    elif kind == 2:
        old, info = info.name, copy.copy(info)
        info.name = rng.choice(
            (
                *ODD_TEXT[:12],
                "../x.jpg",
                "/etc/x.jpg",
                "a" * 5000 + ".jpg",
                ".jpg",
                "x",
                members[0][0].name,
                "\x1b[1m.json",
            )
        )
        what = f"{old} is called {info.name!r:.40}"
    elif kind == 3:
        info = copy.copy(info)
        info.type, info.linkname = (
            rng.choice(
                (
                    tarfile.SYMTYPE,
                    tarfile.LNKTYPE,
                    tarfile.FIFOTYPE,
                    tarfile.CHRTYPE,
                    tarfile.DIRTYPE,
                    tarfile.GNUTYPE_SPARSE,
                    b"Z",
                )
            ),
            "../x",
        )
        what = f"{info.name} is of type {info.type!r}"
    else:
        del members[k]
        members[k:k] = rng.choice(([], [(info, data)] * 2))
        buffer = _tar(members)
        return buffer, f"{info.name} is dropped or comes twice"
    members[k] = info, data
    new = _tar(members)
    if rng.random() < 0.1:
        at = rng.choice((124, 100, 148, 156, 0))  # size, mode, checksum, type, name
        new = (
            new[:at]
            + rng.choice((b"77777777777\0", b"\x80" + b"\xff" * 11, b"-1" + bytes(10), b"z" * 12))
            + new[at + 12 :]
        )
        what += f"; the first header's byte {at} and those after it are overwritten"
    return new, what


def _tar(members: list[tuple[tarfile.TarInfo, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", errors="surrogatepass") as archive:
        for info, data in members:
            info = copy.copy(info)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()
