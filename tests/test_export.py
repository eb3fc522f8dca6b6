"""torch.export takes a detector with the batch and the image's sides left open."""

import io

import pytest
import torch
from torch import nn
from torch.export import Dim
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map

import detkit
from detkit.export.metadata import describe
from detkit.export.onnx import build_onnx
from detkit.export.settings import ExportSettings
from detkit.export.verify import count_unequal
from detkit.layers.akconv import AKConv
from detkit.models.detector import Detector
from detkit.models.necks.repgd import pool_by_products
from detkit.ops.nms import Thresholds
from detkit.structures import AnchorOutput, DenseOutput
from tests.conftest import TORCH

COMPOSITIONS = {
    "yolov8n": {"overrides": ["model.depth=0.1"]},
    "yolov5n": {"model": "yolov5n", "overrides": ["model.depth=0.1"]},
    "revcol": {
        "backbone": "revcol_tiny",
        "overrides": ["backbone.channels=[8,16,24,32]", "backbone.layers=[1,1,1,1]", "backbone.columns=2"],
    },
    "goldyolo_n": {
        "model": "goldyolo_n",
        "overrides": ["model.depth=0.1", *(f"neck.{part}_blocks=1" for part in ("low", "high", "rep"))],
    },
    "mobilenetv2": {"backbone": "mobilenetv2", "overrides": ["model.depth=0.1"]},
}
LOWEST = 1e-3  # score: detectors that are not trained give low ones
NARROW = ["model.depth=0.1", "model.width=0.125"]
GRID = COMPOSITIONS | {
    "yolov8n_gold": {"model": "yolov8n_gold", "overrides": NARROW},
    "yolov8n_p2": {"model": "yolov8n_p2", "overrides": NARROW},
    "timm": {"backbone": "timm", "overrides": [*NARROW, "backbone.model=mobilenetv3_small_050"]},
    "dynamicconv": {"model": "yolov8n_dynamicconv", "overrides": NARROW},
    "dynamicbnact": {"model": "yolov8n_dynamicbnact", "overrides": NARROW},
    "akconv": {"model": "yolov5n_akconv", "overrides": NARROW},
    "akconv_tutorial": {
        "overrides": [*NARROW, "backbone.downsample={name: akconv, n: 5, sampling: tutorial}"],
    },
}


def randomized(name: str) -> Detector:
    """A new detector, whose outputs depend on all its parts."""
    detector = detkit.create_model(num_classes=3, **GRID[name])
    for module in detector.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)  # of a new one some are 0, and hide what comes before
        elif isinstance(module, AKConv):
            nn.init.normal_(module.p_conv.weight, std=0.1)
    return detector.eval()


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name,
            marks=pytest.mark.skipif(name == "goldyolo_n" and TORCH < (2, 12), reason="export cannot guard its sizes"),
        )
        for name in COMPOSITIONS
    ],
)
def test_an_exported_detector_gives_the_same_at_other_sizes(name):
    detector = randomized(name).fuse()
    sides = {2: 32 * Dim("rows", min=2, max=20), 3: 32 * Dim("columns", min=2, max=20)}
    with torch.no_grad():
        program = torch.export.export(
            detector, (torch.rand(2, 3, 64, 96),), dynamic_shapes=({0: Dim("batch", max=8), **sides},)
        )
    if name == "yolov5n":  # what it gives holds tensors and numbers
        file = io.BytesIO()
        torch.export.save(program, file)
        program = torch.export.load(file)
    exported = program.module()
    for shape in ((1, 3, 64, 64), (3, 3, 160, 96)):
        images = torch.rand(shape)
        with torch.no_grad():
            found, expected = exported(images), detector(images)
        assert type(found) is type(expected)
        torch.testing.assert_close(tree_leaves(found), tree_leaves(expected), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [(1, 1), (4, 6), (5, 12), (7, 12)])
def test_pooling_by_products_is_adaptive_average_pooling(size):
    x = torch.rand(2, 3, 7, 12)
    torch.testing.assert_close(pool_by_products(x, size), F.adaptive_avg_pool2d(x, size))


def test_outputs_of_heads_are_trees():
    dense = (torch.rand(2, 6, 3), torch.rand(2, 6, 64), torch.rand(6, 2), torch.rand(6, 1))
    for output in (DenseOutput(*dense), AnchorOutput(*dense, torch.rand(2, 6, 1), torch.rand(6, 2), ((1, 2, 3),))):
        doubled = tree_map(lambda leaf: 2 * leaf if isinstance(leaf, torch.Tensor) else leaf, output)
        assert type(doubled) is type(output)
        assert torch.equal(doubled.cls, 2 * output.cls)
        assert getattr(doubled, "levels", None) == getattr(output, "levels", None)


@pytest.mark.slow
@pytest.mark.parametrize("name", GRID)
def test_onnx_runtime_gives_the_same_as_torch(name, tmp_path):
    """Of two sizes and batches from one file: boxes and scores as PyTorch, detections as its NMS of these."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    detector = randomized(name).fuse().to(memory_format=torch.contiguous_format)
    thresholds = Thresholds(score=LOWEST, iou=0.5, max_det=20)
    values = {"score": LOWEST, "iou": 0.5, "max_det": 20, "nms": True, "precision": "float32"}
    metadata = describe(detector, image_size=64, fixed_shape=(None, None, None), **values)
    model = build_onnx(ExportSettings(detector, metadata))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    total = 0
    for shape in ((1, 3, 64, 64), (3, 3, 160, 96)):
        images = torch.rand(shape)
        boxes, scores, rows = map(torch.from_numpy, session.run(None, {"images": images.numpy()}))
        with torch.no_grad():
            expected_boxes, expected_scores = detector.decode(detector(images))
        torch.testing.assert_close(boxes, expected_boxes, atol=0.01, rtol=0)
        torch.testing.assert_close(scores, expected_scores, atol=1e-5, rtol=0)
        by_image = [rows[rows[:, 0] == k] for k in range(len(images))]
        assert torch.equal(torch.cat(by_image), rows)
        assert max(map(len, by_image)) <= 20
        found = [(found[:, 1:5], found[:, 5], found[:, 6].long()) for found in by_image]
        assert count_unequal(found, boxes, scores, thresholds) == 0
        total += len(rows)
    assert total
