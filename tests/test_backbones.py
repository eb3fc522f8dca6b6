"""RevCol, MobileNetV2, and detectors made with them: published counts, official names, any of them with any neck."""

import pytest
import torch
import torchvision

import detkit
from detkit.config import group_options
from detkit.models.backbones.mobilenetv2 import MobileNetV2
from detkit.models.backbones.revcol import ConvNextBlock

ALL_STRIDES = (4, 8, 16, 32)


def test_convnext_block_is_golden(golden):
    g = golden("revcol_convnext")
    block = ConvNextBlock(8)
    block.load_state_dict({k.removeprefix("state_dict/"): v for k, v in g.items() if k.startswith("state_dict/")})
    torch.testing.assert_close(block(g["x0"]), g["out0"], atol=1e-5, rtol=0)


def test_mobilenetv2_loads_torchvision_s_weights():
    reference = torchvision.models.mobilenet_v2().eval()
    model = MobileNetV2(out_strides=ALL_STRIDES).eval()
    weights = {
        k: v for k, v in reference.state_dict().items() if k.startswith("features.") and int(k.split(".")[1]) < 18
    }
    model.load_state_dict(weights)
    x = torch.randn(2, 3, 64, 96)
    expected = []
    y = x
    for k, layer in enumerate(reference.features[:18]):
        y = layer(y)
        if k in (3, 6, 13, 17):
            expected.append(y)
    for found, wanted in zip(model(x), expected, strict=True):
        torch.testing.assert_close(found, wanted)
    assert sum(p.numel() for p in model.parameters()) == 1_811_712


BARE = {"tiny": 29_942_144, "small": 60_054_400, "base": 138_038_256, "large": 272_068_352, "xlarge": 832_010_816}


@pytest.mark.parametrize("size", BARE)
def test_bare_revcol_counts(size):
    with torch.device("meta"):
        detector = detkit.create_model(backbone=f"revcol_{size}")
    assert sum(p.numel() for p in detector.backbone.parameters()) == BARE[size]


@pytest.mark.parametrize("neck", group_options("neck"))
@pytest.mark.parametrize("backbone", ["csp_darknet", "mobilenetv2", "revcol_tiny"])
def test_any_backbone_with_any_neck_learns(backbone, neck):
    """At 64x96, batches of 1: every parameter gets a gradient, the fused detector says the same."""
    small = ["backbone.columns=2"] if backbone.startswith("revcol") else []
    detector = detkit.create_model(backbone=backbone, neck=neck, num_classes=3, overrides=small)
    out = detector(torch.rand(1, 3, 64, 96))
    (out.cls.square().mean() + out.reg.square().mean()).backward()
    assert not [n for n, p in detector.named_parameters() if p.requires_grad and p.grad is None]
    detector.eval()
    x = torch.rand(1, 3, 64, 96)
    with torch.inference_mode():
        expected, found = detector.decode(detector(x)), detector.fuse().decode(detector.fuse()(x))
    torch.testing.assert_close(found[1], expected[1], atol=1e-4, rtol=1e-3)
