"""RevCol, MobileNetV2, and detectors made with them: published counts, official names, any of them with any neck."""

from functools import partial

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

import detkit
from detkit.engine.checkpoint import build_from_checkpoint, save_checkpoint
from detkit.errors import DetkitError
from detkit.models.backbones.mobilenetv2 import MobileNetV2
from detkit.models.backbones.revcol import ConvNextBlock

ALL_STRIDES = (4, 8, 16, 32)


def test_convnext_block_is_golden(golden):
    g = golden("revcol_convnext")
    block = ConvNextBlock(8)
    block.load_state_dict({k.removeprefix("state_dict/"): v for k, v in g.items() if k.startswith("state_dict/")})
    torch.testing.assert_close(block(g["x0"]), g["out0"], atol=1e-5, rtol=0)


def test_mobilenetv2_loads_torchvision_s_weights():
    reference = torchvision.models.mobilenet_v2(norm_layer=partial(nn.BatchNorm2d, eps=1e-3)).eval()  # detkit's eps
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
    for found, reference in zip(model(x), expected, strict=True):
        torch.testing.assert_close(found, reference)
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
    for found, reference, channels, stride in zip(
        features, expected, detector.backbone.out_channels, (4, 8, 16, 32), strict=True
    ):
        assert found.shape == (1, channels, 64 // stride, 96 // stride)
        torch.testing.assert_close(found, reference)


def test_timm_s_unreachable_parameters_are_frozen():
    detector = detkit.create_model(backbone="timm", overrides=["backbone.model=hrnet_w18_small"], num_classes=3)
    out = detector(torch.rand(1, 3, 64, 96))
    (out.cls.square().mean() + out.reg.square().mean()).backward()
    assert not [n for n, p in detector.named_parameters() if p.requires_grad and p.grad is None]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("vit_tiny_patch16_224", r"has features at strides \[16\], the neck takes \[8, 16, 32\]: use one with a"),
        ("resnet19", "timm has no model 'resnet19'; did you mean 'resnet18'"),
        ("maxvit_tiny_tf_224", "does not take images of any size .height .16. must be divisible by window .7"),
    ],
)
def test_timm_models_that_cannot_be_a_backbone_say_why(model, message):
    with pytest.raises(DetkitError, match=message):
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
    with pytest.raises(DetkitError, match=r"cannot download the weights of timm model 'resnet18' .no route to host."):
        detkit.create_model(backbone="timm", overrides=["backbone.pretrained=true"])
    assert asked[-1] is True


def published(name: str) -> torch.nn.Module:
    """A timm classifier with values of its own everywhere, as one that was trained has."""
    model = timm.create_model(name).eval()
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) * 0.2 - 0.1 * ("running_var" not in key))
    return model


def with_timm(name: str, *overrides: str) -> torch.nn.Module:
    return detkit.create_model(backbone="timm", overrides=[f"backbone.model={name}", *overrides]).eval()


@pytest.mark.parametrize("name", ["resnet18", "tf_efficientnet_lite0", "convnext_atto", "mobilenetv3_small_100"])
@pytest.mark.parametrize("form", ["pth", "safetensors", "other names", "no counters", "backbone only", "wrapped"])
def test_timm_s_weights_come_from_a_file(tmp_path, name, form):
    classifier = published(name)
    state, path = classifier.state_dict(), tmp_path / "x.pth"
    if form == "other names":  # in order, and with a head of another size
        state = {f"_{k}.{key.rpartition('.')[2]}": tensor for k, (key, tensor) in enumerate(state.items())}
        last, *_ = (key for key in reversed(state) if key.endswith(".bias"))
        state[last] = torch.ones(7)
    elif form == "no counters":
        state = {key: tensor for key, tensor in state.items() if not key.endswith("num_batches_tracked")}
    elif form == "backbone only":
        state = timm.create_model(name, features_only=True).state_dict()
        flat = {key.replace(".", "_"): tensor for key, tensor in classifier.state_dict().items()}
        state = {key: flat[key.replace(".", "_")] for key in state}
    elif form == "wrapped":
        state = {"state_dict": {f"backbone.{key}": tensor for key, tensor in state.items()} | {"neck.w": torch.ones(1)}}
    if form == "safetensors":
        path = tmp_path / "x.safetensors"
        save_file(state, path)
    else:
        torch.save(state, path)
    backbone = with_timm(name, f"backbone.weights={path}").backbone
    images = torch.rand(1, 3, 64, 96)
    strides = list(timm.create_model(name, features_only=True).feature_info.reduction())
    indices = [len(strides) - 1 - strides[::-1].index(stride) for stride in (8, 16, 32)]
    body = timm.create_model(
        name,
        pretrained=True,
        features_only=True,
        out_indices=indices,
        pretrained_cfg_overlay={"state_dict": classifier.state_dict()},
    ).eval()  # what timm itself makes of it
    expected = body((images - backbone.mean) / backbone.std)
    for found, reference in zip(backbone(images), expected, strict=True):
        torch.testing.assert_close(found, reference)
    assert ("in order" in backbone.loaded) == (form == "other names")
    assert str(path) in backbone.loaded


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s | {"conv1.weight": torch.ones(64, 3, 3, 3)}, r"it has 'conv1.weight' \[64, 3, 3, 3\] where"),
        (
            lambda s: {f"x.{key}_": t for key, t in s.items() if "num_b" not in key},
            r"it has 'x.conv1.weight_' .* where",
        ),
        (lambda s: {"a.weight": torch.ones(2)}, "it has 1 tensors, the model has 102"),
        (lambda s: {"a": 1}, "contains no model"),
    ],
)
def test_timm_refuses_a_file_of_another_model(tmp_path, change, message):
    torch.save(change(timm.create_model("resnet18").state_dict()), tmp_path / "x.pth")
    with pytest.raises(DetkitError, match=message):
        with_timm("resnet18", f"backbone.weights={tmp_path / 'x.pth'}")


def test_timm_wants_one_origin_of_weights(tmp_path):
    with pytest.raises(DetkitError, match=r"backbone.weights=.*none.pth does not exist"):
        with_timm("resnet18", f"backbone.weights={tmp_path / 'none.pth'}")
    with pytest.raises(DetkitError, match="exclude each other"):
        with_timm("resnet18", "backbone.weights=x.pth", "backbone.pretrained=true")


def test_a_checkpoint_needs_the_file_of_weights_no_more(tmp_path):
    path = tmp_path / "x.pth"
    torch.save(published("resnet18").state_dict(), path)
    detector = with_timm("resnet18", f"backbone.weights={path}")
    save_checkpoint(detector, tmp_path / "x.safetensors", {})
    path.unlink()
    images = torch.rand(1, 3, 64, 64)
    assert torch.equal(build_from_checkpoint(tmp_path / "x.safetensors")(images).cls, detector(images).cls)
    with pytest.raises(DetkitError, match="is a checkpoint of detkit already: start from it with weights="):
        with_timm("resnet18", f"backbone.weights={tmp_path / 'x.safetensors'}")


BARE = {"tiny": 29_942_144, "small": 60_054_400, "base": 138_038_256, "large": 272_068_352, "xlarge": 832_010_816}


@pytest.mark.parametrize("size", BARE)
def test_bare_revcol_counts(size):
    with torch.device("meta"):
        detector = detkit.create_model(backbone=f"revcol_{size}")
    assert sum(p.numel() for p in detector.backbone.parameters()) == BARE[size]
