"""A format of somebody's own: one module with its reader and writer, one YAML; and nothing in detkit names it."""

import sys
from pathlib import Path

import pytest

from detkit import cli
from detkit.data import formats
from detkit.registry import DATASETS, SPLIT_NAMES, WRITERS

CSV_FORMAT = '''
"""Boxes in SPLIT.csv, a line each: image,label,x1,y1,x2,y2 in pixels; classes.txt has a name a line."""

import csv
from pathlib import Path

from detkit.data.builder import AnnotationBuilder
from detkit.data.formats.writing import WriteResult, file_names, place_images
from detkit.data.index import cached
from detkit.registry import DATASETS, WRITERS


@DATASETS.register("csv")
def read_csv(split, *, root, delimiter=",", log=None):
    folder = Path(root)
    file = folder / f"{split}.csv"

    def build(log):
        names = (folder / "classes.txt").read_text().split()
        builder = AnnotationBuilder(file, log, names, range(len(names)))
        images = {}
        with file.open(newline="") as stream:
            for line, (name, label, *xyxy) in enumerate(csv.reader(stream, delimiter=delimiter), 1):
                if name not in images:
                    images[name] = builder.add_image(folder / "images" / name, len(images) + 1)
                if label:
                    builder.add_box(images[name], int(label), [*map(float, xyxy)], line)
        return builder.build(lambda image, line, position: (file, line, ""))

    return cached("csv", [file, folder / "classes.txt"], [folder / "images"], [], log, build)


@WRITERS.register("csv")
def write_csv(splits, folder):
    for (split, annotations), names in zip(splits.items(), file_names(splits), strict=True):
        place_images(annotations, names, folder / "images")
        with (folder / f"{split}.csv").open("w", newline="") as stream:
            writer = csv.writer(stream)
            for image, name in enumerate(names):
                rows = annotations.rows(image)
                boxes = zip(annotations.labels[rows].tolist(), annotations.boxes[rows].tolist(), strict=True)
                writer.writerows([name, label, *box] for label, box in boxes)
                if rows.start == rows.stop:
                    writer.writerow([name, "", "", "", "", ""])
        (folder / "classes.txt").write_text("\\n".join(annotations.class_names))
    return WriteResult({"name": "csv", "root": str(folder)}, ["csv keeps no areas"])
'''
CSV_YAML = 'defaults: [base/options@_here_, _self_]\nname: csv\nroot: ???\ndelimiter: ","\n'


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
