"""Statistics of an epoch between two log points."""

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from detkit.distributed.collectives import world_size
from detkit.engine.state import EpochState
from detkit.structures import Batch


@dataclass(frozen=True)
class EpochStats:
    """Totals of an epoch up to a log point, or between two.

    Attributes:
        losses: loss terms, summed over the batches.
        finite_batches: number of batches with a finite loss.
        images: number of images that this rank was trained on.
        seconds: total time.
        waited: seconds spent waiting for batches.
    """

    losses: Mapping[str, float]
    finite_batches: int
    images: int
    seconds: float
    waited: float

    @classmethod
    def of(cls, current: EpochState, finite_batches: int) -> "EpochStats":
        """Read the totals of the current epoch; this synchronizes with the device."""
        losses = {name: total.item() for name, total in current.losses.items()}
        return cls(losses, finite_batches, current.images, current.seconds, current.waited)

    def since(self, before: "EpochStats") -> "EpochStats":
        """Return the totals since ``before``."""
        losses = {name: total - before.losses.get(name, 0.0) for name, total in self.losses.items()}
        names = ("finite_batches", "images", "seconds", "waited")
        return EpochStats(losses, *(getattr(self, name) - getattr(before, name) for name in names))

    def means(self) -> dict[str, float]:
        """Return the mean loss terms."""
        return {name: total / max(self.finite_batches, 1) for name, total in self.losses.items()}

    @property
    def images_per_s(self) -> float:
        """Images per second of all ranks, assuming that they process equally many."""
        return self.images * world_size() / max(self.seconds, 1e-9)

    @property
    def data_wait(self) -> float:
        """Fraction of the time spent waiting for batches, 0 to 1."""
        return self.waited / max(self.seconds, 1e-9)

    def __str__(self) -> str:
        means = "  ".join(f"{name} {mean:.3f}" for name, mean in self.means().items())
        return f"{means}  {self.images_per_s:.0f} images/s  {100 * self.data_wait:.0f} % waiting for data"


def time_data_wait(batches: Iterable[Batch], current: EpochState) -> Iterator[Batch]:
    """Yield ``batches``; add the time spent waiting for each to ``current.waited``."""
    iterator = iter(batches)
    while True:
        start = time.perf_counter()
        batch = next(iterator, None)
        current.waited += time.perf_counter() - start
        if batch is None:
            return
        yield batch


def learning_rates(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Return the learning rate by kind of parameter group; the largest if there are several groups of a kind."""
    rates: dict[str, float] = {}
    for group in optimizer.param_groups:
        rates[group["name"]] = max(group["lr"], rates.get(group["name"], 0.0))
    return rates


def memory_gib(device: torch.device) -> float:
    """Return memory in GiB: on CUDA the peak allocated for tensors, on a CPU the resident memory of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    status = Path("/proc/self/status")  # Linux
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) for line in lines if line.startswith("VmRSS:")), 0) / 2**20
