"""One training step: forward, backward and optimizer."""

import torch
from torch import Tensor, nn

from detkit.distributed.collectives import all_reduce_sum, world_size
from detkit.distributed.process_group import wrap_ddp
from detkit.distributed.sync_batch_norm import average_bn_stats, without_bn_stats
from detkit.engine.ema import EMA
from detkit.engine.multi_scale import draw_size, resize_batch
from detkit.engine.nonfinite import BatchNormSnapshot, NonFiniteMonitor
from detkit.engine.optimizer import Recipe, Schedule, step_if
from detkit.models.detector import Detector
from detkit.ops.precision import Precision
from detkit.structures import Batch, DenseOutput


class TrainStep:
    """Runs forward pass, loss and backward pass; after enough batches, clips gradients and updates weights and EMA.

    If a loss or gradient is not finite, the optimizer step that it contributes to is skipped: weights, optimizer state
    and EMA stay unchanged. A batch with a non-finite loss does not change the batch-norm statistics either. This is
    decided on the device, without synchronization.

    Args:
        detector: the model, on its device.
        loss: (DenseOutput, Batch) -> weighted terms.
        recipe: hyperparameters of the optimizer.
        schedule: learning rate and momentum of every batch.
        precision: of the forward pass; the loss is computed in float32.
        accumulate: number of batches per optimizer step, fewer during the warm-up; their gradients are summed.
        clip: maximum gradient norm.
        multi_scale: resize each batch by a factor of up to 1 +- this fraction, drawn by (seed, step); 0: do not resize.
        seed: of ``multi_scale``.
        network: runs in place of the detector, such as the compiled detector.

    Attributes:
        network: the detector or its replacement; with several ranks, wrapped to average gradients.
        ema: averaged weights.
        health: counts non-finite losses and skipped steps.
        grad_norm: () norm of the latest gradient before clipping, summed over the images of an optimizer step.
        pending: number of batches accumulated since the last optimizer step.
    """

    def __init__(  # noqa: PLR0913  (its collaborators; options are keyword-only)
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
        # before the EMA copies the weights, which are broadcast from rank 0 here
        self.network = wrap_ddp(detector if network is None else network)
        self.optimizer = recipe.build(detector)
        self.scaler = torch.amp.GradScaler(precision.device.type, enabled=precision.dtype is torch.float16)
        self.ema = EMA(detector)
        self.health = NonFiniteMonitor(precision.device, max_batches=accumulate)
        self.statistics = BatchNormSnapshot(detector)
        self.grad_norm = torch.zeros((), device=precision.device)
        self.pending = 0

    def __call__(self, batch: Batch, step: int, epoch: int) -> dict[str, Tensor]:
        """Train on one batch.

        Args:
            batch: on the device.
            step: number of the batch in the run, from 0.
            epoch: of the batch, from 0.

        Returns:
            the loss terms of all ranks, () detached; all 0 if their sum is not finite.
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
        # A non-finite loss may have a finite gradient, so force NaN on every rank.
        loss = loss * torch.where(finite, self.weight(len(images)), torch.nan)
        self.scaler.scale(loss).backward()
        average_bn_stats(self.detector)
        self.statistics.keep_finite(statistics, finite)
        self.pending += 1
        if self.pending >= self.accumulated_batches(step):
            self.update()
        return {name: torch.where(finite, term, 0.0) for name, term in self.sum_terms(terms).items()}

    def forward_without_image(self) -> DenseOutput:
        """Run the network on a rank without images, since other ranks wait for its (zero) gradients."""
        side = 2 * self.detector.max_stride
        with without_bn_stats(self.detector):
            out = self.network(torch.zeros(1, 3, side, side, device=self.precision.device))
        return out.empty()

    def weight(self, images: int) -> Tensor:
        """Return the () weight of the loss terms: the number of images of all ranks, times the world size.

        The world size compensates for gradients being averaged, not summed, over the ranks.

        Args:
            images: number of images of the batch on this rank.
        """
        return all_reduce_sum(torch.full((), float(images), device=self.precision.device)) * world_size()

    def sum_terms(self, terms: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the () loss terms summed over all ranks, detached."""
        summed = all_reduce_sum(torch.stack([term.detach() for term in terms.values()]))
        return dict(zip(terms, summed.unbind(), strict=True))

    def accumulated_batches(self, step: int) -> int:
        """Return the batches per optimizer step at batch ``step``, rising from 1 to ``accumulate`` in the warm-up."""
        warmup = self.schedule.warmup
        return round(1 + (self.accumulate - 1) * min(step / warmup, 1)) if warmup else self.accumulate

    def update(self) -> None:
        """Clip the accumulated gradients; if they are finite, step the optimizer and update the EMA."""
        self.scaler.unscale_(self.optimizer)
        self.grad_norm = nn.utils.clip_grad_norm_(self.detector.parameters(), self.clip)
        finite = self.grad_norm.isfinite()
        self.health.add_step(finite, self.scaler.scale(torch.ones_like(self.grad_norm)))
        step_if(finite, self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.ema.update(self.detector, finite)
        self.pending = 0
