"""What a run says while it goes on: events, curves, lines, loggers that come and fail."""

import csv
import errno
import json
import re
import shutil
import time
from pathlib import Path
from threading import Event, Timer
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2
from tensorboard.summary.writer.record_writer import RecordWriter
from torchvision.ops import box_iou

from detkit.data.annotations import Annotations
from detkit.engine import epoch_stats, loggers, run_log
from detkit.engine.epoch_stats import EpochStats, memory_gib, time_data_wait
from detkit.engine.evaluator import Evaluation, coco_metrics
from detkit.engine.loggers import async_logger, open_loggers
from detkit.engine.loggers.async_logger import AsyncLogger, SafeLogger
from detkit.engine.loggers.tensorboard_logger import TensorBoard
from detkit.engine.run_log import RunLog
from detkit.engine.state import EpochState
from detkit.errors import DetkitError
from detkit.ops.curves import RECALLS, THRESHOLDS, Curves
from detkit.registry import LOGGERS
from detkit.structures import Batch
from detkit.tasks import load_config, train
from detkit.tasks.runs import resume, run_logging
from detkit.viz.confusion_matrix import confusion_matrix
from detkit.viz.plots import draw_confusion, draw_curves, draw_evaluation, save_figure
from tests.conftest import run_command
from tests.test_evaluator import random_predictions, random_set

CPU = torch.device("cpu")


def test_events_hold_what_one_watches(finished_run):
    events = EventAccumulator(str(finished_run)).Reload()
    scalars = set(events.Tags()["scalars"])
    assert {f"loss/{name}" for name in ("box", "cls", "dfl")} <= scalars
    assert {f"lr/{kind}" for kind in ("weight", "no_decay", "bias")} <= scalars
    assert {f"train/{name}" for name in ("grad_norm", "images_per_s", "data_wait", "memory_gib", "epoch")} <= scalars
    assert {"val/AP", "val/AP50", "val/AR100", "best/AP", "class_AP/circle"} <= scalars
    assert [event.step for event in events.Scalars("val/AP")] == [3, 6]  # batches
    assert [event.value for event in events.Scalars("train/epoch")] == [1, 2]
    with open(finished_run / "history.csv") as file:
        rows = list(csv.DictReader(file))
    for name, column in (("loss/cls", "cls"), ("train/grad_norm", "grad_norm"), ("val/AP50", "AP50")):
        assert [e.value for e in events.Scalars(name)] == pytest.approx([float(r[column]) for r in rows], rel=1e-5)
    assert all(0 < float(row["data_wait"]) < 1 and float(row["memory_gib"]) > 0.05 for row in rows)
    names = ("labels", "train_batch0", "val_predictions", "precision_recall", "confusion_matrix")
    assert {f"images/{name}" for name in names} <= set(events.Tags()["images"])
    image = events.Images("images/val_predictions")[0]
    assert (image.width, image.height) == Image.open(finished_run / "plots" / "val_predictions.jpg").size
    tensors = set(events.Tags()["tensors"])
    assert {"precision_recall/all", "precision_recall/circle", "run/model", "run/config"} <= tensors
    assert b"| backbone" in events.Tensors("run/model")[0].tensor_proto.string_val[0]


def test_runs_are_compared_by_hyper_parameters_and_best_metrics(finished_run):
    """In the run's own events, not in those of a folder within, and by scalars that are there."""
    events = EventAccumulator(str(finished_run)).Reload()
    data = {tag: events.SummaryMetadata(tag).plugin_data.content for tag in events.PluginTagToContent("hparams")}
    kinds = {tag.rpartition("/")[2]: plugin_data_pb2.HParamsPluginData.FromString(text) for tag, text in data.items()}
    values = kinds["session_start_info"].session_start_info.hparams
    assert values["optim.name"].string_value == "adamw"  # what auto chose
    assert values["optim.lr"].number_value == pytest.approx(0.0015, abs=1e-4)
    assert values["trainer.epochs"].number_value == 2
    assert not {key for key in values if "log" in key or "root" in key}
    assert sorted(events.Tags()["scalars"])[:3] == ["best/AP", "best/AP50", "best/AP75"]  # the tab shows the first five
    assert "experiment" not in kinds  # else it would be that of one run for all
    assert "session_end_info" in kinds
    assert not [path for path in finished_run.iterdir() if path.is_dir() and path.name != "plots"]


