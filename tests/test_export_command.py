"""``detkit export``, and running what it writes."""

import importlib.util
import json
import re
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import detkit
from detkit.config import compose_config, resolve
from detkit.engine.checkpoint import save_checkpoint
from detkit.errors import DetkitError
from detkit.export.metadata import Metadata, parse_metadata
from detkit.export.packages import need
from detkit.export.pt2_check import check_archive, is_arithmetic_on_sizes
from detkit.export.runtime import load_model
from detkit.inference.predictor import make_predictor
from detkit.inference.sources import open_source
from detkit.models.detector import build_detector
from detkit.registry import BACKBONES
from detkit.tasks import load_config
from detkit.tasks.eval import run as run_eval
from detkit.tasks.export import run as run_export
from tests.conftest import run_command

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[1]


def run_process(*arguments: str) -> None:
    """Run ``detkit ARGUMENTS`` in a process of its own."""
    subprocess.run([sys.executable, "-c", "from detkit.cli import main; main()", *arguments], check=True, timeout=300)


def export(ckpt: Path, dst: Path, *overrides: str) -> dict:
    return run_export(load_config("export", [f"ckpt={ckpt}", f"dst={dst}", "max_images=4", "workers=0", *overrides]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("exported")


@pytest.fixture(scope="module")
def onnx_file(checkpoint, folder):
    """With NMS inside."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    path = folder / "model.onnx"
    if not path.exists():
        export(checkpoint, path, "score=0.02", "iou=0.5", "max_det=50")
    return path


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    pixels = np.random.default_rng(0).integers(0, 256, (3, 5, 3), np.uint8)
    Image.fromarray(pixels).resize((150, 90)).save(path)
    return path


def predict(ckpt: Path, photo: Path, score: float = 0.02, **options):
    predictor = make_predictor(load_model(ckpt, CPU, "off"), score, 0.5, 50, **options)
    ((_, found),) = predictor.run(open_source(photo))
    return found


def assert_same(found, expected):
    assert len(found) == len(expected) > 0
    torch.testing.assert_close(found.boxes, expected.boxes, atol=0.05, rtol=0)
    torch.testing.assert_close(found.scores, expected.scores, atol=1e-4, rtol=0)
    assert torch.equal(found.labels, expected.labels)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"rect": True}, {"score": 0.05, "classes": [0, 1, 2, 3]}, {"tiles": 64}])
def test_a_file_with_nms_inside_predicts_as_its_checkpoint(onnx_file, checkpoint, photo, options):
    found = predict(onnx_file, photo, **options)
    assert_same(found, predict(checkpoint, photo, **options))
    assert found.class_names == detkit.load(checkpoint).class_names


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"score": 0.01}, {"multi_label": True}, {"class_agnostic": True}])
def test_other_thresholds_than_those_inside_are_refused(onnx_file, photo, options):
    with pytest.raises(DetkitError, match="nms=false"):
        predict(onnx_file, photo, **options)


@pytest.mark.slow
def test_the_example_of_the_readme_predicts_the_same(onnx_file, photo, tmp_path):
    (code,) = re.findall(
        r"^```python\n(# needs a file of detkit export.*?)^```", (ROOT / "tools/README.md").read_text(), re.M | re.S
    )
    (tmp_path / "detect.py").write_text(code)
    spec = importlib.util.spec_from_file_location("detect", tmp_path / "detect.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    image = np.asarray(Image.open(photo))
    found, again = module.Detector(str(onnx_file))([image, np.ascontiguousarray(image[:40])])
    expected = predict(onnx_file, photo)
    assert len(expected) > 0
    np.testing.assert_allclose(found[0], expected.boxes, atol=0.01)
    np.testing.assert_allclose(found[1], expected.scores, atol=1e-5)
    assert found[2].tolist() == expected.labels.tolist()
    assert len(again[0]) == len(again[1])


@pytest.mark.slow
def test_openvino_predicts_as_the_checkpoint(checkpoint, tmp_path, photo):
    """In processes of their own: imported into pytest's, OpenVINO closes the file that output is captured in."""
    for package in ("openvino", "onnxscript"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    path, limits = tmp_path / "as_openvino", ("score=0.02", "iou=0.5", "max_det=50")
    run_process("export", f"ckpt={checkpoint}", f"dst={path}", "format=openvino", "max_images=4", "workers=0", *limits)
    expected = predict(checkpoint, photo, rect=True)
    for k, file in enumerate((path, path / "model.xml")):
        out = tmp_path / f"out{k}"
        keys = ("rect=true", "save=none", "amp=off", f"run_dir={out}", *limits)
        run_process("predict", f"ckpt={file}", f"source={photo}", *keys)
        (record,) = json.loads((out / "predictions.json").read_text())
        boxes, scores, labels = ([d[key] for d in record["detections"]] for key in ("box", "score", "label"))
        found = replace(expected, boxes=torch.tensor(boxes), scores=torch.tensor(scores), labels=torch.tensor(labels))
        assert_same(found, expected)


@pytest.mark.slow
def test_int8_measures_ap_before_and_after(checkpoint, folder):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    measured = export(checkpoint, folder / "int8.onnx", "precision=int8")
    assert 0 <= measured["ap_before"] <= 1
    assert abs(measured["ap_after"] - measured["ap_before"]) < 0.05
    assert 0 < measured["scores"] < 0.5


@pytest.fixture(scope="module")
def pt2_file(checkpoint, folder):
    path = folder / "model.pt2"
    if not path.exists():
        export(checkpoint, path, "format=pt2")
    return path


@pytest.mark.slow
def test_eval_of_a_file_is_that_of_its_checkpoint(pt2_file, checkpoint, tmp_path):
    expected, found = (
        run_eval(load_config("eval", [f"ckpt={ckpt}", "amp=off", "workers=0", f"run_dir={tmp_path / ckpt.name}"]))
        for ckpt in (checkpoint, pt2_file)
    )
    assert found["AP"] == pytest.approx(expected["AP"], abs=1e-4)


@pytest.mark.slow
def test_a_file_is_not_overwritten(pt2_file, checkpoint):
    with pytest.raises(DetkitError, match="already exists"):
        export(checkpoint, pt2_file, "format=pt2")


GRAPH, WEIGHTS = "model/models/model.json", "model/data/weights/model_weights_config.json"


def replaced(old: bytes, new: bytes):
    return lambda text: text.replace(old, new)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("member", "change", "reason"),
    [
        ("model/data/weights/evil.pt", lambda _: b"\x80\x04.", "it holds data/weights/evil"),
        ("model/models/evil.jsox", lambda _: b"{}", "it holds models/evil"),
        ("model/data/aotinductor/model/model.so", lambda _: b"\x7fELF", "it holds data/aotinductor"),
        ("model/serialized_state_dict.pt", lambda _: b"\x80\x04.", "it holds serialized_state_dict"),
        ("model/MODELS/MODEL.JSON", lambda _: b"{}", "distinct"),
        ("other/models/model.json", lambda _: b"{}", "one folder"),
        ("model/data/sample_inputs/model.pt", lambda _: b"\x80\x04.", "pickled"),
        (
            "model/data/weights/model_weights_config.json",
            replaced(b'"use_pickle": false', b'"use_pickle": true'),
            "pickled",
        ),
        (GRAPH, replaced(b"torch.ops.aten.sigmoid.default", b"torch.hub.load"), "operator"),
        (GRAPH, replaced(b"torch.ops.aten.sigmoid.default", b"_operator.attrgetter"), "operator"),
        (GRAPH, replaced(b"aten.sigmoid.default", b"aten.from_file.default"), "operator"),
        (GRAPH, replaced(b'"guards_code": [', b'"guards_code": ["print(1)", '), "expression"),
        (
            GRAPH,
            lambda text: re.sub(rb'("expr_str": )"[^"]+"', rb'\1"exec(1)"', text),
            "expression",
        ),
        (GRAPH, replaced(b"builtins.dict", b"os.system"), "type"),
        (GRAPH, lambda text: text[: len(text) // 2], "damaged"),
    ],
)
def test_an_archive_that_would_run_code_is_refused(pt2_file, tmp_path, member, change, reason):
    path = tmp_path / "changed.pt2"
    with zipfile.ZipFile(pt2_file) as source, zipfile.ZipFile(path, "w") as target:
        for name in dict.fromkeys([*source.namelist(), member]):
            content = source.read(name) if name in source.namelist() else b""
            target.writestr(name, change(content) if name == member else content)
            assert name != member or change(content) != content
    assert check_archive(pt2_file)
    with pytest.raises(DetkitError, match=reason):
        check_archive(path)
    with pytest.raises(DetkitError, match=reason):
        load_model(path, CPU)


@pytest.mark.parametrize(
    ("text", "allowed"),
    [
        ("Mul(Integer(2), Symbol('s18', positive=True, integer=True))", True),
        ("1 + (((-1) + L['images'].size()[2]) // 32) >= 2", True),
        ("torch.sym_max(1, L['images'].size()[3] // 32) > 1", True),
        ("32*s18", True),
        ("S('images'[4]+'sym_max'[6])", False),
        ("Symbol('__import__')", False),
        ("Symbol('s1', commutative=exec('1'))", False),
        ("L['images'].__class__", False),
        ("L['images'].size()[__import__('os')]", False),
        ("Integer('1')", False),
        ("Integer(9).real", False),
        ("(lambda: 1)()", False),
        ("9**9**9", False),
        ("f'{1}'", False),
        ("s1 +", False),
        ("(" * 5000 + ")" * 5000, False),
    ],
)
def test_only_arithmetic_on_sizes_is_evaluated(text, allowed):
    assert is_arithmetic_on_sizes(text) is allowed


class Small(nn.Module):
    """A backbone from outside the package."""

    def __init__(self, out_strides: tuple[int, ...]) -> None:
        super().__init__()
        self.strides, self.out_channels = tuple(out_strides), (8,) * len(out_strides)
        self.levels = nn.ModuleList(nn.Conv2d(3, 8, s, s) for s in out_strides)

    def forward(self, x):
        return tuple(level(x) for level in self.levels)


@BACKBONES.register("test_sincere")
class Sincere(Small):
    pass


@BACKBONES.register("test_insincere")
class Insincere(Small):
    """Computes something else while it is exported."""

    def forward(self, x):
        return super().forward(1000 * x if torch.compiler.is_exporting() else x)


class Branching(nn.Module):
    """Control flow that depends on the data cannot be exported."""

    def forward(self, x):
        return x if x.sum() > 0 else -x


@BACKBONES.register("test_branching")
class WithBranches(Small):
    def __init__(self, out_strides: tuple[int, ...]) -> None:
        super().__init__(out_strides)
        self.gate = Branching()

    def forward(self, x):
        return super().forward(self.gate(x))


@pytest.fixture
def save(tmp_path, shapes_root):
    """Returns a function that saves a checkpoint with a backbone."""

    def save(name: str) -> Path:
        cfg = resolve(compose_config("check", ["model.width=0.0625", "model.depth=0.1", "image_size=64"]))
        cfg |= {"backbone": {"name": name}}
        detector = build_detector(cfg, ["a", "b"])
        save_checkpoint(detector, tmp_path / "plugin.safetensors", {})
        return tmp_path / "plugin.safetensors"

    return save


def arguments(ckpt: Path, photo: Path, *more: str) -> list[str]:
    return ["export", f"ckpt={ckpt}", "format=pt2", f"images={photo}", *more]


def test_a_backbone_from_outside_is_exported(save, photo, monkeypatch, capsys):
    ckpt = save("test_sincere")
    assert run_command(monkeypatch, capsys, *arguments(ckpt, photo))[0] == 0
    assert_same(predict(ckpt.with_suffix(".pt2"), photo, 0.0), predict(ckpt, photo, 0.0))


def test_a_file_that_differs_from_pytorch_is_not_kept(save, photo, monkeypatch, capsys, tmp_path):
    before = {*tmp_path.iterdir()}
    ckpt = save("test_insincere")
    status, out, err = run_command(monkeypatch, capsys, *arguments(ckpt, photo))
    assert status == 1
    assert "differ" in out + err
    assert {*tmp_path.iterdir()} == before | {ckpt}


def test_a_module_that_cannot_be_exported_is_named(save, photo, monkeypatch, capsys, tmp_path):
    status, _, err = run_command(monkeypatch, capsys, *arguments(save("test_branching"), photo))
    assert status == 2
    assert "backbone.gate (Branching)" in err
    assert len(err.strip().splitlines()[-1:]) == 1
    assert not [*tmp_path.glob("*.pt2")]


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("opset=17", "opset"),
        ("nms=true", "nms=false"),
        ("precision=int8", "float32"),
        ("dst=x.onnx", ".pt2"),
        ("format=torchscript", "onnx"),
    ],
)
def test_what_is_impossible_is_said_first(save, photo, monkeypatch, capsys, override, named):
    status, _, err = run_command(monkeypatch, capsys, *arguments(save("test_sincere"), photo, override))
    assert status == 2
    assert named in err


def test_a_missing_package_is_named():
    with pytest.raises(DetkitError, match=r"pip install 'detkit\[export\]'"):
        need("no_such_package.at_all", "export")


METADATA = Metadata(("a", "b"), 64, (8, 16, 32), 32, (None, None, None), True, 0.25, 0.7, 300, "float32", {"seed": 0})


def test_metadata_is_read_back():
    assert parse_metadata(METADATA.to_json(), "file") == METADATA
    fixed = replace(METADATA, fixed_shape=(1, 64, 96), nms=False)
    assert parse_metadata(fixed.to_json(), "file") == fixed


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"class_names": []},
        {"class_names": ["a", "a"]},
        {"class_names": ["a", "\x1b[2J"]},
        {"class_names": "ab"},
        {"image_size": "64"},
        {"image_size": 10**12},
        {"image_size": 65},
        {"image_size": None},
        {"strides": [0]},
        {"strides": None},
        {"max_stride": 0},
        {"fixed_shape": [1, 2]},
        {"fixed_shape": [1, 64, -1]},
        {"nms": "yes"},
        {"score": 2},
        {"iou": None},
        {"max_det": 0},
        {"precision": "int4"},
        {"cfg": []},
        {"cfg": {"seed": "zero"}},
    ],
)
def test_damaged_metadata_is_refused(change):
    with pytest.raises(DetkitError, match="file"):
        parse_metadata(json.dumps(json.loads(METADATA.to_json()) | change), "file")


@pytest.mark.parametrize("text", [None, "", "{", "[]", "null", "[" * 100_000, b"{}"])
def test_what_is_no_metadata_is_refused(text):
    with pytest.raises(DetkitError, match="file"):
        parse_metadata(text, "file")
