"""Tar shards in the webdataset layout: many samples in few large files, which are read sequentially.

A sample consists of KEY.jpg (or another image) and KEY.json in the same tar file::

    {"id": 7, "width": 640, "height": 480, "boxes": [[x1, y1, x2, y2], ...], "labels": [0, ...],
     "areas": [...], "crowd": [false, ...]}

with boxes in pixels of the upright image and labels from 0; only ``boxes`` and ``labels`` are required. One json per
split (``train.json``, ``val.json``, ...) in the same folder lists the shards::

    {"class_names": [...], "category_ids": [...], "shards": [{"file": "train-000000.tar", "images": 1000}, ...]}

The path of an image points into its shard (ops/image.py), so all code that reads single images works with shards.
Training reads shards sequentially (data/shard_loader.py).
"""

import itertools
import json
import math
import os
import tarfile
from array import array
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from detkit.data.annotations import Annotations
from detkit.data.builder import AnnotationBuilder, check_class_names
from detkit.data.file_utils import names_in
from detkit.data.formats.coco_fields import MAX_COORDINATE, is_int64
from detkit.data.formats.writing import WriteResult
from detkit.data.index import cached
from detkit.data.issues import IssueLog
from detkit.data.splits import REQUIRED_SPLITS, pick_split
from detkit.errors import DetkitError
from detkit.ops.files import open_regular, read_regular
from detkit.ops.image import IMAGE_SUFFIXES, MAX_BYTES, read_bytes
from detkit.registry import DATASETS, SPLIT_NAMES, WRITERS

SHARD_IMAGES = 1000
MAX_JSON = 2**26  # bytes of the json of a sample
MAX_LIST = 2**28  # bytes of SPLIT.json
# Exceptions of tarfile for damaged files, in addition to OSError.
TAR_ERRORS = (tarfile.TarError, EOFError, ValueError, OverflowError, IndexError, KeyError, RecursionError, MemoryError)


@DATASETS.register("webdataset")
def read_webdataset(split: str, *, root: str | int, log: IssueLog | None = None) -> Annotations:
    """Read the labels of a split, in the order of the shards.

    A damaged shard is read up to the damage. For the validation of images and boxes, see data/validation.py.

    Args:
        split: its name.
        root: folder of the shards; URLs are not supported.
        log: receives all problems; if given, the index is not used.

    Raises:
        DetkitError: there is no such folder or split, a SPLIT.json is missing or malformed, a shard is missing, or no
            image is left.
    """
    folder = _folder(root)
    split = pick_split(split, webdataset_splits(root=root), folder)
    file = folder / f"{split}.json"
    metadata = _load(file)
    shards = [folder / shard["file"] for shard in metadata["shards"]]
    for shard in shards:
        if not os.path.isfile(shard):  # noqa: PTH113  (Path.is_file may raise OSError)
            raise DetkitError(
                f"{shard}, listed in {file}, does not exist: copy it there, or convert the data set again"
            )

    def build(log: IssueLog) -> Annotations:
        builder = AnnotationBuilder(file, log, metadata["class_names"], metadata["category_ids"])
        for shard, entry in zip(shards, metadata["shards"], strict=True):
            _read_shard(shard, entry["images"], builder)
        ids = builder.image_ids
        if min(ids, default=0) < 0 or len(set(ids)) < len(ids):  # missing or not unique
            builder.image_ids = array("q", range(1, len(ids) + 1))
        return builder.build(lambda image, k, _: (builder.paths[image], None, f"boxes[{k}] "))

    return cached("webdataset", [file, *shards], [], [], log, build, split=split)


@SPLIT_NAMES.register("webdataset")
def webdataset_splits(*, root: str | int) -> list[str]:
    """Return train, val, and the names of all other json files that list shards."""
    folder = _folder(root)
    others = [folder / name for name in names_in(folder) if name.endswith(".json") and not name.startswith(".")]
    return [
        *REQUIRED_SPLITS,
        *(file.stem for file in others if file.stem not in REQUIRED_SPLITS and _lists_shards(file)),
    ]


def _folder(root: str | int) -> Path:
    folder = Path(str(root))
    if not folder.is_dir():
        raise DetkitError(f"data.root={root} is not a folder; tar shards must be in a local folder")
    return folder


def _lists_shards(file: Path) -> bool:
    try:
        return {"class_names", "shards"} <= json.loads(read_regular(file, MAX_JSON)).keys()
    except (OSError, ValueError, AttributeError, RecursionError):
        return False


