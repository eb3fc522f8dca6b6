"""The training loop."""

import json
import logging
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from detkit.data.annotations import Annotations
from detkit.data.loader import BatchLoader
from detkit.data.shard_loader import ShardLoader
from detkit.data.workers import WorkersLost
from detkit.distributed.collectives import all_reduce_sum
from detkit.distributed.process_group import all_reduce_max, barrier, gather_messages, is_main_process, run_on_main
from detkit.engine.checkpoint import save_checkpoint
from detkit.engine.epoch_stats import EpochStats, learning_rates, memory_gib, time_data_wait
from detkit.engine.evaluator import METRICS, Evaluation, evaluate
from detkit.engine.param_groups import train_mode
from detkit.engine.run_log import Bar, RunLog, clock, show_progress
from detkit.engine.signals import GracefulExit
from detkit.engine.state import STATE, EpochState, TrainState, training_state_dict, write_state
from detkit.engine.step import TrainStep
from detkit.errors import DetkitError
from detkit.ops.atomic_write import write_atomically
from detkit.viz.batch_images import draw_batch, draw_predictions
from detkit.viz.plots import draw_evaluation, plot_history

logger = logging.getLogger(__name__)

DRAWN_BATCHES = 3  # of the first epoch


class Trainer:
    """Trains a detector and keeps its best and last weights, and where it stands. Of several ranks all train, and rank
    0 writes.

    Args:
        step: learns from one batch.
        train_loader, val_loader: batches; ``annotations`` are the validation set's.
        epochs: of the run.
        max_nonfinite_steps: stop after this many optimizer steps in a row that were skipped.
        stop_early: asked between epochs and at the end for a reason to train no more, or None; see ``early_stopping``.
        run_dir: an existing folder for everything that is written.
        log: where numbers and pictures go.
        state: where the run stands.
        save_every: batches after which the state is saved within an epoch; None: at the end of each only.
        keep_last: how many saved states there are to be.
        log_every: batches after which the loggers get a point and, where there is no terminal, a line is said.
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
        max_nonfinite_steps: int = 10,
        stop_early: Callable[[TrainState], str | None] = lambda state: None,
        save_every: int | None = None,
        keep_last: int = 1,
        log_every: int = 50,
    ) -> None:
        self.step = step
        self.train_loader = train_loader
        self.val_loader = val_loader
        self.annotations = annotations
        self.epochs = epochs
        self.run_dir = run_dir
        self.log = log
        self.max_nonfinite_steps = max_nonfinite_steps
        self.stop_early = stop_early
        self.state = state
        self.save_every = save_every
        self.keep_last = keep_last
        self.log_every = log_every
        self.logged: EpochStats | None = None  # of the epoch under way, when last the loggers were told
        self.stop = GracefulExit()

    def fit(self) -> dict[str, Any]:
        """Train the epochs that are left; return the best and the last one's metrics, as in ``metrics.json``.

        Raises:
            SystemExit: a signal asked for the end; the state is saved.
            DetkitError: the batches do not come any more; the state is saved.
        """
        with self.stop.install():
            try:
                while not self.is_over():
                    self.fit_epoch(self.state.epoch)
                    self.save()
                    self.exit_if_requested()
            except WorkersLost as error:
                self.save()
                raise DetkitError(f"{error}; resume={self.run_dir} goes on from what is saved") from None
        return self.state.results

    def fit_epoch(self, epoch: int) -> None:
        """Train for the rest of an epoch, evaluate, and record both."""
        state = self.state
        start = time.perf_counter() - state.current.seconds
        losses, images_per_s = self.train_epoch(epoch)
        evaluation = self.validate()
        metrics = evaluation.metrics
        state.epoch = epoch + 1
        last = state.results["last"] = {"epoch": state.epoch, **metrics}
        if metrics["AP"] >= state.best:
            state.best, state.best_epoch = metrics["AP"], state.epoch
            state.results["best"] = last
        row = {"epoch": state.epoch, "lr": self.step.schedule.lr(epoch), **losses, "images_per_s": images_per_s}
        row |= self.measured() | self.skipped() | {name: metrics[name] for name in METRICS}
        row["seconds"] = time.perf_counter() - start
        state.history.append(row)
        state.current = EpochState(grad_norm=self.step.grad_norm)
        if is_main_process():
            self.record(losses, evaluation)
        barrier()  # with patience: writing may take longer than ranks wait in a step

    def record(self, losses: Mapping[str, float], evaluation: Evaluation) -> None:
        """Write the weights, metrics and history of the epoch that has ended, and its pictures if it is the best."""
        state, last = self.state, self.state.results["last"]
        best = state.results.get("best") is last
        if best:
            save_checkpoint(self.step.ema.model, self.run_dir / "best.safetensors", last)
            with self.log.drawing("the evaluation"):
                self.draw_best_epoch(evaluation)
        save_checkpoint(self.step.ema.model, self.run_dir / "last.safetensors", last)
        write_atomically(self.run_dir / "metrics.json", json.dumps(state.results, indent=2).encode())
        line = self.epoch_line(state.history[-1], losses)
        self.log.epoch(state.history, evaluation.metrics, best, state.step, line)
        with self.log.drawing("history.png"):
            plot_history(state.history, losses, self.run_dir / "plots" / "history.png")

    def is_over(self) -> bool:
        """Whether all epochs are done, or there is a reason to stop early, of which rank 0's counts; says that one."""
        reason = run_on_main(lambda: self.stop_early(self.state))
        if reason and self.state.epoch < self.epochs:
            logger.info("stopped early: %s", reason)
        return bool(reason) or self.state.epoch >= self.epochs

    def train_epoch(self, epoch: int) -> tuple[dict[str, float], float]:
        """Go through the rest of the training set; return the epoch's mean loss terms and images per second.

        Raises:
            DetkitError: ``max_nonfinite_steps`` in a row had a loss or gradient that was not finite.
            SystemExit: a signal asked for the end; the state is saved.
        """
        train_mode(self.step.detector)
        state, current, batches = self.state, self.state.current, len(self.train_loader)
        if not current.position:
            self.step.health.start_epoch()
        issues: list[str] = []
        start = time.perf_counter() - current.seconds
        self.logged = EpochStats.of(current, self.learnt())
        with show_progress(self.label(epoch), batches, current.position) as bar:
            for batch in time_data_wait(self.train_loader.epoch(epoch, skip=current.position), current):
                self.log.warn(batch.issues)
                issues += batch.issues
                if epoch == 0 and current.batches < DRAWN_BATCHES and is_main_process() and len(batch.images):
                    with self.log.drawing("the training batches"):
                        picture = draw_batch(batch, self.step.detector.class_names)
                        self.log.image(f"train_batch{current.batches}", picture, 0)
                terms = self.step(batch.to(self.step.precision.device), state.step, epoch)
                state.step += 1
                current.add(batch, terms, time.perf_counter() - start)
                current.grad_norm = self.step.grad_norm
                self.log_progress(bar, epoch)
                if self.save_every and state.step % self.save_every == 0 and current.position < batches:
                    self.save()
                self.exit_if_requested()
        self.log.warn(gather_messages(issues))
        images = int(all_reduce_sum(torch.tensor(current.images, device=self.step.precision.device)))
        if not images:
            raise DetkitError("no image of this epoch can be read, on any rank: detkit check_data says why")
        return current.means(self.learnt()), images / current.seconds

    def log_progress(self, bar: Bar, epoch: int) -> None:
        """Between two batches: advance the bar, and say how the epoch goes where that is due, on rank 0.

        This alone waits for the device.
        """
        state, current, batches = self.state, self.state.current, len(self.train_loader)
        nth, last = state.step % self.log_every == 0, current.position == batches
        if not (is_main_process() and (nth or last or bar.is_due())):
            bar.advance()
            return
        reading = EpochStats.of(current, self.learnt())
        left = clock(self.seconds_left(epoch))
        bar.advance(f"{reading}  {left} left of the run")
        if not (nth or last):
            return
        window, self.logged = reading.since(self.logged), reading
        if nth:
            self.log.line(f"{self.label(epoch)}  batch {current.position}/{batches}  {window}  {left} left")
        values = {f"loss/{name}": mean for name, mean in window.means().items()}
        values |= {f"lr/{kind}": rate for kind, rate in learning_rates(self.step.optimizer).items()}
        values |= {f"train/{name}": value for name, value in self.measured().items()}
        values |= {"train/images_per_s": window.images_per_s, "train/data_wait": window.data_wait}
        self.log.scalars(values | {"train/epoch": epoch + current.position / batches}, state.step)

    def seconds_left(self, epoch: int) -> float:
        """Return how long the rest of the run takes, at the epoch's pace, and the last one's for the validations."""
        current, history, batches = self.state.current, self.state.history, len(self.train_loader)
        pace = current.seconds / current.batches
        rest = max(history[-1]["seconds"] - pace * batches, 0) if history else 0
        return ((self.epochs - epoch) * batches - current.position) * pace + (self.epochs - epoch) * rest

    def measured(self) -> dict[str, float]:
        """Return the latest gradient's norm, the epoch's share of waiting for data, and the memory used."""
        current = self.state.current
        return {
            "grad_norm": float(current.grad_norm),
            "data_wait": current.waited / max(current.seconds, 1e-9),
            "memory_gib": memory_gib(self.step.precision.device),
        }

    def learnt(self) -> int:
        """Return of how many of the epoch's batches so far the loss was finite.

        Raises:
            DetkitError: ``max_nonfinite_steps`` in a row were not; names the images of one, and where the weights are.
        """
        counts = self.step.health.read()
        if counts.in_a_row < self.max_nonfinite_steps or not is_main_process():  # rank 0 ends the run for all
            return self.state.current.batches - counts.bad_losses
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
        with show_progress("validation", len(self.val_loader)) as bar:

            def advance() -> None:
                bar.advance()
                self.exit_if_requested()

            batches, precision = self.val_loader.epoch(0), self.step.precision
            result = evaluate(self.step.ema.model, batches, self.annotations, precision, advance=advance)
        self.log.warn(result.issues)
        return result

    def save(self) -> None:
        """Write ``state.pt``; where that fails, warn: the one before is as it was, and the training goes on."""
        if not is_main_process():
            return
        try:
            write_state(
                self.run_dir, training_state_dict(self.step, self.state, len(self.train_loader)), self.keep_last
            )
        except OSError as error:
            path = self.run_dir / STATE
            logger.warning("%s cannot be saved (%s): what was saved before is kept", path, error.strerror)

    def exit_if_requested(self) -> None:
        """Between two batches: save and end the process, if a signal has asked for that, on whatever rank."""
        signum = all_reduce_max(self.stop.signum or 0)
        if signum:
            self.save()
            name = signal.Signals(signum).name
            logger.info("%s: saved after %d batches; resume=%s goes on", name, self.state.step, self.run_dir)
            barrier()
            self.stop.exit(signum)

    def label(self, epoch: int) -> str:
        """Return how a line about an epoch begins."""
        return f"epoch {epoch + 1}/{self.epochs}"

    def epoch_line(self, row: Mapping[str, float], losses: Mapping[str, float]) -> str:
        """Return what the terminal says of an epoch; a star marks the best so far."""
        terms = "  ".join(f"{name} {value:.3f}" for name, value in losses.items())
        star = " *" if self.state.best_epoch == row["epoch"] else ""
        skipped = f"  {row['skipped_steps']} steps skipped" if row["skipped_steps"] else ""
        return (
            f"epoch {row['epoch']:>{len(str(self.epochs))}}/{self.epochs}  {terms}  AP {row['AP']:.4f}  "
            f"AP50 {row['AP50']:.4f}  {row['images_per_s']:.0f} images/s  {clock(row['seconds'])}{skipped}{star}"
        )

    def draw_best_epoch(self, evaluation: Evaluation) -> None:
        """Draw what was found in the first validation images, and where the network errs in all of them."""
        names, step = self.annotations.class_names, self.state.step
        self.log.image("val_predictions", draw_predictions(evaluation.pictures, self.annotations), step)
        for name, figure in draw_evaluation(evaluation.curves, evaluation.predictions, self.annotations).items():
            self.log.plot(name, figure, step)
        self.log.precision_recall(evaluation.curves, names, step)


def early_stopping(patience: int | None) -> Callable[[TrainState], str | None]:
    """Return a reason to stop early: no AP as good as the best for ``patience`` epochs; None: there is none."""

    def reason(state: TrainState) -> str | None:
        waited = state.epoch - state.best_epoch
        if patience is None or waited < patience:
            return None
        return f"no AP has been as good as epoch {state.best_epoch}'s for {waited} epochs (trainer.patience)"

    return reason
