"""Train a detector: ``detkit train model=yolov8n data=coco data.root=DIR``.

``run`` resolves the configuration, builds data, model and training step, restores their state, and trains.
"""

import errno
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from detkit.config.common import TrainConfig
from detkit.distributed.collectives import world_size
from detkit.distributed.process_group import init_distributed, is_main_process, rank, run_on_main
from detkit.distributed.rendezvous import store_set
from detkit.engine.auto_batch import explain_out_of_memory
from detkit.engine.loggers import check_loggers
from detkit.engine.saver import Saver
from detkit.engine.signals import ignore_hangup
from detkit.engine.state import STATE, TrainState, read_state
from detkit.engine.trainer import Trainer, early_stopping
from detkit.errors import DetkitError
from detkit.ops.atomic_write import write_atomically
from detkit.ops.image import set_max_pixels
from detkit.ops.precision import is_out_of_memory
from detkit.tasks.runs.build_training import Training, build_training
from detkit.tasks.runs.data import val_loader
from detkit.tasks.runs.resume import RunPlan, job_name, resolve_run
from detkit.tasks.runs.run_dir import make_run_dir, model_name
from detkit.tasks.runs.run_lock import RELEASE, run_lock
from detkit.tasks.runs.run_logging import log_start, open_log
from detkit.viz.console import make_console
from detkit.viz.tables import print_metrics

logger = logging.getLogger(__name__)


@ignore_hangup()  # training continues if the terminal is closed
def run(cfg: TrainConfig, stop_early: Callable[[TrainState], str | None] = lambda _state: None) -> dict[str, Any]:
    """Train as ``cfg`` (configs/train.yaml, resolved) specifies; return the best and the last metrics.

    Args:
        cfg: the configuration.
        stop_early: returns a reason to stop early, or None, as in ``Trainer``; in addition to ``trainer.patience``.

    Raises:
        DetkitError: a user error, found before the first step if possible, or a file that cannot be read or written.
        SystemExit: a signal requested the end; the state is saved.
    """
    plan = resolve_run(cfg)
    set_max_pixels(plan.cfg.max_pixels)
    check_loggers(plan.cfg.trainer.loggers)
    device = init_distributed(plan.cfg.device, plan.cfg.trainer.rank_timeout)
    _check_ranks_agree(plan)
    training = build_training(plan, device)
    cfg = training.cfg
    name = model_name(cfg)
    run_dir = plan.run_dir or Path(run_on_main(lambda: str(make_run_dir(cfg, "train", f"{name}_{cfg.data.name}"))))
    log_start(training, name, run_dir)
    with run_lock(run_dir, job_name(), patience=RELEASE if plan.restarted else 0):
        store_set(job_name(), str(run_dir.resolve()))
        run_on_main(lambda: _check_unchanged(run_dir, training.state))
        results = _fit(training, run_dir, stop_early)
    if results is None:
        training.step.optimizer.zero_grad()
        raise DetkitError(explain_out_of_memory(training.trial_step, training.batch_size // world_size(), device))
    best = results["best"]
    if is_main_process():
        print_metrics(best, make_console())
    logger.info("best epoch %d: AP %.4f, AP50 %.4f", best["epoch"], best["AP"], best["AP50"])
    logger.info("weights, metrics and plots: %s", run_dir)
    return results


def _fit(training: Training, run_dir: Path, stop_early: Callable[[TrainState], str | None]) -> dict[str, Any] | None:
    """Train, starting from ``training.state``; return None if the device has too little memory.

    Raises:
        DetkitError: a file cannot be written: the disk is full, say.
    """
    cfg, step, state = training.cfg, training.step, training.state
    patience = early_stopping(cfg.trainer.patience)
    try:
        if is_main_process():
            write_atomically(run_dir / "config.yaml", yaml.safe_dump(cfg.as_dict(), sort_keys=False).encode())
        val_batches = val_loader(
            training.val_set,
            training.batch_size,
            cfg.image_size,
            step.precision.device,
            rect=cfg.rect,
            workers=cfg.workers,
            timeout=cfg.trainer.loader_timeout,
        )
        with open_log(cfg, step, training.train_set, run_dir, state) as log:
            trainer = Trainer(
                step,
                training.train_loader,
                val_batches,
                training.val_set,
                state=state,
                log=log,
                saver=Saver(run_dir, cfg.trainer.keep_last),
                options=cfg.trainer,
                stop_early=lambda state: patience(state) or stop_early(state),
            )
            return trainer.fit()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return None  # not the error, whose traceback keeps tensors alive
    except OSError as error:
        if error.errno is None:
            raise  # not raised by the system
        first = "make room there, then " if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        hint = f"; {first}continue with resume={run_dir}" if (run_dir / STATE).exists() else ""
        raise DetkitError(f"{error.filename or run_dir}: {error.strerror}{hint}") from None


def _check_ranks_agree(plan: RunPlan) -> None:
    """Check that all ranks found the same run, saved at the same step.

    Raises:
        DetkitError: they did not; raised on the ranks that differ from rank 0.
    """
    local = (plan.run_dir is not None, plan.saved["state"]["step"] if plan.saved else 0)
    main = run_on_main(lambda: local)
    if local != main:
        difference = f"rank {rank()} finds {_describe(*local)}, rank 0 finds {_describe(*main)}"
        raise DetkitError(f"the nodes see different contents of the run directory ({difference}): try again later")


def _describe(exists: bool, step: int) -> str:
    return f"a run saved after {step} batches" if exists else "no run"


def _check_unchanged(run_dir: Path, state: TrainState) -> None:
    """Check, once the run is locked, that the state that was read is still the latest one.

    Raises:
        DetkitError: another process has resumed the run in the meantime.
    """
    saved = read_state(run_dir, warn=False)
    step = saved["state"]["step"] if saved else 0
    if step != state.step:
        raise DetkitError(
            f"{run_dir} was at {state.step} batches when it was read, and is at {step} now: another process resumed "
            "it; start again"
        )
