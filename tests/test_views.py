"""Tiles, test-time augmentation and merging, against naive loops and a model whose answer is known."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from detkit.errors import DetkitError, UnreadableImage
from detkit.inference.frames import Frame
from detkit.inference.merge import MERGES, Candidates, _cut_by, merge_nmm, merge_nms, merge_views, merge_wbf
from detkit.inference.predictor import Predictor, make_predictor
from detkit.inference.views import ViewSettings, make_views
from detkit.ops.boxes import pairwise_overlap
from detkit.ops.nms import Thresholds


class WhiteBox:
    """A model that finds the bounding box of the white pixels; it records the batches that it was given."""

    class_names = ("white",)
    image_size = 128
    max_stride = 32
    device = torch.device("cpu")
    fixed_shape = (None, None, None)

    def __init__(self):
        self.batches = []

    def detect(self, images, thresholds):
        self.batches.append(tuple(images.shape))
        found = []
        for image in images:
            y, x = torch.nonzero((image > 200).all(0), as_tuple=True)
            box = [x.min(), y.min(), x.max() + 1, y.max() + 1] if len(x) else []
            boxes = torch.tensor(box, dtype=torch.float32).reshape(-1, 4)
            found.append((boxes, torch.full((len(boxes),), 0.9), torch.zeros(len(boxes), dtype=torch.int64)))
        return found


def scene(height, width, box):
    image = np.zeros((height, width, 3), np.uint8)
    x1, y1, x2, y2 = box
    image[y1:y2, x1:x2] = 255
    return image


@pytest.mark.parametrize("rect", [False, True])
@pytest.mark.parametrize("tta", [False, True])
@pytest.mark.parametrize("tiles", [None, 128])
def test_boxes_return_to_the_pixels_of_the_frame(tiles, tta, rect):
    box = (300, 200, 364, 248)  # larger than the overlap of the tiles
    frames = [Frame(None, scene(400, 640, box)), Frame(None, scene(90, 70, (10, 20, 30, 50)))]
    predictor = make_predictor(WhiteBox(), tiles=tiles, tta=tta, rect=rect, batch_size=3)
    (_, large), (_, small) = predictor.run(frames)
    assert large.size == (400, 640)
    assert pairwise_overlap(large.boxes[:1], torch.tensor([box]))[0, 0] > 0.75  # a pixel of the input is 5 of the frame
    assert pairwise_overlap(small.boxes[:1], torch.tensor([[10, 20, 30, 50]]))[0, 0] > 0.9
    if tiles is None:
        assert len(large) == len(small) == 1


def test_tiles_cover_the_image_and_come_after_the_whole():
    image = np.random.default_rng(0).integers(0, 256, (300, 500, 3), dtype=np.uint8)
    views = make_views(image, ViewSettings(128, tiles=128, overlap=0.25))
    assert views[0].window == pytest.approx((0, -100, 500, 400), abs=4)  # letterboxed to a square
    covered = np.zeros((300, 500), int)
    for view in views[1:]:
        x1, y1, x2, y2 = (round(v) for v in view.window)
        assert np.array_equal(view.pixels, image[y1:y2, x1:x2])  # at full resolution
        covered[y1:y2, x1:x2] += 1
    assert covered.min() >= 1
    assert len(make_views(image[:100, :100], ViewSettings(128, tiles=128))) == 1


def random_candidates(n, seed):
    generator = torch.Generator().manual_seed(seed)
    corner, size = torch.rand(n, 2, generator=generator) * 50, 5 + torch.rand(n, 2, generator=generator) * 30
    scores = torch.rand(n, generator=generator).sort(descending=True).values
    labels = torch.randint(0, 2, (n,), generator=generator)
    is_cut = torch.rand(n, generator=generator) < 0.3
    return Candidates(torch.cat((corner, corner + size), 1), scores, labels, torch.full((n,), 3), is_cut)


def overlap(a, b, over):
    """Naive, in float64."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0) * max(height, 0)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return shared / (min(areas) if over == "smaller" else sum(areas) - shared)


