import json
import re

import numpy as np
import pycocotools.mask
import pytest
from PIL import Image

from detkit.data.dataset import DetectionDataset, LetterboxDataset
from detkit.data.formats.coco import read_coco, read_coco_json
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
    assert dict(annotations.issues.counts) == {"degenerate_box": 1, "overhanging_box": 1, "without_boxes": 1}
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
    assert annotations.issues.counts["stated_size"] == 1


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
    assert not annotations.issues.summary()


def test_two_records_of_one_file_are_one_image(coco_set):
    images = [IMAGES[2], IMAGES[2] | {"id": 5}]
    boxes = [ANNOTATIONS[0], ANNOTATIONS[0] | {"image_id": 5, "bbox": [5, 5, 5, 5]}]
    annotations = read_coco("train", root=str(coco_set(images, boxes, CATEGORIES)))
    assert annotations.boxes.tolist() == [[1, 2, 4, 6], [5, 5, 10, 10]]
    assert annotations.issues.summary() == "skipped: images listed twice (1)"


def test_each_record_of_one_file_has_a_size_of_its_own(coco_set):
    """The boxes of one that was labelled larger shrink with it; those of one of another shape cannot be trusted."""
    image = IMAGES[2]
    larger = image | {"id": 5, "height": 2 * image["height"], "width": 2 * image["width"]}
    mismatch = image | {"id": 6, "height": 3 * image["height"]}
    records = [image, larger, mismatch, image | {"id": 8}]  # the file is of the size that the last one states
    boxes = [ANNOTATIONS[0] | {"image_id": 5, "bbox": [10, 10, 10, 10]}, ANNOTATIONS[0] | {"image_id": 6}]
    annotations = read_coco("train", root=str(coco_set(records, boxes, CATEGORIES)))
    assert annotations.boxes.tolist() == [[5, 5, 10, 10]]
    assert annotations.issues.counts["contradicting_size"] == 1


def test_an_image_outside_the_folder_may_come_later(coco_set):
    """The index does not see that folder, so it is not used."""
    root = coco_set(IMAGES, ANNOTATIONS, CATEGORIES)
    file = root / "annotations" / "instances_train.json"
    file.write_text(file.read_text().replace('"b.png', '"../other/b.png'))
    (root / "images" / "train" / "b.png").rename(root / "b.png")
    assert len(read_coco("train", root=str(root))) == 2
    (root / "images" / "other").mkdir()
    (root / "b.png").rename(root / "images" / "other" / "b.png")
    assert len(read_coco("train", root=str(root))) == 3


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
    ("text", "message"),
    [
        ('{"images": [', "malformed json, line 1 column 13"),
        ('{"images": [],\n "annotations": [{"id": 1,}]}', "malformed json, line 2 column 2[67]"),
        ("[]", "not a json object"),
        ("\udce9", "not UTF-8"),
        ("[" * 100_000, "not a json object"),
        ('{"images": [' + "[" * 100_000, "malformed json"),
        ('{"images": {}}', "'images' is not a list"),
        (broken(lambda c: c["categories"][0].update(id=4)), "'categories' holds the same id twice"),
        (broken(lambda c: c["categories"][0].update(name="dog")), "'categories' holds the same name twice"),
        (broken(lambda c: c["categories"][0].pop("name")), r"categories\[0\] needs a 'name', there is none"),
        (broken(lambda c: c["categories"][0].update(id=None)), r"categories\[0\] needs an integer 'id', there is none"),
        (broken(lambda c: c["categories"][0].update(id=1.5)), r"categories\[0\] needs an integer 'id', it is 1\.5"),
        (broken(lambda c: c["categories"].append("cat")), r"categories\[2\] needs fields like 'id', it is cat"),
        (broken(lambda c: c["categories"][0].update(name=" ")), "'categories' holds the name ' '"),
        (broken(lambda c: c["categories"][0].update(name="")), "'categories' holds the name ''"),
        (broken(lambda c: c["categories"][0].update(name="a\x1b[2Jb")), "which cannot be printed"),
        (broken(lambda c: c) + broken(lambda c: c), r"malformed json, line 9 column 27: .*text after the end"),
        (broken(lambda c: c) + "\n]", "text after the end"),
        (broken(lambda c: c)[:-1] + ', "images": []}', "another list 'images'"),
        (broken(lambda c: c.pop("categories")), "the list 'categories' is missing"),
        (broken(lambda c: c["categories"].clear()), "'categories' is empty"),
        (broken(lambda c: c["images"].clear()), "lists no images"),
        (
            broken(lambda c: [i.update(file_name="x.png") for i in c["images"]]),
            r"leaves no usable image.*x\.png: the file does",
        ),
    ],
)
def test_what_cannot_be_read_is_refused(coco_set, text, message):
    root = coco_set(IMAGES, ANNOTATIONS, CATEGORIES)
    file = root / "annotations" / "instances_train.json"
    file.write_text(text, errors="surrogateescape")
    with pytest.raises(DetkitError, match=message) as error:
        read_coco_json(file, root / "images" / "train")
    assert str(file) in str(error.value)


