"""Images as they come, and what becomes of their boxes."""

import os

import numpy as np
import pytest
from PIL import Image

from detkit.data.files import list_images
from detkit.data.images import ALPHA, CMYK, DEEP, GRAY, MISSING, ROTATED, TRUNCATED, UNREADABLE, probe
from detkit.data.mending import turn_boxes
from detkit.ops.image import read_image

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8))


def save(path, image=PICTURE, **options):
    image.save(path, **options)
    return path


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_image_has_the_size_that_training_sees(tmp_path, suffix, orientation):
    path = save(tmp_path / f"a.{suffix}", exif=exif(orientation))
    height, width, *stored, flags = probe(path)
    assert read_image(path).shape[:2] == (height, width)
    assert stored == [30, 40]
    assert bool(flags & ROTATED) == (orientation > 1)


@pytest.mark.parametrize("orientation", range(5, 9))
def test_boxes_turn_with_their_image(tmp_path, orientation):
    """A rectangle in the stored picture is found where its turned box says."""
    pixels = np.zeros((32, 48, 3), np.uint8)
    pixels[4:12, 8:32] = 255
    path = save(tmp_path / "a.png", Image.fromarray(pixels), exif=exif(orientation))
    turned = turn_boxes(np.array([[8.0, 4, 32, 12]]), np.array([[32, 48]]), np.array([orientation]))
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
    ],
)
def test_kinds_of_images_are_told_and_read(tmp_path, name, mode, flags):
    image = PICTURE.convert("L").convert(mode) if mode.startswith("I") else PICTURE.convert(mode)
    path = save(tmp_path / name, image)
    assert probe(path) == (30, 40, 30, 40, flags)
    assert read_image(path).shape == (30, 40, 3)


@pytest.mark.parametrize("name", ["a.jpg", "a.png"])
def test_a_truncated_file_is_told(tmp_path, name):
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
    huge = save(tmp_path / "huge.png", Image.new("1", (20000, 20000)))
    assert probe(huge)[4] == UNREADABLE


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
