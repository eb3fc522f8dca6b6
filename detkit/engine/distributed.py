"""Several processes that train as one: who they are, and how they talk outside of the gradients.

torchrun says by RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT who a process is; SLURM's srun by variables
of its own. Without them there is one process, no group, and every function here does nothing.

Sums of tensors go through the default group, whose ranks may wait for one another for ``trainer.rank_timeout`` seconds.
What rank 0 does for all (a directory's name, COCO's metrics) goes through a second one, on the CPU, with more patience.
A process that dies closes its connections, which the others see at once in both.
"""

import json
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from detkit.engine.precision import pick_device
from detkit.errors import DetkitError
from detkit.ops.ranks import rank_count

PATIENCE = timedelta(hours=2)  # for rank 0: it may read a large set for the first time

_patient: dist.ProcessGroup | None = None  # None: the default group
_store: dist.Store | None = None


def rank() -> int:
    """Return this process' number among those that train together, from 0."""
    return dist.get_rank() if rank_count() > 1 else 0


def is_main() -> bool:
    """Whether this is rank 0, which alone writes, draws and prints."""
    return rank() == 0


def join(device: str, timeout: float) -> torch.device:
    """Join the other processes that torchrun or SLURM started, if any; return the device of this one.

    Args:
        device: as for ``pick_device``; ``auto`` and ``cuda`` are the GPU of this process' number on its node.
        timeout: seconds that ranks wait for one another.

    Raises:
        DetkitError: variables are missing or malformed, there is no GPU left for this rank, or the others do not come.
    """
    global _patient, _store
    take_slurm_variables(os.environ)
    ranks, own, local = (_variable(name) for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"))
    if ranks == 1:
        return pick_device(device)
    picked = _device_of_rank(device, local)
    if dist.is_initialized():  # an earlier job of a sweep
        return picked
    wait = timedelta(seconds=timeout)
    try:
        _store, _, _ = next(dist.rendezvous("env://", timeout=wait))
        backend = "nccl" if picked.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=_store, rank=own, world_size=ranks, timeout=wait)
        _patient = dist.new_group(backend="gloo", timeout=PATIENCE)
    except (dist.DistError, RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise DetkitError(
            f"rank {own} of {ranks} does not reach the others: start all of them, by torchrun or srun ({reason})"
        ) from None
    if own:
        warnings.filterwarnings("ignore")  # rank 0 says the same
    return picked


def leave() -> None:
    """Leave the process group, if there is one."""
    global _patient, _store
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
    _patient = _store = None


def take_slurm_variables(environment: dict[str, str]) -> None:
    """Where srun started several tasks and no torchrun did, set torchrun's variables from SLURM's, in place.

    MASTER_ADDR is the first host of the job, MASTER_PORT follows from its number, so that two jobs differ.
    """
    needed = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS")
    if "RANK" in environment or any(name not in environment for name in needed) or environment["SLURM_NTASKS"] == "1":
        return
    for name, theirs in zip(("RANK", "LOCAL_RANK", "WORLD_SIZE"), needed, strict=True):
        environment[name] = environment[theirs]
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_NODELIST")
    nodes = nodes or environment.get("SLURM_JOB_NODELIST", "localhost")
    environment.setdefault("MASTER_ADDR", first_host(nodes))
    environment.setdefault("MASTER_PORT", str(20_000 + int(environment.get("SLURM_JOB_ID", 0)) % 20_000))


def first_host(nodes: str) -> str:
    """Return the first host of a SLURM list such as ``gpu[003-007,9],login1``: ``gpu003``."""
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", nodes).partition(",")[0]


def share_batch(batch_size: int) -> int:
    """Return how many images of a global batch each rank takes.

    Raises:
        DetkitError: they are not equally many.
    """
    ranks = rank_count()
    if batch_size % ranks:
        more = batch_size + ranks - batch_size % ranks
        raise DetkitError(
            f"batch_size={batch_size} counts the images of all {ranks} ranks and must divide by them: use {more}"
        )
    return batch_size // ranks


def parallel(model: nn.Module) -> nn.Module:
    """Return ``model`` so that backward averages the gradients of all ranks; alone, ``model`` itself.

    All ranks start from rank 0's weights. Buffers are the caller's to keep alike.
    """
    if rank_count() == 1:
        return model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # broadcast_buffers has another name from torch 2.14 on
        return nn.parallel.DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)


