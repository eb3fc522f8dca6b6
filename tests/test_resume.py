"""Resume: a run that was cut off anywhere ends as if it had not been."""

import csv
import errno
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import detkit
from detkit import cli
from detkit.config import compose_config, resolve
from detkit.data.augment.pipeline import Augmentation, AugmentedDataset
from detkit.data.dataset import DetectionDataset
from detkit.data.formats.shapes import read_shapes
from detkit.data.formats.tar_shards import read_webdataset, write_webdataset
from detkit.data.loader import BatchLoader
from detkit.data.shard_loader import ShardLoader
from detkit.engine import checkpoint, loggers, saver, state
from detkit.engine.optimizer import Recipe, Schedule
from detkit.engine.state import TrainState, load_training_state, read_state, training_state_dict, write_state
from detkit.engine.step import TrainStep
from detkit.errors import DetkitError
from detkit.models.losses.task_aligned import TaskAlignedLoss
from detkit.models.profiling import dummy_batch
from detkit.ops.precision import Precision
from detkit.tasks import load_config, train
from detkit.tasks.runs import build_training, resume
from detkit.tasks.runs import run_lock as lock_module

TOOL = Path(__file__).parents[1] / "tools" / "train.py"
CLOCK = ("images_per_s", "seconds", "data_wait", "memory_gib")
AUGMENT = {
    "mosaic": {"p": 0.5, "close_epochs": 0},
    "affine": {"scale": [0.5, 1.5], "translate": 0.1},
    "transforms": {},
}


@pytest.fixture(scope="module")
def overrides(shapes_root: Path) -> list[str]:
    """A run of 2 epochs of 6 batches, saved after each; two batches make a step, each of a size of its own."""
    sizes = ["image_size=64", "batch_size=4", "optim.nominal_batch=8", "optim.warmup_min_batches=2"]
    trainer = ["trainer.epochs=2", "trainer.save_every=1", "trainer.multi_scale=0.5"]
    return [f"data.root={shapes_root}", "workers=0", "device=cpu", "model.width=0.0625", *sizes, *trainer]


@pytest.fixture(scope="module")
def whole_run(overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Such a run, uninterrupted."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    train.run(load_config("train", [*overrides, f"run_dir={run_dir}"]))
    return run_dir


def go_on(run_dir: Path, *more: str) -> dict:
    """Resume in this process, as ``train resume=RUN_DIR MORE`` does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resume, "typed_keys", lambda: [key.partition("=")[0] for key in more])
        return train.run(load_config("train", [f"resume={run_dir}", *more]))


def history(run_dir: Path) -> list[dict[str, str]]:
    """The rows of ``history.csv`` without what depends on the machine."""
    with open(run_dir / "history.csv") as file:
        return [{k: v for k, v in row.items() if k not in CLOCK} for row in csv.DictReader(file)]


def assert_same_run(run_dir: Path, whole: Path) -> None:
    """Weights bit for bit, EMA and live, the optimizer's memory, and the history; TensorBoard has every epoch once."""
    for name in ("best", "last"):
        mine, theirs = (load_file(path / f"{name}.safetensors") for path in (run_dir, whole))
        assert all(torch.equal(mine[key], theirs[key]) for key in theirs)
    mine, theirs = (torch.load(path / "state.pt", weights_only=True) for path in (run_dir, whole))
    assert all(torch.equal(mine["model"][key], theirs["model"][key]) for key in theirs["model"])
    for index, memory in theirs["optimizer"]["state"].items():
        assert all(torch.equal(mine["optimizer"]["state"][index][key], value) for key, value in memory.items())
    assert history(run_dir) == history(whole)
    events = EventAccumulator(str(run_dir)).Reload()
    assert [event.step for event in events.Scalars("val/AP")] == [6, 12]


@pytest.mark.slow
def test_killed_at_random_moments(whole_run, overrides, tmp_path):
    """SIGKILL, with 0 or 2 loader processes by turns."""
    run_dir, rng = tmp_path / "run", random.Random(time.time_ns())
    arguments = [*overrides, f"run_dir={run_dir}"]
    for turn in range(3):
        process = subprocess.Popen([sys.executable, TOOL, *arguments, f"workers={2 * (turn % 2)}"])
        if turn < 2:
            saved = (run_dir / "state.pt").stat().st_mtime_ns if turn else 0
            while not (run_dir / "state.pt").exists() or (run_dir / "state.pt").stat().st_mtime_ns == saved:
                time.sleep(0.01)
                assert process.poll() is None
            time.sleep(rng.uniform(0, 0.5))
            process.kill()
        assert process.wait(300) in (0, -signal.SIGKILL)
        arguments = [f"resume={run_dir}"]
    assert_same_run(run_dir, whole_run)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGKILL", "SIGSTOP"])
def test_a_lost_loader_process_ends_a_run_that_goes_on(whole_run, overrides, tmp_path, name):
    """One is killed, as the out-of-memory killer does, or stops: saved, one message, the same end."""
    run_dir = tmp_path / "run"
    arguments = [*overrides, f"run_dir={run_dir}", "workers=2", "trainer.loader_timeout=5", "trainer.save_every=2"]
    process = subprocess.Popen([sys.executable, TOOL, *arguments], stderr=subprocess.PIPE, text=True)
    while not (run_dir / "state.pt").exists():
        time.sleep(0.01)
        assert process.poll() is None
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[0]), getattr(signal, name))
    _, error = process.communicate(timeout=300)
    assert (process.returncode, error.count("\n")) == (2, 1), error
    reason = "a data loading process was killed (signal 9" if name == "SIGKILL" else "no batch from the 2"
    assert reason in error
    assert f"continue with resume={run_dir}" in error
    go_on(run_dir)
    assert_same_run(run_dir, whole_run)


