"""A set broken in every way that is looked for, in each format: every finding names its file and line."""

import csv
import io
import json
import os
import signal
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from detkit.data.annotations import PathTable
from detkit.data.audit import decode_and_hash_all
from detkit.data.formats.coco import read_coco
from detkit.errors import DetkitError
from detkit.viz.data_tables import class_counts
from tests.conftest import run_command

W, H = 100, 80
BOXES = {  # of boxes.png: kind of finding -> xyxy
    "": (10, 10, 50, 40),
    "outside_box": (120, 10, 150, 40),
    "degenerate_box": (20, 20, 20, 40),
    "duplicate_box": (10, 10, 50, 40),
    "overhanging_box": (60, 50, 130, 70),
    "unknown_class": (1, 1, 9, 9),
    "malformed_box": (1, 2, 3, float("nan")),
}
CLASSES = ("cat", "dog")
STATED = {"resized.png": (2 * W, 2 * H), "other.png": (W, 3 * H)}
FOUND = {  # file of an image -> what is found in train, whatever the format
    "empty.jpg": ["unreadable_image"],
    "pipe.jpg": ["unreadable_image"],
    "gone.jpg": ["missing_image"],
    "cut.jpg": ["truncated_image"],
    "damaged.jpg": ["damaged_image"],
    "turned.jpg": ["exif_rotated"],
    "gray.png": ["gray_image"],
    "deep.png": ["deep_image"],
    "cmyk.jpg": ["cmyk_image"],
    "alpha.png": ["alpha_image"],
    "bare.png": ["without_boxes"],
    "leaked.bmp": ["leaked_image"],
    "twin.png": ["equal_image"],
    "stray.png": ["unlabelled_image"],
    "resized.png": ["stated_size"],
    "other.png": ["contradicting_size"],
}
LISTED = ["boxes.png", *(name for name in FOUND if name != "stray.png")]


def draw(seed: int, size: tuple[int, int] = (W, H)) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), np.uint8)
    return Image.fromarray(cv2.resize(coarse, size, interpolation=cv2.INTER_CUBIC))


