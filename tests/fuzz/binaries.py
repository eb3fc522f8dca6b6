"""Changes to binary files: bytes of any, the header of safetensors, the members of tar shards."""

import copy
import io
import json
import struct
import tarfile
from random import Random
from typing import Any

from .documents import mutate_json
from .pictures import mutate_picture
from .values import ODD_TEXT, Change, change_document, to_json

# What the changes to a checkpoint's header are about, each as often as another.
PARTS = ("cfg.backbone", "cfg.neck", "cfg.head", "cfg.image_size", "cfg.model", "cfg.data", "class_names", "part", "")
HEADERS: tuple[Any, ...] = (
    None,
    {},
    {"detkit": ""},
    {"detkit": "null"},
    {"detkit": "[" * 100_000},
    {"detkit": "{}"},
    {"a": "\x1b"},
)
TAR_TYPES = (b"1", b"2", b"3", b"5", b"6", b"S", b"Z")  # links, devices, folders, pipes, sparse files, nothing
TAR_NAMES = (*ODD_TEXT[:12], "../x.jpg", "/etc/x.jpg", "a" * 5000 + ".jpg", ".jpg", "x", "\x1b[1m.json")
TAR_FIELDS = (b"77777777777\0", b"\x80" + b"\xff" * 11, b"-1" + bytes(10), b"z" * 12)


def mutate_bytes(rng: Random, content: bytes) -> Change:
    """Cut, overwrite, insert, repeat or zero some bytes."""
    at, length = rng.randrange(max(len(content), 1)), rng.choice((1, 4, 20, 1000))
    noise, before, after = rng.randbytes(length), content[:at], content[at + length :]
    changes = {
        "cut off": before,
        "overwritten": before + noise + after,
        "inserted": before + noise + content[at:],
        "taken out": before + after,
        "zeroed": before + bytes(length) + after,
        "repeated at the end": content + content[-at:],
        "all that there is": content[: rng.choice((0, 1, 4, 8, 16))],
    }
    what = rng.choice(list(changes))
    return Change(changes[what], f"{length} bytes at {at} of {len(content)}: {what}")


def mutate_safetensors(rng: Random, content: bytes) -> Change:
    """Change what the header of a checkpoint says, the places of its tensors, their numbers, or bytes."""
    length = struct.unpack("<Q", content[:8])[0]
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    about = json.loads(header.get("__metadata__", {}).get("detkit", "null"))
    kind = rng.randrange(12)
    if about is not None and kind < 7:
        about, what = change_document(rng, about, below=rng.choice(PARTS))
        header["__metadata__"]["detkit"] = to_json(about)
        return Change(safetensors(header, data), what)
    if kind == 7:
        names = [name for name in header if name != "__metadata__"]
        header, what = change_document(rng, header, below=rng.choice(names))
        return Change(safetensors(header, data), what)
    if kind == 8:
        header["__metadata__"] = rng.choice(HEADERS)
        return Change(safetensors(header, data), f"metadata are {header['__metadata__']!r:.60}")
    if kind == 9:
        claimed = rng.choice((0, 1, length - 1, length + 1, len(content), 2**27, 2**32, 2**63, 2**64 - 1))
        return Change(struct.pack("<Q", claimed) + content[8:], f"the header claims {claimed} bytes")
    if kind == 10:
        value = rng.choice((float("nan"), float("inf")))
        number = struct.pack("<e", value) if '"F16"' in json.dumps(header) else struct.pack("<f", value)
        new = safetensors(header, number * (len(data) // len(number)) + bytes(len(data) % len(number)))
        return Change(new, f"all weights are {value}", refuse=True)
    return mutate_bytes(rng, content)


def safetensors(header: Any, data: bytes) -> bytes:
    """Return a safetensors file."""
    text = to_json(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def mutate_tar(rng: Random, content: bytes) -> Change:
    """Change a member's content, its header or its kind, or bytes of a shard."""
    kind = rng.randrange(8)
    if kind == 0:
        return mutate_bytes(rng, content)
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        members = [(info, archive.extractfile(info).read()) for info in archive]
    k = rng.randrange(len(members))
    info, data = copy.copy(members[k][0]), members[k][1]
    if kind < 4:
        change = mutate_json(rng, data.decode()) if info.name.endswith(".json") else mutate_picture(rng, data)
        members[k], what = (info, change.content), f"{info.name}: {change.what}"
    elif kind == 4:
        old, info.name = info.name, rng.choice((*TAR_NAMES, members[0][0].name))
        members[k], what = (info, data), f"{old} is called {info.name!r:.40}"
    elif kind == 5:
        info.type, info.linkname = rng.choice(TAR_TYPES), "../x"
        members[k], what = (info, data), f"{info.name} is of type {info.type!r}"
    elif kind == 6:
        times = rng.choice((0, 2))
        members[k : k + 1] = [(info, data)] * times
        what = f"{info.name} is there {times} times"
    else:
        at, field = rng.choice((124, 100, 148, 156, 0)), rng.choice(TAR_FIELDS)  # size, mode, checksum, type, name
        return Change(content[:at] + field + content[at + 12 :], f"the first header is {field!r} from byte {at} on")
    return Change(_tar(members), what)


def _tar(members: list[tuple[tarfile.TarInfo, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", errors="surrogatepass") as archive:
        for info, data in members:
            info = copy.copy(info)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()
