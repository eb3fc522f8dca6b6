import contextlib
import io

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import detkit
from detkit.data.annotations import Annotations
from detkit.data.dataset import DetectionDataset, LetterboxDataset
from detkit.data.formats.shapes import read_shapes
from detkit.data.loader import BatchLoader
from detkit.engine.evaluator import METRICS, STAT_INDEX, coco_metrics, evaluate, evaluate_views
from detkit.inference.predictor import make_predictor


def random_set(rng: np.random.Generator, images: int = 12, boxes: int = 60, classes: int = 3) -> Annotations:
    """Ground truth with crowds, gaps in the category ids and images without boxes."""
    image = np.sort(rng.integers(0, images - 2, boxes))
    corner = rng.uniform(0, 300, (boxes, 2))
    extent = rng.choice([10, 50, 150], (boxes, 1)) * rng.uniform(0.7, 1.3, (boxes, 2))
    return Annotations(
        source=None,
        paths=[None] * images,
        image_ids=np.arange(images) * 3 + 5,
        sizes=np.full((images, 2), 500),
        offsets=np.searchsorted(image, np.arange(images + 1)),
        boxes=np.concatenate((corner, corner + extent), 1),
        labels=rng.integers(0, classes - 1, boxes),  # the last class has no boxes
        areas=extent.prod(1),
        crowd=rng.random(boxes) < 0.1,
        class_names=tuple("abc"[:classes]),
        category_ids=(2, 7, 40)[:classes],
    )


def random_predictions(rng: np.random.Generator, annotations: Annotations) -> list[dict]:
    """Some near the truth, some anywhere, with ties in the scores."""
    predictions = []
    owner = np.repeat(annotations.image_ids, np.diff(annotations.offsets))
    for k, (x1, y1, x2, y2) in enumerate(annotations.boxes):
        for _ in range(rng.integers(0, 4)):
            jitter = rng.normal(0, 0.08, 4) * (x2 - x1)
            box = [x1 + jitter[0], y1 + jitter[1], max(x2 - x1 + jitter[2], 1), max(y2 - y1 + jitter[3], 1)]
            label = annotations.labels[k] if rng.random() < 0.8 else rng.integers(3)
            record = {"image_id": int(owner[k]), "category_id": annotations.category_ids[label]}
            predictions.append({**record, "bbox": [float(v) for v in box], "score": round(float(rng.random()), 2)})
    return predictions


def oracle(annotations: Annotations, predictions: list[dict]) -> dict[str, float]:
    """pycocotools on the same records."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = annotations.ground_truth()
        truth.createIndex()
        scored = COCOeval(truth, truth.loadRes([dict(p) for p in predictions]), "bbox")
        scored.evaluate()
        scored.accumulate()
        scored.summarize()
    return {name: scored.stats[i] for name, i in zip(METRICS, STAT_INDEX, strict=True)}


@pytest.mark.parametrize("seed", range(6))
def test_metrics_equal_pycocotools(seed, tmp_path):
    rng = np.random.default_rng(seed)
    annotations = random_set(rng)
    annotations.paths = [tmp_path / "x.jpg"] * len(annotations.image_ids)
    predictions = random_predictions(rng, annotations)
    found, expected = coco_metrics(annotations, predictions)[0], oracle(annotations, predictions)
    assert 0.05 < found["AP"] < 0.95
    for name in METRICS:
        assert found[name] == pytest.approx(expected[name], abs=1e-9), name
    classes = [row["AP"] for row in found["per_class"].values()]
    assert classes[2] == -1  # nothing to find
    assert np.mean(classes[:2]) == pytest.approx(found["AP"], abs=1e-9)


@pytest.mark.parametrize(("boxes", "ap"), [(60, 0.0), (0, -1.0)])
def test_no_predictions_or_no_boxes_is_no_crash(boxes, ap, tmp_path):
    rng = np.random.default_rng(0)
    annotations = random_set(rng, boxes=boxes)
    annotations.paths = [tmp_path / "x.jpg"] * len(annotations.image_ids)
    predictions = random_predictions(rng, random_set(rng)) if not boxes else []
    assert coco_metrics(annotations, predictions)[0]["AP"] == ap


def test_predictions_are_left_as_they_were(tmp_path):
    rng = np.random.default_rng(0)
    annotations = random_set(rng)
    annotations.paths = [tmp_path / "x.jpg"] * len(annotations.image_ids)
    predictions = random_predictions(rng, annotations)
    coco_metrics(annotations, predictions)
    assert all(set(p) == {"image_id", "category_id", "bbox", "score"} for p in predictions)


def test_ap_does_not_depend_on_the_batch_size(shapes_root, finished_run):
    detector = detkit.load(finished_run / "best.safetensors")
    annotations = read_shapes("val", root=str(shapes_root))
    dataset = LetterboxDataset(DetectionDataset(annotations), 64)
    results = []
    for batch_size in (1, 4, 16):
        batches = BatchLoader(dataset, batch_size, workers=0).epoch(0)
        results.append(evaluate(detector.as_model("off"), batches, annotations))
    assert results[0].predictions
    assert len({len(r.predictions) for r in results}) == 1
    for name in METRICS:
        assert results[0].metrics[name] == pytest.approx(results[1].metrics[name], abs=1e-6)
        assert results[0].metrics[name] == pytest.approx(results[2].metrics[name], abs=1e-6)


def test_views_of_whole_images_give_the_metrics_of_batches(shapes_root, finished_run):
    detector = detkit.load(finished_run / "best.safetensors")
    annotations = read_shapes("val", root=str(shapes_root))
    batches = BatchLoader(LetterboxDataset(DetectionDataset(annotations), 64), 8, workers=0).epoch(0)
    model = detector.as_model("off")
    expected = evaluate(model, batches, annotations)
    limits = {"score": 0.001, "multi_label": True, "image_size": 64, "batch_size": 8}
    found = evaluate_views(make_predictor(model, **limits), annotations)
    assert len(found.predictions) == len(expected.predictions)
    for name in METRICS:
        assert found.metrics[name] == pytest.approx(expected.metrics[name], abs=1e-6)
    for extra in ({"tta": True}, {"tiles": 64, "merge": "nmm"}):
        result = evaluate_views(make_predictor(model, **limits, **extra), annotations)
        assert result.predictions
        assert 0 <= result.metrics["AP"] <= 1
