"""Checks that only check_data runs: corrupt image data, identical images, unlabelled images."""

import hashlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import cv2
import numpy as np

from detkit.data.annotations import Annotations
from detkit.data.file_utils import images_in, map_files
from detkit.data.issues import IssueLog
from detkit.data.splits import HELD_OUT_FIRST, held_out_first
from detkit.errors import DetkitError
from detkit.ops.image import read_image

DAMAGE = ("premature end", "bad Huffman code", "CRC error")  # in the warnings of decoders that fill in missing data
DecodeResult = tuple[bytes, str]  # hash of an image's pixels, empty if it does not decode; what is wrong with it


def audit_images(
    splits: Mapping[str, Annotations], logs: Mapping[str, IssueLog], workers: int
) -> dict[str, np.ndarray]:
    """Decode every image of every split and log the problems.

    Returns:
        (N,) bool for each split, the images to keep. Damaged images are dropped. An image in several splits is kept in
        one of them: test before val, train last. A split that is a subset of these three keeps the images that they
        keep.

    Raises:
        DetkitError: a decoding process was killed, for example when memory runs out.
    """
    results = {split: decode_and_hash_all(annotations, workers) for split, annotations in splits.items()}
    keep = {split: np.array([not damage for _, damage in results[split]], bool) for split in splits}
    owner: dict[bytes, tuple[str, Path]] = {}  # split and first image of each hash
    checked: list[str] = []
    subsets = _selections(splits)
    for split in held_out_first(splits):
        annotations, log = splits[split], logs[split]
        first = _log_images(annotations, results[split], log)
        if split in subsets:
            log.add("same_split", annotations.source, None, "lists only images of train, val and test")
            continue
        duplicate_of = next((other for other in checked if splits[other].paths == annotations.paths), None)
        if duplicate_of is not None:
            kind = "trained_on" if split == "train" else "same_split"
            log.add(kind, annotations.source, None, f"lists the images of {duplicate_of}")
            keep[split] = keep[duplicate_of]
            continue
        checked.append(split)
        for k, (digest, _) in enumerate(results[split]):
            if digest in owner:
                keep[split][k] = False
                path, (other, image) = annotations.paths[k], owner[digest]
                detail = f"is also in {other}" if path == image else f"is identical to the {other} image {image}"
                log.add("leaked_image", path, None, detail)
        owner |= {digest: (split, path) for digest, path in first.items() if digest not in owner}
    if subsets:
        kept = {path for split in checked for path, good in zip(splits[split].paths, keep[split], strict=True) if good}
        keep |= {split: np.array([path in kept for path in splits[split].paths], bool) for split in subsets}
    log_unlabelled(splits, logs)
    return keep


def _selections(splits: Mapping[str, Annotations]) -> list[str]:
    """Return the splits other than train, val and test that contain only images of those three."""
    others = splits.keys() - HELD_OUT_FIRST
    known = {path for split in splits.keys() - others for path in splits[split].paths} if others else set()
    return [split for split in sorted(others) if known.issuperset(splits[split].paths)]


def _log_images(annotations: Annotations, results: list[DecodeResult], log: IssueLog) -> dict[bytes, Path]:
    """Log damaged and identical images of a split; return the first image of each hash."""
    first: dict[bytes, Path] = {}
    for path, (digest, damage) in zip(annotations.paths, results, strict=True):
        if damage:
            log.add("damaged_image", path, None, damage)
        if digest in first:
            log.add("equal_image", path, None, f"is identical to {first[digest]}")
        elif digest:
            first[digest] = path
    return first


def decode_and_hash_all(annotations: Annotations, workers: int) -> list[DecodeResult]:
    """Decode all images with ``workers`` processes (at least one), with a progress bar on a terminal.

    Raises:
        DetkitError: a process was killed.
    """
    paths = [str(path) for path in annotations.paths]
    return list(map_files(decode_and_hash, paths, f"decoding {annotations.source.name}", workers, _init_worker))


def decode_and_hash(path: str) -> DecodeResult:
    """Decode an image as in training; two files have the same hash if they decode to the same pixels.

    Decoders fill in the missing data of a damaged JPEG and warn only on stderr, which ``_init_worker`` redirects.
    """
    try:
        image = read_image(Path(path))
    except (DetkitError, MemoryError, OSError) as error:
        _read_stderr()
        reason = str(error).partition(f"{path}: ")[2] or type(error).__name__
        return b"", f"does not decode: {reason}"
    text = _read_stderr()
    if any(marker in text for marker in DAMAGE):
        return b"", f"is damaged: {text.splitlines()[0][:200]}"
    digest = hashlib.blake2b(np.ascontiguousarray(image).data, digest_size=16, key=b"%d %d" % image.shape[:2])
    return digest.digest(), ""


def log_unlabelled(splits: Mapping[str, Annotations], logs: Mapping[str, IssueLog]) -> None:
    """Log the images in the folders of a split that no split lists."""
    known = {str(path) for annotations in splits.values() for path in annotations.paths}
    known |= {issue.file for log in logs.values() for issue in log.issues}
    for split, annotations in splits.items():
        for folder in sorted({path.parent for path in annotations.paths}):
            for path in images_in(folder):
                if str(path) not in known:
                    known.add(str(path))
                    logs[split].add("unlabelled_image", path, None, "has no readable label")


_stderr: BinaryIO | None = None  # of a decoding process


def _init_worker() -> None:
    """Initialize a decoding process: redirect its stderr, where decoders write, to a temporary file."""
    global _stderr
    cv2.setNumThreads(0)  # 1 would wait for threads that a fork does not inherit
    _stderr = tempfile.TemporaryFile()  # noqa: SIM115  (open for the life of the process)
    os.dup2(_stderr.fileno(), 2)


def _read_stderr() -> str:
    """Return the stderr output since the last call."""
    if _stderr is None:
        return ""
    _stderr.seek(0)
    text = _stderr.read().decode(errors="replace")
    _stderr.seek(0)
    _stderr.truncate()
    return text
