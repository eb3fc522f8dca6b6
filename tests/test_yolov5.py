"""YOLOv5's anchors: decoding by hand, matching and loss against loops over boxes, cells and anchors."""

import math

import pytest
import torch
import torch.nn.functional as F

import detkit
from detkit.errors import DetkitError
from detkit.models.detector import build_loss
from detkit.models.heads.yolov5 import YOLOv5Head
from detkit.models.losses.yolov5 import YOLOv5Loss
from detkit.structures import AnchorOutput, Batch
from tests.test_ops import naive_ciou, random_boxes

ANCHORS = {8: [10, 13, 16, 30, 33, 23], 16: [30, 61, 62, 45, 59, 119], 32: [116, 90, 156, 198, 373, 326]}
SIZE = (96, 160)  # height, width in pixels


def random_output(images: int, classes: int) -> AnchorOutput:
    head = YOLOv5Head((4, 4, 4), (8, 16, 32), classes, ANCHORS)
    out = head([torch.randn(images, 4, SIZE[0] // s, SIZE[1] // s) for s in (8, 16, 32)])
    for name in ("cls", "reg", "objectness"):
        setattr(out, name, torch.randn_like(getattr(out, name)).requires_grad_())
    return out


def random_batch(images: int, most: int, classes: int) -> Batch:
    boxes = random_boxes(images, most, size=max(SIZE)).float()
    limit = torch.tensor([SIZE[1], SIZE[0]] * 2)
    boxes = torch.minimum(boxes, limit)
    valid = torch.rand(images, most) < 0.7
    valid &= ((boxes[..., 2:] - boxes[..., :2]) > 1).all(-1)
    return Batch(torch.empty(0), boxes * valid[..., None], torch.randint(classes, (images, most)) * valid, valid)


def naive_loss(out: AnchorOutput, batch: Batch, classes: int) -> dict[str, float]:
    """The published recipe, one anchor of one cell of one level after another, in float64."""
    reg, cls, objectness = (x.detach().double() for x in (out.reg, out.cls, out.objectness))
    totals = {"box": 0.0, "obj": 0.0, "cls": 0.0}
    start = 0
    for stride, balance in ((8, 4.0), (16, 1.0), (32, 0.4)):
        rows, columns = SIZE[0] // stride, SIZE[1] // stride
        boxes_terms, class_terms, targets = [], [], {}
        for b in range(len(batch.boxes_bm4)):
            for m, gt in enumerate(batch.boxes_bm4[b].double().tolist()):
                if not batch.valid_bm[b, m]:
                    continue
                cx, cy = (gt[0] + gt[2]) / 2 / stride, (gt[1] + gt[3]) / 2 / stride
                for y in range(rows):
                    for x in range(columns):
                        dx, dy = abs(x + 0.5 - cx), abs(y + 0.5 - cy)
                        own = (x, y) == (min(int(cx), columns - 1), min(int(cy), rows - 1))
                        beside = int(cy) == y and dx < 1 and dx > 0.5
                        above = int(cx) == x and dy < 1 and dy > 0.5
                        if not (own or beside or above):
                            continue
                        for a in range(3):
                            aw, ah = ANCHORS[stride][2 * a : 2 * a + 2]
                            w, h = gt[2] - gt[0], gt[3] - gt[1]
                            if max(w / aw, aw / w, h / ah, ah / h) >= 4:
                                continue
                            k = start + (y * columns + x) * 3 + a
                            sx, sy, sw, sh = reg[b, k].sigmoid().tolist()
                            px, py = (2 * sx - 0.5 + x) * stride, (2 * sy - 0.5 + y) * stride
                            pw, ph = (2 * sw) ** 2 * aw, (2 * sh) ** 2 * ah
                            iou = naive_ciou((px - pw / 2, py - ph / 2, px + pw / 2, py + ph / 2), gt)
                            boxes_terms.append(1 - iou)
                            target = F.one_hot(batch.labels_bm[b, m], classes).double()
                            class_terms.append(F.binary_cross_entropy_with_logits(cls[b, k], target).item())
                            targets[b, k] = max(targets.get((b, k), 0.0), iou)
        count = rows * columns * 3
        target = torch.zeros(len(reg), count, dtype=torch.float64)
        for (b, k), value in targets.items():
            target[b, k - start] = value
        logits = objectness[:, start : start + count, 0]
        totals["obj"] += balance * F.binary_cross_entropy_with_logits(logits, target).item()
        totals["box"] += sum(boxes_terms) / max(len(boxes_terms), 1)
        totals["cls"] += sum(class_terms) / max(len(class_terms), 1)
        start += count
    pixels = SIZE[0] * SIZE[1] / 640**2
    return {"box": 0.05 * totals["box"], "obj": totals["obj"] * pixels, "cls": 0.5 * classes / 80 * totals["cls"]}


@pytest.mark.parametrize("seed", range(4))
def test_loss_equals_a_naive_loop(seed):
    torch.manual_seed(seed)
    out, batch = random_output(2, 5), random_batch(2, 6, 5)
    found = YOLOv5Loss()(out, batch)
    for name, value in naive_loss(out, batch, 5).items():
        assert found[name].item() == pytest.approx(value, rel=1e-4), name
    sum(found.values()).backward()
    assert all(x.grad.isfinite().all() and x.grad.any() for x in (out.cls, out.reg, out.objectness))


def test_a_box_whose_centre_lies_on_the_border_is_matched():
    batch = Batch(
        torch.empty(0), torch.tensor([[[140.0, 76.0, 180.0, 116.0]]]), torch.zeros(1, 1).long(), torch.ones(1, 1).bool()
    )
    out = random_output(1, 1)
    terms = YOLOv5Loss()(out, batch)
    assert terms["box"] > 0
    assert naive_loss(out, batch, 1)["box"] == pytest.approx(terms["box"].item(), rel=1e-4)


@pytest.mark.parametrize("boxes", [0, 3])
def test_without_boxes_only_objectness_learns(boxes):
    out = random_output(2, 4)
    batch = Batch(torch.empty(0), torch.zeros(2, boxes, 4), torch.zeros(2, boxes).long(), torch.zeros(2, boxes).bool())
    terms = YOLOv5Loss()(out, batch)
    assert terms["box"] == terms["cls"] == 0
    sum(terms.values()).backward()
    assert out.objectness.grad.any()
    assert all(x.grad is None or not x.grad.any() for x in (out.cls, out.reg))


def test_head_decodes_as_published():
    head = YOLOv5Head((4, 4, 4), (8, 16, 32), 2, ANCHORS)
    x = torch.zeros(1, 4, 3, 5)
    with torch.no_grad():
        for conv in head.predictions:
            conv.weight.zero_()
            conv.bias.copy_(torch.randn_like(conv.bias))
    out = head([x, x, x])
    boxes, scores = head.decode(out)
    level, row, column, anchor = 1, 2, 3, 2
    k = level * 45 + (row * 5 + column) * 3 + anchor
    tx, ty, tw, th, obj, *cls = head.predictions[level].bias.sigmoid().view(3, 7)[anchor].tolist()
    cx, cy = (2 * tx - 0.5 + column) * 16, (2 * ty - 0.5 + row) * 16
    w, h = (2 * tw) ** 2 * 59, (2 * th) ** 2 * 119
    expected = torch.tensor([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2])
    torch.testing.assert_close(boxes[0, k], expected)
    torch.testing.assert_close(scores[0, k], obj * torch.tensor(cls))


def test_head_starts_from_the_prior():
    head = YOLOv5Head((4, 4), (8, 16), 80, ANCHORS)
    for conv in head.predictions:
        conv.bias.data.zero_()
    head.init_bias()
    bias = head.predictions[1].bias.view(3, 85)
    assert bias[0, 4].item() == pytest.approx(math.log(8 / 40**2))
    assert bias[2, 5].item() == pytest.approx(math.log(0.6 / 79.00001))
    assert not bias[:, :4].any()


def test_the_head_chooses_its_loss_and_another_is_refused():
    detector = detkit.create_model("yolov8n", head="yolov5", num_classes=3)
    assert isinstance(build_loss(detector.cfg, detector.head), YOLOv5Loss)
    detector = detkit.create_model("yolov5n", head="yolov8", num_classes=3)
    assert detector.cfg["loss"]["name"] == "task_aligned"
    wrong = detkit.create_model("yolov5n", num_classes=3, overrides=["loss=task_aligned"])
    with pytest.raises(DetkitError, match="loss 'task_aligned' takes DenseOutput, head 'yolov5' returns AnchorOut"):
        build_loss(wrong.cfg, wrong.head)


@pytest.mark.parametrize(
    ("anchors", "message"),
    [
        ({8: [1, 2], 16: [1, 2]}, "head.anchors has none for stride 32"),
        ({8: [1, 2], 16: [1, 2], 32: [1, 2, 3, 4]}, "same number at every stride"),
        ({8: [1], 16: [1], 32: [1]}, "must list width, height"),
    ],
)
def test_invalid_anchors_are_refused(anchors, message):
    with pytest.raises(DetkitError, match=message):
        YOLOv5Head((4, 4, 4), (8, 16, 32), 2, anchors)


def test_anchors_survive_json(tmp_path):
    from detkit.engine.checkpoint import build_from_checkpoint, save_checkpoint

    detector = detkit.create_model("yolov5n", num_classes=2).eval()
    save_checkpoint(detector, tmp_path / "a.safetensors", {})
    again = build_from_checkpoint(tmp_path / "a.safetensors")
    x = torch.rand(1, 3, 64, 96)
    with torch.inference_mode():
        torch.testing.assert_close(again.decode(again(x)), detector.decode(detector(x)))
