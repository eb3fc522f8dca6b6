"""Detectors that tutorials make by exchanging layers of YOLO's lists: recognised, imported exactly, or refused."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import detkit
from detkit.config import compose_config, resolve
from detkit.errors import DetkitError
from detkit.tasks.import_weights import make_checkpoint
from detkit.weights.identify import identify
from detkit.weights.source import Source
from tests.test_weights import V5, V8, foreign, imported, on_meta, randomised, save_and_forget

NECK = {
    "neck.context": "model.1",
    "neck.top_down.0": "model.4",
    "neck.top_down.1": "model.7",
    "neck.downs.0": "model.8",
    "neck.bottom_up.0": "model.10",
    "neck.downs.1": "model.11",
    "neck.bottom_up.1": "model.13",
    "head.box_branches": "model.14.cv2",
    "head.cls_branches": "model.14.cv3",
    "head.bins": "model.14.dfl.conv.weight",
}
REVCOL = NECK | {"backbone": "model.0"}


def mobilenetv2() -> dict[str, str]:
    """The tutorial names the convolutions of a block, torchvision counts its layers."""
    table = NECK | {"backbone.features.0.0": "model.0.model.0.conv", "backbone.features.0.1": "model.0.model.0.bn"}
    for k in range(1, 18):
        new, old = f"backbone.features.{k}.conv", f"model.0.model.{k}"
        for j, name in enumerate(["depthwise_conv"] if k == 1 else ["conv1", "depthwise_conv"]):
            table |= {f"{new}.{j}.0": f"{old}.{name}.conv", f"{new}.{j}.1": f"{old}.{name}.bn"}
        j = 1 if k == 1 else 2
        table |= {f"{new}.{j}": f"{old}.conv2.conv", f"{new}.{j + 1}": f"{old}.conv2.bn"}
    return table


def gold() -> dict[str, str]:
    table = {new: old for new, old in V8.items() if new.startswith("backbone") or new == "neck.context"}
    layers = {"low_ifm": 11, "narrow_c5": 13, "laf_p4": 14, "inject_p4": 15, "narrow_p4": 17, "laf_p3": 18}
    layers |= {"inject_p3": 19, "high_ifm": 22, "high_split": 23, "inject_n4": 26, "inject_n5": 29}
    table |= {f"neck.{name}": f"model.{k}" for name, k in layers.items()}
    for name, k in {"rep_p4": 16, "rep_p3": 20, "rep_n4": 27, "rep_n5": 30}.items():
        table |= {f"neck.{name}.0": f"model.{k}.conv1"} | {
            f"neck.{name}.{j + 1}": f"model.{k}.block.{j}" for j in range(3)
        }
    for k in range(2):
        for name in ("attn.to_q", "attn.to_k", "attn.to_v", "attn.proj.1", "mlp.fc1", "mlp.fc2"):
            step = f"transformer_blocks.{k}.{name}"
            table[f"neck.high_ifm.{step}.conv"] = f"model.22.{step}.c"
    head = {"head.box_branches": "cv2", "head.cls_branches": "cv3", "head.bins": "dfl.conv.weight"}
    return table | {new: f"model.31.{old}" for new, old in head.items()}


def tutorial_state(detector: nn.Module, table: dict[str, str]) -> dict[str, torch.Tensor]:
    """A detector's tensors as a tutorial names them."""
    state = foreign(detector.state_dict(), table)
    if table is V5:
        anchors = detector.head.anchors_la2 if not detector.head.anchors_la2.is_meta else torch.ones(3, 3, 2)
        state["model.24.anchors"] = anchors / torch.tensor([8.0, 16, 32]).view(3, 1, 1)
    return state


DYNAMIC = "backbone.downsample=[conv,dynamic_conv,dynamic_conv,dynamic_conv]"
SYSTEMS = [
    *((V8, [f"model=yolov8{scale}_{name}"]) for scale in "ns" for name in ("dynamicconv", "dynamicbnact")),
    (V8, ["model=yolov8m", DYNAMIC, "neck.downsample=[dynamic_conv,dynamic_conv]"]),
    (V8, ["model=yolov8n", "backbone.downsample=[conv,conv,conv,{name: dynamic_conv, experts: 8}]"]),
    (V8, ["model=yolov8s", "backbone.downsample=[conv,conv,akconv,{name: akconv, n: 5}]"]),
    *((REVCOL, ["model=yolov8n", f"backbone=revcol_{size}"]) for size in ("tiny", "small", "base", "large", "xlarge")),
    (REVCOL, ["model=yolov8s", "backbone=revcol_tiny"]),
    *((mobilenetv2(), [f"model=yolov8{scale}", "backbone=mobilenetv2"]) for scale in "nsl"),
    (mobilenetv2(), ["model=yolov8n", "backbone=mobilenetv2", "backbone.width=0.5"]),
    (gold(), ["model=yolov8n_gold"]),
    (gold(), ["model=yolov8s", "neck=repgd"]),
    *((V5, [f"model=yolov5{scale}_akconv"]) for scale in "nsmlx"),
    (V5, ["model=yolov5n", "backbone.block=[c3,c3,c3_akconv,{name: c3_akconv, points: 5}]"]),
]


