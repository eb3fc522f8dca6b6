"""Naming and creating run directories."""

import re
import time
from collections.abc import Sequence
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import OmegaConf

from detkit.config.common import CommonConfig, ComposedConfig
from detkit.errors import DetkitError

AUTO = "auto"  # resume=auto: resume the run in run_dir, if there is one


def make_run_dir(cfg: CommonConfig, task: str, name: str) -> Path:
    """Create and return the run directory: ``named_folder``, or a new one under ``runs/TASK`` with the name of the run.

    Args:
        cfg: the configuration of the command.
        task: name of the command.
        name: name of the run, to which the time is appended.

    Raises:
        DetkitError: ``run_dir`` cannot be created or is not empty; hidden files are ignored, as a run that was killed
            at its start leaves them.
    """
    path = named_folder(cfg)
    try:
        if path is None or (cfg.run_dir is None and getattr(cfg, "resume", None) != AUTO):
            return _new_folder(path or Path("runs") / task / f"{name}_{time.strftime('%Y%m%d-%H%M%S')}")
        if path.is_dir() and any(not file.name.startswith(".") for file in path.iterdir()):
            there = f"continue its run with resume={path}" if (path / "config.yaml").exists() else "empty it"
            raise DetkitError(f"run_dir={path} is not empty: name another folder, or {there}")
        path.mkdir(parents=True, exist_ok=True)
        return path
    except OSError as error:
        raise DetkitError(f"cannot create the run directory {error.filename}: {error.strerror}") from None


def named_folder(cfg: CommonConfig) -> Path | None:
    """Return the given run directory: ``run_dir``, or in a sweep that of the job; None if there is none."""
    return sweep_folder() if cfg.run_dir is None else Path(str(cfg.run_dir))


def checkpoint_name(ckpt: object) -> str:
    """Return the names of a checkpoint's run and file, such as ``yolov8n_shapes_20261122-101508_best``."""
    path = Path(str(ckpt)).resolve()
    return f"{path.parent.name}_{path.stem}".strip("_")


def model_name(cfg: ComposedConfig) -> str:
    """Return the names of the model and its replaced parts, such as ``yolov8s_revcol_tiny``."""
    replaced = []
    if HydraConfig.initialized():
        typed = [override.partition("=") for override in HydraConfig.get().overrides.task]
        replaced = [option for group, _, option in typed if group in ("backbone", "neck", "head", "loss")]
    return "_".join((cfg.model.name, *replaced))


def sweep_folder() -> Path | None:
    """Return the folder of a sweep's job, named by its number and swept values; None outside a sweep."""
    if not HydraConfig.initialized() or HydraConfig.get().mode is not RunMode.MULTIRUN:
        return None
    hydra = HydraConfig.get()
    # The folder that Hydra created at the start; hydra.sweep.dir contains the current time.
    sweep = Path(hydra.runtime.output_dir)
    chosen = [override for override in hydra.overrides.task if override.partition("=")[0] in _swept_keys(sweep)]
    return sweep / numbered_name(hydra.job.num, chosen)


def numbered_name(number: int, choices: Sequence[str]) -> str:
    """Return a folder name with a number and the choices, such as ``3_seed-1_backbone-revcol_tiny``."""
    suffix = re.sub(r"[^\w.+-]+", "-", "_".join(choices)).strip("-")[:100]
    return f"{number}_{suffix}"


def _swept_keys(sweep: Path) -> set[str]:
    """Return the keys that a sweep varies, from Hydra's ``multirun.yaml``."""
    hydra = OmegaConf.load(sweep / "multirun.yaml").hydra
    arguments = [*hydra.overrides.task, *(f"{key}={values}" for key, values in (hydra.sweeper.params or {}).items())]
    parsed = OverridesParser.create().parse_overrides(arguments)
    return {override.get_key_element() for override in parsed if override.is_sweep_override()}


def _new_folder(path: Path) -> Path:
    """Create ``path``, or ``path-2``, ``path-3``, ... if it exists."""
    candidate, number = path, 1
    while True:
        try:
            candidate.mkdir(parents=True)
            return candidate
        except FileExistsError:
            number += 1
            candidate = path.with_name(f"{path.name}-{number}")
