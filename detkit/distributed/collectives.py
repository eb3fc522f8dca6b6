"""Collectives over all ranks, which have no effect in a single process."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch import Tensor

_single_rank = False


@contextmanager
def single_rank() -> Iterator[None]:
    """Run a block on this rank only: collectives in it do not involve other ranks."""
    global _single_rank
    previous, _single_rank = _single_rank, True
    try:
        yield
    finally:
        _single_rank = previous


def world_size() -> int:
    """Return the number of ranks; 1 without a process group and within ``single_rank``."""
    if _single_rank:
        return 1
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def all_reduce_sum(x: Tensor) -> Tensor:
    """Return the sum of ``x``, of any shape, over all ranks, without gradient; with one rank, ``x`` itself.

    All ranks must call this in the same order, with the same shape.
    """
    if world_size() == 1:
        return x
    total = x.detach().clone()
    dist.all_reduce(total)
    return total
