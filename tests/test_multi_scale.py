"""Multi-scale training: the size of a batch, and the boxes with it."""

import numpy as np
import pytest
import torch

import detkit
from detkit.engine.multi_scale import draw_size, resize_batch
from detkit.engine.optimizer import Recipe, Schedule
from detkit.engine.step import TrainStep
from detkit.models.losses.task_aligned import TaskAlignedLoss
from detkit.models.profiling import dummy_batch
from detkit.ops.precision import Precision
from detkit.structures import Batch


@pytest.mark.parametrize(
    ("image_size", "fraction", "stride", "sizes"),
    [
        (640, 0.5, 32, range(320, 961, 32)),
        (96, 0.5, 32, (64, 96, 128)),
        (64, 0.1, 32, (64,)),
        (128, 0.9, 64, (64, 128, 192)),
    ],
)
def test_sizes_are_every_multiple_of_the_range_alike(image_size, fraction, stride, sizes):
    drawn = [draw_size(image_size, fraction, stride, 0, step) for step in range(3000)]
    values, counts = np.unique(drawn, return_counts=True)
    assert values.tolist() == list(sizes)
    assert counts.min() > 0.6 * 3000 / len(values)
    assert drawn[:50] == [draw_size(image_size, fraction, stride, 0, step) for step in range(50)]
    if len(values) > 1:
        assert drawn[:50] != [draw_size(image_size, fraction, stride, 1, step) for step in range(50)]


@pytest.mark.parametrize("size", [64, 96, 160])
def test_boxes_scale_with_the_image(size):
    """White rectangles on black, found again in the resized image."""
    images = torch.zeros(3, 3, 96, 96).contiguous(memory_format=torch.channels_last)
    boxes = torch.tensor([[8.0, 20, 50, 60], [0, 0, 96, 96], [30, 9, 45, 90]])[:, None]
    for image, (box,) in zip(images, boxes.int().tolist(), strict=True):
        image[:, box[1] : box[3], box[0] : box[2]] = 1
    labels = torch.zeros(3, 1, dtype=torch.int64)
    batch = Batch((images * 255).byte(), boxes, labels, labels == 0)
    resized, result = resize_batch(images, batch, size)
    assert resized.shape == (3, 3, size, size)
    assert resized.is_contiguous(memory_format=torch.channels_last)
    for image, (box,) in zip(resized, result.boxes_bm4.tolist(), strict=True):
        ys, xs = torch.nonzero(image[0] > 0.5, as_tuple=True)
        found = (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
        np.testing.assert_allclose([float(v) for v in found], box, atol=1)
    assert torch.equal(batch.boxes_bm4, boxes)  # the loader's batch stays as it was


def make_step(**options) -> TrainStep:
    torch.manual_seed(0)
    detector = detkit.create_model("yolov8n", num_classes=3).train()
    recipe = Recipe("sgd", 0.01, 0.9, 0.0, 0.1)
    schedule = Schedule(recipe, epochs=10, final=0.01, shape="linear", warmup=0, warmup_momentum=0.8)
    precision = Precision.from_config("off", torch.device("cpu"))
    return TrainStep(detector, TaskAlignedLoss(), recipe, schedule, precision, accumulate=1, clip=10.0, **options)


def test_a_step_trains_at_the_size_drawn_and_zero_changes_nothing():
    batch = dummy_batch(2, (64, 64), 3, 3)
    plain, off, on = make_step(), make_step(multi_scale=0.0, seed=3), make_step(multi_scale=0.5, seed=3)
    seen = []
    alone = TaskAlignedLoss()(make_step().detector(batch.images.float() / 255), batch)
    assert all(torch.equal(alone[name], term) for name, term in make_step(multi_scale=0.0)(batch, 0, 0).items())
    on.detector.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[-1]))
    for step in range(6):
        expected, same = plain(batch, step, 0), off(batch, step, 0)
        assert all(torch.equal(expected[name], same[name]) for name in expected)
        on(batch, step, 0)
    assert seen == [draw_size(64, 0.5, 32, 3, step) for step in range(6)]
    assert len(set(seen)) > 1
    for a, b in zip(plain.detector.parameters(), off.detector.parameters(), strict=True):
        assert torch.equal(a, b)
