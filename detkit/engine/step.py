"""One step of training: from a batch to moved weights."""

import torch
from torch import Tensor, nn

from detkit.engine.ema import EMA
from detkit.engine.multi_scale import draw_size, resize_batch
from detkit.engine.optim import Recipe, Schedule
from detkit.engine.precision import Precision
from detkit.models.detector import Detector
from detkit.structures import Batch


class TrainStep:
    """Forward, loss, backward; and, where enough batches are gathered, clip, step, average.

    Args:
        detector: the model, on its device.
        loss: (DenseOutput, Batch) -> weighted terms.
        recipe, schedule: the optimizer, and its learning rate at every batch.
        precision: of the forward pass; the loss computes in float32.
        accumulate: batches that make one optimizer step, fewer during the warm-up; their gradients are summed.
        clip: largest norm of the gradient.
        multi_scale: train every batch at a size within this share of its own, drawn by (seed, step); 0: as it is.

    Attributes:
        ema: the averaged weights.
        pending: batches whose gradients wait for the optimizer.
    """

    def __init__(
        self,
        detector: Detector,
        loss: nn.Module,
        recipe: Recipe,
        schedule: Schedule,
        precision: Precision,
        *,
        accumulate: int,
        clip: float,
        multi_scale: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.detector = detector
        self.loss = loss
        self.schedule = schedule
        self.precision = precision
        self.accumulate = accumulate
        self.clip = clip
        self.multi_scale = multi_scale
        self.seed = seed
        self.optimizer = recipe.build(detector)
        self.scaler = torch.amp.GradScaler(precision.device.type, enabled=precision.dtype is torch.float16)
        self.ema = EMA(detector)
        self.pending = 0

    def __call__(self, batch: Batch, step: int, epoch: int) -> dict[str, Tensor]:
        """Learn from one batch, the run's number ``step`` (from 0), on the device; return the loss terms."""
        self.schedule.apply(self.optimizer, step, epoch)
        images = batch.images.float() / 255
        if self.multi_scale:
            size = draw_size(images.shape[-1], self.multi_scale, self.detector.max_stride, self.seed, step)
            images, batch = resize_batch(images, batch, size)
        with self.precision.autocast():
            out = self.detector(images)
        terms = self.loss(out, batch)
        self.scaler.scale(sum(terms.values()) * len(batch.images)).backward()
        self.pending += 1
        if self.pending >= self.gathered(step):
            self.update()
        return terms

    def gathered(self, step: int) -> int:
        """Return how many batches make an optimizer step at batch ``step``: from 1 to ``accumulate`` in the warm-up."""
        warm = min((step + 1) / max(self.schedule.warmup, 1), 1.0)
        return max(round(1 + (self.accumulate - 1) * warm), 1)

    def update(self) -> None:
        """Clip the gathered gradients, step the optimizer, move the average along."""
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.detector.parameters(), self.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.ema.update(self.detector)
        self.pending = 0
