"""Sweeps (``-m``): independent jobs on one or more machines, and a table of their results.

Every job writes a record to ``SWEEP/.jobs``, on whichever machine it runs; ``sweep.csv`` lists them all.
"""

import contextlib
import csv
import functools
import io
import json
import logging
import os
import platform
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig

from detkit.config.common import CommonConfig
from detkit.data.loader import worker_count
from detkit.distributed.process_group import claim_error_message, peer_user_error
from detkit.errors import DetkitError
from detkit.ops.atomic_write import write_atomically
from detkit.ops.processes import end_with_parent
from detkit.tasks.runs.run_dir import AUTO, sweep_folder
from detkit.tasks.runs.run_lock import lock_file
from detkit.viz.console import Output, make_console
from detkit.viz.tables import print_rows

logger = logging.getLogger(__name__)

RECORDS = ".jobs"
COLUMNS = ("job", "AP", "AP50", "best_epoch", "epochs", "status", "error", "folder")

_sweep: Path | None = None  # the folder of the sweep that this process started


class SweepStart(Callback):
    """Hydra callback that records the sweep's folder (configs/common.yaml); the jobs may run in other processes."""

    def on_multirun_start(self, config: DictConfig, **_kwargs: Any) -> None:
        """Record and log the folder, and delete the records of an earlier sweep in it."""
        global _sweep
        if not _of_several_ranks():
            _sweep = Path(config.hydra.sweep.dir).resolve()
            for record in (_sweep / RECORDS).glob("*.json"):
                record.unlink()
            logger.info("sweep: %s", _sweep)


def in_sweep() -> bool:
    """Return whether this process runs a sweep's job; False with several ranks, which one failing job ends."""
    swept = HydraConfig.initialized() and HydraConfig.get().mode is RunMode.MULTIRUN
    return swept and not _of_several_ranks()


def run_job(work: Callable[[], object]) -> None:
    """Run a job and record its result; errors end the job, but not the sweep.

    Raises:
        SystemExit: a signal requested the end; it ends the sweep, or the job is requeued.
    """
    folder = _job_folder()
    record: dict[str, Any] = {"job": folder.name, "status": "running", "folder": str(folder)}
    record |= {"host": platform.node(), "pid": os.getpid()}
    _write(folder, record)
    with _output(folder) as print_line:
        try:
            print_line(f"job {folder.name}")
            record |= {"status": "done", **_results(work())}
            print_line(_line(record))
        except DetkitError as error:
            record |= {"status": "mistake", "error": str(error)}
            if claim_error_message(str(error)):
                print_line(f"{folder.name}: error: {error}")
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
            record["status"] = "done" if stop.code in (0, None) else "failed" if code in (1, 2) else "stopped"
            if record["status"] != "done":
                record["error"] = f"exit status {code}"
            if record["status"] == "stopped":
                raise
        except Exception as error:
            if message := peer_user_error():
                record |= {"status": "mistake", "error": message}
                return
            traceback.print_exc()
            record |= {"status": "failed", "error": f"{type(error).__name__}: {error}".partition("\n")[0]}
            print_line(f"{folder.name}: {record['error']}")
        finally:
            _write(folder, record)