@pytest.mark.parametrize(
    ("change", "kind", "detail"),
    [
        (
            lambda c: c["images"][1].update(width="wide"),
            "malformed_image",
            r"images\[1\] needs 'width' .*, it is wide$",
        ),
        (lambda c: c["images"][1].update(height=2**40), "malformed_image", r"images\[1\] needs 'height'"),
        (lambda c: c["images"][1].update(id=""), "malformed_image", r"images\[1\] needs an integer 'id', it is $"),
        (lambda c: c["images"][1].update(id=2**70), "malformed_image", r"images\[1\] needs an integer 'id'"),
        (
            lambda c: c["images"][1].pop("file_name"),
            "malformed_image",
            r"images\[1\] needs a 'file_name', there is none",
        ),
        (lambda c: c["images"].append("text"), "malformed_image", r"images\[3\] needs"),
        (lambda c: c["images"][1].update(id=7), "repeated_image", r"images\[1\] has the id 7 of an earlier"),
        (lambda c: c["images"][1].update(file_name="b.png"), "repeated_image", "listed before"),
        (lambda c: c["images"][1].update(file_name="x.png"), "missing_image", "does not exist"),
        (lambda c: c["images"][1].update(width=60), "contradicting_size", "is 30x30 pixels, its labels state 60x30"),
        (
            lambda c: c["annotations"][0].update(iscrowd="?"),
            "malformed_box",
            r"needs 'iscrowd' to be 0 or 1, it is \?$",
        ),
        (lambda c: c["annotations"][0].update(iscrowd=2), "malformed_box", r"\[0\] needs 'iscrowd' .*, it is 2$"),
        (
            lambda c: c["annotations"][0].pop("category_id"),
            "malformed_box",
            r"needs an integer 'category_id', there is none",
        ),
        (
            lambda c: c["annotations"][0].update(image_id=[9]),
            "malformed_box",
            r"needs an integer 'image_id', it is \[9\]",
        ),
        (lambda c: c["annotations"][0].update(bbox=None), "malformed_box", "needs a 'bbox', or a 'segmentation'"),
        (
            lambda c: c["annotations"][0].update(bbox=[], segmentation={"size": [4, 4], "counts": [16]}),
            "malformed_box",
            "needs a 'bbox', or a 'segmentation' of polygons or a mask, it is {'counts'",
        ),
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
        (lambda c: c["annotations"].append(c["annotations"][0]), "duplicate_box", r"annotations\[3\] .* duplicates"),
        (lambda c: c["annotations"][0].update(bbox=[15, 2, 9, 4]), "overhanging_box", r"annotations\[0\] .* exceeds"),
    ],
)
def test_what_makes_no_sense_is_fixed_or_skipped(coco_set, change, kind, detail):
    root = coco_set(IMAGES, SOUND, CATEGORIES)
    file = root / "annotations" / "instances_train.json"
    file.write_text(broken(change))
    annotations = read_coco_json(file, root / "images" / "train")
    (issue,) = (p for p in annotations.issues.issues if p.kind == kind)
    assert re.search(detail, issue.detail)
    if match := re.search(r"(\w+)\[(\d+)\]", issue.detail):
        before = {"images": 1, "annotations": 1 + len(json.loads(file.read_text())["images"])}[match[1]]
        assert issue.line == 1 + before + int(match[2]) or "text" in file.read_text()
    with pytest.raises(DetkitError, match=r"data\.strict=true rejects it"):
        annotations.issues.raise_if_any()


