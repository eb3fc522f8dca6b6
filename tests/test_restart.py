"""Runs that are started again by torchrun or SLURM, and the lock that keeps two starts apart."""

import contextlib
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
PLUGIN = """
import os, signal
from pathlib import Path
from detkit.engine.step import TrainStep
original = TrainStep.__call__
def call(self, batch, step, epoch):
    for death in os.environ.get("DEATHS", "").split():
        rank, at = death.split("@")
        if os.environ.get("RANK", "0") == rank and step == int(at) and not Path(death).exists():
            Path(death).touch()
            os.kill(os.getpid(), signal.SIGKILL)
    return original(self, batch, step, epoch)
TrainStep.__call__ = call
"""


def start(folder: Path, command: list[str], **variables: str) -> subprocess.Popen:
    """Start a training with the plugin in ``folder``."""
    folder.mkdir(exist_ok=True)
    (folder / "deaths.py").write_text(PLUGIN)
    path = os.pathsep.join((str(ROOT), str(folder)))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path} | variables
    with open(folder / "log", "a") as log:
        return subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log, text=True)


@pytest.fixture(scope="module")
def training(shapes_root: Path) -> list[str]:
    """A run of 2 epochs of 6 batches."""
    sizes = ["image_size=64", "batch_size=4", "optim.nominal_batch=8", "optim.warmup_min_batches=2"]
    trainer = ["trainer.epochs=2", "trainer.save_every=1", "amp=off", "plugins=[deaths]", "model.width=0.0625"]
    return [str(ROOT / "tools" / "train.py"), f"data.root={shapes_root}", "workers=0", "device=cpu", *sizes, *trainer]


@pytest.fixture(scope="module")
def whole_run(training: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Such a run by two ranks, uninterrupted."""
    folder = tmp_path_factory.mktemp("whole")
    process = start(folder, [*TORCHRUN, "--nproc-per-node=2", *training, "run_dir=run"])
    assert process.wait(120) == 0, (folder / "log").read_text()
    return folder / "run"


def assert_same_weights(run_dir: Path, whole: Path) -> None:
    for name in ("best", "last"):
        mine, theirs = (load_file(path / f"{name}.safetensors") for path in (run_dir, whole))
        assert all(torch.equal(mine[key], theirs[key]) for key in theirs)


def test_one_agent_restarts_its_ranks(whole_run, training, tmp_path):
    """Rank 1 dies in the first epoch, rank 0 in the second; nobody named a run directory."""
    command = [*TORCHRUN, "--nproc-per-node=2", "--max-restarts=2", *training]
    assert start(tmp_path, command, DEATHS="1@3 0@8").wait(120) == 0, (tmp_path / "log").read_text()
    (run_dir,) = (tmp_path / "runs" / "train").iterdir()
    assert_same_weights(run_dir, whole_run)
    log = (tmp_path / "log").read_text()
    assert "going on after 0 of 2 epochs and 3 batches of the next" in log
    assert "going on after 1 of 2 epochs and 2 batches of the next" in log


def test_two_agents_restart_their_ranks(whole_run, training, tmp_path):
    """The rank of one dies, with a run directory that the command names, and so does that of the other."""
    with contextlib.closing(socket.socket()) as free:
        free.bind(("localhost", 0))
        endpoint = f"localhost:{free.getsockname()[1]}"
    nodes = ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}", "--rdzv-id=job"]
    command = [*TORCHRUN, *nodes, "--max-restarts=3", *training, "run_dir=run"]
    agents = [start(tmp_path, command, DEATHS="1@3 0@8") for _ in range(2)]
    assert [agent.wait(120) for agent in agents] == [0, 0], (tmp_path / "log").read_text()
    assert_same_weights(tmp_path / "run", whole_run)


def test_restarts_are_exhausted(training, tmp_path):
    """The run ends with its error."""
    command = [*TORCHRUN, "--nproc-per-node=2", "--max-restarts=1", *training]
    assert start(tmp_path, command, DEATHS="1@1 1@2").wait(60) == 1
    assert "Signal 9 (SIGKILL) received" in (tmp_path / "log").read_text()
