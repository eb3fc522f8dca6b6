"""ParameterNet's convolutions, RepVGG and Gold-YOLO's blocks, AKConv: against the reference and against naive loops."""

import copy
import math

import pytest
import torch
from torch import nn

import detkit
from detkit.engine.optimizer import parameter_groups
from detkit.errors import DetkitError
from detkit.layers.akconv import AKConv, base_grid
from detkit.layers.dynamic import DynamicBnAct, DynamicConv
from detkit.layers.rep import ConvBN, RepVGG
from detkit.models.necks.repgd import Inject, LowIFM, LowLAF, TransformerBlock, _pool, align_high, align_low


def high_ifm() -> nn.Module:
    """HighIFM with the smaller heads that the golden tensors were made with."""
    blocks = nn.Sequential()
    blocks.transformer_blocks = nn.Sequential(*(TransformerBlock(16, 0.0, 2, 4, 8) for _ in range(2)))
    return blocks


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("dynconv_k1s1_g2_e2", lambda: DynamicConv(6, 10, 1, 1, 2, 2)),
        ("dynbnact_k3s2", lambda: DynamicBnAct(6, 10, 3, 2)),
        ("gold_repvgg_identity", lambda: RepVGG(8, 8)),
        ("gold_repvgg_noidentity", lambda: RepVGG(6, 8)),
        ("gold_low_ifm", lambda: LowIFM(28, 8, 12)),
        ("gold_low_laf_v2", lambda: LowLAF(4, 8, 8, 8)),
        ("gold_inject_upsample", lambda: Inject(6, 8, 6)),
        ("gold_high_ifm", high_ifm),
    ],
)
def test_block_is_golden(golden, name, block):
    g = golden(name)
    block = block().eval()
    state = {k.removeprefix("state_dict/"): v for k, v in g.items() if k.startswith("state_dict/")}
    block.load_state_dict({k.replace(".c.", ".conv."): v for k, v in state.items()})
    inputs = [g[f"x{k}"].requires_grad_() for k in range(3) if f"x{k}" in g]
    out = block(*inputs)
    (out * g["cot0"]).sum().backward()
    torch.testing.assert_close(out, g["out0"], atol=1e-4, rtol=0)
    for k, x in enumerate(inputs):
        torch.testing.assert_close(x.grad, g[f"grad_x{k}"], atol=1e-4, rtol=0)
    for key, parameter in block.named_parameters():
        expected = g[
            f"grad_params/{key}" if f"grad_params/{key}" in g else f"grad_params/{key.replace('.conv.', '.c.')}"
        ]
        torch.testing.assert_close(parameter.grad, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["gold_repvgg_identity", "gold_repvgg_noidentity"])
def test_deployed_repvgg_is_golden(golden, name):
    g = golden(name)
    block = RepVGG(g["x0"].shape[1], 8).eval()
    block.load_state_dict({k.removeprefix("state_dict/"): v for k, v in g.items() if k.startswith("state_dict/")})
    block.fuse()
    torch.testing.assert_close(block.rbr_deployed.weight.data, g["deploy_weight"], atol=1e-5, rtol=0)
    torch.testing.assert_close(block.rbr_deployed.bias.data, g["deploy_bias"], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "block",
    [
        DynamicConv(6, 10, 3, 2),
        DynamicConv(6, 10, 1, 1, 2),
        DynamicBnAct(6, 6, 3, 1, residual=True),
        RepVGG(6, 6),
        ConvBN(6, 4, 3),
    ],
    ids=lambda block: type(block).__name__,
)
def test_fused_block_is_equal(block):
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -1, 1)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, -1, 1)
    block.eval()
    fused = copy.deepcopy(block)
    for module in list(fused.modules()):
        if hasattr(module, "fuse"):
            module.fuse()
    x = torch.randn(3, 6, 8, 10)
    torch.testing.assert_close(fused(x), block(x), atol=1e-5, rtol=1e-5)


