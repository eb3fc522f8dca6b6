"""Tar shards: a round trip, every sample once over ranks and workers, damage, and a training."""

import json
import math
import multiprocessing
import os
import tarfile
from collections import Counter
from collections.abc import Iterator
from io import BytesIO, FileIO
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch.distributed as dist
from PIL import Image

from detkit.data import shard_loader
from detkit.data.annotations import Annotations
from detkit.data.augment.pipeline import Augmentation
from detkit.data.dataset import DetectionDataset
from detkit.data.formats.shapes import read_shapes
from detkit.data.formats.tar_shards import read_webdataset, write_webdataset
from detkit.data.issues import IssueLog
from detkit.data.read import read_split
from detkit.data.shard_loader import ShardLoader, cut_batches
from detkit.errors import DetkitError
from detkit.ops.image import read_bytes, read_image, tar_member
from detkit.tasks import eval as eval_task
from detkit.tasks import load_config, train

PLAIN = {"mosaic": {"p": 0.0, "close_epochs": 0}, "affine": {"scale": [1.0, 1.0], "translate": 0.0}, "transforms": {}}
MOSAIC = PLAIN | {"mosaic": {"p": 1.0, "close_epochs": 0}, "affine": {"scale": [0.5, 1.5], "translate": 0.1}}


