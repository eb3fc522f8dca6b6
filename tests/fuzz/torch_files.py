"""Changes to files of ``torch.save``: the zip archive, the pickle in it, or what is saved."""

import copy
import io
import pickletools
import struct
import zipfile
from random import Random
from typing import Any

import torch
from torch import Tensor

from .binaries import mutate_bytes
from .values import ODD_TEXT, Change, change_document, odd_value

SYSTEM = b"cos\nsystem\n(S'touch executed'\ntR"  # os.system, as a pickle calls it
DOUBLED = b"]q\x01" + b"".join(b"]q%c(h%ch%ce" % (k + 1, k, k) for k in range(1, 60))  # each list holds the last twice
PICKLES = {  # whole ones
    "calls os.system": b"\x80\x02" + SYSTEM + b".",
    "calls os.system within a mapping": b"\x80\x02}X\x05\x00\x00\x00model" + SYSTEM + b"s.",
    "calls eval": b'\x80\x02cbuiltins\neval\n(S\'open("executed", "w")\'\ntR.',
    "builds with a hostile state": b"\x80\x02ctorch.nn.modules.linear\nLinear\n)\x81" + SYSTEM + b"b.",
    "lists that hold the last twice": b"\x80\x02" + DOUBLED + b".",
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
PIECES = (b"N", b"0", b"2" * 1000, b"(" * 1000, b")", b"]", b"}", b"R", b"b", b"Q", b"s", b"a", b"t", SYSTEM)
INDEX_FIELDS = (  # of an entry of a zip's index: flags, method, checksum, sizes, lengths, attributes, offset
    *((8, "H"), (10, "H"), (16, "I"), (20, "I"), (24, "I"), (28, "H"), (30, "H"), (38, "I"), (42, "I")),
)


def mutate_zip(rng: Random, content: bytes) -> Change:
    """Change an archive of ``torch.save``: a bit that its checksum gives away, or members and index."""
    kind = rng.randrange(9)
    members = _members(content)
    name = rng.choice(list(members))
    if kind < 2:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            info = rng.choice([entry for entry in archive.infolist() if entry.file_size])
        at = content.index(members[info.filename], info.header_offset + 30) + rng.randrange(info.file_size)
        new = content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :]
        return Change(new, f"a bit of {info.filename} is flipped", refuse=True)
    if kind == 2:
        name = next(member for member in members if member.endswith("data.pkl"))
        members[name], what, _ = mutate_pickle(rng, members[name])
        return Change(_archive(members), f"data.pkl, its checksum right: {what}")
    if kind == 3:
        members[name], what, _ = mutate_bytes(rng, members[name])
        return Change(_archive(members), f"{name}, its checksum right: {what}")
    if kind == 4:
        del members[name]
        return Change(_archive(members), f"{name} is dropped")
    if kind == 5:
        new = rng.choice((*ODD_TEXT[:12], "../x", "archive/data.pkl", "archive/constants.pkl", f"{name}/", "ARCHIVE/x"))
        members[new] = members.pop(name) if rng.random() < 0.5 else members[name]
        return Change(_archive(members), f"{name} is called {new!r}")
    if kind == 6:
        return Change(_archive(members, zipfile.ZIP_DEFLATED), "compressed")
    if kind == 7:
        start = rng.choice([k for k in range(len(content) - 46) if content[k : k + 4] == b"PK\x01\x02"])
        field, form = rng.choice(INDEX_FIELDS)
        value = rng.choice((0, 1, 2**15, 2**16 - 1, 2**31, 2**32 - 1)) % (2**16 if form == "H" else 2**32)
        new = bytearray(content)
        struct.pack_into(f"<{form}", new, start + field, value)
        return Change(bytes(new), f"field {field} of an index entry is {value}")
    return mutate_bytes(rng, content)


def mutate_pickle(rng: Random, content: bytes) -> Change:
    """Change a pickle: another in its place, an opcode more or less, or bytes."""
    kind = rng.randrange(4)
    if kind < 2:
        what = rng.choice(list(PICKLES))
        return Change(PICKLES[what], what)
    if kind == 2:
        return mutate_bytes(rng, content)
    ops = [(op.name, position) for op, _, position in pickletools.genops(content)]
    k = rng.randrange(1, len(ops) - 1)
    (name, start), (_, end) = ops[k], ops[k + 1]
    if rng.random() < 0.5:
        return Change(content[:start] + content[end:], f"without its opcode {k}, {name}")
    piece = rng.choice((*PIECES, content[start:end]))
    return Change(content[:start] + piece + content[start:], f"{piece[:20]!r} is put before opcode {k}")


def mutate_saved(rng: Random, content: Any) -> tuple[Any, str]:
    """Change one place in what is to be saved: a value, or a tensor; return all of it, and what was done."""

    def odd(rng: Random) -> Any:
        value = odd_tensor(rng) if rng.random() < 0.4 else odd_value(rng)
        return 10**400 if isinstance(value, str) and value.startswith("<") else value  # no json

    return change_document(rng, copy.deepcopy(content), odd=odd)


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


def _members(content: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {entry.filename: archive.read(entry) for entry in archive.infolist()}


def _archive(members: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name.encode(errors="replace").decode() or "x", data)
    return buffer.getvalue()
