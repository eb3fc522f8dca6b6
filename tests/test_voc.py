import os

import numpy as np
import pytest
from PIL import Image

from detkit.data.formats.voc import read_voc
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
    """A set of two training images and one to validate on, 100x50."""
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
    assert not train.issues.summary()


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
        (xml((" ", 0, 10, 20, 30, 40)), "malformed_box", 3),
        (xml(("a\u200bb", 0, 10, 20, 30, 40)), "malformed_box", 3),
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
    (issue,) = (p for p in annotations.issues.issues if p.kind != "without_boxes")
    assert (issue.kind, issue.line) == (kind, line)
    assert "b c" in issue.file
    assert len(annotations) == (1 if kind in ("unreadable_labels", "contradicting_size") else 2)


def test_a_listed_name_without_files(voc_set):
    (voc_set / "ImageSets/Main/train.txt").write_text("a\na\ngone\nb c\n" + "n" * 300)
    (voc_set / "JPEGImages" / "b c.png").unlink()
    counts = read_voc("train", root=str(voc_set)).issues.counts
    assert dict(counts) == {"missing_labels": 2, "missing_image": 1, "repeated_image": 1}
    (voc_set / "ImageSets/Main/train.txt").unlink()
    with pytest.raises(DetkitError, match=r"cannot read the list .*train\.txt"):
        read_voc("train", root=str(voc_set))


def test_a_pipe_in_place_of_a_list_is_not_waited_for(voc_set):
    (voc_set / "ImageSets/Main/train.txt").unlink()
    os.mkfifo(voc_set / "ImageSets/Main/train.txt")
    with pytest.raises(DetkitError, match=r"cannot read the list .*train\.txt: it is not a regular file"):
        read_voc("train", root=str(voc_set))


@pytest.mark.parametrize(
    "lines",
    [
        "a.jpg\nb c.PNG\n",
        "{root}/JPEGImages/a.png\n{root}/JPEGImages/b c.png",
        "JPEGImages/a.png\n./JPEGImages/b c.png",
        "JPEGImages\\a.png\nC:\\Users\\me\\b c.png",
        "/gone/Annotations/a.xml\nAnnotations/b c.xml\n",
        "a.png 1\nb c.png -1",
        "a  1\nb c -1",
    ],
)
def test_lists_name_images_in_many_ways(voc_set, lines):
    (voc_set / "ImageSets/Main/train.txt").write_text(lines.replace("{root}", str(voc_set)))
    annotations = read_voc("train", root=str(voc_set))
    assert [path.name for path in annotations.paths] == ["a.png", "b c.png"]
    assert len(annotations.boxes) == 2
    assert not annotations.issues.summary()


def test_lists_may_name_the_image_and_its_xml_file(voc_set):
    (voc_set / "ImageSets/Main/train.txt").write_text("JPEGImages/v.png Annotations/v.xml\n./x/a.png ./x/a.xml\n")
    assert [path.name for path in read_voc("train", root=str(voc_set)).paths] == ["v.png", "a.png"]


def test_a_name_twice_in_different_spellings_is_one_image(voc_set):
    (voc_set / "ImageSets/Main/train.txt").write_text("a.png\na\n")
    annotations = read_voc("train", root=str(voc_set))
    assert (len(annotations), annotations.issues.counts["repeated_image"]) == (1, 1)


def test_images_of_the_same_name_in_two_folders_are_unique(voc_set):
    for folder, value in (("x", 50), ("y", 60)):
        for kind in ("Annotations", "JPEGImages"):
            (voc_set / kind / folder).mkdir()
        (voc_set / "Annotations" / folder / "a.xml").write_text(xml(("dog", 0, 10, 20, value, 40)))
        Image.fromarray(np.zeros((50, 100, 3), np.uint8)).save(voc_set / "JPEGImages" / folder / "a.png")
    (voc_set / "ImageSets/Main/train.txt").write_text("y/a\nx/a.png\na\n")
    annotations = read_voc("train", root=str(voc_set))
    assert [path.parent.name for path in annotations.paths] == ["y", "x", "JPEGImages"]
    assert annotations.boxes[:2, 2].tolist() == [60, 50]


INNER = "<object><name>dog</name><bndbox><xmin>1</xmin><ymin>2</ymin><xmax>3</xmax><ymax>4</ymax></bndbox></object>"


