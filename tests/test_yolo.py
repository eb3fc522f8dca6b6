import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detkit.data.formats.label_files import label_folders
from detkit.data.formats.yolo import read_yolo
from detkit.errors import DetkitError

LABELS = {"train/a": "1 0.5 0.5 0.2 0.4\n\n0 0.1 0.2 0.3 0.2 0.2 0.5\n", "train/ü b": "", "val/a": "0 0.5 0.5 1 1\n"}


@pytest.fixture
def yolo_set(tmp_path):
    """Return a function that writes a set of 100x50 images with LABELS and a data.yaml; returns the yaml."""

    def write(text: str = "train: images/train\nval: images/val\nnames: [cat, dog]\n") -> Path:
        for name, lines in LABELS.items():
            for folder in ("images", "labels"):
                (tmp_path / folder / name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.zeros((50, 100, 3), np.uint8)).save(tmp_path / "images" / f"{name}.png")
            (tmp_path / "labels" / f"{name}.txt").write_text(lines)
        (tmp_path / "data.yaml").write_text(text)
        return tmp_path / "data.yaml"

    return write


def test_boxes_and_polygons_become_pixels(yolo_set):
    annotations = read_yolo("train", yaml=str(yolo_set()))
    assert [path.name for path in annotations.paths] == ["a.png", "ü b.png"]
    np.testing.assert_allclose(annotations.boxes, [[40, 15, 60, 35], [10, 10, 30, 25]])
    assert annotations.labels.tolist() == [1, 0]
    assert annotations.offsets.tolist() == [0, 2, 2]
    assert annotations.class_names == ("cat", "dog")
    assert not annotations.issues.summary()


@pytest.mark.parametrize(
    "text",
    [
        "path: .\ntrain: images/train\nval: images/val\nnames: {0: cat, 1: dog}\nnc: 2\n",
        "path: ROOT\ntrain: [images/train]\nval: [images/val]\nnames: [cat, dog]\n",
        "train: train.txt\nval: ./images/val\nnames: [cat, dog]\n",
        "train: ../images/train\nvalid: images/val\nnames: [cat, dog]\n",
        "train: [train.txt]\nval: images/val\nnames: {'1': dog, '0': cat}\n",
    ],
)
def test_every_way_to_say_where_the_images_are(yolo_set, tmp_path, text):
    yaml = yolo_set(text.replace("ROOT", str(tmp_path)))
    (tmp_path / "train.txt").write_text(f"./images/train/a.png\n{tmp_path}/images/train/ü b.png\n")
    train, val = read_yolo("train", yaml=str(yaml)), read_yolo("val", yaml=str(yaml))
    assert (len(train), len(train.labels), len(val), len(val.labels)) == (2, 2, 1, 1)
    assert train.class_names == ("cat", "dog")


