"""Functions for data sets that several tasks share: logging, shared-memory check, validation loader, train command."""

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
    """Return the command that trains on a data set, given its keys of ``data``."""
    arguments = [f"data={data['name']}"]
    for key, value in data.items():
        if key != "name":
            quoted = value if re.fullmatch(r"[\w./-]+", value, re.ASCII) else json.dumps(value, ensure_ascii=False)
            arguments.append(f"data.{key}={quoted}")
    return f"python tools/train.py {shlex.join(arguments)}"


def log_split(split: str, annotations: Annotations) -> None:
    """Log the size of a split, and what was fixed or skipped, if anything."""
    logger.info("%s: %d images, %d boxes", split, len(annotations), len(annotations.labels))
    summary = annotations.issues.summary()
    if summary:
        first = annotations.issues.first(SKIPPED, FIXED)
        hint = "check_data lists all, data.strict=true rejects them"
        logger.warning("%s: %s; the first: %s (%s)", split, summary, first, hint)


def check_batch_memory(batch_size: int, image_size: int, workers: int | str) -> None:
    """Check that the shared memory suffices for the batches of all loader processes on this node.

    Raises:
        DetkitError: it does not.
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
    """Return a loader of all images, letterboxed and in order.

    Args:
        annotations: the split to load.
        batch_size: images per batch, over all ranks.
        image_size: side of the square in pixels.
        device: where the batches are moved to; memory is pinned for CUDA.
        rect: use the smallest frame that holds each image instead of the square.
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
