"""Configurations: composed from ``configs/`` by Hydra (compose.py) and validated against schema.py."""

from detkit.config.check import check_values, parse_config
from detkit.config.compose import (
    as_hydra,
    compose_config,
    config_dir,
    explain,
    flatten,
    group_options,
    import_plugins,
    is_config_error,
    resolve,
    search_path,
    split_flags,
    task_yaml,
)
from detkit.config.fields import is_number, is_whole

__all__ = [
    "as_hydra",
    "check_values",
    "compose_config",
    "config_dir",
    "explain",
    "flatten",
    "group_options",
    "import_plugins",
    "is_config_error",
    "is_number",
    "is_whole",
    "parse_config",
    "resolve",
    "search_path",
    "split_flags",
    "task_yaml",
]
