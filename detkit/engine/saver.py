"""Saving weights, metrics and the training state to a run directory."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from detkit.distributed.process_group import is_main_process
from detkit.engine.checkpoint import save_checkpoint
from detkit.engine.state import STATE, TrainState, training_state_dict, write_state
from detkit.engine.step import TrainStep
from detkit.ops.atomic_write import write_atomically

logger = logging.getLogger(__name__)


class Saver:
    """Writes to a run directory, on rank 0 only.

    Args:
        run_dir: an existing folder.
        keep_last: number of training states to keep.
    """

    def __init__(self, run_dir: Path, keep_last: int = 1) -> None:
        self.run_dir = run_dir
        self.keep_last = keep_last

    def save_state(self, step: TrainStep, state: TrainState, batches: int) -> None:
        """Write ``state.pt``; if that fails, warn and continue with the previous one unchanged."""
        if not is_main_process():
            return
        try:
            write_state(self.run_dir, training_state_dict(step, state, batches), self.keep_last)
        except OSError as error:
            path = self.run_dir / STATE
            logger.warning("%s cannot be saved (%s): the previous save is kept", path, error.strerror)

    def save_epoch(self, step: TrainStep, results: Mapping[str, Any]) -> None:
        """Write the averaged weights to ``last.safetensors``, if best also ``best.safetensors``, and ``metrics.json``.

        Args:
            step: holds the averaged weights.
            results: metrics of the ``best`` and the ``last`` epoch.
        """
        last = results["last"]
        is_best = results.get("best") is last
        if is_best:
            save_checkpoint(step.ema.model, self.run_dir / "best.safetensors", last)
        save_checkpoint(step.ema.model, self.run_dir / "last.safetensors", last)
        write_atomically(self.run_dir / "metrics.json", json.dumps(results, indent=2).encode())

    def save_rescue(self, step: TrainStep, epoch: int) -> Path:
        """Write the averaged weights to ``last.safetensors`` within an epoch; return its path."""
        path = self.run_dir / "last.safetensors"
        save_checkpoint(step.ema.model, path, {"epoch": epoch})
        return path
