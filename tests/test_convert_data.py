"""Any format into any other: the same boxes; what a format cannot represent is reported."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from detkit.data.formats.coco import read_coco
from detkit.data.formats.voc import read_voc
from detkit.data.formats.writing import write_set
from detkit.data.formats.yolo import read_yolo
from detkit.errors import DetkitError
from detkit.ops.image import read_bytes
from detkit.registry import DATASETS, WRITERS
from detkit.tasks.runs.data import train_command
from tests.conftest import run_command

FORMATS = ("coco", "voc", "webdataset", "yolo")
CLASSES = [{"id": 7, "name": "zebra crossing"}, {"id": 90, "name": "Ämpel & <Co>"}]  # order and gaps of their own
NAMES = ("day/a b.png", "night/a b.png", "night/ü.jpg", ".odd\nname.PNG", "A B.bmp")


def draw_coco(root: Path) -> Path:
    """A COCO set: equal names in two folders, unusual names, polygons without bbox, a crowd, an image without boxes."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        images, annotations = [], []
        for k, name in enumerate(NAMES):
            file = root / "images" / split / name
            file.parent.mkdir(parents=True, exist_ok=True)
            w, h = 97 + 13 * k, 61 + 7 * k
            Image.fromarray(rng.integers(0, 255, (h, w, 3), np.uint8)).save(file)
            images.append({"id": 40 - k, "file_name": name, "width": w, "height": h})
            for label in (7, 90) if k != 2 else ():
                corners = (rng.uniform(0, 1, (5, 2)) * (w, h)).ravel().tolist()
                record = {"id": len(annotations), "image_id": 40 - k, "category_id": label, "segmentation": [corners]}
                annotations.append(record)
        whole = {"bbox": [0, 0, 97, 61], "area": 1000.5, "iscrowd": 1}
        annotations.append({"id": 99, "image_id": 40, "category_id": 7, **whole})
        file = root / "annotations" / f"instances_{split}.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps({"images": images, "annotations": annotations, "categories": CLASSES}))
    return root


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """The drawn set in every format: name -> the keys of data that read it."""
    root = draw_coco(tmp_path_factory.mktemp("sets") / "drawn")
    splits = {split: read_coco(split, root=str(root)) for split in ("train", "val")}
    return {"drawn": {"name": "coco", "root": str(root)}} | {
        form: write_set(form, splits, root.parent / form).data for form in FORMATS
    }


def content(data: dict[str, str], split: str, crowds: bool) -> list:
    """What a set holds, whatever its order: for each image its pixels, size, and boxes with names."""
    a = DATASETS.build(data, split)
    assert not a.issues.summary()
    images = []
    for k in range(len(a)):
        rows = a.rows(k)
        boxes = [
            (a.class_names[label], bool(crowd), *box)
            for label, crowd, box in zip(a.labels[rows], a.crowd[rows], a.boxes[rows].tolist(), strict=True)
            if crowds or not crowd
        ]
        images.append((read_bytes(a.paths[k]).tobytes(), tuple(a.sizes[k].tolist()), boxes))
    return images


@pytest.mark.parametrize("target", FORMATS)
@pytest.mark.parametrize("source", ("drawn", *FORMATS))
def test_any_format_into_any_other_keeps_images_and_boxes(sets, source, target, tmp_path):
    splits = {split: DATASETS.build(sets[source], split) for split in ("train", "val")}
    written = write_set(target, splits, tmp_path / "out")
    crowds = "yolo" not in (source, target)
    for split in splits:
        before, after = content(sets["drawn"], split, crowds), content(written.data, split, crowds)
        before, after = sorted(before), sorted(after)  # by the images' bytes
        assert [image[:2] for image in after] == [image[:2] for image in before]
        for (*_, boxes), (*_, expected) in zip(after, before, strict=True):
            assert [box[:2] for box in boxes] == [box[:2] for box in expected]
            numbers, wanted = (np.array([box[2:] for box in rows]).reshape(-1, 4) for rows in (boxes, expected))
            np.testing.assert_allclose(numbers, wanted, rtol=1e-9, atol=1e-7)
    assert sum("crowds" in warning for warning in written.warnings) == (
        target == "yolo" and crowds is False and source != "yolo"
    )


def test_coco_keeps_ids_areas_and_the_order_of_classes(sets, tmp_path):
    before = read_coco("val", root=sets["drawn"]["root"])
    after = DATASETS.build(sets["coco"], "val")
    assert after.class_names == before.class_names
    assert after.category_ids == before.category_ids == (7, 90)
    assert after.image_ids.tolist() == [40, 39, 38, 37, 36]
    np.testing.assert_allclose(after.areas, before.areas)
    for line, record in enumerate(Path(sets["coco"]["root"], "annotations/instances_val.json").read_text().split("\n")):
        assert line == 0 or record.startswith(("{", "]", '"')) or not record  # a record a line, for findings


