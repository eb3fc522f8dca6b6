"""Weights & Biases, by ``trainer.loggers=[wandb]``."""

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

CLASSES = 20  # that are drawn, at most
INIT_TIMEOUT = 30  # seconds for the server to answer


class WandB:
    """Writes to a run of the project WANDB_PROJECT, or ``detkit``.

    WANDB_MODE decides whether it is sent (``online``, ``offline``, ``disabled``). Where that is not set, and there is
    no login or no network, the run is kept in ``RUN_DIR/wandb``, and ``wandb sync`` sends it later.

    Args:
        run: the ``id`` that the run directory had before; None for a new one.

    Attributes:
        id: by which W&B knows the run.

    Raises:
        wandb.Error: WANDB_MODE asks for what there is no login for.
    """

    def __init__(self, run_dir: Path, run: str | None) -> None:
        self.id = run or secrets.token_hex(4)
        options: dict[str, Any] = {
            "project": os.environ.get("WANDB_PROJECT", "detkit"),
            "name": run_dir.name,
            "id": self.id,
            "resume": "allow",
            "dir": run_dir,
            "reinit": "create_new",  # leaves other runs of the process alone
            "settings": wandb.Settings(silent=True, console="off", init_timeout=INIT_TIMEOUT),
        }
        if "WANDB_MODE" in os.environ:
            self.run = wandb.init(**options)
        else:
            self.run = _init_by_login(options)
        if self.run.settings.mode == "offline":
            logger.info("W&B: offline; send it by: wandb sync %s/offline-run-*", run_dir / "wandb")
        elif self.run.url:
            logger.info("W&B: %s", self.run.url)
        self.run.define_metric("*", step_metric="step")  # its own count would refuse what a resumed run repeats

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self.run.log({**values, "step": step})

    def image(self, name: str, path: Path, step: int) -> None:
        self.run.log({f"pictures/{name}": wandb.Image(str(path)), "step": step})

    def precision_recall(self, curves: Curves, class_names: Sequence[str], step: int) -> None:
        classes = curves.labelled(CLASSES)
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
        self.run.log({name: wandb.Html(f"<pre>{html.escape(text)}</pre>"), "step": 0})

    def hyper_parameters(self, values: Mapping[str, Value]) -> None:
        self.run.config.update(dict(values), allow_val_change=True)  # trainer.epochs of a run that is extended

    def close(self, finished: bool) -> None:
        self.run.finish(exit_code=0 if finished else 1)


def _init_by_login(options: dict[str, Any]) -> "wandb.Run":
    """Start a run online where there is a login and the server answers, else offline."""
    try:
        if wandb.login(prompt=False):
            return wandb.init(**options)
    except wandb.Error:  # no network
        pass
    return wandb.init(**options, mode="offline")
