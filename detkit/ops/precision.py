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
    """Device and dtype of the forward pass.

    Attributes:
        device: device of the model.
        dtype: of convolutions and matrix products; None for float32 throughout.
    """

    device: torch.device
    dtype: torch.dtype | None

    @classmethod
    def from_config(cls, amp: str, device: torch.device) -> "Precision":
        """Return the precision for a value of the key ``amp``: off, bf16, fp16 (CUDA) or auto.

        ``auto`` is bf16 if the device supports it, else fp16 on CUDA and float32 on a CPU, where emulated bf16 would be
        slower.

        Raises:
            DetkitError: fp16 on a CPU, or an unknown value.
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
        """Return the autocast context for a forward pass."""
        return torch.autocast(self.device.type, self.dtype or torch.bfloat16, enabled=self.dtype is not None)

    def __str__(self) -> str:
        return str(self.dtype or torch.float32).removeprefix("torch.")


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch, enable deterministic kernels where available, and disable TF32."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # required for deterministic cuBLAS
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.allow_tf32 = False  # use amp for speed instead
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cuda.enable_mem_efficient_sdp(False)  # its attention gradients are not deterministic
    torch.backends.cuda.enable_cudnn_sdp(False)
    # Otherwise every torch.empty is filled. Missing in the stubs, as torch sets it as a property of the module.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error means that the GPU's memory is full, raised by torch or a CUDA library."""
    phrases = ("out of memory", "_alloc_failed", "unable to find an engine", "valid cudnn algorithm")
    found = isinstance(error, RuntimeError) and any(phrase in str(error).lower() for phrase in phrases)
    return found or isinstance(error, torch.OutOfMemoryError)


def tune_malloc() -> None:
    """Make glibc keep freed memory for the next step instead of returning it to the kernel.

    Each training step allocates the same activations; on a CPU, page faults would take about a fifth of the time.
    Has no effect with other C libraries.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX: large blocks are not mapped separately
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap is not trimmed


def _cpu_has_bf16() -> bool:
    """Whether this CPU has bfloat16 instructions (AVX512-BF16 or AMX)."""
    checks = (getattr(torch.cpu, f"_is_{name}_supported", None) for name in ("avx512_bf16", "amx_tile"))
    return any(check() for check in checks if check)
