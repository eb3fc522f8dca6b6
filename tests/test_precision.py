import functools

import pytest
import torch

from detkit.errors import DetkitError
from detkit.ops import precision
from detkit.ops.device import pick_device
from detkit.ops.precision import Precision, is_out_of_memory
from detkit.tasks import summary
from tests.conftest import run_command

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("device", "has_bf16", "expected"),
    [(CPU, True, torch.bfloat16), (CPU, False, None), (CUDA, True, torch.bfloat16), (CUDA, False, torch.float16)],
)
def test_auto_follows_the_hardware(monkeypatch, device, has_bf16, expected):
    monkeypatch.setattr(precision, "_cpu_has_bf16", lambda: has_bf16)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16)
    assert Precision.from_config("auto", device).dtype is expected


def test_autocast_computes_in_the_chosen_type():
    conv, x = torch.nn.Conv2d(3, 3, 1), torch.randn(1, 3, 2, 2)
    for amp, expected in (("off", torch.float32), ("bf16", torch.bfloat16)):
        with Precision.from_config(amp, CPU).autocast():
            assert conv(x).dtype is expected


@pytest.mark.parametrize(("amp", "message"), [("fp16", "needs CUDA"), ("half", "use auto, off, bf16 or fp16")])
def test_impossible_choices_are_named(amp, message):
    with pytest.raises(DetkitError, match=message):
        Precision.from_config(amp, CPU)


def test_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == CPU
    for name, message in (("cuda", "torch sees no CUDA device"), ("tpu9", "use auto, cpu or cuda")):
        with pytest.raises(DetkitError, match=message):
            pick_device(name)


def test_a_gpu_by_number_is_the_current_one(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert pick_device("cuda:1") == torch.device("cuda", 1)
    assert chosen == [torch.device("cuda", 1)]
    with pytest.raises(DetkitError, match=r"device=cuda:2: torch sees 2 CUDA devices, the last is cuda:1"):
        pick_device("cuda:2")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("full"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("FIND was unable to find an engine to execute this computation"), True),
        (RuntimeError("CUDA error: device-side assert triggered"), False),
        (RuntimeError("unable to write to file: out of shared memory"), False),
        (DetkitError("out of memory"), False),
    ],
)
def test_out_of_memory_is_distinguished_from_other_errors(error, expected):
    assert is_out_of_memory(error) == expected


def test_a_task_that_does_not_fit_says_so(monkeypatch, capsys):
    def run(cfg: dict) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(summary, "run", functools.wraps(summary.run)(run))
    status, _, err = run_command(monkeypatch, capsys, "summary", "device=cpu")
    assert status == 2
    assert "device=cpu has too little memory: lower image_size" in " ".join(err.split())