@pytest.mark.parametrize("seed", range(4))
def test_overlaps_and_merges_equal_naive_loops(seed):
    found = random_candidates(60, seed)
    boxes, scores = found.boxes.double().tolist(), found.scores.double().tolist()
    labels, cut = found.labels.tolist(), found.is_cut.tolist()
    for over in ("union", "smaller"):
        expected = torch.tensor([[overlap(a, b, over) for b in boxes] for a in boxes])
        torch.testing.assert_close(pairwise_overlap(found.boxes, found.boxes, over), expected.float())

    kept, merged, free = [], [], set(range(60))
    for k in range(60):
        if k not in free:
            continue
        hull = list(boxes[k])
        for j in sorted(free):
            same = labels[j] == labels[k]
            part = (cut[j] or cut[k]) and overlap(boxes[k], boxes[j], "smaller") > 0.5
            if same and (part or overlap(boxes[k], boxes[j], "union") > 0.6):
                free.discard(j)
                if cut[k] and cut[j] and part and scores[j] > scores[k] / 2:
                    b = boxes[j]
                    hull = [min(hull[0], b[0]), min(hull[1], b[1]), max(hull[2], b[2]), max(hull[3], b[3])]
        kept.append(k)
        merged.append(hull)
    result, confidence, first = merge_nmm(found, 0.6)
    assert first.tolist() == kept
    torch.testing.assert_close(result, torch.tensor(merged).float())
    torch.testing.assert_close(confidence, found.scores[kept])

    kept = []
    for k in range(60):
        if all(labels[j] != labels[k] or overlap(boxes[j], boxes[k], "union") <= 0.6 for j in kept):
            kept.append(k)
    assert merge_nms(found, 0.6)[2].tolist() == kept


