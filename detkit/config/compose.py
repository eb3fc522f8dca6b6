"""Compose configurations with Hydra, and explain in one sentence why one does not compose."""

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
LONGEST = 1000  # characters of a message that quotes Hydra
FLAGS_ERRORS = {  # Hydra's ValueErrors for conflicting flags, and our messages
    "Only one of --run, --multirun": "-m runs a sweep and --cfg shows one configuration: use only one of them",
    "The --resolve flag": "--resolve needs --cfg job, which shows the configuration",
}
FLAGS_WITH_VALUE = (
    *("--config-dir", "-cd", "--config-name", "-cn", "--config-path", "-cp"),
    *("--cfg", "-c", "--package", "-p", "--info", "-i", "--experimental-rerun"),
)
MAX_NESTING = 50  # of nested brackets, for which Hydra's parser recurses


def config_dir() -> Path:
    """Return the folder of the YAML files: inside the installed package, or next to it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def task_yaml(task: str) -> Path:
    """Return the YAML file of a command: ``configs/TASK.yaml``, or for ``my_tasks/TASK.py`` the one next to it.

    Raises:
        DetkitError: the file does not exist.
    """
    path = Path(task).absolute().with_suffix(".yaml") if task.endswith(".py") else config_dir() / f"{task}.yaml"
    if not path.is_file():
        raise DetkitError(f"{path} does not exist: it must hold the keys of {task}")
    return path


def search_path(task: str) -> list[str]:
    """Return the override that adds ``configs/`` to Hydra's search path, for a command outside of it."""
    if task_yaml(task).parent == config_dir():
        return []
    return [f"hydra.searchpath=[{json.dumps(f'file://{config_dir()}', ensure_ascii=False)}]"]


def compose_config(task: str, overrides: Sequence[str] = ()) -> DictConfig:
    """Compose the configuration of a command with Hydra overrides, as the command line does.

    Raises:
        DetkitError: an override has an unknown key or cannot be parsed.
    """
    try:
        with _hydra(task):
            return compose(task_yaml(task).stem, [*as_hydra(overrides), *search_path(task)])
    except Exception as error:
        if not is_config_error(error):
            raise
        raise DetkitError(explain(error, task, overrides)) from None


