"""Where a run's numbers, curves and pictures go: a file a logger, behind the interface of ``base.py``.

What is registered in LOGGERS is called with the run directory, the ``id`` that the logger had there before (None in a
new run); it returns a ``Logger`` with an ``id`` of letters, digits and ``_-``.
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
IDS = "loggers.json"  # in the run directory: by what W&B and MLflow know the run


def check_loggers(names: Sequence[str]) -> None:
    """Check that loggers are known, and the packages of OPTIONAL ones there.

    Raises:
        DetkitError: one is not.
    """
    for name in names:
        LOGGERS.get(name)
        if name in OPTIONAL and importlib.util.find_spec(name) is None:
            raise DetkitError(f"trainer.loggers={name} needs a package that is missing: pip install 'detkit[{name}]'")


def open_loggers(names: Sequence[str], run_dir: Path, step: int, *, resumed: bool = False) -> list[SafeLogger]:
    """Open TensorBoard and the optional loggers ``names``, which go on with the runs they had for this directory.

    Args:
        step: batches that the run has done.
        resumed: the run goes on without a logger that does not open.

    Raises:
        DetkitError: a logger of a new run does not open.
    """
    opened = [SafeLogger("TensorBoard", TensorBoard(run_dir, step))]
    ids = _read_ids(run_dir / IDS)
    for name in names:
        try:
            backend = LOGGERS.get(name)(run_dir, ids.get(name))
        except Exception as error:  # whatever these packages and their servers come up with
            reason = (str(error) or type(error).__name__).splitlines()[0]
            if not resumed:
                raise DetkitError(f"trainer.loggers: {name} does not open: {reason}") from None
            logger.warning("%s does not open (%s): the run goes on without it", name, reason)
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
    """Return the ids by logger; of a damaged file none, so that new runs begin."""
    try:
        content: Any = json.loads(read_regular(path))
    except (OSError, ValueError, RecursionError):
        return {}
    pairs = content.items() if isinstance(content, dict) else ()
    return {name: run for name, run in pairs if isinstance(run, str) and re.fullmatch(r"[\w-]{1,64}", run, re.ASCII)}
