"""Copy-paste and mixup: what is drawn is found again where the boxes say it is."""

from pathlib import Path

import numpy as np
import pytest

from detkit.data.augment.copy_paste import MAX_HIDDEN, paste_objects
from detkit.data.augment.mixup import mixup
from detkit.structures import ImageMeta, Sample


def drawn(rng: np.random.Generator, count: int, first: int, size: int = 128, side: int = 30) -> Sample:
    """A black image with up to ``count`` rectangles that do not touch; each has a gray of its own, ``first`` on."""
    image = np.zeros((size, size, 3), np.uint8)
    boxes, labels = [], []
    for k in range(count):
        w, h = rng.integers(6, side, 2)
        x, y = rng.integers(0, size - side, 2)
        if not image[max(y - 2, 0) : y + h + 2, max(x - 2, 0) : x + w + 2].any():
            image[y : y + h, x : x + w] = first + k
            boxes.append((x, y, x + w, y + h))
            labels.append(first + k)
    return Sample(image, np.array(boxes, np.float32), np.array(labels), ImageMeta(0, Path("drawn"), (size, size)))


@pytest.mark.parametrize("seed", range(20))
def test_pasted_boxes_are_where_their_pixels_are(seed):
    rng = np.random.default_rng(seed)
    sample, donor = drawn(rng, 6, 10), drawn(rng, 6, 100)
    before = sample.image.copy()
    result = paste_objects(sample, donor, rng, max_objects=8, max_side=1.0)
    assert np.array_equal(sample.image, before)
    old = len(sample.boxes)
    assert np.array_equal(result.boxes[:old], sample.boxes)
    assert 0 < len(result.boxes) - old <= 8
    assert result.boxes.dtype == np.float32
    assert set(result.labels[old:]) <= set(donor.labels)
    for box, label in zip(result.boxes, result.labels, strict=True):
        x1, y1, x2, y2 = box.astype(int)
        own = (result.image[y1:y2, x1:x2, 0] == label).mean()
        assert own >= 1 - MAX_HIDDEN, (label, own)
        if label >= 100:
            w, h = next((b[2:] - b[:2]) for b, d in zip(donor.boxes, donor.labels, strict=True) if d == label)
            assert (x2 - x1, y2 - y1) == (w, h)
    found = np.isin(result.image[..., 0], donor.labels)  # nothing is pasted without a box
    for box in result.boxes[old:].astype(int):
        found[box[1] : box[3], box[0] : box[2]] = False
    assert not found.any()


def test_only_small_boxes_are_pasted_and_one_object_in_several_copies():
    rng = np.random.default_rng(0)
    donor = Sample(np.full((128, 128, 3), 7, np.uint8), np.array([[3, 3, 9.5, 9], [20, 20, 90, 90]], np.float32),
                   np.array([1, 2]), ImageMeta(1, Path("donor"), (128, 128)))  # fmt: skip
    blank = Sample(np.zeros((128, 128, 3), np.uint8), np.zeros((0, 4), np.float32), np.zeros(0, np.int64),
                   ImageMeta(0, Path("drawn"), (128, 128)))  # fmt: skip
    counts = []
    for _ in range(50):
        result = paste_objects(blank, donor, rng, max_objects=6, max_side=0.1)
        assert set(result.labels) == {1}
        np.testing.assert_array_equal(
            result.boxes[:, 2:] - result.boxes[:, :2], np.full((len(result.boxes), 2), (6.5, 6))
        )
        counts.append(len(result.boxes))
    assert max(counts) > 3
    assert min(counts) == 1
    assert paste_objects(blank, donor, rng, max_objects=6, max_side=0.01) is blank
    assert paste_objects(donor, blank, rng, max_objects=6, max_side=1.0) is donor


def test_many_pastes_together_hide_no_box():
    """An image full of one large box: forty pastes may hide three tenths of it, all together."""
    rng = np.random.default_rng(0)
    image = np.full((64, 64, 3), 1, np.uint8)
    sample = Sample(image, np.array([[0, 0, 64, 64]], np.float32), np.array([1]), ImageMeta(0, Path("a"), (64, 64)))
    donor = Sample(
        image * 9, np.array([[-4, -4, 16, 16]], np.float32), np.array([9]), ImageMeta(0, Path("b"), (64, 64))
    )
    result = paste_objects(sample, donor, rng, max_objects=40, max_side=1.0)
    assert len(result.boxes) > 1
    assert (result.image == 9).mean() <= MAX_HIDDEN
    assert (result.boxes[1:, 2:] - result.boxes[1:, :2]).max() == 16  # what stood out of the donor was clipped


@pytest.mark.parametrize(("alpha", "spread"), [(32.0, 0.062), (1.0, 0.289)])
def test_mixup_blends_the_pixels_and_keeps_all_boxes(alpha, spread):
    rng = np.random.default_rng(0)
    a, b = drawn(rng, 3, 10), drawn(rng, 3, 100)
    a.image[0, 0], b.image[0, 0] = 200, 0
    shares = []
    for _ in range(500):
        result = mixup(a, b, rng, alpha)
        shares.append(result.image[0, 0, 0] / 200)
    assert np.mean(shares) == pytest.approx(0.5, abs=0.03)
    assert np.std(shares) == pytest.approx(spread, rel=0.15)  # of Beta(a, a): sqrt(1 / (4 (2a + 1)))
    expected = shares[-1] * a.image.astype(float) + (1 - shares[-1]) * b.image
    assert np.abs(result.image - expected).max() <= 1.3
    assert np.array_equal(result.boxes, np.concatenate((a.boxes, b.boxes)))
    assert result.labels.tolist() == [*a.labels, *b.labels]
