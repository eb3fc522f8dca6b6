"""The composition grid: any backbone with any neck, every block, every head builds, trains, evaluates and fuses."""

import pytest
import torch

from detkit.config import compose_config, group_options, resolve
from detkit.engine.composition import Composition, check_gradients
from detkit.engine.optim import Recipe, Schedule
from detkit.engine.precision import Precision
from detkit.engine.properties import fused_outputs, non_square_input
from detkit.engine.step import TrainStep
from detkit.errors import DetkitError
from detkit.models.detector import build_detector, build_loss
from detkit.ops.nms import select_boxes
from detkit.registry import BACKBONES, BLOCKS, NECKS

CPU = torch.device("cpu")
LARGE = 50e6  # parameters; above, shapes are enough


def blocks(slot: str) -> list[str]:
    return [name for name in BLOCKS.names() if BLOCKS.get(name).slot == slot]


GRID = [
    *(f"backbone={backbone} neck={neck}" for backbone in group_options("backbone") for neck in group_options("neck")),
    *(f"backbone.block={block} neck.block={block}" for block in blocks("csp")),
    *(f"backbone.downsample={block} neck.downsample={block}" for block in blocks("conv")),
    *(f"head={head} neck={neck}" for head in group_options("head") for neck in ("pafpn_p2", "repgd")),
]


def compose(overrides: list[str], device: torch.device) -> Composition:
    cfg = resolve(compose_config("check", overrides))
    with device:
        detector = build_detector(cfg, ["a", "b", "c"])
    return Composition(detector, build_loss(cfg, detector.head))


def smaller(backbone: str) -> list[str]:
    """What is no matter of composition: one column that follows another stands for all that do."""
    return ["backbone.columns=2"] if "columns" in compose_config("check", [backbone]).backbone else []


def train_step(composition: Composition) -> TrainStep:
    optim = resolve(compose_config("train", ["~data"]))["optim"]
    recipe = Recipe.pick(optim, batch_size=1, total_steps=1, num_classes=3)
    schedule = Schedule.pick(recipe, optim, epochs=1, batches=1)
    precision = Precision(CPU, None)
    return TrainStep(composition.detector, composition.loss, recipe, schedule, precision, accumulate=2, clip=10.0)


@pytest.mark.parametrize("words", GRID)
def test_a_composition_trains_evaluates_and_fuses(words):
    """At 64x96 and a batch of 1; every parameter gets a gradient. Large ones on the meta device: shapes only."""
    overrides = words.split()
    composition = compose(overrides, torch.device("meta"))
    if sum(p.numel() for p in composition.detector.parameters()) > LARGE:
        non_square_input(composition)
        return
    composition = compose([*overrides, *smaller(overrides[0])], CPU)
    detector = composition.detector
    step = train_step(composition)
    terms = step(composition.batch(images=1, boxes=4), 0, 0)
    assert all(term.isfinite() for term in terms.values())
    check_gradients(detector)
    before = [p.detach().clone() for p in detector.parameters()]
    step.update()
    moved = [not torch.equal(p, old) for p, old in zip(detector.parameters(), before, strict=True) if p.requires_grad]
    assert sum(moved) > 0.5 * len(moved)
    non_square_input(composition)
    found = select_boxes(*composition.decode(), score=0.0, iou=0.7, max_det=5)
    assert [len(boxes) for boxes, _, _ in found] == [5, 5]
    composition.awaken()
    fused_outputs(composition)