def test_class_ids_may_have_gaps(yolo_set):
    annotations = read_yolo("train", yaml=str(yolo_set("train: images/train\nnames: {0: cat, 7: horse, 1: dog}\n")))
    assert annotations.class_names == ("cat", "dog", "horse")
    assert annotations.category_ids == (0, 1, 7)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: [", "malformed yaml, line"),
        ("- a", "it needs the keys train"),
        ("train: images/train\n", "needs 'names'"),
        ("train: images/train\nnames: {a: b}\n", "must be whole numbers, 0 or more, one is a$"),
        ("train: images/train\nnames: {on: b}\n", "must be whole numbers, 0 or more, one is on$"),
        ("train: images/train\nnames: {-1: b}\n", "must be whole numbers, 0 or more, one is -1$"),
        ("train: images/train\nnames: {1.5: b}\n", "must be whole numbers, 0 or more, one is 1.5$"),
        ("train: images/train\nnames: {0: a, 0x0: b}\n", "one name, 0 has b"),
        ("train: images/train\nnames: [[a]]\n", "one name, 0 has \\['a'\\]"),
        ("train: images/train\nnames: [a, '']\n", "'names' holds the name ''; give every class a name"),
        ("train: images/train\nnames: [a, ' ']\n", "'names' holds the name ' '; give every class a name"),
        ("train: images/train\nnames: [a,\n]\nnc: b\n", "'nc' must be the number of classes, it is b"),
        ("train: images/train\nnames: [a]\nnc: yes\n", "'nc' must be the number of classes, it is True"),
        ("train: images/train\nnames: [a]\nnc: '2'\n", "'nc' is 2, but 'names' holds 1"),
        ("train: images/train\nnames: a\n", "needs 'names': a list"),
        ("train: images/train\nnames: [a]\nkpt_shape: 17\n", "'kpt_shape' must be .*, it is 17"),
        ("train: images/train\nnames: [a]\nkpt_shape: [17, 4]\n", "'kpt_shape' must be"),
        ("train: images/train\nnames: [a, a]\n", "same name twice"),
        ("train: images/train\nnames: [a, 'a ']\n", "same name twice"),
        ("train: images/train\nnames: [a, b]\nnc: 3\n", "'nc' is 3, but 'names' holds 2"),
        ("names: [a]\n", "needs 'train'"),
        ("train: {}\nnames: [a]\n", "needs 'train'"),
        ("train: nowhere\nnames: [a]\n", "there is no .*nowhere"),
        ("path: [3]\ntrain: nowhere\nnames: [a]\n", "'path' must be a folder"),
        ("path: 3\ntrain: nowhere\nnames: [a]\n", "there is no .*3/nowhere"),
        ("train: labels\nnames: [a]\n", "lists no images"),
        ("train: /dev/zero\nnames: [a]\n", "/dev/zero is neither a folder nor a regular file"),
        ("train: \ud800", "not UTF-8"),
    ],
)
def test_a_wrong_yaml_is_named(yolo_set, text, message):
    yaml = yolo_set()
    yaml.write_text(text, errors="surrogatepass")
    with pytest.raises(DetkitError, match=message) as error:
        read_yolo("train", yaml=str(yaml))
    assert str(yaml) in str(error.value)


@pytest.mark.parametrize("key", ["path", "nc", "names", "train", "kpt_shape"])
def test_a_yaml_that_grows_is_refused_and_what_is_long_is_cut(yolo_set, key):
    content = {"train": "images/train", "names": "[cat, dog]"}
    bomb = "l0: &l0 [x, x, x, x, x, x, x, x, x, x]\n"
    bomb += "".join(f"l{k}: &l{k} [{', '.join([f'*l{k - 1}'] * 10)}]\n" for k in range(1, 9))
    long = f"l8: &l8 {{a: [{', '.join(['word'] * 20_000)}]}}\n"
    for lines, message in ((bomb, "its aliases expand"), (long, "it is|one is|needs")):
        yaml = yolo_set(lines + "".join(f"{k}: {v}\n" for k, v in (content | {key: "*l8"}).items()))
        with pytest.raises(DetkitError, match=message) as error:
            read_yolo("train", yaml=str(yaml))
        assert len(str(error.value)) < len(str(yaml)) + 400


@pytest.mark.parametrize(
    ("names", "class_names", "category_ids"),
    [
        ("[no, yes]", ("no", "yes"), (0, 1)),
        ("{0: off, 1: 1.0}", ("off", "1.0"), (0, 1)),
        ("{0: 010, 1: 12:30}", ("010", "12:30"), (0, 1)),
        ("[2024-01-01, 0x10, 1_000, null, ~]", ("2024-01-01", "0x10", "1_000", "null", "~"), (0, 1, 2, 3, 4)),
        ("{1.0: b, '0': a, 0x10: c}", ("a", "b", "c"), (0, 1, 16)),
        ("{00: a, 01: b, 010: c}", ("a", "b", "c"), (0, 1, 10)),
    ],
)
def test_names_are_the_text_of_the_yaml(yolo_set, names, class_names, category_ids):
    for count in ("", f"nc: '{len(class_names)}'\n", f"nc: {len(class_names)}.0\n", "nc:\n"):
        annotations = read_yolo("train", yaml=str(yolo_set(f"train: images/train\nnames: {names}\n{count}")))
        assert (annotations.class_names, annotations.category_ids) == (class_names, category_ids)


