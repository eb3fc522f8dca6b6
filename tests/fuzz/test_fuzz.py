"""Changed files and command lines are used, or refused in a sentence; nothing else is raised, nothing hangs.

``pytest`` runs a few trials of each target, ``pytest -m fuzz tests/fuzz`` hundreds; a failure says how to repeat it.
"""

import shutil
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import pytest

from .material import make_material
from .targets import TARGETS
from .trial import KINDS, OK, Server, judge

FEW = {"commands": 14, "runs": 8}  # trials of the default run
DEFAULT_FEW = 6
SHOWN = 3  # trials of a kind that are shown, and whose files are kept


@dataclass
class Tally:
    """How trials ended: how many of each of KINDS, and those that went wrong, the like of them together."""

    counts: Counter[str] = field(default_factory=Counter)
    failures: dict[tuple[str, str], list[str]] = field(default_factory=lambda: defaultdict(list))

    def __str__(self) -> str:
        lines = [", ".join(f"{kind} {self.counts[kind]}" for kind in KINDS if self.counts[kind])]
        for (kind, where), trials in sorted(self.failures.items(), key=lambda item: -len(item[1])):
            lines += [f"\n{kind}, {len(trials)} times: {where}", *trials[:SHOWN]]
        return "\n".join(lines).encode(errors="backslashreplace").decode()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """The process that runs the trials."""
    with Server() as server:
        yield server


@pytest.fixture(scope="module")
def material(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sound files."""
    root = tmp_path_factory.mktemp("material")
    make_material(root, server)
    return root


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_some_trials(target, server, material, tmp_path):
    tally = run_trials(target, range(FEW.get(target, DEFAULT_FEW)), server, material, tmp_path)
    if tally.failures:
        pytest.fail(f"{target}: {tally}", pytrace=False)


@pytest.mark.fuzz
@pytest.mark.parametrize("target", TARGETS)
def test_many_trials(target, server, material, tmp_path, pytestconfig, record_property):
    first, count = pytestconfig.getoption("--fuzz-seed"), pytestconfig.getoption("--fuzz-trials")
    tally = run_trials(target, range(first, first + count), server, material, tmp_path)
    record_property("fuzz", f"{target:<12} {count} trials from seed {first}: {str(tally).splitlines()[0]}")
    if tally.failures:
        pytest.fail(f"{target}: {tally}", pytrace=False)


def run_trials(target: str, seeds: range, server: Server, material: Path, folder: Path) -> Tally:
    """Run a target's trials, each in a folder of its own, which stays where a trial failed."""
    tally = Tally()
    for seed in seeds:
        place = folder / f"{target}-{seed}"
        place.mkdir()
        trial = TARGETS[target](Random(f"{target} {seed}"), material, place)
        outcome = server.run(trial.call, trial.arguments, place)
        kind, where = judge(trial, outcome, place)
        tally.counts[kind] += 1
        trials = tally.failures[kind, where] if kind != OK else []
        if kind == OK or len(trials) == SHOWN:
            shutil.rmtree(place)
        if kind != OK:
            again = f"pytest -n 0 -m fuzz tests/fuzz -k {target} --fuzz-seed {seed} --fuzz-trials 1"
            words = [trial.what, f"{trial.call} {trial.arguments}", f"in {place}", again]
            more = outcome.stderr.splitlines() if len(seeds) == 1 else []
            trials.append("\n".join(f"    {line}" for line in words + more))
    return tally
