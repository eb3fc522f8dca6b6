"""What predict, eval and check_data found is written, whatever names the files have and whatever goes wrong."""

import csv
import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from detkit.structures import Detections
from detkit.tasks import check_data
from detkit.tasks import eval as evaluation
from detkit.tasks.predictions import outputs
from tests.conftest import run_command

UNUSUAL_NAME = os.fsdecode(b"caf\xe9\n.jpg")  # neither UTF-8 nor one line
RECORDS = ("predictions.json", "predictions.csv")
TOOLS = Path(__file__).parents[1] / "tools"


@pytest.fixture
def images(tmp_path, shapes_root):
    """Return a function that makes a folder of images by their names."""

    def make(*names: str) -> Path:
        folder = tmp_path / "source"
        folder.mkdir()
        try:
            for name in names:
                shutil.copy(next((shapes_root / "images" / "val").iterdir()), folder / name)
        except OSError:
            pytest.skip("this file system takes no such names")
        return folder

    return make


def predict_arguments(run: Path, source: Path, out: Path) -> list[str]:
    return ["predict", f"ckpt={run / 'best.safetensors'}", f"source={source}", f"run_dir={out}", "device=cpu"]


def predicted(out: Path) -> list[str]:
    """The names of the images in ``predictions.json``."""
    return [Path(record["file"]).name for record in json.loads((out / "predictions.json").read_text())]


def no_room(*arguments: object) -> None:
    """Fail as writing a file on a full disk does; the path is among the arguments."""
    (path,) = (argument for argument in arguments if isinstance(argument, Path))
    raise OSError(errno.ENOSPC, "No space left on device", str(path))


def test_predicting_a_broken_image_loses_no_other(finished_run, images, tmp_path, monkeypatch, capsys):
    source, out = images("b.jpg"), tmp_path / "out"
    (source / "a.jpg").write_bytes(b"broken")
    (source / "c.jpg").mkdir()
    status, output, error = run_command(monkeypatch, capsys, *predict_arguments(finished_run, source, out))
    assert status == 2
    assert "cannot read image" in error
    assert "a.jpg" in output and "c.jpg" in output
    assert {p.name for p in out.iterdir()} == {"b.jpg", *RECORDS}
    assert predicted(out) == ["b.jpg"]


def test_images_of_one_stem_get_different_names(finished_run, images, tmp_path, monkeypatch, capsys):
    source, out = images("a.jpg", "a.jpeg", "a.jpg.jpg", "[b].jpg"), tmp_path / "out"
    status, _, _ = run_command(monkeypatch, capsys, *predict_arguments(finished_run, source, out))
    assert status == 0
    drawn = {"a.jpg.jpg", "a.jpeg.jpg", "a.jpg.jpg.jpg", "[b].jpg"}
    assert {p.name for p in out.iterdir()} == {*drawn, *RECORDS}


def test_predicting_a_name_that_is_not_utf8(finished_run, images, tmp_path, monkeypatch, capsys):
    source, out = images(UNUSUAL_NAME), tmp_path / "out"
    status, output, _ = run_command(monkeypatch, capsys, *predict_arguments(finished_run, source, out))
    assert status == 0
    assert r"caf\udce9\n.jpg" in output
    assert predicted(out) == [UNUSUAL_NAME]
    assert cv2.imdecode(np.fromfile(out / UNUSUAL_NAME, np.uint8), cv2.IMREAD_COLOR) is not None


@pytest.mark.parametrize(
    ("error", "status", "names"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), 2, ["a.jpg", "b.jpg", "c.jpg"]),
        (KeyboardInterrupt(), 130, ["a.jpg", "b.jpg"]),
    ],
)
def test_predictions_so_far_are_written(error, status, names, finished_run, images, tmp_path, monkeypatch, capsys):
    source, out = images("a.jpg", "b.jpg", "c.jpg"), tmp_path / "out"
    save = outputs.save_drawn

    def save_or_fail(path: Path, image: np.ndarray, found: Detections) -> None:
        if path.name == "b.jpg":
            raise error
        save(path, image, found)

    monkeypatch.setattr(outputs, "save_drawn", save_or_fail)
    arguments = [*predict_arguments(finished_run, source, out), "batch_size=1", "workers=0"]
    found, _, message = run_command(monkeypatch, capsys, *arguments)
    assert found == status
    assert predicted(out) == names
    if status == 2:
        assert f"cannot write {out / 'b.jpg'}: No space left" in message
        assert (out / "c.jpg").exists()


