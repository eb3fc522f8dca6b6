"""Training state for resuming a run: ``state.pt``, written with torch.save and loaded with ``weights_only=True``.

The file is a zip archive, whose checksums are verified before anything else is read.
"""

import io
import logging
import os
import random
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from itertools import count, takewhile
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from detkit.distributed.collectives import world_size
from detkit.engine.checkpoint import first_mismatch, first_not_finite
from detkit.engine.optimizer import Recipe
from detkit.engine.state_schema import first_invalid_value, optimizer_mismatch
from detkit.engine.step import TrainStep
from detkit.errors import DetkitError, shorten
from detkit.ops.atomic_write import rotated_path, write_atomically
from detkit.ops.files import open_regular
from detkit.ops.memory import free_memory, gib
from detkit.structures import Batch

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1
STATE = "state.pt"
# Contents of the file besides ``schema_version``.
CONTENT = {
    "cfg": dict,
    "recipe": dict,
    "batches": int,  # per epoch
    "ranks": int,  # world size
    "state": dict,
    "model": dict,
    "ema": dict,
    "ema_updates": int,
    "optimizer": dict,
    "scaler": dict,
    "gradients": dict,  # by parameter name, accumulated since the last optimizer step
    "pending": int,
    "health": list,  # NonFiniteMonitor.counts, and its losses_finite
    "rng": dict,
}


@dataclass
class EpochState:
    """Progress of the current epoch.

    Attributes:
        position: of the last batch in the epoch, from 1; see ``Batch.position``.
        batches, images: numbers that this rank was trained on.
        seconds, waited: total time so far, and the time spent waiting for batches.
        losses: loss terms, summed over the batches; () tensors on the device.
        grad_norm: () norm of the latest gradient before clipping; at first that of the previous epoch.
    """

    position: int = 0
    batches: int = 0
    images: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    losses: dict[str, Tensor] = field(default_factory=dict)
    grad_norm: Tensor = field(default_factory=lambda: torch.zeros(()))

    def add(self, batch: Batch, terms: Mapping[str, Tensor], seconds: float) -> None:
        """Add a batch and its loss terms, ``seconds`` after the start of the epoch."""
        self.position, self.seconds = batch.position, seconds
        self.batches += 1
        self.images += len(batch.images)
        self.losses = {name: self.losses.get(name, 0) + term.detach() for name, term in terms.items()}

    def means(self, count: int) -> dict[str, float]:
        """Return the mean loss terms over ``count`` batches (at least 1); this synchronizes with the device."""
        return {name: total.item() / max(count, 1) for name, total in self.losses.items()}


@dataclass
class TrainState:
    """Progress of a run.

    Attributes:
        epoch: number of finished epochs.
        step: number of batches so far.
        best, best_epoch: the best AP and its epoch, from 1.
        current: progress of the current epoch.
        results: metrics of the best and the last epoch, as in ``metrics.json``.
        history: the rows of ``history.csv``.
    """

    epoch: int = 0
    step: int = 0
    best: float = -1.0
    best_epoch: int = 0
    current: EpochState = field(default_factory=EpochState)
    results: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)


def training_state_dict(step: TrainStep, state: TrainState, batches: int) -> dict[str, Any]:
    """Return the contents of ``state.pt``: tensors, numbers, strings, lists and dicts; ``batches`` is per epoch."""
    parameters = step.detector.named_parameters()
    return {
        "schema_version": SCHEMA_VERSION,
        "cfg": step.detector.cfg,
        "recipe": asdict(step.schedule.recipe),
        "batches": batches,
        "ranks": world_size(),
        "state": asdict(state),
        "model": step.detector.state_dict(),
        "ema": step.ema.model.state_dict(),
        "ema_updates": step.ema.updates,
        "optimizer": step.optimizer.state_dict(),
        "scaler": step.scaler.state_dict(),
        "gradients": {name: p.grad for name, p in parameters if step.pending and p.grad is not None},
        "pending": step.pending,
        "health": [*step.health.counts.tolist(), bool(step.health.losses_finite)],
        "rng": rng_state(step.precision.device),
    }


