"""The training loop."""

import logging
import signal
import time
from collections.abc import Callable
from typing import Any

import torch

from detkit.config.schema import TrainerConfig
from detkit.data.annotations import Annotations
from detkit.data.loader import BatchLoader
from detkit.data.shard_loader import ShardLoader
from detkit.data.workers import WorkersLost
from detkit.distributed.collectives import all_reduce_sum
from detkit.distributed.process_group import all_reduce_max, barrier, gather_messages, is_main_process, run_on_main
from detkit.engine.epoch_stats import EpochStats, learning_rates, memory_gib, time_data_wait
from detkit.engine.evaluator import METRICS, Evaluation, evaluate
from detkit.engine.param_groups import train_mode
from detkit.engine.run_log import RunLog
from detkit.engine.saver import Saver
from detkit.engine.signals import GracefulExit
from detkit.engine.state import EpochState, TrainState
from detkit.engine.step import TrainStep
from detkit.errors import DetkitError
from detkit.inference.model import TorchModel
from detkit.viz.progress import Bar, clock, show_progress

logger = logging.getLogger(__name__)

DRAWN_BATCHES = 3  # of the first epoch


class Trainer:
    """Trains a detector on all ranks; validates, logs and saves after every epoch.

    Args:
        step: one training step.
        train_loader: training batches.
        val_loader: validation batches.
        val_set: annotations of the validation set.
        state: progress of the run.
        log: writes metrics and images.
        saver: writes weights, metrics and the training state.
        options: config group ``trainer``, of which ``epochs``, ``max_nonfinite_steps``, ``save_every`` and
            ``log_every`` are used here.
        stop_early: returns a reason to stop after an epoch, or None; see ``early_stopping``.
    """

    def __init__(  # noqa: PLR0913  (its collaborators; most are keyword-only)
        self,
        step: TrainStep,
        train_loader: BatchLoader | ShardLoader,
        val_loader: BatchLoader,
        val_set: Annotations,
        *,
        state: TrainState,
        log: RunLog,
        saver: Saver,
        options: TrainerConfig,
        stop_early: Callable[[TrainState], str | None] = lambda _: None,
    ) -> None:
        self.step = step
        self.train_loader = train_loader
        self.val_loader = val_loader
        self.val_set = val_set
        self.state = state
        self.log = log
        self.saver = saver
        self.options = options
        self.epochs = options.epochs
        self.stop_early = stop_early
        self.logged = EpochStats.of(EpochState(), 0)  # of the current epoch, at the last log point
        self.stop = GracefulExit()

    def fit(self) -> dict[str, Any]:
        """Train the remaining epochs; return the metrics of the best and the last, as in ``metrics.json``.

        Raises:
            SystemExit: a signal requested the end; the state is saved.
            DetkitError: the loader's processes were lost (the state is saved), or as ``train_epoch``.
        """
        with self.stop.install():
            try:
                while not self.is_over():
                    self.fit_epoch(self.state.epoch)
                    self.save()
                    self.exit_if_requested()
            except WorkersLost as error:
                self.save()
                raise DetkitError(f"{error}; continue with resume={self.saver.run_dir}") from None
        return self.state.results

    def fit_epoch(self, epoch: int) -> None:
        """Train for the rest of an epoch, validate, save and log."""
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
            self.saver.save_epoch(self.step, state.results)
            self.log.epoch(state, losses, evaluation, self.val_set, self.epochs)
        barrier()  # has a longer timeout than a step, as writing may be slow

    def is_over(self) -> bool:
        """Whether all epochs are done or rank 0 has a reason to stop early, which is logged."""
        reason = run_on_main(lambda: self.stop_early(self.state))
        if reason and self.state.epoch < self.epochs:
            logger.info("stopped early: %s", reason)
        return bool(reason) or self.state.epoch >= self.epochs

    def train_epoch(self, epoch: int) -> tuple[dict[str, float], float]:
        """Train on the rest of an epoch; return its mean loss terms and images per second.

        Raises:
            DetkitError: ``max_nonfinite_steps`` steps in a row were not finite, or no image of the epoch can be read.
            SystemExit: a signal requested the end; the state is saved.
        """
        train_mode(self.step.detector)
        state, current, batches = self.state, self.state.current, len(self.train_loader)
        if not current.position:
            self.step.health.start_epoch()
        issues: list[str] = []
        start = time.perf_counter() - current.seconds
        self.logged = EpochStats.of(current, self.check_nonfinite())
        with show_progress(self.label(epoch), batches, current.position) as bar:
            for batch in time_data_wait(self.train_loader.epoch(epoch, skip=current.position), current):
                self.log.warn_skipped(batch.issues)
                issues += batch.issues
                if epoch == 0 and current.batches < DRAWN_BATCHES and is_main_process() and len(batch.images):
                    self.log.train_batch(batch, self.step.detector.class_names, current.batches)
                terms = self.step(batch.to(self.step.precision.device), state.step, epoch)
                state.step += 1
                current.add(batch, terms, time.perf_counter() - start)
                current.grad_norm = self.step.grad_norm
                self.log_progress(bar, epoch)
                save_every = self.options.save_every
                if save_every and state.step % save_every == 0 and current.position < batches:
                    self.save()
                self.exit_if_requested()
        self.log.warn_skipped(gather_messages(issues))
        images = int(all_reduce_sum(torch.tensor(current.images, device=self.step.precision.device)))
        if not images:
            raise DetkitError("no image of this epoch can be read on any rank: run detkit check_data for details")
        return current.means(self.check_nonfinite()), images / current.seconds

    def log_progress(self, bar: Bar, epoch: int) -> None:
        """Advance the progress bar after a batch and, on rank 0, log progress if it is due.

        Only logging synchronizes with the device.
        """
        state, current, batches = self.state, self.state.current, len(self.train_loader)
        nth, last = state.step % self.options.log_every == 0, current.position == batches
        if not (is_main_process() and (nth or last or bar.is_due())):
            bar.advance()
            return
        reading = EpochStats.of(current, self.check_nonfinite())
        left = clock(self.seconds_left(epoch))
        bar.advance(f"{reading}  {left} left")
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
        """Estimate the remaining time of the run from this epoch's speed and the last epoch's validation time."""
        current, history, batches = self.state.current, self.state.history, len(self.train_loader)
        pace = current.seconds / current.batches
        validation = max(history[-1]["seconds"] - pace * batches, 0) if history else 0
        return ((self.epochs - epoch) * batches - current.position) * pace + (self.epochs - epoch) * validation

    def measured(self) -> dict[str, float]:
        """Return the latest gradient norm, the data-wait fraction of the epoch, and the memory in GiB."""
        current = self.state.current
        return {
            "grad_norm": float(current.grad_norm),
            "data_wait": current.waited / max(current.seconds, 1e-9),
            "memory_gib": memory_gib(self.step.precision.device),
        }

    def check_nonfinite(self) -> int:
        """Return the number of batches of this epoch with a finite loss.

        Raises:
            DetkitError: ``max_nonfinite_steps`` steps in a row were not finite; names images and the saved weights.
        """
        counts = self.step.health.read()
        if counts.in_a_row < self.options.max_nonfinite_steps or not is_main_process():  # rank 0 ends the run for all
            return self.state.current.batches - counts.bad_losses
        files = [str(file) for file in self.step.health.suspects()]
        path = self.saver.save_rescue(self.step, self.state.epoch)  # the weights from before the skipped steps
        self.step.health.counts[3] = 0  # a resumed run starts counting at 0
        self.save()
        more = f" and {len(files) - 4} more" if len(files) > 4 else ""
        raise DetkitError(
            f"the loss or its gradient was not finite in {counts.in_a_row} steps in a row, last for the images "
            f"{', '.join(files[:4])}{more}: check these and continue with resume={self.saver.run_dir}, or start again "
            f"from the weights before these steps, weights={path}, with a lower optim.lr or amp=off"
        )

    def skipped(self) -> dict[str, int]:
        """Return the numbers of optimizer steps skipped in this epoch, for its row."""
        counts = self.step.health.read()
        return {"skipped_steps": counts.skipped_steps, "overflow_steps": counts.overflow_steps}

    def validate(self) -> Evaluation:
        """Evaluate the averaged weights on the validation set, in the training precision."""
        with show_progress("validation", len(self.val_loader)) as bar:

            def advance() -> None:
                bar.advance()
                self.exit_if_requested()

            batches, precision = self.val_loader.epoch(0), self.step.precision
            result = evaluate(TorchModel(self.step.ema.model, precision), batches, self.val_set, advance=advance)
        self.log.warn_skipped(result.issues)
        return result

    def save(self) -> None:
        """Save the training state."""
        self.saver.save_state(self.step, self.state, len(self.train_loader))

    def exit_if_requested(self) -> None:
        """Save and end the process if any rank has received a signal to do so."""
        signum = all_reduce_max(self.stop.signum or 0)
        if signum:
            self.save()
            name = signal.Signals(signum).name
            logger.info(
                "%s: saved after %d batches; continue with resume=%s", name, self.state.step, self.saver.run_dir
            )
            barrier()
            self.stop.exit(signum)

    def label(self, epoch: int) -> str:
        """Return the prefix of a line about an epoch."""
        return f"epoch {epoch + 1}/{self.epochs}"


def early_stopping(patience: int | None) -> Callable[[TrainState], str | None]:
    """Return a function that gives a reason to stop if AP has been below the best for ``patience`` epochs, or None."""

    def reason(state: TrainState) -> str | None:
        since_best = state.epoch - state.best_epoch
        if patience is None or since_best < patience:
            return None
        return f"AP has not reached that of epoch {state.best_epoch} for {since_best} epochs (trainer.patience)"

    return reason
