"""RevCol, MobileNetV2, and detectors made with them: published counts, official names, gradients without memory."""

import pytest
import timm
import torch
import torchvision

import detkit
from detkit.config import group_options
from detkit.errors import DetkitError
from detkit.models.backbones.mobilenetv2 import MobileNetV2
from detkit.models.backbones.revcol import ConvNextBlock, RevCol

ALL_STRIDES = (4, 8, 16, 32)


def small_revcol(columns: int = 3, **kwargs) -> RevCol:
    return RevCol((8, 16, 24, 40), (1, 2, 2, 1), columns, out_strides=ALL_STRIDES, **{"drop_path": 0.0} | kwargs)


@pytest.mark.parametrize("settings", [{"save_memory": False}, {"keep_every": 0}, {"keep_every": 1}, {"keep_every": 2}])
def test_revcol_is_golden(golden, settings):
    g = golden("revcol_small_cfg")
    model = small_revcol(**settings)
    model.load_state_dict({k.removeprefix("state_dict/"): v for k, v in g.items() if k.startswith("state_dict/")})
    features = model(g["x0"])
    sum((f * g[f"cot{k}"]).sum() for k, f in enumerate(features)).backward()
    for k, feature in enumerate(features):
        torch.testing.assert_close(feature, g[f"out{k}"], atol=1e-4, rtol=0)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad.norm(), g[f"grad_norms/{name}"], rtol=1e-3, atol=1e-4)


def test_convnext_block_is_golden(golden):
    g = golden("revcol_convnext")
    block = ConvNextBlock(8)
    block.load_state_dict({k.removeprefix("state_dict/"): v for k, v in g.items() if k.startswith("state_dict/")})
    torch.testing.assert_close(block(g["x0"]), g["out0"], atol=1e-5, rtol=0)


def gradients(model: RevCol, x: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(3)  # what the blocks drop
    features = model(x)
    torch.manual_seed(4)
    sum((f * torch.randn_like(f)).sum() for f in features).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("keep_every", [0, 1, 3])
@pytest.mark.parametrize(("drop_path", "frozen_stem"), [(0.0, False), (0.4, False), (0.0, True)])
def test_reversible_gradients_equal_plain_ones(keep_every, drop_path, frozen_stem):
    model = small_revcol(6, drop_path=drop_path, keep_every=keep_every).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0, 0.3) if parameter.ndim < 4 or parameter.shape[0] > 1 else None
    for name, parameter in model.named_parameters():
        if name.endswith("gamma"):
            torch.nn.init.constant_(parameter, 0.3)
    model.stem.requires_grad_(not frozen_stem)
    x = torch.randn(2, 3, 64, 32, dtype=torch.float64)
    model.save_memory = False
    plain = gradients(model, x)
    model.save_memory = True
    found = gradients(model, x)
    assert found.keys() == plain.keys()
    for name in plain:
        scale = plain[name].abs().max().clamp(min=1e-6)
        assert float((found[name] - plain[name]).abs().max() / scale) < 1e-9, name


def test_float32_gradients_at_sixteen_columns_stay_within_a_thousandth():
    """The default ``keep_every``, against plain autograd."""
    model = small_revcol(16)
    for name, parameter in model.named_parameters():
        if name.endswith("gamma"):
            torch.nn.init.constant_(parameter, 0.3)
    x = torch.randn(2, 3, 64, 64)
    model.save_memory = False
    plain = gradients(model, x)
    model.save_memory = True
    found = gradients(model, x)
    errors = [float((found[n] - plain[n]).norm() / plain[n].norm().clamp(min=1e-12)) for n in plain]
    assert max(errors) < 1e-3


def saved_bytes(model: RevCol, x: torch.Tensor) -> int:
    """Bytes that autograd keeps for backward, each storage once, without parameters."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = model(x)
    del kept
    return sum(storages.values())


def test_memory_does_not_grow_with_columns():
    x = torch.randn(1, 3, 128, 128)
    two, sixteen = (saved_bytes(small_revcol(columns, keep_every=0), x) for columns in (2, 16))
    assert sixteen < 1.1 * two
    assert saved_bytes(small_revcol(16, save_memory=False), x) > 20 * sixteen


def test_alpha_of_zero_gives_finite_gradients():
    model = small_revcol(3, keep_every=1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "alpha" in name:
                parameter.zero_()
    found = gradients(model, torch.randn(1, 3, 64, 64))
    assert all(g.isfinite().all() for g in found.values())
    model.save_memory = False
    plain = gradients(model, torch.randn(1, 3, 64, 64))
    assert found.keys() == plain.keys()


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


TIMM = {"resnet18": True, "swin_tiny_patch4_window7_224": False}  # channels first


@pytest.mark.parametrize("name", TIMM)
def test_timm_s_features_are_its_own(name):
    """Stages are those of the strides asked for, channels first, of an image normalised as published."""
    detector = detkit.create_model(backbone="timm", neck="repgd", overrides=[f"backbone.model={name}"]).eval()
    body = detector.backbone.body
    x = torch.rand(1, 3, 64, 96)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    expected = [f if TIMM[name] else f.permute(0, 3, 1, 2) for f in body((x - mean) / std)]
    features = detector.backbone(x)
    assert detector.backbone.strides == (4, 8, 16, 32)
    for found, wanted, channels, stride in zip(
        features, expected, detector.backbone.out_channels, (4, 8, 16, 32), strict=True
    ):
        assert found.shape == (1, channels, 64 // stride, 96 // stride)
        torch.testing.assert_close(found, wanted)


def test_timm_s_unreachable_parameters_are_frozen():
    detector = detkit.create_model(backbone="timm", overrides=["backbone.model=hrnet_w18_small"], num_classes=3)
    out = detector(torch.rand(1, 3, 64, 96))
    (out.cls.square().mean() + out.reg.square().mean()).backward()
    assert not [n for n, p in detector.named_parameters() if p.requires_grad and p.grad is None]


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        ("vit_tiny_patch16_224", r"has features at strides \[16\], the neck asks for \[8, 16, 32\]: take one with a"),
        ("resnet19", "timm has no model 'resnet19'; did you mean 'resnet18'"),
        ("maxvit_tiny_tf_224", "does not take images of any size .height .16. must be divisible by window .7"),
    ],
)
def test_timm_models_that_cannot_be_a_backbone_say_why(model, sentence):
    with pytest.raises(DetkitError, match=sentence):
        detkit.create_model(backbone="timm", overrides=[f"backbone.model={model}"])


def test_timm_passes_pretrained_on(monkeypatch):
    asked = []

    def offline(name, pretrained=False, **kwargs):
        asked.append(pretrained)
        if pretrained:
            raise OSError("no route to host")
        return create(name, pretrained, **kwargs)

    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(DetkitError, match=r"weights of timm model 'resnet18' cannot be had .no route to host."):
        detkit.create_model(backbone="timm", overrides=["backbone.pretrained=true"])
    assert asked[-1] is True


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
