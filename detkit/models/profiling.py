"""Profiling: dummy batches, FLOPs, the time of each module, and the memory saved for backward."""

import statistics
import time
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from detkit.structures import Batch


def dummy_batch(images: int, size: tuple[int, int], boxes: int, num_classes: int) -> Batch:
    """Return noise images of ``size`` (height, width) with random boxes, 10 % to 33 % of the image's sides."""
    sides = torch.tensor(size[::-1])
    corner = torch.rand(images, boxes, 2) * sides * 0.65
    extent = (0.1 + 0.23 * torch.rand(images, boxes, 2)) * sides
    labels = torch.randint(num_classes, (images, boxes))
    pixels = torch.randint(256, (images, 3, *size), dtype=torch.uint8)
    return Batch(pixels, torch.cat((corner, corner + extent), -1), labels, torch.ones_like(labels, dtype=torch.bool))


def activation_bytes(module: nn.Module, x: Tensor) -> int:
    """Return the bytes that autograd saves for the backward pass of ``module(x)``.

    Each storage counts once; parameters and buffers are not counted.
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in (*module.parameters(), *module.buffers())}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = module(x)  # holds the graph and the saved tensors
    del output
    return sum(storages.values())


def count_flops(module: nn.Module, x: Tensor) -> int:
    """Return the FLOPs of the forward pass ``module(x)``, counted by operator; a multiply-add is 2."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(x)
    return counter.get_total_flops()


def module_seconds(module: nn.Module, x: Tensor, rounds: int, warmup: int = 2) -> dict[str, float]:
    """Return the median seconds that each submodule takes in ``module(x)``, without the modules that it calls.

    On a GPU, every module waits for those before it, so that small ones take longer than in one go.

    Args:
        module: in the mode to measure; also under the name "" in the result.
        x: input.
        rounds: timed runs.
        warmup: runs before them.
    """
    names = {submodule: name for name, submodule in module.named_modules()}
    seconds: dict[str, float] = defaultdict(float)  # of one run
    running = [""]
    last = 0.0

    def switch() -> None:
        """Count the time since the last call for the module that runs."""
        nonlocal last
        if x.is_cuda:
            torch.cuda.synchronize(x.device)
        now = time.perf_counter()
        seconds[running[-1]] += now - last
        last = time.perf_counter()

    def enter(entered: nn.Module, _: Any) -> None:
        switch()
        running.append(names[entered])

    def leave(_: nn.Module, __: Any, ___: Any) -> None:
        switch()
        running.pop()

    handles = [m.register_forward_pre_hook(enter) for m in names]
    handles += [m.register_forward_hook(leave) for m in names]
    runs = []
    try:
        for _ in range(warmup + rounds):
            seconds.clear()
            last = time.perf_counter()
            module(x)
            runs.append(dict(seconds))
    finally:
        for handle in handles:
            handle.remove()
    return {name: statistics.median(run.get(name, 0.0) for run in runs[warmup:]) for name in runs[-1]}