@pytest.mark.parametrize(("table", "choices"), SYSTEMS, ids=[" ".join(choices) for _, choices in SYSTEMS])
def test_what_tutorials_make_is_recognised(table, choices):
    """Every tensor finds its place, also below the names that wrappers add."""
    state = tutorial_state(on_meta(choices, 4), table)
    for prefix in ("", "model."):
        named = {f"{prefix}{name}": tensor for name, tensor in state.items()}
        found = identify(Path("x.pt"), named)
        assert found.choices == tuple(choices)
        assert (found.num_classes, found.part, found.unused) == (4, None, ())
    cfg = resolve(compose_config("train", ["~data", *choices]))
    assert len(make_checkpoint(Path("x.pt"), Source(state), found, cfg, "").weights) == len(state)


@pytest.mark.parametrize(
    ("table", "choices"),
    [
        (V8, ["model=yolov8n_dynamicconv"]),
        (V8, ["model=yolov8n_dynamicbnact"]),
        (REVCOL, ["model=yolov8n", "backbone=revcol_tiny"]),
        (mobilenetv2(), ["model=yolov8n", "backbone=mobilenetv2"]),
        (gold(), ["model=yolov8n_gold"]),
    ],
    ids=["dynamicconv", "dynamicbnact", "revcol", "mobilenetv2", "gold"],
)
def test_a_tutorial_s_pickled_module_comes_back_as_it_was(tmp_path, monkeypatch, ultralytics, table, choices):
    detector = randomised(detkit.create_model(overrides=choices, num_classes=2))
    module = ultralytics(tutorial_state(detector, table), names=["a", "b"])
    src = save_and_forget({"model": module, "ema": None}, tmp_path / "x.pt", monkeypatch)
    imported(src, tmp_path / "x.safetensors")
    loaded, images = detkit.load(tmp_path / "x.safetensors"), torch.rand(1, 3, 64, 96)
    assert loaded.class_names == ("a", "b")
    for new, old in zip(loaded.decode(loaded(images)), detector.decode(detector(images)), strict=True):
        assert torch.equal(new, old)


def test_akconv_s_sampling_must_be_set(tmp_path, capsys, ultralytics):
    """The tutorial's tensors fit the paper's AKConv, but mean other boxes."""
    own = ["backbone.block=[c3,c3,c3,{name: c3_akconv, sampling: tutorial}]"]
    detector = randomised(detkit.create_model("yolov5n_akconv", num_classes=2, overrides=own))
    torch.save({"model": ultralytics(tutorial_state(detector, V5)), "ema": None}, tmp_path / "x.pt")
    with pytest.raises(DetkitError, match=r"add sampling=tutorial .*, or sampling=paper"):
        imported(tmp_path / "x.pt", tmp_path / "x.safetensors")
    images, outputs = torch.rand(1, 3, 64, 96), {}
    for sampling, named in (("tutorial", ()), ("paper", ("model=yolov5n_akconv",))):
        dst = tmp_path / f"{sampling}.safetensors"
        imported(tmp_path / "x.pt", dst, f"sampling={sampling}", *named)
        outputs[sampling] = detkit.load(dst)(images).reg
    assert torch.equal(outputs["tutorial"], detector(images).reg)
    assert not torch.allclose(outputs["tutorial"], outputs["paper"], atol=1e-2)
    assert "sample like the tutorials' code" in capsys.readouterr().out


def test_sampling_is_for_akconv(tmp_path):
    torch.save(detkit.create_model("yolov5n_akconv").state_dict(), tmp_path / "own.pt")  # which samples as its model
    imported(tmp_path / "own.pt", tmp_path / "own.safetensors", "model=yolov5n_akconv")
    torch.save(foreign(detkit.create_model("yolov8n").state_dict(), V8), tmp_path / "x.pt")
    with pytest.raises(DetkitError, match="sampling=paper is for files with AKConv layers"):
        imported(tmp_path / "x.pt", tmp_path / "x.safetensors", "sampling=paper")


@pytest.mark.parametrize(
    ("table", "choices"),
    [
        (V8, ["model=yolov8n"]),
        (V5, ["model=yolov5n"]),
        (mobilenetv2(), ["backbone=mobilenetv2"]),
        (gold(), ["neck=repgd"]),
    ],
    ids=["yolov8", "yolov5", "mobilenetv2", "gold"],
)
def test_a_fused_file_gives_equal_outputs(tmp_path, capsys, table, choices):
    """Batch norms folded into convolutions, and RepVGG's branches into one."""
    detector = randomised(detkit.create_model(overrides=choices, num_classes=2))
    fused = detector.fuse()
    for block in [module for module in fused.backbone.modules() if type(module) is nn.Sequential]:
        for k, (conv, norm) in enumerate(pairwise(block)):  # MobileNetV2's, which detkit leaves as they are
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                block[k], block[k + 1] = fuse_conv_bn_eval(conv, norm), nn.Identity()
    state = {name.replace("rbr_deployed", "rbr_reparam"): tensor for name, tensor in fused.state_dict().items()}
    if table is V5:
        state = foreign(state, table) | {"model.24.anchors": tutorial_state(detector, V5)["model.24.anchors"]}
    else:
        state = foreign(state, table)
    assert len(state) < len(detector.state_dict())
    torch.save(state, tmp_path / "x.pt")
    imported(tmp_path / "x.pt", tmp_path / "x.safetensors")
    loaded, images = detkit.load(tmp_path / "x.safetensors"), torch.rand(1, 3, 64, 96)
    for new, old in zip(loaded.decode(loaded(images)), fused.decode(fused(images)), strict=True):
        torch.testing.assert_close(new, old, atol=1e-4, rtol=1e-5)
    assert "had been fused" in capsys.readouterr().out
