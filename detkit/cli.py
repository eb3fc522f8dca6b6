"""The command line: Hydra composes a configuration, a task runs it, and user errors are reported as one sentence."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from detkit.errors import DetkitError, printable
from detkit.ops.files import explain_oserror
from detkit.tasks import find_task, list_tasks
from detkit.viz.console import guard_output, make_console, setup_logging

if TYPE_CHECKING:
    from omegaconf import DictConfig

# Modules that need torch or Hydra are imported inside functions, so that ``detkit help`` is fast.


def main() -> None:
    """Run the ``detkit`` command: ``detkit TASK key=value ...``."""
    guard_output()
    task = sys.argv[1] if len(sys.argv) > 1 else "help"
    if task in ("help", "-h", "--help"):
        tasks = list_tasks()
        width = max(map(len, tasks))
        print("usage: detkit TASK key=value ...\n")
        print("\n".join(f"  {name:<{width}}  {text}" for name, text in tasks.items()))
        return
    sys.argv[0:2] = [f"{Path(sys.argv[0]).name} {task}"]
    launch(task)


def launch(task: str) -> None:
    """Run a task with the command line's arguments; exit with status 2 on a user error, 1 on an internal error.

    Args:
        task: the name of a module in ``detkit/tasks``, or the path of a custom one such as ``my_tasks/count_boxes.py``.
    """
    guard_output()
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra re-raises errors
    sweep_status = None
    try:
        setup_logging()
        find_task(task)
        from detkit.tasks.sweeps.sweep import finish_sweep

        try:
            _run_hydra(task)
        finally:
            sweep_status = finish_sweep()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        _exit_on_user_error(error, task, in_sweep=sweep_status is not None)
        raise
    if sweep_status:
        sys.exit(sweep_status)


def _run_hydra(task: str) -> None:
    """Compose the command line's configuration and run the task, or in a sweep each of its jobs."""
    import hydra

    from detkit.config import as_hydra, search_path, split_flags, task_yaml
    from detkit.distributed.process_group import cleanup_distributed
    from detkit.tasks.sweeps.sweep import in_sweep, run_job

    file = task_yaml(task)

    @hydra.main(version_base="1.3", config_path=str(file.parent), config_name=file.stem)
    def run(cfg: "DictConfig") -> None:
        if in_sweep():
            return run_job(lambda: _run_task(task, cfg))
        try:
            _run_task(task, cfg)
        except Exception as error:
            _exit_on_user_error(error, task)  # inside Hydra, which prints a line of its own on any exception
            raise

    flags, overrides = split_flags(sys.argv[1:])
    sys.argv[1:] = [*flags, *search_path(task), *as_hydra(overrides)]  # argparse takes overrides in one place only
    run()
    cleanup_distributed()


def _run_task(task: str, cfg: "DictConfig") -> object:
    """Validate a composed configuration, run the task with it and return its result.

    Raises:
        DetkitError: a user error, a file that cannot be read or written, or too little device memory.
    """
    from detkit.config import import_plugins, parse_config, resolve
    from detkit.ops.image import set_max_pixels
    from detkit.ops.precision import is_out_of_memory
    from detkit.tasks.sweeps.sweep import in_sweep, prepare_job

    setup_logging()  # needed in the processes of a sweep's launcher
    found = find_task(task)
    config = parse_config(resolve(cfg), found.config)
    set_max_pixels(config.max_pixels)
    import_plugins(config.plugins)
    if in_sweep():
        config = prepare_job(config)
    try:
        return found.run(config)
    except OSError as error:
        if not (message := explain_oserror(error)):
            raise
        raise DetkitError(message) from None
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    hints = [f"lower {key}" for key in ("batch_size", "image_size") if hasattr(config, key)]
    hints += ["use device=cpu"] if config.device != "cpu" else []
    raise DetkitError(f"device={config.device} has too little memory: {' or '.join(hints) or 'free some'}")


def _exit_on_user_error(error: Exception, task: str, in_sweep: bool = False) -> None:
    """Print one sentence and exit, unless the error is a bug in detkit."""
    from detkit.distributed.process_group import claim_error_message

    explained = _explain_error(error, task, in_sweep)
    if explained is None:
        return
    message, status = printable(explained[0]), explained[1]
    if message and claim_error_message(message):
        make_console(stderr=True).print(f"error: {message}")
    sys.exit(status)


def _explain_error(error: Exception, task: str, in_sweep: bool) -> tuple[str, int] | None:
    """Return the message and exit status of an error that is not a bug in detkit, else None."""
    from detkit.config import explain, is_config_error
    from detkit.distributed.process_group import is_peer_failure, peer_user_error
    from detkit.tasks.sweeps.sweep import explain_launcher_error

    if isinstance(error, DetkitError):
        return str(error), 2
    if peer_user_error():
        return "", 2  # printed by the other process
    if is_config_error(error):
        return explain(error, task, sys.argv[1:]), 2
    if isinstance(error, OSError) and (message := explain_oserror(error)):  # from a sweep's folder
        return message, 2
    first_line = str(error).partition("\n")[0][:200]
    if is_peer_failure(error):
        return f"another process of this run failed or was killed, so this one ends too ({first_line})", 1
    return explain_launcher_error(error) if in_sweep else None
