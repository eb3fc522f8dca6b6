"""The commands: one module each, with a function ``run`` that takes the command's configuration.

The first line of a module's docstring is its help text. The argument of ``run`` is annotated with the model of the
configuration, whose values are in ``configs/NAME.yaml``.
"""

import ast
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from detkit.errors import DetkitError, nearest

if TYPE_CHECKING:
    from detkit.config.common import CommonConfig


@dataclass(frozen=True)
class Task:
    """A command.

    Attributes:
        run: the function to call with the configuration.
        config: the model of the configuration.
    """

    run: Callable[[Any], object]
    config: "type[CommonConfig]"


def list_tasks() -> dict[str, str]:
    """Return the names of detkit's commands and their help texts, without importing them."""
    files = sorted(Path(__file__).parent.glob("[!_]*.py"))
    docstrings = {file.stem: ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "" for file in files}
    return {name: text.partition("\n")[0].replace("`", "").rstrip(".") for name, text in docstrings.items()}


def find_task(name: str) -> Task:
    """Import a command by its name, or a custom one by the path of its file, such as ``my_tasks/count_boxes.py``.

    Raises:
        DetkitError: the command does not exist, or the file does not define one.
    """
    if not name.endswith(".py"):
        if not (name.isidentifier() and (Path(__file__).parent / f"{name}.py").is_file()):
            known = list_tasks()
            raise DetkitError(f"there is no task '{name}': known are {', '.join(known)}{nearest(name, known)}")
        module = importlib.import_module(f"detkit.tasks.{name}")
    else:
        module = _import_file(Path(name).absolute())
    run = getattr(module, "run", None)
    if not callable(run):
        raise DetkitError(f"{name} has no function run(cfg)")
    return Task(run, _config_model(name, run))


def load_config(task: str, overrides: Sequence[str] = ()) -> Any:
    """Compose a command's configuration as the command line does; return it as a model such as ``TrainConfig``.

    Raises:
        DetkitError: an unknown key or an invalid value.
    """
    from detkit.config import compose_config, parse_config, resolve

    model = find_task(task).config
    return parse_config(resolve(compose_config(task, overrides)), model)


def _import_file(path: Path) -> ModuleType:
    """Import a Python file as a top-level module, with its folder on the module search path like a script's.

    Raises:
        DetkitError: the file does not exist, its name is that of another module, or its import fails.
    """
    loaded = sys.modules.get(path.stem)
    if loaded is not None and getattr(loaded, "__file__", None) == str(path):
        return loaded
    if not path.is_file():
        raise DetkitError(f"{path} does not exist")
    if loaded is not None:
        raise DetkitError(f"{path}: a module named {path.stem} is already imported; rename the file")
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None  # as its name ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # anything that a user's module may raise
        del sys.modules[path.stem]
        raise DetkitError(f"cannot import {path}: {type(error).__name__}: {error}") from error
    return module


def _config_model(name: str, run: Callable[[Any], object]) -> "type[CommonConfig]":
    """Return the annotation of the first argument of ``run``.

    Raises:
        DetkitError: it is not a subclass of ``CommonConfig``.
    """
    from detkit.config.common import CommonConfig

    model = None
    with suppress(NameError, TypeError, ValueError):  # an annotation that cannot be evaluated
        model = next((p.annotation for p in inspect.signature(run, eval_str=True).parameters.values()), None)
    if not (isinstance(model, type) and issubclass(model, CommonConfig)):
        raise DetkitError(f"{name}: the argument of run must be annotated with a subclass of CommonConfig")
    return model
