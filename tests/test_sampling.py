"""How often images come: against the formulas, and by counting."""

import math
from pathlib import Path

import numpy as np
import pytest

from detkit.config import compose_config, resolve
from detkit.data.annotations import Annotations
from detkit.data.augment.pipeline import AugmentedDataset
from detkit.data.dataset import DetectionDataset
from detkit.data.formats.shapes import read_shapes
from detkit.data.loader import BatchLoader, EpochSampler
from detkit.data.sampling import class_balanced, draw_items, epoch_length, expected_draws, repeat_factors

CLASSES = 4


def annotated(contents: list[list[int]], crowds: tuple[int, ...] = ()) -> Annotations:
    """A set whose images show boxes of these classes; ``crowds`` are rows of boxes."""
    labels = np.array([label for image in contents for label in image], np.int64)
    total = len(labels)
    return Annotations(
        source=Path("made up"),
        paths=[Path(f"{k}.png") for k in range(len(contents))],
        image_ids=np.arange(len(contents)),
        sizes=np.full((len(contents), 2), 32, np.int32),
        offsets=np.cumsum([0, *map(len, contents)]),
        boxes=np.tile(np.array([4.0, 4, 20, 20]), (total, 1)),
        labels=labels,
        areas=np.full(total, 256.0),
        crowd=np.isin(np.arange(total), crowds),
        class_names=tuple("abcd"),
        category_ids=(1, 2, 3, 4),
    )


@pytest.fixture(scope="module")
def long_tail() -> Annotations:
    """400 images: class 0 in nearly all, often twice; 1 in a tenth; 2 in eight; 3 in one; and some without boxes."""
    rng = np.random.default_rng(0)
    contents = [[0] * rng.integers(1, 4) + [1] * (rng.random() < 0.1) for _ in range(400)]
    for k in range(8):
        contents[k * 50].append(2)
    contents[77].append(3)
    for k in range(20):
        contents[10 + 19 * k] = []
    return annotated(contents)


def test_repeat_factors_are_lvis_formula(long_tail):
    threshold, a = 0.2, long_tail
    factors = repeat_factors(*DetectionDataset(a).labels_by_item(), len(a), threshold)
    classes = [set(a.labels[a.offsets[i] : a.offsets[i + 1]].tolist()) for i in range(len(a))]
    share = [sum(c in present for present in classes) / len(a) for c in range(CLASSES)]
    for factor, present in zip(factors, classes, strict=True):
        expected = max((max(1.0, math.sqrt(threshold / share[c])) for c in present), default=1.0)
        assert factor == pytest.approx(expected)
    assert factors.max() == pytest.approx(math.sqrt(0.2 * 400))


def test_class_balance_gives_each_class_as_many_draws(long_tail):
    a = long_tail
    expected = class_balanced(*DetectionDataset(a).labels_by_item(), len(a))
    assert expected.sum() == pytest.approx(len(a))
    classes = [set(a.labels[a.offsets[i] : a.offsets[i + 1]].tolist()) for i in range(len(a))]
    shown = sum(bool(present) for present in classes)
    counts = [sum(c in present for present in classes) for c in range(CLASSES)]
    for value, present in zip(expected, classes, strict=True):  # a class in four, then an image of it
        assert value == pytest.approx(shown * sum(1 / CLASSES / counts[c] for c in present) if present else 1.0)
    only = [i for i, present in enumerate(classes) if present == {0}]
    assert expected[only].max() < 0.3  # a common image comes seldom: the rare ones take its place
    assert np.array_equal(class_balanced(np.zeros(0, int), np.zeros(0, int), 5), np.ones(5))


@pytest.mark.parametrize("seed", range(3))
def test_draws_are_what_is_expected_rounded_down_or_up(seed):
    rng = np.random.default_rng(seed)
    expected = np.concatenate((rng.uniform(0, 3, 60), np.ones(20), [7.25]))
    length = epoch_length(expected)
    assert length == math.floor(expected.sum())
    counts = []
    for epoch in range(2000):
        items, repeats = draw_items(expected, np.random.default_rng((seed, epoch)))
        assert len(items) == length
        counts.append(np.bincount(items, minlength=len(expected)))
        if epoch == 0:
            for k in np.unique(items):
                assert repeats[items == k].tolist() == list(range(counts[0][k]))
    counts = np.array(counts)
    assert (counts >= np.floor(expected)).all()
    assert (counts <= np.ceil(expected)).all()
    fraction = expected % 1
    error = 5 * np.sqrt(fraction * (1 - fraction) / len(counts)) + fraction / fraction.sum()  # less than one draw
    assert (np.abs(counts.mean(0) - expected) <= error).all()
    pairs = np.corrcoef((counts - counts.mean(0))[:, :60].T)
    assert np.abs(pairs[~np.eye(60, dtype=bool)]).max() < 0.25  # neighbours do not exclude each other


def test_the_default_order_is_once_each_and_crowds_do_not_count():
    a = annotated([[0, 1], [0], [2, 3]], crowds=(0, 3))
    dataset = DetectionDataset(a)
    assert [column.tolist() for column in dataset.labels_by_item()] == [[0, 1, 2], [1, 0, 3]]
    for name in (None, "repeat_factor", "class_balanced"):
        expected = expected_draws(dataset, {"sampling": name, "repeat_threshold": 0.001})
        sampler = EpochSampler(3, seed=1, shuffle=True, expected=expected)
        assert sorted(key[1] for key in sampler) == [0, 1, 2]
        assert len(sampler) == 3
    order = np.arange(3)
    np.random.default_rng((1, 0)).shuffle(order)
    assert [key[:3] for key in EpochSampler(3, seed=1)] == [(0, int(index), 0) for index in order]


def test_an_image_drawn_again_looks_different_and_the_same_in_every_process(shapes_root):
    images = DetectionDataset(read_shapes("train", root=str(shapes_root)))
    augment = resolve(compose_config("train", ["augment=light", "~data.preset"]))["augment"]
    dataset = AugmentedDataset(images, 64, augment, 0, 3)
    expected = np.full(len(images), 0.5)
    expected[3] = 8
    epochs = {}
    for workers in (0, 2):
        loader = BatchLoader(dataset, 8, workers=workers, shuffle=True, expected=expected)
        assert len(loader) == 3  # 19.5 draws
        epochs[workers] = [batch for epoch in (0, 1) for batch in loader.epoch(epoch)]
    for one, other in zip(epochs[0], epochs[2], strict=True):
        assert np.array_equal(one.images, other.images)
    first = epochs[0][:3]
    drawn = [(o.index, i.numpy().tobytes()) for batch in first for i, o in zip(batch.images, batch.metas, strict=True)]
    assert len(drawn) == 19
    assert sum(index == 3 for index, _ in drawn) == len({pixels for index, pixels in drawn if index == 3}) == 8