@pytest.mark.parametrize(
    "text",
    [
        f"<annotation>{SIZE}<objects>{INNER}</objects></annotation>",
        f"<annotation><source><a><b>{SIZE}</b></a></source><x><y>{INNER}</y></x></annotation>",
        f"<data>{INNER}</data>",
        f"<annotation><path>C:\\x\\b c.png</path><size><width>0</width><height>0</height></size>{INNER}</annotation>",
        f"<annotation><size/>{INNER.replace('<name>', '<attributes><name>x</name></attributes><name>')}</annotation>",
        f"\ufeff<?xml version='1.0' encoding='utf-8'?><annotation>{INNER}</annotation>",
    ],
)
def test_objects_are_found_wherever_they_stand(voc_set, text):
    (voc_set / "Annotations" / "b c.xml").write_text(text)
    annotations = read_voc("train", root=str(voc_set))
    assert annotations.boxes[2:].tolist() == [[1, 2, 3, 4]]
    assert annotations.class_names == ("ant", "cat", "dog")
    assert not annotations.issues.summary()


@pytest.mark.parametrize(
    ("declared", "written"),
    [
        ("gb2312", "gb2312"),
        ("GB2312", "gbk"),
        ("gbk", "gb18030"),
        ("big5", "big5"),
        ("Shift_JIS", "cp932"),
        ("euc-kr", "euc-kr"),
        ("windows-1251", "cp1251"),
        ("utf-8", "utf-8-sig"),
        ("utf-16", "utf-16"),
        ("utf-16", "utf-8"),
        ("latin1", "utf-8-sig"),
    ],
)
def test_xml_is_read_in_the_encoding_that_it_declares(voc_set, declared, written):
    name = {"cp1251": "кот", "big5": "貓", "cp932": "猫", "euc-kr": "고양이"}.get(written, "汽车")
    content = xml((name, 0, 10, 20, 30, 40), before=f'<?xml version="1.0" encoding="{declared}"?>\n')
    (voc_set / "Annotations" / "b c.xml").write_text(content, encoding=written)
    annotations = read_voc("train", root=str(voc_set))
    assert name in annotations.class_names
    assert not annotations.issues.summary()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('<?xml version="1.0" encoding="gb2312"?><annotation>\udcff\udcff</annotation>', "not in the encoding gb2312"),
        ('<?xml version="1.0" encoding="idna"?><annotation/>', "unknown encoding"),
        ('<?xml version="1.0" encoding="zip"?><annotation/>', "not a text encoding"),
        ("<annotation>\udcc6\udcfb</annotation>", "malformed xml"),
        ("<a>" * 1000 + "</a>" * 1000, "nested more than 100 deep"),
        ("<annotations><image id='0'><box label='dog'/></image></annotations>", "CVAT's own xml"),
        ("<html><body/></html>", "it is not a Pascal VOC annotation"),
        ('{"images": []}', "malformed xml"),
        (f"<annotation>{'<object/>' * 100_001}</annotation>", "more than 100,000 objects"),
    ],
)
def test_xml_that_cannot_be_read_is_named_with_the_reason(voc_set, content, message):
    (voc_set / "Annotations" / "b c.xml").write_text(content, errors="surrogateescape")
    (issue,) = read_voc("train", root=str(voc_set)).issues.issues
    assert issue.kind == "unreadable_labels"
    assert message in issue.detail


def test_deep_xml_and_long_text_take_no_time(voc_set):
    """Both took time by the square of their size: minutes."""
    (voc_set / "Annotations" / "a.xml").write_text("<a>" * 200_000 + "</a>" * 200_000)
    (voc_set / "Annotations" / "b c.xml").write_text(
        f"<annotation><object><name>{'x&lt;' * 10**6}</name></object></annotation>"
    )
    counts = read_voc("val", root=str(voc_set)).issues.counts
    assert not counts
    counts = read_voc("train", root=str(voc_set)).issues.counts
    assert (counts["unreadable_labels"], counts["malformed_box"]) == (1, 1)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ((None, None), r"2\).* first problem: .*a\.xml: does not exist"),
        (("<annotation/>", "<annotation/>"), "2 images .* contain no objects, so"),
        (("<annotation><bndbox/></annotation>", None), "malformed boxes"),
        (("<annotations><image /></annotations>", None), "CVAT's own xml"),
    ],
)
def test_a_set_without_any_object_is_refused_for_the_true_reason(voc_set, texts, message):
    for name, text in zip(("a", "b c"), texts, strict=True):
        (voc_set / "Annotations" / f"{name}.xml").unlink()
        if text:
            (voc_set / "Annotations" / f"{name}.xml").write_text(text)
    (voc_set / "Annotations" / "v.xml").write_text("<annotation/>")
    with pytest.raises(DetkitError, match=message):
        read_voc("train", root=str(voc_set))


def test_pipes_in_place_of_files_are_not_waited_for(voc_set):
    (voc_set / "Annotations" / "b c.xml").unlink()
    os.mkfifo(voc_set / "Annotations" / "b c.xml")
    (issue,) = read_voc("train", root=str(voc_set)).issues.issues
    assert (issue.kind, issue.detail) == ("unreadable_labels", "cannot be read: it is not a regular file")
