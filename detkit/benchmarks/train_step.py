"""Benchmark of the training step, compared to plain float32 and a peer in the same run."""

import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image
from rich.table import Table
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from detkit.benchmarks.common import WARMUP, BenchmarkConfig, describe, print_result, time_once
from detkit.benchmarks.peer import peer_threads, start_peer
from detkit.benchmarks.process import start_process
from detkit.config import import_plugins
from detkit.engine.auto_batch import check_batch
from detkit.engine.compile import compile_network
from detkit.engine.optimizer import Recipe, Schedule
from detkit.engine.step import TrainStep
from detkit.errors import DetkitError
from detkit.models.detector import build_detector, build_loss
from detkit.models.profiling import dummy_batch
from detkit.ops.device import pick_device
from detkit.ops.precision import Precision, is_out_of_memory, seed_everything, tune_malloc
from detkit.structures import Batch

MATRIX = {"cpu": 2048, "cuda": 8192}  # side of the matrices in the product that measures the device's limit
PEER_BATCHES = 4  # in the data set that a peer cycles through
# Runs in the peer's Python; arguments: data.yaml, model, image size, batch size, device, threads (0: as it sets them
# itself). It is trained and timed by its public API and callbacks, with one optimizer step per batch of images without
# augmentation.
PEER = """
import json, os, resource, sys, time
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # other output must not be taken for an answer
import torch
from ultralytics import YOLO
data, name, side, batch, device = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5]
threads = int(sys.argv[6])
gpu = device != "cpu"
started, counts = [False], [gpu]  # on a GPU only every other step is timed: the one before reallocates memory
def begin(trainer):
    if not started[0]:
        started[0] = True
        if threads:  # training has set its own number by now
            torch.set_num_threads(threads)
        print(0, file=answers, flush=True)
    counts[0] = not (gpu and counts[0])
    if not (gpu and counts[0]) and not sys.stdin.readline():
        os._exit(0)
    if gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    begin.time = time.perf_counter()
def end(trainer):
    if not counts[0]:
        return
    if gpu:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - begin.time
    memory = torch.cuda.max_memory_allocated() if gpu else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if gpu:
        torch.cuda.empty_cache()
    print(json.dumps({"seconds": seconds, "memory": memory}), file=answers, flush=True)
model = YOLO(name + ".yaml")
model.add_callback("on_train_batch_start", begin)
model.add_callback("on_train_batch_end", end)
model.train(data=data, imgsz=side, batch=batch, nbs=batch, epochs=100000, optimizer="AdamW", device=device, workers=0,
            cache="ram", val=False, plots=False, save=False, pretrained=False, mosaic=0.0, mixup=0.0, erasing=0.0,
            hsv_h=0.0, hsv_s=0.0, hsv_v=0.0, fliplr=0.0, translate=0.0, scale=0.0, warmup_epochs=0, close_mosaic=0)
"""


@dataclass(frozen=True)
class Variant:
    """One way to run a step; each of VARIANTS adds an optimization to the previous one.

    Attributes:
        keep_memory: detkit's settings of the C library's allocator on a CPU.
        compiled: by torch.compile.
    """

    name: str
    channels_last: bool
    amp: str
    keep_memory: bool
    compiled: bool = False


@dataclass
class Timing:
    """Seconds of each step, FLOP/s of a matrix product after each, and peak bytes (on a CPU of the whole process)."""

    seconds: list[float] = field(default_factory=list)
    limit: list[float] = field(default_factory=list)
    memory: int = 0


PLAIN = Variant("float32", False, "off", False)
VARIANTS = (
    PLAIN,
    Variant("channels-last", True, "off", False),
    Variant("+ memory kept", True, "off", True),
    Variant("+ bf16", True, "bf16", True),
)


