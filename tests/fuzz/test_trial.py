"""The harness sees what it is to see."""

from collections.abc import Iterator

import pytest

from .trial import Server, Trial, judge


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A server with little patience."""
    with Server(idle_limit=5) as server:
        yield server


@pytest.mark.parametrize(
    ("how", "kind"),
    [
        ("error: set/a.json is malformed", "ok"),
        ("error: a file is malformed", "unnamed"),
        ("error: a.json has \x1b[31mred", "control characters"),
        (f"error: a.json is {'x' * 1000}", "value printed whole"),
        ("usage: a.json", "wrong status"),
        ("fail", "traceback"),
        ("fill", "memory"),
        ("wait", "hang"),
    ],
)
def test_a_trial_is_judged(how, kind, server, tmp_path):
    trial = Trial([how], "nothing", ("a.json",), "misbehave")
    assert judge(trial, server.run(trial.call, trial.arguments, tmp_path), tmp_path)[0] == kind


def test_what_must_be_refused_is_not_used(server, tmp_path):
    trial = Trial(["help"], "nothing", refuse=True)
    assert judge(trial, server.run(trial.call, trial.arguments, tmp_path), tmp_path)[0] == "wrong status"
