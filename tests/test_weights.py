"""Other projects' checkpoints: recognised by their tensors, imported exactly, refused where they differ."""

import sys
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

import detkit
from detkit import cli
from detkit.config import compose_config, group_options, resolve
from detkit.engine.checkpoint import build_from_checkpoint, read_checkpoint, save_checkpoint
from detkit.errors import DetkitError
from detkit.models.backbones.revcol import RevCol
from detkit.models.detector import build_detector
from detkit.registry import BACKBONES
from detkit.tasks import load_config
from detkit.tasks.import_weights import make_checkpoint
from detkit.tasks.import_weights import run as import_weights
from detkit.weights.identify import identify
from detkit.weights.source import Source

# detkit's names of the layers of a flat list, in its order; what has no parameters is not there.
BACKBONE = ["stem", *(f"stages.{k}.{j}" for k in range(4) for j in range(2))]
V8 = {
    **{f"backbone.{name}": f"model.{k}" for k, name in enumerate(BACKBONE)},
    "neck.context": "model.9",
    "neck.top_down.0": "model.12",
    "neck.top_down.1": "model.15",
    "neck.downs.0": "model.16",
    "neck.bottom_up.0": "model.18",
    "neck.downs.1": "model.19",
    "neck.bottom_up.1": "model.21",
    "head.box_branches": "model.22.cv2",
    "head.cls_branches": "model.22.cv3",
    "head.bins": "model.22.dfl.conv.weight",
}
V5_BODY = {
    **{f"backbone.{name}": f"model.{k}" for k, name in enumerate(BACKBONE)},
    "neck.context": "model.9",
    "neck.laterals.0": "model.10",
    "neck.top_down.0": "model.13",
    "neck.laterals.1": "model.14",
    "neck.top_down.1": "model.17",
    "neck.downs.0": "model.18",
    "neck.bottom_up.0": "model.20",
    "neck.downs.1": "model.21",
    "neck.bottom_up.1": "model.23",
}
V5U = V5_BODY | {
    "head.box_branches": "model.24.cv2",
    "head.cls_branches": "model.24.cv3",
    "head.bins": "model.24.dfl.conv.weight",
}
V5 = V5_BODY | {"head.predictions": "model.24.m"}


def foreign(state: dict[str, torch.Tensor], table: dict[str, str]) -> dict[str, torch.Tensor]:
    """Give detkit's tensors the names that ``table`` has for the prefixes of their names."""
    out = {}
    for name, tensor in state.items():
        if name == "head.anchors_la2":
            continue  # YOLOv5 holds them in cells, as model.24.anchors
        prefix = next(b for b in sorted(table, key=len, reverse=True) if name == b or name.startswith(f"{b}."))
        out[table[prefix] + name.removeprefix(prefix)] = tensor.view(1, -1, 1, 1) if name == "head.bins" else tensor
    return out


def randomised(detector: nn.Module) -> nn.Module:
    """Give every tensor values of its own, batch norms' statistics too."""
    with torch.no_grad():
        for name, tensor in detector.state_dict().items():
            if name != "head.bins" and tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) * 0.2 + ("running_var" in name))
    return detector.eval()


def save_and_forget(content, path: Path, monkeypatch) -> Path:
    """Save, then unlearn the foreign classes."""
    torch.save(content, path)
    for name in [name for name in sys.modules if name.startswith("ultralytics")]:
        monkeypatch.delitem(sys.modules, name)
    return path


def imported(src: Path, dst: Path, *overrides: str):
    """What ``detkit import_weights src=... dst=...`` does."""
    return import_weights(load_config("import_weights", [f"src={src}", f"dst={dst}", *overrides]))