def run(cfg: BenchmarkConfig) -> dict[str, Any]:
    """Time the training step of the configured model in every variant; print a table and one line of JSON.

    Each variant has its own process, since settings of the allocator cannot be undone; they alternate, so that load on
    the machine affects all equally. On a GPU a turn is two steps, of which the second is timed: the first allocates the
    memory that the process has released for the others. bf16 runs only if ``amp=auto`` would choose it.
    ``compile=true`` adds the last variant compiled. ``peer`` is a Python with ultralytics, which trains its model of
    the same name with its default settings, alternating with detkit: once as it runs (it leaves itself one thread less
    than there are cores), and once with as many threads as detkit.

    The fraction of the arithmetic limit is the FLOPs of a step, forward and backward, counted by operator, over those
    of products of large matrices in the same precision and time, measured between the steps.

    Raises:
        DetkitError: the peer fails, or the network cannot be compiled.
    """
    device = pick_device(cfg.device)
    check_batch(cfg.batch_size, cfg.image_size, device)
    variants = [v for v in VARIANTS if v.amp != "bf16" or Precision.from_config("auto", device).dtype is torch.bfloat16]
    if device.type == "cuda":  # its memory does not come from the C library
        variants = [v for v in variants if v.amp != "off" or not v.keep_memory]
    if cfg.compile:
        last = variants[-1]
        variants.append(replace(last, name="+ compiled", compiled=True))
    flops, timings = _in_turns(cfg, device, variants)
    seconds = {name: statistics.median(timing.seconds) for name, timing in timings.items()}
    speed = {name: cfg.batch_size / value for name, value in seconds.items()}
    ratio = {name: seconds[PLAIN.name] / value for name, value in seconds.items()}
    limit = {name: statistics.median(timing.limit) for name, timing in timings.items() if timing.limit}
    fraction = {name: flops / seconds[name] / value for name, value in limit.items()}
    table = Table("training step", "ms", "images/s", "x float32", "of the limit", "peak MiB")
    for name, value in seconds.items():
        of_limit = f"{fraction[name]:.0%}" if name in fraction else ""
        row = (f"{1000 * value:.0f}", f"{speed[name]:.1f}", f"{ratio[name]:.2f}", of_limit)
        table.add_row(name, *row, f"{timings[name].memory / 2**20:.0f}")
    result = {
        "task": "train",
        "model": cfg.model.name,
        **describe(device),
        "compile": cfg.compile,
        "image_size": cfg.image_size,
        "batch_size": cfg.batch_size,
        "images_per_s": speed,
        "ratio": ratio,
        "gflops_per_step": flops / 1e9,
        "limit_gflops_per_s": {name: value / 1e9 for name, value in limit.items()},
        "fraction_of_limit": fraction,
        "memory_mib": {name: timing.memory / 2**20 for name, timing in timings.items()},
    }
    for peer in peer_threads(cfg.peer):
        result[f"ratio_to_{peer}"] = {name: seconds[peer] / value for name, value in seconds.items()}
    return print_result(table, result)


def _in_turns(cfg: BenchmarkConfig, device: torch.device, variants: list[Variant]) -> tuple[int, dict[str, Timing]]:
    """Run the steps of all variants and of both peers, each in its own process, alternately.

    Returns:
        The FLOPs of a step, and the measurements.
    """
    with ExitStack() as stack:
        asks, counts = {}, []
        for variant in variants:
            ask, flops = stack.enter_context(start_process(variant.name, _serve, cfg, variant))
            asks[variant.name] = ask
            counts.append(flops)
        for name, threads in peer_threads(cfg.peer).items():
            asks[name] = stack.enter_context(_peer(cfg, device, threads))
        timings = {name: Timing() for name in asks}
        for k in range(WARMUP + cfg.rounds):
            for name, ask in asks.items():
                answer = ask("go")
                timings[name].memory = answer["memory"]
                if k >= WARMUP:
                    timings[name].seconds.append(answer["seconds"])
                    timings[name].limit += [answer["limit"]] if "limit" in answer else []
    return counts[0], timings


def _serve(pipe: Connection, cfg: BenchmarkConfig, variant: Variant) -> None:
    """Send the FLOPs of a step, then run one for every message received (in a process of its own)."""
    device = pick_device(cfg.device)
    try:
        step = _make_step(cfg, variant)
        with FlopCounterMode(display=False) as counter:
            step()
        torch.cuda.empty_cache()  # for the other processes; does nothing without CUDA
        pipe.send(counter.get_total_flops())
        dtype = Precision.from_config(variant.amp, device).dtype
        while pipe.recv():
            if device.type == "cuda":
                step()  # allocates the memory released below
                torch.cuda.reset_peak_memory_stats(device)
            seconds, memory = time_once(step, device), _peak_memory(device)
            answer = {"seconds": seconds, "limit": _arithmetic_limit(device, dtype), "memory": memory}
            torch.cuda.empty_cache()
            pipe.send(answer)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise DetkitError(f"batch_size={cfg.batch_size} is too much for the memory of {device}") from None