def naive_curve(annotations: Annotations, predictions: list[dict], label: int) -> tuple[list[float], list[float]]:
    """Precision and recall after each prediction of a class, best first: one loop, as COCO's paper tells it."""
    records = [p for p in predictions if p["category_id"] == annotations.category_ids[label]]
    records.sort(key=lambda p: -p["score"])
    taken, hits, false = set(), 0, 0
    curve = []
    positives = int(((annotations.labels == label) & ~annotations.crowd).sum())
    for record in records:
        index = annotations.image_ids.tolist().index(record["image_id"])
        x, y, w, h = record["bbox"]
        best, chosen = 0.5, None
        for t in range(annotations.offsets[index], annotations.offsets[index + 1]):
            if annotations.labels[t] == label and t not in taken:
                boxes = torch.tensor([[x, y, x + w, y + h]]), torch.tensor(annotations.boxes[t : t + 1])
                overlap = float(box_iou(*(b.double() for b in boxes)))
                if overlap >= best:
                    best, chosen = overlap, t
        taken.add(chosen)
        hits, false = hits + (chosen is not None), false + (chosen is None)
        curve.append((hits / (hits + false), hits / positives, record["score"]))
    return curve


@pytest.mark.parametrize("seed", range(3))
def test_curves_equal_a_naive_loop(seed, tmp_path):
    rng = np.random.default_rng(seed)
    annotations = random_set(rng)
    annotations.crowd[:] = False
    annotations.paths = [tmp_path / "x.jpg"] * len(annotations.image_ids)
    predictions = random_predictions(rng, annotations)
    for k, record in enumerate(predictions):
        record["score"] = round(0.05 + 0.9 * rng.permutation(len(predictions))[0] / len(predictions) + 1e-5 * k, 6)
    metrics, curves = coco_metrics(annotations, predictions)
    assert curves.labelled() == [0, 1]  # the third has no boxes
    precision_tc, recall_tc = curves.at_thresholds()
    for label in curves.labelled():
        curve = naive_curve(annotations, predictions, label)
        at_recall = [max((p for p, r, _ in curve if r >= least - 1e-9), default=0.0) for least in RECALLS]
        np.testing.assert_allclose(curves.precision_rc[:, label], at_recall, atol=1e-9)
        assert curves.ap50()[label] == pytest.approx(metrics["per_class"]["abc"[label]]["AP50"])
        for k, threshold in enumerate(THRESHOLDS):
            above = [(p, r) for p, r, score in curve if score >= threshold]
            recall = above[-1][1] if above else 0.0
            assert recall - 0.01 < recall_tc[k, label] <= recall + 1e-9
            best = max((p for p, r, _ in curve if r >= recall_tc[k, label] - 1e-9), default=0.0)
            assert precision_tc[k, label] == pytest.approx(best if recall_tc[k, label] or above else 1.0)
    f1 = curves.f1()[:, 0]
    assert f1.max() == pytest.approx(
        max(2 * p * r / max(p + r, 1e-9) for p, r, _ in naive_curve(annotations, predictions, 0)), abs=0.02
    )


def made_set(boxes: list[list[float]], labels: list[int], crowd: list[bool], offsets: list[int]) -> Annotations:
    images = len(offsets) - 1
    return Annotations(
        source=None,
        paths=[None] * images,
        image_ids=np.arange(images) * 10,
        sizes=np.full((images, 2), 100),
        offsets=np.array(offsets),
        boxes=np.array(boxes, float).reshape(-1, 4),
        labels=np.array(labels),
        areas=np.ones(len(labels)),
        crowd=np.array(crowd, bool),
        class_names=("cat", "dog"),
        category_ids=(5, 9),
    )