@pytest.mark.slow
def test_every_saved_state_leads_to_the_same_end(whole_run, overrides, tmp_path, monkeypatch):
    """The state of a batch, and that of the end of an epoch."""
    run_dir, write = tmp_path / "run", saver.write_state
    saves = []

    def keep(folder: Path, content: dict, keep: int) -> None:
        write(folder, content, keep)
        saves.append(tmp_path / f"save{len(saves)}")
        shutil.copytree(folder, saves[-1])

    monkeypatch.setattr(saver, "write_state", keep)
    train.run(load_config("train", [*overrides, f"run_dir={run_dir}"]))
    monkeypatch.undo()
    assert len(saves) == 12  # 5 batches and the end, twice
    for save in (saves[2], saves[5]):
        go_on(save)
        assert_same_run(save, whole_run)


@pytest.mark.parametrize(("name", "status", "at"), [("SIGTERM", 143, 3), ("SIGUSR1", 138, 12), ("SIGINT", 130, 1)])
def test_a_signal_saves_and_ends(whole_run, overrides, tmp_path, monkeypatch, name, status, at):
    """After batch ``at`` of the run, or in the validation that follows it."""
    step = TrainStep.__call__

    def signalled(self: TrainStep, batch: object, number: int, epoch: int) -> dict:
        if number + 1 == at:
            os.kill(os.getpid(), getattr(signal, name))
        return step(self, batch, number, epoch)

    monkeypatch.setattr(TrainStep, "__call__", signalled)
    handler, terminated = signal.getsignal(getattr(signal, name)), signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as end:
        arguments = [*overrides, "trainer.save_every=null", f"run_dir={tmp_path / 'run'}"]
        train.run(load_config("train", arguments))
    assert end.value.code == status
    assert signal.getsignal(getattr(signal, name)) is handler
    ignored = signal.signal(signal.SIGTERM, terminated) is signal.SIG_IGN
    assert ignored == (name == "SIGUSR1")
    monkeypatch.undo()
    saved = read_state(tmp_path / "run")["state"]
    assert (saved["step"], saved["epoch"], saved["current"]["position"]) == (at, (at - 1) // 6, (at - 1) % 6 + 1)
    go_on(tmp_path / "run", "workers=2" if at == 3 else "workers=0")
    assert_same_run(tmp_path / "run", whole_run)


def test_a_finished_run_is_extended(whole_run, tmp_path, capsys):
    run_dir = tmp_path / "run"
    shutil.copytree(whole_run, run_dir)
    assert go_on(run_dir)["last"]["epoch"] == 2
    assert "all 2 epochs are done" in capsys.readouterr().out
    assert go_on(run_dir, "trainer.epochs=3")["last"]["epoch"] == 3
    assert history(run_dir)[:2] == history(whole_run)
    assert yaml.safe_load((run_dir / "config.yaml").read_text())["trainer"]["epochs"] == 3
    assert read_state(run_dir)["state"]["step"] == 18


def test_a_run_that_saved_nothing_begins_anew(whole_run, tmp_path, capsys):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    shutil.copy(whole_run / "config.yaml", run_dir)
    go_on(run_dir)
    assert "starts from scratch" in capsys.readouterr().out
    assert_same_run(run_dir, whole_run)


def test_a_full_disk_keeps_what_was_saved(whole_run, tmp_path, monkeypatch, capsys, overrides):
    """From the third save on there is no room: the training goes on, and resuming leads to the same end."""
    write, saves = state.write_atomically, []

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def save(path: Path, data: bytes, keep: int) -> None:
        saves.append(path)
        with pytest.MonkeyPatch.context() as patch:
            if len(saves) > 2:
                patch.setattr(checkpoint.os, "fsync", full)
            write(path, data, keep)

    monkeypatch.setattr(state, "write_atomically", save)
    train.run(load_config("train", [*overrides, f"run_dir={tmp_path / 'run'}"]))
    assert capsys.readouterr().out.count("cannot be saved (No space left on device): the previous save") == 10
    monkeypatch.undo()
    assert not list((tmp_path / "run").glob(".*.tmp"))
    assert read_state(tmp_path / "run")["state"]["step"] == 2
    monkeypatch.setattr(checkpoint.os, "fsync", full)  # now for every file
    with pytest.raises(DetkitError, match="No space left on device; make room there, then continue with resume="):
        go_on(tmp_path / "run")
    monkeypatch.undo()
    go_on(tmp_path / "run")
    assert_same_run(tmp_path / "run", whole_run)


@pytest.mark.parametrize(
    ("edit", "arguments", "message"),
    [
        ({}, ["batch_size=8"], "batch_size cannot change when a run is resumed: only trainer.epochs"),
        ({}, ["model=yolov8s"], "model cannot change"),
        ({"seed": 1}, [], "config.yaml was changed: seed was 0"),
        ({"seed": -1}, [], "seed=-1 must be a whole number"),
        ({"plugins": ["os"]}, [], r"was trained with plugins=\['os'\]: pass the same"),
        (None, [], "config.yaml is not the configuration of a run"),
        ({"trainer": 3}, [], r"config.yaml: trainer=3 must be one of the options"),
        ({"trainer": {"epochs": 2}}, [], r"config.yaml: trainer.* is not set"),
        ({"image_size": "x"}, [], r"config.yaml: image_size=x must be a multiple of 32 pixels"),
        ({"data": {"name": "coco", "root": "a\0b"}}, [], r"config.yaml: data.root=a\\x00b must not contain control"),
        ({"backbone": {"name": []}}, [], r"config.yaml: backbone.name=\[\] must be the name of a part"),
        ({"seed": 10**30}, [], "config.yaml: seed=1000000000000000000000000000000 must be"),
        ({}, ["data.train_images=x"], "the run's data=shapes has no such key"),
        ({}, ["data=yolo", "data.yaml=x"], "data cannot change"),
    ],
)
def test_what_cannot_change_is_refused(whole_run, tmp_path, edit, arguments, message):
    shutil.copy(whole_run / "state.pt", tmp_path)
    content = edit if edit is None else yaml.safe_load((whole_run / "config.yaml").read_text()) | edit
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(DetkitError, match=message):
        go_on(tmp_path, *arguments)


def test_a_set_that_has_moved_is_named_anew(tmp_path, monkeypatch):
    """As a YOLO set's is; what is composed beside ``resume=`` is the default set."""
    command = [f"resume={tmp_path}", "data.yaml=new/data.yaml"]
    run = resolve(compose_config("train", ["data=yolo", "data.yaml=old/data.yaml"]))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(run))
    for more in ([], ["data=yolo"]):
        monkeypatch.setattr(
            resume, "typed_keys", lambda more=more: ["resume", "data.yaml", *(["data"] if more else [])]
        )
        own = resume.resumed_config(tmp_path, resolve(compose_config("train", [*command, *more])), run)
        assert own.as_dict() == run | {"data": run["data"] | {"yaml": "new/data.yaml"}}


