"""Loader processes that die, stop, or cannot hand their batches over; and commands that fail beside them."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from detkit.data import workers
from detkit.data.augment.pipeline import Augmentation
from detkit.data.dataset import DetectionDataset, LetterboxDataset
from detkit.data.file_utils import map_files
from detkit.data.formats.shapes import read_shapes
from detkit.data.formats.tar_shards import read_webdataset, write_webdataset
from detkit.data.loader import BatchLoader
from detkit.data.shard_loader import ShardLoader
from detkit.data.workers import Workers, WorkersLost, check_shared_memory
from detkit.errors import DetkitError
from tests.test_console import command
from tests.test_resume import AUGMENT

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are ended by Linux")
GIVEN = 300  # seconds for what takes a few on an idle machine


@pytest.fixture(params=["files", "shards"])
def loader(request: pytest.FixtureRequest, shapes_root: Path, tmp_path: Path) -> BatchLoader | ShardLoader:
    """Of 12 batches by two processes."""
    annotations = read_shapes("train", root=str(shapes_root))
    if request.param == "files":
        return BatchLoader(LetterboxDataset(DetectionDataset(annotations), 64), 2, workers=2)
    write_webdataset(annotations, tmp_path, "train", shard_images=7)
    dataset = DetectionDataset(read_webdataset("train", root=str(tmp_path)), 64)
    return ShardLoader(dataset, Augmentation(64, AUGMENT, 2), 2, workers=2)


@pytest.mark.parametrize("epoch", [0, 1])
@pytest.mark.parametrize("batches", [0, 1, 5])
@pytest.mark.parametrize("name", ["SIGKILL", "SIGBUS"])
def test_a_process_that_is_killed_is_named(loader, epoch, batches, name):
    """At any moment, between two epochs, too; and never anywhere but where a batch is asked for."""
    list(loader.epoch(0)) if epoch else next(loader.epoch(0))
    iterator = loader.epoch(epoch)
    for _ in range(batches):
        next(iterator)
    os.kill(loader.workers.processes[0].pid, getattr(signal, name))
    time.sleep(0.1)  # where torch would raise
    with pytest.raises(WorkersLost, match=rf"a data loading process was killed \(signal \d+, {name}\)"):
        list(iterator)
    assert not any(process.is_alive() for process in loader.workers.processes)
    with pytest.raises(WorkersLost):
        next(loader.epoch(epoch))


class Late:
    """A sampler that gives its first index when the processes have long begun."""

    def __iter__(self) -> Iterator[int]:
        time.sleep(2)
        yield from range(4)


def test_a_process_that_dies_before_the_first_index_is_one_error_message():
    options = {"worker_init_fn": lambda _: os.kill(os.getpid(), signal.SIGKILL), "multiprocessing_context": "fork"}
    loader = DataLoader(range(4), batch_size=None, sampler=Late(), num_workers=2, persistent_workers=True, **options)
    with pytest.raises(DetkitError, match="data loading process"):
        list(Workers(loader, timeout=30))


@pytest.mark.parametrize("epoch", [0, 1])
def test_a_process_that_is_stopped_is_given_up(loader, epoch):
    list(loader.epoch(0))
    iterator = loader.epoch(epoch)
    if epoch:
        next(iterator)
    loader.workers.timeout = 2
    for process in loader.workers.processes:
        os.kill(process.pid, signal.SIGSTOP)
    with pytest.raises(WorkersLost, match=r"no batch from the 2 data loading processes for 2 seconds"):
        list(iterator)
    for process in loader.workers.processes:
        process.join(60)  # they have been sent SIGKILL, which a busy machine may deliver late
    assert not any(process.is_alive() for process in loader.workers.processes)


class FaultyDataset(Dataset):
    """Eight numbers, whose fourth is made by ``act``."""

    def __init__(self, act: Callable[[], object]) -> None:
        self.act = act

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> object:
        return self.act() if index == 3 else index


def batches_of(act: Callable[[], object]) -> Iterator[object]:
    options = {"multiprocessing_context": "fork", "persistent_workers": True, "worker_init_fn": workers.init_worker}
    return iter(Workers(DataLoader(FaultyDataset(act), batch_size=None, num_workers=2, **options), timeout=30))


def test_a_result_that_cannot_be_handed_on_is_not_waited_for():
    class Unsendable:
        def __reduce__(self) -> object:
            raise OSError(24, "Too many open files")

    with pytest.raises(WorkersLost, match=r"exited \(Too many open files\): use fewer workers"):
        list(batches_of(Unsendable))


def test_a_fault_in_the_work_is_no_death():
    with pytest.raises(ZeroDivisionError):
        list(batches_of(lambda: 1 / 0))


def test_processes_the_system_does_not_allow_are_one_error_message(monkeypatch):
    forks, fork = [], os.fork

    def refuse() -> int:
        forks.append(0)
        if len(forks) > 1:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        return fork()

    monkeypatch.setattr(os, "fork", refuse)
    with pytest.raises(DetkitError, match=r"2 data loading processes cannot be started \(Resource temp"):
        list(batches_of(int))


@pytest.mark.slow
def test_children_of_others_may_end(loader):
    """Their SIGCHLD is none of ours, nor are those of a loader that was given up."""
    lost = batches_of(int)
    next(lost)
    iterator = loader.epoch(0)
    next(iterator)
    subprocess.run([sys.executable, "-c", "raise SystemExit(3)"])
    os.kill(lost.gi_frame.f_locals["self"].processes[0].pid, signal.SIGKILL)
    assert len(list(iterator)) == 11
    with pytest.raises(WorkersLost):
        list(lost)


@pytest.mark.parametrize(("free", "count", "fits"), [(64, 0, True), (64, 1, True), (64, 2, False), (200, 4, True)])
def test_shared_memory_is_looked_at_first(monkeypatch, free, count, fits):
    """A batch of 16 images of 640 pixels, 18.75 MiB, in a container of Docker's."""
    status = os.statvfs_result((1, 2**20, 0, 0, free, 0, 0, 0, 0, 0))
    monkeypatch.setattr(os, "statvfs", lambda path: status)
    if fits:
        check_shared_memory(16 * 3 * 640**2, count)
    else:
        with pytest.raises(DetkitError, match=r"\(a batch 18.8 MiB\), which has 64.0 MiB free: .*--shm-size"):
            check_shared_memory(16 * 3 * 640**2, count)


