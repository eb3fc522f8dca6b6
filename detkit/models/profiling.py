"""Profiling: dummy batches, FLOPs, and the memory saved for backward."""

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