def test_auto_goes_on_or_begins(whole_run, overrides, tmp_path, monkeypatch, capsys):
    """The same command three times: killed before anything is written, killed in the first epoch, finished."""
    run_dir = tmp_path / "run"
    command = [*overrides, f"run_dir={run_dir}", "resume=auto"]
    monkeypatch.setattr(resume, "typed_keys", lambda: [key.partition("=")[0] for key in command])
    run_dir.mkdir()
    (run_dir / ".config.yaml.tmp").touch()
    step = TrainStep.__call__
    with monkeypatch.context() as patch, pytest.raises(KeyError):
        patch.setattr(TrainStep, "__call__", lambda *a: step(*a) if a[2] < 4 else {}["killed"])
        train.run(load_config("train", command))
    train.run(load_config("train", command))
    assert "resuming after 0 of 2 epochs and 4 batches of the next" in capsys.readouterr().out
    assert_same_run(run_dir, whole_run)
    results = train.run(load_config("train", command))
    assert results["last"]["epoch"] == 2
    assert "all 2 epochs are done" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            ["batch_size=8"],
            "holds another run: batch_size is 4 there, not 8 .*resume=auto is for repeating the same command",
        ),
        (["model=yolov8s", "model.width=0.0625"], "holds another run: model.name is yolov8n there, not yolov8s"),
        (["run_dir=null"], "resume=auto needs run_dir=DIR"),
    ],
)
def test_auto_refuses_another_run(whole_run, overrides, command, message):
    with pytest.raises(DetkitError, match=message):
        train.run(load_config("train", [*overrides, f"run_dir={whole_run}", "resume=auto", *command]))


