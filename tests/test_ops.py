import csv
import math
import struct
import zlib

import numpy as np
import pytest
import torch

from detkit.errors import DetkitError
from detkit.ops.boxes import ciou, dfl_expectation, ltrb_to_xyxy, xyxy_to_ltrb
from detkit.ops.image import Letterbox, read_image
from detkit.ops.nms import Thresholds, non_max_suppression
from detkit.ops.points import make_grid_points
from tests.conftest import GOLDEN


def random_boxes(*shape: int, size: float = 100.0) -> torch.Tensor:
    corner = torch.rand(*shape, 2, dtype=torch.float64) * size
    return torch.cat((corner, corner + 1 + torch.rand(*shape, 2, dtype=torch.float64) * size / 2), -1)


def naive_ciou(a: list[float], b: list[float]) -> float:
    """CIoU of two boxes, as the paper writes it."""
    overlap = max(min(a[2], b[2]) - max(a[0], b[0]), 0) * max(min(a[3], b[3]) - max(a[1], b[1]), 0)
    aw, ah, bw, bh = a[2] - a[0], a[3] - a[1], b[2] - b[0], b[3] - b[1]
    iou = overlap / (aw * ah + bw * bh - overlap)
    centre = ((a[0] + a[2] - b[0] - b[2]) / 2) ** 2 + ((a[1] + a[3] - b[1] - b[3]) / 2) ** 2
    diagonal = (max(a[2], b[2]) - min(a[0], b[0])) ** 2 + (max(a[3], b[3]) - min(a[1], b[1])) ** 2
    v = 4 / math.pi**2 * (math.atan(bw / bh) - math.atan(aw / ah)) ** 2
    return iou - centre / diagonal - v * v / (1 - iou + v)


def test_ciou_equals_a_naive_loop():
    a, b = random_boxes(20), random_boxes(20)
    expected = [naive_ciou(x, y) for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    torch.testing.assert_close(ciou(a, b), torch.tensor(expected, dtype=torch.float64), atol=1e-6, rtol=0)


def test_ciou_and_its_gradient_are_golden(golden):
    g = golden("v8_ciou")
    pred = g["pred"].requires_grad_()
    value = ciou(pred, g["target"])
    (1 - value).sum().backward()
    torch.testing.assert_close(value, g["ciou"][:, 0], atol=1e-6, rtol=0)
    torch.testing.assert_close(pred.grad, g["grad_pred_of_sum_1_minus_ciou"], atol=1e-6, rtol=0)


def test_distances_and_boxes_are_inverse():
    points, _ = make_grid_points([(4, 6)], [8], torch.device("cpu"))
    boxes = random_boxes(2, 24).float()
    torch.testing.assert_close(ltrb_to_xyxy(xyxy_to_ltrb(boxes, points), points), boxes)


def test_expected_distance_of_a_certain_bin():
    logits = torch.full((1, 4 * 16), -100.0)
    for side, bin_ in enumerate((3, 0, 15, 7)):
        logits[0, side * 16 + bin_] = 100.0
    assert dfl_expectation(logits, torch.arange(16.0)).tolist() == [[3, 0, 15, 7]]


def test_points_are_cell_centres():
    points, strides = make_grid_points([(1, 2), (1, 1)], [8, 16], torch.device("cpu"))
    assert (points * strides).tolist() == [[4, 4], [12, 4], [8, 8]]


def naive_nms(boxes: torch.Tensor, scores: torch.Tensor, settings: Thresholds) -> list[tuple]:
    """Suppress the boxes of one image, (A, 4) with scores (A, C), by a loop over single pairs in float64."""
    points, classes = scores.shape
    lowest = torch.tensor(settings.score).expand(classes)
    found = [
        (score, label, boxes[i].tolist())
        for i in range(points)
        for label in ([int(scores[i].nan_to_num(-1).argmax())] if not settings.multi_label else range(classes))
        if settings.classes is None or label in settings.classes
        if (score := float(scores[i, label])) > lowest[label]
    ]
    chosen: list[tuple] = []
    for score, label, box in sorted(found, reverse=True):
        rivals = [other for _, other_label, other in chosen if settings.class_agnostic or other_label == label]
        if all(plain_iou(box, other) <= settings.iou for other in rivals):
            chosen.append((score, label, box))
    return chosen[: settings.max_det]


def plain_iou(a: list[float], b: list[float]) -> float:
    def area(x1: float, y1: float, x2: float, y2: float) -> float:
        return max(x2 - x1, 0) * max(y2 - y1, 0)

    overlap = area(max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3]))
    return overlap / (area(*a) + area(*b) - overlap)


@pytest.mark.parametrize(
    "settings",
    [
        Thresholds(0.2, 0.5, 1000, multi_label=True),
        Thresholds(0.2, 0.5, 7, multi_label=True),  # fewer than there are
        Thresholds(0.1, 0.1, 30, multi_label=True),  # that only the worst candidates complete
        Thresholds(0.2, 0.5, 20),
        Thresholds((0.9, 0.2, 0.5, 0.0), 0.5, 50, multi_label=True),
        Thresholds(0.2, 0.5, 50, multi_label=True, classes=(1, 3)),
        Thresholds(0.2, 0.5, 50, classes=(1, 3)),  # boxes whose best class is one of these
        Thresholds(0.2, 0.5, 50, multi_label=True, class_agnostic=True),
    ],
)
def test_nms_equals_a_naive_loop(settings):
    """In every image of a batch, among them one far from the origin, one of crowded boxes and one without any."""
    boxes, scores = random_boxes(4, 60, size=40).float(), torch.rand(4, 60, 4)
    boxes[1] = boxes[1] * 0.1 + 5000
    boxes[2] = boxes[2, :1] + torch.rand(60, 4)
    scores[2, ::3, 0] = math.nan  # other classes of the same points are valid
    scores[3] = 0
    for k, (selected, confidence, labels) in enumerate(non_max_suppression(boxes, scores, settings)):
        found = list(zip(confidence.tolist(), labels.tolist(), selected.tolist(), strict=True))
        assert found == naive_nms(boxes[k], scores[k], settings)