def _arithmetic_limit(device: torch.device, dtype: torch.dtype | None) -> float:
    """Return the FLOP/s of a product of large matrices."""
    side = MATRIX[device.type]
    matrix = torch.rand(side, side, dtype=dtype, device=device)
    if device.type == "cuda":
        matrix @ matrix  # allocates the memory
    return 2 * side**3 / time_once(lambda: matrix @ matrix, device)


def _peak_memory(device: torch.device) -> int:
    """Return the peak memory in bytes: of the device, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _make_step(cfg: BenchmarkConfig, variant: Variant) -> Callable[[], object]:
    """Build the training step and one batch; return a function that runs the step on it."""
    import_plugins(cfg.plugins)
    seed_everything(cfg.seed)
    device = pick_device(cfg.device)
    precision = Precision.from_config(variant.amp, device)
    if variant.keep_memory and device.type == "cpu":
        tune_malloc()
    layout = torch.channels_last if variant.channels_last else torch.contiguous_format
    detector = build_detector(cfg.as_dict(), [str(k) for k in range(cfg.num_classes)])
    detector = detector.to(device).to(memory_format=layout).train()
    images = cfg.batch_size
    recipe = Recipe.from_config(cfg.optim, batch_size=images, total_steps=1, num_classes=cfg.num_classes)
    schedule = Schedule.from_config(recipe, cfg.optim, epochs=1, batches=1)
    network: nn.Module = detector
    if variant.compiled:
        network = compile_network(detector, precision, cfg.image_size, images)
        if network is detector:
            raise DetkitError("the network cannot be compiled: see the reason above")
    loss = build_loss(cfg.as_dict(), detector.head)
    step = TrainStep(detector, loss, recipe, schedule, precision, accumulate=1, clip=10.0, network=network)
    batch = _noise(cfg, images)
    batch.images = batch.images.to(memory_format=layout)
    if device.type == "cuda":
        batch = batch.pin_memory()  # like a loader's and the peer's: the transfer is part of a step
    return lambda: step(batch.to(device), 0, 0)


def _noise(cfg: BenchmarkConfig, images: int) -> Batch:
    """Return a batch of noise."""
    return dummy_batch(images, (cfg.image_size,) * 2, cfg.boxes, cfg.num_classes)


@contextmanager
def _peer(cfg: BenchmarkConfig, device: torch.device, threads: int) -> Iterator[Callable[[str], Any]]:
    """Start the peer's training on noise images; yield a function that runs a step."""
    with tempfile.TemporaryDirectory(prefix="detkit-noise-") as folder:
        root, side = Path(folder), cfg.image_size
        for name in ("images", "labels"):
            (root / name).mkdir()
        batch = _noise(cfg, PEER_BATCHES * cfg.batch_size)
        for k, (image, boxes, labels) in enumerate(zip(batch.images, batch.boxes_bm4, batch.labels_bm, strict=True)):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(root / "images" / f"{k}.png")
            corner, extent = boxes[:, :2] / side, (boxes[:, 2:] - boxes[:, :2]) / side
            rows = torch.cat((labels[:, None], corner + extent / 2, extent), 1).tolist()
            lines = [f"{int(label)} {' '.join(map(str, box))}" for label, *box in rows]
            (root / "labels" / f"{k}.txt").write_text("\n".join(lines))
        data = {"path": folder, "train": "images", "val": "images", "names": [str(k) for k in range(cfg.num_classes)]}
        (root / "data.yaml").write_text(yaml.safe_dump(data))
        place = "cpu" if device.type == "cpu" else str(device.index or 0)
        arguments = (root / "data.yaml", cfg.model.name, side, cfg.batch_size, place, threads)
        with start_peer(str(cfg.peer), PEER, arguments) as ask:
            yield ask
