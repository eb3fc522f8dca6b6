"""Experiment loggers for metrics, curves and images: one file per logger, with the interface of ``base.py``.

An entry of LOGGERS is called with the run directory and the logger's earlier ``id`` for it (None in a new run), and
returns a ``Logger`` with an ``id`` of letters, digits and ``_-``.
"""

import importlib.util
import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detkit.engine.loggers.async_logger import AsyncLogger, SafeLogger
from detkit.engine.loggers.base import Logger
from detkit.engine.loggers.tensorboard_logger import TensorBoard
from detkit.errors import DetkitError
from detkit.ops.atomic_write import write_atomically
from detkit.ops.files import read_regular
from detkit.registry import LOGGERS

logger = logging.getLogger(__name__)

OPTIONAL = ("wandb", "mlflow")
IDS = "loggers.json"  # in the run directory: ids of the run in W&B and MLflow


def check_loggers(names: Sequence[str]) -> None:
    """Check that loggers are registered, and the packages of OPTIONAL ones installed.

    Raises:
        DetkitError: a logger is unknown, or its package is missing.
    """
    for name in names:
        LOGGERS.get(name)
        if name in OPTIONAL and importlib.util.find_spec(name) is None:
            raise DetkitError(f"trainer.loggers={name} needs a package that is missing: pip install 'detkit[{name}]'")


def open_loggers(names: Sequence[str], run_dir: Path, step: int, *, resumed: bool = False) -> list[SafeLogger]:
    """Open TensorBoard and the loggers ``names``, which continue their earlier runs for this directory.

    Args:
        names: as in ``trainer.loggers``.
        run_dir: run directory.
        step: number of batches so far.
        resumed: if a logger cannot be opened, warn instead of raising.

    Raises:
        DetkitError: a logger of a new run cannot be opened.
    """
    opened = [SafeLogger("TensorBoard", TensorBoard(run_dir, step))]
    ids = _read_ids(run_dir / IDS)
    for name in names:
        try:
            backend = LOGGERS.get(name)(run_dir, ids.get(name))
        except Exception as error:  # of any kind, from the package or its server
            reason = (str(error) or type(error).__name__).splitlines()[0]
            if not resumed:
                raise DetkitError(f"trainer.loggers: {name} cannot be opened: {reason}") from None
            logger.warning("%s cannot be opened (%s): training continues without it", name, reason)
            continue
        ids[name] = backend.id
        opened.append(AsyncLogger(name, backend))
    if ids:
        write_atomically(run_dir / IDS, json.dumps(ids).encode())
    return opened


@LOGGERS.register("wandb")
def _wandb(run_dir: Path, run: str | None) -> Logger:
    from detkit.engine.loggers.wandb_logger import WandB

    return WandB(run_dir, run)


@LOGGERS.register("mlflow")
def _mlflow(run_dir: Path, run: str | None) -> Logger:
    from detkit.engine.loggers.mlflow_logger import MLflow

    return MLflow(run_dir, run)


def _read_ids(path: Path) -> dict[str, str]:
    """Return the ids by logger; none if the file is missing or damaged, so that new runs are started."""
    try:
        content: Any = json.loads(read_regular(path))
    except (OSError, ValueError, RecursionError):
        return {}
    pairs = content.items() if isinstance(content, dict) else ()
    return {name: run for name, run in pairs if isinstance(run, str) and re.fullmatch(r"[\w-]{1,64}", run, re.ASCII)}
