"""Changes to pictures, and what else may lie where a file should."""

import io
import os
import struct
import zlib
from pathlib import Path
from random import Random

from PIL import Image

from .values import Change

SIDES = (0, 1, 20_000, 60_000, 65_535, 2**20, 2**31 - 1, 2**31, 2**32 - 1)
# fmt: off
NO_PICTURES = (
    b"", b"\0" * 5000, b"text", b"<html></html>", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%PDF-1.4", b"GIF89a",
    b"\xff\xd8\xff", b"PK\x03\x04", b"\x89PNG\r\n\x1a\n", b"RIFF\xff\xff\xff\xffWEBP", b"II*\0\xff\xff\xff\xff",
)
# fmt: on
# Modes and sizes that decoders know and training sets seldom hold.
ODD_PICTURES = (
    *(("PNG", mode, (64, 48)) for mode in ("1", "L", "P", "LA", "I;16", "RGBA")),
    *(("PNG", "RGB", (1, 1)), ("PNG", "L", (20_000, 1)), ("PNG", "L", (1, 20_000)), ("PNG", "1", (20_000, 20_000))),
    *(("JPEG", mode, (64, 48)) for mode in ("L", "CMYK")),
    *(("TIFF", mode, (64, 48)) for mode in ("1", "L", "P", "I;16", "F", "RGBA", "CMYK")),
    *((form, "RGB", (64, 48)) for form in ("GIF", "WEBP", "BMP", "PPM", "ICO", "TGA", "PCX", "SGI")),
)


def mutate_picture(rng: Random, content: bytes) -> Change:
    """Damage a picture, lie about its size, or put one of another kind or mode in its place."""
    kind, at = rng.randrange(7), rng.randrange(max(len(content), 1))
    if kind == 0:
        return Change(content[:at], f"cut off after {at} of {len(content)} bytes")
    if kind == 1:
        return Change(content[:at] + rng.randbytes(8) + content[at + 8 :], f"8 bytes are overwritten at {at}")
    if kind < 5:
        form, width, height = rng.choice(list(LIARS)), rng.choice(SIDES), rng.choice(SIDES)
        return Change(LIARS[form](encode(form), width, height), f"a {form} that claims to be {width}x{height}")
    if kind == 5:
        new = rng.choice(NO_PICTURES)
        return Change(new, f"its content is {new[:20]!r}")
    form, mode, size = rng.choice(ODD_PICTURES)
    options, what = {}, f"a {form} of mode {mode}, {size[0]}x{size[1]}"
    picture = Image.new(mode, size)
    if rng.random() < 0.3 and form in ("JPEG", "PNG", "WEBP", "TIFF"):
        options["exif"] = Image.Exif()
        options["exif"][0x0112] = rng.choice((0, 3, 6, 9, 65_535))
        what += f", its orientation {options['exif'][0x0112]}"
    elif rng.random() < 0.3 and form in ("GIF", "WEBP", "TIFF"):
        options |= {"save_all": True, "append_images": [Image.new(mode, size, 1)] * 3}
        what += ", of several frames"
    return Change(encode(form, picture, **options), what)


def replace_file(rng: Random, file: Path) -> str:
    """Put something else in the place of a file; return what."""
    kind = rng.choice(("pipe", "folder", "link to itself", "link to nowhere", "device", "empty", "sparse", "missing"))
    file.unlink()
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    elif kind == "link to itself":
        file.symlink_to(file.name)
    elif kind == "link to nowhere":
        file.symlink_to("/nowhere/at/all")
    elif kind == "device":
        file.symlink_to("/dev/zero")
    elif kind == "empty":
        file.touch()
    elif kind == "sparse":
        with open(file, "wb") as stream:
            stream.truncate(2**36)
    return f"{file.name} is now: {kind}"


def encode(form: str, picture: Image.Image | None = None, **options: object) -> bytes:
    """Return the file of a picture, by default of a gray one."""
    buffer = io.BytesIO()
    (picture or Image.new("RGB", (64, 48), (100, 100, 100))).save(buffer, form, **options)
    return buffer.getvalue()


def _jpeg(data: bytes, width: int, height: int) -> bytes:
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", height & 0xFFFF, width & 0xFFFF) + data[at + 4 :]


def _png(data: bytes, width: int, height: int) -> bytes:
    chunk = b"IHDR" + struct.pack(">II", width, height) + data[24:29]
    return data[:12] + chunk + struct.pack(">I", zlib.crc32(chunk)) + data[33:]


def _tiff(data: bytes, width: int, height: int) -> bytes:
    new, start = bytearray(data), struct.unpack_from("<I", data, 4)[0]
    for k in range(struct.unpack_from("<H", data, start)[0]):
        at = start + 2 + 12 * k
        tag = struct.unpack_from("<H", data, at)[0]
        if tag in (256, 257):
            struct.pack_into("<HII", new, at + 2, 4, 1, width if tag == 256 else height)
    return bytes(new)


def _webp(data: bytes, width: int, height: int) -> bytes:
    if max(width, height) < 2**14:
        return data[:26] + struct.pack("<HH", width, height) + data[30:]
    sides = b"".join(((side - 1) & 0xFFFFFF).to_bytes(3, "little") for side in (width, height))
    extended = b"VP8X" + struct.pack("<II", 10, 0) + sides
    return data[:4] + struct.pack("<I", len(data) + 10) + b"WEBP" + extended + data[12:]


def _bmp(data: bytes, width: int, height: int) -> bytes:
    return data[:18] + struct.pack("<II", width, height) + data[26:]


def _gif(data: bytes, width: int, height: int) -> bytes:
    return data[:6] + struct.pack("<HH", width & 0xFFFF, height & 0xFFFF) + data[10:]


LIARS = {"JPEG": _jpeg, "PNG": _png, "TIFF": _tiff, "WEBP": _webp, "BMP": _bmp, "GIF": _gif}
