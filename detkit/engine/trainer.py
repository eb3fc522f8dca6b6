"""The training loop."""

import json
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from detkit.data.annotations import Annotations
from detkit.data.loader import BatchLoader
from detkit.data.stream import ShardLoader
from detkit.engine.checkpoint import save_checkpoint, write_atomically
from detkit.engine.distributed import from_main, gather_lines, is_main, largest_of_ranks, wait
from detkit.engine.evaluator import METRICS, Evaluation, evaluate
from detkit.engine.logging import RunLog, clock, show_progress
from detkit.engine.parts import train_mode
from detkit.engine.signals import StopRequest
from detkit.engine.state import STATE, EpochState, TrainState, capture, write_state
from detkit.engine.step import TrainStep
from detkit.errors import DetkitError, UnreadableImage
from detkit.ops.image import read_image
from detkit.ops.ranks import rank_count, sum_over_ranks
from detkit.report.drawing import draw_boxes, grid
from detkit.report.plots import plot_history
from detkit.structures import Batch

PICTURED_BATCHES = 3  # of the first epoch


class Trainer:
    """Trains a detector and keeps its best and last weights, and where it stands. Of several ranks all train, and rank
    0 writes.

    Args:
        step: learns from one batch.
        train_loader, val_loader: batches; ``annotations`` are the validation set's.
        epochs: of the run.
        max_bad_steps: stop after this many optimizer steps in a row that were skipped.
        stop_early: asked between epochs and at the end for a reason to train no more, or None; see ``no_better``.
        run_dir: an existing folder for everything that is written.
        log: where numbers and pictures go.
        state: where the run stands.
        save_every: batches after which the state is saved within an epoch; None: at the end of each only.
        keep_last: how many saved states there are to be.
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
        state: TrainState,
        max_bad_steps: int = 10,
        stop_early: Callable[[TrainState], str | None] = lambda state: None,
        save_every: int | None = None,
        keep_last: int = 1,
    ) -> None:
        self.step = step
        self.train_loader = train_loader
        self.val_loader = val_loader
        self.annotations = annotations
        self.epochs = epochs
        self.run_dir = run_dir
        self.log = log
        self.max_bad_steps = max_bad_steps
        self.stop_early = stop_early
        self.state = state
        self.save_every = save_every
        self.keep_last = keep_last
        self.stop = StopRequest()

    def fit(self) -> dict[str, Any]:
        """Train the epochs that are left; return the best and the last one's metrics, as in ``metrics.json``.

        Raises:
            SystemExit: a signal asked for the end; the state is saved.
        """
        with self.stop.watch():
            while not self.is_over():
                self.fit_epoch(self.state.epoch)
                self.save()
                self.obey()
        return self.state.results

    def fit_epoch(self, epoch: int) -> None:
        """Train for the rest of an epoch, evaluate, and record both."""
        state = self.state
        start = time.perf_counter() - state.current.seconds
        losses, images_per_s = self.train_epoch(epoch)
        evaluation = self.validate()
        metrics = evaluation.metrics
        state.epoch, state.current = epoch + 1, EpochState()
        last = state.results["last"] = {"epoch": state.epoch, **metrics}
        if metrics["AP"] >= state.best:
            state.best, state.best_epoch = metrics["AP"], state.epoch
            state.results["best"] = last
        row = {"epoch": state.epoch, "lr": self.step.schedule.lr(epoch), **losses, "images_per_s": images_per_s}
        row |= self.skipped() | {name: metrics[name] for name in METRICS}
        row["seconds"] = time.perf_counter() - start
        state.history.append(row)
        if is_main():
            self.record(losses, evaluation)
        wait()  # with patience: writing may take longer than ranks wait in a step

    def record(self, losses: Mapping[str, float], evaluation: Evaluation) -> None:
        """Write the weights, metrics and history of the epoch that has ended, and its pictures if it is the best."""
        state, last = self.state, self.state.results["last"]
        if state.results.get("best") is last:
            save_checkpoint(self.step.ema.model, self.run_dir / "best.safetensors", last)
            self.picture_predictions(evaluation)
        save_checkpoint(self.step.ema.model, self.run_dir / "last.safetensors", last)
        write_atomically(self.run_dir / "metrics.json", json.dumps(state.results, indent=2).encode())
        self.log.epoch(state.history, losses, self.epoch_line(state.history[-1], losses))
        plot_history(state.history, losses, self.run_dir / "plots" / "history.png")

    def is_over(self) -> bool:
        """Whether all epochs are done, or there is a reason to stop early, of which rank 0's counts; says that one."""
        reason = from_main(lambda: self.stop_early(self.state))
        if reason and self.state.epoch < self.epochs:
            self.log.console.print(f"stopped early: {reason}")
        return bool(reason) or self.state.epoch >= self.epochs

    def train_epoch(self, epoch: int) -> tuple[dict[str, float], float]:
        """Go through the rest of the training set; return the epoch's mean loss terms and images per second.

        Raises:
            DetkitError: ``max_bad_steps`` in a row had a loss or gradient that was not finite.
            SystemExit: a signal asked for the end; the state is saved.
        """
        train_mode(self.step.detector)
        state, current, batches = self.state, self.state.current, len(self.train_loader)
        if not current.position:
            self.step.health.start_epoch()
        problems: list[str] = []
        shown = time.perf_counter()
        start = shown - current.seconds
        label = f"epoch {epoch + 1}/{self.epochs}"
        with show_progress(label, batches, self.log.console, current.position) as bar:
            for batch in self.train_loader.epoch(epoch, skip=current.position):
                self.log.problems(batch.problems)
                problems += batch.problems
                if epoch == 0 and current.batches < PICTURED_BATCHES and is_main() and len(batch.images):
                    self.picture_batch(f"train_batch{current.batches}", batch)
                terms = self.step(batch.to(self.step.precision.device), state.step, epoch)
                state.step += 1
                now = time.perf_counter()
                current.add(batch, terms, now - start)
                info = None
                if now - shown > 1 or current.position == batches:  # reading the losses waits for the device
                    shown = now
                    left = (self.epochs - epoch) * batches - current.position
                    info = self.progress_line(left)
                bar.advance(info)
                if self.save_every and state.step % self.save_every == 0 and current.position < batches:
                    self.save()
                self.obey()
        self.log.problems(gather_lines(problems))
        images = int(sum_over_ranks(torch.tensor(current.images, device=self.step.precision.device)))
        if not images:
            raise DetkitError("no image of this epoch can be read, on any rank: detkit check_data says why")
        return current.means(self.learnt()), images / current.seconds

    def learnt(self) -> int:
        """Return of how many of the epoch's batches so far the loss was finite, 1 at least.

        Raises:
            DetkitError: ``max_bad_steps`` in a row were not; names the images of one, and where the weights are.
        """
        counts = self.step.health.read()
        if counts.in_a_row < self.max_bad_steps or not is_main():  # rank 0 ends the run for all
            return max(self.state.current.batches - counts.bad_losses, 1)
        files = [str(file) for file in self.step.health.suspects()]
        path = self.run_dir / "last.safetensors"  # the weights are those from before the steps that were skipped
        save_checkpoint(self.step.ema.model, path, {"epoch": self.state.epoch})
        self.step.health.counts[3] = 0  # a run that is resumed has as many again
        self.save()
        more = f" and {len(files) - 4} more" if len(files) > 4 else ""
        raise DetkitError(
            f"the loss or its gradient was not finite in {counts.in_a_row} steps in a row, last for the images "
            f"{', '.join(files[:4])}{more}: look at these and go on with resume={self.run_dir}, or start again with "
            f"weights={path}, which are those from before, and a lower optim.lr or amp=off"
        )

    def skipped(self) -> dict[str, int]:
        """Return the epoch's columns on optimizer steps that were left out."""
        counts = self.step.health.read()
        return {"skipped_steps": counts.skipped_steps, "overflow_steps": counts.overflow_steps}

    def validate(self) -> Evaluation:
        """Evaluate the averaged weights on the validation set, in the precision of the training."""
        with show_progress("validation", len(self.val_loader), self.log.console) as bar:

            def advance() -> None:
                bar.advance()
                self.obey()

            batches, precision = self.val_loader.epoch(0), self.step.precision
            result = evaluate(self.step.ema.model, batches, self.annotations, precision, advance=advance)
        self.log.problems(result.problems)
        return result

    def save(self) -> None:
        """Write ``state.pt``; where that fails, say so: the one before is as it was, and the training goes on."""
        if not is_main():
            return
        try:
            write_state(self.run_dir, capture(self.step, self.state, len(self.train_loader)), self.keep_last)
        except OSError as error:
            self.log.console.print(
                f"{self.run_dir / STATE} cannot be saved ({error.strerror}): what was saved before is kept"
            )

    def obey(self) -> None:
        """Between two batches: save and end the process, if a signal has asked for that, on whatever rank."""
        signum = largest_of_ranks(self.stop.signum or 0)
        if signum:
            self.save()
            wait()
            self.stop.obey(signum)

    def progress_line(self, left: int) -> str:
        """Return what stands beside the bar, with ``left`` batches of the run to come."""
        current = self.state.current
        means = "  ".join(f"{name} {mean:.3f}" for name, mean in current.means(self.learnt()).items())
        speed = current.images * rank_count() / current.seconds
        seconds = left * current.seconds / current.batches
        return f"{means}  {speed:.0f} images/s  {clock(seconds)} left of the run"

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


def no_better(patience: int | None) -> Callable[[TrainState], str | None]:
    """Return a reason to stop early: no AP as good as the best for ``patience`` epochs; None: there is none."""

    def reason(state: TrainState) -> str | None:
        waited = state.epoch - state.best_epoch
        if patience is None or waited < patience:
            return None
        return f"no AP has been as good as epoch {state.best_epoch}'s for {waited} epochs (trainer.patience)"

    return reason
