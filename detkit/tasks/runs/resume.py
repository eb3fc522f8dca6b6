"""Resuming a run: its saved configuration, and what the command line may change."""

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig

from detkit.config import check_values, flatten, parse_config
from detkit.config.common import TrainConfig
from detkit.distributed.rendezvous import store_get
from detkit.engine.state import TrainState, check_state, read_state
from detkit.errors import DetkitError, error_context, shorten
from detkit.ops.files import read_yaml
from detkit.tasks.runs.run_dir import AUTO, named_folder
from detkit.tasks.runs.run_lock import LOCK, find_run_of_job

logger = logging.getLogger(__name__)

CHANGEABLE_TRAINER = (
    "epochs",
    "patience",
    "max_nonfinite_steps",
    "save_every",
    "keep_last",
    "loader_timeout",
    "log_every",
    "loggers",
    "compile",
)
# The data set may have moved.
PLACES = ("root", "yaml", "images", "train_images", "train_annotations", "val_images", "val_annotations")
CHANGEABLE = (
    *(f"trainer.{name}" for name in CHANGEABLE_TRAINER),
    *("device", "workers"),
    *(f"data.{name}" for name in PLACES),
)
# May differ between config.yaml and the saved state.
FREE = (
    *(*CHANGEABLE, "run_dir", "resume", "plugins", "max_pixels"),
    *("data.allow_empty", "data.test_images", "data.test_annotations"),  # without effect on training
)


def job_name() -> str:
    """Return a name that is the same at every start of a run by one SLURM or torchrun job: its id and overrides."""
    return " ".join([os.environ.get("SLURM_JOB_ID", ""), *_overrides()]).strip()


def restarted_run(cfg: TrainConfig) -> Path | None:
    """Return the run directory of this job before torchrun restarted its processes or SLURM requeued it.

    None on the first start, or if no directory had been created.

    Raises:
        DetkitError: torchrun's other processes do not join in time.
    """
    stored = store_get(job_name(), cfg.trainer.rank_timeout)
    if stored is not None:
        return Path(stored)
    if os.environ.get("SLURM_RESTART_COUNT", "0") == "0":
        return None
    return named_folder(cfg) or find_run_of_job(Path("runs") / "train", job_name())


@dataclass(frozen=True)
class RunPlan:
    """What a command trains: a new run, or a resumed one.

    Attributes:
        cfg: the configuration; for a resumed run its own, with the changes of the command line.
        run_dir: the directory of a resumed run; None if it has none yet.
        saved: the content of ``state.pt``; None if nothing is saved and the run starts from scratch.
        restarted: whether the command may have been started before (``resume=auto``, or a restart of its processes).
    """

    cfg: TrainConfig
    run_dir: Path | None
    saved: dict[str, Any] | None
    restarted: bool


def resolve_run(cfg: TrainConfig) -> RunPlan:
    """Determine whether a command starts a run or resumes one, because of ``resume`` or a restart of its processes.

    ``resume=auto`` repeats the same command: it resumes the run in ``run_dir``, or starts one there.

    Args:
        cfg: as composed by the command line.

    Raises:
        DetkitError: the run cannot be resumed, or a key was changed that must not change.
    """
    folder = restarted_run(cfg)
    restarted = cfg.resume == AUTO or folder is not None
    if cfg.resume is None and folder is None:
        return RunPlan(cfg, None, None, restarted)
    same_command = cfg.resume in (None, AUTO)
    run_dir = (folder or named_folder(cfg)) if same_command else Path(str(cfg.resume))
    if run_dir is None and not {"TORCHELASTIC_RUN_ID", "SLURM_JOB_ID"} & os.environ.keys():
        raise DetkitError("resume=auto needs run_dir=DIR, the same folder at every start of the run")
    if run_dir is None or (same_command and not (run_dir / "config.yaml").exists()):
        started = folder is not None and (folder / LOCK).exists()
        return RunPlan(cfg.replace(resume=AUTO), folder if started else None, None, restarted)
    saved = read_state(run_dir)
    if saved is not None:
        check_state(saved)
    own = resumed_config(run_dir, cfg.as_dict(), saved and saved["cfg"], same_command)
    if saved is None:
        logger.info("nothing is saved in %s yet: the run starts from scratch", run_dir)
    return RunPlan(own, run_dir, saved, restarted)


