"""Rectangular validation: smaller frames, the same pixels, the same images."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import detkit
from detkit.data.coco import read_coco_json
from detkit.data.dataset import DetectionDataset, LetterboxDataset, rect_frames
from detkit.data.loader import BatchLoader
from detkit.engine.evaluator import METRICS, evaluate
from detkit.models.detector import to_original

SIZES = [(60, 100), (100, 60), (50, 50), (333, 666), (64, 200), (200, 64), (30, 33), (1, 90), (128, 96)]


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> DetectionDataset:
    root = tmp_path_factory.mktemp("rect")
    rng = np.random.default_rng(0)
    for k, (h, w) in enumerate(SIZES):
        Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)).save(root / f"{k}.png")
    content = {
        "images": [{"id": k, "file_name": f"{k}.png", "height": h, "width": w} for k, (h, w) in enumerate(SIZES)],
        "annotations": [
            {"id": k + 1, "image_id": k, "category_id": 1, "bbox": [w / 8, h / 4, w / 2, h / 2]}
            for k, (h, w) in enumerate(SIZES)
        ],
        "categories": [{"id": 1, "name": "one"}],
    }
    (root / "boxes.json").write_text(json.dumps(content))
    return DetectionDataset(read_coco_json(root / "boxes.json", root))


@pytest.mark.parametrize("batch_size", [1, 2, 4, 100])
def test_frames_are_the_smallest_that_hold_their_batch(batch_size):
    rng = np.random.default_rng(0)
    sizes = np.concatenate((rng.integers(1, 3000, (200, 2)), SIZES)).astype(np.int32)
    order, frames = rect_frames(sizes, 640, batch_size)
    assert sorted(order) == list(range(len(sizes)))
    aspect = sizes[order, 0] / sizes[order, 1]
    assert (np.diff(aspect) >= 0).all()
    for start in range(0, len(order), batch_size):
        part = slice(start, start + batch_size)
        scaled = np.array([[h * 640 / max(h, w), w * 640 / max(h, w)] for h, w in sizes[order[part]].tolist()])
        least = np.ceil(scaled.max(0).round(6) / 32) * 32
        assert (frames[part] == least).all()
    assert frames.max() == 640


@pytest.mark.parametrize("workers", [0, 2])
def test_the_same_pixels_with_less_around_them(images, workers):
    square = {s.origin.index: s for s in (LetterboxDataset(images, 128)[0, k] for k in range(len(images)))}
    loader = BatchLoader(LetterboxDataset(images, 128, rect_batch=3), 3, workers=workers)
    seen = []
    for batch in loader.epoch(0):
        assert all(side % 32 == 0 and side <= 128 for side in batch.images.shape[-2:])
        for pixels, boxes, valid, origin in zip(
            batch.images, batch.boxes_bm4, batch.valid_bm, batch.origins, strict=True
        ):
            seen.append(origin.index)
            back = to_original(boxes[valid], origin.scale, origin.offset, origin.size)
            h, w = SIZES[origin.index]
            np.testing.assert_allclose(back, [[w / 8, h / 4, w * 5 / 8, h * 3 / 4]], atol=1e-4)
            other = square[origin.index]
            assert origin.scale == other.origin.scale
            content = [
                image[y : y + round(h * origin.scale[1]), x : x + round(w * origin.scale[0])]
                for image, (x, y) in (
                    (pixels.permute(1, 2, 0).numpy(), origin.offset),
                    (other.image, other.origin.offset),
                )
            ]
            assert np.array_equal(*content)
    assert sorted(seen) == list(range(len(SIZES)))


def test_evaluation_takes_every_image_once(images):
    """An untrained detector: a square image is predicted as before, and every one has its predictions."""
    torch.manual_seed(0)
    detector = detkit.create_model("yolov8n", num_classes=1)
    results = {}
    for rect in (None, 1):
        loader = BatchLoader(LetterboxDataset(images, 128, rect), 1, workers=0)
        results[rect] = evaluate(detector, loader.epoch(0), images.annotations, score=0.0, max_det=20)
    assert set(METRICS) <= set(results[1].metrics)
    assert {p["image_id"] for p in results[1].predictions} == set(range(len(SIZES)))
    square, rect = ([p for p in results[rect].predictions if p["image_id"] == 2] for rect in (None, 1))
    assert square == rect
