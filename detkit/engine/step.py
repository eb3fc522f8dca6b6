"""One step of training: from a batch to moved weights."""

import torch
from torch import Tensor, nn

from detkit.distributed.collectives import all_reduce_sum, world_size
from detkit.distributed.process_group import wrap_ddp
from detkit.distributed.sync_batch_norm import average_bn_stats, without_bn_stats
from detkit.engine.ema import EMA
from detkit.engine.multi_scale import draw_size, resize_batch
from detkit.engine.nonfinite import BatchNormSnapshot, NonFiniteMonitor
from detkit.engine.optimizer import Recipe, Schedule, step_if
from detkit.engine.precision import Precision
from detkit.models.detector import Detector
from detkit.structures import Batch, DenseOutput


class TrainStep:
    """Forward, loss, backward; and, where enough batches are gathered, clip, step, average.

    A loss or gradient that is not finite leaves weights, optimizer and average as they are: the optimizer step that it
    is gathered for is skipped. A batch whose loss is not finite leaves the batch norms' statistics, too. All of that is
    decided on the device, and nothing waits for it.

    Args:
        detector: the model, on its device.
        loss: (DenseOutput, Batch) -> weighted terms.
        recipe, schedule: the optimizer, and its learning rate at every batch.
        precision: of the forward pass; the loss computes in float32.
        accumulate: batches that make one optimizer step, fewer during the warm-up; their gradients are summed.
        clip: largest norm of the gradient.
        multi_scale: train every batch at a size within this share of its own, drawn by (seed, step); 0: as it is.
        network: what runs in the detector's place, such as itself compiled.

    Attributes:
        network: the detector, or what runs in its place; of several ranks, as one whose gradients are averaged.
        ema: the averaged weights.
        health: counts what was not finite.
        grad_norm: () norm of the latest gradient before it was clipped; of the sum over the images of a step.
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
        network: nn.Module | None = None,
    ) -> None:
        self.detector = detector
        self.loss = loss
        self.schedule = schedule
        self.precision = precision
        self.accumulate = accumulate
        self.clip = clip
        self.multi_scale = multi_scale
        self.seed = seed
        # before the average is copied: it starts from rank 0's weights
        self.network = wrap_ddp(detector if network is None else network)
        self.optimizer = recipe.build(detector)
        self.scaler = torch.amp.GradScaler(precision.device.type, enabled=precision.dtype is torch.float16)
        self.ema = EMA(detector)
        self.health = NonFiniteMonitor(precision.device, remember=accumulate)
        self.statistics = BatchNormSnapshot(detector)
        self.grad_norm = torch.zeros((), device=precision.device)
        self.pending = 0

    def __call__(self, batch: Batch, step: int, epoch: int) -> dict[str, Tensor]:
        """Learn from one batch, the run's number ``step`` (from 0), on the device.

        Returns:
            the loss terms of all ranks, detached; all 0 where their sum is not finite.
        """
        self.schedule.apply(self.optimizer, step, epoch)
        images = batch.images.float() / 255
        if self.multi_scale and len(images):
            size = draw_size(images.shape[-1], self.multi_scale, self.detector.max_stride, self.seed, step)
            images, batch = resize_batch(images, batch, size)
        statistics = self.statistics.copy()
        with self.precision.autocast():
            out = self.network(images) if len(images) else self.forward_without_image()
        terms = self.loss(out, batch)
        loss = sum(terms.values())
        finite = all_reduce_sum(loss.detach().clone()).isfinite()
        self.health.add_loss(finite, batch)
        # A loss that is not finite must not pass for one by a finite gradient, on this process or on another.
        loss = loss * torch.where(finite, self.weight(len(images)), torch.nan)
        self.scaler.scale(loss).backward()
        average_bn_stats(self.detector)
        self.statistics.keep_finite(statistics, finite)
        self.pending += 1
        if self.pending >= self.gathered(step):
            self.update()
        return {name: torch.where(finite, term, 0.0) for name, term in self.sum_terms(terms).items()}

    def forward_without_image(self) -> DenseOutput:
        """Run the network where only other ranks have images of the batch: they wait for gradients, here zeros."""
        side = 2 * self.detector.max_stride
        with without_bn_stats(self.detector):
            out = self.network(torch.zeros(1, 3, side, side, device=self.precision.device))
        return out.empty()

    def weight(self, images: int) -> Tensor:
        """Return () what the terms count for, given this rank's images of the batch: the images of all ranks.

        The gradients of all ranks are averaged where they should be summed, hence their number once more.
        """
        return all_reduce_sum(torch.full((), float(images), device=self.precision.device)) * world_size()

    def sum_terms(self, terms: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the terms of the whole batch, of which each rank has its share, detached."""
        summed = all_reduce_sum(torch.stack([term.detach() for term in terms.values()]))
        return dict(zip(terms, summed.unbind(), strict=True))

    def gathered(self, step: int) -> int:
        """Return how many batches make an optimizer step at batch ``step``: from 1 to ``accumulate`` in the warm-up."""
        warmup = self.schedule.warmup
        return round(1 + (self.accumulate - 1) * min(step / warmup, 1)) if warmup else self.accumulate

    def update(self) -> None:
        """Clip the gathered gradients, step the optimizer, move the average along: the last two if all is finite."""
        self.scaler.unscale_(self.optimizer)
        self.grad_norm = nn.utils.clip_grad_norm_(self.detector.parameters(), self.clip)
        finite = self.grad_norm.isfinite()
        self.health.add_step(finite, self.scaler.scale(torch.ones_like(self.grad_norm)))
        step_if(finite, self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.ema.update(self.detector, finite)
        self.pending = 0
