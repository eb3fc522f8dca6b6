"""Time a training step the way detkit runs it, beside the plain way, in one run."""

import multiprocessing
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
from rich.table import Table

from detkit.benchmarks.common import WARMUP, tell, time_once
from detkit.config import import_plugins
from detkit.engine.measure import random_batch
from detkit.engine.optim import Recipe, Schedule
from detkit.engine.precision import Precision, keep_freed_memory, make_deterministic, pick_device
from detkit.engine.step import TrainStep
from detkit.models.detector import build_detector, build_loss


@dataclass(frozen=True)
class Variant:
    """One way to run a step; ``keep_memory`` is detkit's setting of the C library's allocator on a CPU."""

    name: str
    channels_last: bool
    amp: str
    keep_memory: bool


PLAIN = Variant("float32, contiguous", False, "off", False)
VARIANTS = (
    PLAIN,
    Variant("float32, channels-last", True, "off", False),
    Variant("float32, channels-last, memory kept", True, "off", True),
    Variant("bf16, channels-last, memory kept", True, "bf16", True),
)


def run(cfg: dict[str, Any]) -> dict[str, Any]:
    """Time the training step of the configured model in every variant; print a table and one line of JSON.

    Each variant lives in a process of its own, as the allocator's settings cannot be taken back; they take turns, so
    that a busy machine slows all of them alike. bf16 runs only where ``amp=auto`` would choose it.
    """
    device = pick_device(cfg["device"])
    variants = [v for v in VARIANTS if v.amp != "bf16" or Precision.pick("auto", device).dtype is torch.bfloat16]
    times = _in_turns(cfg, variants)
    seconds = {v.name: statistics.median(times[v.name]) for v in variants}
    table = Table("training step", "ms", "images/s", "times as fast as plain", header_style="bold")
    for name, value in seconds.items():
        row = (1000 * value, cfg["batch_size"] / value, seconds[PLAIN.name] / value)
        table.add_row(name, f"{row[0]:.0f}", f"{row[1]:.1f}", f"{row[2]:.2f}")
    result = {
        "task": "train",
        "model": cfg["model"]["name"],
        "device": str(device),
        "image_size": cfg["image_size"],
        "batch_size": cfg["batch_size"],
        "images_per_s": {name: cfg["batch_size"] / value for name, value in seconds.items()},
        "ratio": {name: seconds[PLAIN.name] / value for name, value in seconds.items()},
    }
    return tell(table, result)


def _in_turns(cfg: dict[str, Any], variants: list[Variant]) -> dict[str, list[float]]:
    """Let a process for each variant run one step after another in turns; return the seconds of each step."""
    context = multiprocessing.get_context("spawn")
    workers: dict[str, Connection] = {}
    processes = []
    for variant in variants:
        workers[variant.name], theirs = context.Pipe()
        processes.append(context.Process(target=_serve, args=(theirs, cfg, variant), daemon=True))
        processes[-1].start()
        theirs.close()
        workers[variant.name].recv()  # ready: only now the next one starts
    times: dict[str, list[float]] = {name: [] for name in workers}
    for k in range(WARMUP + cfg["rounds"]):
        for name, worker in workers.items():
            worker.send("go")
            seconds = worker.recv()
            if k >= WARMUP:
                times[name].append(seconds)
    for process in processes:
        process.terminate()
        process.join()
    return times


def _serve(pipe: Connection, cfg: dict[str, Any], variant: Variant) -> None:
    """In a process of its own: run one step for every message."""
    step = _make_step(cfg, variant)
    device = pick_device(cfg["device"])
    pipe.send("ready")
    while pipe.recv():
        pipe.send(time_once(step, device))


def _make_step(cfg: dict[str, Any], variant: Variant) -> Callable[[], object]:
    """Build the training step and one batch; return the function that trains on it once."""
    import_plugins(cfg["plugins"])
    make_deterministic(cfg["seed"])
    device = pick_device(cfg["device"])
    precision = Precision.pick(variant.amp, device)
    if variant.keep_memory and device.type == "cpu":
        keep_freed_memory()
    layout = torch.channels_last if variant.channels_last else torch.contiguous_format
    detector = build_detector(cfg, [str(k) for k in range(cfg["num_classes"])]).to(device, memory_format=layout).train()
    images = cfg["batch_size"]
    recipe = Recipe.pick(cfg["optim"], batch_size=images, total_steps=1, num_classes=cfg["num_classes"])
    schedule = Schedule.pick(recipe, cfg["optim"], epochs=1, batches=1)
    step = TrainStep(detector, build_loss(cfg, detector.head), recipe, schedule, precision, accumulate=1, clip=10.0)
    batch = random_batch(images, (cfg["image_size"],) * 2, cfg["boxes"], cfg["num_classes"]).to(device)
    batch.images = batch.images.to(memory_format=layout)
    return lambda: step(batch, 0, 0)