def test_predictions_replace_drawn_images_on_a_full_disk(finished_run, images, tmp_path, monkeypatch, capsys):
    source, out = images("a.jpg", "b.jpg", "c.jpg"), tmp_path / "out"
    write = os.pwrite

    def write_if_empty(descriptor: int, data: bytes, position: int) -> int:
        if list(out.glob("*.jpg")):
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, data, position)

    monkeypatch.setattr(os, "pwrite", write_if_empty)
    arguments = predict_arguments(finished_run, source, out)
    status, _, _ = run_command(monkeypatch, capsys, *arguments, "batch_size=1", "workers=0")
    assert status == 0
    assert predicted(out) == ["a.jpg", "b.jpg", "c.jpg"]
    assert {p.name for p in out.iterdir()} == {"c.jpg", *RECORDS}
    monkeypatch.setattr(os, "pwrite", lambda *_: no_room(out))
    arguments = predict_arguments(finished_run, source, tmp_path / "full")
    status, _, error = run_command(monkeypatch, capsys, *arguments)
    assert status == 2
    assert f"{tmp_path / 'full' / 'predictions.json'}: No space left on device" in error


@pytest.mark.parametrize("kind", ["pipe", "circle", "nothing"])
def test_a_source_that_is_no_image_is_a_message(kind, finished_run, tmp_path, monkeypatch, capsys):
    source = tmp_path / "source.jpg"
    if kind == "pipe":
        os.mkfifo(source)
    elif kind == "circle":
        source.symlink_to(source)
    arguments = predict_arguments(finished_run, source, tmp_path / "out")
    status, _, error = run_command(monkeypatch, capsys, *arguments)
    assert status == 2
    assert f"source {source}" in error
    assert len(error.strip().splitlines()) == 1


@pytest.mark.parametrize("task", ["eval", "check_data"])
def test_a_full_disk_is_a_message_after_the_results(task, finished_run, shapes_root, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(*((evaluation, "save_figure") if task == "eval" else (check_data, "plot_set")), no_room)
    what = [f"ckpt={finished_run / 'best.safetensors'}"] if task == "eval" else [f"data.root={shapes_root}"]
    status, output, error = run_command(monkeypatch, capsys, task, *what, f"run_dir={tmp_path / 'out'}", "workers=0")
    assert status == 2
    assert error.startswith("error: ") and f"{tmp_path / 'out'}" in error and "No space left on device" in error
    assert len(error.strip().splitlines()) == 1
    assert "circle" in output  # the table of classes
    assert (tmp_path / "out" / ("metrics.json" if task == "eval" else "findings.csv")).exists()


def test_check_data_speaks_to_an_ascii_terminal(images, shapes_root, tmp_path):
    source = images(UNUSUAL_NAME)
    shutil.copytree(shapes_root, tmp_path / "set")
    annotations = tmp_path / "set" / "annotations" / "instances_train.json"
    content = json.loads(annotations.read_text())
    content["images"].append({"id": 10**6, "file_name": UNUSUAL_NAME, "height": 1, "width": 1})
    annotations.write_text(json.dumps(content))
    shutil.copy(source / UNUSUAL_NAME, tmp_path / "set" / "images" / "train" / UNUSUAL_NAME)
    out = tmp_path / "out"
    command = [sys.executable, TOOLS / "check_data.py", "data=coco", f"data.root={tmp_path / 'set'}", f"run_dir={out}"]
    ascii_only = {**os.environ, "PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONUTF8": "0"}
    result = subprocess.run([*command, "workers=0"], env=ascii_only, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 2, result.stderr
    assert r"caf\udce9\n.jpg" in result.stdout
    assert result.stdout.isascii()
    assert len(list((out / "plots").iterdir())) == 5
    with (out / "findings.csv").open(encoding="utf-8", newline="") as file:
        assert any(r"caf\udce9\n.jpg" in row["file"] for row in csv.DictReader(file))
