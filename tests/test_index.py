import multiprocessing
import os
import shutil
from io import BytesIO
from pathlib import Path
from random import Random

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


def content_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def replace(file: Path, content: bytes) -> None:
    """Put a new file in the place of one: that which is mapped must not shrink under its reader."""
    file.unlink()
    file.write_bytes(content)


def npy(array: np.ndarray) -> bytes:
    np.save(stream := BytesIO(), array)
    return stream.getvalue()


DAMAGE = {
    "cut": ("boxes.npy", lambda old: old[:-40]),
    "empty": ("labels.npy", lambda old: b""),
    "text": ("offsets.npy", lambda old: b"hello" * 100),
    "zip": ("areas.npy", lambda old: b"PK\x03\x04" + old),
    "gone": ("crowd.npy", None),
    "header": ("boxes.npy", lambda old: old[:10] + b"[" * 60 + old[70:]),
    "unclosed header": ("boxes.npy", lambda old: old[:10] + b"{([('" + old[15:]),
    "larger than the file": ("boxes.npy", lambda old: old.replace(b"'shape': (", b"'shape': (9999999999999")),
    "objects": ("areas.npy", lambda old: old.replace(b"<f8", b"|O ")),
    "another type": ("labels.npy", lambda old: npy(np.zeros(4, np.float32))),
    "another shape": ("boxes.npy", lambda old: npy(np.zeros((4, 3)))),
    "longer": ("areas.npy", lambda old: npy(np.zeros(100))),
    "no json": ("index.json", lambda old: b"{"),
    "a list": ("index.json", lambda old: b"[1]"),
    "deep": ("index.json", lambda old: b"[" * 100_000),
    "without classes": ("index.json", lambda old: old.replace(b"class_names", b"classes")),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_index_is_built_anew(root, damage):
    good = read_coco("train", root=root)
    (folder,) = files()
    name, change = DAMAGE[damage]
    content = content_of(folder)
    if change is None:
        (folder / name).unlink()
    else:
        assert change(content[name]) != content[name]
        replace(folder / name, change(content[name]))
    assert open_index(folder) is None
    assert np.array_equal(read_coco("train", root=root).boxes, good.boxes)
    assert content_of(folder) == content


def test_any_damage_is_an_index_or_none(root):
    """Bytes changed anywhere in the headers: what opens has arrays that fit one another."""
    read_coco("train", root=root)
    (folder,) = files()
    rng, opened = Random(0), 0
    for _ in range(300):
        file = rng.choice(sorted(folder.iterdir()))
        content = bytearray(old := file.read_bytes())
        for _ in range(rng.choice((1, 1, 3))):
            content[rng.randrange(min(len(content), 128))] = rng.randrange(256)
        replace(file, bytes(content))
        index = open_index(folder)
        if index is not None:
            opened += 1
            assert len(index.paths) == len(index.sizes) and index.offsets[-1] == len(index.boxes)
        replace(file, old)
    assert 0 < opened < 200


@pytest.mark.parametrize("kind", ["file", "folder", "link", "pipe"])
def test_something_else_in_the_place_of_an_index(root, kind, tmp_path):
    good = read_coco("train", root=root)
    (folder,) = files()
    content = content_of(folder)
    if kind == "pipe":
        (folder / "boxes.npy").unlink()
        os.mkfifo(folder / "boxes.npy")
    else:
        shutil.rmtree(folder)
        make = {"file": folder.touch, "folder": folder.mkdir, "link": lambda: folder.symlink_to(tmp_path / "nowhere")}
        make[kind]()
    assert np.array_equal(read_coco("train", root=root).boxes, good.boxes)
    assert content_of(folder) == content


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