def wait() -> None:
    """Wait until every rank is here."""
    if rank_count() > 1:
        dist.barrier(_patient)


def largest_of_ranks(number: int) -> int:
    """Return the largest ``number`` of any rank, without asking the device."""
    if rank_count() == 1:
        return number
    largest = torch.tensor(number)
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=_patient)
    return int(largest)


@contextmanager
def main_first() -> Iterator[None]:
    """Run a block on rank 0, then on the others: these find what it leaves on the disk."""
    if not is_main():
        wait()
    try:
        yield
    finally:
        if is_main():
            wait()


def from_main(make: Callable[[], Any]) -> Any:
    """Return on every rank what ``make`` returns on rank 0, where alone it runs: anything that JSON knows.

    Raises:
        DetkitError: ``make`` did; on every rank.
    """
    if rank_count() == 1:
        return make()
    message: Mapping[str, Any] = {}
    if is_main():
        try:
            message = {"value": make()}
        except DetkitError as error:
            message = {"error": str(error)}
    data = json.dumps(message).encode()
    length = torch.tensor([len(data)])
    dist.broadcast(length, 0, group=_patient)
    text = _as_tensor(data) if is_main() else torch.empty(int(length), dtype=torch.uint8)
    dist.broadcast(text, 0, group=_patient)
    message = json.loads(text.numpy().tobytes())
    if "error" in message:
        raise DetkitError(message["error"])
    return message["value"]


def gather(data: bytes) -> list[bytes]:
    """Return every rank's ``data`` on rank 0, in their order; elsewhere none."""
    if rank_count() == 1:
        return [data]
    lengths = torch.zeros(rank_count(), dtype=torch.int64)
    lengths[rank()] = len(data)
    dist.all_reduce(lengths, group=_patient)
    if not is_main():
        if data:
            dist.send(_as_tensor(data), 0, group=_patient)
        return []
    received = [data]
    for source, length in enumerate(lengths.tolist()[1:], 1):
        text = torch.empty(length, dtype=torch.uint8)
        if length:
            dist.recv(text, source, group=_patient)
        received.append(text.numpy().tobytes())
    return received


def gather_lines(lines: Sequence[str]) -> list[str]:
    """Return the sentences of all ranks on rank 0, elsewhere none; alone, ``lines``."""
    return [line for text in gather("\n".join(lines).encode()) for line in text.decode().splitlines()]


def first_to_say(sentence: str) -> bool:
    """Whether no other rank has said ``sentence`` before this run ended by it; before they met, one a node does."""
    if _store is None:
        return (os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or "0") == "0"
    with suppress(dist.DistError, RuntimeError):
        _store.set("mistake", "")
        return _store.add(f"said {sentence}", 1) == 1
    return is_main()  # the store went with rank 0's process, or another's agent


def mistake_elsewhere() -> bool:
    """Whether another rank has ended by a user's mistake, and said so: losing it is not a fault of this one."""
    try:
        return _store is not None and _store.check(["mistake"])
    except (dist.DistError, RuntimeError):  # the store went with rank 0, which has said why
        return True


def _variable(name: str) -> int:
    """Return one of torchrun's variables; without WORLD_SIZE there is one process, without LOCAL_RANK one a node."""
    if "WORLD_SIZE" not in os.environ:
        return int(name == "WORLD_SIZE")
    text = os.environ.get(name, "0" if name == "LOCAL_RANK" else "")
    if not text.isdecimal() or text == "0" == os.environ["WORLD_SIZE"]:
        raise DetkitError(f"WORLD_SIZE={os.environ['WORLD_SIZE']}, but {name}={text}: start the ranks by torchrun")
    return int(text)


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


def _as_tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
