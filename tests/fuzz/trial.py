"""Running a trial, and judging how it ended."""

import json
import os
import re
import subprocess
import sys
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import detkit

MEMORY_LIMIT = 3 * 2**30  # bytes that a trial may occupy; importing detkit takes half a GiB
LINE_LIMIT = 700  # characters of an error without the folder's name
OUTPUT_LIMIT = 50_000  # characters of all that a trial prints
NO_MEMORY = "MemoryError|bad_alloc|allocate memory|not enough memory: you tried|Unable to allocate"
TABLES = {"check_data": 2, "check": 1, "tune": 1}  # exit status of tasks whose tables say what is wrong
OK = "ok"
KINDS = (OK, "traceback", "hang", "memory", "unnamed", "value printed whole", "control characters", "wrong status")


@dataclass(frozen=True)
class Trial:
    """What is run, and what a refusal must say.

    Attributes:
        arguments: of the ``detkit`` command, or of the function in probes.py that ``call`` names.
        what: what was changed, in words.
        named: one of these must be in the sentence; none: any sentence will do.
        refuse: whether using what was changed is wrong.
    """

    arguments: list[str]
    what: str
    named: tuple[str, ...] = ()
    call: str = "cli"
    refuse: bool = False


@dataclass(frozen=True)
class Outcome:
    """How a process ended: exit status (a signal's number negative), what it printed, what it took."""

    status: int
    hanging: bool
    resident: int
    cpu: float
    seconds: float
    stdout: str
    stderr: str = field(repr=True)


class Server:
    """The process that forks trials, see server.py; a context manager.

    Args:
        idle_limit: seconds after which a trial that does not compute is taken for hanging.
    """

    def __init__(self, idle_limit: float = 20) -> None:
        package = str(Path(detkit.__file__).parents[1])
        environment = {
            "PYTHONPATH": package,
            "OMP_NUM_THREADS": "1",
            "NO_ALBUMENTATIONS_UPDATE": "1",
            "MPLBACKEND": "agg",
        }
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("server.py")), str(idle_limit)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | environment | {"COLUMNS": "120"},
            text=True,
        )
        assert self._answer()["ready"]

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.stdin.close()
        self.process.wait()

    def run(self, call: str, arguments: list[str], folder: Path) -> Outcome:
        """Run a command in a folder, where its ``stdout`` and ``stderr`` stay."""
        request = {"call": call, "arguments": arguments, "folder": str(folder)}
        print(json.dumps(request), file=self.process.stdin, flush=True)
        answer = self._answer()
        texts = {name: (folder / name).read_bytes().decode(errors="surrogateescape") for name in ("stdout", "stderr")}
        return Outcome(**answer, **texts)

    def _answer(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        assert line, f"the server has ended with status {self.process.wait()}"
        return json.loads(line)


def judge(trial: Trial, outcome: Outcome, folder: Path) -> tuple[str, str]:
    """Return of which of KINDS an outcome is, and the words or the place that show it."""
    output = outcome.stdout + outcome.stderr
    task = trial.arguments[0] if trial.call == "cli" else ""
    if outcome.hanging:
        return "hang", f"killed after {outcome.cpu:.0f} s of computing"
    if outcome.status != 2 and re.search(NO_MEMORY, outcome.stderr):
        return "memory", _place(outcome.stderr)
    if outcome.resident > MEMORY_LIMIT:
        return "memory", f"{outcome.resident / 2**30:.1f} GiB"
    if "Traceback (most recent call last)" in output or outcome.status < 0:
        return "traceback", _place(outcome.stderr) if outcome.status >= 0 else f"signal {-outcome.status}"
    if (folder / "executed").exists():
        return "wrong status", "code in a file was executed"
    for line in output.split("\n"):
        if any(unicodedata.category(c) in ("Cc", "Cs") and c != "\t" for c in line):
            return "control characters", f"{line!r:.200}"
    if len(output) > OUTPUT_LIMIT:
        return "value printed whole", f"{len(output)} characters: {output[:100]!r}"
    if outcome.status == 0:
        return ("wrong status", "it was used") if trial.refuse else (OK, "")
    if outcome.status == TABLES.get(task) and outcome.stdout and "error: " not in outcome.stderr:
        return OK, ""
    sentences = [line for line in outcome.stderr.split("\n") if line.startswith("error: ")]  # libraries say more
    if outcome.status != 2 or len(sentences) != 1:
        return "wrong status", f"status {outcome.status}: {(outcome.stderr or outcome.stdout)[-200:]!r}"
    sentence = sentences[0].replace(str(folder), "")
    if len(sentence) > LINE_LIMIT:
        return "value printed whole", f"{len(sentence)} characters: {sentence[:200]}"
    if trial.named and not any(name in sentence for name in trial.named):
        return "unnamed", sentence[:300]
    return OK, ""


def _place(stderr: str) -> str:
    """Return where in detkit a traceback comes from, and what it says."""
    frames = re.findall(r'File "[^"]*/(?:detkit|fuzz)/([\w/]+\.py)", line \d+, in (\w+)', stderr)
    said = [line for line in stderr.rpartition('  File "')[2].splitlines()[1:] if line and not line.startswith(" ")]
    return f"{':'.join(frames[-1]) if frames else '?'}: {(said or ['?'])[0][:160]}"
