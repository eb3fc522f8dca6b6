"""Composing a configuration, and saying in one sentence why it does not compose."""

import contextlib
import importlib
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, cast

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from detkit.errors import DetkitError, nearest, shorten

CONFIG_ERRORS = (HydraException, OmegaConfBaseException)
GROUP_ERROR = "Config group override must be"  # Hydra's bare ValueError for model=null and the like
LONGEST = 1000  # characters of a sentence that quotes Hydra
FLAGS_ERRORS = {  # and its own for flags that do not go together; what is said of them
    "Only one of --run, --multirun": "-m runs a sweep and --cfg shows one configuration: give one of them",
    "The --resolve flag": "--resolve goes with --cfg job, which shows the configuration",
}
MAX_NESTING = 50  # of brackets within one another: Hydra's grammar calls itself for each


def config_dir() -> Path:
    """Return the folder of the YAML files: inside an installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def task_yaml(task: str) -> Path:
    """Return the YAML file of a command: ``configs/TASK.yaml``, or that beside ``my_tasks/TASK.py``.

    Raises:
        DetkitError: there is none.
    """
    path = Path(task).absolute().with_suffix(".yaml") if task.endswith(".py") else config_dir() / f"{task}.yaml"
    if not path.is_file():
        raise DetkitError(f"{path} does not exist: it holds the keys of {task}")
    return path


def search_path(task: str) -> list[str]:
    """Return the override by which Hydra finds detkit's own options for a command from outside ``configs/``."""
    if task_yaml(task).parent == config_dir():
        return []
    return [f"hydra.searchpath=[{json.dumps(f'file://{config_dir()}', ensure_ascii=False)}]"]


def compose_config(task: str, overrides: Sequence[str] = ()) -> DictConfig:
    """Compose the YAML file of a command with Hydra override strings, as the command line would.

    Raises:
        DetkitError: an override that does not exist or does not parse.
    """
    try:
        with _hydra(task):
            return compose(task_yaml(task).stem, [*as_hydra(overrides), *search_path(task)])
    except Exception as error:
        if not is_config_error(error):
            raise
        raise DetkitError(explain(error, task, overrides)) from None


def as_hydra(overrides: Sequence[str]) -> list[str]:
    """Return override strings as Hydra takes them.

    Values beyond ASCII are quoted. Beside ``resume=RUN_DIR`` a key of ``data`` is added (``++data.KEY=``): what is
    composed there is the default set, which need not have the key; the run's own configuration says what it may be.

    Raises:
        DetkitError: a name or a number so long that Hydra would fail on it, or so many brackets.
    """
    for override in overrides:
        key, _, value = override.partition("=")
        options = group_options(key) if re.fullmatch(r"\w+", key) else []
        if re.search(r"\d{1000}", value) or (options and any(len(word) > 255 for word in value.split(","))):
            known = f": known are {', '.join(options)}" if options else ""
            raise DetkitError(f"{shorten(override, 100)} is too long{known}")
        if max(accumulate((c in "[{(") - (c in "]})") for c in override), default=0) > MAX_NESTING:
            raise DetkitError(f"{shorten(override, 100)} has more than {MAX_NESTING} brackets within one another")
    resumed = any(o.startswith("resume=") and o not in ("resume=auto", "resume=null") for o in overrides)
    quoted = [_quote(override) for override in overrides]
    return [f"++{o}" if resumed and re.match(r"data\.\w+=", o) else o for o in quoted]


def _quote(override: str) -> str:
    """Quote a value with a character beyond ASCII, such as a folder's name may have: Hydra reads those no other way."""
    key, is_pair, value = override.partition("=")
    if not is_pair or key.startswith("-") or value.isascii() or re.search(r"""[][{}(),='"\\$]""", value):
        return override
    return f'{key}="{value}"'


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
        return cast("dict[str, Any]", OmegaConf.to_container(cfg, resolve=True))  # as a DictConfig becomes a dict
    except OmegaConfBaseException as error:
        words = shorten(str(error).splitlines()[0], LONGEST)
        raise DetkitError(f"the configuration does not resolve: {words}") from None


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
            words = f"'{shorten(name)}' ({shorten(str(error))})"
            raise DetkitError(f"plugins: cannot import {words}; is its folder on PYTHONPATH?") from None
        except Exception as error:  # whatever somebody's module does when it is run
            reason = f"{type(error).__name__}: {shorten(str(error))}"
            raise DetkitError(f"plugins: cannot import '{shorten(name)}': {reason}") from error