def test_a_confusion_matrix_by_hand():
    cat, dog, crowd = [0, 0, 10, 10], [20, 20, 40, 40], [60, 60, 100, 100]
    annotations = made_set([cat, dog, crowd, cat], [0, 1, 0, 0], [False, False, True, False], [0, 3, 4, 4])
    found = [
        (0, 5, [0, 0, 10, 10], 0.9),  # the cat
        (0, 9, [1, 0, 10, 10], 0.95),  # less well: a second one of it, so background
        (0, 5, [20, 20, 20, 19], 0.5),  # the dog, taken for a cat
        (0, 5, [70, 70, 10, 10], 0.9),  # in a crowd: does not count
        (0, 9, [0, 50, 10, 10], 0.24),  # below the score
        (20, 9, [0, 0, 5, 5], 0.3),  # in an image without boxes
    ]
    keys = ("image_id", "category_id", "bbox", "score")
    counts = confusion_matrix(annotations, [dict(zip(keys, record, strict=True)) for record in found])
    assert counts.tolist() == [[1, 0, 1], [1, 0, 0], [0, 2, 0]]  # the second image's cat is missed


@pytest.mark.parametrize(("least", "score", "found"), [(0.001, 0.25, 2), (0.5, 0.5, 1)])
def test_a_confusion_matrix_says_what_it_counts(least, score, found, tmp_path):
    annotations = made_set([[0, 0, 10, 10], [20, 20, 40, 40]], [0, 1], [False, False], [0, 2])
    annotations.paths = [tmp_path / "x.jpg"]
    keys = ("image_id", "category_id", "bbox", "score")
    records = [(0, 5, [0, 0, 10, 10], 0.9), (0, 9, [20, 20, 20, 20], 0.3)]
    predictions = [dict(zip(keys, record, strict=True)) for record in records]
    metrics, curves = coco_metrics(annotations, predictions)
    evaluation = Evaluation(metrics, predictions, [], [], curves)
    axes = draw_evaluation(evaluation.curves, evaluation.predictions, annotations, least)["confusion_matrix"].axes[0]
    assert axes.get_title() == f"boxes with score >= {score}, IoU 0.5"
    assert np.diagonal(axes.images[0].get_array()).sum() == found


@pytest.mark.parametrize("classes", [1, 3, 40, 300])
def test_figures_of_any_number_of_classes(classes, tmp_path):
    """Names that a plot could take for formulas or hide, and classes without boxes."""
    rng = np.random.default_rng(0)
    names = ["_hidden $x", "50% off", "x\ny", *(f"class {k}" for k in range(300))][:classes]
    precision = np.sort(rng.random((101, classes)), 0)[::-1].copy()
    boxes = rng.integers(0, 9, classes)
    precision[:, boxes == 0] = -1
    curves = Curves(precision, precision.clip(0), boxes)
    save_figure(draw_curves(curves, names), tmp_path / "curves.png")
    save_figure(draw_confusion(rng.integers(0, 9, (classes + 1, classes + 1)), names), tmp_path / "matrix.png")
    assert Image.open(tmp_path / "curves.png").format == Image.open(tmp_path / "matrix.png").format == "PNG"


def test_lines_without_a_terminal(train_overrides, tmp_path, monkeypatch, capsys):
    """A line every two batches that says time, epoch, batch, losses, speed, waiting and the time left."""
    monkeypatch.setenv("FORCE_COLOR", "1")  # as many CI services do
    arguments = [*train_overrides, f"run_dir={tmp_path / 'run'}", "trainer.log_every=2"]
    train.run(load_config("train", arguments))
    output = capsys.readouterr().out
    output = re.sub(r"\x1b\[[\d;]*m", "", output)  # colours
    assert "\r" not in output
    assert "\x1b" not in output
    lines = re.findall(r"^\d\d-\d\d \d\d:\d\d:\d\d  (epoch ./2  batch ./3)  (.*)$", output, re.MULTILINE)
    assert [where for where, _ in lines] == ["epoch 1/2  batch 2/3", "epoch 2/2  batch 1/3", "epoch 2/2  batch 3/3"]
    pattern = r"box [\d.]+  cls [\d.]+  dfl [\d.]+  \d+ images/s  \d+ % waiting for data  \d+:\d\d left"
    assert all(re.fullmatch(pattern, line) for _, line in lines)
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    assert [event.step for event in events.Scalars("loss/box")] == [2, 3, 4, 6]


