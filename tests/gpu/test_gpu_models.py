"""Every model on a GPU: what holds on a CPU holds there, in half precision too, compiled, fused and moved."""

import copy

import pytest
import torch
from torch import nn

from detkit.checks.harness import Composition, deviations
from detkit.checks.model_checks import CHECKS, run_check
from detkit.config import compose_config, resolve
from detkit.engine.checkpoint import build_from_checkpoint, save_checkpoint
from detkit.engine.compile import compile_network
from detkit.models.detector import build_detector, build_loss
from detkit.ops.nms import Thresholds, non_max_suppression
from detkit.ops.precision import Precision
from tests.gpu.conftest import SMALL, compose, noise
from tests.gpu.test_gpu_step import MODELS, REVCOL
from tests.test_grid import GRID, LARGE

pytestmark = pytest.mark.gpu
CPU = torch.device("cpu")


@pytest.mark.parametrize("overrides", GRID)
def test_what_check_checks_holds(overrides, cuda):
    cfg = resolve(compose_config("check", overrides.split()))
    if "columns" in cfg["backbone"]:
        cfg["backbone"]["columns"] = 2
    with torch.device("meta"):
        numbers = sum(p.numel() for p in build_detector(cfg, ["a", "b", "c"]).parameters())
    if numbers > LARGE:
        pytest.skip("too large for a test")
    detector = build_detector(cfg, ["a", "b", "c"]).to(cuda)
    composition = Composition(detector, build_loss(cfg, detector.head))
    composition.randomize_norms()
    findings = [run_check(composition, title, check) for title, check in CHECKS.items()]
    assert not [finding for finding in findings if finding.status == "fail"]


@pytest.mark.parametrize("overrides", [*MODELS, REVCOL])
def test_it_computes_what_a_cpu_does(overrides, cuda):
    """The boxes and scores, the loss and its gradients; up to the order of sums."""
    reference = compose(f"{overrides} {SMALL}", CPU)
    for module in reference.detector.modules():
        for name in ("rate", "drop_path"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)  # random numbers are others on a GPU
    reference.randomize_norms()
    mine = Composition(copy.deepcopy(reference.detector).to(cuda), reference.loss)
    expected = reference.decode()
    assert max(deviations(tuple(part.cpu() for part in mine.decode()), expected)) < 1e-4
    batch = noise(CPU)
    loss = reference.backward(batch)
    assert mine.backward(batch.to(cuda)) == pytest.approx(loss, rel=1e-3)
    norms = [
        torch.stack([p.grad.norm().cpu() for p in one.detector.parameters() if p.grad is not None])
        for one in (mine, reference)
    ]
    assert (norms[0] - norms[1]).norm() < 0.01 * norms[1].norm()


@pytest.mark.parametrize("overrides", MODELS)
def test_fused_in_half_precision(overrides, cuda):
    """Not further from float32 than the plain form in half precision, but for chance."""
    composition = compose(f"{overrides} {SMALL}", cuda)
    composition.randomize_norms()
    half = torch.float16 if cuda.type == "cuda" else torch.bfloat16
    expected = composition.decode()
    plain = composition.decode(copy.deepcopy(composition.detector).to(half))
    fused = composition.decode(composition.detector.fuse().to(half))
    for found, usual in zip(deviations(fused, expected), deviations(plain, expected), strict=True):
        assert found < 2 * usual + 0.01


def test_every_convolution_gives_channels_last(cuda):
    detector = compose(f"model=yolov8n {SMALL}", cuda).detector
    seen = []

    def look(module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        seen.append(output.is_contiguous(memory_format=torch.channels_last))

    for module in detector.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(look)
    with Precision.from_config("bf16", cuda).autocast():
        detector(noise(cuda).images.float() / 255)
    assert seen
    assert all(seen)


@pytest.mark.parametrize("overrides", MODELS)
def test_the_layout_in_memory_does_not_matter(overrides, cuda):
    composition = compose(f"{overrides} {SMALL}", cuda)
    composition.randomize_norms()
    contiguous = copy.deepcopy(composition.detector).to(memory_format=torch.contiguous_format).eval()
    assert max(deviations(composition.decode(contiguous), composition.decode())) < 1e-4


def test_a_checkpoint_goes_to_the_gpu_and_back(cuda, tmp_path):
    composition = compose(f"model=yolov8n {SMALL}", CPU)
    composition.randomize_norms()
    save_checkpoint(composition.detector, tmp_path / "cpu.safetensors", {})
    there = build_from_checkpoint(tmp_path / "cpu.safetensors").to(cuda)
    found = Composition(there, composition.loss).decode()
    assert max(deviations(tuple(part.cpu() for part in found), composition.decode())) < 1e-4
    save_checkpoint(there, tmp_path / "gpu.safetensors", {})
    back = build_from_checkpoint(tmp_path / "gpu.safetensors").state_dict()
    assert all(torch.equal(value, back[name]) for name, value in composition.detector.state_dict().items())


@pytest.mark.parametrize("amp", ["off", "bf16"])
@pytest.mark.parametrize("overrides", ["model=yolov8n", "model=yolov5n_akconv", "model=goldyolo_n", REVCOL])
def test_compiled_it_computes_the_same(overrides, amp, cuda):
    composition = compose(f"{overrides} {SMALL}", cuda)
    detector, batch = composition.detector, noise(cuda)
    precision = Precision.from_config(amp, cuda)
    network = compile_network(detector, precision, 64, len(batch.images))
    try:
        assert network is not detector
        found, expected = (_gradients(one, composition, precision) for one in (network, detector))
    finally:
        torch.compiler.set_stance("default")
        torch._dynamo.reset()
    for name, value in expected.items():
        distance = (found[name] - value).norm()
        assert distance <= (0.1 if amp == "bf16" else 1e-3) * value.norm() + 1e-6, name


def _gradients(network: nn.Module, composition: Composition, precision: Precision) -> dict[str, torch.Tensor]:
    """Gradients of the outputs' mean square, with the same random numbers every time."""
    detector = composition.detector.train()
    detector.zero_grad()
    torch.manual_seed(0)
    images = torch.rand(4, 3, 64, 64, device=composition.device).contiguous(memory_format=torch.channels_last)
    torch.manual_seed(1)  # for what is dropped
    with precision.autocast():
        out = network(images)
    (out.cls.float().square().mean() + out.reg.float().square().mean()).backward()
    return {name: p.grad.clone() for name, p in detector.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_suppression_takes_the_same_boxes(amp, cuda):
    """Of decoded boxes on the GPU and of the same on the CPU."""
    composition = compose(f"model=yolov8n {SMALL}", cuda)
    composition.randomize_norms()
    precision = Precision.from_config(amp if cuda.type == "cuda" or amp != "fp16" else "bf16", cuda)
    with precision.autocast():
        boxes, scores = composition.decode()
    settings = {"score": 0.001, "iou": 0.7, "max_det": 50}
    mine = non_max_suppression(boxes, scores, Thresholds(**settings))
    theirs = non_max_suppression(boxes.cpu(), scores.cpu(), Thresholds(**settings))
    for found, expected in zip(mine, theirs, strict=True):
        torch.testing.assert_close(found[1].cpu(), expected[1])
