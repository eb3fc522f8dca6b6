import json
import re

import numpy as np
import pytest
from PIL import Image

from detkit.data.coco import read_coco, read_coco_json
from detkit.data.dataset import DetectionDataset, LetterboxDataset
from detkit.errors import DetkitError

IMAGES = [
    {"id": 7, "file_name": "b.png", "height": 40, "width": 60},
    {"id": 3, "file_name": "empty.png", "height": 30, "width": 30},
    {"id": 9, "file_name": "ä b.png", "height": 20, "width": 20},
]
CATEGORIES = [{"id": 90, "name": "cat"}, {"id": 4, "name": "dog"}]
ANNOTATIONS = [
    {"id": 1, "image_id": 9, "category_id": 90, "bbox": [1, 2, 3, 4], "area": 5.0, "iscrowd": 0},
    {"id": 2, "image_id": 7, "category_id": 4, "bbox": [50, 30, 20, 20], "iscrowd": 0},
    {"id": 3, "image_id": 7, "category_id": 90, "bbox": [0, 0, 30, 30], "iscrowd": 1},
    {"id": 4, "image_id": 7, "category_id": 90, "bbox": [5, 5, 0, 9], "iscrowd": 0},
]


def test_gaps_crowds_and_images_without_boxes(coco_set):
    annotations = read_coco("train", root=str(coco_set(IMAGES, ANNOTATIONS, CATEGORIES)))
    assert annotations.class_names == ("dog", "cat")
    assert annotations.category_ids == (4, 90)
    assert annotations.offsets.tolist() == [0, 2, 2, 3]
    assert annotations.boxes.tolist() == [[50, 30, 60, 40], [0, 0, 30, 30], [1, 2, 4, 6]]  # the first one clipped
    assert annotations.labels.tolist() == [0, 1, 1]
    assert annotations.areas.tolist() == [100, 900, 5]  # stated, or of the clipped box
    assert dict(annotations.problems.counts) == {"degenerate_box": 1, "overhanging_box": 1, "without_boxes": 1}
    dataset = DetectionDataset(annotations)
    assert [len(dataset[0, i].labels) for i in range(3)] == [1, 0, 1]  # no crowd in training


def test_ground_truth_returns_to_coco(coco_set):
    truth = read_coco("val", root=str(coco_set(IMAGES, ANNOTATIONS, CATEGORIES))).ground_truth()
    assert [image["id"] for image in truth["images"]] == [7, 3, 9]
    assert [(a["image_id"], a["category_id"], a["iscrowd"]) for a in truth["annotations"]] == [
        (7, 4, 0),
        (7, 90, 1),
        (9, 90, 0),
    ]
    assert truth["annotations"][2]["bbox"] == [1, 2, 3, 4]


def test_an_area_of_null_and_a_byte_order_mark_are_read(coco_set):
    root = coco_set(IMAGES, [a | {"area": None} for a in ANNOTATIONS], CATEGORIES)
    file = root / "annotations" / "instances_train.json"
    file.write_text(file.read_text(), encoding="utf-8-sig")
    assert read_coco("train", root=str(root)).areas.tolist() == [100, 900, 12]


def test_boxes_of_a_resized_image_are_scaled(coco_set):
    root = coco_set(IMAGES, ANNOTATIONS, CATEGORIES)
    Image.fromarray(np.zeros((80, 120, 3), np.uint8)).save(root / "images" / "train" / "b.png")
    annotations = read_coco("train", root=str(root))
    assert annotations.sizes[0].tolist() == [80, 120]
    assert annotations.boxes[:2].tolist() == [[100, 60, 120, 80], [0, 0, 60, 60]]
    assert annotations.problems.counts["stated_size"] == 1


def test_the_stated_area_goes_along_with_a_resized_image(coco_set):
    root = coco_set(IMAGES, ANNOTATIONS[:1], CATEGORIES)
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(root / "images" / "train" / "ä b.png")
    assert read_coco("train", root=str(root)).areas.tolist() == [20]


