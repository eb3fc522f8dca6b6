import copy

import pytest
import torch
from torch import nn

from detkit.errors import DetkitError
from detkit.layers.conv import Conv, build_block, per_stage
from detkit.layers.csp import C3, C2f
from detkit.layers.pooling import SPPF


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("v8_c2f_n2_shortcut", lambda: C2f(12, 16, 2, True)),
        ("v5_c3_n2", lambda: C3(12, 16, 2, True)),
        ("v8_sppf", lambda: SPPF(16, 20)),
    ],
)
def test_block_is_golden(golden, name, block):
    g = golden(name)
    block = block().eval()
    block.load_state_dict({k.removeprefix("state_dict/"): v for k, v in g.items() if k.startswith("state_dict/")})
    x = g["x0"].requires_grad_()
    out = block(x)
    (out * g["cot0"]).sum().backward()
    torch.testing.assert_close(out, g["out0"], atol=1e-4, rtol=0)
    torch.testing.assert_close(x.grad, g["grad_x0"], atol=1e-4, rtol=0)
    for key, parameter in block.named_parameters():
        torch.testing.assert_close(parameter.grad, g[f"grad_params/{key}"], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("bias", [True, False])
def test_folded_convolution_is_equal(bias):
    conv = Conv(4, 6, 3, 2)
    if bias:
        conv.conv = nn.Conv2d(4, 6, 3, 2, 1)
    nn.init.uniform_(conv.bn.running_mean, -1, 1)
    nn.init.uniform_(conv.bn.running_var, 0.5, 2)
    nn.init.uniform_(conv.bn.weight, -1, 1)
    conv.eval()
    fused = copy.deepcopy(conv)
    fused.fuse()
    x = torch.randn(2, 4, 9, 7)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fused.modules())
    torch.testing.assert_close(fused(x), conv(x), atol=1e-5, rtol=1e-5)


def test_block_slots():
    assert isinstance(build_block("conv", "conv", 3, 8, 3, 2), Conv)
    assert build_block("context", {"name": "sppf", "k": 3}, 8, 8).pool.kernel_size == 3
    assert per_stage("c2f", 2, "backbone.block") == ["c2f", "c2f"]
    assert per_stage(["c2f", {"name": "c2f"}], 2, "backbone.block") == ["c2f", {"name": "c2f"}]
    with pytest.raises(DetkitError, match=r"backbone\.block lists 3 blocks: give one, or one for each of the 2 stages"):
        per_stage(["c2f"] * 3, 2, "backbone.block")


@pytest.mark.parametrize(
    ("slot", "spec", "message"),
    [
        ("csp", "c2", "unknown block 'c2': known are .*; did you mean 'c2f'"),
        ("csp", "conv", "block 'conv' does not fit a csp slot: use one of c2f, c3, c3_akconv"),
        ("conv", 5, "a conv block must be a name or a mapping {name, arguments}, not 5"),
        ("conv", {"k": 3}, "block.name is not set"),
    ],
)
def test_mistakes_in_a_slot_are_named(slot, spec, message):
    with pytest.raises(DetkitError, match=message):
        build_block(slot, spec, 8, 8)
