"""Weights & Biases logger, enabled by ``trainer.loggers=[wandb]``."""

import html
import logging
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import wandb

from detkit.engine.loggers.base import Value, tag
from detkit.ops.curves import RECALLS, Curves

logger = logging.getLogger(__name__)

MAX_CLASSES = 20  # with a curve
INIT_TIMEOUT = 30  # seconds to wait for the server


class WandB:
    """Logs to project WANDB_PROJECT (``detkit``).

    WANDB_MODE selects ``online``, ``offline`` or ``disabled``. If it is not set and there is no login or no network,
    the run is stored in ``RUN_DIR/wandb`` for ``wandb sync``.

    Args:
        run_dir: run directory; its name is the name of the run.
        run: earlier ``id`` for the run directory; None for a new run.

    Attributes:
        id: id of the run in W&B.

    Raises:
        wandb.Error: WANDB_MODE requires a login that is missing.
    """

    def __init__(self, run_dir: Path, run: str | None) -> None:
        self.id = run or secrets.token_hex(4)
        options: dict[str, Any] = {
            "project": os.environ.get("WANDB_PROJECT", "detkit"),
            "name": run_dir.name,
            "id": self.id,
            "resume": "allow",
            "dir": run_dir,
            "reinit": "create_new",  # do not end other runs of this process
            "settings": wandb.Settings(silent=True, console="off", init_timeout=INIT_TIMEOUT),
        }
        if "WANDB_MODE" in os.environ:
            self.run = wandb.init(**options)
        else:
            self.run = _init_by_login(options)
        if self.run.settings.mode == "offline":
            logger.info("W&B: offline; upload with: wandb sync %s/offline-run-*", run_dir / "wandb")
        elif self.run.url:
            logger.info("W&B: %s", self.run.url)
        self.run.define_metric("*", step_metric="step")  # W&B's own step would reject repeated steps of a resumed run

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Log scalars by name."""
        self.run.log({**values, "step": step})

    def image(self, name: str, path: Path, step: int) -> None:
        """Log an image file."""
        self.run.log({f"images/{name}": wandb.Image(str(path)), "step": step})

    def precision_recall(self, curves: Curves, class_names: Sequence[str], step: int) -> None:
        """Log precision-recall curves of the classes with the most boxes."""
        classes = curves.labelled(MAX_CLASSES)
        if classes:
            lines = wandb.plot.line_series(
                RECALLS.tolist(),
                curves.precision_rc[:, classes].T.tolist(),
                keys=[tag(class_names[c]) for c in classes],
                title="precision over recall at IoU 0.5",
                xname="recall",
            )
            self.run.log({"precision_recall": lines, "step": step})

    def text(self, name: str, text: str) -> None:
        """Log a Markdown text."""
        self.run.log({name: wandb.Html(f"<pre>{html.escape(text)}</pre>"), "step": 0})

    def hyper_parameters(self, values: Mapping[str, Value]) -> None:
        """Log the hyperparameters of the run."""
        self.run.config.update(dict(values), allow_val_change=True)  # trainer.epochs of an extended run

    def close(self, finished: bool) -> None:
        """End the run, as failed if it was interrupted."""
        self.run.finish(exit_code=0 if finished else 1)


def _init_by_login(options: dict[str, Any]) -> "wandb.Run":
    """Start a run online if there is a login and the server responds, otherwise offline."""
    try:
        if wandb.login(prompt=False):
            return wandb.init(**options)
    except wandb.Error:  # no network
        pass
    return wandb.init(**options, mode="offline")
