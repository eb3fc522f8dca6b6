"""What tasks do with a data set: log it, check the memory for its batches, load it, and name the command to train on it."""

import json
import logging
import re
import shlex
from collections.abc import Mapping

import torch

from detkit.data.annotations import Annotations
from detkit.data.dataset import DetectionDataset, LetterboxDataset
from detkit.data.issues import FIXED, SKIPPED
from detkit.data.loader import BatchLoader, local_ranks, worker_count
from detkit.data.workers import TIMEOUT, check_shared_memory
from detkit.distributed.collectives import world_size

logger = logging.getLogger(__name__)


def train_command(data: Mapping[str, str]) -> str:
    """Return the command that trains on a set, from the keys of ``data`` that read it."""
    words = [f"data={data['name']}"]
    for key, value in data.items():
        if key != "name":
            quoted = value if re.fullmatch(r"[\w./-]+", value, re.ASCII) else json.dumps(value, ensure_ascii=False)
            words.append(f"data.{key}={quoted}")
    return f"python tools/train.py {shlex.join(words)}"


def log_split(split: str, annotations: Annotations) -> None:
    """Log a line of what a split holds, and one of what was fixed or skipped, if anything was."""
    logger.info("%s: %d images, %d boxes", split, len(annotations), len(annotations.labels))
    summary = annotations.issues.summary()
    if summary:
        first = annotations.issues.first(SKIPPED, FIXED)
        words = "check_data lists all, data.strict=true refuses them"
        logger.warning("%s: %s; the first: %s (%s)", split, summary, first, words)


def check_room(batch_size: int, image_size: int, workers: int | str) -> None:
    """Check that the loader processes of this node's ranks have the shared memory that their batches take.

    Raises:
        DetkitError: they have not.
    """
    images = -(-batch_size // world_size())
    check_shared_memory(3 * images * image_size**2, worker_count(workers) * local_ranks())


def val_loader(
    annotations: Annotations,
    batch_size: int,
    image_size: int,
    device: torch.device,
    *,
    rect: bool,
    workers: int | str,
    timeout: float = TIMEOUT,
) -> BatchLoader:
    """Return every image letterboxed, in order, or each in its own smallest frame where ``rect`` is set.

    Args:
        batch_size: of all ranks together.
        workers: number of processes, or ``auto``.
        timeout: seconds to wait for a batch.
    """
    dataset = LetterboxDataset(DetectionDataset(annotations), image_size, rect)
    return BatchLoader(
        dataset,
        batch_size,
        workers=worker_count(workers),
        pin=device.type == "cuda",
        starts=dataset.batch_starts(batch_size),
        timeout=timeout,
    )
