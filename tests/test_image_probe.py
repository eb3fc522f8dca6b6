"""Reading and probing images of all kinds, and the boxes of rotated images."""

import os
import struct
from io import BytesIO

import numpy as np
import PIL
import pytest
from PIL import Image, ImageCms

from detkit.data.file_utils import list_images
from detkit.data.image_probe import (
    ALPHA,
    CMYK,
    DEEP,
    GRAY,
    MISSING,
    ROTATED,
    TRUNCATED,
    UNREADABLE,
    probe,
    why_unreadable,
)
from detkit.data.validation import orient_boxes
from detkit.errors import UnreadableImage
from detkit.ops.image import read_image, set_max_pixels

PILLOW = tuple(int(part) for part in PIL.__version__.split(".")[:2])

IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8))


def save(path, image=IMAGE, **options):
    image.save(path, **options)
    return path


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp", "avif", "mpo"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_image_has_the_size_that_training_sees(tmp_path, suffix, orientation):
    path = save(tmp_path / f"a.{suffix}", exif=exif(orientation))
    height, width, *stored, flags = probe(path)
    assert read_image(path).shape[:2] == (height, width)
    assert stored == [30, 40]
    assert bool(flags & ROTATED) == (orientation > 1)


@pytest.mark.parametrize("orientation", range(5, 9))
def test_boxes_turn_with_their_image(tmp_path, orientation):
    """A rectangle in the stored image is where its rotated box says."""
    pixels = np.zeros((32, 48, 3), np.uint8)
    pixels[4:12, 8:32] = 255
    path = save(tmp_path / "a.png", Image.fromarray(pixels), exif=exif(orientation))
    turned = orient_boxes(np.array([[8.0, 4, 32, 12]]), np.array([[32, 48]]), np.array([orientation]))
    ys, xs = np.nonzero(read_image(path)[..., 0])
    assert turned[0].tolist() == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]


@pytest.mark.parametrize(
    ("name", "mode", "flags"),
    [
        ("a.jpg", "L", GRAY),
        ("a.jpg", "CMYK", CMYK),
        ("a.png", "RGBA", ALPHA),
        ("a.png", "LA", ALPHA | GRAY),
        ("a.png", "I;16", GRAY | DEEP),
        ("a.tif", "I;16", GRAY | DEEP),
        ("a.bmp", "RGB", 0),
        ("a.webp", "RGB", 0),
        ("a.gif", "RGB", 0),
        ("a.gif", "L", 0),
        ("a.avif", "RGB", 0),
        ("a.avif", "L", GRAY if PILLOW >= (12, 3) else 0),  # read as RGB before
        ("a.jfif", "RGB", 0),
        ("a.mpo", "RGB", 0),
    ],
)
def test_kinds_of_images_are_distinguished_and_read(tmp_path, name, mode, flags):
    image = IMAGE.convert("L").convert(mode) if mode.startswith("I") else IMAGE.convert(mode)
    path = save(tmp_path / name, image)
    assert probe(path) == (30, 40, 30, 40, flags)
    assert read_image(path).shape == (30, 40, 3)


@pytest.mark.parametrize("name", ["a.jpg", "a.png"])
def test_a_truncated_file_is_detected(tmp_path, name):
    path = save(tmp_path / name)
    content = path.read_bytes()
    path.write_bytes(content + bytes(5000))  # padded, and whole
    assert probe(path)[4] == 0
    path.write_bytes(content[: len(content) * 3 // 4])
    assert probe(path)[4] & TRUNCATED
    path.write_bytes(content[:10])
    assert probe(path)[4] & UNREADABLE


def test_what_is_no_image(tmp_path):
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "text.jpg").write_text("hello")
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "folder.jpg" / "x.jpeg").write_text("")
    os.symlink("loop.jpg", tmp_path / "loop.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")  # reading it would wait for ever
    found = {path.name: probe(path)[4] for path in list_images(tmp_path)}
    assert found == dict.fromkeys(("empty.jpg", "pipe.jpg", "text.jpg", "x.jpeg"), UNREADABLE) | {"loop.jpg": MISSING}
    with pytest.raises(UnreadableImage, match=r"pipe\.jpg: it is not a regular file"):
        read_image(tmp_path / "pipe.jpg")


