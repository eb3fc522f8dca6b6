"""Mutations of pictures, and what else may lie where a file should."""

import io
import os
import struct
import zlib
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image

HUGE = (0, 1, 20_000, 60_000, 65_535, 2**20, 2**31 - 1, 2**31, 2**32 - 1)
NO_PICTURES = (
    b"",
    b"\0" * 5000,
    b"text",
    b"<html></html>",
    b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    b"%PDF-1.4",
    b"\xff\xd8\xff",
    b"GIF89a",
    b"PK\x03\x04",
)


def mutate_picture(rng: Random, content: bytes) -> tuple[bytes, str]:
    """Damage a picture, put one of another kind or of an odd kind in its place, or lie about its size."""
    kind = rng.randrange(7)
    if kind == 0:
        at = rng.randrange(len(content))
        return content[:at], f"cut off after {at} of {len(content)} bytes"
    if kind == 1:
        at = rng.randrange(len(content))
        return content[:at] + rng.randbytes(8) + content[at + 8 :], f"bytes are overwritten at {at}"
    if kind < 5:
        sides = rng.choice(HUGE), rng.choice(HUGE)
        form = rng.choice(list(_LIARS))
        return _LIARS[form](encode(form), *sides), f"a {form} that claims to be {sides[0]}x{sides[1]}"
    if kind == 5:
        new = rng.choice(NO_PICTURES)
        return new, f"its content is {new[:20]!r}"
    form, image, options = rng.choice(_odd_pictures(rng))
    return encode(form, image, **options), f"a {form} of mode {image.mode}, {image.width}x{image.height}"


def replace_file(rng: Random, file: Path) -> str:
    """Put something else in the place of a file."""
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


def encode(form: str, image: Image.Image | None = None, **options) -> bytes:
    """Return the file of a picture, by default a small one."""
    buffer = io.BytesIO()
    (image or Image.fromarray(np.full((48, 64, 3), 100, np.uint8))).save(buffer, form, **options)
    return buffer.getvalue()


def _odd_pictures(rng: Random) -> list[tuple[str, Image.Image, dict]]:
    rgb = Image.fromarray(np.full((48, 64, 3), 100, np.uint8))
    exif = Image.Exif()
    exif[0x0112] = rng.choice((0, 3, 6, 9, 65_535))  # orientation
    return [
        ("PNG", Image.new("1", (64, 48)), {}),
        ("PNG", Image.new("L", (64, 48)), {}),
        ("PNG", Image.new("P", (64, 48)), {}),
        ("PNG", Image.new("I;16", (64, 48)), {}),
        ("PNG", Image.new("RGBA", (64, 48)), {}),
        ("PNG", Image.new("RGB", (1, 1)), {}),
        ("PNG", Image.new("L", (20_000, 1)), {}),
        ("PNG", Image.new("L", (1, 20_000)), {}),
        ("PNG", Image.new("1", (20_000, 20_000)), {}),
        ("JPEG", Image.new("CMYK", (64, 48)), {}),
        ("JPEG", rgb, {"exif": exif}),
        ("JPEG", rgb, {"icc_profile": b"x" * 1000}),
        ("JPEG", rgb, {"progressive": True}),
        ("GIF", rgb, {"save_all": True, "append_images": [rgb] * 3}),
        ("WEBP", rgb, {"save_all": True, "append_images": [rgb.rotate(180)] * 3}),
        ("TIFF", Image.new("F", (64, 48)), {}),
        ("TIFF", rgb, {"save_all": True, "append_images": [rgb] * 3}),
        ("TIFF", Image.new("I;16", (64, 48)), {}),
        ("BMP", rgb, {}),
        ("PPM", rgb, {}),
        ("ICO", rgb, {}),
        ("TGA", rgb, {}),
    ]


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


_LIARS = {"JPEG": _jpeg, "PNG": _png, "TIFF": _tiff, "WEBP": _webp, "BMP": _bmp, "GIF": _gif}