def test_auto_does_not_write_into_a_folder_of_something_else(overrides, tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(DetkitError, match="is not empty"):
        train.run(load_config("train", [*overrides, f"run_dir={tmp_path}", "resume=auto"]))


@pytest.mark.slow
def test_auto_in_a_sweep(overrides, tmp_path, monkeypatch, capsys):
    """Each job has a folder of its own, found again by the same command."""
    command = ["train", "-m", *overrides, "seed=0,1", "resume=auto", "hydra.sweep.dir=sweep", "trainer.epochs=1"]
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        cli.launch("train")
        assert {path.name for path in (tmp_path / "sweep").glob("[0-9]*")} == {"0_seed-0", "1_seed-1"}
    assert capsys.readouterr().out.count("all 1 epochs are done") == 2


def test_a_requeued_slurm_job_goes_on(whole_run, overrides, tmp_path, monkeypatch):
    """Nobody names a folder; another run of the same job, and the same run in another job, are not mistaken for it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    step = TrainStep.__call__

    def start(job: str, name: str, fails: bool = False) -> None:
        with monkeypatch.context() as patch:
            patch.setenv("SLURM_JOB_ID", job)
            patch.setattr(resume, "_overrides", lambda: [name])
            patch.setattr(TrainStep, "__call__", lambda *a: step(*a) if not fails or a[2] < 4 else {}["killed"])
            train.run(load_config("train", overrides))

    for job, name in (("7", "mine"), ("7", "other"), ("8", "mine")):
        with pytest.raises(KeyError):
            start(job, name, fails=True)
    folders = sorted((tmp_path / "runs" / "train").iterdir())
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    start("7", "mine")
    assert sorted((tmp_path / "runs" / "train").iterdir()) == folders
    assert_same_run(folders[0], whole_run)
    assert all(not (folder / "history.csv").exists() for folder in folders[1:])


HOLDER = """
import os, sys, time
from filelock import FileLock
lock = FileLock(sys.argv[1] + "/.filelock")
with lock:
    open(sys.argv[1] + "/.lock", "w").write("host7 1234")
    if os.fork() == 0:  # as loader workers are
        sys.stdin.read()
        os._exit(0)
    print("held", flush=True)
    time.sleep(60)
"""


def test_two_processes_do_not_share_a_run_directory(whole_run, tmp_path, monkeypatch):
    """A lock ends with its process, even if children live on; where the file system has no locks, the run goes on."""
    run = tmp_path / "run"
    shutil.copytree(whole_run, run, ignore=shutil.ignore_patterns(".lock", ".filelock"))
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", HOLDER, run], text=True, **pipes) as holder:
        assert holder.stdout.readline() == "held\n"
        for _ in range(2):
            with pytest.raises(DetkitError, match=r"run is in use by process 1234 on host7: wait until that ends"):
                go_on(run)
        threading.Timer(0.5, holder.kill).start()
        with lock_module.run_lock(run, "job", patience=10):
            assert holder.wait() == -signal.SIGKILL
            assert lock_module.find_run_of_job(tmp_path, "job") == run
            with pytest.raises(DetkitError, match=f"by process {os.getpid()} on"):
                go_on(run)
    assert go_on(run)["last"]["epoch"] == 2
    assert (run / ".lock").read_text().split()[1] == str(os.getpid())

    def unknown(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", unknown)
    assert go_on(run)["last"]["epoch"] == 2


def test_a_run_that_another_process_has_continued_is_not_taken_back(whole_run, monkeypatch):
    """Between reading the state and holding the folder."""
    older = TrainState(step=read_state(whole_run)["state"]["step"] - 1)
    monkeypatch.setattr(build_training, "load_training_state", lambda *_: older)
    before = {path: path.stat().st_mtime_ns for path in whole_run.iterdir() if not path.name.startswith(".")}
    with pytest.raises(DetkitError, match="another process resumed it"):
        go_on(whole_run)
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())


@pytest.mark.parametrize("theirs", [[False, 0], [True, 3]])
def test_ranks_that_see_different_runs_say_so(theirs, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "run_on_main", lambda make: theirs)
    with pytest.raises(DetkitError, match=r"nodes see different contents of the run directory .*rank 0 finds"):
        train._check_ranks_agree(resume.RunPlan({}, tmp_path, {"state": {"step": 6}}, False))


def test_a_signal_is_handed_over_to_somebody_s_handler(whole_run, overrides, tmp_path, monkeypatch):
    """As submitit's are: SIGTERM is nothing to it, on SIGUSR2 it queues the job again and exits; both after a save."""
    step, received = TrainStep.__call__, []

    def requeue(signum: int, frame: object) -> None:
        received.append((signum, read_state(tmp_path / "run")["state"]["step"]))
        if signum == signal.SIGUSR2:
            sys.exit(77)

    def signalled(self: TrainStep, batch: object, number: int, epoch: int) -> dict:
        for name in {2: ["SIGTERM"], 4: ["SIGUSR2", "SIGTERM"]}.get(number + 1, []):
            os.kill(os.getpid(), getattr(signal, name))
        return step(self, batch, number, epoch)

    before = {signum: signal.signal(signum, requeue) for signum in (signal.SIGTERM, signal.SIGUSR2)}
    try:
        monkeypatch.setattr(TrainStep, "__call__", signalled)
        with pytest.raises(SystemExit) as end:
            arguments = [*overrides, "trainer.save_every=null", f"run_dir={tmp_path / 'run'}"]
            train.run(load_config("train", arguments))
        assert all(signal.getsignal(signum) is requeue for signum in before)
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
    assert end.value.code == 77
    assert [at for signum, at in received if signum == signal.SIGTERM] == [2, 4]
    assert received[-1][0] == signal.SIGUSR2
    monkeypatch.undo()
    go_on(tmp_path / "run", "trainer.save_every=1")
    assert_same_run(tmp_path / "run", whole_run)


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(DetkitError, match=r"is not a run directory: config.yaml: No such file"):
        go_on(tmp_path)


CONTENT = {"schema_version": 1} | {key: kind() for key, kind in state.CONTENT.items()}


def contents(number: int) -> dict:
    return CONTENT | {"pending": number, "model": {"w": torch.arange(999.0)}}


@pytest.mark.parametrize("at", ["fsync", "replace1", "replace2", "replace3"])
def test_a_save_cut_off_anywhere_leaves_a_whole_state(tmp_path, monkeypatch, at):
    for number in (1, 2):
        write_state(tmp_path, contents(number), keep=3)
    calls = []

    def cut_off(*arguments: object) -> None:
        calls.append(arguments)
        if at in ("fsync", f"replace{len(calls)}"):
            raise SystemExit
        shutil.move(*arguments)

    monkeypatch.setattr(checkpoint.os, at.rstrip("123"), cut_off)
    with pytest.raises(SystemExit):
        write_state(tmp_path, contents(3), keep=3)
    monkeypatch.undo()
    assert read_state(tmp_path)["pending"] == 2
    write_state(tmp_path, contents(4), keep=3)
    assert read_state(tmp_path)["pending"] == 4


def test_the_last_few_are_kept_and_a_damaged_one_is_passed_over(tmp_path, caplog):
    for number in range(5):
        write_state(tmp_path, contents(number), keep=3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["state-1.pt", "state-2.pt", "state.pt"]
    data = bytearray((tmp_path / "state.pt").read_bytes())
    rng = np.random.default_rng(0)
    damaged = 0
    for trial in range(200):
        bad = data.copy()
        bad[rng.integers(len(bad))] ^= 1 << rng.integers(8)
        (tmp_path / "state.pt").write_bytes(bad[: rng.integers(len(bad))] if trial % 4 == 0 else bad)
        caplog.clear()
        content = read_state(tmp_path)
        warnings = caplog.messages
        assert content["pending"] == (
            3 if warnings else 4
        )  # a bit of no meaning may change, such as one of the padding
        assert torch.equal(content["model"]["w"], torch.arange(999.0))
        damaged += len(warnings)
    assert damaged > 150
    for path in tmp_path.iterdir():
        path.write_bytes(data[:100])
    with pytest.raises(DetkitError, match=r"nothing saved in .* is undamaged"):
        read_state(tmp_path)


class Harmful:
    """Unpickled, it would make a folder."""

    def __reduce__(self) -> tuple:
        return os.mkdir, ("harm",)


def test_nothing_is_unpickled_freely(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    torch.save(CONTENT | {"cfg": Harmful()}, "state.pt")
    with pytest.raises(DetkitError, match="nothing saved"):
        read_state(tmp_path)
    assert "truncated or damaged" in caplog.messages[0]
    assert "\n" not in caplog.messages[0]
    assert not Path("harm").exists()
    with zipfile.ZipFile("state.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10**6))
    with pytest.raises(DetkitError, match="nothing saved"):
        read_state(tmp_path)
    assert "compressed" in caplog.messages[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(schema_version=2), "state.pt has schema version 2"),
        (lambda c: c.pop("rng"), "it has no 'rng'"),
        (lambda c: c.update(ema=[]), "it has no 'ema'"),
        (lambda c: c["model"].update({"backbone.stem.conv.weight": torch.zeros(2)}), "of its 'model', 'backbone.stem"),
        (lambda c: c["ema"].popitem(), "of its 'ema', 'head"),
        (lambda c: c["optimizer"]["state"][0].update(momentum_buffer=torch.zeros(2)), "has shape [2]"),
        (lambda c: c["optimizer"]["param_groups"].pop(), "does not fit the run"),
        (lambda c: c["state"].update(epok=1), "does not fit the run"),
        (lambda c: c["rng"].update(torch=3), "does not fit the run"),
        (lambda c: c.update(batches=7), "the training set now makes 5"),
        (lambda c: c.update(batches=0), "batches=0 must be a whole number, 1 or more"),
        (lambda c: c.update(health=[0, 0, 0, 0, 0]), "health=[0, 0, 0, 0, 0] must be a list of four counts"),
        (lambda c: c.update(pending=-1), "pending=-1 must be"),
        (lambda c: c.update(ranks=0), "ranks=0 must be"),
        (lambda c: c.update(schema_version=torch.ones(2)), "has schema version"),
        (lambda c: c.update(cfg=nested(99)), "too deeply nested"),
        (lambda c: c["state"].update(history=[{}] * 1_000_000), "state.history="),
        (lambda c: c["recipe"].update(lr="x"), "recipe.lr=x must be a number above 0"),
        (lambda c: c["recipe"].pop("name"), "recipe.name is not set"),
        (lambda c: c["state"].update(epoch=True), "state.epoch=true must be a whole number"),
        (lambda c: c["state"].update(epoch=2**70, step=0), "state.epoch=1180591620717411303424 must be"),
        (lambda c: c["state"].update(epoch=1), "state.results lacks the metrics"),
        (lambda c: c["state"].update(best=math.nan), "state.best=nan must be a number from -1 to 1"),
        (lambda c: c["state"].update(history=[{"epoch": 1}]), "state.history=[{'epoch': 1}] must be a list of rows"),
        (lambda c: c["state"].update(results={"best": 3}), "state.results.best=3 must be"),
        (lambda c: c["state"]["current"].update(position=6), "is beyond the epoch's 5 batches"),
        (lambda c: c["state"]["current"].update(losses={"box": "x"}), "'box' must be a tensor of one number"),
        (lambda c: c["state"]["current"].update(grad_norm=torch.zeros(9)), "'grad_norm' must be a tensor of one"),
        (lambda c: c["model"].update({"backbone.stem.conv.weight": "x"}), "does not fit the run"),
        (lambda c: c["model"]["head.bins"].fill_(math.nan), "of its 'model', 'head.bins' holds NaN or infinity"),
        (lambda c: c["ema"]["head.bins"].fill_(math.inf), "of its 'ema', 'head.bins' holds NaN or infinity"),
        (lambda c: c["optimizer"]["state"].update({9999: {}}), "for a parameter that does not exist"),
        (lambda c: c["optimizer"]["state"][0].update(exp_avg=torch.zeros(2)), "has the keys momentum_buffer, exp_avg"),
        (lambda c: c["optimizer"]["state"][0]["momentum_buffer"].fill_(math.nan), "'momentum_buffer' holds NaN"),
        (lambda c: c["rng"].update(python=(3, (1, 2), None)), "does not fit the run"),
        (lambda c: c["rng"]["numpy"].__setitem__(2, 10**6), "must be the state of an MT19937"),
        (lambda c: c["rng"].update(torch=torch.zeros(9, dtype=torch.uint8)), "does not fit the run"),
        (lambda c: c.update(scaler={"scale": 1.0}), "scaler must be a mapping of"),
        (lambda c: c.update(gradients={"no.such": torch.zeros(1)}), "of its 'gradients', 'no.such'"),
    ],
)
def test_a_state_that_does_not_fit_is_named(trained, tmp_path, change, message):
    step, content = trained
    write_state(tmp_path, content, 1)
    content = torch.load(tmp_path / "state.pt", weights_only=True)
    change(content)
    write_state(tmp_path, content, 1)
    with pytest.raises(DetkitError) as error:
        load_training_state(read_state(tmp_path), step, 5)
    assert message in str(error.value)
    assert str(error.value).startswith(str(tmp_path / "state.pt"))
    assert len(str(error.value)) < 500


def nested(depth: int) -> dict:
    """Mappings within one another."""
    return {"a": nested(depth - 1)} if depth else {}


def test_only_regular_files_of_a_run_are_read(tmp_path, caplog):
    """A pipe would be waited for."""
    for number in (1, 2):
        write_state(tmp_path, contents(number), keep=2)
    (tmp_path / "state.pt").unlink()
    os.mkfifo(tmp_path / "state.pt")
    assert read_state(tmp_path)["pending"] == 1
    assert "state.pt cannot be read: it is not a regular file" in caplog.messages[0]
    for name in ("config.yaml", "loggers.json", ".lock"):
        os.mkfifo(tmp_path / name)
    with pytest.raises(DetkitError, match=r"config.yaml: it is not a regular file"):
        resume.resumed_config(tmp_path, {}, None)
    assert loggers._read_ids(tmp_path / "loggers.json") == {}
    assert lock_module.find_run_of_job(tmp_path.parent, "job") is None


def make_step() -> TrainStep:
    """A step of two batches, of a model that draws random numbers."""
    detector = detkit.create_model("yolov8n", num_classes=3, overrides=["model.width=0.0625"])
    detector.backbone.stem = nn.Sequential(detector.backbone.stem, nn.Dropout(0.3))
    detector.train()
    recipe = Recipe("sgd", 0.01, 0.9, 0.0, 0.1)
    schedule = Schedule(recipe, epochs=10, final=0.01, shape="linear", warmup=0, warmup_momentum=0.8)
    precision = Precision.from_config("off", torch.device("cpu"))
    return TrainStep(detector, TaskAlignedLoss(), recipe, schedule, precision, accumulate=2, clip=10.0)


@pytest.fixture(scope="module")
def trained() -> tuple[TrainStep, dict]:
    """A step that has learned, and its state."""
    step = make_step()
    detector = detkit.create_model("yolov8n", num_classes=3, overrides=["model.width=0.0625"])
    step = TrainStep(detector, step.loss, step.schedule.recipe, step.schedule, step.precision, accumulate=1, clip=1.0)
    step(dummy_batch(2, (64, 64), 3, 3), 0, 0)
    return step, training_state_dict(step, TrainState(), 5)


def test_waiting_gradients_and_random_numbers_come_back(tmp_path):
    """Five batches, two of which make a step: cut after the third, a gradient waits; dropout goes on as it would."""
    batches = [dummy_batch(4, (64, 64), 3, 3) for _ in range(5)]
    whole = make_step()
    for k, batch in enumerate(batches):
        whole(batch, k, 0)
        if k == 2:
            write_state(tmp_path, training_state_dict(whole, TrainState(step=3), 5), 1)
    torch.manual_seed(99)
    random.seed(99)
    resumed = make_step()
    position = load_training_state(read_state(tmp_path), resumed, 5)
    assert (position.step, resumed.pending) == (3, 1)
    for k, batch in enumerate(batches[3:], 3):
        resumed(batch, k, 0)
    for mine, theirs in ((resumed.detector, whole.detector), (resumed.ema.model, whole.ema.model)):
        assert all(torch.equal(tensor, theirs.state_dict()[name]) for name, tensor in mine.state_dict().items())
    assert resumed.ema.updates == whole.ema.updates == 2
    parameters = zip(resumed.detector.parameters(), whole.detector.parameters(), strict=True)
    assert all(torch.equal(a.grad, b.grad) for a, b in parameters if b.requires_grad)


@pytest.mark.parametrize(("kind", "workers"), [("files", 0), ("files", 2), ("shards", 0), ("shards", 2)])
def test_a_loader_goes_on_within_an_epoch(shapes_root, tmp_path, kind, workers):
    """What comes after ``skip`` batches is what comes without; and the next epoch is whole."""
    annotations = read_shapes("train", root=str(shapes_root))
    if kind == "files":
        dataset = AugmentedDataset(DetectionDataset(annotations), 64, AUGMENT, 0, 2)
        loader = BatchLoader(dataset, 5, workers=workers, shuffle=True)
    else:
        write_webdataset(annotations, tmp_path, "train", shard_images=7)
        dataset = DetectionDataset(read_webdataset("train", root=str(tmp_path)), 64)
        loader = ShardLoader(dataset, Augmentation(64, AUGMENT, 2), 5, workers=workers)
    batches = {skip: list(loader.epoch(1, skip)) for skip in (0, 2, 3, 5)}
    assert [batch.position for batch in batches[0]] == [1, 2, 3, 4, 5]
    for skip, rest in batches.items():
        assert [batch.position for batch in rest] == [*range(skip + 1, 6)]
        assert all(torch.equal(a.images, b.images) for a, b in zip(rest, batches[0][skip:], strict=True))
    assert len(list(loader.epoch(0))) == 5
