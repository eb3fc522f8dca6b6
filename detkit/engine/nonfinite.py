"""Counters and safeguards for non-finite losses and gradients, without synchronizing with the device."""

from collections import deque
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from detkit.engine.param_groups import NORMS
from detkit.structures import Batch


@dataclass(frozen=True)
class NonFiniteCounts:
    """Numbers of non-finite losses and steps since the last ``NonFiniteMonitor.start_epoch``.

    Attributes:
        bad_losses: batches with a non-finite loss.
        skipped_steps: optimizer steps skipped because of a non-finite loss or gradient.
        overflow_steps: steps skipped while the fp16 gradient scale adjusts, which is harmless.
        in_a_row: consecutive ``skipped_steps`` up to now, across epochs.
    """

    bad_losses: int
    skipped_steps: int
    overflow_steps: int
    in_a_row: int


class NonFiniteMonitor:
    """Counts non-finite losses and skipped optimizer steps, in tensors on the device.

    Args:
        device: of the training.
        max_batches: number of recent batches to store the file names of.
    """

    def __init__(self, device: torch.device, max_batches: int) -> None:
        self.counts = torch.zeros(4, dtype=torch.int64, device=device)  # as in NonFiniteCounts
        self.losses_finite = torch.ones((), dtype=torch.bool, device=device)  # all losses since the last step
        self.recent: deque[tuple[list[Path], Tensor]] = deque(maxlen=max_batches)

    def start_epoch(self) -> None:
        """Reset the counts, except that of consecutive skipped steps."""
        self.counts[:3] = 0

    def add_loss(self, finite: Tensor, batch: Batch) -> None:
        """Record whether the loss of a batch is finite, () bool."""
        self.counts[0] += ~finite
        self.losses_finite &= finite
        self.recent.append(([meta.path for meta in batch.metas], finite))

    def add_step(self, finite: Tensor, scale: Tensor) -> None:
        """Record whether the gradient of an optimizer step is finite, and thus the step taken.

        Args:
            finite: () bool.
            scale: fp16 loss scale, () float; above 1, it may have caused the overflow if the loss is finite.
        """
        overflow = ~finite & self.losses_finite & (scale > 1)
        skipped = ~finite & ~overflow
        self.counts[1] += skipped
        self.counts[2] += overflow
        self.counts[3] = (self.counts[3] + skipped) * ~finite
        self.losses_finite.fill_(True)

    def read(self) -> NonFiniteCounts:
        """Return the counts; only this synchronizes with the device."""
        return NonFiniteCounts(*self.counts.tolist())

    def suspects(self) -> list[Path]:
        """Return the image files of the latest batch with a non-finite loss, or else of the latest batch."""
        bad = [paths for paths, finite in self.recent if not finite]
        return (bad or [paths for paths, _ in self.recent] or [[]])[-1]


class BatchNormSnapshot:
    """Copies and restores the running statistics of a model's batch norms."""

    def __init__(self, model: nn.Module) -> None:
        buffers = [b for m in model.modules() if isinstance(m, NORMS) for b in m.buffers()]
        self.groups = [[b for b in buffers if b.dtype is dtype] for dtype in {b.dtype: None for b in buffers}]

    def copy(self) -> list[Tensor]:
        """Return the statistics, concatenated into one vector per dtype."""
        return [torch.cat([buffer.flatten() for buffer in buffers]) for buffers in self.groups]

    @torch.no_grad()
    def keep_finite(self, before: list[Tensor], finite: Tensor) -> None:
        """Restore ``before``, an earlier ``copy``, unless ``finite``, () bool, and the statistics are finite."""
        after = self.copy()
        for vector in after:
            finite = finite & vector.isfinite().all()
        for buffers, old, new in zip(self.groups, before, after, strict=True):
            parts = torch.where(finite, new, old).split([b.numel() for b in buffers])
            torch._foreach_copy_(buffers, [part.view_as(b) for part, b in zip(parts, buffers, strict=True)])
