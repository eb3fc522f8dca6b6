"""Runs that torchrun or SLURM start again, for real where that can be, and the ready files for clusters."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import yaml
from safetensors.torch import load_file

from detkit.config import check_values, compose_config, group_options, resolve
from detkit.distributed import rendezvous

ROOT = Path(__file__).parents[1]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
PLUGIN = """
import os
from pathlib import Path
import time
from detkit.engine.run_log import RunLog
from detkit.engine.step import TrainStep
original = TrainStep.__call__
def call(self, batch, step, epoch):
    for death in os.environ.get("DEATHS", "").split():
        rank, at, signum = death.split(":")
        if os.environ["RANK"] == rank and step == int(at) and not Path(death).exists():
            Path(death).touch()
            os.kill(os.getpid(), int(signum))
    return original(self, batch, step, epoch)
TrainStep.__call__ = call
if os.environ.get("SLURM_PROCID") == "0":
    RunLog.close = lambda self, finished: time.sleep(3)
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


@pytest.mark.slow
def test_one_agent_restarts_its_ranks(whole_run, training, tmp_path):
    """Rank 1 dies within the first epoch, and rank 0, asked by SIGTERM to save, cannot agree with it; nobody named a
    run directory."""
    command = [*TORCHRUN, "--nproc-per-node=2", "--max-restarts=1", *training]
    assert start(tmp_path, command, DEATHS="1:3:9 0:3:15").wait(120) == 0, (tmp_path / "log").read_text()
    (run_dir,) = (tmp_path / "runs" / "train").iterdir()
    assert_same_weights(run_dir, whole_run)
    assert "resuming after 0 of 2 epochs and 3 batches of the next" in (tmp_path / "log").read_text()


@pytest.mark.slow
def test_two_agents_restart_their_ranks(whole_run, training, tmp_path):
    """Rank 0 dies within the second epoch, with a run directory that the command names."""
    with contextlib.closing(socket.socket()) as free:
        free.bind(("localhost", 0))
        endpoint = f"localhost:{free.getsockname()[1]}"
    nodes = ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}", "--rdzv-id=job"]
    command = [*TORCHRUN, *nodes, "--max-restarts=1", *training, "run_dir=run"]
    agents = [start(tmp_path, command, DEATHS="0:8:9") for _ in range(2)]
    assert [agent.wait(120) for agent in agents] == [0, 0], (tmp_path / "log").read_text()
    assert_same_weights(tmp_path / "run", whole_run)
    assert "resuming after 1 of 2 epochs and 2 batches of the next" in (tmp_path / "log").read_text()


def test_ranks_of_a_start_find_one_another_in_an_old_store():
    """Names that processes of an earlier start left lead nowhere."""
    store = dist.HashStore()
    for rank in range(3):
        store.set(f"detkit rank {rank}", "old")
    with ThreadPoolExecutor() as pool:
        places = [rendezvous.RankInfo(3, rank, rank) for rank in range(3)]
        names = list(pool.map(lambda place: rendezvous._start_id(store, place, 10), places))
    assert len(set(names)) == 1
    with pytest.raises(dist.DistError, match="rank 1 did not join within"):
        rendezvous._start_id(store, places[0], 0.1)


SRUN = """#!/bin/bash
echo "$@" >> calls
exit $STATUS
"""


def write_commands(folder: Path, srun: str) -> None:
    """Write stand-ins for srun and scontrol; the latter leaves a line in the file ``calls``."""
    for name, text in (("srun", srun), ("scontrol", '#!/bin/bash\necho scontrol "$@" >> calls\n')):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)


@pytest.mark.parametrize(("status", "requeued", "exits"), [(0, False, 0), (138, True, 0), (143, False, 143)])
def test_the_slurm_script_queues_itself_again(tmp_path, status, requeued, exits):
    write_commands(tmp_path, SRUN)
    path = os.pathsep.join((str(tmp_path), os.environ["PATH"]))
    environment = os.environ | {"PATH": path, "STATUS": str(status), "SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "4"}
    command = ["bash", str(ROOT / "configs" / "cluster" / "slurm.sh"), "model=yolov8s", "data.root=a b"]
    assert subprocess.run(command, cwd=tmp_path, env=environment).returncode == exits
    calls = (tmp_path / "calls").read_text().splitlines()
    script = "python tools/train.py run_dir=runs/train/slurm_7 resume=auto model=yolov8s data.root=a b"
    assert calls[0] == f"--cpus-per-task=4 --kill-on-bad-exit=1 {script}"
    assert calls[1:] == ["scontrol requeue 7"] * requeued


SRUN_OF_TWO = f"""#!{sys.executable}
import os, subprocess, sys, time
ranks = []
for rank in ("0", "1"):
    variables = {{"SLURM_PROCID": rank, "SLURM_LOCALID": rank, "SLURM_STEP_NUM_TASKS": "2"}}
    ranks.append(subprocess.Popen(sys.argv[3:], env=os.environ | variables))
while all(rank.poll() is None for rank in ranks):
    time.sleep(0.01)
for rank in ranks:
    rank.terminate()
sys.exit(max(code if code >= 0 else 128 - code for code in [rank.wait() for rank in ranks]))
"""


@pytest.mark.slow
def test_slow_loggers_do_not_keep_the_slurm_script_from_queueing(training, tmp_path):
    """Rank 1 ends first after SIGUSR1, and srun --kill-on-bad-exit sends SIGTERM to rank 0, which closes loggers."""
    path = os.pathsep.join((str(tmp_path), str(Path(sys.executable).parent), os.environ["PATH"]))
    write_commands(tmp_path, SRUN_OF_TWO)
    (tmp_path / "tools").symlink_to(ROOT / "tools")
    with contextlib.closing(socket.socket()) as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    slurm = {"PATH": path, "SLURM_JOB_ID": "7", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    command = ["bash", str(ROOT / "configs" / "cluster" / "slurm.sh"), *training[1:]]
    status = start(tmp_path, command, DEATHS=f"1:3:{signal.SIGUSR1:d}", **slurm).wait(120)
    assert status == 0, (tmp_path / "log").read_text()
    assert (tmp_path / "calls").read_text() == "scontrol requeue 7\n"
    assert (tmp_path / "runs" / "train" / "slurm_7" / "state.pt").exists()


def test_the_kubernetes_job_starts_a_training_that_exists():
    """Its arguments compose, and no choice of a training is called like its folder."""
    spec = yaml.safe_load((ROOT / "configs" / "cluster" / "pytorchjob.yml").read_text())["spec"]
    worker, elastic = spec["pytorchReplicaSpecs"]["Worker"], spec["elasticPolicy"]
    (container,) = worker["template"]["spec"]["containers"]
    launcher, tool, *arguments = container["command"]
    assert (launcher, tool, container["name"]) == ("torchrun", "tools/train.py", "pytorch")
    cfg = resolve(compose_config("train", arguments))
    check_values(cfg)
    assert worker["replicas"] == elastic["minReplicas"] == elastic["maxReplicas"]
    assert cfg["batch_size"] % (worker["replicas"] * int(spec["nprocPerNode"])) == 0
    assert group_options("cluster") == []
    group = worker["template"]["spec"]["securityContext"]["fsGroup"]
    assert f"useradd --uid {group} " in (ROOT / "Dockerfile").read_text()