def test_an_ultralytics_yolov8_comes_back_as_it_was(tmp_path, monkeypatch, ultralytics):
    detector = randomised(detkit.create_model("yolov8n", num_classes=3))
    names = {0: "RBC", 1: "WBC", 2: "Platelets"}
    ema = ultralytics(foreign(detector.state_dict(), V8), names=names)
    content = {"epoch": -1, "model": nn.Linear(2, 2), "ema": ema, "train_args": {"imgsz": 320}, "optimizer": None}
    src = save_and_forget(content, tmp_path / "yolov8n.pt", monkeypatch)
    imported(src, tmp_path / "new.safetensors")

    loaded = detkit.load(tmp_path / "new.safetensors")
    assert "ultralytics" not in sys.modules
    assert loaded.class_names == ("RBC", "WBC", "Platelets")
    assert (loaded.cfg["model"]["name"], loaded.cfg["image_size"]) == ("yolov8n", 320)
    images = torch.rand(1, 3, 64, 96)
    for result, reference in zip(loaded.decode(loaded(images)), detector.decode(detector(images)), strict=True):
        assert torch.equal(result, reference)


def test_half_precision_becomes_float32(tmp_path, ultralytics):
    state = randomised(detkit.create_model("yolov8n", num_classes=1)).state_dict()
    torch.save({"model": ultralytics(foreign(state, V8)).half()}, tmp_path / "x.pt")
    weights = imported(tmp_path / "x.pt", tmp_path / "x.safetensors").weights
    for name, tensor in state.items():
        reference = tensor.half().float() if tensor.is_floating_point() else tensor
        assert torch.equal(weights[name], reference), name
        assert weights[name].dtype == reference.dtype


@pytest.mark.parametrize(
    "names",
    [
        *(None, ["a", "b"], ["a", " ", "c"], ["a", "a ", "c"], {5: "a"}),
        *({0: "a", 1: "a", 2: "c"}, {0: "a", 1: "\x1b[2J", 2: "c"}),
    ],
)
def test_names_that_do_not_fit_are_replaced_with_a_warning(tmp_path, ultralytics, capsys, names):
    state = detkit.create_model("yolov8n", num_classes=3).state_dict()
    content = {"model": ultralytics(foreign(state, V8), names=names), "train_args": {"imgsz": 333}}
    torch.save(content, tmp_path / "x.pt")
    checkpoint = imported(tmp_path / "x.pt", tmp_path / "x.safetensors")
    assert checkpoint.class_names == ("class0", "class1", "class2")
    assert "class names are missing or incomplete" in capsys.readouterr().out
    assert checkpoint.cfg["image_size"] == 640


def test_yolov5_brings_its_anchors(tmp_path, ultralytics):
    """Those of release 7 are stored in cells."""
    anchors = {8: [12, 15, 20, 30, 40, 50], 16: [31, 62, 63, 46, 60, 120], 32: [117, 91, 157, 199, 374, 327]}
    detector = detkit.create_model("yolov5n", num_classes=2, overrides=[f"head.anchors={anchors}".replace(" ", "")])
    randomised(detector)
    pixels = torch.tensor([anchors[stride] for stride in anchors], dtype=torch.float32).view(3, 3, 2)
    detector.head.anchors_la2.copy_(pixels)
    cells = pixels / torch.tensor([8, 16, 32]).view(3, 1, 1)
    state = foreign(detector.state_dict(), V5) | {"model.24.anchors": cells}
    torch.save({"model": ultralytics(state, names=["a", "b"]), "ema": None}, tmp_path / "x.pt")
    imported(tmp_path / "x.pt", tmp_path / "x.safetensors")
    loaded = detkit.load(tmp_path / "x.safetensors")
    assert loaded.class_names == ("a", "b")
    images = torch.rand(1, 3, 64, 96)
    for result, reference in zip(loaded.decode(loaded(images)), detector.decode(detector(images)), strict=True):
        assert torch.equal(result, reference)


def on_meta(overrides: list[str], num_classes: int) -> nn.Module:
    cfg = resolve(compose_config("train", ["~data", *overrides]))
    with torch.device("meta"):
        return build_detector(cfg, [f"class{k}" for k in range(num_classes)])


