"""Configurations: composed of ``configs/`` by Hydra (compose.py), and what their keys may be (schema.py)."""

from collections.abc import Sequence
from typing import Any

from detkit.config.check import check_values, parse_config
from detkit.config.compose import (
    CONFIG_ERRORS,
    FLAGS_ERRORS,
    GROUP_ERROR,
    as_hydra,
    compose_config,
    config_dir,
    explain,
    flatten,
    group_options,
    import_plugins,
    resolve,
)
from detkit.config.fields import is_number, is_whole

__all__ = [
    "CONFIG_ERRORS",
    "FLAGS_ERRORS",
    "GROUP_ERROR",
    "as_hydra",
    "check_values",
    "compose_config",
    "config_dir",
    "explain",
    "flatten",
    "group_options",
    "import_plugins",
    "is_number",
    "is_whole",
    "load_config",
    "parse_config",
    "resolve",
]


def load_config(task: str, overrides: Sequence[str] = ()) -> Any:
    """Return the configuration of a task as the command line would compose it, as a model such as ``TrainConfig``.

    Raises:
        DetkitError: a key that does not exist, or a value that is not allowed.
    """
    return parse_config(resolve(compose_config(task, overrides)), task)
