"""A training from end to end, on a small drawing of the embedded set."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

import detkit
from detkit.engine.checkpoint import read_checkpoint
from detkit.engine.evaluator import METRICS, Evaluation
from detkit.engine.optimizer import Recipe, Schedule
from detkit.engine.step import TrainStep
from detkit.engine.trainer import Trainer
from detkit.models.losses.task_aligned import TaskAlignedLoss
from detkit.models.profiling import dummy_batch
from detkit.ops.precision import Precision
from detkit.tasks import eval as eval_task
from detkit.tasks import load_config, predict, train
from tests.conftest import trainer_options


def test_a_run_directory_holds_what_it_should(finished_run: Path):
    written = {str(p.relative_to(finished_run)) for p in finished_run.rglob("*") if p.is_file()}
    images = {f"plots/{name}.jpg" for name in ("train_batch0", "train_batch1", "train_batch2", "val_predictions")}
    files = {"config.yaml", "best.safetensors", "last.safetensors", "history.csv", "metrics.json"}
    files |= {f"plots/{name}.png" for name in ("history", "labels", "precision_recall", "confusion_matrix")}
    assert files | images <= written
    config = yaml.safe_load((finished_run / "config.yaml").read_text())
    assert (config["image_size"], config["trainer"]["epochs"], config["data"]["name"]) == (64, 2, "shapes")
    with open(finished_run / "history.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert all(float(row[key]) > 0 for row in rows for key in ("cls", "lr", "images_per_s", "seconds"))
    assert all(float(row[key]) >= 0 for row in rows for key in ("box", "dfl"))  # 0 while no prediction meets a box
    metrics = json.loads((finished_run / "metrics.json").read_text())
    assert set(metrics) == {"best", "last"}
    assert set(METRICS) | {"epoch", "per_class"} == set(metrics["last"])
    assert set(metrics["last"]["per_class"]) == {"circle", "square", "triangle", "star", "cross"}
    assert Image.open(finished_run / "plots" / "train_batch0.jpg").size == (1280, 640)


def test_training_twice_gives_the_same_weights(finished_run, train_overrides, tmp_path):
    train.run(load_config("train", [*train_overrides, "workers=2", f"run_dir={tmp_path / 'again'}"]))
    first, again = (load_file(path / "last.safetensors") for path in (finished_run, tmp_path / "again"))
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_evaluation_reproduces_the_training_s_ap(finished_run, tmp_path):
    ckpt = finished_run / "last.safetensors"
    overrides = [f"ckpt={ckpt}", f"run_dir={tmp_path / 'eval'}", "workers=0", "batch_size=3", "device=cpu"]
    metrics = eval_task.run(load_config("eval", overrides))
    reported = json.loads((finished_run / "metrics.json").read_text())["last"]
    for name in METRICS:
        assert metrics[name] == pytest.approx(reported[name], abs=1e-6)
    results = json.loads((tmp_path / "eval" / "predictions.json").read_text())
    assert set(results[0]) == {"image_id", "category_id", "bbox", "score"}
    assert json.loads((tmp_path / "eval" / "metrics.json").read_text()) == metrics
    plots = [path.name for path in (tmp_path / "eval" / "plots").iterdir()]
    assert sorted(plots) == ["confusion_matrix.png", "precision_recall.png"]


def test_predictions_are_written_as_images_and_json(finished_run, shapes_root, tmp_path):
    source = shapes_root / "images" / "val"
    out = tmp_path / "out"
    overrides = [
        f"ckpt={finished_run / 'best.safetensors'}",
        f"source={source}",
        f"run_dir={out}",
        "score=0.001",
        "max_det=3",
    ]
    predict.run(load_config("predict", overrides))
    records = json.loads((out / "predictions.json").read_text())
    assert [Path(r["file"]).name for r in records] == sorted(p.name for p in source.iterdir())
    found = [d for r in records for d in r["detections"]]
    assert found
    for detection in found:
        x1, y1, x2, y2 = detection["box"]
        assert 0 <= x1 <= x2 <= 256
        assert 0 <= y1 <= y2 <= 256
        assert detection["name"] in ("circle", "square", "triangle", "star", "cross")
    loaded = detkit.load(finished_run / "best.safetensors")
    (same,) = loaded.predict(records[0]["file"], score=0.001, max_det=3)
    np.testing.assert_allclose(same.boxes, [d["box"] for d in records[0]["detections"]], atol=0.05)
    with_boxes = next(r for r in records if r["detections"])
    drawn = np.asarray(Image.open(out / f"{Path(with_boxes['file']).stem}.jpg"))
    original = np.asarray(Image.open(with_boxes["file"]))
    assert drawn.shape == original.shape
    assert np.abs(drawn.astype(int) - original).max() > 60


@pytest.fixture
def make_step():
    def make(accumulate: int, clip: float = 1e9) -> TrainStep:
        torch.manual_seed(0)
        detector = detkit.create_model("yolov8n", num_classes=3).eval()  # batch norms stay as they are
        recipe = Recipe("sgd", 0.01, 0.9, 0.0, 0.1)
        schedule = Schedule(recipe, epochs=10, final=0.01, shape="linear", warmup=0, warmup_momentum=0.8)
        precision = Precision.from_config("off", torch.device("cpu"))
        return TrainStep(detector, TaskAlignedLoss(), recipe, schedule, precision, accumulate=accumulate, clip=clip)

    return make


def trainable(step: TrainStep) -> list[torch.Tensor]:
    return [p for p in step.detector.parameters() if p.requires_grad]


def halves(batch):
    for k in (0, len(batch.images) // 2):
        part = slice(k, k + len(batch.images) // 2)
        yield type(batch)(batch.images[part], batch.boxes_bm4[part], batch.labels_bm[part], batch.valid_bm[part])


def test_accumulated_gradients_are_the_sum_of_their_batches(make_step):
    """Two batches of 4 step the optimizer once, by the sum of what each would give alone."""
    torch.manual_seed(1)
    first, second = halves(dummy_batch(8, (64, 64), 3, 3))
    alone = []
    for part in (first, second):
        step = make_step(accumulate=9)  # more than come: look before the optimizer acts
        step(part, 0, 0)
        alone.append([p.grad.clone() for p in trainable(step)])
    both = make_step(accumulate=2)
    start = [p.detach().clone() for p in trainable(both)]
    both(first, 0, 0)
    assert both.pending == 1
    assert all(torch.equal(p, s) for p, s in zip(trainable(both), start, strict=True))
    both(second, 1, 0)
    assert both.pending == 0
    assert both.ema.updates == 1
    for before, after, a, b in zip(start, trainable(both), *alone, strict=True):
        expected = before - 0.01 * 1.9 * (a + b)  # Nesterov's first step
        torch.testing.assert_close(after, expected, atol=1e-5, rtol=1e-3)


def test_gradients_are_clipped(make_step):
    step = make_step(accumulate=1, clip=1e-3)
    start = [p.detach().clone() for p in trainable(step)]
    step(dummy_batch(8, (64, 64), 3, 3), 0, 0)
    moved = torch.stack([(p.detach() - s).norm() for p, s in zip(trainable(step), start, strict=True)]).norm()
    assert 0 < float(moved) <= 0.01 * 1.9 * 1e-3 * 1.01


@pytest.mark.parametrize("warmup", [0, 1, 90])
@pytest.mark.parametrize("accumulate", [1, 4, 7])
def test_accumulation_grows_in_the_warm_up(make_step, warmup, accumulate):
    """From 1 in the first batch, number 0, to ``accumulate`` after as many as the warm-up has, on a straight line."""
    step = make_step(accumulate)
    step.schedule = replace(step.schedule, warmup=warmup)
    table = np.interp(range(120), [0, warmup], [1, accumulate]).round() if warmup else [accumulate] * 120
    assert [step.accumulated_batches(k) for k in range(120)] == [int(x) for x in table]


def test_best_is_the_latest_of_the_best(tmp_path, monkeypatch, make_step):
    """Three epochs of AP -1 (a set without boxes), then 0.2, 0.1: best is the fourth, last the fifth."""
    scores = iter((-1.0, -1.0, -1.0, 0.2, 0.1))
    trainer = Trainer(make_step(1), [], [], None, **trainer_options(tmp_path, epochs=5))
    monkeypatch.setattr(trainer, "train_epoch", lambda epoch: ({"box": 1.0}, 1.0))
    blank = dict.fromkeys(METRICS, 0.0)
    monkeypatch.setattr(
        trainer, "validate", lambda: Evaluation(blank | {"AP": next(scores), "per_class": {}}, [], [], [])
    )
    results = trainer.fit()
    trainer.log.close()
    assert (results["best"]["epoch"], results["last"]["epoch"]) == (4, 5)
    assert read_checkpoint(tmp_path / "best.safetensors").metrics["AP"] == 0.2
    assert read_checkpoint(tmp_path / "last.safetensors").metrics["AP"] == 0.1


def test_training_starts_from_weights_of_another_class_count(finished_run, train_overrides, tmp_path, coco_set, capsys):
    images = [{"id": k, "file_name": f"{k}.png", "height": 64, "width": 64} for k in range(4)]
    boxes = [{"id": k + 1, "image_id": k, "category_id": 1, "bbox": [8, 8, 40, 40]} for k in range(4)]
    root = coco_set(images, boxes, [{"id": 1, "name": "one"}])
    rest = [f"data.root={root}", f"weights={finished_run / 'best.safetensors'}", f"run_dir={tmp_path / 'run'}"]
    train.run(load_config("train", [*train_overrides, "data=coco", "trainer.epochs=1", *rest]))
    printed = {line.replace("│", " ").split()[0]: line for line in capsys.readouterr().out.splitlines() if "│" in line}
    assert printed["backbone"].count("100 %") == printed["neck"].count("100 %") == 1
    assert "99.9 %" in printed["head"]  # the three 1x1 convolutions to the classes differ: 195 of 751,507 numbers
    assert detkit.load(tmp_path / "run" / "last.safetensors").class_names == ("one",)


def test_evaluation_on_another_set_of_the_same_classes(finished_run, shapes_root, tmp_path):
    images = {"val_images": "images/train", "val_annotations": "annotations/instances_train.json"}
    keys = [f"data.{key}={value}" for key, value in images.items()]
    overrides = [f"ckpt={finished_run / 'best.safetensors'}", "data=coco", f"data.root={shapes_root}", *keys]
    eval_task.run(load_config("eval", [*overrides, f"run_dir={tmp_path / 'eval'}", "workers=0"]))
    results = json.loads((tmp_path / "eval" / "predictions.json").read_text())
    assert max(r["image_id"] for r in results) > 10  # of the 24 training images, not the 10 others
