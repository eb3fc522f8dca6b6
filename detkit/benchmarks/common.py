"""Timing and output shared by the benchmarks."""

import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from rich.table import Table

from detkit.config.common import MAX_CLASSES, BatchSize, ComposedConfig, batch_size_field
from detkit.config.fields import Location, field, location, whole
from detkit.config.schema import AugmentConfig, DataConfig, OptimConfig
from detkit.viz.console import make_console

WARMUP = 2  # rounds that are not timed


class BenchmarkConfig(ComposedConfig):
    """Keys of ``configs/benchmark.yaml``."""

    task: str = field("benchmark to run", "the name of a benchmark")
    data: DataConfig = field("data set for task=data and infer", default=None)
    augment: AugmentConfig
    optim: OptimConfig
    batch_size: BatchSize = batch_size_field()
    num_classes: int = whole("number of classes", 1, MAX_CLASSES)
    boxes: int = whole("ground-truth boxes per image", 0, 10_000)
    rounds: int = whole("timed runs of each variant", 1)
    compile: bool = field("also time the compiled training step or network")
    ckpt: Location | None = location("checkpoint or exported file that task=infer measures instead of a new model")
    exports: bool = field("task=infer: also time the model exported to ONNX and OpenVINO")
    peer: Location | None = location(
        "path of a Python interpreter with Ultralytics installed, to time that project as well"
    )


def time_in_turns(runs: Mapping[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, float]:
    """Return the median seconds of each run; the runs alternate, so that load on the machine affects all equally."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for k in range(WARMUP + rounds):
        for name, run in runs.items():
            seconds = time_once(run, device)
            if k >= WARMUP:
                times[name].append(seconds)
    return {name: statistics.median(times[name]) for name in runs}


def time_once(run: Callable[[], object], device: torch.device) -> float:
    """Return the seconds that ``run`` takes, including its work on the device."""
    _synchronize(device)
    start = time.perf_counter()
    run()
    _synchronize(device)
    return time.perf_counter() - start


def describe(device: torch.device) -> dict[str, str]:
    """Return the device and the version of torch, for a result."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {"device": str(device), "device_name": name, "torch": torch.__version__}


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def print_result(table: Table, result: dict[str, Any]) -> dict[str, Any]:
    """Print the table and, as the last line of standard output, the result as JSON; return the result."""
    make_console().print(table)
    print(json.dumps(result))
    return result