@pytest.mark.parametrize(
    "text",
    [
        "train: images\\train\n",
        "path: .\\\ntrain: .\\images\\train\n",
        "train: windows.txt\n",
        "path: images\ntrain: lists/train.txt\n",
        "train: cvat.txt\n",
        "train: [images/train, images/train]\n",
    ],
)
def test_paths_as_other_machines_and_tools_write_them(yolo_set, tmp_path, text):
    yaml = yolo_set(f"{text}names: [cat, dog]\n")
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "train.txt").write_text("train/a.png\ntrain/ü b.png\n")
    (tmp_path / "cvat.txt").write_text("data/images/train/a.png\nC:\\\\me\\images\\train\\ü b.png\n")
    (tmp_path / "windows.txt").write_bytes(b"images\\train\\a.png\r\n.\\images\\train\\\xc3\xbc b.png\r\n")
    annotations = read_yolo("train", yaml=str(yaml))
    assert (len(annotations), len(annotations.boxes)) == (2, 2)
    assert not annotations.issues.summary()


def test_a_list_and_its_images_may_have_names_that_are_no_unicode(yolo_set, tmp_path):
    yaml = yolo_set("train: train.txt\nnames: [cat, dog]\n")
    for folder, suffix in (("images", "png"), ("labels", "txt")):
        (tmp_path / folder / "train" / f"a.{suffix}").rename(
            tmp_path / folder / "train" / os.fsdecode(b"\xe9\xff." + suffix.encode())
        )
    (tmp_path / "train.txt").write_bytes(b"images/train/\xe9\xff.png\nimages/train/\xfe.png\n")
    for _ in range(2):  # the second time from the index
        annotations = read_yolo("train", yaml=str(yaml))
        assert (len(annotations), len(annotations.boxes)) == (1, 2)
        assert annotations.issues.counts["missing_image"] == 1
        assert os.fsencode(annotations.paths[0]).endswith(b"\xe9\xff.png")
    (tmp_path / "train.txt").write_bytes(b"\x89PNG\0\0")
    with pytest.raises(DetkitError, match="not UTF-8 text"):
        read_yolo("train", yaml=str(yaml))


POSE = "1 0.5 0.5 0.2 0.4 0.1 0.1 2 0.9 0.9 1 0 0 0\n"


def test_of_labels_with_keypoints_the_first_four_numbers_are_the_box(yolo_set, tmp_path):
    yaml = yolo_set("train: images/train\nnames: [cat, dog]\nkpt_shape: [3, 3]\n")
    (tmp_path / "labels" / "train" / "a.txt").write_text(POSE + "0 0.5 0.5 0.1 0.1\n0 0.1 0.2 0.3 0.2 0.2 0.5\n")
    annotations = read_yolo("train", yaml=str(yaml))
    np.testing.assert_allclose(annotations.boxes, [[40, 15, 60, 35], [45, 22.5, 55, 27.5]])
    counts = {"keypoints": 1, "malformed_box": 1, "without_boxes": 1}
    assert dict(annotations.issues.counts) == counts
    yaml.write_text("train: images/train\nnames: [cat, dog]\n")
    (tmp_path / "labels" / "train" / "a.txt").write_text("1 0.1 0.1 0.2 0.1 0.2 0.3 0.1 0.3\n")  # four corners
    np.testing.assert_allclose(read_yolo("train", yaml=str(yaml)).boxes, [[10, 5, 20, 15]])


@pytest.mark.parametrize("shape", ["'[3, 3]'", "(3, 3)", "'3 3'", "[3.0, '3']"])
def test_the_shape_of_keypoints_may_be_text(yolo_set, tmp_path, shape):
    yaml = yolo_set(f"train: images/train\nnames: [cat, dog]\nkpt_shape: {shape}\n")
    (tmp_path / "labels" / "train" / "a.txt").write_text(POSE)
    np.testing.assert_allclose(read_yolo("train", yaml=str(yaml)).boxes, [[40, 15, 60, 35]])


