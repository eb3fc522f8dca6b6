"""What is printed never ends a command: readers go, terminals close, disks fill up, names are of any characters."""

import functools
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from detkit.engine.signals import ignore_hangup
from detkit.errors import DetkitError
from detkit.viz.console import Output, make_console

TOOLS = Path(__file__).parents[1] / "tools"


def command(task: str, *arguments: object) -> list[str]:
    return [sys.executable, str(TOOLS / f"{task}.py"), *map(str, arguments)]


@pytest.fixture(scope="module")
def overrides(shapes_root: Path) -> list[str]:
    sizes = ["image_size=64", "batch_size=8", "trainer.epochs=1", "model.width=0.0625"]
    return [f"data.root={shapes_root}", "workers=0", "device=cpu", *sizes]


@pytest.mark.parametrize("where", ["pipe", "full", "closed"])
def test_a_training_goes_on_when_nobody_reads(overrides, tmp_path, where):
    """``train | head -1`` and the same of stderr, a full device, no stdout at all."""
    run_dir = tmp_path / "run"
    arguments = command("train", *overrides, f"run_dir={run_dir}")
    if where == "pipe":
        process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert b"yolov8n" in process.stdout.readline()
        process.stdout.close()
        assert process.wait(300) == 0
    elif where == "full":
        with open("/dev/full", "w") as full:
            assert subprocess.run(arguments, stdout=full, stderr=full, timeout=300).returncode == 0
    else:
        script = '"$@" >&- 2>&-'
        assert subprocess.run(["sh", "-c", script, "sh", *arguments], timeout=300).returncode == 0
    assert (run_dir / "last.safetensors").is_file()
    assert (run_dir / "plots" / "history.png").is_file()


def test_a_training_goes_on_when_its_terminal_is_closed(overrides, tmp_path):
    """The session's terminal hangs up (SIGHUP), and every write to it fails from then on."""
    run_dir = tmp_path / "run"
    number, terminal = pty.fork()
    if not number:
        os.execv(sys.executable, command("train", *overrides, "trainer.epochs=2", f"run_dir={run_dir}"))
    output = b""
    while b"writing to" not in output:
        output += os.read(terminal, 1000)
    deadline = time.monotonic() + 300
    while not (run_dir / "plots" / "labels.png").exists():  # the training begins
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.close(terminal)
    assert os.waitpid(number, 0) == (number, 0)
    assert len((run_dir / "history.csv").read_text().splitlines()) == 3


def test_the_status_of_a_mistake_reaches_whoever_does_not_read():
    with open("/dev/full", "w") as full:
        assert subprocess.run(command("train", "modle=x"), stderr=full, timeout=300).returncode == 2
    assert subprocess.run(command("train", "--cfg", "job"), stdout=subprocess.DEVNULL, timeout=300).returncode == 0


@pytest.mark.parametrize("task", ["train", "check_data", "summary"])
def test_a_terminal_of_ascii_alone(task, shapes_root, tmp_path):
    """Names that are not UTF-8 and of other scripts, on every line that has them."""
    root = tmp_path / os.fsdecode(b"s\xe9t \xff") / "木"
    root.parent.mkdir()
    root.symlink_to(shapes_root)
    values = {"train": ["trainer.epochs=1", "workers=0", "batch_size=8"], "check_data": ["workers=1"], "summary": []}
    arguments = [*values[task], "device=cpu"]
    if task != "summary":
        arguments += [f'data.root="{root}"', f'run_dir="{root.parent / "run"}"']
    if task != "check_data":
        arguments += ["image_size=64", "model.width=0.0625"]
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONUTF8": "0"}
    done = subprocess.run(command(task, *arguments), env=environment, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.isascii()


def test_what_a_stream_cannot_take_is_lost_or_escaped(tmp_path):
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w", encoding="ascii") as file:
        output = Output(file)
        make_console(file=output).print("木 \udcff \x1b[31m")
        assert print("more", file=output, flush=True) is None
        assert (output.fileno(), output.isatty(), output.encoding) == (write, False, "ascii")
    file = open(tmp_path / "file", "w", encoding="ascii")  # noqa: SIM115
    output = Output(file)
    make_console(file=output).print("木 \udcff \x1b[31m")
    output.flush()
    assert (tmp_path / "file").read_text() == "\\u6728 \\udcff \\x1b[31m\n"
    file.close()
    output.write("closed")
    output.flush()


def test_a_handler_of_somebody_else_stays():
    for before in (signal.SIG_DFL, lambda *_: None):
        signal.signal(signal.SIGHUP, before)
        with ignore_hangup():
            assert signal.getsignal(signal.SIGHUP) is (signal.SIG_IGN if before is signal.SIG_DFL else before)
        assert signal.getsignal(signal.SIGHUP) is before
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(28, "No space left on device", "/x/a\nb"), "error: cannot read or write /x/a\\nb: No space left"),
        (OSError(24, "Too many open files"), "error: the operating system reports: Too many open files"),
        (DetkitError("a\x1b[31m\nb"), "error: a\\x1b[31m\\nb"),
    ],
)
def test_a_refusal_by_the_system_is_one_message(error, message, monkeypatch, capsys):
    from detkit.tasks import summary
    from tests.conftest import run_command

    def fail(cfg: dict) -> None:
        raise error

    monkeypatch.setattr(summary, "run", functools.wraps(summary.run)(fail))
    status, _, output = run_command(monkeypatch, capsys, "summary")
    assert (status, output.count("\n")) == (2, 1)
    assert output.startswith(message)
