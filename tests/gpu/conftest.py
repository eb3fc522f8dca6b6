"""What the tests on a GPU share. ``pytest -m gpu`` runs them; with ``--on cpu``, as far as that goes, on the CPU."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

from detkit.checks.harness import Composition
from detkit.config import compose_config, resolve
from detkit.engine.optimizer import Recipe, Schedule
from detkit.engine.step import TrainStep
from detkit.models.detector import build_detector, build_loss
from detkit.models.profiling import dummy_batch
from detkit.ops.precision import Precision
from detkit.structures import Batch

SMALL = "model.width=0.125 model.depth=0.1"


@pytest.fixture
def deterministic() -> Iterator[None]:
    """As a training is: some operators then run otherwise on a GPU."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def compose(overrides: str, device: torch.device) -> Composition:
    """A detector of three classes and its loss, in train mode."""
    cfg = resolve(compose_config("check", overrides.split()))
    detector = build_detector(cfg, ["a", "b", "c"]).to(device).train()
    return Composition(detector, build_loss(cfg, detector.head))


def make_step(overrides: str, device: torch.device, amp: str, optimizer: str = "adamw") -> TrainStep:
    """A training step of such a detector, of small numbers: no warm-up, one batch a step."""
    composition = compose(overrides, device)
    recipe = Recipe(optimizer, 0.002, 0.9, 5e-4, 0.0)
    schedule = Schedule(recipe, epochs=10, final=0.01, shape="constant", warmup=0, warmup_momentum=0.8)
    precision = Precision.from_config(amp if device.type == "cuda" or amp != "fp16" else "bf16", device)
    options = {"accumulate": 1, "clip": 10.0}
    return TrainStep(composition.detector, composition.loss, recipe, schedule, precision, **options)


def noise(device: torch.device, images: int = 4, side: int = 64) -> Batch:
    """Images of noise with three boxes each, channels-last as a loader's are."""
    batch = dummy_batch(images, (side, side), 3, 3).to(device)
    batch.images = batch.images.contiguous(memory_format=torch.channels_last)
    return batch


@contextmanager
def nothing_waits(device: torch.device) -> Iterator[None]:
    """Raise where the host waits for a GPU."""
    if device.type != "cuda":
        yield
        return
    try:
        torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@contextmanager
def limited_memory(device: torch.device, gib: float) -> Iterator[None]:
    """Let this process have no more of a GPU's memory."""
    if device.type != "cuda":
        pytest.skip("a CPU's memory is not limited")
    torch.cuda.empty_cache()
    try:
        torch.cuda.set_per_process_memory_fraction(gib * 2**30 / torch.cuda.get_device_properties(device).total_memory)
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def peak_bytes(device: torch.device, run: Callable[[], object]) -> int:
    """Return the most memory that ``run`` takes beside what is taken already."""
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
