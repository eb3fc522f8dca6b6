"""Output of a run: the terminal, history.csv, plots/ and the loggers."""

import csv
import io
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from detkit.data.annotations import Annotations
from detkit.engine.evaluator import Evaluation
from detkit.engine.loggers.async_logger import Call, SafeLogger
from detkit.engine.loggers.base import Value, tag
from detkit.engine.state import TrainState
from detkit.ops.atomic_write import write_atomically
from detkit.ops.curves import Curves
from detkit.structures import Batch
from detkit.viz.batch_images import draw_batch, draw_predictions
from detkit.viz.drawing import encode_figure, encode_image
from detkit.viz.plots import draw_evaluation, plot_history
from detkit.viz.progress import clock, has_bar

logger = logging.getLogger(__name__)

COMPARED = ("AP", "AP50", "AP75", "AR100", "epoch")  # of the best epoch, to compare the runs of a sweep


class RunLog:
    """Writes to a run directory and the terminal; only rank 0 may call its methods.

    Args:
        run_dir: an existing folder.
        loggers: see ``open_loggers``; none on other ranks.
    """

    def __init__(self, run_dir: Path, loggers: Sequence[SafeLogger] = ()) -> None:
        self.run_dir = run_dir
        self.loggers = loggers
        self.warned: set[str] = set()  # messages of ``warn_skipped``
        self.failed_plots: set[str] = set()  # names given to ``drawing``

    def start(self, hyper_parameters: Mapping[str, Value], texts: Mapping[str, str]) -> None:
        """Log the hyperparameters of the run, and Markdown texts by name."""
        self._send(lambda logger: logger.hyper_parameters(hyper_parameters))
        for name, text in texts.items():
            self._text(name, text)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Send scalars to the loggers, except negative ones, which COCO uses for metrics that are not defined."""
        measured = {name: value for name, value in values.items() if not value < 0}
        self._send(lambda logger: logger.scalars(measured, step))

    def line(self, text: str) -> None:
        """Log a line of progress with the time, unless a progress bar is shown."""
        if not has_bar():
            logger.info("%s  %s", time.strftime("%m-%d %H:%M:%S"), text)

    def epoch(
        self,
        state: TrainState,
        losses: Mapping[str, float],
        evaluation: Evaluation,
        val_set: Annotations,
        epochs: int,
    ) -> None:
        """Record a finished epoch in ``history.csv``, the history plot, the loggers and the terminal.

        If it is the best so far, plots of its evaluation are drawn as well.

        Args:
            state: its ``history`` ends with the epoch's row; rows may have different columns.
            losses: mean loss terms of the epoch.
            evaluation: of the epoch.
            val_set: annotations that were evaluated.
            epochs: total number of epochs.
        """
        best, row, metrics = state.best_epoch == state.epoch, state.history[-1], evaluation.metrics
        if best:
            with self.drawing("the evaluation"):
                self._draw_evaluation(evaluation, val_set, state.step)
        text = io.StringIO()
        writer = csv.DictWriter(text, list(dict.fromkeys(name for row in state.history for name in row)))
        writer.writeheader()
        writer.writerows(state.history)
        write_atomically(self.run_dir / "history.csv", text.getvalue().encode())
        values = {f"val/{name}": value for name, value in metrics.items() if name.startswith(("AP", "AR"))}
        values |= {f"class_AP/{tag(name)}": scores["AP"] for name, scores in metrics["per_class"].items()}
        values |= {f"epoch/{name}": row[name] for name in ("seconds", "skipped_steps", "overflow_steps")}
        if best:
            values |= {f"best/{name}": row[name] for name in COMPARED}
        self.scalars(values, state.step)
        logger.info(_epoch_line(row, losses, epochs, best))
        with self.drawing("history.png"):
            plot_history(state.history, losses, self.run_dir / "plots" / "history.png")

    def train_batch(self, batch: Batch, class_names: Sequence[str], number: int) -> None:
        """Draw a training batch as the network receives it."""
        with self.drawing("the training batches"):
            self.image(f"train_batch{number}", draw_batch(batch, class_names), 0)

    @contextmanager
    def drawing(self, name: str) -> Iterator[None]:
        """Run a block that draws the plot ``name``; if it fails, warn once and continue, except on an OSError."""
        try:
            yield
        except OSError:
            raise
        except Exception as error:  # of any kind, from a plugin or an unusual data set
            if name not in self.failed_plots:
                self.failed_plots.add(name)
                reason = (str(error) or type(error).__name__).splitlines()[0]
                logger.warning("%s cannot be drawn (%s): training continues", name, reason)

    def warn_skipped(self, messages: Sequence[str]) -> None:
        """Warn about skipped images, once for each."""
        for message in messages:
            if message not in self.warned:
                self.warned.add(message)
                logger.warning("skipped: %s", message)

    def image(self, name: str, image: np.ndarray, step: int) -> None:
        """Save an (H, W, 3) uint8 RGB image as ``plots/NAME.jpg``, and log it."""
        self._save(name, self.run_dir / "plots" / f"{name}.jpg", encode_image(image), step)

    def plot(self, name: str, figure: Figure, step: int) -> None:
        """Save a figure as ``plots/NAME.png``, and log it."""
        self._save(name, self.run_dir / "plots" / f"{name}.png", encode_figure(figure), step)

    def precision_recall(self, curves: Curves, class_names: Sequence[str], step: int) -> None:
        """Send precision-recall curves to the loggers."""
        self._send(lambda logger: logger.precision_recall(curves, class_names, step))

    def close(self, finished: bool = True) -> None:
        """Close the loggers; ``finished`` is False if the run was interrupted."""
        for logger in self.loggers:
            logger.close(finished)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, error: type[BaseException] | None, *_: Any) -> None:
        self.close(finished=error is None)

    def _draw_evaluation(self, evaluation: Evaluation, val_set: Annotations, step: int) -> None:
        """Draw predictions on the first validation images, the curves and the confusion matrix."""
        assert evaluation.curves is not None  # on rank 0
        self.image("val_predictions", draw_predictions(evaluation.first_batch, val_set), step)
        for name, figure in draw_evaluation(evaluation.curves, evaluation.predictions, val_set).items():
            self.plot(name, figure, step)
        self.precision_recall(evaluation.curves, val_set.class_names, step)

    def _text(self, name: str, text: str) -> None:
        self._send(lambda logger: logger.text(name, text))

    def _save(self, name: str, path: Path, data: bytes, step: int) -> None:
        path.parent.mkdir(exist_ok=True)  # but do not recreate a run directory that was removed
        write_atomically(path, data)
        self._send(lambda logger: logger.image(name, path, step))

    def _send(self, call: Call) -> None:
        for logger in self.loggers:
            logger.call(call)


def _epoch_line(row: Mapping[str, float], losses: Mapping[str, float], epochs: int, best: bool) -> str:
    """Return the terminal's line for an epoch; a star marks the best so far."""
    terms = "  ".join(f"{name} {value:.3f}" for name, value in losses.items())
    star = " *" if best else ""
    skipped = f"  {row['skipped_steps']} steps skipped" if row["skipped_steps"] else ""
    return (
        f"epoch {row['epoch']:>{len(str(epochs))}}/{epochs}  {terms}  AP {row['AP']:.4f}  "
        f"AP50 {row['AP50']:.4f}  {row['images_per_s']:.0f} images/s  {clock(row['seconds'])}{skipped}{star}"
    )