def draw_images(train: Path, val: Path) -> None:
    """Write the images of both splits, all broken ones in train."""
    train.mkdir(parents=True), val.mkdir(parents=True)
    for k in range(2):
        draw(k).save(val / f"val{k}.png")
    for seed, name in enumerate(("boxes.png", "bare.png", "stray.png", "resized.png", "other.png"), 10):
        draw(seed).save(train / name)
    draw(0).save(train / "leaked.bmp")
    draw(10).save(train / "twin.png", compress_level=1)
    (train / "empty.jpg").write_bytes(b"")
    os.mkfifo(train / "pipe.jpg")  # whoever opens it waits for ever
    stream = io.BytesIO()
    draw(20, (W, H)).save(stream, "JPEG", quality=98)
    data = stream.getvalue()
    (train / "cut.jpg").write_bytes(data[: len(data) // 2])
    (train / "damaged.jpg").write_bytes(data[: len(data) // 2] + data[-2:])  # the end is there, the middle is not
    exif = Image.Exif()
    exif[0x0112] = 6
    draw(21, (H, W)).save(train / "turned.jpg", exif=exif)
    draw(22).convert("L").save(train / "gray.png")
    cv2.imwrite(str(train / "deep.png"), np.asarray(draw(23)).astype(np.uint16) * 256)
    draw(24).convert("CMYK").save(train / "cmyk.jpg")
    alpha = draw(25)
    alpha.putalpha(100)
    alpha.save(train / "alpha.png")


def boxes_of(name: str) -> list[tuple[str, int, tuple]]:
    """Kind of finding, class and box of an image's boxes; class 9 is not defined."""
    if name == "boxes.png":
        return [(kind, 9 if kind == "unknown_class" else 1, box) for kind, box in BOXES.items()]
    return [] if name == "bare.png" else [("", len(name) % 2, (10, 10, 50, 40))]


def image_list(split: str) -> list[str]:
    return LISTED if split == "train" else ["val0.png", "val1.png"]


def break_coco(root: Path) -> tuple[list[str], list[tuple]]:
    """Write the set, a record a line; return the arguments that read it and the findings beyond those of images."""
    draw_images(root / "images/train", root / "images/val")
    (root / "annotations").mkdir()
    expected = []
    for split in ("train", "val"):
        file = root / "annotations" / f"instances_{split}.json"
        images, annotations = [], []
        for k, name in enumerate(image_list(split)):
            w, h = STATED.get(name, (W, H))
            images.append({"id": k, "file_name": name, "width": w, "height": h})
            for kind, label, (x1, y1, x2, y2) in boxes_of(name):
                box = [x1, y1, x2 - x1, y2 - y1]
                annotations.append((kind, {"image_id": k, "category_id": label, "bbox": box}))
        lines = ['{"images": [']
        if split == "train":
            expected += [
                ("repeated_image", file.name, 2 + len(images)),
                ("malformed_image", file.name, 3 + len(images)),
            ]
            images += [{"id": 0, "file_name": "again.png"}, {"id": "x", "file_name": None}]
            annotations.append(("labels_without_image", {"image_id": 999, "category_id": 0, "bbox": [1, 1, 5, 5]}))
        lines += [json.dumps(image) + "," for image in images]
        lines[-1] = lines[-1][:-1] + '], "annotations": ['
        for kind, record in annotations:
            lines.append(json.dumps(record) + ",")
            expected += [(kind, file.name, len(lines))] if kind else []
        categories = [{"id": k, "name": name} for k, name in enumerate(CLASSES)]
        file.write_text("\n".join(lines)[:-1] + f'], "categories": {json.dumps(categories)}}}')
    return ["data=coco", f"data.root={root}"], expected


def break_yolo(root: Path) -> tuple[list[str], list[tuple]]:
    """The same as YOLO txt; training images are listed in a file, so that some can be missing or not be named."""
    draw_images(root / "images/train", root / "images/val")
    expected = []
    for split in ("train", "val"):
        (root / "labels" / split).mkdir(parents=True)
        for name in image_list(split):
            lines = []
            for kind, label, (x1, y1, x2, y2) in boxes_of(name):
                numbers = (x1 + x2) / 2 / W, (y1 + y2) / 2 / H, (x2 - x1) / W, (y2 - y1) / H
                lines.append(" ".join(map(str, (label, *numbers))))
                kind = "beyond_one" if kind == "overhanging_box" else kind
                expected += [(kind, "boxes.txt", len(lines))] if kind else []
            (root / "labels" / split / f"{Path(name).stem}.txt").write_text("\n".join(lines))
    draw(30).save(root / "images/train/binary.png")
    draw(31).save(root / "images/train/forgotten.png")
    (root / "labels/train/binary.txt").write_bytes(b"\xff\xfe\x00")
    (root / "labels/train/orphan.txt").write_text("0 0.5 0.5 0.1 0.1")
    names = [*LISTED, "binary.png", "forgotten.png", "boxes.png"]
    (root / "train.txt").write_text("\n".join(f"images/train/{name}" for name in names))
    (root / "data.yaml").write_text("train: train.txt\nval: images/val\nnames: [cat, dog]\n")
    for kind, file in (
        ("unreadable_labels", "binary.txt"),
        ("unlabelled_image", "binary.png"),
        ("labels_without_image", "orphan.txt"),
        ("unlabelled_image", "forgotten.png"),
        ("without_boxes", "forgotten.png"),
        ("repeated_image", "boxes.png"),
    ):
        expected.append((kind, file, None))
    return ["data=yolo", f"data.yaml={root / 'data.yaml'}"], expected


def break_voc(root: Path) -> tuple[list[str], list[tuple]]:
    """The same as Pascal VOC, which has no class ids that could be out of range."""
    draw_images(root / "JPEGImages/train", root / "JPEGImages/val")
    (root / "Annotations").mkdir()
    (root / "ImageSets/Main").mkdir(parents=True)
    expected = []
    for split in ("train", "val"):
        for name in image_list(split):
            w, h = STATED.get(name, (W, H))
            lines = [f"<annotation><size><width>{w}</width><height>{h}</height></size>"]
            for kind, label, box in boxes_of(name):
                if kind == "unknown_class":
                    continue
                sides = "".join(f"<{s}>{v}</{s}>" for s, v in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
                lines.append(f"<object><name>{CLASSES[label]}</name><bndbox>{sides}</bndbox></object>")
                expected += [(kind, "boxes.xml", len(lines))] if kind else []
            (root / "Annotations" / f"{Path(name).stem}.xml").write_text("\n".join([*lines, "</annotation>"]))
        names = [Path(name).stem for name in image_list(split)]
        names += ["forgotten", "broken"] if split == "train" else []
        (root / "ImageSets/Main" / f"{split}.txt").write_text("\n".join(names))
    for seed, name in enumerate(("forgotten", "broken"), 30):
        draw(seed).save(root / f"JPEGImages/train/{name}.png")
        expected.append(("unlabelled_image", f"{name}.png", None))
    (root / "Annotations/broken.xml").write_text("<annotation>\n<object>\n</annotation>")
    expected += [("missing_labels", "forgotten.xml", None), ("unreadable_labels", "broken.xml", 3)]
    return ["data=voc", f"data.root={root}"], expected


BREAK = {"coco": break_coco, "yolo": break_yolo, "voc": break_voc}


def check_data(monkeypatch, capsys, *arguments: str) -> tuple[int, str, str]:
    """Run the command in this process; return exit status, stdout and stderr."""
    return run_command(monkeypatch, capsys, "check_data", "workers=1", *arguments)


def findings(run_dir: Path) -> list[tuple]:
    """The rows of findings.csv: kind, split, file name, line."""
    with (run_dir / "findings.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    return [
        (row["kind"], row["split"], Path(row["file"]).name, int(row["line"]) if row["line"] else None) for row in rows
    ]


def state(folder: Path) -> dict[str, tuple]:
    return {str(p): (p.stat().st_size, p.stat().st_mtime_ns) for p in folder.rglob("*")}


@pytest.mark.parametrize("form", BREAK)
def test_everything_wrong_is_found_and_a_cleaned_copy_is_clean(form, tmp_path, monkeypatch, capsys):
    root = tmp_path / "set"
    arguments, expected = BREAK[form](root)
    before, run_dir, copy = state(root), tmp_path / "run", tmp_path / "copy"
    status, out, _ = check_data(monkeypatch, capsys, *arguments, f"run_dir={run_dir}", f"fix={copy}")
    assert status == 2
    assert state(root) == before
    images = FOUND if form != "yolo" else {name: kinds for name, kinds in FOUND.items() if name not in STATED}
    expected += [(kind, name, None) for name, kinds in images.items() for kind in kinds]
    expected = [(kind, "train", file, line) for kind, file, line in expected]
    key = lambda row: (*row[:3], row[3] or 0)  # noqa: E731
    assert sorted(findings(run_dir), key=key) == sorted(expected, key=key)
    notes = {"exif_rotated", "gray_image", "deep_image", "cmyk_image", "alpha_image", "without_boxes", "equal_image"}
    noted = sum(kind in notes | {"unlabelled_image"} for kind, *_ in expected)
    assert f"{len(expected) - noted} errors, {noted} notes: findings.csv and plots are in {run_dir}" in out
    line = next(line for kind, _, file, line in expected if kind == "degenerate_box")
    assert f"skipped: boxes without area: 1 in train\n  train: {root}" in out and f":{line}: " in out
    assert "unfixed: images that are also in another split: 1 in train" in out
    assert {p.name for p in (run_dir / "plots").iterdir()} == {
        f"{name}.png" for name in ("classes", "box_sizes", "box_centres", "image_sizes", "boxes_per_image")
    }
    assert all(np.asarray(Image.open(p)).std() > 1 for p in (run_dir / "plots").iterdir())

    key = f"data.yaml={copy / 'data.yaml'}" if form == "yolo" else f"data.root={copy}"
    assert "warning: images rotated by their EXIF orientation: 1;" in out
    assert f"cleaned copy, {form}: " in out and f"python tools/train.py data={form} {key}" in out
    status, out, _ = check_data(monkeypatch, capsys, f"data={form}", key, f"run_dir={tmp_path / 'again'}")
    assert status == 0, out
    assert "no errors" in out
    files = {p.name for p in copy.rglob("*")}
    assert {"boxes.png", "turned.jpg", "twin.png", "val0.png"} < files
    assert not {"leaked.bmp", "damaged.jpg", "cut.jpg", "other.png" if form != "yolo" else "empty.jpg"} & files


def test_another_format_can_be_asked_for(tmp_path, monkeypatch, capsys):
    arguments, _ = break_yolo(tmp_path / "set")
    arguments += [f"run_dir={tmp_path / 'run'}", f"fix={tmp_path / 'copy'}", "format=coco"]
    status, out, _ = check_data(monkeypatch, capsys, *arguments)
    assert status == 2
    assert "cleaned copy, coco" in out
    a = read_coco("train", root=str(tmp_path / "copy"))
    kept = next(k for k in range(len(a)) if a.paths[k].name == "boxes.png")
    np.testing.assert_allclose(a.boxes[a.rows(kept)], [(10, 10, 50, 40), (60, 50, 100, 70)])  # clipped, once


def test_a_clean_set_is_status_0(shapes_root, tmp_path, monkeypatch, capsys):
    status, out, _ = check_data(monkeypatch, capsys, f"data.root={shapes_root}", f"run_dir={tmp_path / 'run'}")
    assert status == 0
    assert "no errors" in out
    assert "│ images │ 24" in " ".join(out.split())


def test_names_without_end_are_cut_where_they_are_printed(coco_set, tmp_path, monkeypatch, capsys):
    images = [{"id": 1, "file_name": "a.png", "height": 20, "width": 20}]
    boxes = [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [2, 2, 9, 9]}]
    root = coco_set(images, boxes, [{"id": 1, "name": "long" * 100_000}])
    arguments = ("data=coco", f"data.root={root}", f"run_dir={tmp_path / 'run'}")
    status, out, err = check_data(monkeypatch, capsys, *arguments)
    assert (status, err) == (2, "")  # train and val show the same image
    assert "longlong" in out
    assert len(out) < 20_000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("fix=.", ". is not an empty folder"),
        ("format=yollo", "unknown format 'yollo'"),
        ("format=[coco]", "format=['coco'] must be the name of a format"),
        ("run_dir=.", "run_dir=. is not empty"),
        ("data.val_annotations=gone.json", "gone.json: No such file"),
        ("data.val_images=gone", "leaves no usable image"),
    ],
)
def test_mistakes_are_one_error_message(shapes_root, tmp_path, monkeypatch, capsys, change, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").write_text("mine")
    status, _, error = check_data(monkeypatch, capsys, "data=coco", f"data.root={shapes_root}", change)
    assert status == 2
    assert message in error and len(error.strip().splitlines()) == 1


def test_the_limit_on_pixels_is_a_key(shapes_root, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DETKIT_MAX_PIXELS", "1")  # to be as it was after the test
    root = f"data.root={shapes_root}"
    assert check_data(monkeypatch, capsys, root)[0] == 0
    status, _, error = check_data(monkeypatch, capsys, root, "max_pixels=65535")
    assert status == 2
    assert "it has 256x256 pixels, more than the limit max_pixels=65535" in " ".join(error.split())
    status, _, error = check_data(monkeypatch, capsys, root, "max_pixels=0")
    assert (status, error) == (2, "error: max_pixels=0 must be a whole number from 1 to 2**30\n")
    assert check_data(monkeypatch, capsys, root)[0] == 0


def test_many_processes_see_what_one_sees(tmp_path):
    (tmp_path / "images").mkdir()
    draw_images(tmp_path / "images/train", tmp_path / "images/val")
    images = [{"id": k, "file_name": f"train/{name}"} for k, name in enumerate(LISTED)]
    categories = [{"id": 1, "name": "cat"}]
    (tmp_path / "a.json").write_text(json.dumps({"images": images, "annotations": [], "categories": categories}))
    a = read_coco("train", root=str(tmp_path), train_images="images", train_annotations="a.json")
    one, three = decode_and_hash_all(a, 1), decode_and_hash_all(a, 3)
    assert one == three
    assert ["premature end" in damage for _, damage in one] == [path.name == "damaged.jpg" for path in a.paths]
    assert class_counts(a).tolist() == [0]


def test_a_killed_process_is_one_error_message(shapes_root, monkeypatch):
    a = read_coco("val", root=str(shapes_root))
    monkeypatch.setattr("detkit.data.audit.read_image", lambda path: os._exit(9))
    with pytest.raises(DetkitError, match="was killed, possibly for lack of memory"):
        decode_and_hash_all(a, 1)


def test_a_stopped_process_is_one_error_message(shapes_root, monkeypatch):
    a = read_coco("val", root=str(shapes_root))
    monkeypatch.setattr("detkit.data.file_utils.TIMEOUT", 2.0)
    monkeypatch.setattr("detkit.data.audit.read_image", lambda path: os.kill(os.getpid(), signal.SIGSTOP))
    with pytest.raises(DetkitError, match=r"no result for 2 seconds: .* were stopped"):
        decode_and_hash_all(a, 1)


def test_an_image_that_goes_away_meanwhile_is_a_finding(shapes_root, tmp_path):
    a = read_coco("val", root=str(shapes_root))
    a.paths = PathTable.from_paths([tmp_path / "gone.png"])
    ((digest, damage),) = decode_and_hash_all(a, 1)
    assert digest == b"" and "does not decode" in damage