def test_a_batch_without_room_is_one_error_message(loader, monkeypatch):
    """Where others fill /dev/shm later."""

    def refuse(tensor: torch.Tensor) -> None:
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", refuse)
    with pytest.raises(WorkersLost, match=r"a batch of 0.0 MiB cannot be .* \(No space left on device\): .*workers=0"):
        list(loader.epoch(0))


MOUNT = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs -o size=1m tmpfs /dev/shm && exec "$@"', "sh"]


@pytest.mark.skipif(subprocess.run([*MOUNT, "true"], capture_output=True).returncode != 0, reason="may not mount")
@pytest.mark.parametrize("task", ["train", "eval"])
def test_little_shared_memory_ends_a_command_before_it_begins(finished_run, train_overrides, tmp_path, task):
    arguments = {"train": [*train_overrides, "image_size=640"], "eval": [f"ckpt={finished_run / 'last.safetensors'}"]}
    arguments = [*arguments[task], "image_size=640", "workers=1", f"run_dir={tmp_path / 'run'}"]
    done = subprocess.run([*MOUNT, *command(task, *arguments)], capture_output=True, text=True, timeout=GIVEN)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "1 data loading processes take" in done.stderr
    assert "--shm-size" in done.stderr


FAULT = """
import sys
from detkit.data.dataset import DetectionDataset, LetterboxDataset
from detkit.data.loader import BatchLoader
from detkit.data.formats.shapes import read_shapes

dataset = LetterboxDataset(DetectionDataset(read_shapes("train", root=sys.argv[1])), 64)
loaders = [BatchLoader(dataset, 2, workers=2) for _ in range(2)]
for loader in loaders:
    next(loader.epoch(0))
print(*(process.pid for loader in loaders for process in loader.workers.processes), flush=True)
sys.stdin.readline()
raise ZeroDivisionError
"""


@pytest.mark.parametrize("end", ["fault", "stopped", "killed"])
def test_processes_end_with_a_command(shapes_root, end):
    """An uncaught exception, also beside a process that is stopped; SIGKILL of the command."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", FAULT, str(shapes_root)], text=True, **pipes)
    numbers = [int(number) for number in process.stdout.readline().split()]
    if end == "stopped":
        os.kill(numbers[0], signal.SIGSTOP)
    if end == "killed":
        process.kill()
    _, error = process.communicate("go on\n", timeout=GIVEN) if end != "killed" else process.communicate()
    assert process.returncode == (-signal.SIGKILL if end == "killed" else 1)
    assert end == "killed" or "ZeroDivisionError" in error
    deadline = time.monotonic() + GIVEN
    while any(map(is_alive, numbers)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_alive(number: int) -> bool:
    """Whether there is such a process, and not only its exit status."""
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def look(path: str) -> int:
    if path == "3":
        os.kill(os.getpid(), signal.SIGKILL)
    return int(path)


def test_a_killed_process_of_a_pool_is_one_error_message():
    with pytest.raises(DetkitError, match="looking: a process was killed, possibly for lack of memory"):
        list(map_files(look, [str(k) for k in range(8)], "looking", 2))


def test_a_pool_whose_results_are_not_wanted_ends():
    """Also where one of its processes is stopped."""
    others = multiprocessing.active_children()
    results = map_files(int, [str(k) for k in range(1000)], "looking", 2)
    assert next(results) == 0
    children = [child for child in multiprocessing.active_children() if child not in others]
    os.kill(children[0].pid, signal.SIGSTOP)
    results.close()
    for child in children:
        child.join(GIVEN)
        assert not child.is_alive()
