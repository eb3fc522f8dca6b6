"""What resuming a run needs: ``state.pt``, written with torch.save and read back with nothing unpickled freely.

The file is a zip archive; the checksums in it are verified before anything else is read.
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
from detkit.engine.state_schema import first_wrong, wrong_memory
from detkit.engine.step import TrainStep
from detkit.errors import DetkitError, shorten
from detkit.ops.atomic_write import rotated_path, write_atomically
from detkit.ops.files import open_regular
from detkit.ops.memory import free_memory, gib
from detkit.structures import Batch

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1
STATE = "state.pt"
# What the file holds, beside ``schema_version``.
CONTENT = {
    "cfg": dict,
    "recipe": dict,
    "batches": int,  # of an epoch
    "ranks": int,  # that trained together
    "state": dict,
    "model": dict,
    "ema": dict,
    "ema_updates": int,
    "optimizer": dict,
    "scaler": dict,
    "gradients": dict,  # by the parameter's name, gathered since the optimizer's last step
    "pending": int,
    "health": list,  # Health.counts, and whether all losses since the optimizer's last step were finite
    "rng": dict,
}


@dataclass
class EpochState:
    """What is done of the epoch under way.

    Attributes:
        position: of the last batch in the epoch's order, from 1; see ``Batch.position``.
        batches, images: learned from, by this rank.
        seconds, waited: spent so far, and of these on waiting for the next batch.
        losses: sums over the batches of the loss terms, () tensors on the device.
        grad_norm: () the latest gradient's, before it was clipped; at the start that of the epoch before.
    """

    position: int = 0
    batches: int = 0
    images: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    losses: dict[str, Tensor] = field(default_factory=dict)
    grad_norm: Tensor = field(default_factory=lambda: torch.zeros(()))

    def add(self, batch: Batch, terms: Mapping[str, Tensor], seconds: float) -> None:
        """Count a batch and its loss terms, ``seconds`` after the epoch began."""
        self.position, self.seconds = batch.position, seconds
        self.batches += 1
        self.images += len(batch.images)
        self.losses = {name: self.losses.get(name, 0) + term.detach() for name, term in terms.items()}

    def means(self, count: int) -> dict[str, float]:
        """Return the mean loss terms over ``count`` batches, 1 at least; this waits for the device."""
        return {name: total.item() / max(count, 1) for name, total in self.losses.items()}


@dataclass
class TrainState:
    """Where a run stands.

    Attributes:
        epoch, step: what is done, in epochs and batches.
        best, best_epoch: the best AP, and when it was.
        current: the epoch under way.
        results: the best and the last epoch's metrics, as in ``metrics.json``.
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
    """Return the content of ``state.pt``: tensors, numbers, strings, lists and dicts.

    Args:
        batches: of an epoch.
    """
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
        "health": [*step.health.counts.tolist(), bool(step.health.fine)],
        "rng": rng_state(step.precision.device),
    }


def check_state(content: Mapping[str, Any]) -> None:
    """Check the values of what ``read_state`` returned, but the tensors, whose shapes depend on the model.

    Raises:
        DetkitError: names the first that no training saves.
    """
    if odd := first_wrong({key: value for key, value in content.items() if key != "file"}):
        raise DetkitError(f"{content.get('file', STATE)} does not fit the run: {odd}")


def saved_recipe(content: Mapping[str, Any]) -> Recipe:
    """Return the recipe that a run began with."""
    return Recipe(**content["recipe"])


