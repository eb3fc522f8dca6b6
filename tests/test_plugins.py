"""Parts and commands from outside the package, two files each: those that detkit/README.md shows, and no others."""

import csv
import re
import subprocess
import sys
from pathlib import Path

import pytest

from detkit import cli

README = Path(cli.__file__).parent / "README.md"


def blocks_of(heading: str, language: str) -> list[str]:
    """The code blocks of a language in a section of the README."""
    section = README.read_text(encoding="utf-8").partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    return re.findall(rf"^```{language}\n(.*?)^```", section, re.MULTILINE | re.DOTALL)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def detkit(folder: Path, *arguments: str) -> tuple[int, str, str]:
    """Run the command line in a folder; returns the exit status and what it printed."""
    command = [sys.executable, "-c", "from detkit.cli import main; main()", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.slow
def test_a_neck(tmp_path):
    (code,), (values,) = blocks_of("Adding a neck", "python"), blocks_of("Adding a neck", "yaml")
    write(tmp_path / "my_neck.py", code)
    write(tmp_path / "my_configs" / "neck" / "my_fpn.yaml", values)
    part = ["--config-dir", "my_configs", "neck=my_fpn", "plugins=[my_neck]"]
    status, out, err = detkit(tmp_path, "check", *part, "model.width=0.0625", "image_size=64", "device=cpu")
    assert (status, err) == (0, "")
    assert "as declared" in out


@pytest.fixture
def count_boxes(tmp_path, shapes_root):
    """Runs the README's command in a folder of its own."""
    (code,), (values,) = blocks_of("Adding a command", "python"), blocks_of("Adding a command", "yaml")
    write(tmp_path / "my_tasks" / "count_boxes.py", code)
    write(tmp_path / "my_tasks" / "count_boxes.yaml", values)

    return lambda *arguments: detkit(tmp_path, "my_tasks/count_boxes.py", f"data.root={shapes_root}", *arguments)


def test_a_command(count_boxes):
    status, out, err = count_boxes()
    assert (status, err) == (0, "")
    counts = {name: int(count) for name, count in (line.split(": ") for line in out.splitlines())}
    assert set(counts) == {"circle", "square", "triangle", "star", "cross"}
    assert count_boxes(f"min_count={max(counts.values())}")[1].count("\n") == 1


def test_flags_may_follow_its_arguments(count_boxes):
    status, out, _ = count_boxes("min_count=7", "--cfg", "job", "seed=3")
    assert status == 0
    assert "min_count: 7" in out
    assert "seed: 3" in out


@pytest.mark.slow
def test_a_sweep_of_a_command_has_a_column_for_each_number_that_it_returns(count_boxes, tmp_path):
    status, _, err = count_boxes("hydra.sweep.dir=sweep", "-m", "min_count=1,1000")
    assert (status, err) == (0, "")
    with (tmp_path / "sweep" / "sweep.csv").open(newline="") as file:
        first, second = csv.DictReader(file)
    assert int(first["circle"]) > 0
    assert second["circle"] == ""


@pytest.mark.parametrize(
    ("argument", "message"),
    [("min_cuont=1", "did you mean 'min_count'"), ("min_count=few", "min_count=few must be a whole number")],
)
def test_a_mistake_in_its_arguments(count_boxes, argument, message):
    status, _, err = count_boxes(argument)
    assert status == 2
    assert message in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (None, "does not exist"),
        ("x = (", "SyntaxError"),
        ("def walk(cfg): ...", "no function run"),
        ("def run(cfg): ...", "annotated"),
        ("def run(cfg: 'Nowhere'): ...", "annotated"),
    ],
)
def test_a_file_that_is_no_command(tmp_path, monkeypatch, capsys, code, message):
    if code is not None:
        write(tmp_path / "no_command.py", code)
    monkeypatch.setattr(sys, "argv", ["detkit", str(tmp_path / "no_command.py")])
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    sys.modules.pop("no_command", None)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
