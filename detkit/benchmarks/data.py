"""Benchmark of data loading: training samples per second on one core, optionally compared to a peer's."""

import itertools
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import torch
from rich.table import Table

from detkit.benchmarks.common import WARMUP, BenchmarkConfig, print_result
from detkit.benchmarks.peer import start_peer
from detkit.data.annotations import Annotations
from detkit.data.augment.pipeline import AugmentedDataset, mosaic_window
from detkit.data.cache import LOCAL_CACHE_BYTES, LocalImages
from detkit.data.dataset import DetectionDataset
from detkit.data.formats.writing import write_set
from detkit.data.loader import EpochSampler
from detkit.data.read import read_split
from detkit.errors import DetkitError

# data.cache of each variant, and the bytes of images that a process keeps besides; an uncached peer keeps some as well
CACHES = {"uncached": (None, LOCAL_CACHE_BYTES), "cached": ("ram", 0), "nothing_kept": (None, 0)}
# variant -> the one of the peer to compare it to
PEERS = {"uncached": "uncached", "cached": "cached", "nothing_kept": "uncached"}
TRANSFORMS = ("hsv", "flip")  # those of both sides; a peer's other transforms need additional packages
# Runs in the peer's Python; arguments: folder of images, image size, batch size, number of classes.
PEER = """
import os, random, sys, time
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # other output must not be taken for an answer
import cv2, torch
cv2.setNumThreads(1)
torch.set_num_threads(1)
from ultralytics.cfg import get_cfg
from ultralytics.data.dataset import YOLODataset
folder, side, batch, classes = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
names = {k: str(k) for k in range(classes)}
sets = {
    name: YOLODataset(img_path=folder, imgsz=side, batch_size=batch, augment=True, hyp=get_cfg(), rect=False,
                      cache=cache, data={"names": names, "nc": classes, "channels": 3}, task="detect")
    for name, cache in (("uncached", False), ("cached", "ram"))
}
orders = {name: [] for name in sets}
print("0", file=answers, flush=True)
for line in sys.stdin:
    dataset, order = sets[line.strip()], orders[line.strip()]
    if len(order) < batch:
        order += random.sample(range(len(dataset)), len(dataset))
    start = time.perf_counter()
    for _ in range(batch):
        dataset[order.pop(0)]
    print((time.perf_counter() - start) / batch, file=answers, flush=True)
"""


def run(cfg: BenchmarkConfig) -> dict[str, Any]:
    """Time passes over the shuffled training split with data.cache=null and ram; print a table and a line of JSON.

    One core creates samples of ``image_size`` one by one with the configured mosaic and affine, HSV and flip, without
    collating them. The variants alternate after ``batch_size`` samples, for ``rounds`` passes over the set; the median
    is reported. The first passes are not timed, so that files are in the page cache and images in data.cache. Uncached,
    a process keeps as many decoded images as in training (data/cache.py), possibly all of a small set; with nothing
    kept, it decodes an image for every sample, as for a much larger set. ``peer`` is a Python with ultralytics: its own
    dataset with its default augmentation creates tensors from a copy of the set, alternating with detkit.

    Raises:
        DetkitError: no data set is given, or the peer fails.
    """
    if cfg.data is None:
        raise DetkitError("task=data needs a data set: add data=coco data.root=DIR")
    annotations = read_split(cfg.data.as_dict(), "train")
    with ExitStack() as stack:
        stack.enter_context(_one_core())
        turns = {name: _turn(annotations, cfg, *cache) for name, cache in CACHES.items()}
        if cfg.peer is not None:
            ask = stack.enter_context(_peer(str(cfg.peer), annotations, cfg))
            turns |= {f"peer_{name}": partial(ask, name) for name in set(PEERS.values())}
        seconds: dict[str, list[float]] = {name: [] for name in turns}
        turns_per_pass = math.ceil(len(annotations) / cfg.batch_size)
        for k in range((WARMUP + cfg.rounds) * turns_per_pass):
            for name, turn in turns.items():
                value = turn()
                if k >= WARMUP * turns_per_pass:
                    seconds[name].append(value)
    speed = {name: 1 / statistics.median(values) for name, values in seconds.items()}
    result = {"task": "data", "images": len(annotations), "image_size": cfg.image_size, **speed}
    table = Table("samples", "images/s", "peer's", "ratio", header_style="bold")
    for name in CACHES:
        row = [name, f"{speed[name]:.1f}", "", ""]
        peer = f"peer_{PEERS[name]}"
        if peer in speed:
            result[f"ratio_{name}"] = speed[name] / speed[peer]
            row[2:] = f"{speed[peer]:.1f}", f"{result[f'ratio_{name}']:.2f}"
        table.add_row(*row)
    return print_result(table, result)


@contextmanager
def _one_core() -> Iterator[None]:
    """Restrict this process and its children to one core and one thread."""
    cores, threads, torch_threads = os.sched_getaffinity(0), cv2.getNumThreads(), torch.get_num_threads()
    os.sched_setaffinity(0, {max(cores)})
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)
        cv2.setNumThreads(threads)
        torch.set_num_threads(torch_threads)


def _turn(annotations: Annotations, cfg: BenchmarkConfig, cache: str | None, keep: int) -> Callable[[], float]:
    """Return a function that creates the next ``batch_size`` samples and returns the seconds per sample."""
    size, batch_size = cfg.image_size, cfg.batch_size
    images = DetectionDataset(annotations, size, cache)
    if cache is None:
        images.cache = LocalImages(annotations, size, keep)
    transforms = {name: cfg.augment.transforms.get(name) for name in TRANSFORMS}
    augment = {**cfg.augment.as_dict(), "transforms": transforms}
    dataset = AugmentedDataset(images, size, augment, cfg.seed, epochs=2**31)
    window = mosaic_window(cfg.augment.mosaic.partners, images, batch_size)
    keys = _endless(EpochSampler(len(images), cfg.seed, window=window))

    def turn() -> float:
        chosen = list(itertools.islice(keys, batch_size))
        start = time.perf_counter()
        for key in chosen:
            dataset[key]
        return (time.perf_counter() - start) / batch_size

    return turn


def _endless(sampler: EpochSampler) -> Iterator[tuple]:
    """Yield the keys of one epoch after another."""
    for sampler.epoch in itertools.count():
        yield from sampler


@contextmanager
def _peer(python: str, annotations: Annotations, cfg: BenchmarkConfig) -> Iterator[Callable[[str], float]]:
    """Start the peer on a copy of the set; yield a function that runs a turn and returns the seconds per sample."""
    with tempfile.TemporaryDirectory(prefix="detkit-peer-") as folder:
        write_set("yolo", {"train": annotations}, Path(folder) / "set")
        images = Path(folder) / "set" / "images" / "train"
        arguments = (images, cfg.image_size, cfg.batch_size, len(annotations.class_names))
        with start_peer(python, PEER, arguments) as ask:
            yield ask
