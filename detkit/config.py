"""Composing a configuration, and saying in one sentence what is wrong with one."""

import contextlib
import importlib
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from detkit.errors import DetkitError, nearest

CONFIG_ERRORS = (HydraException, OmegaConfBaseException)
GROUP_ERROR = "Config group override must be"  # Hydra's bare ValueError for model=null and the like
FLAGS_ERROR = "Only one of --run, --multirun"  # and its own for -m with --cfg


def config_dir() -> Path:
    """Return the folder of the YAML files: inside an installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def compose_config(name: str, overrides: Sequence[str] = ()) -> DictConfig:
    """Compose ``configs/NAME.yaml`` with Hydra override strings, as the command line would.

    Raises:
        DetkitError: an override that does not exist or does not parse.
    """
    try:
        with _hydra():
            return compose(name, list(overrides))
    except CONFIG_ERRORS as error:
        raise DetkitError(explain(error, name, overrides)) from None
    except ValueError as error:
        if GROUP_ERROR not in str(error):
            raise
        raise DetkitError(explain(error, name)) from None


def group_options(group: str) -> list[str]:
    """Return the names of ``configs/GROUP/*.yaml``, sorted."""
    return sorted(path.stem for path in (config_dir() / group).glob("*.yaml"))


def resolve(cfg: DictConfig) -> dict[str, Any]:
    """Turn a composed configuration into plain dicts and lists, every interpolation resolved.

    Raises:
        DetkitError: a mandatory value is missing, or an interpolation leads nowhere.
    """
    try:
        missing = sorted(OmegaConf.missing_keys(cfg))
        if missing:
            raise DetkitError(f"{missing[0]} is not set: add {missing[0]}=VALUE")
        return OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException as error:
        raise DetkitError(f"the configuration does not resolve: {str(error).splitlines()[0]}") from None


def flatten(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return every value of nested mappings by its dotted key, after ``prefix``; an empty mapping is a value."""
    flat: dict[str, Any] = {}
    for key, value in node.items():
        nested = isinstance(value, Mapping) and value
        flat |= flatten(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return flat


def import_plugins(names: Sequence[str]) -> None:
    """Import the modules of ``plugins=[...]``, which register parts of their own.

    Raises:
        DetkitError: a module that cannot be found, or that fails.
    """
    if names and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    for name in names:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise DetkitError(f"plugins: cannot import '{name}' ({error}); is its folder on PYTHONPATH?") from None
        except Exception as error:  # whatever somebody's module does when it is run
            raise DetkitError(f"plugins: cannot import '{name}': {type(error).__name__}: {error}") from error


def explain(error: Exception, name: str, overrides: Sequence[str] = ()) -> str:
    """Say in one sentence what is wrong with the ``overrides`` of ``configs/NAME.yaml``, naming the nearest key."""
    text = str(error)
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        group, _, option = str(error.missing_cfg_file).rpartition("/")
        if group == "hydra/launcher" and option in ("joblib", "submitit_slurm", "submitit_local"):
            plugin = f"hydra-{option.partition('_')[0]}-launcher"
            return f"{group} needs {plugin}, which is not installed: pip install 'detkit[sweeps]'"
        if group == "loss" and not any(override.startswith("loss=") for override in overrides):
            known = ", ".join(error.options)
            return f"head={option} brings no loss of its own (loss/{option}.yaml): add loss=NAME, known are {known}"
        return f"{group}={option} does not exist: known are {', '.join(error.options)}{nearest(option, error.options)}"
    if isinstance(error, OverrideParseException):
        return f"cannot read the argument '{error.override}': write key=value, and quote a value that has = or , in it"
    if FLAGS_ERROR in text:
        return "-m runs a sweep and --cfg shows one configuration: give one of them"
    if GROUP_ERROR in text:
        return "a group was set to null or to a number: give it the name of one of its options, such as model=yolov8n"
    if isinstance(error, MissingMandatoryValue):
        return f"a value is missing: {text.splitlines()[0]}"
    match = re.search(r"Could not (?:override|append to|delete from config\.?)[^']*'([^'@]+)[^']*'", text)
    if isinstance(error, ConfigCompositionException) and match:
        key, known = match.group(1), _known_keys(name, overrides)
        if key in known:  # a mapping with a key too many
            return f"cannot set '{key}': {str(error.__cause__).splitlines()[0]}; + in front would add it"
        return f"there is no key '{key}'{nearest(key, known)}"
    cause = error.__cause__ or error
    return f"{text.splitlines()[0]} ({str(cause).splitlines()[0]})" if cause is not error else text.splitlines()[0]


def check_known(cfg: Mapping[str, Any], name: str) -> None:
    """Check that nothing was added (``+key=``) at the top of a configuration, where nobody would read it.

    Raises:
        DetkitError: names the key and the nearest that exists.
    """
    known = _known_keys(name, ())
    for key in cfg:
        if key not in known:
            raise DetkitError(f"there is no key '{key}'{nearest(key, known)}")


def _known_keys(name: str, overrides: Sequence[str]) -> list[str]:
    """Every dotted key of a configuration with the groups that ``overrides`` choose, and the groups themselves."""
    with _hydra():
        chosen = compose(name, return_hydra_config=True).hydra.runtime.choices
        groups = [group for group in chosen if "/" not in group]
        choices = [
            o for o in overrides for g, _, option in [o.partition("=")] if g in groups and option in group_options(g)
        ]
        cfg = compose(name, choices)
    keys: list[str] = []

    def walk(node: Any, prefix: str) -> None:
        if isinstance(node, dict):
            for key, value in node.items():
                keys.append(f"{prefix}{key}")
                walk(value, f"{prefix}{key}.")

    walk(OmegaConf.to_container(cfg, resolve=False), "")
    return keys + groups


@contextlib.contextmanager
def _hydra() -> Iterator[None]:
    """Hydra over our configs for a moment, also inside another Hydra application."""
    outer = GlobalHydra.get_state()
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            yield
    finally:
        GlobalHydra.set_state(outer)
