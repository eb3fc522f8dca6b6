"""Sums over the ranks of a training: the processes that torchrun or SLURM started. One process alone sums nothing."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch import Tensor

_alone = False


@contextmanager
def single_rank() -> Iterator[None]:
    """Compute something on this rank only, without the others: sums are its own."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def world_size() -> int:
    """Return the number of processes that train together, 1 outside a process group and within ``single_rank``."""
    if _alone:
        return 1
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def all_reduce_sum(x: Tensor) -> Tensor:
    """Return the sum of all ranks' ``x``, of one shape, without a gradient; alone, ``x`` itself.

    Every rank must call it, and in the same order as the others.
    """
    if world_size() == 1:
        return x
    total = x.detach().clone()
    dist.all_reduce(total)
    return total
