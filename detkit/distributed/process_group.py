"""The process group of a training, and what its ranks exchange beside gradients; see also rendezvous.py.

With one process there is no group, and every function here does nothing.

Sums of tensors go through the default group, whose ranks may wait for one another for ``trainer.rank_timeout`` seconds.
What rank 0 does for all (a directory's name, COCO's metrics) goes through a second one, on the CPU, with more patience.
A process that dies closes its connections, which the others see at once in both.
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

PATIENCE = timedelta(hours=2)  # for rank 0: it may read a large set for the first time

_patient: dist.ProcessGroup | None = None  # None: the default group


def rank() -> int:
    """Return this process' number among those that train together, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def is_main_process() -> bool:
    """Whether this is rank 0, which alone writes, draws and prints."""
    return rank() == 0


def init_distributed(device: str, timeout: float) -> torch.device:
    """Join the other processes that torchrun or SLURM started, if any; return the device of this one.

    Args:
        device: as for ``pick_device``; ``auto`` and ``cuda`` are the GPU of this process' number on its node.
        timeout: seconds that ranks wait for one another.

    Raises:
        DetkitError: variables are missing or malformed, there is no GPU left for this rank, or the others do not come.
    """
    global _patient
    place = RankInfo.from_env()
    if place.ranks == 1:
        return pick_device(device)
    picked = _device_of_rank(device, place.local)
    if dist.is_initialized():  # an earlier job of a sweep
        return picked
    limit = timedelta(seconds=timeout)
    store = rendezvous(timeout)
    try:
        backend = "nccl" if picked.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=place.rank, world_size=place.ranks, timeout=limit)
        group = dist.new_group(backend="gloo", timeout=PATIENCE)
    except (dist.DistError, RuntimeError, ValueError) as error:
        raise place.unreachable(error) from None
    assert isinstance(group, dist.ProcessGroup)  # every rank is a member
    _patient = group
    if place.rank:
        warnings.filterwarnings("ignore")  # rank 0 says the same
    return picked


def cleanup_distributed() -> None:
    """Leave the process group, if there is one."""
    global _patient
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
    _patient = None
    reset_rendezvous()


def per_rank_batch_size(batch_size: int) -> int:
    """Return how many images of a global batch each rank takes.

    Raises:
        DetkitError: they are not equally many.
    """
    ranks = world_size()
    if batch_size % ranks:
        more = batch_size + ranks - batch_size % ranks
        raise DetkitError(
            f"batch_size={batch_size} counts the images of all {ranks} ranks and must divide by them: use {more}"
        )
    return batch_size // ranks


def wrap_ddp(model: nn.Module) -> nn.Module:
    """Return ``model`` so that backward averages the gradients of all ranks; alone, ``model`` itself.

    All ranks start from rank 0's weights. Buffers are the caller's to keep alike.
    """
    if world_size() == 1:
        return model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # broadcast_buffers has another name from torch 2.14 on
        return nn.parallel.DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)


def barrier() -> None:
    """Wait until every rank is here."""
    if world_size() > 1:
        dist.barrier(_patient)


def all_reduce_max(number: int) -> int:
    """Return the largest ``number`` of any rank, without asking the device."""
    if world_size() == 1:
        return number
    largest = torch.tensor(number)
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=_patient)
    return int(largest)


@contextmanager
def main_process_first() -> Iterator[None]:
    """Run a block on rank 0, then on the others: these find what it leaves on the disk."""
    if not is_main_process():
        barrier()
    try:
        yield
    finally:
        if is_main_process():
            barrier()


def run_on_main(make: Callable[[], Any]) -> Any:
    """Return on every rank what ``make`` returns on rank 0, where alone it runs.

    Raises:
        DetkitError: ``make`` did; on every rank.
    """
    if world_size() == 1:
        return make()
    answer: list[Any] = [None, None]
    if is_main_process():
        try:
            answer[0] = make()
        except DetkitError as error:
            answer[1] = str(error)
    dist.broadcast_object_list(answer, 0, group=_patient)
    value, message = answer
    if message is not None:
        raise DetkitError(message)
    return value


def gather_objects(value: Any) -> list[Any]:
    """Return every rank's ``value`` on rank 0, in their order; elsewhere none."""
    if world_size() == 1:
        return [value]
    gathered = [None] * world_size() if is_main_process() else None
    dist.gather_object(value, gathered, 0, group=_patient)
    return gathered or []


def gather_messages(messages: Sequence[str]) -> list[str]:
    """Return the messages of all ranks on rank 0, elsewhere none; names in them that are not UTF-8 are escaped."""
    return [printable(message) for of_rank in gather_objects(list(messages)) for message in of_rank]


def claim_error_message(sentence: str) -> bool:
    """True if this rank should print the error, being the first to claim it; before the rendezvous, one per node is."""
    store = current_store()
    if store is None:
        return is_local_main()
    with suppress(dist.DistError, RuntimeError):
        store.set("mistake", sentence)
        return store.add(f"said {sentence}", 1) == 1
    return is_main_process()  # the store went with rank 0's process, or another's agent


def peer_user_error() -> str | None:
    """Return the user error that ended another rank, or None: losing that rank is not a fault of this one."""
    store = current_store()
    try:
        return store.get("mistake").decode() if store is not None and store.check(["mistake"]) else None
    except (dist.DistError, RuntimeError):
        return "rank 0 has ended, and said why"  # the store went with it


def is_peer_failure(error: Exception) -> bool:
    """Whether an error says that another process of this training has gone."""
    phrases = r"Connection (closed|reset|refused)|Broken pipe|Read error|Write error|Timed out|remote process exited"
    return current_store() is not None and isinstance(error, RuntimeError) and bool(re.search(phrases, str(error)))


def _device_of_rank(device: str, local: int) -> torch.device:
    """Return the device of the process with number ``local`` on its node."""
    if ":" in device:
        raise DetkitError(f"device={device} is one device for several ranks: use device=cuda, and CUDA_VISIBLE_DEVICES")
    picked = pick_device(device)
    if picked.type != "cuda":
        return picked
    gpus = torch.cuda.device_count()
    if local >= gpus:
        raise DetkitError(f"local rank {local} has no GPU, this node shows {gpus}: start one rank for each")
    picked = torch.device("cuda", local)
    torch.cuda.set_device(picked)
    return picked