@pytest.mark.parametrize("scale", "nsmlx")
@pytest.mark.parametrize(
    ("table", "choices"),
    [(V8, ["model=yolov8{}"]), (V5U, ["model=yolov5{}", "head=yolov8"]), (V5, ["model=yolov5{}"])],
    ids=["yolov8", "yolov5u", "yolov5"],
)
def test_every_scale_is_recognised(table, choices, scale):
    choices = [choice.format(scale) for choice in choices]
    state = foreign(on_meta(choices, 7).state_dict(), table)
    if table is V5:
        state["model.24.anchors"] = torch.ones(3, 3, 2)
    found = identify(Path("x.pt"), state)
    assert found.choices == tuple(choices)
    assert (found.num_classes, found.part, found.unused) == (7, None, ())
    cfg = resolve(compose_config("train", ["~data", *choices]))
    checkpoint = make_checkpoint(Path("x.pt"), Source(state, None, None), found, cfg, "")
    assert len(checkpoint.weights) == len(state)  # YOLOv5's anchors among them
    assert checkpoint.class_names[-1] == "class6"


@pytest.mark.parametrize("prefix", ["", "backbone."])
@pytest.mark.parametrize("name", [name for name in group_options("backbone") if name.startswith("revcol")])
def test_every_revcol_is_recognised(name, prefix):
    """ImageNet checkpoints have a classifier beside it, mmdet's a neck and heads."""
    cfg = resolve(compose_config("train", ["~data", f"backbone={name}"]))
    with torch.device("meta"):
        own = BACKBONES.build(cfg["backbone"]).state_dict()
        state = {f"{prefix}{key}": tensor for key, tensor in own.items()}
        state |= {"cls.weight": torch.ones(1), "neck.convs.0.weight": torch.ones(1), "rpn_head.bias": torch.ones(1)}
    found = identify(Path("x.pth"), state)
    assert (found.choices, found.part) == ((f"backbone={name}",), "backbone")
    assert found.unused == ("cls.weight", "neck.convs.0.weight", "rpn_head.bias")
    weights = make_checkpoint(Path("x.pth"), Source(state, None, None), found, cfg, "").weights
    assert weights.keys() == {f"backbone.{key}" for key in own}


MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def normalised(images):
    """What the official weights were trained with."""
    return (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def test_revcol_comes_back_as_it_was(tmp_path):
    """From mmdet's layout and the legacy format, into a detector and its outputs."""
    official = RevCol()
    for parameter in official.parameters():
        nn.init.normal_(parameter, 0, 0.05)
    content = {
        "meta": {"CLASSES": ("a", "b"), "epoch": 12},
        "state_dict": {f"backbone.{key}": tensor for key, tensor in official.state_dict().items()}
        | {"rpn_head.bias": torch.ones(3)},
    }
    torch.save(content, tmp_path / "x.pth", _use_new_zipfile_serialization=False)
    imported(tmp_path / "x.pth", tmp_path / "x.safetensors")
    detector = detkit.create_model("yolov8n", backbone="revcol_tiny", weights=tmp_path / "x.safetensors").eval()
    images = torch.rand(1, 3, 64, 64)
    for result, reference in zip(detector.backbone(images), official.eval()(normalised(images)), strict=True):
        torch.testing.assert_close(result, reference, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("width", [1.0, 0.5])
def test_torchvision_s_mobilenetv2_comes_back_as_it_was(tmp_path, width):
    official = randomised(torchvision.models.mobilenet_v2(width_mult=width))
    torch.save(official.state_dict(), tmp_path / "x.pth")
    checkpoint = imported(tmp_path / "x.pth", tmp_path / "x.safetensors")
    assert checkpoint.cfg["backbone"] == {"name": "mobilenetv2", "width": width}
    overrides = [f"backbone.width={width}"]
    model = detkit.create_model(backbone="mobilenetv2", weights=tmp_path / "x.safetensors", overrides=overrides)
    backbone = model.eval().backbone
    x = images = torch.rand(1, 3, 64, 64)
    first, expected = backbone.features[0](images), official.features[0](normalised(images))
    torch.testing.assert_close(first[..., 1:, 1:], expected[..., 1:, 1:])  # but for the pixels that see padding
    x = first
    for layer in official.features[1:18]:
        x = layer(x)
    torch.testing.assert_close(backbone(images)[-1], x, atol=1e-4, rtol=1e-4)  # with detkit's own eps


@pytest.mark.parametrize("name", ["mobilenetv2_100", "mobilenetv2_050"])
def test_timm_s_mobilenetv2_comes_back_as_it_was(tmp_path, name):
    official = randomised(timm.create_model(name, pretrained=False))
    save_file(official.state_dict(), tmp_path / "model.safetensors")  # as on the Hugging Face hub
    checkpoint = imported(tmp_path / "model.safetensors", tmp_path / "x.safetensors")
    overrides = [f"backbone.width={checkpoint.cfg['backbone']['width']}"]
    model = detkit.create_model(
        backbone="mobilenetv2", neck="repgd", weights=tmp_path / "x.safetensors", overrides=overrides
    )
    backbone = model.eval().backbone
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    images = torch.rand(1, 3, 64, 64)
    official.conv_stem.weight.data /= std  # its own first layer made to take plain images, too
    official.bn1.running_mean += (official.conv_stem.weight * mean).sum((1, 2, 3)).detach()
    reference = official.forward_intermediates(images, intermediates_only=True)[-4:]
    for feature, other in zip(backbone(images), reference, strict=True):
        torch.testing.assert_close(feature, other, atol=1e-4, rtol=1e-4)


def test_a_head_of_too_many_classes_is_refused():
    state = foreign(detkit.create_model("yolov8n", num_classes=2).state_dict(), V8)
    last = next(name for name in state if name.endswith("cv3.0.2.bias"))
    state[last] = torch.zeros(50_000, dtype=torch.uint8)
    found = identify(Path("x.pt"), state)
    cfg = resolve(compose_config("train", ["~data", *found.choices]))
    with pytest.raises(DetkitError, match="claims 50,000 classes"):
        make_checkpoint(Path("x.pt"), Source(state, None, None), found, cfg, "")


def test_yolov5_s_anchors_come_along(tmp_path):
    """Also into a detector whose config has others."""
    anchors = {4: [1, 1, 2, 2, 3, 3], 8: [9, 9, 8, 8, 7, 7], 16: [20, 20, 30, 30, 40, 40], 32: [90, 90, 80, 80, 70, 70]}
    trained = detkit.create_model("yolov5n", num_classes=2, overrides=[f"head.anchors={anchors}"])
    save_checkpoint(trained, tmp_path / "x.safetensors", {})
    model = detkit.create_model("yolov5n", num_classes=2, weights=tmp_path / "x.safetensors")
    assert model.head.anchors_la2[0].tolist() == [[9, 9], [8, 8], [7, 7]]


def test_a_backbone_starts_a_training_and_is_no_detector(tmp_path):
    torch.save(torchvision.models.mobilenet_v2().state_dict(), tmp_path / "x.pth")
    path = tmp_path / "x.safetensors"
    assert imported(tmp_path / "x.pth", path, "backbone=mobilenetv2").part == "backbone"
    assert read_checkpoint(path).part == "backbone"
    report = detkit.load_weights(detkit.create_model("yolov8n", backbone="mobilenetv2"), path)
    backbone, neck, head = report.rows
    assert backbone.loaded == backbone.parameters > 0
    assert (neck.missing, head.missing) == (neck.parameters, head.parameters)
    with pytest.raises(DetkitError, match=r"holds only a backbone, not a detector: .* weights="):
        build_from_checkpoint(path)


def test_what_the_user_names_is_insisted_on(tmp_path):
    state = foreign(detkit.create_model("yolov8n", num_classes=2).state_dict(), V8)
    src, dst = tmp_path / "x.pt", tmp_path / "x.safetensors"
    torch.save(state, src)
    with pytest.raises(
        DetkitError, match=r"is YOLOv8, but does not match model=yolov8s: .*; its tensors are those of model=yolov8n"
    ):
        imported(src, dst, "model=yolov8s")
    with pytest.raises(DetkitError, match="name it with model=NAME, not by its backbone"):
        imported(src, dst, "backbone=mobilenetv2")
    assert not dst.exists()
    assert imported(src, dst, "model=yolov8n").class_names == ("class0", "class1")


def test_detkit_s_own_are_imported_too(tmp_path):
    detector = detkit.create_model("yolov8n", num_classes=2)
    save_checkpoint(detector, tmp_path / "own.safetensors", {"AP": 0.5})
    assert imported(tmp_path / "own.safetensors", tmp_path / "copy.safetensors").metrics == {"AP": 0.5}
    assert (tmp_path / "own.safetensors").read_bytes() == (tmp_path / "copy.safetensors").read_bytes()
    torch.save(detector.state_dict(), tmp_path / "own.pt")
    with pytest.raises(DetkitError, match="is a detector of detkit, but its size is ambiguous: add model="):
        imported(tmp_path / "own.pt", tmp_path / "x.safetensors")
    weights = imported(tmp_path / "own.pt", tmp_path / "x.safetensors", "model=yolov8n").weights
    assert torch.equal(weights["head.bins"], detector.head.bins)


def without(state: dict, name: str) -> dict:
    return {key: value for key, value in state.items() if key != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: without(s, "model.4.cv1.conv.weight"), r"its 'backbone.stages.1.1.cv1.conv.weight' is missing"),
        (lambda s: s | {"model.9.cv1.bn.bias": torch.ones(3)}, r"has the shape \[3\] instead of \[128\]"),
        (
            lambda s: s | {"model.22.proto.cv1.conv.weight": torch.ones(3)},
            "'model.22.proto.cv1.conv.weight' is unexpected",
        ),
        (lambda s: s | {"model.0.conv.weight": torch.ones(24, 3, 3, 3)}, "its size is ambiguous"),
        (lambda s: {"fc.weight": torch.ones(2, 2)}, r"contains no model that detkit can import \(found 'fc.weight'\)"),
    ],
)
def test_another_model_is_refused_in_one_message(tmp_path, change, message):
    state = foreign(detkit.create_model("yolov8n", num_classes=2).state_dict(), V8)
    torch.save(change(state), tmp_path / "x.pt")
    with pytest.raises(DetkitError, match=message):
        imported(tmp_path / "x.pt", tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()


@pytest.mark.parametrize(
    "value", [None, torch.tensor(1.0), torch.ones(0), torch.ones(2), torch.full((3, 3, 2), torch.inf)]
)
@pytest.mark.parametrize("table", [V8, V5], ids=["yolov8", "yolov5"])
def test_tensors_of_any_shape_are_no_fault(table, value):
    """Whichever tensor is missing or misshapen."""
    state = foreign(on_meta(["model=yolov8n" if table is V8 else "model=yolov5n"], 3).state_dict(), table)
    if table is V5:
        state["model.24.anchors"] = torch.ones(3, 3, 2)
    cfg = resolve(compose_config("train", ["~data", "model=yolov8n" if table is V8 else "model=yolov5n"]))
    head = [name for name in state if name.startswith(("model.22.", "model.24.")) and not name.endswith("tracked")]
    for name in ("model.0.conv.weight", "model.9.cv1.bn.bias", *head[:8], *head[-4:]):
        with pytest.raises(DetkitError):
            changed = without(state, name) if value is None else state | {name: value}
            found = identify(Path("x.pt"), changed)
            make_checkpoint(Path("x.pt"), Source(changed, None, None), found, cfg, "model=x")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["import_weights", "dst=x.safetensors"], "src is not set: add src=VALUE"),
        (["import_weights", "src=none.pt", "dst=x.safetensors"], "src=none.pt does not exist"),
        (["import_weights", "src=.", "dst=x.safetensors"], "src=. is a folder: name the file in it"),
        (["import_weights", "src=a.pt", "dst=x.pt"], "dst=x.pt must end in .safetensors"),
        (["import_weights", "src=a.pt", "dst=no/x.safetensors"], "the folder no does not exist"),
        (["import_weights", "src=a.pt", "dst=taken.safetensors"], "dst=taken.safetensors already exists"),
        (["import_weights", "src=a.pt", "dst=x.safetensors"], "a.pt is not a checkpoint"),
        (["import_weights", "src=a.pt", "dst=x.safetensors", "model=yolov9"], "model=yolov9 does not exist"),
        (["import_weights", "src=taken.safetensors", "dst=x.safetensors"], "is not a safetensors file"),
        (["eval", "ckpt=a.pt"], "detkit import_weights src=a.pt dst=a.safetensors"),
    ],
)
def test_a_mistake_is_one_message(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("taken.safetensors").touch()
    Path("a.pt").write_text("text")
    monkeypatch.setattr(sys, "argv", ["detkit", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len(error.splitlines()) == 1
    assert not Path("x.safetensors").exists()
