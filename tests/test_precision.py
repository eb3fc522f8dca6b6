import pytest
import torch

from detkit.engine import precision
from detkit.engine.precision import Precision, pick_device
from detkit.errors import DetkitError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("device", "has_bf16", "expected"),
    [(CPU, True, torch.bfloat16), (CPU, False, None), (CUDA, True, torch.bfloat16), (CUDA, False, torch.float16)],
)
def test_auto_follows_the_hardware(monkeypatch, device, has_bf16, expected):
    monkeypatch.setattr(precision, "_cpu_has_bf16", lambda: has_bf16)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16)
    assert Precision.pick("auto", device).dtype is expected


def test_autocast_computes_in_the_chosen_type():
    conv, x = torch.nn.Conv2d(3, 3, 1), torch.randn(1, 3, 2, 2)
    for amp, expected in (("off", torch.float32), ("bf16", torch.bfloat16)):
        with Precision.pick(amp, CPU).autocast():
            assert conv(x).dtype is expected


@pytest.mark.parametrize(("amp", "sentence"), [("fp16", "needs CUDA"), ("half", "use auto, off, bf16 or fp16")])
def test_impossible_choices_are_named(amp, sentence):
    with pytest.raises(DetkitError, match=sentence):
        Precision.pick(amp, CPU)


def test_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == CPU
    for name, sentence in (("cuda", "torch sees no CUDA device"), ("tpu9", "use auto, cpu or cuda")):
        with pytest.raises(DetkitError, match=sentence):
            pick_device(name)