@pytest.mark.parametrize("seed", range(4))
def test_weighted_boxes_fusion_equals_a_naive_loop(seed):
    found = random_candidates(50, seed)
    boxes, scores, labels = found.boxes.double().numpy(), found.scores.double().numpy(), found.labels.numpy()
    clusters = []  # [members, fused box]
    for k in range(50):
        same = [c for c in clusters if labels[c[0][0]] == labels[k]]
        best = max(same, key=lambda c: overlap(c[1], boxes[k], "union"), default=None)
        if best is not None and overlap(best[1], boxes[k], "union") > 0.55:
            best[0].append(k)
            best[1] = np.average(boxes[best[0]], axis=0, weights=scores[best[0]])
        else:
            clusters.append([[k], boxes[k]])
    fused = [(scores[members].mean() * min(len(members) / 3, 1), box) for members, box in clusters]
    fused.sort(key=lambda pair: -pair[0])
    result, confidence, _ = merge_wbf(found, 0.6)
    torch.testing.assert_close(confidence.double().numpy(), np.array([s for s, _ in fused]), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(result.double().numpy(), np.stack([b for _, b in fused]), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("merge", MERGES)
def test_merging_nothing_and_one(merge):
    empty = (torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    one = (torch.tensor([[1.0, 2, 30, 40]]), torch.tensor([0.5]), torch.tensor([1]))
    windows = [(0.0, 0.0, 100.0, 100.0)] * 2
    assert len(merge_views([empty, empty], windows, (100, 100), merge, Thresholds())[1]) == 0
    boxes, scores, labels = merge_views([one, one], windows, (100, 100), merge, Thresholds())
    torch.testing.assert_close(boxes, one[0])
    assert scores.tolist() == [0.5]
    assert labels.tolist() == [1]


def test_a_box_at_the_border_of_the_image_is_not_cut_by_rounding():
    image = scene(777, 1333, (0, 0, 1, 1))
    windows = [view.window for view in make_views(image, ViewSettings(320, tiles=500))]
    last = torch.tensor([[1300.0, 740, 1333, 777]])
    assert not any(_cut_by(window, (777, 1333), last) for window in windows if window[2] > 1332 and window[3] > 776)


def test_more_tiles_than_fit_into_memory_are_refused():
    with pytest.raises(DetkitError, match="tiles=32"):
        make_views(scene(4000, 6000, (0, 0, 1, 1)), ViewSettings(640, tiles=32))


def test_classes_merge_only_if_asked():
    views = [(torch.tensor([[0.0, 0, 50, 50]]), torch.tensor([s]), torch.tensor([c])) for c, s in ((0, 0.6), (1, 0.8))]
    windows = [(0.0, 0.0, 100.0, 100.0)] * 2
    for merge, agnostic in itertools.product(MERGES, (False, True)):
        thresholds = replace(Thresholds(), class_agnostic=agnostic)
        labels = merge_views(views, windows, (100, 100), merge, thresholds)[2]
        assert labels.tolist() == ([1] if agnostic else [1, 0])


def test_an_object_cut_by_a_tile_is_reported_once():
    """A circle of cells' size between two tiles: plain suppression keeps the part, merging drops it."""
    whole = (torch.tensor([[90.0, 10, 150, 70]]), torch.tensor([0.9]), torch.tensor([0]))
    part = (torch.tensor([[90.0, 10, 128, 70]]), torch.tensor([0.7]), torch.tensor([0]))  # ends at x = 128
    windows = [(80.0, 0.0, 208.0, 128.0), (0.0, 0.0, 128.0, 128.0)]
    assert len(merge_views([whole, part], windows, (128, 208), "nms", Thresholds(iou=0.7))[1]) == 2
    boxes, scores, _ = merge_views([whole, part], windows, (128, 208), "nmm", Thresholds(iou=0.7))
    assert boxes.tolist() == [[90, 10, 150, 70]]
    assert scores.tolist() == pytest.approx([0.9])


def test_order_batches_and_broken_frames(tmp_path):
    """Frames of two shapes come back in order, however they were batched; one that cannot be read is left out."""
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    boxes = [(k + 10, 20, k + 40, 60) for k in range(11)]
    frames = [Frame(None, scene(*((100, 120) if k % 3 else (120, 80)), box), index=k) for k, box in enumerate(boxes)]
    frames.insert(4, Frame(tmp_path / "broken.jpg", index=99))
    for batch_size, threads in itertools.product((1, 4, 64), (0, 2)):
        model, broken = WhiteBox(), []
        predictor = make_predictor(model, batch_size=batch_size, rect=True, threads=threads)
        results = list(predictor.run(frames, lambda frame, _, broken=broken: broken.append(frame.index)))
        assert [frame.index for frame, _ in results] == [*range(11)]
        assert broken == [99]
        for (_, found), box in zip(results, boxes, strict=True):
            torch.testing.assert_close(found.boxes, torch.tensor([box]).float(), atol=1.5, rtol=0)
        assert max(batch[0] for batch in model.batches) <= batch_size
        with pytest.raises(UnreadableImage):
            list(predictor.run(frames))


def test_memory_is_bounded_and_a_closed_stream_reads_no_more():
    alive, read = set(), 0

    def endless():
        nonlocal read
        for k in itertools.count():
            read += 1
            yield Frame(None, np.zeros((32, 32, 3), np.uint8), index=k)

    for threads in (0, 2):
        read = 0
        stream = make_predictor(WhiteBox(), batch_size=4, threads=threads).run(endless())
        for frame, _ in itertools.islice(stream, 200):
            alive.add(frame.index)
            assert read - frame.index < 40
        stream.close()
        stopped = read
        assert stopped < 300
    assert len(alive) == 200


def test_an_error_of_the_source_is_raised_after_its_frames():
    def source():
        yield Frame(None, np.zeros((32, 32, 3), np.uint8))
        raise DetkitError("the camera is gone")

    for threads in (0, 2):
        stream = make_predictor(WhiteBox(), threads=threads).run(source())
        next(stream)
        with pytest.raises(DetkitError, match="camera"):
            next(stream)


@pytest.mark.parametrize(
    "options",
    [
        {"merge": "mean"},
        {"score": 1.5},
        {"score": {"black": 0.5}},
        {"classes": [3]},
        {"classes": ["black"]},
        {"iou": -1},
    ],
)
def test_invalid_options_are_refused(options):
    with pytest.raises(DetkitError):
        make_predictor(WhiteBox(), **options)


def test_a_model_of_one_size_takes_no_other():
    model = WhiteBox()
    model.fixed_shape = (1, 128, 128)
    assert isinstance(make_predictor(model), Predictor)
    for options in ({"image_size": 256}, {"rect": True}, {"tta": True}):
        with pytest.raises(DetkitError):
            make_predictor(model, **options)
