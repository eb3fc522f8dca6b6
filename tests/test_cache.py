"""Cached images are the images, whoever decoded them, and a cache that does not fit is refused in a message."""

import os
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from detkit.config import compose_config, resolve
from detkit.data import cache, dataset
from detkit.data.annotations import Annotations
from detkit.data.augment.pipeline import AugmentedDataset
from detkit.data.dataset import DetectionDataset
from detkit.data.formats.shapes import read_shapes
from detkit.data.loader import BatchLoader
from detkit.data.read import read_split
from detkit.errors import DetkitError
from detkit.ops.image import decode_image, decode_resized, fit_sizes, read_bytes


@pytest.fixture
def shapes(shapes_root, tmp_path, monkeypatch) -> Annotations:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return read_shapes("train", root=str(shapes_root))


def one_image(path: Path, size: tuple[int, int], box: tuple[float, ...]) -> Annotations:
    return Annotations(
        source=path.parent,
        paths=[path],
        image_ids=np.array([1]),
        sizes=np.array([size], np.int32),
        offsets=np.array([0, 1]),
        boxes=np.array([box], np.float64),
        labels=np.array([0]),
        areas=np.array([1.0]),
        crowd=np.array([False]),
        class_names=("a",),
        category_ids=(1,),
    )


def draw(path: Path, size: tuple[int, int], box: tuple[int, ...], **save: object) -> None:
    image = np.zeros((*size, 3), np.uint8)
    image[box[1] : box[3], box[0] : box[2]] = (250, 20, 240)
    Image.fromarray(image).save(path, **save)


@pytest.mark.parametrize("kind", ["ram", "disk"])
def test_workers_share_a_cache_and_samples_are_the_same(kind, shapes, monkeypatch):
    """Two processes fill it; this one finds every image there, decodes none, and makes the same batches."""
    augment = resolve(compose_config("train", ["~data.preset"]))["augment"]
    batches = {}
    for name in (None, kind):
        images = DetectionDataset(shapes, 64, name)
        view = AugmentedDataset(images, 64, augment, 0, 30)
        batches[name] = list(BatchLoader(view, 8, workers=2, shuffle=True).epoch(0))
    for plain, cached in zip(*batches.values(), strict=True):
        assert np.array_equal(plain.images, cached.images)
        assert np.array_equal(plain.boxes_bm4, cached.boxes_bm4)
    expected = [decode_resized(read_bytes(path), path, (256, 256), 64)[0] for path in shapes.paths]
    monkeypatch.setattr(dataset, "decode_resized", None)
    again = images if kind == "ram" else DetectionDataset(shapes, 64, kind)  # a later run
    for index, pixels in enumerate(expected):
        assert np.array_equal(again[0, index].image, pixels)


