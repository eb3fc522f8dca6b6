"""What check_data looks for beyond what every reading finds: damage within images, equal images, unlabelled ones."""

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

DAMAGE = ("premature end", "bad Huffman code", "CRC error")  # what decoders complain of while they make up the rest
DecodeResult = tuple[bytes, str]  # the hash of an image's pixels, empty where there are none; what is wrong with it


def audit_images(
    splits: Mapping[str, Annotations], logs: Mapping[str, IssueLog], workers: int
) -> dict[str, np.ndarray]:
    """Decode every image of every split and log what that shows.

    Returns:
        (N,) bool for each split: the images to keep. Damaged ones are not; one that several splits have is kept in
        test, else in val, and in train last. A split that only picks among the images of these three keeps what they
        keep.

    Raises:
        DetkitError: a decoding process was killed, as it is where memory runs out.
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
            log.add("same_split", annotations.source, None, "lists images of train, val and test alone")
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
                detail = f"is in {other}, too" if path == image else f"shows the same as the {other} image {image}"
                log.add("leaked_image", path, None, detail)
        owner |= {digest: (split, path) for digest, path in first.items() if digest not in owner}
    if subsets:
        kept = {path for split in checked for path, good in zip(splits[split].paths, keep[split], strict=True) if good}
        keep |= {split: np.array([path in kept for path in splits[split].paths], bool) for split in subsets}
    log_unlabelled(splits, logs)
    return keep


def _selections(splits: Mapping[str, Annotations]) -> list[str]:
    """Return the splits beside train, val and test without an image of their own, as lists of all or of a few have."""
    others = splits.keys() - HELD_OUT_FIRST
    known = {path for split in splits.keys() - others for path in splits[split].paths} if others else set()
    return [split for split in sorted(others) if known.issuperset(splits[split].paths)]


def _log_images(annotations: Annotations, results: list[DecodeResult], log: IssueLog) -> dict[bytes, Path]:
    """Log damaged and equal images of a split; return the first image of each hash."""
    first: dict[bytes, Path] = {}
    for path, (digest, damage) in zip(annotations.paths, results, strict=True):
        if damage:
            log.add("damaged_image", path, None, damage)
        if digest in first:
            log.add("equal_image", path, None, f"shows the same as {first[digest]}")
        elif digest:
            first[digest] = path
    return first


def decode_and_hash_all(annotations: Annotations, workers: int) -> list[DecodeResult]:
    """Decode all images by ``workers`` processes, one at least; a bar shows on a terminal.

    Raises:
        DetkitError: one of them was killed.
    """
    paths = [str(path) for path in annotations.paths]
    return list(map_files(decode_and_hash, paths, f"decoding {annotations.source.name}", workers, _init_worker))


def decode_and_hash(path: str) -> DecodeResult:
    """Decode an image as training does; two files have the same hash where training sees the same pixels.

    Decoders make up what is missing in a damaged JPEG and say so on stderr only, which ``_begin`` has led into a file.
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
    """Log the images that lie beside those of a split and that no split names."""
    known = {str(path) for annotations in splits.values() for path in annotations.paths}
    known |= {issue.file for log in logs.values() for issue in log.issues}
    for split, annotations in splits.items():
        for folder in sorted({path.parent for path in annotations.paths}):
            for path in images_in(folder):
                if str(path) not in known:
                    known.add(str(path))
                    logs[split].add("unlabelled_image", path, None, "no label that can be read names it")


_stderr: BinaryIO | None = None  # of a process of look_at_all


def _init_worker() -> None:
    """Start a process: decoders write to a file of its own in place of the terminal."""
    global _stderr
    cv2.setNumThreads(0)  # one process a core is enough; 1 would wait for threads that a fork does not inherit
    _stderr = tempfile.TemporaryFile()  # noqa: SIM115  (open as long as the process)
    os.dup2(_stderr.fileno(), 2)


def _read_stderr() -> str:
    """Return what was written to stderr since the last call."""
    if _stderr is None:
        return ""
    _stderr.seek(0)
    text = _stderr.read().decode(errors="replace")
    _stderr.seek(0)
    _stderr.truncate()
    return text
