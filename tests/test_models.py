import copy

import numpy as np
import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

import detkit
from detkit.errors import DetkitError
from detkit.layers.rep import RepVGG
from detkit.models.heads.yolov8 import YOLOv8Head
from detkit.structures import Batch, DenseOutput

PARAMETERS = {  # published counts: model, classes -> plain, fused
    ("yolov8n", 80): (3_157_200, 3_151_904),
    ("yolov8n", 3): (3_011_433, 3_006_233),
    ("yolov8s", 80): (11_166_560, 11_156_544),
    ("yolov8m", 80): (25_902_640, None),
    ("yolov8l", 80): (43_691_520, None),
    ("yolov8x", 80): (68_229_648, None),
    ("yolov8n_dynamicconv", 3): (4_727_293, 4_722_733 - 640),  # published with 640 batch norms of experts unfolded
    ("yolov8n_dynamicbnact", 3): (4_728_573, 4_724_013 - 640),
    ("yolov8s_dynamicconv", 3): (17_996_813, 17_988_077 - 1280),
    ("yolov8s_dynamicbnact", 3): (17_999_373, 17_990_637 - 1280),
    ("yolov5n", 80): (1_872_157, None),
    ("yolov5s", 80): (7_235_389, None),
    ("yolov5m", 80): (21_190_557, None),
    ("yolov5l", 80): (46_563_709, None),
    ("yolov5x", 80): (86_749_405, None),
    ("yolov5l_akconv", 80): (41_928_079, 41_899_599),
    ("yolov8n_gold", 80): (8_210_000, 7_756_416 - 5536),  # published with the batch norms of its attention unfolded
}


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(("name", "classes"), PARAMETERS)
def test_parameter_counts_are_the_published_ones(name, classes):
    plain, fused = PARAMETERS[name, classes]
    with torch.device("cpu" if fused else "meta"):
        detector = detkit.create_model(name, num_classes=classes)
    assert count(detector) == plain
    if fused:
        assert count(detector.fuse()) == fused


def test_parts_of_yolov5l_akconv_are_the_published_ones():
    with torch.device("meta"):
        detector = detkit.create_model("yolov5l_akconv")
    assert count(detector.backbone.stages[-1][1]) == 5_336_082
    assert count(detector.head) == 457_725


@pytest.mark.parametrize(("size", "plain", "deployed"), [("n", 2_198_272, 2_061_024), ("s", 7_786_240, 7_314_048)])
def test_gold_yolo_s_own_necks_have_the_published_counts(size, plain, deployed):
    neck = detkit.create_model(f"goldyolo_{size}", overrides=["neck.context=null"]).neck  # published without SPPF
    assert count(neck) == plain
    for module in list(neck.modules()):
        if isinstance(module, RepVGG):
            module.fuse()
    assert count(neck) == deployed
    assert detkit.create_model("yolov8m", neck=f"repgd_{size}").neck.out_channels == neck.out_channels


def test_p2_gives_a_finer_level():
    detector = detkit.create_model("yolov8n_p2", num_classes=3)
    assert detector.head.strides == (4, 8, 16, 32)
    assert detector(torch.zeros(1, 3, 64, 96)).points.shape == (16 * 24 + 8 * 12 + 4 * 6 + 2 * 3, 2)
    assert detkit.create_model("yolov8n", neck="pafpn_p2", backbone="mobilenetv2").backbone.strides == (4, 8, 16, 32)
    with pytest.raises(DetkitError, match="must be consecutive strides of"):
        detkit.create_model(overrides=["neck.in_strides=[8,32]"])


@pytest.mark.parametrize(("name", "gflops"), [("yolov8n", 8.085), ("yolov8s", 28.437)])
def test_operator_counted_flops(name, gflops):
    detector = detkit.create_model(name, num_classes=3).eval()
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        detector(torch.zeros(1, 3, 640, 640))
    assert counter.get_total_flops() / 1e9 == pytest.approx(gflops, abs=0.002)