def test_pipes_in_place_of_files_are_not_waited_for(yolo_set, tmp_path):
    yaml = yolo_set()
    (tmp_path / "labels" / "train" / "a.txt").unlink()
    os.mkfifo(tmp_path / "labels" / "train" / "a.txt")
    annotations = read_yolo("train", yaml=str(yaml))
    (issue,) = (p for p in annotations.issues.issues if p.kind == "unreadable_labels")
    assert "not a regular file" in issue.detail
    assert len(annotations) == 1
    yaml.unlink()
    os.mkfifo(yaml)
    with pytest.raises(DetkitError, match=r"cannot read .*not a regular file"):
        read_yolo("train", yaml=str(yaml))


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("0 0.5 0.5 0.1", "malformed_box"),
        ("0 0.5 0.5 0.1 nan", "malformed_box"),
        ("0 0.5 0.5 0.1 1e30", "malformed_box"),
        ("cat 0.5 0.5 0.1 0.1", "malformed_box"),
        ("0.5 0.5 0.5 0.1 0.1", "malformed_box"),
        ("0 0.5 0.5 0.1 0.1 0.9", "malformed_box"),
        ("2 0.5 0.5 0.1 0.1", "unknown_class"),
        ("-1 0.5 0.5 0.1 0.1", "unknown_class"),
        ("0 0.5 0.5 0 0.1", "degenerate_box"),
        ("0 1.5 0.5 0.1 0.1", "outside_box"),
        ("0 0.99 0.5 0.1 0.1", "beyond_one"),
        ("1 0.5 0.5 0.2 0.4", "duplicate_box"),
    ],
)
def test_a_wrong_line_is_named_and_the_rest_is_used(yolo_set, line, kind):
    yaml = yolo_set()
    file = yaml.parent / "labels" / "train" / "a.txt"
    file.write_text(LABELS["train/a"] + line)
    annotations = read_yolo("train", yaml=str(yaml))
    (issue,) = (p for p in annotations.issues.issues if p.kind != "without_boxes")
    assert (issue.kind, issue.file, issue.line) == (kind, str(file), 4)
    assert len(annotations.labels) == 2 + (kind == "beyond_one")
    assert annotations.boxes.max() <= 100


def test_a_label_without_an_image_and_one_that_is_no_text(yolo_set):
    yaml = yolo_set()
    (yaml.parent / "labels" / "train" / "gone.txt").write_text("0 0.5 0.5 1 1")
    (yaml.parent / "labels" / "train" / "classes.txt").write_text("cat\ndog")
    (yaml.parent / "labels" / "train" / "a.txt").write_bytes(b"\xff\xfe\x00")
    annotations = read_yolo("train", yaml=str(yaml))
    assert [path.name for path in annotations.paths] == ["ü b.png"]
    assert dict(annotations.issues.counts) == {"unreadable_labels": 1, "labels_without_image": 1, "without_boxes": 1}


def test_folders_that_link_to_themselves_are_read_once(yolo_set):
    yaml = yolo_set()
    os.symlink(yaml.parent / "images" / "train", yaml.parent / "images" / "train" / "again")
    os.symlink("loop.png", yaml.parent / "images" / "train" / "loop.png")
    annotations = read_yolo("train", yaml=str(yaml))
    assert len(annotations) == 2
    assert dict(annotations.issues.counts) == {"missing_image": 1, "without_boxes": 1, "unlabelled_image": 1}


def test_a_listed_image_elsewhere_does_not_lead_into_other_folders(yolo_set, tmp_path, monkeypatch):
    yaml = yolo_set("train: train.txt\nval: images/val\nnames: [cat, dog]\n")
    (tmp_path / "train.txt").write_text(f"images/train/a.png\n/x.png\n{'y' * 300}/z.png\n")
    monkeypatch.setattr("detkit.data.index.walk", None)  # it would go through all of the disk
    annotations = read_yolo("train", yaml=str(yaml))
    assert len(annotations) == 1
    assert annotations.issues.counts["missing_image"] == 2


def test_an_image_that_is_missing_in_its_folder_is_no_other_of_its_name(yolo_set, tmp_path):
    yaml = yolo_set("train: train.txt\nval: images/val\nnames: [cat, dog]\n")
    shutil.copy(tmp_path / "images" / "train" / "a.png", tmp_path / "b.png")
    (tmp_path / "train.txt").write_text("/old/disk/images/train/a.png\nimages/train/b.png\n")
    annotations = read_yolo("train", yaml=str(yaml))
    assert [path.name for path in annotations.paths] == ["a.png"]
    assert annotations.issues.counts["missing_image"] == 1


