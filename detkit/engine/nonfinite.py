"""Numbers that are not finite: what they must not spoil, and how often they came. Nothing here waits for the device."""

from collections import deque
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from detkit.engine.param_groups import NORMS
from detkit.structures import Batch


@dataclass(frozen=True)
class NonFiniteCounts:
    """How often numbers were not finite, since the last ``NonFiniteMonitor.start_epoch``.

    Attributes:
        bad_losses: batches whose loss was not.
        skipped_steps: optimizer steps left out for a loss or a gradient that was not.
        overflow_steps: those left out as the fp16 scale was too large, which then falls: no sign of trouble.
        in_a_row: the latest ``skipped_steps`` with no step made since, whatever the epoch.
    """

    bad_losses: int
    skipped_steps: int
    overflow_steps: int
    in_a_row: int


class NonFiniteMonitor:
    """Counts losses and optimizer steps that are not finite, in tensors on the device.

    Args:
        remember: how many batches to remember, for their file names.
    """

    def __init__(self, device: torch.device, remember: int) -> None:
        self.counts = torch.zeros(4, dtype=torch.int64, device=device)  # as in Counts
        self.fine = torch.ones((), dtype=torch.bool, device=device)  # all losses since the last step
        self.recent: deque[tuple[list[Path], Tensor]] = deque(maxlen=remember)

    def start_epoch(self) -> None:
        """Count afresh, but go on counting what comes in a row."""
        self.counts[:3] = 0

    def add_loss(self, finite: Tensor, batch: Batch) -> None:
        """Take note of whether a batch's loss is finite, () bool."""
        self.counts[0] += ~finite
        self.fine &= finite
        self.recent.append(([meta.path for meta in batch.metas], finite))

    def add_step(self, finite: Tensor, scale: Tensor) -> None:
        """Take note of whether the gradient of an optimizer step is finite, () bool, and the step made.

        Args:
            scale: of the loss, () float; above 1, it may itself be why the gradient of a finite loss is not finite.
        """
        overflow = ~finite & self.fine & (scale > 1)
        skipped = ~finite & ~overflow
        self.counts[1] += skipped
        self.counts[2] += overflow
        self.counts[3] = (self.counts[3] + skipped) * ~finite
        self.fine.fill_(True)

    def read(self) -> NonFiniteCounts:
        """Return the counts; this alone waits for the device."""
        return NonFiniteCounts(*self.counts.tolist())

    def suspects(self) -> list[Path]:
        """Return the image files of the latest batch whose loss was not finite; where all were, of the latest."""
        bad = [paths for paths, finite in self.recent if not finite]
        return (bad or [paths for paths, _ in self.recent] or [[]])[-1]


class BatchNormSnapshot:
    """The running statistics of a model's batch norms, taken back when a batch has spoilt them."""

    def __init__(self, model: nn.Module) -> None:
        buffers = [b for m in model.modules() if isinstance(m, NORMS) for b in m.buffers()]
        self.groups = [[b for b in buffers if b.dtype is dtype] for dtype in {b.dtype: None for b in buffers}]

    def copy(self) -> list[Tensor]:
        """Return all of them in one vector a type."""
        return [torch.cat([buffer.flatten() for buffer in buffers]) for buffers in self.groups]

    @torch.no_grad()
    def keep_finite(self, before: list[Tensor], finite: Tensor) -> None:
        """Go back to ``before``, a former ``copy``, unless ``finite``, () bool, and all statistics are."""
        after = self.copy()
        for vector in after:
            finite = finite & vector.isfinite().all()
        for buffers, old, new in zip(self.groups, before, after, strict=True):
            parts = torch.where(finite, new, old).split([b.numel() for b in buffers])
            torch._foreach_copy_(buffers, [part.view_as(b) for part, b in zip(parts, buffers, strict=True)])