def test_numbers_as_other_tools_write_them(coco_set):
    root = coco_set(IMAGES, ANNOTATIONS[:1], CATEGORIES)
    file = root / "annotations" / "instances_train.json"
    text = file.read_text().replace('"height": 40', '"height": 40.0').replace('"iscrowd": 0', '"iscrowd": 1.0')
    file.write_text(text.replace('"area": 5.0', '"area": "big"').replace('"image_id": 9', '"image_id": 9.0'))
    annotations = read_coco("train", root=str(root))
    assert annotations.areas.tolist() == [12]
    assert annotations.crowd.tolist() == [True]
    assert not annotations.problems.summary()


def test_two_records_of_one_file_are_one_image(coco_set):
    images = [IMAGES[2], IMAGES[2] | {"id": 5}]
    boxes = [ANNOTATIONS[0], ANNOTATIONS[0] | {"image_id": 5, "bbox": [5, 5, 5, 5]}]
    annotations = read_coco("train", root=str(coco_set(images, boxes, CATEGORIES)))
    assert annotations.boxes.tolist() == [[1, 2, 4, 6], [5, 5, 10, 10]]
    assert annotations.problems.summary() == "left out: images listed twice (1)"


def test_an_image_outside_the_folder_may_come_later(coco_set):
    """The index does not see that folder, so it is not used."""
    root = coco_set(IMAGES, ANNOTATIONS, CATEGORIES)
    file = root / "annotations" / "instances_train.json"
    file.write_text(file.read_text().replace("b.png", "../other/b.png"))
    assert len(read_coco("train", root=str(root))) == 2 - 1
    (root / "images" / "other").mkdir()
    for name in ("b.png", "ä b.png"):
        (root / "images" / "train" / name).rename(root / "images" / "other" / name)
    assert len(read_coco("train", root=str(root))) == 2


def test_a_record_without_a_box_has_that_of_its_polygons(coco_set):
    polygons = {"id": 1, "image_id": 9, "category_id": 4, "segmentation": [[1, 2, 9, 3, 4, 11], [2, 12, 3, 12, 3, 13]]}
    annotations = read_coco("train", root=str(coco_set(IMAGES, [polygons], CATEGORIES)))
    assert annotations.boxes.tolist() == [[1, 2, 9, 13]]


def test_an_image_that_changes_after_the_labels_were_read_is_named(coco_set):
    root = coco_set(IMAGES, ANNOTATIONS, CATEGORIES)
    dataset = DetectionDataset(read_coco("train", root=str(root)))
    Image.fromarray(np.zeros((60, 40, 3), np.uint8)).save(root / "images" / "train" / "b.png")
    with pytest.raises(DetkitError, match=r"b\.png is now 40x60 pixels"):
        dataset[0, 0]


def test_letterboxed_boxes_follow_their_image(coco_set):
    annotations = read_coco("val", root=str(coco_set(IMAGES, ANNOTATIONS, CATEGORIES)))
    sample = LetterboxDataset(DetectionDataset(annotations), 120)[0, 0]
    assert sample.image.shape == (120, 120, 3)
    np.testing.assert_allclose(sample.boxes, [[100, 80, 120, 100]])


SOUND = [ANNOTATIONS[0], ANNOTATIONS[1] | {"bbox": [40, 20, 20, 20]}, ANNOTATIONS[2]]


def broken(change):
    content = json.loads(json.dumps({"images": IMAGES, "annotations": SOUND, "categories": CATEGORIES}))
    change(content)
    return json.dumps(content).replace('{"id"', '\n{"id"')


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('{"images": [', "malformed json, line 1 column 13"),
        ('{"images": [],\n "annotations": [{"id": 1,}]}', "malformed json, line 2 column 2[67]"),
        ("[]", "no json object"),
        ("\udce9", "not UTF-8"),
        ("[" * 100_000, "no json object"),
        ('{"images": [' + "[" * 100_000, "malformed json"),
        ('{"images": {}}', "'images' is no list"),
        (broken(lambda c: c["categories"][0].update(id=4)), "'categories' holds the same id twice"),
        (broken(lambda c: c["categories"][0].update(name="dog")), "'categories' holds the same name twice"),
        (broken(lambda c: c["categories"][0].pop("name")), r"categories\[0\] needs a whole 'id' and a 'name'"),
        (broken(lambda c: c.pop("categories")), "has no list 'categories'"),
        (broken(lambda c: c["categories"].clear()), "'categories' is empty"),
        (broken(lambda c: c["images"].clear()), "lists no images"),
        (
            broken(lambda c: [i.update(file_name="x.png") for i in c["images"]]),
            r"leaves no image .*x\.png: the file does",
        ),
    ],
)
def test_what_cannot_be_read_is_refused(coco_set, text, sentence):
    root = coco_set(IMAGES, ANNOTATIONS, CATEGORIES)
    file = root / "annotations" / "instances_train.json"
    file.write_text(text, errors="surrogateescape")
    with pytest.raises(DetkitError, match=sentence) as error:
        read_coco_json(file, root / "images" / "train")
    assert str(file) in str(error.value)