def load_training_state(content: Mapping[str, Any], step: TrainStep, batches: int) -> TrainState:
    """Put a run back to where ``content`` was captured; the inverse of ``training_state_dict``.

    Raises:
        DetkitError: it is the state of another model, optimizer or training set, or holds what no training saves.
    """
    check_state(content)
    file = content.get("file", STATE)
    if content["batches"] != batches:
        raise DetkitError(
            f"{file} was saved in epochs of {content['batches']} batches, the training set now makes {batches}: "
            "it is not the one that the run began with"
        )
    device = step.precision.device
    parameters = dict(step.detector.named_parameters())
    own = step.detector.state_dict()
    gradients = {name: p for name, p in parameters.items() if name in content["gradients"]}
    try:
        for name, mine in (("model", own), ("ema", own), ("gradients", gradients)):
            if odd := first_mismatch(mine, content[name]):
                raise DetkitError(f"{file} does not fit the run's model: of its '{name}', {odd}")
        for name in ("model", "ema"):
            if odd := first_not_finite(content[name]):
                raise DetkitError(f"{file}: of its '{name}', '{odd}' holds NaN or infinity")
        if odd := wrong_memory(content["optimizer"], step.optimizer):
            raise DetkitError(f"{file} does not fit the run's optimizer: {odd}")
        step.detector.load_state_dict(content["model"])
        step.ema.model.load_state_dict(content["ema"])
        step.ema.updates = content["ema_updates"]
        groups = step.optimizer.state_dict()["param_groups"]  # their numbers follow from the recipe and the schedule
        step.optimizer.load_state_dict({"state": content["optimizer"]["state"], "param_groups": groups})
        if content["scaler"] and step.scaler.is_enabled():
            step.scaler.load_state_dict(content["scaler"])
        for name, gradient in content["gradients"].items():
            parameters[name].grad = gradient.to(device)
        step.pending = content["pending"]
        *counts, fine = content["health"]
        step.health.counts.copy_(torch.tensor(counts))
        step.health.fine.fill_(fine)
        set_rng_state(content["rng"], device)
        state = TrainState(**content["state"])
        state.current = EpochState(**content["state"]["current"])
        state.current.images = state.current.images * content["ranks"] // world_size()  # each counts its own
        step.grad_norm = state.current.grad_norm = state.current.grad_norm.to(device)
        state.current.losses = {name: total.to(device) for name, total in state.current.losses.items()}
    except DetkitError:
        raise
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError, RuntimeError) as error:
        reason = shorten((str(error) or type(error).__name__).splitlines()[0])
        raise DetkitError(f"{file} does not fit the run: {reason}") from None
    return state


def write_state(run_dir: Path, content: Mapping[str, Any], keep: int) -> None:
    """Write ``state.pt``; the one before becomes ``state-1.pt`` and so on, until there are ``keep``.

    Raises:
        OSError: it cannot be written; what was there is as it was.
    """
    data = io.BytesIO()
    torch.save(dict(content), data)
    write_atomically(run_dir / STATE, data.getbuffer(), keep)


def read_state(run_dir: Path, *, warn: bool = True) -> dict[str, Any] | None:
    """Return the newest undamaged content of ``state.pt`` and those before it, on the CPU; None where nothing is saved.

    Its ``file`` is where it was read.

    Args:
        warn: log a warning about each damaged one.

    Raises:
        DetkitError: all are damaged, or the newest is of a schema this version does not know, or has a key missing.
    """
    older = takewhile(Path.exists, (rotated_path(run_dir / STATE, age) for age in count(1)))
    files = [path for path in (run_dir / STATE, *older) if path.exists()]  # between two renames the first is missing
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
        raise DetkitError(f"nothing saved in {run_dir} is whole: start another run, from its last.safetensors perhaps")
    return None


def _load(path: Path) -> Any:
    """Return what a file holds.

    Raises:
        DetkitError: it is damaged.
    """
    try:
        with open_regular(path) as file:
            size, free = os.fstat(file.fileno()).st_size, free_memory()
            if size > free:
                raise DetkitError(f"{path} holds {gib(size)}, more than the {gib(free)} of free memory")
            with zipfile.ZipFile(file) as archive:
                members = archive.infolist()
                if any(m.compress_type != zipfile.ZIP_STORED for m in members):  # torch stores; others may be bombs
                    raise DetkitError(f"{path} is damaged, or was not written by detkit: it is compressed")
                if sum(m.file_size for m in members) > size:
                    raise DetkitError(f"{path} is damaged: its parts are longer than it is")
                torn = archive.testzip()
            if torn is not None:
                raise DetkitError(f"{path} is damaged: the checksum of {shorten(torn)} is wrong")
            file.seek(0)
            return torch.load(file, map_location="cpu", weights_only=True)
    except DetkitError:
        raise
    except OSError as error:
        raise DetkitError(f"{path} cannot be read: {error.strerror or error}") from None
    except Exception as error:  # whatever torch and zipfile make of a file of somebody's
        lines = str(error).partition(". ")[0].splitlines() or [type(error).__name__]
        raise DetkitError(f"{path} is truncated or damaged ({shorten(lines[0])})") from None


def _check_content(content: Any, path: Path) -> None:
    version = content.get("schema_version") if isinstance(content, dict) else None
    if type(version) is not int or version != SCHEMA_VERSION:
        raise DetkitError(
            f"{path} has schema version {shorten(version, 50)}, this detkit reads {SCHEMA_VERSION}: "
            "use a matching detkit"
        )
    for key, kind in CONTENT.items():
        if not isinstance(content.get(key), kind):
            raise DetkitError(f"{path} cannot be resumed from: it has no '{key}'")


def rng_state(device: torch.device) -> dict[str, Any]:
    """Return the state of every generator of random numbers: Python's, NumPy's, torch's on the CPU and the device."""
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
    """Put the generators back to where they were."""
    random.setstate(states["python"])
    np.random.set_state(tuple(states["numpy"]))
    torch.set_rng_state(states["torch"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
