"""Ranks, their rendezvous, and values that survive a restart by torchrun.

The rank is given by torchrun's variables (RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT) or by those of
SLURM's srun; without them there is one process. torchrun may restart its processes after a failure
(``--max-restarts``). The key-value store at MASTER_ADDR outlives them, so a restart finds values of earlier starts.
TORCHELASTIC_RESTART_COUNT is not used, since an agent does not count restarts that another agent requested.
"""

import os
import re
import time
import uuid
from collections.abc import MutableMapping
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from detkit.errors import DetkitError

_store: dist.Store | None = None  # of this start only
_agent_store: dist.Store | None = None  # kept by torchrun's agent across restarts


@dataclass(frozen=True)
class RankInfo:
    """Number of ranks, and this process's rank and local rank (on its node), both from 0."""

    ranks: int = 1
    rank: int = 0
    local: int = 0

    @classmethod
    def from_env(cls) -> "RankInfo":
        """Read torchrun's or SLURM's environment variables.

        Raises:
            DetkitError: variables are missing or malformed.
        """
        take_slurm_variables(os.environ)
        return cls(*(_variable(name) for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK")))

    def unreachable(self, error: Exception) -> DetkitError:
        """Return the error for ranks that cannot be reached."""
        return DetkitError(
            f"rank {self.rank} of {self.ranks} cannot reach the others: start all of them with torchrun or srun "
            f"({str(error).splitlines()[0]})"
        )


def rendezvous(timeout: float) -> dist.Store:
    """Wait for the other ranks for at most ``timeout`` seconds; return a key-value store for this start only.

    Raises:
        DetkitError: the other ranks cannot be reached.
    """
    global _store, _agent_store
    info = RankInfo.from_env()
    if _store is not None:
        return _store
    try:
        store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(seconds=timeout)))
        while isinstance(store, dist.PrefixStore):
            store = store.underlying_store
        if _restarts_are_possible():
            _agent_store = store
            _store = dist.PrefixStore(_start_id(store, info, timeout), store)
        else:
            _store = store
    except (dist.DistError, RuntimeError, ValueError) as error:
        raise info.unreachable(error) from None
    return _store


def current_store() -> dist.Store | None:
    """Return the store of ``rendezvous``; None before it, and with a single process."""
    return _store


def reset_rendezvous() -> None:
    """Drop the stores."""
    global _store, _agent_store
    _store = _agent_store = None


def store_set(key: str, value: str) -> None:
    """Store a value for later starts, if torchrun can restart the processes."""
    if _agent_store is not None:
        _agent_store.set(f"detkit {key}", value)


def store_get(key: str, timeout: float) -> str | None:
    """Return a value that ``store_set`` stored at an earlier start, or None, as always without torchrun.

    Raises:
        DetkitError: as ``rendezvous``.
    """
    if not _restarts_are_possible():
        return None
    rendezvous(timeout)
    assert _agent_store is not None  # set by ``rendezvous``
    key = f"detkit {key}"
    return _agent_store.get(key).decode() if _agent_store.check([key]) else None


def is_local_main() -> bool:
    """Whether this is the first process on its node, according to the environment variables."""
    return (os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or "0") == "0"


def take_slurm_variables(environment: MutableMapping[str, str]) -> None:
    """Set torchrun's variables from SLURM's in place, if srun, not torchrun, started several tasks.

    SLURM_STEP_NUM_TASKS, the number of tasks of a step, is only set by srun. SLURM_NTASKS may come from sbatch or
    salloc, although the batch script is a single process with SLURM_PROCID=0, and the shell of salloc is a step of one
    task. MASTER_ADDR is the first host, and MASTER_PORT depends on the job id, so that two jobs differ.
    """
    slurm_names = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS")
    if "RANK" in environment or any(name not in environment for name in slurm_names):
        return
    if environment["SLURM_STEP_NUM_TASKS"] == "1":
        return
    for name, slurm_name in zip(("RANK", "LOCAL_RANK", "WORLD_SIZE"), slurm_names, strict=True):
        environment[name] = environment[slurm_name]
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_NODELIST")
    nodes = nodes or environment.get("SLURM_JOB_NODELIST", "localhost")
    environment.setdefault("MASTER_ADDR", first_host(nodes))
    environment.setdefault("MASTER_PORT", str(20_000 + int(environment.get("SLURM_JOB_ID", 0)) % 20_000))


def first_host(nodes: str) -> str:
    """Return the first host of a SLURM node list: ``gpu003`` for ``gpu[003-007,9],login1``."""
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", nodes).partition(",")[0]


def _restarts_are_possible() -> bool:
    """Whether torchrun's agent keeps the store, so that it outlives the processes."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _start_id(store: dist.Store, info: RankInfo, timeout: float) -> str:
    """Return an id for this start that all ranks agree on, in a store that still holds keys of earlier starts.

    torch stores addresses of its processes, and a later start that read them would wait for dead processes. So rank 0
    chooses the id: each other rank publishes a token of its own, replacing that of an earlier process with its rank,
    and waits for the id under this token.

    Raises:
        DistError: a rank did not join within ``timeout`` seconds.
    """
    token = uuid.uuid4().hex
    if info.rank:
        store.set(f"detkit rank {info.rank}", token)
        start = store.get(f"detkit start for {token}").decode()  # blocks
        store.set(f"detkit {start} has {info.rank}", "")
        return start
    missing = set(range(1, info.ranks))
    deadline = time.monotonic() + timeout
    while missing:
        if time.monotonic() > deadline:
            raise dist.DistError(f"rank {min(missing)} did not join within {timeout:g} s")
        for rank in missing:
            if store.check([f"detkit rank {rank}"]):
                store.set(f"detkit start for {store.get(f'detkit rank {rank}').decode()}", token)
        missing = {rank for rank in missing if not store.check([f"detkit {token} has {rank}"])}
        time.sleep(0.02)
    return token


def _variable(name: str) -> int:
    """Return the value of one of torchrun's variables; WORLD_SIZE defaults to 1, LOCAL_RANK to 0."""
    if "WORLD_SIZE" not in os.environ:
        return int(name == "WORLD_SIZE")
    text = os.environ.get(name, "0" if name == "LOCAL_RANK" else "")
    if not text.isdecimal() or text == "0" == os.environ["WORLD_SIZE"]:
        raise DetkitError(f"WORLD_SIZE={os.environ['WORLD_SIZE']}, but {name}={text}: start the ranks with torchrun")
    return int(text)