@pytest.mark.parametrize(
    ("change", "kind", "detail"),
    [
        (lambda c: c["images"][1].update(width=-1), "malformed_image", r"images\[1\] needs"),
        (lambda c: c["images"][1].update(id=2**70), "malformed_image", r"images\[1\] needs a whole 'id'"),
        (
            lambda c: c["images"][1].pop("file_name"),
            "malformed_image",
            r"images\[1\] needs a whole 'id', a 'file_name'",
        ),
        (lambda c: c["images"].append("text"), "malformed_image", r"images\[3\] needs"),
        (lambda c: c["images"][1].update(id=7), "repeated_image", r"images\[1\] has the id 7, given before"),
        (lambda c: c["images"][1].update(file_name="b.png"), "repeated_image", "listed before"),
        (lambda c: c["images"][1].update(file_name="x.png"), "missing_image", "does not exist"),
        (lambda c: c["images"][1].update(width=60), "contradicting_size", "is 30x30 pixels, its labels state 60x30"),
        (lambda c: c["annotations"][0].update(iscrowd="0"), "malformed_box", r"annotations\[0\] needs"),
        (lambda c: c["annotations"][0].update(bbox="1234"), "malformed_box", r"annotations\[0\] needs"),
        (lambda c: c["annotations"][0].update(bbox=["1", 2, 3, 4]), "malformed_box", r"annotations\[0\] needs"),
        (lambda c: c["annotations"][0].update(bbox=[1, 2, 3, 10**400]), "malformed_box", r"annotations\[0\] needs"),
        (
            lambda c: c["annotations"][0].update(bbox=[1, 2, 3, float("nan")]),
            "malformed_box",
            r"annotations\[0\] needs",
        ),
        (lambda c: c["annotations"][0].update(bbox=[1, 2, 3]), "malformed_box", r"annotations\[0\] needs"),
        (lambda c: c["annotations"].append("text"), "malformed_box", r"annotations\[3\] needs"),
        (lambda c: c["annotations"][2].update(image_id=5), "labels_without_image", r"annotations\[2\] has image_id 5"),
        (lambda c: c["annotations"][0].update(category_id=1), "unknown_class", r"annotations\[0\] has category_id 1"),
        (lambda c: c["annotations"][0].update(bbox=[30, 2, 3, 4]), "outside_box", r"annotations\[0\] \[30, 2, 33, 6\]"),
        (lambda c: c["annotations"].append(c["annotations"][0]), "duplicate_box", r"annotations\[3\] .* given before"),
        (lambda c: c["annotations"][0].update(bbox=[15, 2, 9, 4]), "overhanging_box", r"annotations\[0\] .* beyond"),
    ],
)
def test_what_makes_no_sense_is_mended_or_left_out(coco_set, change, kind, detail):
    root = coco_set(IMAGES, SOUND, CATEGORIES)
    file = root / "annotations" / "instances_train.json"
    file.write_text(broken(change))
    annotations = read_coco_json(file, root / "images" / "train")
    (problem,) = (p for p in annotations.problems.problems if p.kind == kind)
    assert re.search(detail, problem.detail)
    if match := re.search(r"(\w+)\[(\d+)\]", problem.detail):
        before = {"images": 1, "annotations": 1 + len(json.loads(file.read_text())["images"])}[match[1]]
        assert problem.line == 1 + before + int(match[2]) or "text" in file.read_text()
    with pytest.raises(DetkitError, match=r"data\.strict=true refuses it"):
        annotations.problems.refuse()


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DetkitError, match=r"cannot read annotations .*instances_train\.json: No such file"):
        read_coco("train", root=str(tmp_path))
    with pytest.raises(DetkitError, match=r"data\.root=.*gone is not a folder"):
        read_coco("train", root=str(tmp_path / "gone"))