def test_training_and_prediction_list_the_same_files(tmp_path):
    names = ["a.jpg", "b.JPEG", "c.jfif", "d.mpo", "e.PNG", "f.bmp", "g.webp", "h.tif", "i.tiff", "j.gif", "k.avif"]
    for name in (*names, ".hidden.jpg", "l.txt", "m.jp2", "jpg"):
        (tmp_path / name).touch()
    assert [path.name for path in list_images(tmp_path)] == names
    assert [path.name for path in list_images(tmp_path)] == names


OTHERS = {
    "ppm": "not an image of a supported format",
    "jp2": "JPEG 2000 image, which is not supported: convert it",
    "ico": "not an image of a supported format",
    "pdf": "PDF",
}


@pytest.mark.parametrize("form", ["jpg", "png", "bmp", "webp", "tif", "gif", "avif", "mpo", *OTHERS])
@pytest.mark.parametrize("named", ["jpg", "png", "gif"])
def test_what_a_file_holds_decides_whatever_it_is_called(tmp_path, form, named):
    """Training and prediction agree: what is probed as sound is decoded, and nothing else."""
    path = save(tmp_path / f"a.{form}").rename(tmp_path / f"b.{named}")
    if form in OTHERS:
        assert probe(path)[4] == UNREADABLE
        assert OTHERS[form] in why_unreadable(path)
        with pytest.raises(UnreadableImage, match=OTHERS[form]):
            read_image(path)
    else:
        assert probe(path)[4] == 0
        assert np.abs(read_image(path).astype(int) - np.asarray(IMAGE)).mean() < 60  # GIF has 256 colours


def test_of_animations_the_first_frame_is_read(tmp_path):
    frames = [Image.new("RGB", (40, 30), colour) for colour in ("red", "lime")]
    for name in ("a.gif", "a.webp", "a.avif", "a.png", "a.tif"):
        path = save(tmp_path / name, frames[0], save_all=True, append_images=frames[1:])
        assert np.abs(read_image(path).astype(int) - (255, 0, 0)).max() < 5
        assert probe(path)[:2] == (30, 40)


def test_an_orientation_in_xmp_alone_is_ignored_as_opencv_does_not(tmp_path):
    xmp = b'<x xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/>'
    for name in ("a.jpg", "a.webp", "a.avif"):
        path = save(tmp_path / name, xmp=xmp)
        assert probe(path)[:2] == read_image(path).shape[:2] == (30, 40)


@pytest.mark.parametrize("mode", ["F", "I"])
def test_32_bits_a_channel_are_refused_alike(tmp_path, mode):
    path = save(tmp_path / "a.tif", IMAGE.convert("L").convert(mode))
    assert probe(path)[4] == UNREADABLE
    with pytest.raises(UnreadableImage, match="32 bits per channel"):
        read_image(path)


def test_the_colours_of_a_lab_image(tmp_path):
    srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    path = save(tmp_path / "a.tif", ImageCms.profileToProfile(IMAGE, srgb, lab, outputMode="LAB"))
    assert np.abs(read_image(path).astype(int) - np.asarray(IMAGE)).mean() < 5