def test_readings_are_of_what_came_between():
    current = EpochState(batches=4, images=32, seconds=2.0, waited=0.5, losses={"box": torch.tensor(8.0)})
    first = EpochStats.of(current, 4)
    current = EpochState(batches=8, images=64, seconds=4.0, waited=2.0, losses={"box": torch.tensor(11.0)})
    window = EpochStats.of(current, 7).since(first)
    assert (window.means(), window.images_per_s, window.data_wait) == ({"box": 1.0}, 16.0, 0.75)
    empty = EpochStats.of(EpochState(), 0).since(EpochStats.of(EpochState(), 0))
    assert (empty.means(), empty.images_per_s, empty.data_wait) == ({}, 0.0, 0.0)


def test_waiting_is_measured_and_nothing_else(monkeypatch):
    current, now = EpochState(), [0.0]
    monkeypatch.setattr(epoch_stats, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def slow():
        for _ in range(3):
            now[0] += 2
            yield Batch.empty()

    for _ in time_data_wait(slow(), current):
        now[0] += 5
    assert current.waited == 6
    assert 0.05 < memory_gib(CPU) < 64


class Broken:
    """A logger whose network is gone."""

    id = "x"

    def __init__(self, kind: type[Exception] = ConnectionError) -> None:
        self.kind = kind

    def __getattr__(self, name: str):
        def fail(*_: object, **__: object) -> None:
            raise self.kind("no route to host\nand more")

        return fail


def test_a_logger_that_fails_ends_nothing(train_overrides, tmp_path, monkeypatch, capsys):
    """Of two loggers, and TensorBoard, each is complained of once; the run writes all it writes without them."""
    for name in ("scalars", "image", "precision_recall"):
        monkeypatch.setattr(TensorBoard, name, Broken().any)
    for name in ("one", "two"):
        monkeypatch.setitem(LOGGERS._parts, name, lambda *_: Broken())
    arguments = [*train_overrides, f"run_dir={tmp_path / 'run'}", "trainer.loggers=[one,two]"]
    assert train.run(load_config("train", arguments))["last"]["epoch"] == 2
    output = capsys.readouterr().out
    for name in ("TensorBoard", "one", "two"):
        assert output.count(f"{name} failed (no route to host): some of its data is lost") == 1
    assert (tmp_path / "run" / "plots" / "confusion_matrix.png").is_file()


def test_what_cannot_be_drawn_ends_nothing(train_overrides, tmp_path, monkeypatch, capsys):
    """A part that cannot be counted, an unusual set: each is reported once, and the run writes the rest."""
    drawn = {
        (run_logging, "summarize"): "the model's summary",
        (run_logging, "draw_labels"): "labels.png",
        (run_log, "draw_batch"): "the training batches",
        (run_log, "draw_evaluation"): "the evaluation",
        (run_log, "plot_history"): "history.png",
    }
    for place, name in drawn:
        monkeypatch.setattr(place, name, Broken(ValueError).any)
    train.run(load_config("train", [*train_overrides, f"run_dir={tmp_path / 'run'}"]))
    output = capsys.readouterr().out
    for what in drawn.values():
        assert output.count(f"{what} cannot be drawn (no route to host)") == 1
    assert EventAccumulator(str(tmp_path / "run")).Reload().Tensors("run/config")
    assert (tmp_path / "run" / "best.safetensors").is_file()


def test_a_full_disk_is_no_fault_of_an_image(tmp_path):
    with pytest.raises(OSError, match="No space"), RunLog(tmp_path).drawing("labels.png"):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_tensorboard_goes_on_when_a_full_disk_has_room_again(tmp_path, monkeypatch, caplog):
    (channel,) = open_loggers([], tmp_path, 0)
    write = RecordWriter.write
    for step in range(1, 7):
        monkeypatch.setattr(RecordWriter, "write", full_disk if step == 2 else write)
        channel.call(lambda logger, step=step: logger.scalars({"loss/box": 1.0}, step))
    channel.close(True)
    assert caplog.messages == [
        "TensorBoard failed ([Errno 28] No space left): some of its data is lost, training continues"
    ]
    steps = [event.step for event in EventAccumulator(str(tmp_path)).Reload().Scalars("loss/box")]
    assert steps == [1, 3, 4, 5, 6]


def full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left")


def test_a_slow_logger_keeps_nobody_waiting():
    done: list[int] = []
    go_on = Event()
    channel = AsyncLogger("slow", None)
    for k in range(5):
        channel.call(lambda _, k=k: (go_on.wait(60), done.append(k)))
    assert done == []  # and here we are
    go_on.set()
    channel.close(True)
    assert done == [0, 1, 2, 3, 4]


def test_a_full_queue_is_reported_once(caplog):
    channel = AsyncLogger("slow", None)
    channel.calls.maxsize = 1
    go_on = Event()
    for _ in range(9):
        channel.call(lambda _: go_on.wait(60))
    assert caplog.messages == ["slow failed (too slow): some of its data is lost, training continues"]
    go_on.set()
    channel.close(True)


def test_a_logger_with_a_full_queue_is_closed_all_the_same():
    closed: list[bool] = []
    running, go_on = Event(), Event()
    channel = AsyncLogger("slow", SimpleNamespace(close=closed.append))
    channel.calls.maxsize = 1
    channel.call(lambda _: (running.set(), go_on.wait(60)))
    assert running.wait(60)
    channel.call(lambda _: None)
    assert channel.calls.full()
    Timer(0.1, go_on.set).start()
    channel.close(False)
    assert closed == [False]
    assert not channel.thread.is_alive()


def test_a_logger_that_hangs_is_not_waited_for_for_ever(monkeypatch, caplog):
    monkeypatch.setattr(async_logger, "CLOSE_TIMEOUT", {True: 0.1})
    go_on = Event()
    channel = AsyncLogger("hung", None)
    channel.calls.maxsize = 1
    for _ in range(3):
        channel.call(lambda _: go_on.wait(60))
    channel.close(True)
    assert len(caplog.messages) == 1
    assert channel.thread.is_alive()
    go_on.set()
    channel.calls.put(None)  # the test's end, not the channel's


def test_a_plugin_brings_a_logger(tmp_path, monkeypatch):
    opened: list[str | None] = []

    class Mine:
        id = "run-7"

        def __init__(self, run_dir: Path, run: str | None) -> None:
            opened.append(run)

        def close(self, finished: bool) -> None:
            pass

    monkeypatch.setitem(LOGGERS._parts, "mine", Mine)
    for step in (0, 5):
        loggers.check_loggers(["mine"])
        for channel in open_loggers(["mine"], tmp_path, step, resumed=step > 0):
            channel.close(True)
    assert opened == [None, "run-7"]


def test_a_missing_package_is_reported_before_anything_is_done(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda name: None)
    run_dir = tmp_path / "run"
    status, _, output = run_command(monkeypatch, capsys, "train", "trainer.loggers=[wandb]", f"run_dir={run_dir}")
    assert (status, run_dir.exists()) == (2, False)
    assert output == "error: trainer.loggers=wandb needs a package that is missing: pip install 'detkit[wandb]'\n"
    status, _, output = run_command(monkeypatch, capsys, "train", "trainer.loggers=[comet]")
    assert (status, output) == (2, "error: unknown logger 'comet': known are mlflow, wandb\n")


def test_a_logger_that_does_not_open_ends_a_new_run_only(tmp_path, monkeypatch, caplog):
    def fail(*_: object) -> None:
        raise RuntimeError("the server is away\nsee there")

    monkeypatch.setitem(LOGGERS._parts, "mlflow", fail)
    with pytest.raises(DetkitError, match=r"^trainer.loggers: mlflow cannot be opened: the server is away$"):
        open_loggers(["mlflow"], tmp_path, 0)
    (channel,) = open_loggers(["mlflow"], tmp_path, 7, resumed=True)
    assert isinstance(channel, SafeLogger)
    assert caplog.messages == ["mlflow cannot be opened (the server is away): training continues without it"]


def test_a_resumed_run_is_the_same_to_wandb(tmp_path, monkeypatch, caplog):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for step in (0, 5):
        channels = open_loggers(["wandb"], tmp_path, step, resumed=step > 0)
        for k in range(step, step + 2):
            channels[1].call(lambda logger, k=k: logger.scalars({"loss/box": 1.0}, k))
        channels[1].call(lambda logger, step=step: logger.hyper_parameters({"trainer.epochs": 2 + step}))
        channels[1].call(lambda logger: logger.text("model", "| a |"))
        for channel in channels:
            channel.close(True)
        time.sleep(1.1 * (step == 0))  # the folder is named by the second
    run = json.loads((tmp_path / "loggers.json").read_text())["wandb"]
    folders = [path.name for path in (tmp_path / "wandb").glob("offline-run-*")]
    assert len(folders) == 2
    assert all(name.endswith(f"-{run}") for name in folders)
    assert not [message for message in caplog.messages if "failed" in message]


def test_a_resumed_run_is_the_same_to_mlflow(train_overrides, tmp_path, monkeypatch, capsys):
    """Its points go on; and its parameters, which MLflow does not let change, are no failure."""
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    arguments = [*train_overrides, "run_dir=run", "trainer.loggers=[mlflow]", "trainer.epochs=1"]
    train.run(load_config("train", arguments))
    go_on(Path("run"), "trainer.epochs=2")
    assert "mlflow failed" not in capsys.readouterr().out
    client = mlflow.MlflowClient((tmp_path / "mlruns").as_uri())
    (run,) = client.search_runs([client.get_experiment_by_name("detkit").experiment_id])
    assert run.info.run_id == json.loads(Path("run/loggers.json").read_text())["mlflow"]
    assert run.info.status == "FINISHED"
    assert run.data.params["trainer.epochs"] == "1"
    assert [point.step for point in client.get_metric_history(run.info.run_id, "val/AP")] == [3, 6]
    assert "plots/confusion_matrix.png" in [file.path for file in client.list_artifacts(run.info.run_id, "plots")]


def go_on(run_dir: Path, *more: str) -> dict:
    """Resume in this process, as ``train resume=RUN_DIR MORE`` does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resume, "typed_keys", lambda: [key.partition("=")[0] for key in more])
        return train.run(load_config("train", [f"resume={run_dir}", *more]))


def test_a_run_of_an_earlier_version_goes_on(finished_run, tmp_path):
    """Whose state knows nothing of waiting, and whose history has fewer columns."""
    run_dir = tmp_path / "run"
    shutil.copytree(finished_run, run_dir)
    content = torch.load(run_dir / "state.pt", weights_only=True)
    for name in ("waited", "grad_norm"):
        del content["state"]["current"][name]
    for row in content["state"]["history"]:
        for name in ("grad_norm", "data_wait", "memory_gib"):
            del row[name]
    torch.save(content, run_dir / "state.pt")
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    for name in ("log_every", "loggers"):
        del config["trainer"][name]
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config))
    go_on(run_dir, "trainer.epochs=3")
    with open(run_dir / "history.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert [row["grad_norm"] == "" for row in rows] == [True, True, False]
