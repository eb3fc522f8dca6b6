"""Boxes that are sorted in blocks on disk come out as those that fit into one."""

import errno
import json
import tracemalloc
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from detkit.data import box_table, index
from detkit.data.annotations import PathBuilder, PathTable
from detkit.data.box_table import ROW, BoxTable, GrowingArray
from detkit.data.formats import json_stream
from detkit.data.formats.coco import read_coco
from detkit.data.index import ARRAYS
from detkit.data.issues import IssueLog
from detkit.errors import DetkitError

IMAGES = 7


def write_coco(root, boxes: int, images: int = IMAGES):
    """A set of blank images with many boxes in any order: some wrong, of no image, of no class, twice, too large."""
    (root / "images/train").mkdir(parents=True)
    (root / "annotations").mkdir()
    for k in range(images):
        Image.new("RGB", (64, 48)).save(root / "images/train" / f"{k}.png")
    rng = np.random.default_rng(0)
    xy, wh = rng.integers(-2, 60, (boxes, 2)).tolist(), rng.integers(0, 30, (boxes, 2)).tolist()
    image, label = rng.integers(0, images + 1, boxes).tolist(), rng.integers(0, 4, boxes).tolist()
    records = [
        {"image_id": image[k], "category_id": label[k], "bbox": [*xy[k], *wh[k]], "iscrowd": k % 2, "area": k}
        for k in range(boxes)
    ]
    content = {
        "annotations": records + records[::50],
        "images": [{"id": images - k, "file_name": f"{k}.png", "height": 48, "width": 64} for k in range(images)],
        "categories": [{"id": k, "name": f"class{k}"} for k in range(3)],
    }
    (root / "annotations/instances_train.json").write_text(json.dumps(content))
    return str(root)


@pytest.mark.parametrize("log", [False, True])
def test_blocks_on_disk_make_no_difference(log, tmp_path, monkeypatch):
    root = write_coco(tmp_path, 500)
    whole = read_coco("train", root=root, log=IssueLog())
    monkeypatch.setattr(box_table, "BLOCK", 32)
    monkeypatch.setattr(box_table, "GROUPS", 4)
    monkeypatch.setattr(index, "CHUNK", 100)
    for _ in range(2):  # the second time from the index
        blocks = read_coco("train", root=root, log=IssueLog() if log else None)
        for name in ARRAYS:
            assert np.array_equal(getattr(blocks, name), getattr(whole, name))
            assert getattr(blocks, name).dtype == getattr(whole, name).dtype
        assert list(blocks.paths) == list(whole.paths)
        assert blocks.issues.counts == whole.issues.counts
    assert {"duplicate_box", "degenerate_box", "overhanging_box", "unknown_class", "labels_without_image"} < set(
        whole.issues.counts
    )


def test_every_image_s_rows_come_together_in_their_order(monkeypatch):
    monkeypatch.setattr(box_table, "BLOCK", 10)
    rng, table, count = np.random.default_rng(0), BoxTable(), 40
    images = rng.integers(0, count, 137).tolist() + [3] * 25  # more than a block of one image
    for k, image in enumerate(images):
        table.append(image, 0, k, 0, (0, 0, 1, 1), 0, False)
    assert len(table) == len(images)
    parts = [*table.by_image(count, lambda rows: rows[rows["line"] % 5 > 0])]
    found = [(image, line) for part in parts for image, line in zip(part["image"], part["line"], strict=True)]
    assert sorted(found, key=lambda pair: pair[0]) == sorted((i, k) for k, i in enumerate(images) if k % 5)
    seen = [set(part["image"].tolist()) for part in parts]
    assert len(parts) > 10 and sum(map(len, seen)) == len(set().union(*seen))
    assert all(max(a) < min(b) for a, b in pairwise(seen) if a and b)


def test_boxes_are_never_all_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(box_table, "BLOCK", 500)
    monkeypatch.setattr(json_stream, "CHUNK", 2**14)
    read_coco("train", root=write_coco(tmp_path / "first", 600))  # what is imported or allocated once
    root = write_coco(tmp_path / "second", 20_000, images=200)
    tracemalloc.start()
    read_coco("train", root=root)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20_000 * ROW.itemsize / 2


def test_a_full_temporary_folder_is_one_error_message(monkeypatch):
    class Full:
        def seek(self, place: int) -> None: ...

        def write(self, data: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(box_table, "open_temporary", Full)
    monkeypatch.setattr(box_table, "BLOCK", 2)
    table = BoxTable()
    with pytest.raises(DetkitError, match=r"No space left on device: .* TMPDIR"):
        for _ in range(3):
            table.append(0, 0, 0, 0, (0, 0, 1, 1), 0, False)
    assert ROW.itemsize == 80


@pytest.mark.parametrize("on_disk", [False, True])
def test_a_growing_array(on_disk):
    array = GrowingArray(np.float64, (2,), on_disk)
    assert array.to_array().shape == (0, 2)
    parts = [np.arange(6).reshape(3, 2), np.zeros((0, 2)), np.full((1, 2), 0.5)]
    for part in parts:
        array.append(part)
    assert np.array_equal(array.to_array(), np.concatenate(parts))
    assert array.to_array().dtype == np.float64


def test_file_names_of_every_kind():
    names = ["a.jpg", "ü\udcff.jpg", "", "b/c.jpg", "\ud800.jpg"]  # no UTF-8; no file can have the last
    builder = PathBuilder()
    for name in names:
        builder.append(name)
    assert list(builder) == [*names[:-1], "\\ud800.jpg"]
    keep = np.array([True, False, False, True, False])
    assert [str(path) for path in builder.table(keep)] == ["a.jpg", "b/c.jpg"]
    assert [str(path) for path in builder.table(np.ones(5, bool))][:2] == names[:2]
    assert isinstance(builder.table(keep), PathTable)