@WRITERS.register("webdataset")
def write_shards(splits: Mapping[str, Annotations], folder: Path) -> WriteResult:
    """Write tar shards and their lists, without any loss of information."""
    for split, annotations in splits.items():
        write_webdataset(annotations, folder, split)
    return WriteResult({"name": "webdataset", "root": str(folder)})


def write_webdataset(annotations: Annotations, folder: Path, split: str, shard_images: int = SHARD_IMAGES) -> None:
    """Write a split as ``SPLIT-000000.tar``, ... and ``SPLIT.json``, with unmodified image files.

    Each file is written atomically, the json last. The train split is shuffled, as training reads shards sequentially
    and shuffles only within a buffer.

    Raises:
        DetkitError: an image cannot be read, or the folder cannot be written.
    """
    count = len(annotations)
    order = np.random.default_rng(0).permutation(count) if split == "train" else np.arange(count)
    shards = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{split}.json").unlink(missing_ok=True)  # it lists shards that are overwritten
        for number, start in enumerate(range(0, count, shard_images)):
            name, rows = f"{split}-{number:06d}.tar", order[start : start + shard_images].tolist()
            with (
                _atomic_path(folder / name) as scratch,
                tarfile.open(scratch, "w", format=tarfile.GNU_FORMAT) as archive,
            ):
                for row in rows:
                    path = annotations.paths[row]
                    _add(archive, f"{row:08d}{path.suffix.lower()}", read_bytes(path).tobytes())
                    _add(archive, f"{row:08d}.json", json.dumps(_label(annotations, row)).encode())
            shards.append({"file": name, "images": len(rows)})
        metadata = {"class_names": annotations.class_names, "category_ids": annotations.category_ids, "shards": shards}
        with _atomic_path(folder / f"{split}.json") as scratch:
            scratch.write_text(json.dumps(metadata, indent=1))
    except OSError as error:
        raise DetkitError(f"cannot write {error.filename or folder}: {error.strerror or error}") from None


def member_name(name: str) -> str:
    """Return the name of a tar member as a single path component."""
    return name.removeprefix("./").replace("/", "_")


def _label(annotations: Annotations, row: int) -> dict[str, Any]:
    """Return the content of the json of a sample."""
    rows = annotations.rows(row)
    height, width = annotations.sizes[row].tolist()
    columns = {name: getattr(annotations, name)[rows].tolist() for name in ("boxes", "labels", "areas", "crowd")}
    name = annotations.paths[row].name.encode(errors="replace").decode()
    return {"id": int(annotations.image_ids[row]), "width": width, "height": height, "file": name, **columns}


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(data), 0o644
    archive.addfile(member, BytesIO(data))


