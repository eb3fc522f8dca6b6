import os

import numpy as np
import pytest
from PIL import Image

from detkit.data.voc import read_voc
from detkit.errors import DetkitError

OBJECT = (
    "<object><name>{}</name><difficult>{}</difficult>\n"
    "<part><name>head</name><bndbox><xmin>1</xmin></bndbox></part>"
    "<bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>\n"
)
SIZE = "<size><width>100</width><height>50</height><depth>3</depth></size>\n"


def xml(*objects, size=SIZE, before=""):
    body = "".join(OBJECT.format(*o) for o in objects)
    return f"{before}<annotation>\n{size}{body}</annotation>"


@pytest.fixture
def voc_set(tmp_path):
    """A set of two training pictures and one to validate on, 100x50."""
    files = {
        "a": xml(("dog", 0, 10, 20, 30.5, 40), ("cat", 1, 1, 1, 9, 9)),
        "b c": xml(),
        "v": xml(("ant", 0, 1, 2, 3, 4)),
    }
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (tmp_path / folder).mkdir(parents=True)
    for name, text in files.items():
        (tmp_path / "Annotations" / f"{name}.xml").write_text(text)
        Image.fromarray(np.zeros((50, 100, 3), np.uint8)).save(tmp_path / "JPEGImages" / f"{name}.png")
    (tmp_path / "ImageSets/Main/train.txt").write_text("a\nb c\n")
    (tmp_path / "ImageSets/Main/val.txt").write_text("v\n")
    return tmp_path


def test_boxes_classes_and_difficult_ones(voc_set):
    train, val = read_voc("train", root=str(voc_set)), read_voc("val", root=str(voc_set))
    assert train.class_names == val.class_names == ("ant", "cat", "dog")
    assert train.boxes.tolist() == [[10, 20, 30.5, 40], [1, 1, 9, 9]]
    assert train.labels.tolist() == [2, 1]
    assert train.crowd.tolist() == [False, True]
    assert train.offsets.tolist() == [0, 2, 2]
    assert [path.name for path in train.paths] == ["a.png", "b c.png"]
    assert not train.problems.summary()


def test_pixels_counted_from_one(voc_set):
    assert read_voc("val", root=str(voc_set), one_based=True).boxes.tolist() == [[0, 1, 3, 4]]


def test_images_may_lie_elsewhere(voc_set):
    (voc_set / "JPEGImages").rename(voc_set / "pictures")
    with pytest.raises(DetkitError, match=r"data\.images=FOLDER"):
        read_voc("train", root=str(voc_set))
    assert len(read_voc("train", root=str(voc_set), images="pictures")) == 2


@pytest.mark.parametrize(
    ("text", "kind", "line"),
    [
        ("<annotation><object>", "unreadable_labels", 1),
        ("", "unreadable_labels", 1),
        (xml(before='<!DOCTYPE a [<!ENTITY x "yy"><!ENTITY y "&x;&x;">]>'), "unreadable_labels", None),
        (xml(before='<?xml version="1.0" encoding="klingon"?>'), "unreadable_labels", None),
        (xml(("dog", 0, 10, 20, "x", 40)), "malformed_box", 3),
        (xml(("dog", 0, 10, 20, "nan", 40)), "malformed_box", 3),
        (xml(("dog", 0, 10, 20, "1e300", 40)), "malformed_box", 3),
        (xml(("", 0, 10, 20, 30, 40)), "malformed_box", 3),
        (xml(("dog", 0, 10, 20, 10, 20)), "degenerate_box", 3),
        (xml(("dog", 0, 30, 20, 10, 40)), "degenerate_box", 3),
        (xml(("dog", 0, 90, 20, 110, 40)), "overhanging_box", 3),
        (xml(("dog", 0, 190, 20, 210, 40)), "outside_box", 3),
        (xml(size=SIZE.replace("100", "60")), "contradicting_size", None),
        (xml(size=SIZE.replace("100", "50").replace("<height>50", "<height>25")), "stated_size", None),
    ],
)
def test_a_wrong_file_is_named_and_the_rest_is_used(voc_set, text, kind, line):
    (voc_set / "Annotations" / "b c.xml").write_text(text)
    annotations = read_voc("train", root=str(voc_set))
    (problem,) = (p for p in annotations.problems.problems if p.kind != "without_boxes")
    assert (problem.kind, problem.line) == (kind, line)
    assert "b c" in problem.file
    assert len(annotations) == (1 if kind in ("unreadable_labels", "contradicting_size") else 2)


def test_a_listed_name_without_files(voc_set):
    (voc_set / "ImageSets/Main/train.txt").write_text("a\na\ngone\nb c\n" + "n" * 300)
    (voc_set / "JPEGImages" / "b c.png").unlink()
    counts = read_voc("train", root=str(voc_set)).problems.counts
    assert dict(counts) == {"missing_labels": 2, "missing_image": 1, "repeated_image": 1}
    (voc_set / "ImageSets/Main/train.txt").unlink()
    with pytest.raises(DetkitError, match=r"cannot read the list .*train\.txt"):
        read_voc("train", root=str(voc_set))


def test_a_pipe_in_place_of_a_list_is_not_waited_for(voc_set):
    (voc_set / "ImageSets/Main/train.txt").unlink()
    os.mkfifo(voc_set / "ImageSets/Main/train.txt")
    with pytest.raises(DetkitError, match=r"cannot read the list .*train\.txt: it is not a file"):
        read_voc("train", root=str(voc_set))