def test_dynamic_convolution_exports_with_a_dynamic_batch():
    block = DynamicConv(6, 10, 3, 2).eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(block, (torch.randn(2, 6, 8, 8),), dynamic_shapes=({0: batch},))
    x = torch.randn(5, 6, 8, 8)
    torch.testing.assert_close(program.module()(x), block(x), atol=1e-5, rtol=1e-5)


def test_gathered_levels_have_the_sizes_of_the_paper():
    levels = [torch.full((1, 1, 48 // 2**k, 80 // 2**k), float(k)) for k in range(4)]
    assert align_low(levels).shape == (1, 4, 12, 20)
    assert align_low(levels)[0, :, 3, 3].tolist() == [0, 1, 2, 3]
    assert align_high(levels[1:], 1).shape == (1, 3, 6, 10)
    assert align_high(levels[1:], 2).shape == (1, 3, 3, 5)


def naive_akconv_samples(x: torch.Tensor, offsets: torch.Tensor, n: int, stride: int) -> torch.Tensor:
    """Sample point by point: clamp, then bilinear between the four neighbours."""
    batch, channels, height, width = x.shape
    h, w = offsets.shape[-2:]
    out = torch.zeros(batch, channels, h * n, w, dtype=x.dtype)
    side = round(n**0.5)
    for b in range(batch):
        for i in range(h):
            for j in range(w):
                for k in range(n):
                    r = i * stride + k // side + float(offsets[b, k, i, j])
                    c = j * stride + k % side + float(offsets[b, n + k, i, j])
                    r, c = min(max(r, 0), height - 1), min(max(c, 0), width - 1)
                    r0, c0 = int(r), int(c)
                    r1, c1 = min(r0 + 1, height - 1), min(c0 + 1, width - 1)
                    fr, fc = r - r0, c - c0
                    top = x[b, :, r0, c0] * (1 - fc) + x[b, :, r0, c1] * fc
                    bottom = x[b, :, r1, c0] * (1 - fc) + x[b, :, r1, c1] * fc
                    out[b, :, i * n + k, j] = top * (1 - fr) + bottom * fr
    return out


def naive_tutorial_samples(x: torch.Tensor, offsets: torch.Tensor, n: int, stride: int) -> torch.Tensor:
    """Sample point by point as tutorials do: meshgrid's "xy" read as rows and columns, both neighbours clamped."""
    batch, channels, height, width = x.shape
    h, w = offsets.shape[-2:]
    out = torch.zeros(batch, channels, h * n, w, dtype=x.dtype)
    side = round(n**0.5)
    rows, columns = (g.flatten().tolist() for g in torch.meshgrid(torch.arange(h), torch.arange(w), indexing="xy"))
    full = torch.meshgrid(torch.arange(n // side), torch.arange(side), indexing="xy")
    starts = list(zip(*(g.flatten().tolist() for g in full), strict=True)) + [(n // side, k) for k in range(n % side)]

    def between(position: float, size: int) -> list[tuple[int, float]]:
        first, second = (min(max(math.floor(position) + k, 0), size - 1) for k in (0, 1))
        position = min(max(position, 0), size - 1)
        return [(first, 1 + (first - position)), (second, 1 - (second - position))]

    for b in range(batch):
        for i in range(h):
            for j in range(w):
                for k, (row, column) in enumerate(starts):
                    r = rows[i * w + j] * stride + row + float(offsets[b, k, i, j])
                    c = columns[i * w + j] * stride + column + float(offsets[b, n + k, i, j])
                    for y, above in between(r, height):
                        for z, before in between(c, width):
                            out[b, :, i * n + k, j] += above * before * x[b, :, y, z]
    return out


NAIVE = {"paper": naive_akconv_samples, "tutorial": naive_tutorial_samples}


@pytest.mark.parametrize("sampling", NAIVE)
@pytest.mark.parametrize("n", [1, 2, 3, 5, 7, 9])
@pytest.mark.parametrize(("stride", "size"), [(1, (5, 7)), (2, (6, 9)), (2, (1, 4)), (1, (4, 4))])
def test_akconv_samples_equal_a_naive_loop(n, stride, size, sampling):
    block = AKConv(3, 4, 3, stride, n, sampling).double()
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    h, w = block.p_conv(x).shape[-2:]
    offsets = torch.randn(2, 2 * n, h, w, dtype=torch.float64) * 3  # well beyond the borders
    expected = NAIVE[sampling](x, offsets, n, stride)
    torch.testing.assert_close(block.sample(x, offsets), expected, atol=1e-9, rtol=0)
    assert block(x).shape == (2, 4, h, w)


def test_akconv_s_tutorial_sampling_transposes_and_doubles():
    """Without offsets a square map comes out transposed, and its last row and column count twice."""
    block = AKConv(1, 1, n=1, sampling="tutorial")
    x = torch.arange(1.0, 10).view(1, 1, 3, 3)
    twice = torch.tensor([1.0, 1, 2])
    assert torch.equal(block.sample(x, torch.zeros(1, 2, 3, 3))[0, 0], (x[0, 0] * twice * twice[:, None]).T)
    with pytest.raises(DetkitError, match="akconv: sampling must be one of paper, tutorial, not 'xy'"):
        AKConv(1, 1, sampling="xy")


@pytest.mark.parametrize("sampling", NAIVE)
@pytest.mark.parametrize("stride", [1, 2])
def test_akconv_gradients_are_those_of_finite_differences(stride, sampling):
    block = AKConv(2, 2, 3, stride, 5, sampling).double()
    x = torch.randn(2, 2, 4, 6, dtype=torch.float64, requires_grad=True)
    h, w = block.p_conv(x).shape[-2:]
    offsets = (torch.randn(2, 10, h, w, dtype=torch.float64) * 2).requires_grad_()
    assert torch.autograd.gradcheck(block.sample, (x, offsets))


def test_akconv_with_broken_offsets_samples_nan():
    block = AKConv(1, 1, n=1)
    offsets = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0]).view(1, 1, 1, 4).expand(1, 2, 1, 4)
    sampled = block.sample(torch.arange(4.0).view(1, 1, 1, 4), offsets)[0, 0, 0]
    assert sampled[0].isnan()
    assert sampled[1:].tolist() == [3, 0, 3]


def test_akconv_grid_and_precision():
    assert base_grid(5).tolist() == [[0, 0], [0, 1], [1, 0], [1, 1], [2, 0]]
    block = AKConv(1, 1, n=1)
    x = torch.arange(400.0).view(1, 1, 1, 400)
    offsets = torch.full((1, 2, 1, 400), 0.03)
    with torch.autocast("cpu", torch.bfloat16):
        sampled = block.sample(x, offsets)
    assert float(sampled[0, 0, 0, 159]) == pytest.approx(159.03, abs=1e-3)


def test_akconv_offsets_learn_at_a_tenth_of_the_rate():
    detector = detkit.create_model("yolov8n", num_classes=3, overrides=["backbone.downsample=akconv"])
    groups = parameter_groups(detector, 5e-4)
    slow = [p for g in groups if g["lr_factor"] == 0.1 for p in g["params"]]
    assert {id(p) for p in slow} == {
        id(p) for m in detector.modules() if isinstance(m, AKConv) for p in m.p_conv.parameters()
    }
    assert len(slow) == 8


@pytest.mark.parametrize("size", [(3, 4), (6, 8), (4, 3), (1, 1)])
def test_pooling_by_windows_is_adaptive_pooling(size):
    """Whether the windows divide the map or not; equal ones have gradients that repeat on a GPU."""
    x = torch.randn(2, 5, 6, 8, requires_grad=True)
    expected = torch.nn.functional.adaptive_avg_pool2d(x, size)
    weights = torch.randn_like(expected)
    found = _pool(x, size)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad((y * weights).sum(), x)[0] for y in (found, expected)]
    torch.testing.assert_close(*gradients)