def split_flags(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split the arguments of a command line into Hydra's flags, with their values, and the overrides among them."""
    flags: list[str] = []
    overrides: list[str] = []
    for previous, argument in zip(["", *arguments], arguments, strict=False):
        is_flag = argument.startswith("-") or (previous in FLAGS_WITH_VALUE)
        (flags if is_flag else overrides).append(argument)
    return flags, overrides


def as_hydra(overrides: Sequence[str]) -> list[str]:
    """Convert the overrides of the command line to Hydra's syntax.

    Non-ASCII values are quoted. With ``resume=RUN_DIR`` a key of ``data`` is added (``++data.KEY=``), as the default
    data set composed there may lack it; it is checked against the configuration of the run.

    Raises:
        DetkitError: a name or a number is too long for Hydra, or brackets are nested too deeply.
    """
    for override in overrides:
        key, _, value = override.partition("=")
        options = group_options(key) if re.fullmatch(r"\w+", key) else []
        if re.search(r"\d{1000}", value) or (options and any(len(name) > 255 for name in value.split(","))):
            known = f": known are {', '.join(options)}" if options else ""
            raise DetkitError(f"{shorten(override, 100)} is too long{known}")
        if max(accumulate((c in "[{(") - (c in "]})") for c in override), default=0) > MAX_NESTING:
            raise DetkitError(f"{shorten(override, 100)} has more than {MAX_NESTING} nested brackets")
    resumed = any(o.startswith("resume=") and o not in ("resume=auto", "resume=null") for o in overrides)
    quoted = [_quote(override) for override in overrides]
    return [f"++{o}" if resumed and re.match(r"data\.\w+=", o) else o for o in quoted]


def _quote(override: str) -> str:
    """Quote a value with non-ASCII characters, such as a path, which Hydra cannot parse otherwise."""
    key, is_pair, value = override.partition("=")
    if not is_pair or key.startswith("-") or value.isascii() or re.search(r"""[][{}(),='"\\$]""", value):
        return override
    return f'{key}="{value}"'


def group_options(group: str) -> list[str]:
    """Return the names of ``configs/GROUP/*.yaml``, sorted."""
    return sorted(path.stem for path in (config_dir() / group).glob("*.yaml"))


def resolve(cfg: DictConfig) -> dict[str, Any]:
    """Convert a composed configuration to plain dicts and lists, with all interpolations resolved.

    Raises:
        DetkitError: a mandatory value is missing, or an interpolation cannot be resolved.
    """
    try:
        missing = sorted(OmegaConf.missing_keys(cfg))
        if missing:
            raise DetkitError(f"{missing[0]} is not set: add {missing[0]}=VALUE")
        return cast("dict[str, Any]", OmegaConf.to_container(cfg, resolve=True))  # a DictConfig becomes a dict
    except OmegaConfBaseException as error:
        reason = shorten(str(error).splitlines()[0], LONGEST)
        raise DetkitError(f"the configuration does not resolve: {reason}") from None


def flatten(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings to dotted keys, each after ``prefix``; an empty mapping is a value."""
    flat: dict[str, Any] = {}
    for key, value in node.items():
        nested = isinstance(value, Mapping) and value
        flat |= flatten(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return flat


def import_plugins(names: Sequence[str]) -> None:
    """Import the modules of ``plugins=[...]``, which register custom parts.

    Raises:
        DetkitError: a module is not found or raises.
    """
    if names and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    for name in names:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            reason = shorten(str(error))
            raise DetkitError(
                f"plugins: cannot import '{shorten(name)}' ({reason}); is its folder on PYTHONPATH?"
            ) from None
        except Exception as error:  # anything that a user's module may raise
            reason = f"{type(error).__name__}: {shorten(str(error))}"
            raise DetkitError(f"plugins: cannot import '{shorten(name)}': {reason}") from error


def is_config_error(error: BaseException) -> bool:
    """Return whether Hydra or OmegaConf raised an error about the command line's arguments; see ``explain``."""
    if isinstance(error, CONFIG_ERRORS):
        return True
    return isinstance(error, ValueError) and any(start in str(error) for start in (GROUP_ERROR, *FLAGS_ERRORS))


def explain(error: Exception, task: str, overrides: Sequence[str] = ()) -> str:
    """Return one sentence about what is wrong with the ``overrides`` of a command, with the closest known key."""
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
            return f"head={option} has no default loss (loss/{option}.yaml): add loss=NAME, known are {known}"
        return f"{group}={option} does not exist: known are {', '.join(error.options)}{nearest(option, error.options)}"
    if isinstance(error, OverrideParseException):
        argument = shorten(error.override)
        return f"cannot read the argument '{argument}': write key=value, and quote values that contain = or ,"
    if message := next((message for start, message in FLAGS_ERRORS.items() if start in text), None):
        return message
    if GROUP_ERROR in text:
        return _explain_group_value([o for o in overrides if "=" in o and not o.startswith("-")])
    if isinstance(error, MissingMandatoryValue):
        return f"a value is missing: {text.splitlines()[0]}"
    match = re.search(r"Could not (?:override|append to|delete from config\.?)[^']*'([^'@]+)[^']*'", text)
    if isinstance(error, ConfigCompositionException) and match:
        key, keys = match.group(1), _known_keys(task, overrides)
        if key in keys:  # a mapping with an unknown key
            return f"cannot set '{key}': {str(error.__cause__).splitlines()[0]}; prefix it with + to add the key"
        return f"there is no key '{key}'{nearest(key, keys)}"
    cause = error.__cause__ or error
    return f"{text.splitlines()[0]} ({str(cause).splitlines()[0]})" if cause is not error else text.splitlines()[0]


def _explain_group_value(overrides: Sequence[str]) -> str:
    """Return a message about the override that sets a group to a value that is not a string."""
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        key, value = override.key_or_group, override.value()
        if isinstance(value, (bool, int, float, type(None))) and (options := group_options(key)):
            shown = shorten(override.get_value_element_as_str())
            return f"{key}={shown} is not an option: known are {', '.join(options)}"
    return "a group was set to null or a number: use the name of one of its options, such as model=yolov8n"


def _known_keys(task: str, overrides: Sequence[str]) -> list[str]:
    """Return every dotted key of a configuration with the options that ``overrides`` choose, and its groups."""
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
    """Initialize Hydra for a command temporarily, also inside another Hydra application."""
    outer = GlobalHydra.get_state()
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(task_yaml(task).parent), version_base="1.3"):
            yield
    finally:
        GlobalHydra.set_state(outer)