def test_a_disk_cache_belongs_to_its_files(shapes, tmp_path):
    folder = tmp_path / "cache" / "detkit" / "images"
    for expected, longest in ((1, 64), (1, 64), (2, 96)):
        DetectionDataset(shapes, longest, "disk")
        assert len(list(folder.iterdir())) == expected
    stat = shapes.paths[3].stat()
    os.utime(shapes.paths[3], ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    DetectionDataset(shapes, 64, "disk")
    assert len(list(folder.iterdir())) == 2  # that of the files as they were is gone


def test_what_does_not_fit_is_refused(shapes, monkeypatch, tmp_path):
    size = cache.shared_bytes(shapes, 64)
    assert size == 24 * (1 + 64 * 64 * 3)
    monkeypatch.setattr(cache, "free_memory", lambda: int(size / cache.MAX_FRACTION) - 1)
    with pytest.raises(DetkitError, match=r"data.cache=ram takes 0.00 GiB for 24 images at 64 pixels, more than 80%"):
        DetectionDataset(shapes, 64, "ram")
    usage = cache.shutil.disk_usage(tmp_path)._replace(free=size)
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(DetkitError, match=r"data.cache=disk takes 0.00 GiB .* data.cache=null"):
        DetectionDataset(shapes, 64, "disk")
    assert not list((tmp_path / "cache" / "detkit" / "images").iterdir())


def test_a_broken_cache_file_is_named(shapes, tmp_path):
    DetectionDataset(shapes, 64, "disk")
    (file,) = (tmp_path / "cache" / "detkit" / "images").iterdir()
    file.write_bytes(b"short")
    with pytest.raises(DetkitError, match=f"cannot use {file}"):
        DetectionDataset(shapes, 64, "disk")


def test_free_memory_is_what_the_machine_has():
    assert 2**20 < cache.free_memory() < 2**50


def test_a_process_caches_the_first_and_the_most_recent(shapes, monkeypatch):
    monkeypatch.setattr(cache, "LOCAL_CACHE_BYTES", 5 * 64 * 64 * 3)
    monkeypatch.setattr(cache, "RECENT_IMAGES", 2)
    images = DetectionDataset(shapes, 64)
    assert not images.in_memory
    for index in (0, 1, 2, 3, 4, 0, 5, 6, 5, 7):
        assert not images[0, index].image.flags.writeable
    assert list(images.cache.permanent) == [0, 1, 2, 3, 4]
    assert list(images.cache.recent) == [6, 7]
    monkeypatch.undo()
    assert DetectionDataset(shapes, 64).in_memory


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
@pytest.mark.parametrize("size", [(480, 640), (481, 643), (1001, 333), (90, 130), (257, 2049)])
def test_a_shrunk_image_s_boxes_are_where_their_pixels_are(suffix, size, tmp_path):
    height, width = size
    box = (width // 4, height // 4, width - width // 8, height - height // 8)
    path = tmp_path / f"a{suffix}"
    draw(path, size, box, **({"quality": 95} if suffix == ".jpg" else {}))
    sample = DetectionDataset(one_image(path, size, box), 128)[0, 0]
    assert sample.image.shape[:2] == tuple(fit_sizes(np.array([size]), 128)[0])
    assert max(sample.image.shape) <= 130
    assert sample.meta.size == size
    ys, xs = np.nonzero(sample.image[..., 0] > 125)
    found = (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
    np.testing.assert_allclose(sample.boxes[0], found, atol=1.0)
    red, green, blue = sample.image[sample.image.shape[0] // 2, sample.image.shape[1] // 2]
    assert red > 200 and green < 60 and blue > 200


def test_a_jpeg_is_decoded_at_a_fraction_and_upright(tmp_path):
    path = tmp_path / "a.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    draw(path, (301, 601), (0, 0, 300, 301), exif=exif)
    assert [decode_image(read_bytes(path), path, reduce).shape[:2] for reduce in (1, 2, 4, 8)] == [
        (601, 301),
        (301, 151),
        (151, 76),
        (76, 38),
    ]
    image, found = decode_resized(read_bytes(path), path, (601, 301), 100)
    assert found == (601, 301)
    assert image.shape[:2] == (100, 50)
    assert image[20].mean() > 100 > image[80].mean()


@pytest.mark.parametrize("stated", [(601, 1202), (600, 300), (150, 75)])
def test_a_wrong_size_is_named_though_decoded_smaller(stated, tmp_path):
    path = tmp_path / "a.jpg"
    draw(path, (300, 600), (0, 0, 300, 300))
    with pytest.raises(DetkitError, match=f"a.jpg is now 600x300 pixels.* was {stated[1]}x{stated[0]}"):
        DetectionDataset(one_image(path, stated, (0, 0, 10, 10)), 64)[0, 0]


@pytest.mark.parametrize("name", ["coco", "shapes"])
def test_every_set_has_the_option(name, shapes_root):
    cfg = resolve(compose_config("train", [f"data={name}", f"data.root={shapes_root}", "data.cache=disk"]))
    assert cfg["data"]["cache"] == "disk"
    if name == "shapes":
        assert len(read_split(cfg["data"], "train")) == 24  # the reader is not handed it


def test_a_window_of_memory_is_shared_by_its_images(shapes):
    """A transform that draws over a cached image fails loudly instead of spoiling it."""
    pixels = DetectionDataset(shapes, 64, "ram")[0, 0].image
    with pytest.raises((ValueError, cv2.error)):
        cv2.flip(pixels, 1, dst=pixels)
