"""Process group, and communication between ranks other than gradients; see also rendezvous.py.

A single process has no group, and the functions here have no effect.

Tensors are summed in the default group, with a timeout of ``trainer.rank_timeout`` seconds. Results of rank 0 (the name
of a directory, COCO metrics) are sent in a second group on the CPU, with a longer timeout. If a process dies, its
connections close, which the other ranks notice at once in both groups.
"""

import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from detkit.distributed.collectives import world_size
from detkit.distributed.rendezvous import RankInfo, current_store, is_local_main, rendezvous, reset_rendezvous
from detkit.errors import DetkitError, printable
from detkit.ops.device import pick_device

CPU_GROUP_TIMEOUT = timedelta(hours=2)  # rank 0 may be reading a large data set for the first time

_cpu_group: dist.ProcessGroup | None = None  # None: the default group


def rank() -> int:
    """Return the rank of this process, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def is_main_process() -> bool:
    """Whether this is rank 0, the only rank that writes, draws and prints."""
    return rank() == 0


def init_distributed(device: str, timeout: float) -> torch.device:
    """Join the process group if torchrun or SLURM started several processes; return the device of this one.

    Args:
        device: as for ``pick_device``; ``auto`` and ``cuda`` select the GPU with the local rank.
        timeout: seconds that ranks wait for each other.

    Raises:
        DetkitError: environment variables are missing or malformed, there is no GPU for this rank, or the other ranks
            cannot be reached.
    """
    global _cpu_group
    info = RankInfo.from_env()
    if info.ranks == 1:
        return pick_device(device)
    picked = _device_of_rank(device, info.local)
    if dist.is_initialized():  # an earlier job of a sweep
        return picked
    limit = timedelta(seconds=timeout)
    store = rendezvous(timeout)
    try:
        backend = "nccl" if picked.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=info.rank, world_size=info.ranks, timeout=limit)
        group = dist.new_group(backend="gloo", timeout=CPU_GROUP_TIMEOUT)
    except (dist.DistError, RuntimeError, ValueError) as error:
        raise info.unreachable(error) from None
    assert isinstance(group, dist.ProcessGroup)  # every rank is a member
    _cpu_group = group
    if info.rank:
        warnings.filterwarnings("ignore")  # rank 0 prints them
    return picked


def cleanup_distributed() -> None:
    """Leave the process group, if there is one."""
    global _cpu_group
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
    _cpu_group = None
    reset_rendezvous()


def per_rank_batch_size(batch_size: int) -> int:
    """Return the number of images of a global batch per rank.

    Raises:
        DetkitError: ``batch_size`` is not divisible by the number of ranks.
    """
    ranks = world_size()
    if batch_size % ranks:
        more = batch_size + ranks - batch_size % ranks
        raise DetkitError(
            f"batch_size={batch_size} counts the images of all ranks and must be divisible by their number, {ranks}: "
            f"use {more}"
        )
    return batch_size // ranks


def wrap_ddp(model: nn.Module) -> nn.Module:
    """Wrap ``model`` in DistributedDataParallel; with one rank, return ``model`` itself.

    Weights are broadcast from rank 0. The caller must keep buffers in sync.
    """
    if world_size() == 1:
        return model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # broadcast_buffers is renamed in torch 2.14
        return nn.parallel.DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)


def barrier() -> None:
    """Wait until every rank has called this."""
    if world_size() > 1:
        dist.barrier(_cpu_group)


def all_reduce_max(number: int) -> int:
    """Return the largest ``number`` of all ranks, without using the device."""
    if world_size() == 1:
        return number
    largest = torch.tensor(number)
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=_cpu_group)
    return int(largest)


@contextmanager
def main_process_first() -> Iterator[None]:
    """Run a block on rank 0 first, then on the other ranks, which find its results on disk."""
    if not is_main_process():
        barrier()
    try:
        yield
    finally:
        if is_main_process():
            barrier()


def run_on_main(make: Callable[[], Any]) -> Any:
    """Call ``make`` on rank 0 only, and return its result on every rank.

    Raises:
        DetkitError: ``make`` raised it; on every rank.
    """
    if world_size() == 1:
        return make()
    result: list[Any] = [None, None]
    if is_main_process():
        try:
            result[0] = make()
        except DetkitError as error:
            result[1] = str(error)
    dist.broadcast_object_list(result, 0, group=_cpu_group)
    value, message = result
    if message is not None:
        raise DetkitError(message)
    return value


def gather_objects(value: Any) -> list[Any]:
    """Return the values of all ranks in order on rank 0; an empty list on other ranks."""
    if world_size() == 1:
        return [value]
    gathered = [None] * world_size() if is_main_process() else None
    dist.gather_object(value, gathered, 0, group=_cpu_group)
    return gathered or []


def gather_messages(messages: Sequence[str]) -> list[str]:
    """Return the messages of all ranks on rank 0, none elsewhere; non-UTF-8 file names in them are escaped."""
    return [printable(message) for of_rank in gather_objects(list(messages)) for message in of_rank]


def claim_error_message(message: str) -> bool:
    """Whether this rank should print the error, as the first to claim it; before the rendezvous, one rank per node."""
    store = current_store()
    if store is None:
        return is_local_main()
    with suppress(dist.DistError, RuntimeError):
        store.set("user error", message)
        return store.add(f"printed {message}", 1) == 1
    return is_main_process()  # the process that kept the store has ended


def peer_user_error() -> str | None:
    """Return the message of a user error that ended another rank, or None."""
    store = current_store()
    try:
        return store.get("user error").decode() if store is not None and store.check(["user error"]) else None
    except (dist.DistError, RuntimeError):
        return "rank 0 has ended and printed the error"  # the process that kept the store has ended


def is_peer_failure(error: Exception) -> bool:
    """Whether an error means that another rank has ended."""
    phrases = r"Connection (closed|reset|refused)|Broken pipe|Read error|Write error|Timed out|remote process exited"
    return current_store() is not None and isinstance(error, RuntimeError) and bool(re.search(phrases, str(error)))


def _device_of_rank(device: str, local: int) -> torch.device:
    """Return the device of the process with local rank ``local``."""
    if ":" in device:
        raise DetkitError(f"device={device} is one device for several ranks: use device=cuda and CUDA_VISIBLE_DEVICES")
    picked = pick_device(device)
    if picked.type != "cuda":
        return picked
    gpus = torch.cuda.device_count()
    if local >= gpus:
        raise DetkitError(f"local rank {local} has no GPU, as this node has {gpus}: start one rank per GPU")
    picked = torch.device("cuda", local)
    torch.cuda.set_device(picked)
    return picked
