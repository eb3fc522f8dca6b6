"""Mutated files and command lines are used, or refused in a sentence; nothing else is raised, nothing hangs.

``pytest`` runs a few trials of each target, ``pytest -m fuzz tests/fuzz`` hundreds; a failure says how to repeat it.
"""

import shutil
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from .material import make_material
from .targets import TARGETS
from .trial import KINDS, OK, Server, judge

SHOWN = 3  # failures of a kind that are shown in full
FEW = {"commands": 40}
DEFAULT_FEW = 18


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


@pytest.mark.parametrize("target", TARGETS)
def test_some_trials(target, server, material, tmp_path):
    run_trials(target, range(FEW.get(target, DEFAULT_FEW)), server, material, tmp_path)


@pytest.mark.fuzz
@pytest.mark.parametrize("target", TARGETS)
def test_many_trials(target, server, material, tmp_path, pytestconfig, record_property):
    first, count = pytestconfig.getoption("--fuzz-seed"), pytestconfig.getoption("--fuzz-trials")
    counts: Counter[str] = Counter()
    record_property("fuzz", [target, first, count, counts])
    run_trials(target, range(first, first + count), server, material, tmp_path, counts)


def run_trials(
    target: str, seeds: range, server: Server, material: Path, folder: Path, counts: Counter[str] | None = None
) -> None:
    """Run a target's trials and fail with those that went wrong, the like of them together."""
    failures: dict[tuple[str, str], list[str]] = defaultdict(list)
    counts = Counter() if counts is None else counts
    for seed in seeds:
        place = folder / f"{target}-{seed}"
        place.mkdir()
        trial = TARGETS[target](Random(f"{target} {seed}"), material, place)
        outcome = server.run(trial.call, trial.arguments, place)
        kind, where = judge(trial, outcome, place)
        counts[kind] += 1
        if kind == OK:
            shutil.rmtree(place)
            continue
        like = failures[kind, where]
        again = f"pytest -n 0 -m fuzz tests/fuzz -k '{target}' --fuzz-seed {seed} --fuzz-trials 1"
        like.append(
            f"    {trial.what}\n    {trial.call} {trial.arguments}\n    {again}".encode(errors="replace").decode()
        )
        if len(like) > SHOWN:
            shutil.rmtree(place)
    table = ", ".join(f"{kind} {counts[kind]}" for kind in KINDS if counts[kind])
    words = [
        f"{kind}, {len(like)} times: {where}\n" + "\n".join(like[:SHOWN])
        for (kind, where), like in sorted(failures.items(), key=lambda item: (item[0][0], -len(item[1])))
    ]
    if words:
        pytest.fail(
            f"{target}, seeds {seeds.start} to {seeds.stop - 1}: {table}\n\n" + "\n\n".join(words), pytrace=False
        )
