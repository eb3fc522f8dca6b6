"""Weights, activations and images that are not finite: a step is skipped, nothing crashes, validation finds nothing."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import detkit
from detkit.data.dataset import DetectionDataset, LetterboxDataset
from detkit.data.formats.shapes import read_shapes
from detkit.data.loader import BatchLoader
from detkit.engine.evaluator import evaluate
from detkit.engine.optimizer import Recipe, Schedule
from detkit.engine.step import TrainStep
from detkit.models.detector import Detector, build_loss
from detkit.models.profiling import dummy_batch
from detkit.ops.nms import Thresholds, non_max_suppression
from detkit.ops.precision import Precision
from detkit.structures import DenseOutput

SMALL = ["model.width=0.0625"]
MODELS = {
    "yolov8n": SMALL,
    "yolov5n": SMALL,
    "yolov5n_akconv": SMALL,
    "goldyolo_n": [],
    "yolov8n_dynamicconv": SMALL,
}
BAD = (torch.nan, torch.inf, -torch.inf)


def make_step(model: str) -> TrainStep:
    detector = detkit.create_model(model, num_classes=3, overrides=MODELS[model]).train()
    recipe = Recipe("sgd", 0.01, 0.9, 0.0, 0.1)
    schedule = Schedule(recipe, epochs=10, final=0.01, shape="linear", warmup=0, warmup_momentum=0.8)
    precision, loss = Precision.from_config("off", torch.device("cpu")), build_loss(detector.cfg, detector.head)
    return TrainStep(detector, loss, recipe, schedule, precision, accumulate=1, clip=10.0)


def spoil_weights(detector: Detector, value: float) -> None:
    """One number of the first kernel."""
    kernel = next(p for p in detector.backbone.parameters() if p.ndim == 4)
    kernel.data[0, 0, 0, 0] = value


def spoil_last_bias(detector: Detector, value: float) -> None:
    """What the head adds at the end, at the last level."""
    last = [m for m in detector.head.modules() if isinstance(m, nn.Conv2d) and m.bias is not None][-1]
    last.bias.data.fill_(value)


def spoil_images(detector: Detector, value: float) -> None:
    detector.register_forward_pre_hook(lambda _, args: (args[0] * value,))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("spoil", [spoil_weights, spoil_last_bias, spoil_images])
@pytest.mark.parametrize("value", BAD)
def test_a_step_is_skipped(model, spoil, value):
    step = make_step(model)
    spoil(step.detector, value)
    before = {name: p.detach().clone() for name, p in step.detector.named_parameters()}
    for number, boxes in enumerate((3, 0)):
        step(dummy_batch(2, (64, 64), boxes, 3), number, 0)
    for name, parameter in step.detector.named_parameters():
        assert torch.equal(parameter.nan_to_num(7), before[name].nan_to_num(7)), name
    assert step.health.read().in_a_row == 2


@pytest.mark.parametrize("model", ["yolov8n", "yolov5n"])
@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("boxes", [0, 3])
def test_a_loss_meets_no_index_that_is_not_there(model, value, boxes):
    """Every output alone, all of it or one number: whatever the loss is, it is not finite where all of it is not."""
    detector = detkit.create_model(model, num_classes=3, overrides=SMALL).train()
    loss, batch = build_loss(detector.cfg, detector.head), dummy_batch(2, (64, 64), boxes, 3)
    with torch.no_grad():
        out = detector(batch.images.float() / 255)
    for name, whole in {name: x for name, x in vars(out).items() if name in ("cls", "reg", "objectness")}.items():
        for k in range(0, whole.numel(), whole.numel() // 7):
            one = whole.clone()
            one.view(-1)[k] = value
            total(loss, replace(out, **{name: one.requires_grad_()}), batch).backward()
        spoilt = total(loss, replace(out, **{name: torch.full_like(whole, value).requires_grad_()}), batch)
        spoilt.backward()
        learns = boxes or name == ("cls" if model == "yolov8n" else "objectness")  # without a box, this alone
        squashed = (
            model == "yolov5n" and name == "reg" and abs(value) == torch.inf
        )  # a box of yolov5's from infinity is finite
        assert not (learns and spoilt.isfinite()) or squashed, name


def total(loss: nn.Module, out: DenseOutput, batch: object) -> Tensor:
    return sum(loss(out, batch).values())


@pytest.mark.parametrize("model", ["yolov8n", "yolov5n"])
@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("spoil", [spoil_weights, spoil_last_bias])
def test_a_validation_finds_nothing(shapes_root, model, value, spoil):
    annotations = read_shapes("val", root=str(shapes_root))
    detector = detkit.create_model(model, num_classes=5, overrides=SMALL)
    spoil(detector, value)
    detector.class_names = annotations.class_names
    batches = BatchLoader(LetterboxDataset(DetectionDataset(annotations), 64), 5, workers=0).epoch(0)
    result = evaluate(detector.as_model("off"), batches, annotations)
    assert 0 <= result.metrics["AP"] < 0.1
    assert all(np.isfinite(record["bbox"]).all() and np.isfinite(record["score"]) for record in result.predictions)


def test_a_box_that_is_not_finite_suppresses_none():
    boxes = torch.tensor([[0.0, 0, 10, 10], [torch.nan, 0, 10, 10], [0, 0, torch.inf, 10], [20, 20, 30, 30]])
    scores = torch.tensor([[0.5], [0.9], [0.8], [torch.nan]])
    ((found, confidence, _),) = non_max_suppression(
        boxes[None], scores[None], Thresholds(0.1, 0.5, 10, multi_label=True)
    )
    assert found.tolist() == [[0, 0, 10, 10]]
    assert confidence.tolist() == [0.5]
