"""Rectangular validation: smaller frames, the same pixels, the same images."""

import json
from itertools import chain

import numpy as np
import pytest
import torch
from PIL import Image

import detkit
from detkit.data.dataset import DetectionDataset, LetterboxDataset
from detkit.data.formats.coco import read_coco_json
from detkit.data.loader import BatchLoader, BatchSampler, EpochSampler
from detkit.engine.evaluator import METRICS, evaluate
from detkit.ops.boxes import unletterbox
from detkit.ops.geometry import rect_frames
from detkit.ops.nms import Thresholds

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


def test_a_frame_is_the_smallest_that_holds_its_image():
    rng = np.random.default_rng(0)
    sizes = np.concatenate((rng.integers(1, 3000, (200, 2)), SIZES)).astype(np.int32)
    scaled = np.array([[h * 640 / max(h, w), w * 640 / max(h, w)] for h, w in sizes.tolist()])
    assert (rect_frames(sizes, 640) == np.ceil(scaled.round(6) / 32) * 32).all()


@pytest.mark.parametrize("batch_size", [1, 2, 4, 100])
def test_a_batch_has_images_of_one_frame(images, batch_size):
    dataset = LetterboxDataset(images, 128, rect=True)
    starts = dataset.batch_starts(batch_size)
    batches = [*BatchLoader(dataset, batch_size, workers=0, starts=starts).epoch(0)]
    assert [len(batch.images) for batch in batches] == np.diff([*starts, len(SIZES)]).tolist()
    assert max(len(batch.images) for batch in batches) <= batch_size
    assert sorted(meta.index for batch in batches for meta in batch.metas) == list(range(len(SIZES)))
    if batch_size > len(SIZES):
        assert len({tuple(batch.images.shape) for batch in batches}) == len(batches)  # of each frame one


@pytest.mark.parametrize("workers", [0, 2])
def test_the_same_pixels_with_less_around_them(images, workers):
    square = {s.meta.index: s for s in (LetterboxDataset(images, 128)[0, k] for k in range(len(images)))}
    dataset = LetterboxDataset(images, 128, rect=True)
    loader = BatchLoader(dataset, 3, workers=workers, starts=dataset.batch_starts(3))
    seen = []
    for batch in loader.epoch(0):
        assert all(side % 32 == 0 and side <= 128 for side in batch.images.shape[-2:])
        for pixels, boxes, valid, meta in zip(batch.images, batch.boxes_bm4, batch.valid_bm, batch.metas, strict=True):
            seen.append(meta.index)
            back = unletterbox(boxes[valid], meta.scale, meta.offset, meta.size)
            h, w = SIZES[meta.index]
            np.testing.assert_allclose(back, [[w / 8, h / 4, w * 5 / 8, h * 3 / 4]], atol=1e-4)
            other = square[meta.index]
            assert meta.scale == other.meta.scale
            content = [
                image[y : y + round(h * meta.scale[1]), x : x + round(w * meta.scale[0])]
                for image, (x, y) in (
                    (pixels.permute(1, 2, 0).numpy(), meta.offset),
                    (other.image, other.meta.offset),
                )
            ]
            assert np.array_equal(*content)
    assert sorted(seen) == list(range(len(SIZES)))


def predictions(images, detector, rect: bool, batch_size: int) -> dict:
    """Boxes and scores that are found in each image."""
    dataset = LetterboxDataset(images, 128, rect)
    loader = BatchLoader(dataset, batch_size, workers=0, starts=dataset.batch_starts(batch_size))
    result = evaluate(
        detector.as_model("off"), loader.epoch(0), images.annotations, Thresholds(0.0, max_det=20, multi_label=True)
    )
    assert set(METRICS) <= set(result.metrics)
    found: dict[int, list] = {}
    for p in result.predictions:
        found.setdefault(p["image_id"], []).append((*p["bbox"], p["score"]))
    return found


def test_predictions_do_not_depend_on_the_batch_size(images):
    """An untrained detector: every image has its predictions, a square one those without rect."""
    torch.manual_seed(0)
    detector = detkit.create_model("yolov8n", num_classes=1)
    first = predictions(images, detector, True, 1)
    assert set(first) == set(range(len(SIZES)))
    for batch_size in (3, 8):
        other = predictions(images, detector, True, batch_size)
        assert set(first) == set(other)
        for image, rows in first.items():
            np.testing.assert_allclose(other[image], rows, atol=1e-4)
    assert predictions(images, detector, False, 1)[2] == first[2]


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_share_every_batch(images, monkeypatch, ranks):
    dataset = LetterboxDataset(images, 128, rect=True)
    starts = dataset.batch_starts(4)
    whole = [[key.index for key in keys] for keys in BatchSampler(EpochSampler(len(dataset), shuffle=False), 4, starts)]
    monkeypatch.setattr("detkit.data.loader.world_size", lambda: ranks)
    shares = []
    for rank in range(ranks):
        monkeypatch.setattr("torch.distributed.get_rank", lambda rank=rank: rank)
        sampler = BatchSampler(EpochSampler(len(dataset), shuffle=False), 4, starts)
        shares.append([[key.index for key in keys] for keys in sampler])
        sampler.skip = 2
        assert [[key.index for key in keys] for keys in sampler] == shares[-1][2:]
    assert [[*chain(*parts)] for parts in zip(*shares, strict=True)] == whole
