"""The command line: Hydra composes a configuration, a task runs it, a user's mistake is one sentence."""

import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from detkit.errors import DetkitError, nearest, printable
from detkit.ops.files import explain_oserror
from detkit.viz.console import guard_output, make_console, setup_logging

if TYPE_CHECKING:
    from omegaconf import DictConfig

# What needs torch or Hydra is imported where it is called: ``detkit help`` waits for neither.

TASKS = {
    "train": "train a detector: detkit train model=yolov8n data=coco data.root=DIR",
    "tune": "search for the best settings with Optuna: detkit tune 'search={optim.lr: {low: 1e-4, high: 1e-2}}'",
    "eval": "COCO metrics of a checkpoint: detkit eval ckpt=FILE",
    "predict": "find objects in pictures: detkit predict ckpt=FILE source=FILE_OR_FOLDER",
    "check": "try a composition on this machine: detkit check model=yolov8n backbone=revcol_tiny",
    "summary": "shapes, parameters and GFLOPs of every module: detkit summary model=yolov8n",
    "check_data": "report on an image set, and what is wrong with it: detkit check_data data=coco data.root=DIR",
    "convert_data": "write a set in another format: detkit convert_data data=coco data.root=DIR format=yolo dst=DIR",
    "import_weights": "another project's checkpoint as one of detkit's: detkit import_weights src=FILE dst=FILE",
    "benchmark": "measure a training step, or a claim: detkit benchmark task=train model=yolov8n",
}


def launch(task: str) -> None:
    """Run a task with the arguments of the command line; exit status 2 on a user's mistake, 1 on a fault."""
    import hydra

    from detkit.config import CONFIG_ERRORS, FLAGS_ERRORS, GROUP_ERROR, as_hydra, config_dir, explain
    from detkit.distributed.process_group import cleanup_distributed, is_peer_failure, peer_user_error
    from detkit.tasks.sweep import finish_sweep, in_sweep, run_job

    guard_output()
    try:
        setup_logging()
    except DetkitError as error:
        _exit(str(error))
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # let errors through to here
    run: Callable[[Any], object] = importlib.import_module(f"detkit.tasks.{task}").run

    @hydra.main(version_base="1.3", config_path=str(config_dir()), config_name=task)
    def main(cfg: "DictConfig") -> None:
        if in_sweep():
            return run_job(lambda: _perform(task, run, cfg))
        try:
            _perform(task, run, cfg)
        except DetkitError as error:
            _exit(str(error))
        except Exception as error:
            if peer_user_error():
                sys.exit(2)
            if not is_peer_failure(error):
                raise
            reason = str(error).partition("\n")[0][:200]
            _exit(f"another process of this run has failed or was killed: this one ends, too ({reason})", 1)

    status = None
    try:
        try:
            sys.argv[1:] = as_hydra(sys.argv[1:])
            main()
            cleanup_distributed()
        finally:
            status = finish_sweep()
        if status:
            sys.exit(status)
    except DetkitError as error:  # of the sweep's table
        _exit(str(error))
    except CONFIG_ERRORS as error:
        _exit(explain(error, task, sys.argv[1:]))
    except ValueError as error:
        if not any(start in str(error) for start in (GROUP_ERROR, *FLAGS_ERRORS)):
            raise
        _exit(explain(error, task, sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:  # of a sweep's folder
        if not (sentence := explain_oserror(error)):
            raise
        _exit(sentence)
    except Exception as error:
        if status is None:
            raise
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]  # not a job's: those are recorded
        if "srun" in reason:
            _exit("hydra/launcher=slurm needs SLURM's srun on this machine: use hydra/launcher=parallel or local")
        _exit(f"the sweep ended before its jobs did, by its launcher: {reason}", 1)


def main() -> None:
    """Entry of the ``detkit`` command: ``detkit TASK key=value ...``."""
    guard_output()
    task = sys.argv[1] if len(sys.argv) > 1 else "help"
    if task in ("help", "-h", "--help"):
        width = max(map(len, TASKS))
        print("usage: detkit TASK key=value ...\n")
        print("\n".join(f"  {name:<{width}}  {what}" for name, what in TASKS.items()))
        return
    if task not in TASKS:
        _exit(f"there is no task '{task}': known are {', '.join(TASKS)}{nearest(task, TASKS)}")
    sys.argv[0:2] = [f"{Path(sys.argv[0]).name} {task}"]
    launch(task)


def _perform(task: str, run: Callable[[Any], object], cfg: "DictConfig") -> object:
    """Check a composed configuration and run the task with it; return what it returns.

    Raises:
        DetkitError: a user's mistake; or the system refuses a file.
    """
    from detkit.config import import_plugins, parse_config, resolve
    from detkit.engine.precision import is_out_of_memory
    from detkit.ops.image import set_max_pixels
    from detkit.tasks.sweep import in_sweep, prepare_job

    setup_logging()  # again in the processes of a sweep's launcher
    config = parse_config(resolve(cfg), task)
    set_max_pixels(config.max_pixels)
    import_plugins(config.plugins)
    if in_sweep():
        config = prepare_job(config)
    try:
        return run(config)
    except OSError as error:
        if not (sentence := explain_oserror(error)):
            raise
        raise DetkitError(sentence) from None
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    hints = [f"lower {key}" for key in ("batch_size", "image_size") if hasattr(config, key)]
    hints += ["use device=cpu"] if config.device != "cpu" else []
    raise DetkitError(f"device={config.device} has too little memory for this: {' or '.join(hints) or 'free some'}")


def _exit(sentence: str, status: int = 2) -> None:
    from detkit.distributed.process_group import claim_error_message

    sentence = printable(sentence)
    if claim_error_message(sentence):
        make_console(stderr=True).print(f"error: {sentence}")
    sys.exit(status)