def test_labels_lie_in_labels_beside_the_last_images_or_an_earlier_one_or_beside_the_image():
    found = [str(folder) for folder in label_folders(Path("/images/set/images/train"))]
    assert found == ["/images/set/labels/train", "/labels/set/images/train", "/images/set/images/train"]
    assert label_folders(Path("/set/train")) == [Path("/set/train")]


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        ("train", "train"),
        ("images/train", "images/train"),
        ("images/train", "labels/train"),
        ("train/images", "train/labels"),
        ("images/set/train", "labels/set/train"),
        ("images/set/train", "images/set/train"),
        ("images/set/images/train", "images/set/labels/train"),
        ("images/set/images/train", "labels/set/images/train"),
        ("images/set/images/train", "images/set/images/train"),
        ("train/deep/images", "train/deep/images"),
    ],
)
@pytest.mark.parametrize("listed", (False, True))
def test_labels_are_found_wherever_the_path_says_images(tmp_path, monkeypatch, images, labels, listed):
    for k in range(3):
        for folder in (images, labels):
            (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((50, 100, 3), np.uint8)).save(tmp_path / images / f"{k}.png")
    (tmp_path / labels / "0.txt").write_text("0 0.5 0.5 0.2 0.4\n")
    (tmp_path / labels / "gone.txt").write_text("0 0.5 0.5 0.2 0.4\n")
    (tmp_path / "train.txt").write_text("".join(f"{images}/{k}.png\n" for k in range(3)))
    (tmp_path / "data.yaml").write_text(
        f"train: {'train.txt' if listed else images.partition('/deep')[0]}\nnames: [a]\n"
    )
    for folder, yaml in (
        (tmp_path, tmp_path / "data.yaml"),
        (tmp_path / images, "../" * (images.count("/") + 1) + "data.yaml"),
    ):
        monkeypatch.chdir(folder)
        annotations = read_yolo("train", yaml=str(yaml))
        np.testing.assert_allclose(annotations.boxes, [[40, 15, 60, 35]])
        counts = {"unlabelled_image": 2, "labels_without_image": 1, "without_boxes": 2}
        assert dict(annotations.issues.counts) == counts
    (tmp_path / labels / "1.txt").write_text("0 0.5 0.5 0.2 0.4\n")  # the index sees it
    assert len(read_yolo("train", yaml=str(tmp_path / "data.yaml")).boxes) == 2


def test_splits_that_share_a_folder_have_no_labels_without_image(tmp_path):
    for name in "ab":
        (tmp_path / "labels").mkdir(exist_ok=True)
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.fromarray(np.zeros((20, 20, 3), np.uint8)).save(tmp_path / "images" / f"{name}.png")
        (tmp_path / "labels" / f"{name}.txt").write_text("0 0.5 0.5 0.2 0.2\n")
    (tmp_path / "labels" / "c.txt").write_text("0 0.5 0.5 0.2 0.2\n")
    (tmp_path / "train.txt").write_text("images/a.png\n")
    (tmp_path / "val.txt").write_text("images/b.png\n")
    (tmp_path / "data.yaml").write_text("train: train.txt\nval: val.txt\nnames: [cat]\n")
    (issue,) = read_yolo("train", yaml=str(tmp_path / "data.yaml")).issues.issues
    assert (issue.kind, Path(issue.file).name) == ("labels_without_image", "c.txt")


def test_folders_may_be_called_as_numbers_and_truth_values_are(yolo_set, tmp_path):
    yaml = yolo_set("path: 2024\ntrain: on\nval: 010\nnames: [cat, dog]\n")
    for folder in ("images", "labels"):
        (tmp_path / "2024" / folder).mkdir(parents=True)
    (tmp_path / "images" / "train").rename(tmp_path / "2024" / "on")
    (tmp_path / "images" / "val").rename(tmp_path / "2024" / "010")
    assert [len(read_yolo(split, yaml=str(yaml))) for split in ("train", "val")] == [2, 1]
