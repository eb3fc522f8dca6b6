"""A process that has detkit imported, and forks a child for each trial: ``python server.py IDLE_LIMIT`` speaks JSON
lines.

A request is ``{"call": "cli" or the name of a function in probes.py, "arguments": [...], "folder": DIR}``; the answer
says how the child ended. A child is watched, not trusted: it has bounds of memory, CPU time and file size, and where
it neither ends nor computes it is taken for hanging, however slow the machine is.
"""

import atexit
import contextlib
import json
import os
import resource
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

CPU_LIMIT = 40  # seconds of computing, of a trial's processes together; the slowest sound one takes 20
ADDRESS_LIMIT = 6 * 2**30  # bytes of address space, beyond those that importing detkit took
PROCESS_LIMIT = 50  # of a trial; a machine may not survive 100,000
FILE_LIMIT = 2**30  # bytes of a file that is written
TICKS = os.sysconf("SC_CLK_TCK")


def serve() -> None:
    """Answer requests until the input ends."""
    idle_limit = float(sys.argv[1])  # seconds without any computing
    answers = os.fdopen(os.dup(1), "w")
    requests = os.fdopen(os.dup(0))
    _redirect(Path(os.devnull), Path(os.devnull))
    _import_detkit()
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in requests:
        request = json.loads(line)
        folder = Path(request["folder"])
        pid = os.fork()
        if not pid:
            _be_child(request["call"], request["arguments"], folder)
        print(json.dumps(_watch(pid, idle_limit)), file=answers, flush=True)


def _import_detkit() -> None:
    """Import all that a command may need, so that no child has to."""
    import importlib

    from detkit.config import compose_config
    from detkit.tasks import list_tasks

    for task in list_tasks():
        importlib.import_module(f"detkit.tasks.{task}")
    for module in ("albumentations", "matplotlib.pyplot", "optuna", "tensorboard.summary", "torch._dynamo"):
        with contextlib.suppress(ImportError):
            importlib.import_module(module)
    compose_config("train")  # Hydra's grammar


def _be_child(call: str, arguments: list[str], folder: Path) -> None:
    """Run the trial in this process, which ends as an interpreter would."""
    os.setsid()
    os.chdir(folder)
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    _redirect(folder / "stdout", folder / "stderr")
    space = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE") + ADDRESS_LIMIT
    resource.setrlimit(resource.RLIMIT_AS, (space, space))
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_LIMIT, FILE_LIMIT))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    status = 1
    try:
        if call == "cli":
            from detkit.cli import main

            sys.argv = ["detkit", *arguments]
            main()
        else:
            import probes

            getattr(probes, call)(*arguments)
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            threading._shutdown()
            atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(status)


def _watch(pid: int, idle_limit: float) -> dict:
    """Wait for a child; return its exit status (a signal's number negative), and what it took."""
    begin = last_progress = time.monotonic()
    spent, next_look, hanging = 0.0, begin + 1, False
    while True:
        ended, status, usage = os.wait4(pid, os.WNOHANG)
        if ended:
            break
        now = time.monotonic()
        if now >= next_look:
            next_look = now + 1
            members = _session(pid)
            computed = sum(int(fields[11]) + int(fields[12]) for _, fields in members) / TICKS
            if computed > spent:
                spent, last_progress = computed, now
            if spent > CPU_LIMIT or now - last_progress > idle_limit or len(members) > PROCESS_LIMIT:
                hanging = True
                _end_session(pid)
        time.sleep(0.01)
    _end_session(pid)
    return {
        "status": os.waitstatus_to_exitcode(status),
        "hanging": hanging,
        "seconds": time.monotonic() - begin,
        "cpu": usage.ru_utime + usage.ru_stime,
        "resident": usage.ru_maxrss * 1024,
    }


def _session(pid: int) -> list[tuple[int, list[str]]]:
    """The processes of a child's session: their numbers, and the fields of their ``stat`` from the state on."""
    found = []
    for entry in os.listdir("/proc"):
        with contextlib.suppress(OSError):
            if entry.isdigit():
                fields = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()
                if int(fields[3]) == pid:
                    found.append((int(entry), fields))
    return found


def _end_session(pid: int) -> None:
    for member, _ in _session(pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(member, signal.SIGKILL)


def _redirect(stdout: Path, stderr: Path) -> None:
    """Give this process an empty standard input, and files for the other two."""
    for path, flags, target in (
        (os.devnull, os.O_RDONLY, 0),
        (stdout, os.O_WRONLY | os.O_CREAT, 1),
        (stderr, os.O_WRONLY | os.O_CREAT, 2),
    ):
        descriptor = os.open(path, flags)
        os.dup2(descriptor, target)
        os.close(descriptor)


if __name__ == "__main__":
    serve()