def resumed_config(
    run_dir: Path, cfg: Mapping[str, Any], saved: Mapping[str, Any] | None, same_command: bool = False
) -> TrainConfig:
    """Return the configuration of ``RUN_DIR/config.yaml``, with the changes of the command line.

    Args:
        run_dir: the run directory.
        cfg: as composed by the command line; only the keys given there count.
        saved: the configuration in ``state.pt``; None if nothing is saved yet.
        same_command: ``cfg`` is the complete configuration of the run, and may differ only in CHANGEABLE keys.

    Raises:
        DetkitError: the file does not exist, or a key was changed that must not change, there or on the command line.
    """
    path = run_dir / "config.yaml"
    own = _read_config(path, cfg)
    if same_command:
        _check_same_command(cfg, own, path)
    for key in typed_keys():
        if key not in CHANGEABLE:
            if same_command or key in ("resume", "plugins"):
                continue
            if key == "data" and cfg["data"]["name"] == own["data"]["name"]:
                continue  # the same reader, given again
            known = ", ".join(CHANGEABLE)
            raise DetkitError(f"{key} cannot change when a run is resumed: only {known} can, the others are in {path}")
        *groups, name = key.split(".")
        source, target = cfg, own
        for group in groups:
            source, target = source[group], target[group]
        if name not in target:
            raise DetkitError(f"{key}: the run's data={own['data']['name']} has no such key; see {path}")
        target[name] = source[name]
    if own["plugins"] != cfg["plugins"]:  # a file never causes imports
        raise DetkitError(f"{run_dir} was trained with plugins={shorten(own['plugins'])}: pass the same")
    config = parse_config(own, TrainConfig)
    if saved is not None and (difference := _difference(own, saved)):
        key, _, then = difference
        raise DetkitError(f"{path} was changed: {key} was {shorten(then)} when the state was saved")
    return config


def _check_same_command(cfg: Mapping[str, Any], own: Mapping[str, Any], path: Path) -> None:
    """Check that a command matches the run of ``config.yaml``, in which ``batch_size=auto`` has become a number.

    Raises:
        DetkitError: names the first key that differs.
    """
    current = {**cfg, "batch_size": own["batch_size"]} if cfg["batch_size"] == "auto" else cfg
    if difference := _difference(current, own):
        key, *values = difference
        now, then = map(shorten, values)
        raise DetkitError(
            f"{path.parent} holds another run: {key} is {then} there, not {now} (resume=auto is for repeating the same "
            f"command): use another run_dir, or resume={path.parent}, which takes all settings from its config.yaml"
        )


def _difference(now: Mapping[str, Any], then: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """Return the first key that differs but must not, with both values."""
    new, old = flatten(now), flatten(then)
    for key in [*old, *new]:
        if key not in FREE and new.get(key, _ABSENT) != old.get(key, _ABSENT):
            return key, new.get(key), old.get(key)
    return None


def log_progress(state: TrainState, epochs: int) -> None:
    """Log the progress of a resumed run of ``epochs``."""
    if state.epoch >= epochs:
        logger.info("all %d epochs are done: increase trainer.epochs to continue", state.epoch)
    else:
        within = f" and {state.current.position} batches of the next" if state.current.position else ""
        logger.info("resuming after %d of %d epochs%s", state.epoch, epochs, within)


def typed_keys() -> list[str]:
    """Return the keys and groups given on the command line."""
    return [override.lstrip("+~").partition("=")[0] for override in _overrides()]


def _overrides() -> list[str]:
    return list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []


def _read_config(path: Path, cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Return the validated content of a run's ``config.yaml``.

    Args:
        path: the file.
        cfg: provides values for keys that an earlier version did not write.

    Raises:
        DetkitError: the file cannot be read, or is not the configuration of a run.
    """
    try:
        content = read_yaml(path)
    except OSError as error:
        reason = error.strerror or error
        raise DetkitError(f"resume={path.parent} is not a run directory: {path.name}: {reason}") from None
    if not isinstance(content, dict):
        raise DetkitError(f"{path} is not the configuration of a run")
    content = {"max_pixels": cfg["max_pixels"]} | content  # missing in runs of earlier versions
    for key in cfg:
        if key not in content:
            raise DetkitError(f"{path} has no '{key}': it was written by another version of detkit")
    if isinstance(content["trainer"], dict):
        content["trainer"] = {key: cfg["trainer"][key] for key in CHANGEABLE_TRAINER} | content["trainer"]
    with error_context(path):
        check_values(content)
    return content


_ABSENT = object()