def jpeg_of_size(width, height):
    """The bytes of a small JPEG whose header says another size."""
    data = BytesIO()
    IMAGE.save(data, "JPEG")
    content = bytearray(data.getvalue())
    at = content.index(b"\xff\xc0") + 5
    content[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(content)


def image_of_size(kind: str, before: bytes, form: str, width: int, height: int) -> bytes:
    """The bytes of a small image that states another size, in the form of ``struct``, after the bytes ``before``."""
    data = BytesIO()
    IMAGE.save(data, kind)
    content = bytearray(data.getvalue())
    struct.pack_into(form, content, content.index(before) + len(before), width, height)
    return bytes(content)


@pytest.mark.parametrize(
    ("kind", "before", "form", "side", "raised"),
    [
        pytest.param(
            *("WEBP", b"\x9d\x01\x2a", "<HH", 16383, "more than 178956970 pixels, the limit of its format"),
            marks=pytest.mark.skipif(PILLOW < (13, 0), reason="Pillow calls it damaged"),
        ),
        ("AVIF", b"ispe\0\0\0\0", ">II", 20000, "more than 268435456 pixels, the limit of its format"),
    ],
)
def test_the_limit_is_named_where_the_library_that_opens_has_its_own(
    tmp_path, monkeypatch, kind, before, form, side, raised
):
    monkeypatch.delenv("DETKIT_MAX_PIXELS", raising=False)
    path = tmp_path / f"huge.{kind.lower()}"
    path.write_bytes(image_of_size(kind, before, form, side, side))
    for limit, message in ((178956970, "limit max_pixels=178956970"), (2**30, raised)):
        monkeypatch.setenv("DETKIT_MAX_PIXELS", str(limit))
        assert message in why_unreadable(path)
        with pytest.raises(UnreadableImage, match=message):
            read_image(path)


def test_one_limit_on_pixels_holds_for_all(tmp_path, monkeypatch):
    monkeypatch.delenv("DETKIT_MAX_PIXELS", raising=False)
    huge = save(tmp_path / "huge.png", Image.new("1", (20000, 20000)))
    (tmp_path / "bomb.jpg").write_bytes(jpeg_of_size(20000, 20000))
    for path in (huge, tmp_path / "bomb.jpg"):
        assert probe(path)[4] == UNREADABLE
        message = "20000x20000 pixels, more than the limit max_pixels=178956970"
        assert message in why_unreadable(path)
        with pytest.raises(UnreadableImage, match=message):
            read_image(path)
    monkeypatch.setenv("DETKIT_MAX_PIXELS", str(400_000_000))
    assert probe(huge)[4] == GRAY
    set_max_pixels(30 * 40)
    sound = save(tmp_path / "a.jpg")
    assert probe(sound)[4] == 0
    assert read_image(sound).shape == (30, 40, 3)
    set_max_pixels(30 * 40 - 1)
    assert probe(sound)[4] == UNREADABLE
    with pytest.raises(UnreadableImage, match="40x30 pixels, more than the limit max_pixels=1199"):
        read_image(sound)


@pytest.mark.parametrize("place", ("before", "after"))
@pytest.mark.parametrize("whole", (True, False))
def test_a_png_s_orientation_is_found_before_and_after_its_pixels(tmp_path, place, whole):
    exif, file = Image.Exif(), tmp_path / "a.png"
    exif[0x0112] = 6
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(file, exif=exif)
    data = file.read_bytes()
    start = data.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(data[start : start + 4])
    if place == "after":
        data = data[:start] + data[end:-12] + data[start:end] + data[-12:]
    file.write_bytes(data if whole else data[:-12])
    assert probe(file)[:2] == (30, 20)
    assert not whole or read_image(file).shape[:2] == (30, 20)
    assert probe(file)[4] & (ROTATED | TRUNCATED) == (ROTATED if whole else ROTATED | TRUNCATED)


def test_a_png_s_malformed_exif_is_passed_over(tmp_path):
    file = tmp_path / "a.png"
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(file)
    data = file.read_bytes()
    for content in (b"", b"garbage", b"II*\0\xff\xff\xff\xff"):
        chunk = len(content).to_bytes(4) + b"eXIf" + content + bytes(4)
        file.write_bytes(data[:-12] + chunk + data[-12:])
        assert probe(file) == (20, 30, 20, 30, 0)