def test_a_box_of_absurd_size_changes_no_other():
    boxes = torch.tensor([[[0, 0, 10, 10], [0, 0, 10, 9], [-1e30, 0, 1e30, 3e38], [0, 0, 10, 10.0]]])
    scores = torch.tensor([[[0.9, 0.0], [0.8, 0.0], [0.0, 0.7], [0.0, 0.6]]])
    ((_, confidence, _),) = non_max_suppression(boxes, scores, Thresholds(0.1, 0.5, 9))
    torch.testing.assert_close(confidence, torch.tensor([0.9, 0.7, 0.6]))


def test_nms_limits():
    boxes = torch.tensor([[[0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10.0]]])
    scores = torch.tensor([[[0.5], [0.9], [0.7]]])
    ((_, confidence, _),) = non_max_suppression(boxes, scores, Thresholds(0.0, 0.5, 2, multi_label=True))
    torch.testing.assert_close(confidence, torch.tensor([0.9, 0.7]))
    ((_, confidence, _),) = non_max_suppression(boxes, scores, Thresholds(0.0, 0.5, 9, True), max_candidates=1)
    torch.testing.assert_close(confidence, torch.tensor([0.9]))
    ((none, _, _),) = non_max_suppression(boxes, scores, Thresholds(0.95, 0.5, 9, multi_label=True))
    assert none.shape == (0, 4)


def test_a_box_has_one_label_where_one_is_asked_for():
    boxes = torch.tensor([[[0, 0, 10, 10], [1, 0, 11, 10], [40, 0, 50, 10.0]]])
    scores = torch.tensor([[[0.5, 0.6, 0.1], [0.9, 0.8, 0.3], [0.4, 0.3, 0.7]]])
    limits = {"score": 0.35, "iou": 0.5, "max_det": 9}
    ((_, confidence, labels),) = non_max_suppression(boxes, scores, Thresholds(multi_label=True, **limits))
    assert labels.tolist() == [0, 1, 2, 0]
    torch.testing.assert_close(confidence, torch.tensor([0.9, 0.8, 0.7, 0.4]))
    ((_, confidence, labels),) = non_max_suppression(boxes, scores, Thresholds(multi_label=False, **limits))
    assert labels.tolist() == [0, 2, 1]
    torch.testing.assert_close(confidence, torch.tensor([0.9, 0.7, 0.6]))


@pytest.mark.parametrize("multi_label", [True, False])
def test_nms_drops_what_is_not_finite(multi_label):
    boxes = torch.tensor([[[0, 0, 10, 10], [20, 0, 30, math.nan], [40, 0, math.inf, 10], [60, 0, 70, 10.0]]])
    scores = torch.tensor([[[0.9, 0.1], [0.8, 0.1], [0.7, 0.1], [math.nan, math.nan]]])
    ((selected, _, _),) = non_max_suppression(boxes, scores, Thresholds(0.5, 0.5, 9, multi_label))
    assert selected.tolist() == [[0, 0, 10, 10]]


def letterbox_rows() -> list[dict[str, float]]:
    with open(GOLDEN / "v8_letterbox.csv") as file:
        rows = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
    return [row for row in rows if row["scaleup"] and not row["auto"]]


@pytest.mark.parametrize("row", letterbox_rows(), ids=lambda r: f"{r['h']:.0f}x{r['w']:.0f}-{r['out_h']:.0f}")
def test_letterbox_geometry_is_golden(row):
    frame = (int(row["out_h"]), int(row["out_w"]))
    box = Letterbox.fit((int(row["h"]), int(row["w"])), frame)
    found = (box.width, box.height, box.top, box.bottom, box.left, box.right)
    assert found == tuple(row[key] for key in ("new_w", "new_h", "top", "bottom", "left", "right"))


def test_letterbox_draws_where_it_says():
    image = np.zeros((30, 60, 3), np.uint8)
    image[10:20, 12:24] = 255
    box = Letterbox.fit((30, 60), (128, 128))
    framed = box.apply(image)
    assert framed.shape == (128, 128, 3)
    assert (framed[0] == 114).all()
    ys, xs = np.nonzero(framed[..., 0] > 200)
    expected = np.array((12, 10, 24, 20)) * np.tile(box.scale, 2) + np.tile(box.offset, 2)
    assert np.abs(np.array((xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)) - expected).max() <= 1


HUGE_PNG = b"\x89PNG\r\n\x1a\n" + b"\0\0\0\rIHDR" + struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
HUGE_PNG += struct.pack(">I", zlib.crc32(HUGE_PNG[12:]))


@pytest.mark.parametrize("content", [None, b"", b"not an image", b"\xff\xd8\xff\xe0 truncated", HUGE_PNG])
def test_unreadable_images_are_named(tmp_path, content):
    path = tmp_path / "image.jpg"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DetkitError, match=r"cannot read image .*image\.jpg"):
        read_image(path)
