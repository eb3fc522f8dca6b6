"""Every model takes a training step and decodes on a pretended CUDA device: all tensors on it, nothing waits for it."""

import re

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DynamicOutputShapeException

from detkit.config import compose_config, group_options, resolve
from detkit.config.schema import OptimConfig
from detkit.engine.optimizer import Recipe, Schedule
from detkit.engine.step import TrainStep
from detkit.layers import reversible
from detkit.models.detector import build_detector, build_loss
from detkit.ops.precision import Precision
from detkit.structures import Batch
from tests.conftest import TORCH
from tests.fake_cuda import CUDA, WaitError, fake_cuda, move

SMALL_REVCOL = "backbone=revcol_tiny backbone.columns=3 backbone.layers=[1,1,1,1]"
SMALL_GOLD = "neck.low_blocks=1 neck.high_blocks=1 neck.rep_blocks=1"
SMALLEST = [name for name in group_options("model") if re.search(r"n(_|$)", name)]  # of each kind
ZOO = [
    *(f"model={name} {SMALL_GOLD if 'gold' in name else ''}".strip() for name in SMALLEST),
    SMALL_REVCOL,
    f"{SMALL_REVCOL} backbone.save_memory=false",
    "backbone=mobilenetv2",
    "backbone=timm",
    "backbone=timm backbone.model=convnext_atto",
    f"neck=repgd_s {SMALL_GOLD}",
    "head=yolov5 neck=pafpn_p2 optim=sgd trainer.multi_scale=0.5",
    "backbone.block=c3_akconv backbone.downsample=dynamic_conv neck.downsample=akconv",
]


@pytest.fixture(autouse=True)
def deterministic(monkeypatch):
    """As a training is: some operators then run otherwise on a GPU."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def without_the_copy_of_revcol(monkeypatch):
    """RevCol reads its alphas on the host, once a forward pass: the one wait that is meant to be."""

    def channels_to_save(alphas, keep, dtype):
        return [[None, torch.empty(2, dtype=torch.int64, device=CUDA), slice(None), None] for _ in alphas]

    monkeypatch.setattr(reversible, "channels_to_save", channels_to_save)


def fake_batch(images: int, boxes: int) -> Batch:
    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(images, *shape, dtype=dtype, device=CUDA)

    pixels = empty(3, 64, 64, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    return Batch(pixels, empty(boxes, 4), empty(boxes, dtype=torch.int64), empty(boxes, dtype=torch.bool))


@pytest.mark.skipif(TORCH < (2, 10), reason="torch asks the driver even for a simulated tensor")
@pytest.mark.parametrize("overrides", ZOO)
def test_a_step_and_an_evaluation_stay_on_the_device(overrides):
    """In fp16 with its scaler: forward, loss, backward, clipping, optimizer, average; then decoding, in bf16."""
    cfg = resolve(compose_config("train", ["~data", "model.depth=0.1", *overrides.split()]))
    with torch.device("meta"):
        detector = build_detector(cfg, ["a", "b", "c"])
    loss = build_loss(cfg, detector.head)
    optim = OptimConfig(**cfg["optim"])
    recipe = Recipe.from_config(optim, batch_size=2, total_steps=1, num_classes=3)
    schedule = Schedule.from_config(recipe, optim, epochs=1, batches=1)
    multi_scale = cfg["trainer"]["multi_scale"]
    with fake_cuda():
        precision = Precision(CUDA, torch.float16)
        options = {"accumulate": 1, "clip": 10.0, "multi_scale": multi_scale}
        step = TrainStep(move(detector).train(), loss, recipe, schedule, precision, **options)
        assert step.scaler.is_enabled()
        terms = step(fake_batch(2, 3), 0, 0)
        learning = [p for p in detector.parameters() if p.requires_grad]
        assert len(step.optimizer.state) == len(learning)  # a gradient reached each
        memory = [value for state in step.optimizer.state.values() for value in state.values()]
        average = step.ema.model.state_dict().values()
        with torch.inference_mode(), Precision(CUDA, torch.bfloat16).autocast():
            out = detector.eval()(fake_batch(1, 0).images / 255)
        found = detector.decode(out)
        without_boxes = loss(out, fake_batch(1, 0))
        assert out.cls.dtype is torch.bfloat16
        results = (*terms.values(), step.grad_norm, step.health.counts, *found, *without_boxes.values())
        assert all(value.device.type == "cuda" for value in (*results, *memory, *average))
        assert all(value.dtype is torch.float32 for value in (*terms.values(), *found, *without_boxes.values()))


@pytest.mark.parametrize(
    "touch",
    [
        lambda x: x.sum().item(),
        lambda x: x.cpu(),
        lambda x: bool(x.any()),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.masked_fill(x > 0, 1)[x > 0],
        lambda x: x.index_put((x > 0,), x.new_zeros(())),
        lambda x: x + torch.zeros(3),
        lambda x: torch.tensor([1.0, 2, 3], device=CUDA),
        lambda x: x.scatter_add(1, x[:, :1].long(), x[:, :1]),
        lambda x: x.requires_grad_().gather(1, x[:, :1].long()).sum().backward(),
    ],
)
def test_what_would_wait_is_noticed(touch):
    with (
        fake_cuda(),
        pytest.raises((WaitError, RuntimeError, DynamicOutputShapeException)),
    ):
        touch(torch.empty(3, 3, device=CUDA))


def test_the_pretended_backward_pass_is_autograd_s():
    """The pass that stands in for autograd's, on real numbers."""
    from tests.fake_cuda import _grad, _run_backward

    def function(x: Tensor, y: Tensor) -> Tensor:
        a, b = (x * y).chunk(2)
        return ((a.sigmoid() @ b.T).sum() + x.sum(0) * a.exp()[:, :1].expand(-1, 3).sum(0)).square().sum()

    x, y = (torch.rand(4, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    expected = torch.autograd.grad(function(x, y), (x, y))
    torch.testing.assert_close(_grad(function(x, y), (x, y), torch.tensor(1.0, dtype=torch.float64)), expected)
    _run_backward(function(x, y), torch.tensor(1.0, dtype=torch.float64))
    torch.testing.assert_close((x.grad, y.grad), expected)
