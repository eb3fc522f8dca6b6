"""Who the processes of a training are, how they meet, and what a restart of all of them still knows.

torchrun says by RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT who a process is, SLURM's srun by variables
of its own; without them there is one. torchrun may start its processes again after a failure (``--max-restarts``). Its
store of keys, at MASTER_ADDR, outlives them: there a start finds what the one before left. How many there were,
TORCHELASTIC_RESTART_COUNT, does not tell: an agent does not count a restart that it did because another agent asked.
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

_store: dist.Store | None = None  # of this start alone
_lasting: dist.Store | None = None  # of torchrun's agent


@dataclass(frozen=True)
class RankInfo:
    """Which process this is: ``rank`` of ``ranks``, ``local`` of those on its node, all from 0."""

    ranks: int = 1
    rank: int = 0
    local: int = 0

    @classmethod
    def from_env(cls) -> "RankInfo":
        """Return this process' place, from torchrun's or SLURM's variables.

        Raises:
            DetkitError: they are missing or malformed.
        """
        take_slurm_variables(os.environ)
        return cls(*(_variable(name) for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK")))

    def unreachable(self, error: Exception) -> DetkitError:
        """Return the sentence on others that do not come."""
        words = f"rank {self.rank} of {self.ranks} does not reach the others: start all of them, by torchrun or srun"
        return DetkitError(f"{words} ({str(error).splitlines()[0]})")


def rendezvous(timeout: float) -> dist.Store:
    """Wait for the others for ``timeout`` seconds at most; return a store of keys that is this start's alone.

    Raises:
        DetkitError: they do not come.
    """
    global _store, _lasting
    place = RankInfo.from_env()
    if _store is not None:
        return _store
    try:
        store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(seconds=timeout)))
        while isinstance(store, dist.PrefixStore):
            store = store.underlying_store
        if _restarts_are_possible():
            _lasting = store
            _store = dist.PrefixStore(_name_of_start(store, place, timeout), store)
        else:
            _store = store
    except (dist.DistError, RuntimeError, ValueError) as error:
        raise place.unreachable(error) from None
    return _store


def current_store() -> dist.Store | None:
    """Return what ``rendezvous`` did; None before, and for a process alone."""
    return _store


def reset_rendezvous() -> None:
    """Forget the others."""
    global _store, _lasting
    _store = _lasting = None


def store_set(key: str, value: str) -> None:
    """Keep a value for the next start, where torchrun may make one."""
    if _lasting is not None:
        _lasting.set(f"detkit {key}", value)


def store_get(key: str, timeout: float) -> str | None:
    """Return what ``store_set`` kept at an earlier start by torchrun; None: there was none, or there is no torchrun.

    Raises:
        DetkitError: as ``rendezvous``.
    """
    if not _restarts_are_possible():
        return None
    rendezvous(timeout)
    assert _lasting is not None  # as torchrun's agent keeps it
    key = f"detkit {key}"
    return _lasting.get(key).decode() if _lasting.check([key]) else None


def is_local_main() -> bool:
    """Whether this is the first process on its node, as far as the variables tell."""
    return (os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or "0") == "0"


def take_slurm_variables(environment: MutableMapping[str, str]) -> None:
    """Where srun started several tasks and no torchrun did, set torchrun's variables from SLURM's, in place.

    Only srun sets SLURM_STEP_NUM_TASKS, the tasks of the step that a process belongs to. SLURM_NTASKS may be what was
    asked of sbatch or salloc: in the script itself there is one process, with SLURM_PROCID=0, whatever it says; and the
    shell that salloc opens is a step of one task. MASTER_ADDR is the first host, MASTER_PORT follows from the job's
    number, so that two jobs differ.
    """
    theirs = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS")
    if "RANK" in environment or any(name not in environment for name in theirs) or environment[theirs[2]] == "1":
        return
    for name, given in zip(("RANK", "LOCAL_RANK", "WORLD_SIZE"), theirs, strict=True):
        environment[name] = environment[given]
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_NODELIST")
    nodes = nodes or environment.get("SLURM_JOB_NODELIST", "localhost")
    environment.setdefault("MASTER_ADDR", first_host(nodes))
    environment.setdefault("MASTER_PORT", str(20_000 + int(environment.get("SLURM_JOB_ID", 0)) % 20_000))


def first_host(nodes: str) -> str:
    """Return the first host of a SLURM list such as ``gpu[003-007,9],login1``: ``gpu003``."""
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", nodes).partition(",")[0]


def _restarts_are_possible() -> bool:
    """Whether torchrun's agent keeps the store, which its processes then find at every start."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _name_of_start(store: dist.Store, place: RankInfo, timeout: float) -> str:
    """Return a name on which the processes of one start agree, in a store full of those of earlier ones.

    torch leaves its addresses there; a later start that read them would wait for processes that are dead. So rank 0
    names the start, and tells it to whoever answers: each of the others leaves a name of its own, which is written over
    that of the process that had its rank before, and answers to that alone.
    """
    name = uuid.uuid4().hex
    if place.rank:
        store.set(f"detkit rank {place.rank}", name)
        start = store.get(f"detkit start for {name}").decode()  # waits
        store.set(f"detkit {start} has {place.rank}", "")
        return start
    missing = set(range(1, place.ranks))
    end = time.monotonic() + timeout
    while missing:
        if time.monotonic() > end:
            raise dist.DistError(f"rank {min(missing)} did not come within {timeout:g} s")
        for rank in missing:
            if store.check([f"detkit rank {rank}"]):
                store.set(f"detkit start for {store.get(f'detkit rank {rank}').decode()}", name)
        missing = {rank for rank in missing if not store.check([f"detkit {name} has {rank}"])}
        time.sleep(0.02)
    return name


def _variable(name: str) -> int:
    """Return one of torchrun's variables; without WORLD_SIZE there is one process, without LOCAL_RANK one a node."""
    if "WORLD_SIZE" not in os.environ:
        return int(name == "WORLD_SIZE")
    text = os.environ.get(name, "0" if name == "LOCAL_RANK" else "")
    if not text.isdecimal() or text == "0" == os.environ["WORLD_SIZE"]:
        raise DetkitError(f"WORLD_SIZE={os.environ['WORLD_SIZE']}, but {name}={text}: start the ranks by torchrun")
    return int(text)
