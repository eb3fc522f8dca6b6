"""Going on with a run: its own configuration, and what the command line may change in it."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from hydra.core.hydra_config import HydraConfig
from rich.console import Console

from detkit.checks import check_values
from detkit.engine.state import TrainState, read_state
from detkit.errors import DetkitError

CHANGEABLE_TRAINER = ("epochs", "patience", "max_bad_steps", "save_every", "keep_last", "log_every", "loggers")
CHANGEABLE = (
    *(f"trainer.{name}" for name in CHANGEABLE_TRAINER),
    *("device", "workers", "data.root"),
)
# Of these the file may differ from what was saved, but the command line sets them for other reasons.
FREE = (*CHANGEABLE, "data.yaml", "run_dir", "resume", "plugins")


def resumed_run(
    cfg: Mapping[str, Any], tell: Callable[[str], None]
) -> tuple[Path, dict[str, Any], dict[str, Any] | None]:
    """Return what ``resume=RUN_DIR`` goes on with: the folder, the configuration, and the content of ``state.pt``.

    The content is None where the run ended before anything was saved: then it begins anew.

    Args:
        cfg: as the command line composed it.
        tell: is given sentences about damaged files.

    Raises:
        DetkitError: it cannot be resumed, or what was changed may not be.
    """
    run_dir = Path(str(cfg["resume"]))
    saved = read_state(run_dir, tell)
    own = resumed_config(run_dir, cfg, saved and saved["cfg"])
    if saved is None:
        tell(f"nothing is saved in {run_dir} yet: the run begins anew")
    return run_dir, own, saved


def resumed_config(run_dir: Path, cfg: Mapping[str, Any], saved: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the configuration of ``RUN_DIR/config.yaml``, with what the command line changes.

    Args:
        cfg: as the command line composed it; what it does not name does not count.
        saved: the configuration in ``state.pt``; None where nothing is saved yet.

    Raises:
        DetkitError: there is no such file, or something else was changed, on the command line or in the file.
    """
    path = run_dir / "config.yaml"
    own = _read_config(path)
    for key in cfg:
        if key not in own:
            raise DetkitError(f"{path} has no '{key}': it was written by another version of detkit")
    if isinstance(own["trainer"], dict):  # of an earlier version, some may be missing
        own["trainer"] = {key: cfg["trainer"][key] for key in CHANGEABLE_TRAINER} | own["trainer"]
    for key in typed_keys():
        if key in ("resume", "plugins"):
            continue
        if key not in CHANGEABLE:
            known = ", ".join(CHANGEABLE)
            raise DetkitError(f"{key} cannot change when a run is resumed: only {known} can, the rest is in {path}")
        *groups, name = key.split(".")
        source, target = cfg, own
        for group in groups:
            source, target = source[group], target[group]
        target[name] = source[name]
    if own["plugins"] != cfg["plugins"]:  # never imported on a file's word
        raise DetkitError(f"{run_dir} was trained with plugins={own['plugins']}: pass the same")
    check_values(own)
    if saved is not None:
        now, then = dict(_flat(own)), dict(_flat(saved))
        for key in [*then, *now]:
            if key not in FREE and now.get(key, _ABSENT) != then.get(key, _ABSENT):
                raise DetkitError(f"{path} was changed: {key} was {then.get(key)} when the state was saved")
    return own


def tell_progress(state: TrainState, epochs: int, console: Console) -> None:
    """Print where a resumed run of ``epochs`` goes on."""
    if state.epoch >= epochs:
        console.print(f"all {state.epoch} epochs are done: a larger trainer.epochs would go on")
    else:
        within = f" and {state.current.position} batches of the next" if state.current.position else ""
        console.print(f"going on after {state.epoch} of {epochs} epochs{within}")


def typed_keys() -> list[str]:
    """Return the keys and groups that the command line names."""
    if not HydraConfig.initialized():
        return []
    return [override.lstrip("+~").partition("=")[0] for override in HydraConfig.get().overrides.task]


def _read_config(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise DetkitError(f"resume={path.parent} is not a run's folder: {path.name}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise DetkitError(f"{path} is not YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(content, dict):
        raise DetkitError(f"{path} is not the configuration of a run")
    return content


_ABSENT = object()


def _flat(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every dotted key with its value."""
    for key, value in node.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