@pytest.mark.parametrize("name", ["yolov8n"])
@pytest.mark.parametrize("batch", [1, 2])
def test_features_match_their_declaration_and_every_parameter_learns(name, batch):
    detector = detkit.create_model(name, num_classes=3)
    height, width = 64, 96
    features = detector.backbone(torch.rand(batch, 3, height, width))
    for part, maps in ((detector.backbone, features), (detector.neck, detector.neck(features))):
        expected = [(batch, c, height // s, width // s) for c, s in zip(part.out_channels, part.strides, strict=True)]
        assert [tuple(x.shape) for x in maps] == expected
    out = detector(torch.rand(batch, 3, height, width))
    points = sum(height * width // s**2 for s in detector.head.strides)
    assert out.cls.shape == (batch, points, 3)
    assert out.reg.shape == (batch, points, 64)
    (out.cls.square().mean() + out.reg.square().mean()).backward()
    without_gradient = [
        n for n, p in detector.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())
    ]
    assert not without_gradient


def test_fused_detector_is_equal_and_the_original_untouched():
    detector = detkit.create_model("yolov8n", num_classes=3)
    for _ in range(2):
        detector(torch.rand(2, 3, 64, 64))  # batch norms that have seen something
    detector.eval()
    fused = detector.fuse()
    x = torch.rand(1, 3, 64, 96)
    with torch.inference_mode():
        boxes, scores = detector.decode(detector(x))
        fused_boxes, fused_scores = fused.decode(fused(x))
    torch.testing.assert_close(fused_boxes, boxes, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(fused_scores, scores, atol=1e-5, rtol=1e-4)
    assert any(isinstance(m, torch.nn.BatchNorm2d) for m in detector.modules())


@pytest.mark.parametrize("name", ["yolov8n", "yolov8n_gold", "yolov8n_dynamicconv"])
def test_fusing_twice_changes_nothing(name):
    fused = detkit.create_model(name, num_classes=3).fuse()
    assert fused.fuse() is fused
    assert copy.deepcopy(fused).fuse().is_fused


def batch_norms(part: torch.nn.Module) -> set[tuple[float, float]]:
    return {(m.eps, m.momentum) for m in part.modules() if isinstance(m, torch.nn.BatchNorm2d)}


@pytest.mark.parametrize(
    ("model", "parts"),
    [
        ("yolov8n", {}),
        ("yolov8n_dynamicbnact", {}),
        ("yolov8n", {"backbone": "mobilenetv2", "neck": "repgd"}),
        ("yolov5n_akconv", {}),
    ],
)
def test_batch_norms_are_the_recipe_s(model, parts):
    assert batch_norms(detkit.create_model(model, **parts)) == {(1e-3, 0.03)}


def test_a_foreign_backbone_keeps_its_own_batch_norms():
    detector = detkit.create_model(backbone="timm", overrides=["backbone.model=tf_efficientnet_lite0"])
    assert batch_norms(detector.backbone) == batch_norms(timm.create_model("tf_efficientnet_lite0"))
    assert batch_norms(detector.neck) == batch_norms(detector.head) == {(1e-3, 0.03)}


def test_a_side_that_does_not_divide_is_refused():
    with pytest.raises(DetkitError, match="input is 64x100 pixels: both sides must be divisible by 32"):
        detkit.create_model()(torch.zeros(1, 3, 64, 100))


def test_head_decodes_as_golden_and_starts_from_the_prior(golden):
    g = golden("v8_detect_nc5")
    head = YOLOv8Head((16, 32, 64), (8, 16, 32), 5)
    raw = torch.cat([g[f"raw{k}"].flatten(2) for k in range(3)], 2).transpose(1, 2)
    plain = head([torch.zeros(2, c, h, w) for c, h, w in ((16, 8, 12), (32, 4, 6), (64, 2, 3))])
    boxes, scores = head.decode(DenseOutput(raw[..., 64:], raw[..., :64], plain.points, plain.strides))
    expected = g["decoded_xywh_scores"].transpose(1, 2)
    centre, extent = expected[..., :2], expected[..., 2:4]
    torch.testing.assert_close(boxes, torch.cat((centre - extent / 2, centre + extent / 2), -1), atol=1e-4, rtol=0)
    torch.testing.assert_close(scores, expected[..., 4:], atol=1e-5, rtol=0)
    head.init_bias()
    torch.testing.assert_close(torch.stack([b[-1].bias[0] for b in head.cls_branches]), g["bias_init_cls"])
    assert all((b[-1].bias == 1).all() for b in head.box_branches)  # any constant: the softmax does not see it


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "yolov8q"}, "model=yolov8q does not exist: known are goldyolo_n"),
        ({"backbone": "csp_darknt"}, "did you mean 'csp_darknet'?"),
        ({"overrides": ["backbone.block=c2"]}, "unknown block 'c2': known are"),
        ({"overrides": ["+backbone.colour=red"]}, "backbone 'csp_darknet' takes no argument 'colour'"),
        ({"overrides": ["+neck.in_channels=[1,2,3]"]}, "neck.in_channels is derived from the other parts"),
        ({"overrides": ["backbone.dept=1"]}, "there is no key 'backbone.dept'; did you mean 'backbone.depth'?"),
    ],
)
def test_mistakes_in_a_composition_are_named(arguments, message):
    with pytest.raises(DetkitError) as error:
        detkit.create_model(**arguments)
    assert message in str(error.value)


def test_list_models():
    assert {"yolov8l", "yolov8m", "yolov8n", "yolov8s", "yolov8x"} <= set(detkit.list_models("model"))
    assert "revcol_tiny" in detkit.list_models("backbone")
    assert "c2f" in detkit.list_models("block")
    with pytest.raises(DetkitError, match="the kinds are"):
        detkit.list_models("wheel")


def test_predict_takes_arrays_files_folders_and_lists(tmp_path, shapes_root):
    detector = detkit.create_model("yolov8n", num_classes=5, overrides=["image_size=64"])
    folder = shapes_root / "images" / "val"
    file = sorted(folder.iterdir())[0]
    array = np.zeros((40, 70, 3), np.uint8)
    found = detector.predict([array, file, folder], score=0.0, max_det=5)
    assert len(found) == 2 + len(list(folder.iterdir()))
    assert found[0].size == (40, 70)
    assert found[0].path is None
    assert found[1].path == file
    assert (found[0].boxes[:, 2] <= 70).all()
    assert detector.training  # as it was
    points = 8**2 + 4**2 + 2**2
    for multi_label, boxes in ((False, points), (True, 5 * points)):
        assert [len(f) for f in detector.predict(file, 0.0, 1.0, 1000, multi_label=multi_label)] == [boxes]
    for source, message in (
        (tmp_path, "contains no images"),
        (tmp_path / "no.jpg", "does not exist"),
        (array[..., 0], "uint8 RGB"),
        (3.5, "not float"),
    ):
        with pytest.raises(DetkitError, match=message):
            detector.predict(source)


def test_batch_moves_its_tensors():
    batch = Batch(torch.zeros(1, 3, 4, 4), torch.zeros(1, 2, 4), torch.zeros(1, 2), torch.zeros(1, 2))
    assert batch.to(torch.device("meta")).images.is_meta
