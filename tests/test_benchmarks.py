"""The benchmarks run and end with their line of JSON, on sizes of no interest."""

import json

import pytest

from detkit.benchmarks import akconv, reversible
from detkit.config import compose_config, resolve
from detkit.tasks import benchmark


def last_line(task: str, capsys: pytest.CaptureFixture) -> dict:
    result = benchmark.run(resolve(compose_config("benchmark", [f"task={task}", "rounds=1", "device=cpu"])))
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert line == json.loads(json.dumps(result))
    return line


def test_reversible(monkeypatch, capsys):
    monkeypatch.setattr(reversible, "COLUMNS", (1, 5))
    monkeypatch.setattr(reversible, "SIZE", 64)
    monkeypatch.setattr(reversible, "CHANNELS", (8, 8, 16, 16))
    monkeypatch.setattr(reversible, "ERROR_CHANNELS", (8, 8, 16, 16))
    rows = last_line("reversible", capsys)["columns"]["5"]
    assert (
        rows["keep_every=0"]["mib"] < rows["keep_every=4"]["mib"] < rows["keep_every=1"]["mib"] < rows["plain"]["mib"]
    )
    assert 0 < rows["keep_every=0"]["error"]["float32"] < 1e-4
    assert 0 < rows["keep_every=0"]["error"]["float64"] < 1e-9


def test_akconv_computes_what_gathering_does(monkeypatch, capsys):
    """The benchmark itself compares the outputs."""
    monkeypatch.setattr(akconv, "SIZE", 7)
    monkeypatch.setattr(akconv, "CHANNELS", 4)
    assert set(last_line("akconv", capsys)["ratio"]) == {"3", "5", "9"}
