"""A format of somebody's own: one module with its reader and writer, one YAML; and nothing in detkit names it."""

import sys
from pathlib import Path

import pytest

from detkit import cli
from detkit.data import formats
from detkit.registry import DATASETS, SPLIT_NAMES, WRITERS

README = Path(cli.__file__).parent / "data" / "README.md"
SECTION = README.read_text(encoding="utf-8").partition("## Adding a format")[2]
CSV_FORMAT = SECTION.partition("```python\n")[2].partition("```")[0]
CSV_YAML = SECTION.partition("```yaml\n")[2].partition("```")[0]


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with the two files; what they register is gone after the test."""
    (tmp_path / "csv_format.py").write_text(CSV_FORMAT)
    (tmp_path / "conf" / "data").mkdir(parents=True)
    (tmp_path / "conf" / "data" / "csv.yaml").write_text(CSV_YAML)
    for registry in (DATASETS, WRITERS):
        monkeypatch.setattr(registry, "_parts", dict(registry._parts))
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "csv_format", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def detkit(*arguments: str, monkeypatch: pytest.MonkeyPatch) -> None:
    task, *rest = arguments
    monkeypatch.setattr(sys, "argv", ["detkit", task, "--config-dir", "conf", "plugins=[csv_format]", *rest])
    try:
        cli.main()
    except SystemExit as stop:
        assert not stop.code


def test_a_set_is_written_read_and_trained_on(plugin, shapes_root, monkeypatch, capsys):
    shapes = ["data=shapes", f"data.root={shapes_root}"]
    detkit("convert_data", *shapes, "format=csv", "dst=set", monkeypatch=monkeypatch)
    assert "csv keeps no areas" in capsys.readouterr().out
    data = ["data=csv", "data.root=set"]
    small = ["model.width=0.0625", "image_size=64", "device=cpu", "workers=0", "batch_size=8"]
    detkit("train", *data, *small, "trainer.epochs=1", "run_dir=run", monkeypatch=monkeypatch)
    assert (plugin / "run" / "last.safetensors").is_file()
    mine, theirs = DATASETS.get("csv")("val", root="set"), DATASETS.get("shapes")("val", root=str(shapes_root))
    assert mine.boxes.tolist() == theirs.boxes.tolist()
    assert mine.class_names == theirs.class_names


def test_a_format_is_a_module_that_nothing_names():
    """Those of the package register themselves as it is imported, whatever they are called."""
    own = {name: part.__module__ for r in (DATASETS, WRITERS, SPLIT_NAMES) for name, part in r._parts.items()}
    assert {"coco", "yolo", "voc", "webdataset", "shapes"} <= own.keys()
    source = Path(formats.__file__).read_text()
    assert not [name for name in own if name in source]