def check_state(content: Mapping[str, Any]) -> None:
    """Check the values returned by ``read_state``, except the tensors, as their shapes depend on the model.

    Raises:
        DetkitError: a value is invalid; names the first.
    """
    if message := first_invalid_value({key: value for key, value in content.items() if key != "file"}):
        raise DetkitError(f"{content.get('file', STATE)} does not fit the run: {message}")


def saved_recipe(content: Mapping[str, Any]) -> Recipe:
    """Return the recipe that the run was started with."""
    return Recipe(**content["recipe"])


def load_training_state(content: Mapping[str, Any], step: TrainStep, batches: int) -> TrainState:
    """Restore a run from ``content``; the inverse of ``training_state_dict``.

    Raises:
        DetkitError: the state belongs to another model, optimizer or training set, or holds invalid values.
    """
    check_state(content)
    file = content.get("file", STATE)
    if content["batches"] != batches:
        raise DetkitError(
            f"{file} was saved with {content['batches']} batches per epoch, but the training set now makes {batches}: "
            "use the training set that the run was started with"
        )
    try:
        _check_tensors(content, step, file)
        return _restore(content, step)
    except DetkitError:
        raise
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError, RuntimeError) as error:
        reason = shorten((str(error) or type(error).__name__).splitlines()[0])
        raise DetkitError(f"{file} does not fit the run: {reason}") from None


def _check_tensors(content: Mapping[str, Any], step: TrainStep, file: str | Path) -> None:
    """Check the tensors of a training state against the model and the optimizer.

    Raises:
        DetkitError: a tensor is missing, unexpected, of another shape or not finite.
    """
    expected = step.detector.state_dict()
    gradients = {name: p for name, p in step.detector.named_parameters() if name in content["gradients"]}
    for name, tensors in (("model", expected), ("ema", expected), ("gradients", gradients)):
        if mismatch := first_mismatch(tensors, content[name]):
            raise DetkitError(f"{file} does not fit the run's model: of its '{name}', {mismatch}")
    for name in ("model", "ema"):
        if invalid := first_not_finite(content[name]):
            raise DetkitError(f"{file}: of its '{name}', '{invalid}' holds NaN or infinity")
    if mismatch := optimizer_mismatch(content["optimizer"], step.optimizer):
        raise DetkitError(f"{file} does not fit the run's optimizer: {mismatch}")


def _restore(content: Mapping[str, Any], step: TrainStep) -> TrainState:
    """Load a checked training state into ``step`` and the random generators; return the progress of the run."""
    device = step.precision.device
    parameters = dict(step.detector.named_parameters())
    step.detector.load_state_dict(content["model"])
    step.ema.model.load_state_dict(content["ema"])
    step.ema.updates = content["ema_updates"]
    groups = step.optimizer.state_dict()["param_groups"]  # set by recipe and schedule
    step.optimizer.load_state_dict({"state": content["optimizer"]["state"], "param_groups": groups})
    if content["scaler"] and step.scaler.is_enabled():
        step.scaler.load_state_dict(content["scaler"])
    for name, gradient in content["gradients"].items():
        parameters[name].grad = gradient.to(device)
    step.pending = content["pending"]
    *counts, losses_finite = content["health"]
    step.health.counts.copy_(torch.tensor(counts))
    step.health.losses_finite.fill_(losses_finite)
    set_rng_state(content["rng"], device)
    state = TrainState(**content["state"])
    state.current = EpochState(**content["state"]["current"])
    state.current.images = state.current.images * content["ranks"] // world_size()  # per rank
    step.grad_norm = state.current.grad_norm = state.current.grad_norm.to(device)
    state.current.losses = {name: total.to(device) for name, total in state.current.losses.items()}
    return state


