import json

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
    assert annotations.left_out == 1
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


def test_an_image_of_another_size_than_stated_is_named(coco_set):
    root = coco_set(IMAGES, ANNOTATIONS, CATEGORIES)
    Image.fromarray(np.zeros((60, 40, 3), np.uint8)).save(root / "images" / "train" / "b.png")
    dataset = DetectionDataset(read_coco("train", root=str(root)))
    with pytest.raises(DetkitError, match=r"b\.png is 40x60 pixels once turned upright, .*json says 60x40"):
        dataset[0, 0]


def test_letterboxed_boxes_follow_their_image(coco_set):
    annotations = read_coco("val", root=str(coco_set(IMAGES, ANNOTATIONS, CATEGORIES)))
    sample = LetterboxDataset(DetectionDataset(annotations), 120)[0, 0]
    assert sample.image.shape == (120, 120, 3)
    np.testing.assert_allclose(sample.boxes, [[100, 80, 120, 100]])


def broken(change):
    content = json.loads(json.dumps({"images": IMAGES, "annotations": ANNOTATIONS, "categories": CATEGORIES}))
    change(content)
    return json.dumps(content)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('{"images": [', "malformed json, line 1 column 13"),
        ("[]", "has no list 'images'"),
        ("\udce9", "not UTF-8"),
        ("[" * 100_000, "malformed json"),
        (broken(lambda c: c["categories"][0].update(id=4)), "'categories' holds the same id twice"),
        (broken(lambda c: c["categories"][0].update(name="dog")), "'categories' holds the same name twice"),
        (broken(lambda c: c["images"][0].update(width=0)), r"images\[0\] needs a height and a width"),
        (broken(lambda c: c["images"][0].update(id=2**70)), r"images\[0\] needs .* an id below 2\^63"),
        (broken(lambda c: c["annotations"][0].update(area="big")), r"annotations\[0\] needs an 'area' of 0 or more"),
        (broken(lambda c: c["annotations"][0].update(area=-1)), r"annotations\[0\] needs an 'area' of 0 or more"),
        (broken(lambda c: c["annotations"][0].update(iscrowd="0")), r"annotations\[0\] needs .* 'iscrowd' of 0 or 1"),
        (broken(lambda c: c["annotations"][0].update(bbox="1234")), r"annotations\[0\] needs 'bbox'"),
        (broken(lambda c: c["annotations"][0].update(bbox=[1, 2, 3, 10**400])), r"annotations\[0\] needs 'bbox'"),
        (broken(lambda c: c.pop("categories")), "has no list 'categories'"),
        (broken(lambda c: c["categories"].clear()), "'categories' is empty"),
        (broken(lambda c: c["images"].clear()), "'images' is empty"),
        (broken(lambda c: c["images"][1].update(id=7)), "same id twice"),
        (broken(lambda c: c["images"][1].pop("width")), r"images\[1\] needs 'width' \(int\), it has None"),
        (broken(lambda c: c["images"][0].update(file_name="x.png")), r"x\.png does not exist, though .*lists it"),
        (broken(lambda c: c["annotations"][2].update(image_id=5)), r"annotations\[2\] has image_id 5, which"),
        (broken(lambda c: c["annotations"][0].update(category_id=1)), r"annotations\[0\] has category_id 1, which"),
        (broken(lambda c: c["annotations"][0].update(bbox=[1, 2, 3])), r"annotations\[0\] needs 'bbox'"),
        (broken(lambda c: c["annotations"][0].update(bbox=[1, 2, 3, float("nan")])), r"annotations\[0\] needs 'bbox'"),
        (broken(lambda c: c["annotations"].append("text")), r"annotations\[4\] needs 'image_id'"),
    ],
)
def test_mistakes_in_a_file_are_named(coco_set, text, sentence):
    root = coco_set(IMAGES, ANNOTATIONS, CATEGORIES)
    file = root / "annotations" / "instances_train.json"
    file.write_text(text, errors="surrogateescape")
    with pytest.raises(DetkitError, match=sentence) as error:
        read_coco_json(file, root / "images" / "train")
    assert str(file) in str(error.value) or "lists it" in sentence


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DetkitError, match=r"cannot read annotations .*instances_train\.json: No such file"):
        read_coco("train", root=str(tmp_path))
    with pytest.raises(DetkitError, match=r"data\.root=.*gone is not a folder"):
        read_coco("train", root=str(tmp_path / "gone"))
