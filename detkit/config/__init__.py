"""Configurations: composed of ``configs/`` by Hydra (compose.py), and what their keys may be (schema.py)."""

from detkit.config.check import check_values
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
    "resolve",
]
