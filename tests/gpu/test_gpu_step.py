"""A training step on a GPU: it learns, waits for nothing, skips what is not finite, and repeats itself."""

import copy
import warnings
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from detkit.engine.step import TrainStep
from detkit.engine.trainer import Trainer
from detkit.structures import Batch
from tests.conftest import trainer_options
from tests.gpu.conftest import SMALL, make_step, noise, nothing_waits

pytestmark = pytest.mark.gpu
MODELS = [  # one of every backbone, neck, head and block that is no other's twin
    "model=yolov8n",
    "model=yolov5n",
    "model=yolov5n_akconv",
    "model=yolov8n_dynamicbnact",
    "model=goldyolo_n",
    "backbone=mobilenetv2",
    "backbone=timm",
]
REVCOL = "backbone=revcol_tiny backbone.columns=3 backbone.layers=[1,1,1,1] backbone.channels=[16,32,48,64]"


@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
@pytest.mark.parametrize("overrides", ["model=yolov8n", "model=yolov5n", REVCOL])
def test_a_batch_is_learnt(overrides, amp, cuda):
    """In thirty steps: a loss that grows with the overlaps rises first, then falls."""
    step, batch = make_step(f"{overrides} {SMALL}", cuda, amp), noise(cuda)
    losses = torch.stack([sum(step(batch, k, 0).values()) for k in range(30)])
    counts = step.health.read()
    assert losses.isfinite().all()
    assert losses[-3:].mean() < 0.8 * losses.max()
    assert (counts.bad_losses, counts.skipped_steps) == (0, 0)
    assert counts.overflow_steps <= (3 if amp == "fp16" else 0)  # the scale starts at 65536


@pytest.mark.parametrize(
    ("overrides", "optimizer", "amp"),
    [
        *((overrides, "adamw", "bf16") for overrides in MODELS),
        ("model=yolov8n", "sgd", "fp16"),
        ("model=yolov8n", "adamw", "off"),
    ],
)
def test_a_step_never_waits(overrides, optimizer, amp, cuda, deterministic):
    step = make_step(f"{overrides} {SMALL}", cuda, amp, optimizer)
    batches = [noise(cuda) for _ in range(4)]
    step(batches[0], 0, 0)  # what is made at the first time may wait
    with nothing_waits(cuda):
        for k in (1, 2, 3):
            step(batches[k], k, 0)


def test_revcol_waits_once_a_forward_pass(cuda, deterministic):
    """For its alphas: what it remembers for the backward pass is the host's decision."""
    if cuda.type != "cuda":
        pytest.skip("a CPU does not wait")
    step, batch = make_step(f"{REVCOL} {SMALL}", cuda, "bf16"), noise(cuda)
    step(batch, 0, 0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step(batch, 1, 0)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert len([warning for warning in caught if "synchronizing" in str(warning.message)]) == 1


class Watched(list):
    """A loader of batches: after the first is learnt, and until the last is asked for, nothing may wait."""

    def __init__(self, batches: list[Batch], device: torch.device) -> None:
        super().__init__(batches)
        self.device = device

    def epoch(self, epoch: int, skip: int = 0) -> Iterator[Batch]:
        for batch in self:
            batch.position = self.index(batch) + 1
        yield self[0]
        with nothing_waits(self.device):
            yield from self[1:-1]
        yield self[-1]

    def index(self, batch: Batch) -> int:
        return next(k for k, other in enumerate(self) if other is batch)


def test_the_loop_waits_only_where_a_line_is_due(cuda, deterministic, tmp_path, monkeypatch):
    step = make_step(f"model=yolov8n {SMALL}", cuda, "bf16")
    batches = [noise(torch.device("cpu")) for _ in range(7)]
    if cuda.type == "cuda":
        batches = [batch.pin_memory() for batch in batches]
    options = trainer_options(tmp_path, epochs=1, log_every=100)
    trainer = Trainer(step, Watched(batches, cuda), [], None, **options)
    losses, _ = trainer.train_epoch(0)
    trainer.log.close()
    assert trainer.state.step == 7
    assert all(value > 0 for value in losses.values())


@pytest.mark.parametrize("overrides", [*MODELS, REVCOL])
def test_nan_in_the_weights_is_skipped_steps(overrides, cuda):
    """And no index that a GPU would not survive: what comes after still computes."""
    step = make_step(f"{overrides} {SMALL}", cuda, "off")
    with torch.no_grad():
        next(step.detector.parameters()).fill_(torch.nan)
    before = [p.clone() for p in step.detector.parameters()]
    for k in range(2):
        terms = step(noise(cuda, images=2), k, 0)
        assert all(term == 0 for term in terms.values())
    counts = step.health.read()
    assert (counts.bad_losses, counts.skipped_steps, counts.in_a_row) == (2, 2, 2)
    for parameter, value in zip(step.detector.parameters(), before, strict=True):
        torch.testing.assert_close(parameter, value, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "muon"])
@pytest.mark.parametrize("amp", ["off", "fp16"])
def test_a_bad_batch_changes_nothing(optimizer, amp, cuda):
    step = make_step(f"model=yolov8n {SMALL}", cuda, amp, optimizer)
    step.scaler = torch.amp.GradScaler(cuda.type, init_scale=1.0, enabled=step.scaler.is_enabled())
    step(noise(cuda), 0, 0)
    before = copy.deepcopy((step.detector.state_dict(), step.optimizer.state_dict()["state"]))
    batch = noise(cuda)
    step(replace(batch, boxes_bm4=batch.boxes_bm4 * torch.inf), 1, 0)
    after = step.detector.state_dict(), step.optimizer.state_dict()["state"]
    for mine, theirs in zip(_leaves(after), _leaves(before), strict=True):
        assert torch.equal(torch.as_tensor(mine), torch.as_tensor(theirs))
    assert step.health.read().skipped_steps == 1


def _leaves(tree: object) -> list:
    return torch.utils._pytree.tree_leaves(tree)


def learnt(overrides: str, device: torch.device) -> TrainStep:
    """Train for five steps in bf16, the same whenever it is called."""
    torch.manual_seed(0)
    step = make_step(f"{overrides} {SMALL}", device, "bf16")
    for k in range(5):
        step(noise(device), k, 0)
    return step


@pytest.mark.parametrize("overrides", [*MODELS, REVCOL])
def test_training_twice_gives_the_same_bits(overrides, cuda, deterministic, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cuda.enable_mem_efficient_sdp(False)  # as make_deterministic does
    torch.backends.cuda.enable_cudnn_sdp(False)
    first, again = (learnt(overrides, cuda).detector.state_dict() for _ in range(2))
    different = [name for name, value in first.items() if not torch.equal(value, again[name])]
    assert not different