@contextmanager
def _atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary file that is renamed to ``path`` after the block, or removed if it fails."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield scratch
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def _load(file: Path) -> dict[str, Any]:
    """Read SPLIT.json; shards must be file names in the same folder."""
    try:
        metadata = json.loads(read_regular(file, MAX_LIST).decode("utf-8-sig"))
    except FileNotFoundError:
        raise DetkitError(f"{file} does not exist: it lists the shards, and convert_data writes it") from None
    except OSError as error:
        raise DetkitError(f"cannot read {file}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise DetkitError(f"{file} is malformed json: {error}") from None
    metadata = metadata if isinstance(metadata, dict) else {}
    names: Any = metadata.get("class_names")
    shards: Any = metadata.get("shards")
    ids = metadata.setdefault("category_ids", list(range(len(names))) if isinstance(names, list) else [])
    if not (_is_list(names, lambda v: isinstance(v, str)) and names):
        raise DetkitError(f"{file}: 'class_names' must be a list of different names")
    check_class_names(names, f"{file}: 'class_names'")
    if not (_is_list(ids, is_int64) and len(set(ids)) == len(names) == len(ids)):
        raise DetkitError(f"{file}: 'category_ids' must be a list of different whole numbers, one for each class")
    if not (_is_list(shards, _is_shard) and len({shard["file"] for shard in shards}) == len(shards)):
        requirement = (
            'different names of tar files in the same folder, e.g. {"file": "train-000000.tar", "images": 1000}'
        )
        raise DetkitError(f"{file}: 'shards' must list {requirement}")
    return metadata


def _is_list(value: Any, allowed: Any) -> bool:
    return isinstance(value, list) and all(allowed(item) for item in value)


def _is_shard(entry: Any) -> bool:
    if not (isinstance(entry, dict) and isinstance(entry.get("file"), str) and is_int64(entry.get("images"))):
        return False
    name = entry["file"]
    return name.endswith(".tar") and not set(name) & set('/\\:"\0\n') and entry["images"] >= 0


def _read_shard(shard: Path, listed: int, builder: AnnotationBuilder) -> None:
    """Append the samples of one tar file, ``listed`` of which are expected."""
    found, damage = 0, ""
    seen: set[str] = set()
    try:
        with open_regular(shard) as file, tarfile.open(fileobj=file, mode="r:") as archive:
            for _, members in itertools.groupby(_members(archive, shard.stat().st_size), lambda m: _split(m.name)[0]):
                found += _read_sample(archive, shard, list(members), seen, builder)
    except (OSError, *TAR_ERRORS) as error:
        damage = f"; {error}" if str(error) else f"; {type(error).__name__}"
    if damage or found < listed:
        builder.log.add("broken_shard", shard, None, f"contains {found} of {listed} listed samples{damage}")


def _members(archive: tarfile.TarFile, end: int) -> Iterator[tarfile.TarInfo]:
    """Yield the regular files of an archive of ``end`` bytes."""
    last = -1
    while (member := archive.next()) is not None:
        archive.members.clear()  # type: ignore[attr-defined]  # to bound the memory
        if member.offset <= last or member.size < 0 or member.issparse():  # a sparse file may claim any size
            raise tarfile.ReadError(f"member '{member.name}' is not a regular file")
        if member.offset_data + member.size > end:
            raise tarfile.ReadError("unexpected end of file")
        last = member.offset
        if member.isreg():
            yield member


def _split(name: str) -> tuple[str, str]:
    """Split the name of a member into key and suffix at the first dot of its last part, as in webdataset."""
    folder, slash, last = name.rpartition("/")
    stem, _, suffix = last.partition(".")
    return folder + slash + stem, suffix.lower()


def _read_sample(
    archive: tarfile.TarFile, shard: Path, members: list[tarfile.TarInfo], seen: set[str], builder: AnnotationBuilder
) -> bool:
    """Append one sample, the ``members`` of one key; return whether there is an image.

    The names of the images of the shard are collected in ``seen``.
    """
    log = builder.log
    image = next((m for m in members if f".{_split(m.name)[1]}" in IMAGE_SUFFIXES), None)
    label = next((m for m in members if _split(m.name)[1] == "json"), None)
    if image is None:
        if label is not None:
            log.add("labels_without_image", shard, None, f"{label.name} has no image")
        return False
    name = member_name(image.name)
    path = f"{shard}/{image.offset_data}+{image.size}/{name}"
    if image.size > MAX_BYTES:
        log.add("unreadable_image", path, None, f"is larger than {MAX_BYTES} bytes")
    elif name in seen:
        log.add("repeated_image", path, None, "another image of the shard has the same name")
    elif label is None:
        log.add("missing_labels", path, None, f"there is no {_split(image.name)[0]}.json")
    else:
        seen.add(name)
        try:
            if label.size > MAX_JSON:
                raise ValueError(f"it is larger than {MAX_JSON} bytes")
            _append(path, json.loads(archive.extractfile(label).read()), builder)  # type: ignore[union-attr]  # a regular file
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError) as error:
            message = f"{label.name} must be json with 'boxes' [[x1, y1, x2, y2], ...] and as many 'labels': {error}"
            log.add("unreadable_labels", path, None, message)
    return True


def _append(path: str, record: dict[str, Any], builder: AnnotationBuilder) -> None:
    """Append an image and its boxes.

    Raises:
        ValueError, TypeError, KeyError, AttributeError, OverflowError: the json is invalid; nothing is appended.
    """
    boxes, labels = record["boxes"], record["labels"]
    areas = record.get("areas") or [None] * len(boxes)
    crowd = record.get("crowd") or [False] * len(boxes)
    rows = list(zip(boxes, labels, areas, crowd, strict=True))
    stated = (record.get("height") or 0, record.get("width") or 0)
    if not all(is_int64(side) and 0 <= side < 2**31 for side in stated):
        raise ValueError("'height' and 'width' must be integers")
    image_id = record.get("id", -1)
    image = builder.add_image(path, image_id if is_int64(image_id) else -1, stated)
    for k, (box, label, area, is_crowd) in enumerate(rows):
        if not (_is_list(box, lambda v: _is_number(v, MAX_COORDINATE)) and len(box) == 4 and is_int64(label)):
            builder.log.add("malformed_box", path, None, f"boxes[{k}] needs four numbers and a label from 0")
        elif not 0 <= label < len(builder.class_names):
            builder.log.add("unknown_class", path, None, f"boxes[{k}] has the undefined label {label}")
        else:
            area = area if _is_number(area, MAX_COORDINATE**2) else math.nan
            builder.add_box(image, label, box, k, area=area, crowd=bool(is_crowd))


def _is_number(value: Any, limit: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < limit