@pytest.mark.parametrize(
    "change",
    [
        lambda c: [i.update(height=-1, width=-1) for i in c["images"]],
        lambda c: [i.update(height=str(i["height"]), width=f"{i['width']}.0") for i in c["images"]],
        lambda c: [i.update(height=None, width=0) for i in c["images"]],
        lambda c: [r.update({k: float(v)}) for n in c for r in c[n] for k, v in r.items() if k.endswith("id")],
        lambda c: [r.update({k: str(v)}) for n in c for r in c[n] for k, v in r.items() if k.endswith("id")],
        lambda c: [
            r.update({k: f"{v}.0"}) for n in ("images", "annotations") for r in c[n] for k, v in r.items() if k == "id"
        ],
        lambda c: [a.update(iscrowd=str(a["iscrowd"])) for a in c["annotations"]],
        lambda c: [a.update(iscrowd=bool(a["iscrowd"])) for a in c["annotations"]],
        lambda c: [a.update(iscrowd=["False", "TRUE"][a["iscrowd"]]) for a in c["annotations"]],
        lambda c: c["categories"].insert(0, {"id": 0, "name": "cat", "supercategory": "none"}),
        lambda c: c["categories"].insert(2, {"id": 99, "name": "cat", "supercategory": "none"}),
        lambda c: [i.update(coco_url=f"http://x.org/train/{i.pop('file_name')}", license=1) for i in c["images"]],
        lambda c: [i.update(neg_category_ids=[], not_exhaustive_category_ids=[4]) for i in c["images"]],
        lambda c: [a.update(attributes={"occluded": False}, ignore=0, segmentation=[]) for a in c["annotations"]],
    ],
)
def test_fields_as_all_kinds_of_tools_write_them(coco_set, change):
    root = coco_set(IMAGES, SOUND, CATEGORIES)
    expected = read_coco("val", root=str(root))
    file = root / "annotations" / "instances_train.json"
    file.write_text(broken(change))
    found = read_coco("train", root=str(root))
    for name in ("image_ids", "sizes", "offsets", "boxes", "labels", "areas", "crowd"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), name)
    assert (found.class_names, found.category_ids) == (expected.class_names, expected.category_ids)
    assert not found.issues.summary()


def test_ids_that_are_names_have_numbers_of_their_own(coco_set):
    def change(content):
        for k, image in enumerate(content["images"]):
            image["id"] = ("abc", "9" * 30, "deadbeef")[k]
        for annotation, image in zip(content["annotations"], ("deadbeef", "abc", "abc"), strict=True):
            annotation["image_id"] = image
            annotation["category_id"] = str(annotation["category_id"]) if annotation["category_id"] == 4 else "c90"
        content["categories"][0]["id"] = "c90"
        content["annotations"].append({"image_id": "gone", "category_id": "c90", "bbox": [1, 1, 2, 2]})

    root = coco_set(IMAGES, SOUND, CATEGORIES)
    (root / "annotations" / "instances_train.json").write_text(broken(change))
    annotations = read_coco("train", root=str(root))
    assert len(set(annotations.image_ids.tolist())) == 3
    assert annotations.offsets.tolist() == [0, 2, 2, 3]
    assert [annotations.class_names[k] for k in annotations.labels] == ["dog", "cat", "cat"]
    (issue,) = (p for p in annotations.issues.issues if p.kind == "labels_without_image")
    assert "image_id gone" in issue.detail


def test_a_root_category_that_is_used_is_no_root(coco_set):
    root = coco_set(IMAGES, SOUND, [*CATEGORIES, {"id": 0, "name": "any", "supercategory": "none"}])
    assert read_coco("train", root=str(root)).class_names == ("any", "dog", "cat")
    file = root / "annotations" / "instances_train.json"
    content = json.loads(file.read_text())
    content["categories"][2]["name"] = "cat"
    content["annotations"][0]["category_id"] = 0
    file.write_text(json.dumps(content))
    with pytest.raises(DetkitError, match="same name twice"):
        read_coco("train", root=str(root))


@pytest.mark.parametrize(
    "name",
    [
        r"images\b.png",
        r"..\..\images\train\b.png",
        r"C:\Users\me\b.png",
        "images/train/b.png",
        "/home/other/b.png",
        "../nowhere/b.png",
        "/data/local-files/?d=some/images/b.png",
        r"/data/local-files/?d=some%5Cimages%5Cb.png",
        "http://images.cocodataset.org/train2017/b.png",
        "s3://bucket/b.png",
        "%62.png",
    ],
)
def test_images_are_found_by_the_paths_of_other_machines(coco_set, name):
    root = coco_set(IMAGES, SOUND, CATEGORIES)
    (root / "annotations" / "instances_train.json").write_text(broken(lambda c: c["images"][0].update(file_name=name)))
    annotations = read_coco("train", root=str(root))
    assert [path.name for path in annotations.paths] == ["b.png", "empty.png", "ä b.png"]
    assert len(annotations.boxes) == 3
    assert not annotations.issues.summary()


def test_folders_distinguish_images_of_the_same_name(coco_set):
    root = coco_set(IMAGES, SOUND, CATEGORIES)
    folder = root / "images" / "train"
    for name in ("x", "y"):
        (folder / name).mkdir()
    (folder / "b.png").rename(folder / "x" / "b.png")
    (folder / "ä b.png").rename(folder / "y" / "b.png")
    file = root / "annotations" / "instances_train.json"

    def change(content):
        content["images"][0]["file_name"] = "set/x/b.png"
        content["images"][2]["file_name"] = "set\\y\\b.png"

    file.write_text(broken(change))
    annotations = read_coco("train", root=str(root))
    assert [path.parent.name for path in annotations.paths] == ["x", "train", "y"]
    assert not annotations.issues.summary()
    (folder / "y" / "b.png").unlink()
    (folder / "x" / "b.png").rename(folder / "b.png")
    annotations = read_coco("train", root=str(root))  # both may be the one that is left
    assert len(annotations) == 2
    assert annotations.issues.counts["repeated_image"] == 1