def test_yolo_counts_classes_from_0_and_voc_says_that_it_loses_their_order(sets):
    file = Path(sets["yolo"]["yaml"])
    assert yaml.safe_load(file.read_text())["names"] == {0: "zebra crossing", 1: "Ämpel & <Co>"}
    assert read_voc("val", root=sets["voc"]["root"]).class_names == ("zebra crossing", "Ämpel & <Co>")
    splits = {"train": read_yolo("train", yaml=str(file))}
    splits["train"].class_names = ("zebra", "aardvark")
    (warning,) = write_set("voc", splits, file.parent.parent / "sorted").warnings
    assert "no list of classes" in warning and "2 of 2" in warning


def test_file_names_are_safe_are_unique(sets):
    names = sorted(path.name for path in Path(sets["voc"]["root"], "JPEGImages").iterdir())
    assert len(names) == 2 * len(NAMES)
    assert {"a_b.png", "a_b-2.png", "A_B-3.bmp", "odd_name.PNG", "ü.jpg"} < set(names)
    assert len({Path(name).stem.casefold() for name in names}) == len(names)


def test_images_are_copied_where_they_cannot_be_linked(sets, tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(18, "another disk")

    splits = {"train": read_coco("train", root=sets["drawn"]["root"])}
    write_set("coco", splits, tmp_path / "linked")
    monkeypatch.setattr(os, "link", refuse)
    write_set("coco", splits, tmp_path / "copied")
    for folder, links in (("linked", True), ("copied", False)):
        files = sorted((tmp_path / folder / "images" / "train").iterdir())
        assert all((file.stat().st_nlink > 1) == links for file in files)
        assert {file.read_bytes() for file in files} == {path.read_bytes() for path in splits["train"].paths}


def test_a_class_name_that_voc_cannot_hold_is_refused(sets, tmp_path):
    splits = {"train": read_coco("train", root=sets["drawn"]["root"])}
    splits["train"].class_names = ("cat ", "dog")
    with pytest.raises(DetkitError, match="cannot hold the class name 'cat '"):
        write_set("voc", splits, tmp_path / "out")


def test_the_command_prints_how_to_train(sets, tmp_path, monkeypatch, capsys):
    arguments = ["data=coco", f"data.root={sets['drawn']['root']}", "format=yolo", f"dst={tmp_path / 'my set'}"]
    status, out, _ = run_command(monkeypatch, capsys, "convert_data", *arguments)
    assert status == 0
    yaml_file = tmp_path / "my set" / "data.yaml"
    assert "warning: YOLO txt cannot represent crowds: 2 of them" in out
    assert out.endswith(f"python tools/train.py data=yolo 'data.yaml=\"{yaml_file}\"'\n")
    assert read_yolo("train", yaml=str(yaml_file)).class_names == ("zebra crossing", "Ämpel & <Co>")
    assert train_command({"name": "voc", "root": "/a/b-1"}) == "python tools/train.py data=voc data.root=/a/b-1"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("dst=full", "full is not an empty folder"),
        ("dst=full/file", "file is not an empty folder"),
        ("dst=full/file/below", "cannot write"),
        ("format=yollo", "unknown format 'yollo': known are coco"),
        ("data.root=/nowhere", "data.root=/nowhere is not a folder"),
        ("data=voc", "has no folder Annotations"),
    ],
)
def test_mistakes_are_one_error_message(sets, tmp_path, monkeypatch, capsys, change, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    arguments = ["data=coco", f"data.root={sets['drawn']['root']}", "format=coco", "dst=new", change]
    status, _, error = run_command(monkeypatch, capsys, "convert_data", *arguments)
    assert status == 2
    assert message in error and len(error.strip().splitlines()) == 1
    assert (tmp_path / "full" / "file").read_text() == "mine"


def test_a_disk_that_refuses_is_one_error_message(sets, tmp_path, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("detkit.data.formats.writing.os.link", refuse)
    monkeypatch.setattr("detkit.data.formats.writing.shutil.copyfileobj", refuse)
    splits = {"train": read_coco("train", root=sets["drawn"]["root"])}
    with pytest.raises(DetkitError, match=r"No space left on device; .* is incomplete, remove it"):
        write_set("yolo", splits, tmp_path / "out")


def test_every_format_that_is_written_is_read():
    assert set(FORMATS) == set(WRITERS.names()) < set(DATASETS.names())
