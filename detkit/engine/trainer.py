"""The training loop."""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from detkit.data.annotations import Annotations
from detkit.data.loader import BatchLoader
from detkit.engine.checkpoint import save_checkpoint, write_atomically
from detkit.engine.ema import EMA
from detkit.engine.evaluator import METRICS, Evaluation, evaluate
from detkit.engine.logging import RunLog, clock
from detkit.engine.optim import Recipe, Schedule, accumulation
from detkit.engine.precision import Precision
from detkit.models.detector import Detector
from detkit.ops.image import read_image
from detkit.report.drawing import draw_boxes, grid
from detkit.report.plots import plot_history
from detkit.structures import Batch

PICTURED_BATCHES = 3  # of the first epoch


@dataclass
class TrainState:
    """Where a run stands; ``epoch`` and ``step`` count what is done, in epochs and batches."""

    epoch: int = 0
    step: int = 0
    best: float = -1.0
    best_epoch: int = 0


class Trainer:
    """Trains a detector and keeps its best and last weights.

    Args:
        detector: on its device already.
        loss: (DenseOutput, Batch) -> weighted terms.
        train_loader, val_loader: batches; ``annotations`` are the validation set's.
        recipe: the optimizer's numbers.
        settings: the ``trainer`` and ``optim`` groups of the config, merged by name below.
        precision: of the forward pass in training; validation computes in float32.
        run_dir: an existing folder for everything that is written.
    """

    def __init__(
        self,
        detector: Detector,
        loss: nn.Module,
        train_loader: BatchLoader,
        val_loader: BatchLoader,
        annotations: Annotations,
        recipe: Recipe,
        cfg: Mapping[str, Any],
        precision: Precision,
        run_dir: Path,
        log: RunLog,
    ) -> None:
        self.detector = detector
        self.loss = loss
        self.train_loader = train_loader
        self.val_loader = val_loader
        self.annotations = annotations
        self.precision = precision
        self.run_dir = run_dir
        self.log = log
        self.epochs = cfg["trainer"]["epochs"]
        self.clip = cfg["trainer"]["clip_grad_norm"]
        self.accumulate = accumulation(cfg["batch_size"], cfg["optim"]["nominal_batch"])
        self.optimizer = recipe.build(detector)
        self.schedule = _schedule(recipe, cfg, len(train_loader))
        self.scaler = torch.amp.GradScaler(precision.device.type, enabled=precision.dtype is torch.float16)
        self.ema = EMA(detector)
        self.state = TrainState()
        self.pending = 0  # batches whose gradients wait for the optimizer

    def fit(self) -> dict[str, Any]:
        """Train all epochs; return the best and the last epoch's metrics, as in ``metrics.json``."""
        state = self.state
        results: dict[str, Any] = {}
        for epoch in range(state.epoch, self.epochs):
            start = time.perf_counter()
            row = {"epoch": epoch + 1, "lr": self.schedule.recipe.lr * self.schedule.factor(epoch)}
            row |= self.train_epoch(epoch)
            evaluation = self.validate()
            metrics = evaluation.metrics
            row |= {name: metrics[name] for name in METRICS}
            row["seconds"] = time.perf_counter() - start
            state.epoch = epoch + 1
            results["last"] = {"epoch": state.epoch, **metrics}
            if metrics["AP"] > state.best or state.best_epoch == 0:
                state.best, state.best_epoch = metrics["AP"], state.epoch
                results["best"] = results["last"]
                save_checkpoint(self.ema.model, self.run_dir / "best.safetensors", results["best"])
                self.picture_predictions(evaluation)
            save_checkpoint(self.ema.model, self.run_dir / "last.safetensors", results["last"])
            write_atomically(self.run_dir / "metrics.json", json.dumps(results, indent=2).encode())
            self.log.epoch(row, self.epoch_line(row))
            plot_history(self.log.history, self.run_dir / "plots" / "history.png")
        return results

    def train_epoch(self, epoch: int) -> dict[str, float]:
        """Go through the training set once; return the mean loss terms and the images per second."""
        self.detector.train()
        sums: dict[str, torch.Tensor] = {}
        images = 0
        start = time.perf_counter()
        total = self.epochs * len(self.train_loader)
        with self.log.progress(f"epoch {epoch + 1}/{self.epochs}", len(self.train_loader)) as bar:
            for k, batch in enumerate(self.train_loader.epoch(epoch), 1):
                if epoch == 0 and k <= PICTURED_BATCHES:
                    self.picture_batch(f"train_batch{k - 1}", batch)
                terms = self.train_step(batch.to(self.precision.device), epoch)
                for name, term in terms.items():
                    sums[name] = sums.get(name, 0) + term.detach()
                images += len(batch.images)
                info = None
                if k == 1 or k % 10 == 0:  # reading the losses waits for the device: not at every step
                    speed = images / (time.perf_counter() - start)
                    left = (total - self.state.step) * images / k / speed
                    means = "  ".join(f"{name} {value.item() / k:.3f}" for name, value in sums.items())
                    info = f"{means}  {speed:.0f} images/s  {clock(left)} left"
                bar.advance(info)
        row = {name: value.item() / len(self.train_loader) for name, value in sums.items()}
        return row | {"images_per_s": images / (time.perf_counter() - start)}

    def train_step(self, batch: Batch, epoch: int) -> dict[str, torch.Tensor]:
        """Forward and backward on one batch, and an optimizer step where enough batches are gathered."""
        state = self.state
        self.schedule.apply(self.optimizer, state.step, epoch)
        with self.precision.autocast():
            out = self.detector(batch.images.float() / 255)
        terms = self.loss(out, batch)
        self.scaler.scale(sum(terms.values()) * len(batch.images)).backward()
        state.step += 1
        self.pending += 1
        warm = min(state.step / max(self.schedule.warmup, 1), 1.0)
        if self.pending >= max(round(1 + (self.accumulate - 1) * warm), 1):  # grows to its size in the warm-up
            self.update()
        return terms

    def update(self) -> None:
        """Clip the gathered gradients, step the optimizer, move the average along."""
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.detector.parameters(), self.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.ema.update(self.detector)
        self.pending = 0

    def validate(self) -> Evaluation:
        """Evaluate the averaged weights on the validation set, in float32."""
        with self.log.progress("validation", len(self.val_loader)) as bar:
            return evaluate(self.ema.model, self.val_loader.epoch(0), self.annotations, advance=bar.advance)

    def epoch_line(self, row: Mapping[str, float]) -> str:
        """Return what the terminal says of an epoch."""
        losses = "  ".join(f"{name} {row[name]:.3f}" for name in row if name in ("box", "cls", "dfl"))
        star = " *" if self.state.best_epoch == row["epoch"] else ""
        return (
            f"epoch {row['epoch']:>{len(str(self.epochs))}}/{self.epochs}  {losses}  AP {row['AP']:.4f}  "
            f"AP50 {row['AP50']:.4f}  {row['images_per_s']:.0f} images/s  {clock(row['seconds'])}{star}"
        )

    def picture_batch(self, name: str, batch: Batch) -> None:
        """Draw a training batch as the network sees it, with its boxes."""
        columns = zip(batch.images[:16], batch.boxes_bm4, batch.labels_bm, batch.valid_bm, strict=False)
        pictures = [
            draw_boxes(
                image.permute(1, 2, 0).numpy(), boxes[valid].numpy(), labels[valid].tolist(), self.detector.class_names
            )
            for image, boxes, labels, valid in columns
        ]
        self.log.picture(name, grid(pictures), 0)

    def picture_predictions(self, evaluation: Evaluation) -> None:
        """Draw what was found in the first validation images, above a score of 0.25."""
        pictures = []
        for origin, boxes, scores, labels in evaluation.pictures[:16]:
            keep = scores > 0.25
            found = (boxes[keep].numpy(), labels[keep].tolist(), self.detector.class_names, scores[keep].tolist())
            pictures.append(draw_boxes(read_image(origin.path), *found))
        self.log.picture("val_predictions", grid(pictures), self.state.epoch)


def _schedule(recipe: Recipe, cfg: Mapping[str, Any], batches: int) -> Schedule:
    """Work the warm-up out in batches: of some epochs but one fewer than the run has, and at least so many batches."""
    optim, epochs = cfg["optim"], cfg["trainer"]["epochs"]
    warmup_epochs = min(optim["warmup_epochs"], epochs - 1)
    warmup = max(round(warmup_epochs * batches), optim["warmup_min_batches"]) if warmup_epochs > 0 else 0
    return Schedule(recipe, epochs, optim["final"], optim["shape"], warmup, optim["warmup_momentum"])
