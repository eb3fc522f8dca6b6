"""The training loop."""

import json
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from detkit.data.annotations import Annotations
from detkit.data.loader import BatchLoader
from detkit.data.stream import ShardLoader
from detkit.engine.checkpoint import save_checkpoint, write_atomically
from detkit.engine.distributed import gather_lines, is_main, wait
from detkit.engine.evaluator import METRICS, Evaluation, evaluate
from detkit.engine.logging import RunLog, clock, show_progress
from detkit.engine.parts import train_mode
from detkit.engine.step import TrainStep
from detkit.errors import DetkitError, UnreadableImage
from detkit.ops.image import read_image
from detkit.ops.ranks import rank_count, sum_over_ranks
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
    """Trains a detector and keeps its best and last weights. Of several ranks all train, and rank 0 writes.

    Args:
        step: learns from one batch.
        train_loader, val_loader: batches; ``annotations`` are the validation set's.
        epochs: of the run.
        max_bad_steps: stop after this many optimizer steps in a row that were skipped.
        patience: stop after this many epochs without a better AP; None: never.
        run_dir: an existing folder for everything that is written.
        log: where numbers and pictures go.
    """

    def __init__(
        self,
        step: TrainStep,
        train_loader: BatchLoader | ShardLoader,
        val_loader: BatchLoader,
        annotations: Annotations,
        *,
        epochs: int,
        run_dir: Path,
        log: RunLog,
        max_bad_steps: int = 10,
        patience: int | None = None,
    ) -> None:
        self.step = step
        self.train_loader = train_loader
        self.val_loader = val_loader
        self.annotations = annotations
        self.epochs = epochs
        self.run_dir = run_dir
        self.log = log
        self.max_bad_steps = max_bad_steps
        self.patience = patience
        self.state = TrainState()

    def fit(self) -> dict[str, Any]:
        """Train all epochs; return the best and the last epoch's metrics, as in ``metrics.json``."""
        state = self.state
        results: dict[str, Any] = {}
        for epoch in range(state.epoch, self.epochs):
            start = time.perf_counter()
            losses, images_per_s = self.train_epoch(epoch)
            evaluation = self.validate()
            metrics = evaluation.metrics
            state.epoch = epoch + 1
            results["last"] = {"epoch": state.epoch, **metrics}
            if metrics["AP"] >= state.best:
                state.best, state.best_epoch = metrics["AP"], state.epoch
                results["best"] = results["last"]
            if is_main():
                self.save(results, evaluation)
            row = {"epoch": state.epoch, "lr": self.step.schedule.lr(epoch), **losses, "images_per_s": images_per_s}
            row |= self.skipped() | {name: metrics[name] for name in METRICS}
            row["seconds"] = time.perf_counter() - start
            if is_main():
                self.log.epoch(row, losses, self.epoch_line(row, losses))
                plot_history(self.log.history, losses, self.run_dir / "plots" / "history.png")
            wait()  # with patience: writing may take longer than ranks wait in a step
            if self.patience is not None and state.epoch - state.best_epoch >= self.patience:
                best = f"no AP has been better than epoch {state.best_epoch}'s"
                self.log.console.print(f"stopped early: {best} for {self.patience} epochs (trainer.patience)")
                break
        return results

    def save(self, results: Mapping[str, Any], evaluation: Evaluation) -> None:
        """Write the weights and the metrics of the epoch that has ended, and its pictures if it is the best."""
        if results.get("best") is results["last"]:
            save_checkpoint(self.step.ema.model, self.run_dir / "best.safetensors", results["best"])
            self.picture_predictions(evaluation)
        save_checkpoint(self.step.ema.model, self.run_dir / "last.safetensors", results["last"])
        write_atomically(self.run_dir / "metrics.json", json.dumps(results, indent=2).encode())

    def train_epoch(self, epoch: int) -> tuple[dict[str, float], float]:
        """Go through the training set once; return the mean loss terms and the images per second.

        Raises:
            DetkitError: ``max_bad_steps`` in a row had a loss or gradient that was not finite.
        """
        train_mode(self.step.detector)
        self.step.health.start_epoch()
        sums: dict[str, torch.Tensor] = {}
        images = 0
        problems: list[str] = []
        start = shown = time.perf_counter()
        total = self.epochs * len(self.train_loader)
        with show_progress(f"epoch {epoch + 1}/{self.epochs}", len(self.train_loader), self.log.console) as bar:
            for k, batch in enumerate(self.train_loader.epoch(epoch), 1):
                self.log.problems(batch.problems)
                problems += batch.problems
                if epoch == 0 and k <= PICTURED_BATCHES and is_main() and len(batch.images):
                    self.picture_batch(f"train_batch{k - 1}", batch)
                terms = self.step(batch.to(self.step.precision.device), self.state.step, epoch)
                self.state.step += 1
                for name, term in terms.items():
                    sums[name] = sums.get(name, 0) + term
                images += len(batch.images)
                info = None
                now = time.perf_counter()
                if now - shown > 1 or k == len(self.train_loader):  # reading the losses waits for the device
                    shown = now
                    learnt = self.learnt(k)
                    speed = images * rank_count() / (now - start)
                    left = (total - self.state.step) * (now - start) / k
                    means = "  ".join(f"{name} {value.item() / learnt:.3f}" for name, value in sums.items())
                    info = f"{means}  {speed:.0f} images/s  {clock(left)} left of the run"
                bar.advance(info)
        images = int(sum_over_ranks(torch.tensor(images, device=self.step.precision.device)))
        self.log.problems(gather_lines(problems))
        if not images:
            raise DetkitError("no image of this epoch can be read, on any rank: detkit check_data says why")
        learnt = self.learnt(k)
        means = {name: value.item() / learnt for name, value in sums.items()}
        return means, images / (time.perf_counter() - start)

    def learnt(self, batches: int) -> int:
        """Return of how many of an epoch's first ``batches`` the loss was finite, 1 at least.

        Raises:
            DetkitError: ``max_bad_steps`` in a row were not; names the images of one, and where the weights are.
        """
        counts = self.step.health.read()
        if counts.in_a_row < self.max_bad_steps:
            return max(batches - counts.bad_losses, 1)
        path = self.run_dir / "last.safetensors"  # the weights are those from before the steps that were skipped
        if is_main():
            save_checkpoint(self.step.ema.model, path, {"epoch": self.state.epoch})
        files = [str(file) for file in self.step.health.suspects()]
        more = f" and {len(files) - 4} more" if len(files) > 4 else ""
        raise DetkitError(
            f"the loss or its gradient was not finite in {counts.in_a_row} steps in a row, last for the images "
            f"{', '.join(files[:4])}{more}: look at these, or try a lower optim.lr or amp=off; the weights from before "
            f"are in {path}"
        )

    def skipped(self) -> dict[str, int]:
        """Return the epoch's columns on optimizer steps that were left out."""
        counts = self.step.health.read()
        return {"skipped_steps": counts.skipped_steps, "overflow_steps": counts.overflow_steps}

    def validate(self) -> Evaluation:
        """Evaluate the averaged weights on the validation set, in float32."""
        with show_progress("validation", len(self.val_loader), self.log.console) as bar:
            result = evaluate(self.step.ema.model, self.val_loader.epoch(0), self.annotations, advance=bar.advance)
        self.log.problems(result.problems)
        return result

    def epoch_line(self, row: Mapping[str, float], losses: Mapping[str, float]) -> str:
        """Return what the terminal says of an epoch; a star marks the best so far."""
        terms = "  ".join(f"{name} {value:.3f}" for name, value in losses.items())
        star = " *" if self.state.best_epoch == row["epoch"] else ""
        skipped = f"  {row['skipped_steps']} steps skipped" if row["skipped_steps"] else ""
        return (
            f"epoch {row['epoch']:>{len(str(self.epochs))}}/{self.epochs}  {terms}  AP {row['AP']:.4f}  "
            f"AP50 {row['AP50']:.4f}  {row['images_per_s']:.0f} images/s  {clock(row['seconds'])}{skipped}{star}"
        )

    def picture_batch(self, name: str, batch: Batch) -> None:
        """Draw a training batch as the network sees it, with its boxes."""
        columns = zip(batch.images[:16], batch.boxes_bm4, batch.labels_bm, batch.valid_bm, strict=False)
        pictures = [
            draw_boxes(
                image.permute(1, 2, 0).numpy(),
                boxes[valid].numpy(),
                labels[valid].tolist(),
                self.step.detector.class_names,
            )
            for image, boxes, labels, valid in columns
        ]
        self.log.picture(name, grid(pictures), 0)

    def picture_predictions(self, evaluation: Evaluation) -> None:
        """Draw what was found in the first validation images, above a score of 0.25."""
        pictures = []
        for origin, boxes, scores, labels in evaluation.pictures[:16]:
            keep = scores > 0.25
            found = (boxes[keep].numpy(), labels[keep].tolist(), self.step.detector.class_names, scores[keep].tolist())
            with suppress(UnreadableImage):  # gone since
                pictures.append(draw_boxes(read_image(origin.path), *found))
        self.log.picture("val_predictions", grid(pictures), self.state.epoch)
