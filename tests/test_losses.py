import pytest
import torch

from detkit.models.losses.assigner import assign_task_aligned
from detkit.models.losses.task_aligned import TaskAlignedLoss, distribution_focal_loss
from detkit.ops.points import make_grid_points
from detkit.structures import Batch, DenseOutput
from tests.test_ops import naive_ciou, random_boxes


def padded(targets: torch.Tensor, images: int, height: int, width: int) -> tuple[torch.Tensor, ...]:
    """Rows [image, class, x, y, w, h normalised] -> padded boxes in pixels, labels, valid."""
    longest = int(max((targets[:, 0] == i).sum() for i in range(images)))
    boxes = torch.zeros(images, longest, 4)
    labels, valid = torch.zeros(images, longest, dtype=torch.long), torch.zeros(images, longest, dtype=torch.bool)
    size = torch.tensor([width, height])
    for i in range(images):
        rows = targets[targets[:, 0] == i]
        centre, extent = rows[:, 2:4] * size, rows[:, 4:6] * size
        boxes[i, : len(rows)] = torch.cat((centre - extent / 2, centre + extent / 2), 1)
        labels[i, : len(rows)], valid[i, : len(rows)] = rows[:, 1].long(), True
    return boxes, labels, valid


@pytest.mark.parametrize("name", ["v8_loss_big_gts", "v8_loss_small_gts_classic"])
def test_loss_and_gradients_are_golden(golden, name):
    g = golden(name)
    images = len(g["boxes_logits"])
    points, strides = make_grid_points([g[f"hw{k}"].tolist() for k in range(3)], [8, 16, 32], g["hw0"].device)
    reg = g["boxes_logits"].transpose(1, 2).clone().requires_grad_()
    cls = g["scores_logits"].transpose(1, 2).clone().requires_grad_()
    batch = Batch(torch.empty(0), *padded(g["targets"], images, *g["img_hw"].tolist()))
    terms = TaskAlignedLoss()(DenseOutput(cls, reg, points, strides), batch)
    (sum(terms.values()) * images).backward()
    for term, value in terms.items():
        torch.testing.assert_close(value, g[f"{term}_loss"], atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(reg.grad.transpose(1, 2)[:1], g["grad_boxes"], atol=1e-4, rtol=0)
    torch.testing.assert_close(reg.grad.norm(), g["grad_boxes_norm"], atol=1e-4, rtol=0)
    torch.testing.assert_close(cls.grad.transpose(1, 2), g["grad_scores"], atol=1e-4, rtol=0)


def test_assignment_is_golden(golden):
    g = golden("v8_tal")
    found = assign_task_aligned(
        g["pd_scores"],
        g["pd_bboxes"],
        g["anc_points"],
        g["gt_bboxes"],
        g["gt_labels"][..., 0].long(),
        g["mask_gt"][..., 0].bool(),
    )
    assert torch.equal(found.foreground_ba, g["fg_mask"])
    assert torch.equal(found.box_index_ba[g["fg_mask"]], g["target_gt_idx"][g["fg_mask"]])
    torch.testing.assert_close(found.scores_bac, g["target_scores"], atol=1e-5, rtol=0)


def naive_assignment(scores, boxes, points, gts, labels, topk=3, alpha=0.5, beta=6.0):
    """The assigner of one image as the paper tells it: point -> (box, target score)."""
    overlap, metric = {}, {}
    for m, gt in enumerate(gts.tolist()):
        for a, (x, y) in enumerate(points.tolist()):
            if gt[0] < x < gt[2] and gt[1] < y < gt[3]:
                overlap[m, a] = max(naive_ciou(gt, boxes[a].tolist()), 0.0)
                metric[m, a] = float(scores[a, labels[m]]) ** alpha * overlap[m, a] ** beta
    wants: dict[int, list[int]] = {}
    for m in range(len(gts)):
        best = sorted((a for n, a in metric if n == m), key=lambda a: -metric[m, a])[:topk]
        for a in best if best and metric[m, best[0]] > 1e-9 else []:
            wants.setdefault(a, []).append(m)
    owner = {}
    for a, boxes_wanting in wants.items():
        candidates = boxes_wanting if len(boxes_wanting) == 1 else range(len(gts))
        owner[a] = max(candidates, key=lambda m: overlap.get((m, a), 0.0))
    result = {}
    for a, m in owner.items():
        points = [b for b, n in owner.items() if n == m]
        best_metric, best_overlap = max(metric[m, b] for b in points), max(overlap[m, b] for b in points)
        result[a] = (m, metric[m, a] * best_overlap / (best_metric + 1e-9))
    return result


@pytest.mark.parametrize("seed", range(5))
def test_assignment_equals_a_naive_loop(seed):
    torch.manual_seed(seed)
    points, strides = make_grid_points([(6, 8), (3, 4)], [8, 16], torch.device("cpu"))
    points = (points * strides).double()
    corner = torch.rand(2, 5, 2, dtype=torch.float64) * 10  # all overlap: no metric inside a box is zero
    gts = torch.cat((corner, corner + 28 + torch.rand(2, 5, 2, dtype=torch.float64) * 10), -1)
    boxes = gts.repeat(1, 12, 1) + torch.randn(2, 60, 4, dtype=torch.float64) * 2
    scores, labels = torch.rand(2, 60, 3, dtype=torch.float64), torch.randint(3, (2, 5))
    found = assign_task_aligned(scores, boxes, points, gts, labels, torch.ones(2, 5, dtype=torch.bool), topk=3)
    for i in range(2):
        expected = naive_assignment(scores[i], boxes[i], points, gts[i], labels[i])
        targets = torch.zeros(60, 3, dtype=torch.float64)
        for a, (m, score) in expected.items():
            targets[a, labels[i, m]] = score
            assert found.box_index_ba[i, a] == m
        assert targets.sum() > 0
        torch.testing.assert_close(found.scores_bac[i], targets, atol=1e-5, rtol=0)


def test_focal_term_equals_a_naive_loop():
    logits = torch.randn(3, 4 * 8, dtype=torch.float64)
    target = torch.rand(3, 4, dtype=torch.float64) * 9 - 1  # beyond both ends
    found = distribution_focal_loss(logits, target)
    for i in range(3):
        for side in range(4):
            p = logits[i, side * 8 : side * 8 + 8].softmax(0)
            y = min(max(float(target[i, side]), 0), 6.99)
            left = int(y)
            expected = -((left + 1 - y) * p[left].log() + (y - left) * p[left + 1].log())
            assert float(found[i, side]) == pytest.approx(float(expected))


def random_output(images: int = 2, classes: int = 3) -> DenseOutput:
    points, strides = make_grid_points([(4, 4), (2, 2)], [8, 16], torch.device("cpu"))
    cls, reg = torch.randn(images, 20, classes), torch.randn(images, 20, 64)
    return DenseOutput(cls.requires_grad_(), reg.requires_grad_(), points, strides)


def random_targets(images: int, boxes: int) -> tuple[torch.Tensor, ...]:
    labels = torch.randint(3, (images, boxes))
    return random_boxes(images, boxes, size=24).float(), labels, torch.ones(images, boxes, dtype=torch.bool)


@pytest.mark.parametrize("boxes", [0, 3])
def test_images_without_boxes_still_teach(boxes):
    """No boxes at all, and only padded rows, give the same: all points are background."""
    out = random_output()
    gts, labels, valid = random_targets(2, boxes)
    terms = TaskAlignedLoss()(out, Batch(torch.empty(0), gts, labels, torch.zeros_like(valid)))
    sum(terms.values()).backward()
    expected = torch.nn.functional.softplus(out.cls.detach()).sum() * 0.5
    torch.testing.assert_close(terms["cls"], expected)
    assert terms["box"] == terms["dfl"] == 0
    assert out.reg.grad is not None and not out.reg.grad.any()
    assert out.cls.grad.isfinite().all()


def test_padding_changes_nothing():
    out = random_output()
    gts, labels, valid = random_targets(2, 3)
    plain = TaskAlignedLoss()(out, Batch(torch.empty(0), gts, labels, valid))
    more = (torch.cat((x, torch.zeros_like(x)), 1) for x in (gts, labels, valid))
    for name, value in TaskAlignedLoss()(out, Batch(torch.empty(0), *more)).items():
        torch.testing.assert_close(value, plain[name])


def test_loss_is_float32_under_autocast():
    out = random_output()
    targets = random_targets(2, 3)
    expected = TaskAlignedLoss()(out, Batch(torch.empty(0), *targets))
    with torch.autocast("cpu", torch.bfloat16):
        terms = TaskAlignedLoss()(out, Batch(torch.empty(0), *targets))
    assert all(term.dtype == torch.float32 for term in terms.values())
    assert all(torch.equal(terms[name], expected[name]) for name in terms)


def test_gradient_agrees_with_finite_differences():
    """Of a background point's class logit, which no assignment depends on."""
    out = random_output(images=1)
    targets = random_targets(1, 2)
    loss, batch = TaskAlignedLoss(), Batch(torch.empty(0), *targets)
    sum(loss(out, batch).values()).backward()
    (gts, _, _), centres = targets, out.points * out.strides
    inside = ((centres > gts[0, :, None, :2]) & (centres < gts[0, :, None, 2:])).all(-1).any(0)
    index = int((~inside).nonzero()[0])
    values = []
    for step in (1e-2, -1e-2):
        cls = out.cls.detach().clone()
        cls[0, index, 1] += step
        values.append(float(sum(loss(DenseOutput(cls, out.reg.detach(), out.points, out.strides), batch).values())))
    assert float(out.cls.grad[0, index, 1]) == pytest.approx((values[0] - values[1]) / 2e-2, rel=1e-2)
