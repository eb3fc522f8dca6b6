"""Tiles of drawn images: they cover every pixel, and boxes are where their pixels are."""

import json

import numpy as np
import pytest
from PIL import Image

from detkit.config import compose_config, resolve
from detkit.data.augment.mosaic import clip_boxes
from detkit.data.augment.pipeline import AugmentedDataset
from detkit.data.dataset import DetectionDataset
from detkit.data.formats.coco import read_coco_json
from detkit.data.loader import BatchLoader
from detkit.data.sampling import class_balanced
from detkit.data.tiles import TiledDataset
from detkit.ops.geometry import tile_starts

SIZES = [(300, 500), (90, 60), (300, 500), (64, 400), (97, 97), (96, 96), (250, 96)]  # height, width
SIDE, OVERLAP = 96, 0.25


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> DetectionDataset:
    """Noise of 0..99 with squares of 100 and more, each of a gray of its own; the third image shows none."""
    root = tmp_path_factory.mktemp("large")
    rng = np.random.default_rng(0)
    images, boxes = [], []
    for k, (height, width) in enumerate(SIZES):
        pixels = rng.integers(0, 100, (height, width, 3), dtype=np.uint8)
        for j in range(0 if k == 2 else 6):
            w, h = rng.integers(5, 25, 2).tolist()
            x, y = int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1))
            if (pixels[max(y - 1, 0) : y + h + 1, max(x - 1, 0) : x + w + 1] < 100).all():
                pixels[y : y + h, x : x + w] = 100 + 20 * j
                boxes.append({"id": len(boxes) + 1, "image_id": k, "category_id": j % 2, "bbox": [x, y, w, h]})
        Image.fromarray(pixels).save(root / f"{k}.png")
        images.append({"id": k, "file_name": f"{k}.png", "height": height, "width": width})
    boxes.append({"id": 999, "image_id": 2, "category_id": 0, "bbox": [0, 0, 200, 200], "iscrowd": 1})
    content = {"images": images, "annotations": boxes, "categories": [{"id": 0, "name": "a"}, {"id": 1, "name": "b"}]}
    (root / "boxes.json").write_text(json.dumps(content))
    return DetectionDataset(read_coco_json(root / "boxes.json", root))


@pytest.mark.parametrize(
    ("length", "size", "overlap"), [(300, 96, 0.25), (97, 96, 0.5), (96, 96, 0.2), (1000, 33, 0.9)]
)
def test_tiles_along_a_side_cover_it_and_overlap(length, size, overlap):
    starts = tile_starts(length, size, overlap)
    assert starts[0] == 0
    assert starts[-1] == max(length - size, 0)
    assert (size - np.diff(starts) >= overlap * size).all()


def test_tiles_cover_every_pixel_of_the_large_images(drawn):
    tiled = TiledDataset(drawn, SIDE, OVERLAP)
    seen = [np.zeros(size, int) for size in SIZES]
    for image, (x1, y1, x2, y2) in zip(tiled.image_of_tile, tiled.windows, strict=True):
        assert max(x2 - x1, y2 - y1) == SIDE
        seen[image][y1:y2, x1:x2] += 1
    for size, count in zip(SIZES, seen, strict=True):
        assert (count > 0).all() if max(size) > SIDE else not count.any()


def test_every_object_below_the_overlap_is_whole_in_a_tile(drawn):
    tiled, a = TiledDataset(drawn, SIDE, OVERLAP), drawn.annotations
    large = 0
    for image, size in enumerate(SIZES):
        windows = tiled.windows[tiled.image_of_tile == image]
        for x1, y1, x2, y2 in a.boxes[a.offsets[image] : a.offsets[image + 1]]:
            if max(size) > SIDE and max(x2 - x1, y2 - y1) <= SIDE * OVERLAP:
                inside = (windows[:, :2] <= (x1, y1)).all(1) & (windows[:, 2:] >= (x2, y2)).all(1)
                assert inside.any()
                large += 1
    assert large > 15


def test_items_are_the_images_then_filled_tiles_then_empty_ones(drawn):
    tiled = TiledDataset(drawn, SIDE, OVERLAP, positive_fraction=0.8)
    a, n = drawn.annotations, len(SIZES)
    for index in range(n):
        assert np.array_equal(tiled[0, index].image, drawn[0, index].image)
    filled = 0
    for image, window in zip(tiled.image_of_tile, tiled.windows, strict=True):
        rows = slice(a.offsets[image], a.offsets[image + 1])
        filled += bool(clip_boxes(a.boxes[rows][~a.crowd[rows]], window)[1].any())
    assert len(tiled.positive_tiles) == filled
    assert len(tiled) == n + filled + round(filled / 4)
    items, labels = tiled.labels_by_item()
    for index in range(n, len(tiled)):
        sample = tiled[0, index]
        assert (sample.boxes.dtype, sample.labels.dtype, sample.image.dtype) == (np.float32, np.int64, np.uint8)
        assert sorted(sample.labels) == sorted(labels[items == index])
        assert (len(sample.boxes) > 0) == (index < n + filled)
        for box in sample.boxes.astype(int):
            cut = sample.image[box[1] : box[3], box[0] : box[2]]
            assert cut.min() >= 100  # the square, and nothing around it
            assert cut.min() == cut.max()
            x, y = sample.meta.offset
            whole = drawn[0, sample.meta.index].image
            assert np.array_equal(cut, whole[box[1] - y : box[3] - y, box[0] - x : box[2] - x])
    expected = class_balanced(items, labels, len(tiled))
    assert expected.sum() == pytest.approx(len(tiled))


def test_empty_tiles_take_turns(drawn):
    tiled = TiledDataset(drawn, SIDE, OVERLAP, positive_fraction=0.8)
    slots = range(len(tiled.positive_tiles), len(tiled.positive_tiles) + tiled.empty_slots)
    epochs = -(-len(tiled.empty_tiles) // tiled.empty_slots)
    seen = [tiled.tile(epoch, slot) for epoch in range(epochs) for slot in slots]
    assert set(seen) == set(tiled.empty_tiles.tolist())
    assert len(set(seen[: len(tiled.empty_tiles)])) == len(tiled.empty_tiles)
    assert TiledDataset(drawn, SIDE, OVERLAP, positive_fraction=1.0).empty_slots == 0
    assert TiledDataset(drawn, SIDE, OVERLAP, positive_fraction=0.01).empty_slots == len(tiled.empty_tiles)
    assert len(TiledDataset(drawn, 512)) == len(SIZES)


def test_tiles_pass_through_the_mosaic(drawn):
    augment = resolve(compose_config("train", ["augment=small_objects", "~data.preset"]))["augment"]
    dataset = AugmentedDataset(TiledDataset(drawn, SIDE, OVERLAP), 64, augment, 0, 20)
    one, other = (list(BatchLoader(dataset, 8, workers=w, shuffle=True).epoch(0)) for w in (0, 1))
    assert sum(len(batch.images) for batch in one) == len(dataset)
    assert all(np.array_equal(a.images, b.images) for a, b in zip(one, other, strict=True))