def random_mask(seed):
    return np.random.default_rng(seed).random((7, 9)) < 0.1


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("compressed", (False, True))
def test_a_record_without_a_box_has_that_of_its_mask(coco_set, seed, compressed):
    mask = np.zeros((20, 20), np.uint8)
    mask[3:10, 5:14] = random_mask(seed)
    if seed == 0:
        mask[:] = 1
    rle = pycocotools.mask.encode(np.asfortranarray(mask))
    box = pycocotools.mask.toBbox(rle).tolist()
    flat = mask.flatten(order="F")
    edges = np.flatnonzero(np.diff(flat, prepend=0, append=0 if flat[-1] else flat[-1]))
    counts = np.diff(edges, prepend=0, append=len(flat)).tolist()
    segmentation = {"size": [20, 20], "counts": rle["counts"].decode() if compressed else counts}
    record = {"id": 1, "image_id": 9, "category_id": 4, "bbox": None, "segmentation": segmentation, "iscrowd": 1}
    annotations = read_coco("train", root=str(coco_set(IMAGES, [record], CATEGORIES)))
    assert annotations.boxes.tolist() == [[box[0], box[1], box[0] + box[2], box[1] + box[3]]]


@pytest.mark.parametrize(
    "segmentation",
    [
        {"size": [20, 20], "counts": "~~~~"},
        {"size": [20, 20], "counts": "o" * 10_000},
        {"size": [20, 20], "counts": "ü"},
        {"size": [20, 20], "counts": [1, 2**70]},
        {"size": [2**40, 2**40], "counts": [1, 5]},
        {"size": [0, 0], "counts": [0, 0]},
        {"size": [20, 20], "counts": []},
        {"size": [20], "counts": [1, 2]},
        {"counts": [1, 2]},
        {},
        [],
        [[]],
        "text",
        [{"size": [2, 2], "counts": [1, 2]}],
    ],
)
def test_a_mask_that_makes_no_sense_is_named(coco_set, segmentation):
    record = {"id": 1, "image_id": 9, "category_id": 4, "segmentation": segmentation}
    annotations = read_coco("train", root=str(coco_set(IMAGES, [record, SOUND[0]], CATEGORIES)))
    assert (len(annotations.boxes), annotations.issues.counts["malformed_box"]) == (1, 1)


def test_a_polygon_may_be_one_flat_list(coco_set):
    record = {"id": 1, "image_id": 9, "category_id": 4, "segmentation": [1, 2, 9, 3, 4, 11]}
    annotations = read_coco("train", root=str(coco_set(IMAGES, [record], CATEGORIES)))
    assert annotations.boxes.tolist() == [[1, 2, 9, 11]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"_via_settings": {}, "_via_img_metadata": {}}', r"\(VIA\): export"),
        ('{"a.jpg1": {"filename": "a.jpg", "size": 1, "regions": []}}', "VGG Image Annotator's own json: export"),
        (
            '[{"id": 1, "annotations": [{"result": [{"from_name": "label", "to_name": "image"}]}]}]',
            "Label Studio's own",
        ),
        ('[{"image": "a.jpg", "annotations": [{"label": "x", "coordinates": {"x": 1}}]}]', "CreateML"),
        ('{"version": "5", "shapes": [], "imagePath": "a.jpg"}', "LabelMe"),
        ('[{"image_id": 1, "category_id": 1, "bbox": [1, 1, 2, 2], "score": 0.5}]', "COCO results"),
        ('<?xml version="1.0"?><annotations><image id="0"/></annotations>', "CVAT's own xml"),
        ("filename,xmin,ymin,xmax,ymax,class\na.jpg,1,2,3,4,dog\n", r"\(CSV\)"),
        ("<annotation><object></object></annotation>", "data=voc"),
        ("train: a\nval: b\nnames: [x]\n", "data=yolo"),
    ],
)
def test_files_of_other_tools_are_recognised(coco_set, text, message):
    root = coco_set(IMAGES, SOUND, CATEGORIES)
    (root / "annotations" / "instances_train.json").write_text(text)
    with pytest.raises(DetkitError, match="is not a COCO detection file.*" + message):
        read_coco("train", root=str(root))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DetkitError, match=r"cannot read annotations .*instances_train\.json: No such file"):
        read_coco("train", root=str(tmp_path))
    with pytest.raises(DetkitError, match=r"data\.root=.*gone is not a folder"):
        read_coco("train", root=str(tmp_path / "gone"))
