"""trainer.compile: the same numbers, no trace of the trial, and a way back. (Dynamo traces; Inductor takes minutes.)"""

import copy
from functools import partial

import pytest
import torch
from functorch.compile import nop
from torch._dynamo.backends.common import aot_autograd

from detkit.api import create_model
from detkit.distributed.sync_batch_norm import convert_sync_batchnorm
from detkit.engine.compile import compile_network
from detkit.engine.param_groups import train_mode
from detkit.ops.precision import Precision
from detkit.tasks import load_config, train
from tests.conftest import TORCH

CPU = torch.device("cpu")
SMALL = ("backbone.columns=2", "backbone.layers=[1,1,1,1]", "backbone.channels=[16,32,48,64]")
compile_for_real = torch.compile


@pytest.fixture(autouse=True)
def traced(monkeypatch):
    """Compile by tracing alone, and leave torch as it was."""
    monkeypatch.setattr(torch, "compile", partial(compile_for_real, backend="eager"))
    yield
    torch.compiler.set_stance("default")
    torch._dynamo.reset()


def messages(caplog) -> list[str]:
    """What compile_network logged; torch logs thousands of empty lines."""
    return [record.getMessage() for record in caplog.records if record.name.startswith("detkit")]


def make(caplog, amp: str = "off", **parts):
    detector = create_model(num_classes=3, **parts)
    network = compile_network(detector, Precision.from_config(amp, CPU), 64, 2)
    return detector, network, messages(caplog)


def gradients(network, detector, images, amp):
    detector.zero_grad()
    torch.manual_seed(1)  # for what is dropped
    with Precision.from_config(amp, CPU).autocast():
        out = network(images)
    (out.cls.float().square().mean() + out.reg.float().square().mean()).backward()
    return {name: p.grad for name, p in detector.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("parts", "amp"),
    [
        ({"model": "yolov8n"}, "bf16"),
        ({"model": "yolov8n", "backbone": "revcol_tiny", "overrides": SMALL}, "off"),
        ({"model": "yolov8n", "backbone": "mobilenetv2", "neck": "repgd_n"}, "off"),
        ({"model": "yolov8n_dynamicconv"}, "off"),
        ({"model": "yolov5n_akconv"}, "off"),
    ],
    ids=lambda value: value.get("backbone", value["model"]) if isinstance(value, dict) else value,
)
def test_every_architecture_computes_the_same(parts, amp, caplog):
    detector, network, logged = make(caplog, amp, **parts)
    assert len(logged) == 1
    assert "takes minutes" in logged[0]
    assert network is not detector
    plain = copy.deepcopy(detector)
    images = torch.rand(2, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    train_mode(plain)
    train_mode(detector)
    with torch.compiler.set_stance("fail_on_recompile"):  # what was tried is what a training runs
        found = gradients(network, detector, images, amp)
    for name, expected in gradients(plain, plain, images, amp).items():
        # Before 2.12 traced float32 gradients are summed in another order.
        bound = {"rtol": 0.05, "atol": 1e-3} if TORCH < (2, 12) and amp == "off" else {}
        torch.testing.assert_close(found[name], expected, msg=name, **bound)


def test_the_trial_leaves_no_trace():
    detector = create_model("yolov8n", num_classes=3)
    before, rng = copy.deepcopy(detector.state_dict()), torch.get_rng_state()
    compile_network(detector, Precision.from_config("off", CPU), 64, 2)
    assert all(torch.equal(value, before[name]) for name, value in detector.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(p.grad is None for p in detector.parameters())


@pytest.mark.slow
def test_a_training_with_it_learns_the_same(shapes_root, tmp_path, monkeypatch):
    """The whole task; an epoch's last batch is smaller than the others, and not compiled."""
    runs = []

    def counting(graph, example_inputs):
        def run(*inputs):
            runs.append(len(inputs))
            return graph(*inputs)

        return run

    monkeypatch.setattr(torch, "compile", partial(compile_for_real, backend=counting))
    common = ["experiment=smoke", f"data.root={shapes_root}", "device=cpu", "amp=off", "workers=0", "batch_size=48"]
    results = []
    for value in ("false", "true"):
        overrides = [*common, f"trainer.compile={value}", f"run_dir={tmp_path / value}"]
        results.append(train.run(load_config("train", overrides)))
        full_batches = len(list((shapes_root / "images" / "train").iterdir())) // 48 * 2
        assert len(runs) == (1 + full_batches if value == "true" else 0)  # the trial, and two epochs
    assert results[0] == results[1]


def test_another_shape_runs_uncompiled(caplog):
    detector, network, _ = make(caplog, model="yolov8n")
    detector.eval()
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    images = torch.rand(1, 3, 96, 64)
    torch.testing.assert_close(network(images).cls, detector(images).cls)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


@pytest.mark.parametrize("when", ["forward", "backward"])
def test_what_cannot_be_compiled_runs_as_it_is(monkeypatch, caplog, when):
    def broken(graph, example_inputs):
        raise RuntimeError("no compiler here\nand a long story")

    backend = broken if when == "forward" else aot_autograd(fw_compiler=nop, bw_compiler=broken)
    monkeypatch.setattr(torch, "compile", partial(compile_for_real, backend=backend))
    detector = create_model("yolov8n", num_classes=3)
    before = copy.deepcopy(detector.state_dict())
    assert compile_network(detector, Precision.from_config("off", CPU), 64, 2) is detector
    logged = messages(caplog)
    assert all(torch.equal(value, before[name]) for name, value in detector.state_dict().items())
    assert len(logged) == 2
    assert "trainer.compile: the network runs uncompiled" in logged[1]
    assert "no compiler here" in logged[1]
    assert "\n" not in logged[1]


def test_synchronised_norms_are_not_compiled(caplog):
    detector = create_model("yolov8n", num_classes=3)
    convert_sync_batchnorm(detector)
    assert compile_network(detector, Precision.from_config("off", CPU), 64, 2) is detector
    logged = messages(caplog)
    assert "sync_bn" in logged[0]
