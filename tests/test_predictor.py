"""The predictor: batches, threads, memory, and thresholds against a naive computation."""

import threading
import weakref

import numpy as np
import pytest
import torch

import detkit
from detkit.errors import DetkitError, UnreadableImage
from detkit.inference.frames import Frame
from detkit.inference.predictor import make_predictor
from detkit.ops.nms import Thresholds, non_max_suppression


@pytest.fixture(scope="module")
def detector():
    torch.manual_seed(0)
    return detkit.create_model("yolov8n", num_classes=3, overrides=["model.depth=0.1", "image_size=64"]).fuse()


def frames(count: int, most: list[int] | None = None):
    """Yield noise in two shapes; ``most`` holds how many frames were alive at a time."""
    alive: list[weakref.ref[Frame]] = []
    rng = np.random.default_rng(0)
    for k in range(count):
        frame = Frame(None, rng.integers(0, 255, ((40, 70, 3), (64, 64, 3))[k % 3 == 0], dtype=np.uint8), k)
        if most is not None:
            alive = [one for one in alive if one() is not None] + [weakref.ref(frame)]
            most[0] = max(most[0], len(alive))
        yield frame


def names() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("detkit-")]


@pytest.mark.parametrize("options", [{}, {"rect": True}, {"tiles": 48}, {"tta": True}])
def test_a_batch_gives_what_one_image_does(detector, options):
    model = detector.as_model("off")
    alone = list(make_predictor(model, 0.0, max_det=20, **options).run(frames(7)))
    batched = list(make_predictor(model, 0.0, max_det=20, batch_size=3, threads=2, **options).run(frames(7)))
    assert [frame.index for frame, _ in batched] == [found.frame for _, found in batched] == list(range(7))
    for (_, one), (_, other) in zip(alone, batched, strict=True):
        torch.testing.assert_close(other.boxes, one.boxes, atol=1e-3, rtol=1e-5)
        torch.testing.assert_close(other.scores, one.scores, atol=1e-5, rtol=1e-5)
        assert torch.equal(other.labels, one.labels)


@pytest.mark.parametrize("threads", [0, 2])
def test_memory_does_not_grow_with_the_source(detector, threads):
    most = [0]
    predictor = make_predictor(detector.as_model("off"), batch_size=2, threads=threads)
    count = sum(1 for _ in predictor.run(frames(60, most)))
    assert count == 60
    assert most[0] <= 16


def test_an_error_of_the_source_is_raised_after_the_frames_before_it(detector):
    def broken():
        yield from frames(3)
        raise OSError("the camera is gone")

    run = make_predictor(detector.as_model("off"), threads=2).run(broken())
    assert [next(run)[0].index for _ in range(3)] == [0, 1, 2]
    with pytest.raises(OSError, match="the camera is gone"):
        next(run)
    assert not names()


def test_a_frame_that_cannot_be_read_is_reported_in_turn(detector):
    def some():
        first, second = frames(2)
        yield first
        yield Frame(None, name="x", error=UnreadableImage("x is damaged"))
        yield second

    reported = []
    predictor = make_predictor(detector.as_model("off"), threads=2, batch_size=2)
    found = list(predictor.run(some(), lambda frame, error: reported.append((frame.name, str(error)))))
    assert [frame.index for frame, _ in found] == [0, 1]
    assert reported == [("x", "x is damaged")]
    with pytest.raises(UnreadableImage, match="x is damaged"):
        list(predictor.run(some()))
    assert not names()


def test_a_run_that_is_left_ends_its_threads(detector):
    run = make_predictor(detector.as_model("off"), threads=2).run(frames(1000))
    next(run)
    assert names()
    run.close()
    assert not names()


def naive(boxes: np.ndarray, scores: np.ndarray, thresholds: Thresholds, lowest: list[float]) -> list[tuple[int, int]]:
    """Non-maximum suppression of one image in float64: pairs of box and label, by descending score."""
    classes = range(scores.shape[1])
    wanted = classes if thresholds.classes is None else thresholds.classes
    candidates = []
    for point in range(len(boxes)):
        named = classes if thresholds.multi_label else [max(classes, key=lambda c: scores[point, c])]
        candidates += [(scores[point, c], point, c) for c in named if c in wanted and scores[point, c] > lowest[c]]
    kept: list[tuple[float, int, int]] = []
    for score, point, label in sorted(candidates, reverse=True):
        rivals = [other for other in kept if thresholds.class_agnostic or other[2] == label]
        if all(overlap(boxes[point], boxes[other[1]]) <= thresholds.iou for other in rivals):
            kept.append((score, point, label))
    return [(point, label) for _, point, label in kept[: thresholds.max_det]]


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    sides = np.maximum(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0)
    inner = sides.prod()
    return inner / ((a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod() - inner)


@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize("class_agnostic", [False, True])
@pytest.mark.parametrize("classes", [None, (0, 2)])
@pytest.mark.parametrize("score", [0.3, (0.2, 0.6, 0.9)])
def test_thresholds_are_those_of_a_naive_loop(multi_label, class_agnostic, classes, score):
    generator = torch.Generator().manual_seed(1)
    corners = torch.rand(1, 80, 2, generator=generator, dtype=torch.float64) * 50
    boxes = torch.cat((corners, corners + 10 + 30 * torch.rand(1, 80, 2, generator=generator, dtype=torch.float64)), -1)
    scores = torch.rand(1, 80, 3, generator=generator, dtype=torch.float64)
    thresholds = Thresholds(score, 0.4, 25, multi_label, classes, class_agnostic)
    ((found, confidence, labels),) = non_max_suppression(boxes.float(), scores.float(), thresholds)
    lowest = [score] * 3 if isinstance(score, float) else list(score)
    expected = naive(boxes[0].numpy(), scores[0].numpy(), thresholds, lowest)
    assert labels.tolist() == [label for _, label in expected]
    points = [point for point, _ in expected]
    torch.testing.assert_close(found, boxes[0, points].float())
    torch.testing.assert_close(confidence, scores[0, points, labels].float())


def test_scores_and_classes_go_by_name(detector):
    model = detector.as_model("off")
    thresholds = make_predictor(model, {"class1": 0.4, "default": 0.1}, classes=["class2", 0]).thresholds
    assert thresholds.score == (0.1, 0.4, 0.1)
    assert thresholds.classes == (2, 0)
    for options in ({"score": {"cat": 0.1}}, {"score": {"class1": 2}}, {"classes": ["cat"]}, {"classes": [3]}):
        with pytest.raises(DetkitError, match=r"cat|score\.class1=2|class '3'"):
            make_predictor(model, **options)