def prepare_job(cfg: CommonConfig) -> CommonConfig:
    """Return the configuration of a sweep's job, adapted to its launcher.

    With joblib, a job gets a fraction of the loader processes and one GPU; joblib itself divides torch's threads. With
    submitit, a requeued job resumes the run in its folder.
    """
    jobs = _parallel_jobs()
    if jobs > 1:
        end_with_parent("SIGTERM")  # on which a training run saves its state
    if jobs > 1 and cfg.workers == "auto":
        cfg = cfg.replace(workers=max(worker_count("auto") // jobs, 1))
    gpus = torch.cuda.device_count() if cfg.device in ("auto", "cuda") else 0
    if jobs > 1 and gpus > 1:
        cfg = cfg.replace(device=f"cuda:{_own_slot(jobs) % gpus}")
    if "SUBMITIT_EXECUTOR" in os.environ and getattr(cfg, "resume", "") is None:
        cfg = cfg.replace(resume=AUTO)
    return cfg


def finish_sweep() -> int | None:
    """Print the table of the sweep that this process started, write ``sweep.csv`` and return the exit status.

    The status is 0 if all jobs are done, 2 if all failures are user errors, otherwise 1; None without a sweep.

    Raises:
        DetkitError: ``sweep.csv`` cannot be written.
    """
    global _sweep
    sweep, _sweep = _sweep, None
    if sweep is None or not (sweep / RECORDS).is_dir():
        return None if sweep is None else 0
    files = sorted((sweep / RECORDS).glob("*.json"), key=lambda file: int(file.stem))
    records = [json.loads(file.read_text()) for file in files]
    names = dict.fromkeys(name for record in records for name in record.get("figures", ()))
    figures = [name for name in names if name not in COLUMNS]
    rows = [record.get("figures", {}) | record for record in records]
    text = io.StringIO()
    writer = csv.DictWriter(text, [*COLUMNS, *figures], extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    table = sweep / "sweep.csv"
    undone = [record for record in records if record["status"] != "done"]
    try:
        write_atomically(table, text.getvalue().encode())
    except OSError as error:
        raise DetkitError(f"{table} cannot be written: {error.strerror}") from None
    finally:
        print_rows(rows, [*COLUMNS[:6], *figures], make_console())
        for record in undone:
            logger.warning("%s: %s", record["job"], record.get("error", "did not finish"))
    logger.info("%d of %d jobs are done: %s", len(records) - len(undone), len(records), table)
    return 0 if not undone else 2 if all(record["status"] == "mistake" for record in undone) else 1


def explain_launcher_error(error: Exception) -> tuple[str, int]:
    """Return the message and exit status for an error of a sweep's launcher; those of jobs are recorded."""
    reason = f"{type(error).__name__}: {error}".partition("\n")[0]
    if "srun" in reason:
        return "hydra/launcher=slurm needs SLURM's srun on this machine: use hydra/launcher=parallel or local", 2
    return f"the launcher ended the sweep before its jobs finished: {reason}", 1


def _of_several_ranks() -> bool:
    """Return whether torchrun or srun started this process with others; submitit starts one job per process."""
    ranks = os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_STEP_NUM_TASKS") or "1"
    return ranks != "1" and "SUBMITIT_EXECUTOR" not in os.environ


def _job_folder() -> Path:
    """Return the folder of the current job."""
    folder = sweep_folder()
    assert folder is not None  # called only in jobs of a sweep
    return folder


def _write(folder: Path, record: Mapping[str, Any]) -> None:
    """Write a job's record, on the first rank only."""
    if int(os.environ.get("SLURM_PROCID") or os.environ.get("SUBMITIT_LOCAL_GLOBALID") or 0):
        return
    path = folder.parent / RECORDS / f"{HydraConfig.get().job.num}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(record).encode())


def _results(result: object) -> dict[str, Any]:
    """Return the table columns from the result of a training or evaluation; the numbers in that of another task."""
    if not isinstance(result, Mapping):
        return {}
    best = result.get("best", result)
    if "AP" not in best:
        return {"figures": {str(name): value for name, value in best.items() if isinstance(value, (int, float))}}
    columns = {name: best[name] for name in ("AP", "AP50") if name in best}
    if "last" in result:
        columns |= {"best_epoch": best["epoch"], "epochs": result["last"]["epoch"]}
    return columns


def _line(record: Mapping[str, Any]) -> str:
    figures = "".join(f"  {name} {record[name]:.4f}" for name in ("AP", "AP50") if name in record)
    return f"{record['job']}: done{figures}"


@contextlib.contextmanager
def _output(folder: Path) -> Iterator[Callable[[str], None]]:
    """Redirect a job's output to ``FOLDER.log`` if jobs run in parallel; yield a function to print to the terminal."""
    if _parallel_jobs() == 1:
        yield make_console().print
        return
    terminal = make_console(file=sys.stdout)
    with folder.with_name(f"{folder.name}.log").open("a", buffering=1) as file:
        log = Output(file)
        with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            yield terminal.print


def _parallel_jobs() -> int:
    """Return the number of jobs that joblib runs in parallel; 1 without it."""
    jobs = HydraConfig.get().launcher.get("n_jobs", 1)
    return jobs if jobs > 0 else max((os.cpu_count() or 1) + 1 + jobs, 1)


@functools.cache
def _own_slot(slots: int) -> int:
    """Return a number below ``slots`` that is unique among the sweep's running processes."""
    for slot in range(slots):
        if lock := lock_file(_job_folder().parent / RECORDS / f"slot{slot}"):
            _kept.append(lock)
            return slot
    return 0


_kept: list[FileLock] = []  # held as long as the process lives
