"""Every split of a set is known by its name, read, checked, converted and evaluated."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from detkit.data.formats.writing import write_set
from detkit.data.splits import MissingSplit, held_out_first, splits_of
from detkit.errors import DetkitError
from detkit.registry import DATASETS, SPLIT_NAMES
from tests.conftest import run_command

FORMATS = ("coco", "voc", "webdataset", "yolo")
SPLITS = ("train", "val", "test", "holdout")
CLASSES = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
BOX = {"bbox": [4, 4, 16, 12]}


def draw(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (24, 32, 3), np.uint8)).save(path)


def draw_coco(root: Path, splits: tuple[str, ...] = SPLITS, empty: tuple[str, ...] = ()) -> Path:
    """A COCO set of two images per split, with a box each, or none in the ``empty`` splits."""
    for k, split in enumerate(splits):
        images, annotations = [], []
        for n in range(2):
            draw(root / "images" / split / f"{split}{n}.png", 10 * k + n)
            images.append({"id": n, "file_name": f"{split}{n}.png", "width": 32, "height": 24})
            annotations.append({"id": n, "image_id": n, "category_id": 1 + n, **BOX})
        content = {"images": images, "annotations": [] if split in empty else annotations, "categories": CLASSES}
        file = root / "annotations" / f"instances_{split}.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(content))
    return root


def draw_yolo(root: Path, text: str, **folders: int) -> Path:
    """A YOLO set with so many labelled images in each folder; ``text`` is its data.yaml."""
    for k, (folder, count) in enumerate(folders.items()):
        for n in range(count):
            draw(root / "images" / folder / f"{folder}{n}.png", 10 * k + n)
            label = root / "labels" / folder / f"{folder}{n}.txt"
            label.parent.mkdir(parents=True, exist_ok=True)
            label.write_text("0 0.5 0.5 0.2 0.2\n")
    (root / "data.yaml").write_text(text)
    return root / "data.yaml"


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> dict[str, dict[str, str]]:
    """A set of four splits in every format: name -> the keys of data that read it."""
    root = draw_coco(tmp_path_factory.mktemp("splits") / "drawn")
    drawn = {"name": "coco", "root": str(root)}
    splits = {split: DATASETS.build(drawn, split) for split in splits_of(drawn)}
    return {form: write_set(form, splits, root.parent / form).data for form in FORMATS}


def arguments(data: dict[str, str]) -> list[str]:
    """The arguments of a command that reads a set."""
    return [f"data={data['name']}", *(f"data.{key}={value}" for key, value in data.items() if key != "name")]


def content(data: dict[str, str]) -> dict[str, list]:
    """Pixels and boxes of every split."""
    found = {}
    for split in splits_of(data):
        a = DATASETS.build(data, split)
        found[split] = sorted((path.stem, a.boxes[a.rows(k)].round(6).tolist()) for k, path in enumerate(a.paths))
    return found


def test_every_format_lists_its_splits():
    assert set(SPLIT_NAMES.names()) == set(DATASETS.names())
    assert splits_of({"name": "shapes", "root": None}) == ["train", "val"]
    assert held_out_first(["train", "extra", "val", "test"]) == ["test", "val", "extra", "train"]


@pytest.mark.parametrize(("source", "target"), [*zip(FORMATS, (*FORMATS[1:], FORMATS[0]), strict=True)])
def test_conversion_keeps_every_split(sets, source, target, tmp_path, monkeypatch, capsys):
    dst = tmp_path / "new"
    status, out, error = run_command(
        monkeypatch, capsys, "convert_data", *arguments(sets[source]), f"format={target}", f"dst={dst}"
    )
    assert status == 0, error
    assert all(f"{split}: 2 images, 2 boxes" in out for split in SPLITS)
    data = {"name": target} | ({"yaml": str(dst / "data.yaml")} if target == "yolo" else {"root": str(dst)})
    after, before = content(data), content(sets["coco"])
    assert after.keys() == before.keys() == set(SPLITS)
    strip = (lambda rows: [row[1] for row in rows]) if "webdataset" in (source, target) else (lambda rows: rows)
    assert {split: strip(rows) for split, rows in after.items()} == {s: strip(rows) for s, rows in before.items()}


def test_a_written_data_yaml_is_read_from_its_own_folder(sets, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = yaml.safe_load(Path(sets["yolo"]["yaml"]).read_text())
    assert text == {split: f"images/{split}" for split in SPLITS} | {"names": {0: "cat", 1: "dog"}}
    assert len(DATASETS.build(sets["yolo"], "test")) == 2
    splits = {"names": DATASETS.build(sets["yolo"], "test")}
    with pytest.raises(DetkitError, match="cannot hold a split named 'names'"):
        write_set("yolo", splits, tmp_path / "new")


@pytest.mark.parametrize("form", FORMATS)
def test_an_unknown_split_is_a_message_that_lists_them(sets, form):
    with pytest.raises(DetkitError, match=r"no split 'tests': it has train, val, .*test.*; did you mean 'test'"):
        DATASETS.build(sets[form], "tests")
    assert len(DATASETS.build(sets[form], "valid")) == 2  # as some tools call it


def test_evaluation_of_any_split(finished_run, shapes_root, tmp_path, monkeypatch, capsys):
    for folder in ("images", "annotations"):
        (tmp_path / folder).mkdir()
    for split, name in (("train", "train"), ("val", "val"), ("val", "test"), ("train", "odd one")):
        (tmp_path / "images" / name).symlink_to(shapes_root / "images" / split)
        file = tmp_path / "annotations" / f"instances_{name}.json"
        file.write_bytes((shapes_root / "annotations" / f"instances_{split}.json").read_bytes())
    command = ["eval", f"ckpt={finished_run / 'last.safetensors'}", "data=coco", f"data.root={tmp_path}", "workers=0"]
    for split, count in (("test", 10), ("'odd one'", 24)):
        run_dir = f"run_dir={tmp_path / split.strip(chr(39))}"
        status, out, error = run_command(monkeypatch, capsys, *command, f"split={split}", run_dir)
        assert status == 0 and f" on {count} images" in out, error
    for split, message in (("tset", "it has train, val, test, odd one; did you mean 'test'"), ("", "split= must be")):
        status, _, error = run_command(monkeypatch, capsys, *command, f"split={split}", f"run_dir={tmp_path / 'no'}")
        assert status == 2
        assert message in error and len(error.strip().splitlines()) == 1


@pytest.mark.parametrize("form", ["coco", "coco without classes", "yolo", "voc"])
def test_images_without_labels_go_along(sets, form, tmp_path, monkeypatch, capsys):
    name = form.split()[0]
    splits = {split: DATASETS.build(sets["coco"], split) for split in ("train", "val", "test")}
    data = write_set(name, splits, tmp_path / "set").data
    if name == "coco":
        file = tmp_path / "set/annotations/instances_test.json"
        record = json.loads(file.read_text())
        keys = ("images",) if "without" in form else ("images", "categories")
        file.write_text(json.dumps({key: record[key] for key in keys}))
    for file in [*tmp_path.glob("set/labels/test/*.txt"), *tmp_path.glob("set/Annotations/test*.xml")]:
        file.unlink()
    copy = [f"fix={tmp_path / 'copy'}", "format=coco", f"run_dir={tmp_path / 'run'}", "workers=1"]
    status, out, error = run_command(monkeypatch, capsys, "check_data", *arguments(data), *copy)
    assert status == 0, out + error
    assert "splits without any box, which cannot be evaluated: 1 in test" in out
    assert "2 test images with 0 boxes" in out and "no errors" in out
    for target in ("webdataset", "yolo"):
        dst = tmp_path / target
        run_command(monkeypatch, capsys, "convert_data", *arguments(data), f"format={target}", f"dst={dst}")
        written = {"name": target} | ({"yaml": str(dst / "data.yaml")} if target == "yolo" else {"root": str(dst)})
        assert {split: len(DATASETS.build(written, split)) for split in splits_of(written)} == dict.fromkeys(splits, 2)


def test_the_layout_of_roboflow(tmp_path):
    drawn = draw_coco(tmp_path / "drawn")
    for split, name in (("train", "train"), ("val", "valid"), ("test", "test"), ("holdout", "more")):
        (drawn / "images" / split).rename(tmp_path / name)
        (drawn / "annotations" / f"instances_{split}.json").rename(tmp_path / name / "_annotations.coco.json")
    data = {"name": "coco", "root": str(tmp_path)}
    assert splits_of(data) == ["train", "val", "test", "more"]
    assert [len(DATASETS.build(data, split).labels) for split in splits_of(data)] == [2, 2, 2, 2]


def test_coco_keys_say_where_a_split_is(tmp_path):
    root = draw_coco(tmp_path)
    (root / "annotations/instances_test.json").rename(root / "public.json")
    data = {"name": "coco", "root": str(root)}
    assert splits_of(data) == ["train", "val", "holdout"]
    data |= {"test_annotations": "public.json", "val_annotations": "annotations/instances_holdout.json"}
    assert splits_of(data) == ["train", "val", "test"]  # the file of holdout is that of val
    assert DATASETS.build(data, "test").paths[0].name == "test0.png"
    with pytest.raises(DetkitError, match=r"gone\.json: No such file"):
        DATASETS.build(data | {"test_annotations": "gone.json"}, "test")
    assert splits_of(data | {"test_annotations": None}) == ["train", "val"]


def test_keys_of_a_data_yaml_that_are_splits(tmp_path):
    text = (
        "path: .\ntrain: images/train\nvalidation: images/val\ntest:\nnames: [images/train]\nnc: 1\ndownload: a.zip\n"
        "license: notes.txt\nroboflow: {url: x}\nextra: images/extra\nlisted: [list.txt]\n"
        "trainval: images/train\nall: images\n"
    )
    file = draw_yolo(tmp_path, text, train=2, val=1, extra=1)
    (tmp_path / "notes.txt").write_text("free\n")
    (tmp_path / "list.txt").write_text("images/val/val0.png\n")
    data = {"name": "yolo", "yaml": str(file)}
    assert splits_of(data) == ["train", "val", "extra", "listed"]
    assert [len(DATASETS.build(data, split).labels) for split in splits_of(data)] == [2, 1, 1, 1]


def test_a_split_that_is_named_but_not_there_is_reported(tmp_path, monkeypatch, capsys):
    file = draw_yolo(tmp_path, "train: images/train\nval: images/val\ntest: ../test\nnames: [a]\n", train=1, val=1)
    with pytest.raises(MissingSplit, match=r"there is no .*test"):
        DATASETS.build({"name": "yolo", "yaml": str(file)}, "test")
    command = ["convert_data", "data=yolo", f"data.yaml={file}", "format=coco", f"dst={tmp_path / 'new'}"]
    status, out, _ = run_command(monkeypatch, capsys, *command)
    assert status == 0
    assert "test is skipped: " in out and "val: 1 images" in out
    assert splits_of({"name": "coco", "root": str(tmp_path / "new")}) == ["train", "val"]


def test_lists_of_voc_that_are_splits(sets):
    root = Path(sets["voc"]["root"])
    lists = root / "ImageSets" / "Main"
    (lists / "trainval.txt").write_text((lists / "train.txt").read_text() + (lists / "val.txt").read_text())
    (lists / "cat_train.txt").write_text("train0  1\ntrain1 -1\n")
    (lists / "broken.txt").write_bytes(b"\xff\xfe")
    data = {"name": "voc", "root": str(root)}
    (root / "Annotations/test0.xml").write_text((root / "Annotations/test0.xml").read_text().replace("cat", "emu"))
    assert set(splits_of(data)) == {*SPLITS, "broken"}
    for split in SPLITS:
        assert DATASETS.build(data, split).class_names == ("cat", "dog", "emu")
    (lists / "broken.txt").unlink()
    data |= {"train_split": "trainval", "val_split": "test"}
    assert splits_of(data) == ["train", "val", "holdout"]
    assert len(DATASETS.build(data, "train")) == 4


def test_an_image_is_in_one_split_of_a_cleaned_copy(tmp_path, monkeypatch, capsys):
    root = draw_coco(tmp_path / "set")
    for split, name, source in (  # copies, whatever they are called
        ("train", "train0.png", "val/val0.png"),
        ("train", "train1.png", "holdout/holdout0.png"),
        ("val", "val1.png", "test/test1.png"),
        ("holdout", "holdout1.png", "val/val0.png"),
    ):
        (root / "images" / split / name).write_bytes((root / "images" / source).read_bytes())
    draw(root / "images" / "train" / "train2.png", 99)
    file = root / "annotations/instances_train.json"
    record = json.loads(file.read_text())
    record["images"].append({"id": 2, "file_name": "train2.png", "width": 32, "height": 24})
    record["annotations"].append({"id": 2, "image_id": 2, "category_id": 1, **BOX})
    file.write_text(json.dumps(record))
    run = [f"fix={tmp_path / 'copy'}", f"run_dir={tmp_path / 'run'}", "workers=1"]
    status, out, _ = run_command(monkeypatch, capsys, "check_data", "data=coco", f"data.root={root}", *run)
    assert status == 2
    assert "unfixed: images that are also in another split: 2 in train, 1 in val, 1 in holdout" in out
    copy = ["data=coco", f"data.root={tmp_path / 'copy'}", f"run_dir={tmp_path / 'again'}", "workers=1"]
    status, out, _ = run_command(monkeypatch, capsys, "check_data", *copy)
    assert status == 0, out
    data = {"name": "coco", "root": str(tmp_path / "copy")}
    assert {split: len(DATASETS.build(data, split)) for split in splits_of(data)} == {
        "train": 1, "val": 1, "test": 2, "holdout": 1
    }  # fmt: skip


def test_a_split_under_a_second_name_is_a_note(tmp_path, monkeypatch, capsys):
    text = "train: images/train\nval: images/val\ntest: images/val\nnames: [a]\n"
    file = draw_yolo(tmp_path / "set", text, train=1, val=2)
    run = [f"fix={tmp_path / 'copy'}", f"run_dir={tmp_path / 'run'}", "workers=1"]
    status, out, _ = run_command(monkeypatch, capsys, "check_data", "data=yolo", f"data.yaml={file}", *run)
    assert status == 0, out
    assert "note: splits that contain only images of other splits: 1 in val" in out
    copy = {"name": "yolo", "yaml": str(tmp_path / "copy/data.yaml")}
    assert [len(DATASETS.build(copy, split)) for split in splits_of(copy)] == [1, 2, 2]


def test_validating_with_what_is_trained_on_is_wrong_and_converted_as_it_is(tmp_path, monkeypatch, capsys):
    file = draw_yolo(tmp_path / "set", "train: images/train\nval: images/train\nnames: [a]\n", train=3)
    run = [f"fix={tmp_path / 'copy'}", f"run_dir={tmp_path / 'run'}", "workers=1"]
    status, out, _ = run_command(monkeypatch, capsys, "check_data", "data=yolo", f"data.yaml={file}", *run)
    assert status == 2
    assert "used for both training and validation: 1 in train" in out
    copy = {"name": "yolo", "yaml": str(tmp_path / "copy/data.yaml")}
    assert [len(DATASETS.build(copy, split)) for split in splits_of(copy)] == [3, 3]


def test_a_third_split_with_other_classes_is_left_out(tmp_path, monkeypatch, capsys):
    root = draw_coco(tmp_path / "set", ("train", "val", "test"))
    file = root / "annotations" / "instances_test.json"
    file.write_text(file.read_text().replace('"cat"', '"cow"'))
    run = [f"run_dir={tmp_path / 'run'}", "workers=1"]
    _, out, _ = run_command(monkeypatch, capsys, "check_data", "data=coco", f"data.root={root}", *run)
    assert "test is skipped: " in out
    assert "no errors" in out


def test_a_list_of_all_images_or_of_a_few_takes_none_from_train(sets, tmp_path, monkeypatch, capsys):
    root = tmp_path / "set"
    shutil.copytree(sets["voc"]["root"], root)
    lists = root / "ImageSets" / "Main"
    (lists / "all.txt").write_text((lists / "train.txt").read_text() + (lists / "val.txt").read_text())
    (lists / "few.txt").write_text((lists / "train.txt").read_text().partition("\n")[0])
    run = [f"fix={tmp_path / 'copy'}", f"run_dir={tmp_path / 'run'}", "workers=1"]
    status, out, _ = run_command(monkeypatch, capsys, "check_data", "data=voc", f"data.root={root}", *run)
    assert status == 0, out
    assert "note: splits that contain only images of other splits: 1 in all, 1 in few" in out
    copy = {"name": "voc", "root": str(tmp_path / "copy")}
    counts = {split: len(DATASETS.build(copy, split)) for split in splits_of(copy)}
    assert counts == {"train": 2, "val": 2, "test": 2, "holdout": 2, "all": 4, "few": 1}


def test_a_split_of_which_nothing_is_left_is_dropped_from_a_cleaned_copy(tmp_path, monkeypatch, capsys):
    root = draw_coco(tmp_path / "set")
    for n in range(2):
        (root / f"images/holdout/holdout{n}.png").write_bytes((root / f"images/train/train{n}.png").read_bytes())
        (root / f"images/holdout/holdout{n}.png").write_bytes((root / f"images/val/val{n}.png").read_bytes())
    run = [f"fix={tmp_path / 'copy'}", f"run_dir={tmp_path / 'run'}", "workers=1"]
    status, out, _ = run_command(monkeypatch, capsys, "check_data", "data=coco", f"data.root={root}", *run)
    assert status == 2
    assert "holdout is skipped: it would be empty" in out
    assert splits_of({"name": "coco", "root": str(tmp_path / "copy")}) == ["train", "val", "test"]


@pytest.mark.parametrize("empty", ["train", "val"])
def test_a_split_without_boxes_is_an_error_unless_asked_for(empty, tmp_path, train_overrides, monkeypatch, capsys):
    data = ["data=coco", f"data.root={draw_coco(tmp_path / 'set', ('train', 'val'), empty=(empty,))}"]
    status, out, _ = run_command(monkeypatch, capsys, "check_data", *data, f"run_dir={tmp_path / 'r'}", "workers=1")
    assert status == 2
    assert f"unfixed: splits without any box, which training rejects: 1 in {empty}" in out
    train = ["train", *data, *train_overrides[1:], "trainer.epochs=1", f"run_dir={tmp_path / 'run'}"]
    status, _, error = run_command(monkeypatch, capsys, *train)
    assert status == 2
    assert f"{empty} has no boxes: 2 images in {tmp_path}" in error and "data.allow_empty=true" in error
    assert len(error.strip().splitlines()) == 1 and not (tmp_path / "run").exists()
    status, _, error = run_command(monkeypatch, capsys, *train, "data.allow_empty=true")
    assert status == 0, error
    ckpt = f"ckpt={tmp_path / 'run' / 'last.safetensors'}"
    status, _, error = run_command(monkeypatch, capsys, "eval", *data, ckpt, f"split={empty}", "workers=0")
    assert status == 2 and f"split={empty} has no boxes to compare with" in error


def test_where_labels_were_looked_for_is_reported(tmp_path, monkeypatch, capsys):
    file = draw_yolo(tmp_path, "train: images/train\nval: images/val\nnames: [a]\n", train=3, val=1)
    for label in (tmp_path / "labels/train").iterdir():
        label.unlink()
    status, _, error = run_command(monkeypatch, capsys, "train", "data=yolo", f"data.yaml={file}", "device=cpu")
    assert status == 2
    assert "label files found: 0 of 3" in error and str(tmp_path / "labels/train/train0.txt") in error
