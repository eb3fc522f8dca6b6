import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest

from detkit.data import index
from detkit.data.formats.coco import read_coco
from detkit.data.index import ARRAYS, index_folder, open_index
from tests.test_coco import ANNOTATIONS, CATEGORIES, IMAGES


@pytest.fixture
def root(coco_set, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return str(coco_set(IMAGES, ANNOTATIONS, CATEGORIES))


def files():
    return sorted(index_folder().glob("*"))


def test_the_second_start_maps_what_the_first_one_read(root, monkeypatch):
    first = read_coco("train", root=root)
    assert len(files()) == 1
    monkeypatch.setattr("detkit.data.formats.coco.read_coco_json", None)  # not called again
    second = read_coco("train", root=root)
    for name in ARRAYS:
        assert isinstance(getattr(second, name).base, np.memmap)
        assert np.array_equal(getattr(first, name), getattr(second, name))
    assert list(first.paths) == list(second.paths)
    assert first.class_names == second.class_names
    assert first.issues.as_dict() == second.issues.as_dict()
    assert (
        second.issues.summary()
        == "skipped: boxes without area (1); fixed: boxes partly outside their image, clipped (1)"
    )


@pytest.mark.parametrize("change", ["labels", "image", "new image", "image gone"])
def test_a_change_of_the_files_makes_a_new_index(root, change):
    read_coco("train", root=root)
    (before,) = files()
    label, image = f"{root}/annotations/instances_train.json", f"{root}/images/train/b.png"
    if change == "labels":
        os.utime(label, ns=(1, 1))
    elif change == "image":
        os.utime(image, ns=(1, 1))
    elif change == "new image":
        os.link(image, f"{root}/images/train/c.png")
    else:
        os.unlink(image)
    assert len(read_coco("train", root=root)) == (2 if change == "image gone" else 3)
    (after,) = files()  # the older one is gone
    assert before != after


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "header"])
def test_a_damaged_index_is_built_anew(root, damage):
    good = read_coco("train", root=root)
    (file,) = files()
    good.boxes = good.boxes.copy()  # a mapped file must not shrink under its reader: indexes are only ever replaced
    content = file.read_bytes()
    broken = {"cut": content[:-40], "empty": b"", "text": b"hello" * 100, "header": content[:8] + b"[]" + content[10:]}
    file.write_bytes(broken[damage])
    assert open_index(file) is None
    assert np.array_equal(read_coco("train", root=root).boxes, good.boxes)
    assert file.read_bytes() == content


def test_a_cache_that_cannot_be_written_is_done_without(root, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert len(read_coco("train", root=root)) == 3


def _read(root, seen):
    seen.put(read_coco("train", root=root).boxes.sum())


def test_several_processes_at_once(root):
    context = multiprocessing.get_context("fork")
    seen = context.Queue()
    processes = [context.Process(target=_read, args=(root, seen)) for _ in range(6)]
    for process in processes:
        process.start()
    sums = {seen.get(timeout=60) for _ in processes}
    for process in processes:
        process.join(60)
    assert len(sums) == 1
    assert len(files()) == 1  # and nothing temporary is left


def test_nothing_of_an_index_is_unpickled():
    source = Path(index.__file__).read_text()
    assert "allow_pickle" not in source
    assert "np.load" not in source
