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
from detkit.engine.run_log import Bar, RunLog, clock, show_progress
from detkit.engine.saver import Saver
from detkit.engine.signals import GracefulExit
from detkit.engine.state import EpochState, TrainState
from detkit.engine.step import TrainStep
from detkit.errors import DetkitError

logger = logging.getLogger(__name__)

DRAWN_BATCHES = 3  # of the first epoch


class Trainer:
    """Trains a detector, validates it after every epoch, and has both logged and saved. Of several ranks all train.

    Args:
        step: one step of training.
        train_loader, val_loader: batches; ``val_set`` are the annotations of the validation set.
        state: where the run stands.
        log: where metrics and images go.
        saver: where weights, metrics and the state are saved.
        options: the group ``trainer`` of the configuration: ``epochs``, ``max_nonfinite_steps``, ``save_every`` and
            ``log_every`` are used here.
        stop_early: asked between epochs and at the end for a reason to train no more, or None; see ``early_stopping``.
    """

    def __init__(
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
        stop_early: Callable[[TrainState], str | None] = lambda state: None,
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
        self.logged = EpochStats.of(EpochState(), 0)  # of the epoch under way, when last the loggers got a point
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
                raise DetkitError(f"{error}; resume={self.saver.run_dir} goes on from what is saved") from None
        return self.state.results

    def fit_epoch(self, epoch: int) -> None:
        """Train for the rest of an epoch, validate, then save and log both."""
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
        barrier()  # with patience: writing may take longer than ranks wait in a step

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
            raise DetkitError("no image of this epoch can be read, on any rank: detkit check_data says why")
        return current.means(self.check_nonfinite()), images / current.seconds

    def log_progress(self, bar: Bar, epoch: int) -> None:
        """Between two batches: advance the bar, and say how the epoch goes where that is due, on rank 0.

        This alone waits for the device.
        """
        state, current, batches = self.state, self.state.current, len(self.train_loader)
        nth, last = state.step % self.options.log_every == 0, current.position == batches
        if not (is_main_process() and (nth or last or bar.is_due())):
            bar.advance()
            return
        reading = EpochStats.of(current, self.check_nonfinite())
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

    def check_nonfinite(self) -> int:
        """Return of how many of the epoch's batches so far the loss was finite.

        Raises:
            DetkitError: ``max_nonfinite_steps`` in a row were not; names the images of one, and where the weights are.
        """
        counts = self.step.health.read()
        if counts.in_a_row < self.options.max_nonfinite_steps or not is_main_process():  # rank 0 ends the run for all
            return self.state.current.batches - counts.bad_losses
        files = [str(file) for file in self.step.health.suspects()]
        path = self.saver.save_rescue(self.step, self.state.epoch)  # from before the steps that were skipped
        self.step.health.counts[3] = 0  # a run that is resumed has as many again
        self.save()
        more = f" and {len(files) - 4} more" if len(files) > 4 else ""
        raise DetkitError(
            f"the loss or its gradient was not finite in {counts.in_a_row} steps in a row, last for the images "
            f"{', '.join(files[:4])}{more}: look at these and go on with resume={self.saver.run_dir}, or start again "
            f"with weights={path}, which are those from before, and a lower optim.lr or amp=off"
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
            result = evaluate(self.step.ema.model, batches, self.val_set, precision, advance=advance)
        self.log.warn_skipped(result.issues)
        return result

    def save(self) -> None:
        """Save where the run stands."""
        self.saver.save_state(self.step, self.state, len(self.train_loader))

    def exit_if_requested(self) -> None:
        """Between two batches: save and end the process, if a signal has asked for that, on whatever rank."""
        signum = all_reduce_max(self.stop.signum or 0)
        if signum:
            self.save()
            name = signal.Signals(signum).name
            logger.info("%s: saved after %d batches; resume=%s goes on", name, self.state.step, self.saver.run_dir)
            barrier()
            self.stop.exit(signum)

    def label(self, epoch: int) -> str:
        """Return how a line about an epoch begins."""
        return f"epoch {epoch + 1}/{self.epochs}"


def early_stopping(patience: int | None) -> Callable[[TrainState], str | None]:
    """Return a reason to stop early: no AP as good as the best for ``patience`` epochs; None: there is none."""

    def reason(state: TrainState) -> str | None:
        waited = state.epoch - state.best_epoch
        if patience is None or waited < patience:
            return None
        return f"no AP has been as good as epoch {state.best_epoch}'s for {waited} epochs (trainer.patience)"

    return reason