def is_config_error(error: BaseException) -> bool:
    """Whether an error is Hydra's or OmegaConf's, over the arguments of the command line; see ``explain``."""
    if isinstance(error, ValueError):
        return any(start in str(error) for start in (GROUP_ERROR, *FLAGS_ERRORS))
    return isinstance(error, CONFIG_ERRORS)


def explain(error: Exception, task: str, overrides: Sequence[str] = ()) -> str:
    """Return one sentence on what is wrong with the ``overrides`` of a command, with the nearest key."""
    return shorten(_explain(error, task, overrides), LONGEST)


def _explain(error: Exception, task: str, overrides: Sequence[str]) -> str:
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
        argument = shorten(error.override)
        return f"cannot read the argument '{argument}': write key=value, and quote a value that has = or , in it"
    if message := next((message for start, message in FLAGS_ERRORS.items() if start in text), None):
        return message
    if GROUP_ERROR in text:
        return _no_name([o for o in overrides if "=" in o and not o.startswith("-")])
    if isinstance(error, MissingMandatoryValue):
        return f"a value is missing: {text.splitlines()[0]}"
    match = re.search(r"Could not (?:override|append to|delete from config\.?)[^']*'([^'@]+)[^']*'", text)
    if isinstance(error, ConfigCompositionException) and match:
        key, keys = match.group(1), _known_keys(task, overrides)
        if key in keys:  # a mapping with a key too many
            return f"cannot set '{key}': {str(error.__cause__).splitlines()[0]}; + in front would add it"
        return f"there is no key '{key}'{nearest(key, keys)}"
    cause = error.__cause__ or error
    return f"{text.splitlines()[0]} ({str(cause).splitlines()[0]})" if cause is not error else text.splitlines()[0]


def _no_name(overrides: Sequence[str]) -> str:
    """Say which of the overrides sets a group to what Hydra reads as something else than text."""
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        key, value = override.key_or_group, override.value()
        if isinstance(value, (bool, int, float, type(None))) and (options := group_options(key)):
            shown = shorten(override.get_value_element_as_str())
            return f"{key}={shown} is no name of an option: known are {', '.join(options)}"
    return "a group was set to null or to a number: give it the name of one of its options, such as model=yolov8n"


def _known_keys(task: str, overrides: Sequence[str]) -> list[str]:
    """Every dotted key of a configuration with the groups that ``overrides`` choose, and the groups themselves."""
    name, search = task_yaml(task).stem, search_path(task)
    with _hydra(task):
        chosen = compose(name, search, return_hydra_config=True).hydra.runtime.choices
        groups = [group for group in chosen if "/" not in group]
        choices = [
            o for o in overrides for g, _, option in [o.partition("=")] if g in groups and option in group_options(g)
        ]
        cfg = compose(name, [*choices, *search])
    keys: list[str] = []

    def walk(node: Any, prefix: str) -> None:
        if isinstance(node, dict):
            for key, value in node.items():
                keys.append(f"{prefix}{key}")
                walk(value, f"{prefix}{key}.")

    walk(OmegaConf.to_container(cfg, resolve=False), "")
    return keys + groups


@contextlib.contextmanager
def _hydra(task: str) -> Iterator[None]:
    """Initialise Hydra for a command for a moment, also inside another Hydra application."""
    outer = GlobalHydra.get_state()
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(task_yaml(task).parent), version_base="1.3"):
            yield
    finally:
        GlobalHydra.set_state(outer)
