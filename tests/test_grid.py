"""The composition grid: any backbone with any neck, every block, every head builds, trains, evaluates and fuses."""

import pytest
import torch
from torch import nn

from detkit.checks.harness import Composition
from detkit.checks.model_checks import fused_outputs, non_square_input, output_shapes
from detkit.config import compose_config, group_options, resolve
from detkit.config.schema import OptimConfig
from detkit.engine.optimizer import Recipe, Schedule
from detkit.engine.step import TrainStep
from detkit.errors import DetkitError
from detkit.models.detector import build_detector, build_loss
from detkit.ops.nms import Thresholds, non_max_suppression
from detkit.ops.precision import Precision
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


def build(cfg: dict, device: torch.device) -> Composition:
    with device:
        detector = build_detector(cfg, ["a", "b", "c"])
    return Composition(detector, build_loss(cfg, detector.head))


@pytest.fixture(scope="module")
def optim() -> OptimConfig:
    return OptimConfig(**resolve(compose_config("train", ["~data"]))["optim"])


@pytest.mark.parametrize("words", GRID)
def test_a_composition_trains_evaluates_and_fuses(words, optim):
    """At 64x96 and a batch of 1; every parameter gets a gradient. Large ones on the meta device: shapes only."""
    cfg = resolve(compose_config("check", words.split()))
    composition = build(cfg, torch.device("meta"))
    if sum(p.numel() for p in composition.detector.parameters()) > LARGE:
        output_shapes(composition)
        return
    if "columns" in cfg["backbone"]:
        cfg["backbone"]["columns"] = 2  # one that follows another stands for all that do
    composition = build(cfg, CPU)
    detector = composition.detector
    recipe = Recipe.from_config(optim, batch_size=1, total_steps=1, num_classes=3)
    schedule = Schedule.from_config(recipe, optim, epochs=1, batches=1)
    step = TrainStep(detector, composition.loss, recipe, schedule, Precision(CPU, None), accumulate=2, clip=10.0)
    terms = step(composition.batch(images=1, boxes=4), 0, 0)
    assert all(term.isfinite() for term in terms.values())
    assert not composition.without_gradient()
    assert all(p.grad.isfinite().all() for p in detector.parameters() if p.requires_grad)
    before = [p.detach().clone() for p in detector.parameters()]
    step.update()
    moved = [not torch.equal(p, old) for p, old in zip(detector.parameters(), before, strict=True) if p.requires_grad]
    assert sum(moved) > 0.5 * len(moved)
    non_square_input(composition)
    found = non_max_suppression(*composition.decode(), Thresholds(0.0, 0.7, 5, multi_label=True))
    assert [len(boxes) for boxes, _, _ in found] == [5, 5]
    composition.randomize_norms()
    fused_outputs(composition)


def test_the_grid_holds_every_option():
    words = {word for words in GRID for word in words.split()}
    assert {f"{group}={name}" for group in ("backbone", "neck", "head") for name in group_options(group)} <= words
    slots = {"csp": "block", "conv": "downsample"}
    places = {f"{part}.{slots[s]}={name}" for part in ("backbone", "neck") for s in slots for name in blocks(s)}
    assert places <= words


@BACKBONES.register("test_coarse")
class Coarse(nn.Module):
    """Has stride 32 only, whatever it is asked for."""

    strides, out_channels = (32,), (8,)

    def __init__(self, out_strides: tuple[int, ...]) -> None:
        super().__init__()


@BACKBONES.register("test_silent")
class Silent(nn.Module):
    """Does not say what it gives."""

    def __init__(self, out_strides: tuple[int, ...]) -> None:
        super().__init__()


@NECKS.register("test_uneven")
class Uneven(nn.Module):
    """Declares more channels than strides."""

    in_strides = (8, 16, 32)
    out_channels, strides = (8, 8, 8), (8, 16)

    def __init__(self, in_channels: tuple[int, ...], strides: tuple[int, ...]) -> None:
        super().__init__()


@NECKS.register("test_undecided")
class Undecided(Uneven):
    """Does not say what it takes."""

    in_strides = None


UNFIT = [  # what is composed, parts put in its place, and what is said
    (["backbone.block=akconv"], {}, "block 'akconv' does not fit a csp slot: use one of c2f"),
    (["neck.downsample=c3"], {}, "block 'c3' does not fit a conv slot"),
    (["neck=repgd", "neck.context=c2f"], {}, "block 'c2f' does not fit a context slot"),
    (["neck=pafpn_p2", "neck.block=[c2f,c2f]"], {}, "neck.block lists 2 blocks"),
    (
        ["neck=repgd", "+neck.in_strides=[8,16,32]"],
        {},
        "neck 'repgd' takes the strides [4, 8, 16, 32], not [8, 16, 32]",
    ),
    (["neck.in_strides=[8,16,64]"], {}, "the neck takes [8, 16, 64]"),
    (["backbone=timm", "backbone.model=vit_tiny_patch16_224"], {}, "use one with a feature pyramid"),
    ([], {"head": {"name": "yolov5", "anchors": {8: [9, 9], 16: [9, 9]}}}, "head.anchors has none for stride 32"),
    (["head=yolov5", "loss=yolov8"], {}, "head 'yolov5' returns AnchorOutput: omit loss="),
    (["loss=yolov5"], {}, "loss 'yolov5' takes AnchorOutput"),
    ([], {"backbone": {"name": "test_coarse"}}, "has features at strides [32], neck 'pafpn' takes [8, 16, 32]"),
    ([], {"backbone": {"name": "test_silent"}}, "backbone 'test_silent' must declare out_channels and strides"),
    ([], {"neck": {"name": "test_uneven"}}, "neck 'test_uneven' must declare out_channels and strides"),
    ([], {"neck": {"name": "test_undecided"}}, "neck 'test_undecided' must declare in_strides"),
]


@pytest.mark.parametrize(("overrides", "parts", "sentence"), UNFIT, ids=lambda value: str(value)[:60])
def test_what_cannot_be_combined_says_why(overrides, parts, sentence):
    """Before any work starts: nothing runs but the building of the parts."""
    with pytest.raises(DetkitError) as error:
        build(resolve(compose_config("check", overrides)) | parts, CPU)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)
