"""Sweeps under each launcher for real: folders, table, failed jobs, a preempted job that is queued again."""

import csv
import errno
import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from detkit.config import explain
from detkit.distributed import process_group, rendezvous
from detkit.ops.atomic_write import write_atomically
from detkit.tasks.sweeps import sweep as sweep_task
from tests.conftest import run_command

TOOL = str(Path(__file__).parents[1] / "tools" / "train.py")
TINY = ["model.width=0.0625", "trainer.epochs=1", "amp=off"]


def rows(file: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(file.read_text().splitlines()))


def command(*arguments: str) -> list[str]:
    """Arguments of a sweep of tiny trainings."""
    return [sys.executable, TOOL, "-m", *arguments, *TINY]


@pytest.mark.slow
def test_joblib_runs_jobs_side_by_side(train_overrides, tmp_path):
    """One of two jobs fails by a mistake: the other ends, it is named, and the status says so."""
    choices = ["backbone.block=c2f,[c2f,c2f]", "hydra/launcher=parallel", f"hydra.sweep.dir={tmp_path}/sweep"]
    done = subprocess.run(command(*train_overrides, *choices), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    ended, failed = rows(tmp_path / "sweep" / "sweep.csv")
    assert (ended["job"], ended["status"]) == ("0_backbone.block-c2f", "done")
    best = json.loads((Path(ended["folder"]) / "metrics.json").read_text())["best"]
    assert float(ended["AP"]) == best["AP"]
    assert "epoch 1/1" in Path(f"{ended['folder']}.log").read_text()
    assert "epoch 1/1" not in done.stdout  # where the jobs' lines would mix
    assert (failed["job"], failed["status"]) == ("1_backbone.block-c2f-c2f", "mistake")
    assert "1_backbone.block-c2f-c2f: backbone.block lists 2 blocks" in done.stdout
    assert "1 of 2 jobs are done" in done.stdout


@pytest.mark.slow
def test_a_preempted_job_is_queued_again_and_goes_on(train_overrides, tmp_path):
    """submitit's local executor: the job gets the signal that SLURM would send, saves, and resumes in its folder."""
    sweep = tmp_path / "sweep"
    choices = ["hydra/launcher=local", f"hydra.sweep.dir={sweep}", "seed=choice(3)"]
    process = subprocess.Popen(
        [*command(*train_overrides, *choices), "trainer.epochs=4"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    history = sweep / "0_seed-3" / "history.csv"
    deadline = time.monotonic() + 100
    while not history.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert history.exists(), process.communicate()[0]
    record = json.loads((sweep / ".jobs" / "0.json").read_text())
    os.kill(record["pid"], signal.SIGUSR2)
    printed, _ = process.communicate(timeout=120)
    log = "".join(file.read_text() for file in sweep.glob(".submitit/*/*_log.*"))
    assert process.returncode == 0, printed + log
    assert "Requeued job" in log
    assert "resuming after" in log
    assert json.loads((sweep / ".jobs" / "0.json").read_text())["pid"] != record["pid"]
    assert [int(row["epoch"]) for row in rows(history)] == [1, 2, 3, 4]
    assert [path.name for path in sweep.glob("[0-9]*")] == ["0_seed-3"]
    assert rows(sweep / "sweep.csv")[0]["epochs"] == "4"


def test_a_fault_of_one_job_leaves_the_others(train_overrides, tmp_path, monkeypatch, capsys):
    from detkit.tasks import train

    def run(cfg):
        if cfg.seed == 0:
            raise RuntimeError("a bug\nand its details")
        return {"best": {"AP": 0.5, "AP50": 0.7, "epoch": 2}, "last": {"epoch": 3}}

    monkeypatch.setattr(train, "run", functools.wraps(train.run)(run))
    sweep = tmp_path / "sweep"
    status, printed, error = run_command(
        monkeypatch, capsys, "train", "-m", *train_overrides, "seed=0,1", f"hydra.sweep.dir={sweep}"
    )
    assert status == 1
    assert "Traceback" in error
    assert "0_seed-0: RuntimeError: a bug" in printed
    assert "1_seed-1: done  AP 0.5000  AP50 0.7000" in printed
    failed, done = rows(sweep / "sweep.csv")
    assert (failed["status"], failed["error"]) == ("failed", "RuntimeError: a bug")
    assert (done["status"], done["AP"], done["best_epoch"], done["epochs"]) == ("done", "0.5", "2", "3")


def test_a_mistake_of_another_rank_is_the_job_s(train_overrides, tmp_path, monkeypatch, capsys):
    """Rank 1 says its sentence and ends; this one, rank 0, sees no more than that the connection is gone."""
    from detkit.tasks import train

    def run(cfg):
        monkeypatch.setattr(rendezvous, "_store", dist.HashStore())
        assert process_group.claim_error_message("a mistake of one")
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(train, "run", functools.wraps(train.run)(run))
    arguments = ["train", "-m", *train_overrides, "seed=0,1", f"hydra.sweep.dir={tmp_path}"]
    status, _, error = run_command(monkeypatch, capsys, *arguments)
    assert (status, error) == (2, "")
    found = [(row["status"], row["error"]) for row in rows(tmp_path / "sweep.csv")]
    assert found == [("mistake", "a mistake of one")] * 2


def test_a_job_that_exits_without_an_error_is_done(train_overrides, tmp_path, monkeypatch, capsys):
    from detkit.tasks import train

    monkeypatch.setattr(train, "run", functools.wraps(train.run)(lambda cfg: sys.exit(cfg.seed)))
    arguments = ["train", "-m", *train_overrides, "seed=0,1", f"hydra.sweep.dir={tmp_path}"]
    assert run_command(monkeypatch, capsys, *arguments)[0] == 1
    found = [(row["status"], row["error"]) for row in rows(tmp_path / "sweep.csv")]
    assert found == [("done", ""), ("failed", "exit status 1")]


def test_a_table_that_cannot_be_written_is_one_message(train_overrides, tmp_path, monkeypatch, capsys):
    from detkit.tasks import train

    def full(path, data):
        if path.name == "sweep.csv":
            raise OSError(errno.ENOSPC, "No space left on device")
        write_atomically(path, data)

    monkeypatch.setattr(train, "run", functools.wraps(train.run)(lambda cfg: None))
    monkeypatch.setattr(sweep_task, "write_atomically", full)
    arguments = ["train", "-m", *train_overrides, "seed=choice(0)", f"hydra.sweep.dir={tmp_path}"]
    status, printed, error = run_command(monkeypatch, capsys, *arguments)
    assert (status, error) == (2, f"error: {tmp_path / 'sweep.csv'} cannot be written: No space left on device\n")
    assert "0_seed-0" in printed
    monkeypatch.setattr(sweep_task, "finish_sweep", lambda: {}["a bug"])
    with pytest.raises(KeyError, match="a bug"):
        run_command(monkeypatch, capsys, *arguments)


def test_a_signal_ends_the_sweep(train_overrides, tmp_path, monkeypatch, capsys):
    from detkit.tasks import train

    monkeypatch.setattr(train, "run", functools.wraps(train.run)(lambda cfg: sys.exit(128 + signal.SIGTERM)))
    arguments = ["train", "-m", *train_overrides, "seed=0,1", f"hydra.sweep.dir={tmp_path}"]
    status, printed, _ = run_command(monkeypatch, capsys, *arguments)
    assert status == 143
    assert "0 of 1 jobs are done" in printed


def test_slurm_without_slurm_is_one_message(train_overrides, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))  # no srun
    arguments = ["train", "-m", *train_overrides, "seed=0,1", "hydra/launcher=slurm", f"hydra.sweep.dir={tmp_path}"]
    status, _, error = run_command(monkeypatch, capsys, *arguments)
    assert status == 2
    assert "hydra/launcher=slurm needs SLURM's srun on this machine: use hydra/launcher=parallel or local" in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("joblib", "needs hydra-joblib-launcher, which is not installed: pip install 'detkit[sweeps]'"),
        ("submitit_slurm", "needs hydra-submitit-launcher, which is not installed: pip install 'detkit[sweeps]'"),
        ("cloud", "hydra/launcher=cloud does not exist: known are basic, local, parallel, slurm"),
    ],
)
def test_a_launcher_that_is_not_installed_is_named(choice, message):
    from hydra.errors import MissingConfigException

    options = ["basic", "local", "parallel", "slurm"]
    error = MissingConfigException("", f"hydra/launcher/{choice}", options)
    assert message in explain(error, "train", [f"hydra/launcher={choice}"])
