"""Going on with a run: its own configuration, and what the command line may change in it."""

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
# Where the set lies, which may have moved.
PLACES = ("root", "yaml", "images", "train_images", "train_annotations", "val_images", "val_annotations")
CHANGEABLE = (
    *(f"trainer.{name}" for name in CHANGEABLE_TRAINER),
    *("device", "workers"),
    *(f"data.{name}" for name in PLACES),
)
# Of these the file may differ from what was saved, but the command line sets them for other reasons.
FREE = (
    *(*CHANGEABLE, "run_dir", "resume", "plugins", "max_pixels"),
    *("data.allow_empty", "data.test_images", "data.test_annotations"),  # which a training does not depend on
)


def job_name() -> str:
    """Return the same line at every start of a run by one job of SLURM's or torchrun's: what the command chose."""
    return " ".join([os.environ.get("SLURM_JOB_ID", ""), *_overrides()]).strip()


def restarted_run(cfg: TrainConfig) -> Path | None:
    """Return the folder of the run that this job was in when torchrun restarted its processes, or SLURM requeued it.

    None: this is the first start, or the one before had no folder yet.

    Raises:
        DetkitError: torchrun's other processes do not come.
    """
    told = store_get(job_name(), cfg.trainer.rank_timeout)
    if told is not None:
        return Path(told)
    if os.environ.get("SLURM_RESTART_COUNT", "0") == "0":
        return None
    return named_folder(cfg) or find_run_of_job(Path("runs") / "train", job_name())


@dataclass(frozen=True)
class RunPlan:
    """What a command trains: a new run, or one that goes on.

    Attributes:
        cfg: the configuration, of a run that goes on its own with what the command line may change.
        run_dir: of a run that goes on; None: it has none yet.
        saved: the content of its ``state.pt``; None where nothing is saved, and the run begins anew.
        restarted: the command may have been started before, by ``resume=auto`` or a restart of its processes.
    """

    cfg: TrainConfig
    run_dir: Path | None
    saved: dict[str, Any] | None
    restarted: bool


def resolve_run(cfg: TrainConfig) -> RunPlan:
    """Find out whether a command begins a run or goes on with one, by ``resume`` or as its processes were restarted.

    ``resume=auto`` is the same command once more: the folder is the one it names, and None where that holds no run yet.

    Args:
        cfg: as the command line composed it.

    Raises:
        DetkitError: the run cannot be resumed, or what was changed may not be.
    """
    folder = restarted_run(cfg)
    restarted = cfg.resume == AUTO or folder is not None
    if cfg.resume is None and folder is None:
        return RunPlan(cfg, None, None, restarted)
    same_command = cfg.resume in (None, AUTO)
    run_dir = (folder or named_folder(cfg)) if same_command else Path(str(cfg.resume))
    if run_dir is None and not {"TORCHELASTIC_RUN_ID", "SLURM_JOB_ID"} & os.environ.keys():
        raise DetkitError("resume=auto needs run_dir=DIR, a folder that every start of the run names")
    if run_dir is None or (same_command and not (run_dir / "config.yaml").exists()):
        began = folder is not None and (folder / LOCK).exists()
        return RunPlan(cfg.replace(resume=AUTO), folder if began else None, None, restarted)
    saved = read_state(run_dir)
    if saved is not None:
        check_state(saved)
    own = resumed_config(run_dir, cfg.as_dict(), saved and saved["cfg"], same_command)
    if saved is None:
        logger.info("nothing is saved in %s yet: the run begins anew", run_dir)
    return RunPlan(own, run_dir, saved, restarted)


def resumed_config(
    run_dir: Path, cfg: Mapping[str, Any], saved: Mapping[str, Any] | None, same_command: bool = False
) -> TrainConfig:
    """Return the configuration of ``RUN_DIR/config.yaml``, with what the command line changes.

    Args:
        cfg: as the command line composed it; what it does not name does not count.
        saved: the configuration in ``state.pt``; None where nothing is saved yet.
        same_command: ``cfg`` is all of the run's own, and may differ no more than the command line may change.

    Raises:
        DetkitError: there is no such file, or something else was changed, on the command line or in the file.
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
                continue  # the same reader, named once more
            known = ", ".join(CHANGEABLE)
            raise DetkitError(f"{key} cannot change when a run is resumed: only {known} can, the rest is in {path}")
        *groups, name = key.split(".")
        source, target = cfg, own
        for group in groups:
            source, target = source[group], target[group]
        if name not in target:
            raise DetkitError(f"{key}: the run's data={own['data']['name']} has no such key; see {path}")
        target[name] = source[name]
    if own["plugins"] != cfg["plugins"]:  # never imported on a file's word
        raise DetkitError(f"{run_dir} was trained with plugins={shorten(own['plugins'])}: pass the same")
    config = parse_config(own, TrainConfig)
    if saved is not None and (difference := _difference(own, saved)):
        key, _, then = difference
        raise DetkitError(f"{path} was changed: {key} was {shorten(then)} when the state was saved")
    return config


def _check_same_command(cfg: Mapping[str, Any], own: Mapping[str, Any], path: Path) -> None:
    """Check that a command means the run of ``config.yaml``, whose ``batch_size=auto`` is a number by now.

    Raises:
        DetkitError: names a key in which they differ.
    """
    mine = {**cfg, "batch_size": own["batch_size"]} if cfg["batch_size"] == "auto" else cfg
    if difference := _difference(mine, own):
        key, *values = difference
        now, then = map(shorten, values)
        raise DetkitError(
            f"{path.parent} holds another run: {key} is {then} there, not {now} (resume=auto is for the same command "
            f"once more): name another run_dir, or go on by resume={path.parent}, which takes all from its config.yaml"
        )


def _difference(now: Mapping[str, Any], then: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """Return the first key that differs, and may not, with both values."""
    new, old = flatten(now), flatten(then)
    for key in [*old, *new]:
        if key not in FREE and new.get(key, _ABSENT) != old.get(key, _ABSENT):
            return key, new.get(key), old.get(key)
    return None


def log_progress(state: TrainState, epochs: int) -> None:
    """Log where a resumed run of ``epochs`` goes on."""
    if state.epoch >= epochs:
        logger.info("all %d epochs are done: a larger trainer.epochs would go on", state.epoch)
    else:
        within = f" and {state.current.position} batches of the next" if state.current.position else ""
        logger.info("going on after %d of %d epochs%s", state.epoch, epochs, within)


def typed_keys() -> list[str]:
    """Return the keys and groups that the command line names."""
    return [override.lstrip("+~").partition("=")[0] for override in _overrides()]


def _overrides() -> list[str]:
    return list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []


def _read_config(path: Path, cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Return the checked content of a run's ``config.yaml``.

    Args:
        cfg: has values for those keys of ``trainer`` that an earlier version did not write.

    Raises:
        DetkitError: it cannot be read, or is not the configuration of a run.
    """
    try:
        content = read_yaml(path)
    except OSError as error:
        words = error.strerror or error
        raise DetkitError(f"resume={path.parent} is not a run's folder: {path.name}: {words}") from None
    if not isinstance(content, dict):
        raise DetkitError(f"{path} is not the configuration of a run")
    content = {"max_pixels": cfg["max_pixels"]} | content  # which runs of an earlier version do not have
    for key in cfg:
        if key not in content:
            raise DetkitError(f"{path} has no '{key}': it was written by another version of detkit")
    if isinstance(content["trainer"], dict):
        content["trainer"] = {key: cfg["trainer"][key] for key in CHANGEABLE_TRAINER} | content["trainer"]
    with error_context(path):
        check_values(content)
    return content


_ABSENT = object()