def write_state(run_dir: Path, content: Mapping[str, Any], keep: int) -> None:
    """Write ``state.pt``; the previous one becomes ``state-1.pt`` and so on, up to ``keep`` files.

    Raises:
        OSError: the file cannot be written; existing files are unchanged.
    """
    data = io.BytesIO()
    torch.save(dict(content), data)
    write_atomically(run_dir / STATE, data.getbuffer(), keep)


def read_state(run_dir: Path, *, warn: bool = True) -> dict[str, Any] | None:
    """Return the contents of the newest undamaged ``state.pt`` or ``state-N.pt`` on the CPU; None if nothing is saved.

    Args:
        run_dir: run directory.
        warn: log a warning about each damaged file.

    Returns:
        the contents, with the path of the file as ``file``.

    Raises:
        DetkitError: all files are damaged, or the newest undamaged one has an unknown schema version or lacks a key.
    """
    older = takewhile(Path.exists, (rotated_path(run_dir / STATE, age) for age in count(1)))
    files = [path for path in (run_dir / STATE, *older) if path.exists()]  # between two renames, state.pt is missing
    for path in files:
        try:
            content = _load(path)
        except DetkitError as error:
            if warn:
                logger.warning("%s", error)
            continue
        _check_content(content, path)
        return {**content, "file": path}
    if files:
        raise DetkitError(
            f"nothing saved in {run_dir} is undamaged: start a new run, for instance with weights=.../last.safetensors"
        )
    return None


def _load(path: Path) -> Any:
    """Return the contents of a file.

    Raises:
        DetkitError: the file is damaged or cannot be read.
    """
    try:
        with open_regular(path) as file:
            size, free = os.fstat(file.fileno()).st_size, free_memory()
            if size > free:
                raise DetkitError(f"{path} holds {gib(size)}, more than the {gib(free)} of free memory")
            with zipfile.ZipFile(file) as archive:
                members = archive.infolist()
                # torch does not compress its archives: this may be a zip bomb
                if any(member.compress_type != zipfile.ZIP_STORED for member in members):
                    raise DetkitError(f"{path} is damaged, or was not written by detkit: it is compressed")
                if sum(m.file_size for m in members) > size:
                    raise DetkitError(f"{path} is damaged: its members are larger than the file")
                corrupt = archive.testzip()
            if corrupt is not None:
                raise DetkitError(f"{path} is damaged: the checksum of {shorten(corrupt)} is wrong")
            file.seek(0)
            return torch.load(file, map_location="cpu", weights_only=True)
    except DetkitError:
        raise
    except OSError as error:
        raise DetkitError(f"{path} cannot be read: {error.strerror or error}") from None
    except Exception as error:  # of any kind, from torch or zipfile
        lines = str(error).partition(". ")[0].splitlines() or [type(error).__name__]
        raise DetkitError(f"{path} is truncated or damaged ({shorten(lines[0])})") from None


def _check_content(content: Any, path: Path) -> None:
    version = content.get("schema_version") if isinstance(content, dict) else None
    if type(version) is not int or version != SCHEMA_VERSION:
        raise DetkitError(
            f"{path} has schema version {shorten(version, 50)}, but this version of detkit reads {SCHEMA_VERSION}: "
            "use a matching version"
        )
    for key, kind in CONTENT.items():
        if not isinstance(content.get(key), kind):
            raise DetkitError(f"{path} cannot be resumed from: it has no '{key}'")


def rng_state(device: torch.device) -> dict[str, Any]:
    """Return the states of the random generators: Python, NumPy, and torch on the CPU and the device."""
    name, keys, *rest = cast("tuple[Any, ...]", np.random.get_state(legacy=True))  # a dict without legacy
    states = {
        "python": random.getstate(),
        "numpy": [name, keys.tolist(), *rest],
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_rng_state(states: Mapping[str, Any], device: torch.device) -> None:
    """Restore the random generators from ``rng_state``."""
    random.setstate(states["python"])
    np.random.set_state(tuple(states["numpy"]))
    torch.set_rng_state(states["torch"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