@pytest.fixture(scope="module")
def shards(shapes_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shapes of both splits as shards of 7 images: the last ones hold 3."""
    folder = tmp_path_factory.mktemp("shards")
    for split in ("train", "val"):
        write_webdataset(read_shapes(split, root=str(shapes_root)), folder, split, shard_images=7)
    return folder


def write_tar(file: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(file, "w") as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, BytesIO(data))


def png(side: int = 16, value: int = 0) -> bytes:
    data = BytesIO()
    Image.fromarray(np.full((side, side, 3), value, np.uint8)).save(data, "PNG")
    return data.getvalue()


def label(**content: object) -> bytes:
    return json.dumps({"boxes": [[2, 2, 8, 8]], "labels": [0]} | content).encode()


def write_list(folder: Path, *shards: tuple[str, int], **content: object) -> None:
    about = {"class_names": ["a", "b"], "shards": [{"file": file, "images": n} for file, n in shards]} | content
    (folder / "train.json").write_text(json.dumps(about))


def by_id(annotations: Annotations) -> dict[int, tuple]:
    rows = {}
    for k, image_id in enumerate(annotations.image_ids.tolist()):
        columns = [getattr(annotations, c)[annotations.rows(k)].tolist() for c in ("boxes", "labels", "areas", "crowd")]
        rows[image_id] = (annotations.sizes[k].tolist(), *columns, read_bytes(annotations.paths[k]).tobytes())
    return rows


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_set_comes_back_as_it_was(split, shapes_root, shards):
    source, back = read_shapes(split, root=str(shapes_root)), read_webdataset(split, root=str(shards))
    assert by_id(back) == by_id(source)
    assert (back.class_names, back.category_ids) == (source.class_names, source.category_ids)
    assert back.issues.of("skipped", "fixed") == {}
    assert len(list(shards.glob(f"{split}-*.tar"))) == math.ceil(len(source) / 7)
    assert not [path for path in shards.iterdir() if path.name.startswith(".")]
    again = read_webdataset(split, root=str(shards))  # from the index
    assert np.array_equal(read_image(again.paths[-1]), read_image(back.paths[-1]))


@pytest.mark.parametrize(
    "count,ranks,batch_size", [(24, 1, 8), (25, 2, 4), (9, 2, 4), (17, 4, 4), (3, 3, 8), (10, 3, 2)]
)
def test_all_ranks_have_as_many_batches(count, ranks, batch_size):
    shares = [count * (r + 1) // ranks - count * r // ranks for r in range(ranks)]
    cuts = [cut_batches(share, math.ceil(count / ranks), batch_size) for share in shares]
    sizes = np.array([np.diff(c) for c in cuts])  # of one length, or this fails
    assert sizes.sum(1).tolist() == shares
    assert sizes.min() > 0 and sizes.max() <= batch_size
    assert ranks > 1 or (sizes[0, :-1] == batch_size).all()


def _rank(root: str, rank: int, ranks: int, workers: int, queue: multiprocessing.Queue) -> None:
    if ranks > 1:
        dist.init_process_group("gloo", init_method=f"file://{root}/group", rank=rank, world_size=ranks)
    dataset = DetectionDataset(read_webdataset("train", root=root))
    loader = ShardLoader(dataset, Augmentation(64, PLAIN, 2), 3, workers=workers)
    epochs = [[[o.index for o in batch.metas] for batch in loader.epoch(epoch)] for epoch in (0, 1, 0)]
    queue.put((rank, len(loader), epochs))


@pytest.mark.parametrize(
    "ranks,workers,shard_images", [(1, 0, 10), (1, 2, 10), (2, 2, 100), (2, 2, 10), (2, 2, 1), (3, 1, 100)]
)
def test_every_image_comes_once_an_epoch(ranks, workers, shard_images, shapes_root, tmp_path):
    """One shard, three uneven ones or one for each image, read by up to four processes that know of no other."""
    source = read_shapes("train", root=str(shapes_root))
    write_webdataset(source, tmp_path, "train", shard_images)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    read_webdataset("train", root=str(tmp_path))  # the index, once
    processes = [context.Process(target=_rank, args=(str(tmp_path), r, ranks, workers, queue)) for r in range(ranks)]
    for process in processes:
        process.start()
    results = {rank: rest for rank, *rest in (queue.get(timeout=60) for _ in processes)}
    for process in processes:
        process.join()
    for epoch in range(3):
        batches = [results[rank][1][epoch] for rank in range(ranks)]
        assert {len(b) for b in batches} == {length for length, _ in results.values()}
        assert Counter(i for b in batches for batch in b for i in batch) == Counter(range(len(source)))
    assert len({json.dumps(results[0][1][epoch]) for epoch in range(3)}) == 2  # another order; 0 again is as it was
    assert results[0][1][0] == results[0][1][2]


def test_samples_do_not_depend_on_the_workers_but_for_partners(shards):
    dataset = DetectionDataset(read_webdataset("train", root=str(shards)))

    def samples(augment: dict, workers: int) -> dict[int, tuple[bytes, list]]:
        loader = ShardLoader(dataset, Augmentation(64, augment, 1), 5, workers=workers, seed=3)
        return {
            meta.index: (image.numpy().tobytes(), boxes[valid].tolist())
            for b in loader.epoch(0)
            for meta, image, boxes, valid in zip(b.metas, b.images, b.boxes_bm4, b.valid_bm, strict=True)
        }

    flips = PLAIN | {"affine": {"scale": [0.5, 1.5], "translate": 0.2}, "transforms": {"flip": {"p": 0.5}}}
    assert samples(flips, 0) == samples(flips, 2)
    assert samples(MOSAIC, 2) == samples(MOSAIC, 2) != samples(MOSAIC, 0)


def test_damage_is_left_out_and_reported(tmp_path):
    """A shard cut off within its third image, one that is no tar, one with every kind of bad sample."""
    write_tar(tmp_path / "a.tar", {f"{k}.{s}": d for k in range(4) for s, d in (("json", label(id=k)), ("png", png()))})
    with tarfile.open(tmp_path / "a.tar") as archive:
        cut = archive.getmember("2.png").offset_data + 20
    os.truncate(tmp_path / "a.tar", cut)
    (tmp_path / "b.tar").write_bytes(b"\x1f\x8b\x08 no tar at all" * 100)
    write_tar(
        tmp_path / "c.tar",
        {
            "good.png": png(), "good.json": label(),
            "dir/good.png": png(), "dir/good.json": label(boxes=[[0, 0, 99, 99], [1, 1, 1, 5]], labels=[1, 0]),
            "noimage.json": label(), "nolabel.png": png(),
            "broken.png": b"broken", "broken.json": label(),
            "half.png": png()[:50], "half.json": label(),
            "list.png": png(), "list.json": b"[1, 2]",
            "deep.png": png(), "deep.json": b"[" * 100_000,
            "short.png": png(), "short.json": label(labels=[]),
            "bad.png": png(), "bad.json": label(boxes=[[1, 2, 3], [1, 2, 3, None], [0, 0, 4, 4]], labels=[0, 0, 7]),
            "pickle.pyd": b"cos\nsystem\n(S'touch owned'\ntR.",
        },
    )  # fmt: skip
    write_list(tmp_path, ("a.tar", 4), ("b.tar", 1), ("c.tar", 9))
    log = IssueLog()
    found = read_webdataset("train", root=str(tmp_path), log=log)
    assert [path.name for path in found.paths] == ["0.png", "1.png", "good.png", "dir_good.png", "bad.png"]
    assert found.boxes[found.rows(3)].tolist() == [[0, 0, 16, 16]]
    assert log.of("skipped", "fixed") == {
        "broken_shard": 2,
        "unreadable_image": 1,
        "truncated_image": 1,
        "unreadable_labels": 3,
        "missing_labels": 1,
        "labels_without_image": 1,
        "malformed_box": 2,
        "unknown_class": 1,
        "degenerate_box": 1,
        "overhanging_box": 1,
    }
    log_text = " ".join(map(str, log.issues))
    assert "a.tar: contains 2 of 4 listed samples; unexpected end of file" in log_text
    assert "b.tar: contains 0 of 1 listed samples" in log_text
    loader = ShardLoader(DetectionDataset(found), Augmentation(64, PLAIN, 1), 2, workers=0)
    assert sorted(o.index for batch in loader.epoch(0) for o in batch.metas) == list(range(5))


@pytest.mark.parametrize("workers", [0, 2])
def test_damage_after_the_index_loses_no_other_image(workers, tmp_path):
    for shard in range(3):
        write_tar(
            tmp_path / f"{shard}.tar",
            {f"{k}.{s}": d for k in range(4) for s, d in (("png", png(value=k)), ("json", label()))},
        )
    write_list(tmp_path, ("0.tar", 4), ("1.tar", 4), ("2.tar", 4))
    dataset = DetectionDataset(read_webdataset("train", root=str(tmp_path)))
    damaged = dataset.annotations.paths[1]
    _, offset, _ = tar_member(damaged)
    with (tmp_path / "0.tar").open("r+b") as file:
        file.seek(offset)
        file.write(b"damaged!")
    os.truncate(tmp_path / "2.tar", 3000)  # within its second sample
    loader = ShardLoader(dataset, Augmentation(64, PLAIN, 1), 4, workers=workers)
    assert len(loader) == 3
    batches = list(loader.epoch(0))
    seen = {o.index for batch in batches for o in batch.metas}
    assert {0, 2, 3, 4, 5, 6, 7} <= seen <= set(range(12)) - {1, 11}
    log_text = " ".join([p for batch in batches for p in batch.issues] + loader.issues)
    assert f"cannot read image {damaged}" in log_text
    assert "2.tar: " in log_text and "images are skipped" in log_text
    for shard in tmp_path.glob("*.tar"):
        shard.unlink()
    with pytest.raises(DetkitError, match=r"no image of this epoch can be read; .*\.tar"):
        list(loader.epoch(1))


def test_the_shuffle_buffer_holds_no_more_bytes_than_it_may(monkeypatch):
    """Images of 1 to 400 bytes through 2,000: each comes once, mixed, and at most one image beyond the limit waits."""
    monkeypatch.setattr(shard_loader, "BUFFER_BYTES", 2000)
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 400, 3000).tolist()
    waiting: dict[int, int] = {}
    most = 0

    def come() -> Iterator[tuple[int, bytes]]:
        nonlocal most
        for row, size in enumerate(sizes):
            waiting[row] = size
            most = max(most, sum(waiting.values()))
            yield row, bytes(size)

    order = []
    for row, data in shard_loader.shuffled(come(), rng):
        assert len(data) == waiting.pop(row)
        order.append(row)
    assert sorted(order) == list(range(3000)) != order
    assert most <= 2000 + 400
    alone = [row for row, _ in shard_loader.shuffled(iter([(k, bytes(5000)) for k in range(5)]), rng)]
    assert alone == list(range(5))  # larger than the buffer: nothing waits


def test_shards_are_read_in_long_pieces(tmp_path, monkeypatch):
    """Images of some KB, with their labels between them: a read of a megabyte brings many."""
    pixels = np.random.default_rng(0).integers(0, 256, (200, 40, 40, 3), np.uint8)
    images = [cv2.imencode(".png", image)[1].tobytes() for image in pixels]
    write_tar(
        tmp_path / "a.tar",
        {f"{k:03d}.{s}": d for k, data in enumerate(images) for s, d in (("png", data), ("json", label()))},
    )
    write_list(tmp_path, ("a.tar", 200))
    dataset = DetectionDataset(read_webdataset("train", root=str(tmp_path)))
    reads = []

    class File(FileIO):
        def readinto(self, buffer: memoryview) -> int:
            reads.append(count := super().readinto(buffer))
            return count

    monkeypatch.setattr(shard_loader, "open_regular", File)
    loader = ShardLoader(dataset, Augmentation(64, PLAIN, 1), 10, workers=0)
    assert [*loader.stream._read(0, 200, [])] == [*enumerate(images)]
    assert len(reads) == 2  # of 1.3 MB


def test_a_failing_augmentation_says_why_from_its_process(shards):
    def augment(*_: object) -> None:
        raise DetkitError("augment.transforms: Blur fails")

    dataset = DetectionDataset(read_webdataset("train", root=str(shards)))
    with pytest.raises(DetkitError, match=r"^augment\.transforms: Blur fails$"):
        next(ShardLoader(dataset, augment, 4, workers=2).epoch(0))


def test_too_few_images_for_the_processes(shards, monkeypatch):
    dataset = DetectionDataset(read_webdataset("train", root=str(shards)))
    monkeypatch.setattr("detkit.data.shard_loader.world_size", lambda: 25)
    with pytest.raises(DetkitError, match="24 images are too few for batch_size=4 on 25 processes"):
        ShardLoader(dataset, Augmentation(64, PLAIN, 1), 4, workers=0)


MISTAKES = [
    ({"root": "/nowhere"}, {}, "data.root=/nowhere is not a folder"),
    ({}, None, r"train.json does not exist: it lists the shards"),
    ({}, "{", "train.json is malformed json"),
    ({}, "[" * 100_000, "train.json is malformed json"),
    ({}, "[]", "'class_names' must be a list of different names"),
    ({}, {"class_names": ["a", "a"]}, "'class_names' holds the same name twice"),
    ({}, {"class_names": ["a", " "]}, "'class_names' holds the name ' '"),
    ({}, {"category_ids": [1]}, "'category_ids' must be a list of different whole numbers"),
    ({}, {"shards": [{"file": "x.tar", "images": 3}]}, "x.tar, listed in .*train.json, does not exist"),
    ({}, {"shards": []}, "train.json lists no images"),
    *(
        ({}, {"shards": [{"file": name, "images": 3}]}, "'shards' must list different names of tar files")
        for name in ("pipe:touch owned; #.tar", "../x.tar", "/etc/x.tar", "http://x/y.tar", "x.tgz", 3)
    ),
]


@pytest.mark.parametrize("arguments,content,message", MISTAKES, ids=range(len(MISTAKES)))
def test_a_mistake_is_one_error_message(arguments, content, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if isinstance(content, str):
        (tmp_path / "train.json").write_text(content)
    elif content is not None:
        write_list(tmp_path, **content)
    with pytest.raises(DetkitError, match=message) as error:
        read_split({"name": "webdataset", "root": str(tmp_path), **arguments}, "train")
    assert len(str(error.value).splitlines()) == 1
    assert not (tmp_path / "owned").exists()


def test_training_on_shards(shards, shapes_root, tmp_path, capsys):
    """One epoch, mosaic and all; the weights score on the shards what they score on the files."""
    common = ["image_size=64", "device=cpu", "amp=off"]
    data = ["data=webdataset", f"data.root={shards}"]
    rest = ["batch_size=8", "workers=2", "trainer.epochs=1", f"run_dir={tmp_path / 'run'}"]
    train.run(load_config("train", [*common, *data, *rest]))
    assert (tmp_path / "run" / "plots").is_dir()
    ckpt = [f"ckpt={tmp_path / 'run' / 'last.safetensors'}", "workers=0", "score=0.0001"]
    metrics, predictions = [], []
    for name, given in (("shards", []), ("files", ["data=shapes", f"data.root={shapes_root}"])):
        cfg = load_config("eval", [*common, *ckpt, *given, f"run_dir={tmp_path / name}"])
        metrics.append(eval_task.run(cfg))
        predictions.append(json.loads((tmp_path / name / "predictions.json").read_text()))
    assert metrics[0] == metrics[1]
    assert predictions[0] == predictions[1] != []
