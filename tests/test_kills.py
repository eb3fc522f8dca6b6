"""Sixty runs that are killed, or lose a loader process, at random moments: ``pytest -m kill``, an hour perhaps."""

import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import redirect_stdout, suppress
from pathlib import Path

import pytest

from detkit.errors import DetkitError
from detkit.tasks import load_config, train
from detkit.tasks.runs import resume
from tests.test_resume import assert_same_run, overrides, whole_run  # noqa: F401

pytestmark = [pytest.mark.kill, pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")]
fork = multiprocessing.get_context("fork" if sys.platform == "linux" else None)


def start(arguments: list[str], log: Path) -> multiprocessing.Process:
    """Begin, in a process of its own, what ``train ARGUMENTS`` does."""

    def work() -> None:
        resume.typed_keys = lambda: [argument.partition("=")[0] for argument in arguments]
        with open(log, "a", buffering=1) as file, redirect_stdout(file):
            try:
                train.run(load_config("train", arguments))
            except DetkitError as error:
                print(error)
                raise SystemExit(2) from None

    process = fork.Process(target=work)
    process.start()
    return process


def children(process: multiprocessing.Process) -> list[int]:
    """The processes that a process has started."""
    with suppress(OSError):
        return [int(number) for number in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    return []


@pytest.fixture(scope="module")
def seconds(overrides, tmp_path_factory) -> Iterator[float]:  # noqa: F811
    """How long such a run takes here."""
    folder, begin = tmp_path_factory.mktemp("timed"), time.monotonic()
    process = start([*overrides, f"run_dir={folder / 'run'}", "workers=2"], folder / "log")
    process.join()
    assert process.exitcode == 0
    return time.monotonic() - begin


@pytest.mark.parametrize("trial", range(60))
def test_a_run_that_was_killed_ends_as_if_it_had_not_been(whole_run, overrides, seconds, tmp_path, trial):  # noqa: F811
    """The command again and again with ``resume=auto``: by turns the run is killed twice, or one of its processes."""
    rng, run_dir = random.Random(trial), tmp_path / "run"
    arguments = [*overrides, f"run_dir={run_dir}", "resume=auto", "workers=2"]
    for _ in range(2):
        process = start(arguments, tmp_path / "log")
        time.sleep(rng.uniform(0.02, 0.9) * seconds)
        if trial % 2:
            process.kill()
        else:
            while process.is_alive() and not children(process):
                time.sleep(0.01)
            with suppress(ProcessLookupError):
                os.kill(rng.choice(children(process) or [process.pid]), signal.SIGKILL)
        process.join(300)
        output = (tmp_path / "log").read_text()
        assert process.exitcode in ((0, -signal.SIGKILL) if trial % 2 else (0, 2)), output
    process = start(arguments, tmp_path / "log")
    process.join(300)
    assert process.exitcode == 0, (tmp_path / "log").read_text()
    assert_same_run(run_dir, whole_run)
