"""Mixed precision and seeds."""

import contextlib
import ctypes
import os
import random
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch

from detkit.errors import DetkitError


@dataclass(frozen=True)
class Precision:
    """How the forward pass computes.

    Attributes:
        device: where.
        dtype: of convolutions and matrix products; None for float32 throughout.
    """

    device: torch.device
    dtype: torch.dtype | None

    @classmethod
    def from_config(cls, amp: str, device: torch.device) -> "Precision":
        """Read the ``amp`` key: off, bf16, fp16 (CUDA), or auto.

        ``auto`` is bf16 where the device computes in it, fp16 on older CUDA devices, float32 on older CPUs,
        where emulated bf16 would be slower.

        Raises:
            DetkitError: fp16 on a CPU, or an unknown word.
        """
        if amp == "auto":
            if device.type == "cuda":
                amp = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
            else:
                amp = "bf16" if _cpu_has_bf16() else "off"
        elif amp == "fp16" and device.type == "cpu":
            raise DetkitError("amp=fp16 needs CUDA: use amp=bf16 or amp=off on a CPU")
        dtypes = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}
        if amp not in dtypes:
            raise DetkitError(f"amp={amp} is unknown: use auto, off, bf16 or fp16")
        return cls(device, dtypes[amp])

    def autocast(self) -> AbstractContextManager:
        """Return the context for a forward pass."""
        return torch.autocast(self.device.type, self.dtype or torch.bfloat16, enabled=self.dtype is not None)

    def __str__(self) -> str:
        return str(self.dtype or torch.float32).removeprefix("torch.")


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch, choose deterministic kernels where torch has them, and float32 that is float32."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS needs to be deterministic
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.allow_tf32 = False  # amp is the way to be faster than float32
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cuda.enable_mem_efficient_sdp(False)  # attention whose gradients are summed in any order
    torch.backends.cuda.enable_cudnn_sdp(False)
    # Else every torch.empty is filled. The stubs lack it, as it is a property that torch gives the module itself.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that a GPU's memory is full: torch's own, or that of a library that allocates beside it."""
    phrases = ("out of memory", "_alloc_failed", "unable to find an engine", "valid cudnn algorithm")
    found = isinstance(error, RuntimeError) and any(phrase in str(error).lower() for phrase in phrases)
    return found or isinstance(error, torch.OutOfMemoryError)


def tune_malloc() -> None:
    """Tell glibc to keep freed memory for the next step instead of handing it back to the kernel.

    Every training step allocates the same activations again; on a CPU the page faults cost about a fifth of it.
    Does nothing with another C library.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no mappings of their own for large blocks
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap does not shrink


def _cpu_has_bf16() -> bool:
    """Whether this CPU multiplies in bfloat16 (AVX512-BF16 or AMX)."""
    checks = (getattr(torch.cpu, f"_is_{name}_supported", None) for name in ("avx512_bf16", "amx_tile"))
    return any(check() for check in checks if check)
