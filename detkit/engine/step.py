"""One step of training: from a batch to moved weights."""

import torch
from torch import Tensor, nn

from detkit.engine.distributed import parallel
from detkit.engine.ema import EMA
from detkit.engine.multi_scale import draw_size, resize_batch
from detkit.engine.optim import Recipe, Schedule
from detkit.engine.precision import Precision
from detkit.layers.sync_norm import average_statistics, outside_statistics
from detkit.models.detector import Detector
from detkit.ops.ranks import rank_count, sum_over_ranks
from detkit.structures import Batch, DenseOutput


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
        network: the detector; of several ranks, as one whose gradients are averaged over them.
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
        self.network = parallel(detector)  # before the average is copied: it starts from rank 0's weights
        self.optimizer = recipe.build(detector)
        self.scaler = torch.amp.GradScaler(precision.device.type, enabled=precision.dtype is torch.float16)
        self.ema = EMA(detector)
        self.pending = 0

    def __call__(self, batch: Batch, step: int, epoch: int) -> dict[str, Tensor]:
        """Learn from one batch, the run's number ``step`` (from 0), on the device; return all ranks' loss terms."""
        self.schedule.apply(self.optimizer, step, epoch)
        images = batch.images.float() / 255
        if self.multi_scale and len(images):
            size = draw_size(images.shape[-1], self.multi_scale, self.detector.max_stride, self.seed, step)
            images, batch = resize_batch(images, batch, size)
        with self.precision.autocast():
            out = self.network(images) if len(images) else self.forward_without_image()
        terms = self.loss(out, batch)
        self.scaler.scale(sum(terms.values()) * self.weight(len(images))).backward()
        average_statistics(self.detector)
        self.pending += 1
        if self.pending >= self.gathered(step):
            self.update()
        return self.sum_terms(terms)

    def forward_without_image(self) -> DenseOutput:
        """Run the network where only other ranks have images of the batch: they wait for gradients, here zeros."""
        side = 2 * self.detector.max_stride
        with outside_statistics(self.detector):
            out = self.network(torch.zeros(1, 3, side, side, device=self.precision.device))
        return out.of_no_image()

    def weight(self, images: int) -> int | Tensor:
        """Return what the terms count for, given this rank's images of the batch: the images of all ranks.

        The gradients of all ranks are averaged where they should be summed, hence their number once more.
        """
        if rank_count() == 1:
            return images
        return sum_over_ranks(torch.full((), float(images), device=self.precision.device)) * rank_count()

    def sum_terms(self, terms: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the terms of the whole batch, of which each rank has its share."""
        if rank_count() == 1:
            return terms
        return dict(zip(terms, sum_over_ranks(torch.stack([*terms.values()])).unbind(), strict=True))

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
