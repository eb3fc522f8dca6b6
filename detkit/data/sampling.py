"""How often each item of a data set is seen in an epoch.

A data set says by ``labels_by_item()`` which classes its items show, as two flat arrays: the item of each box, and its
label. From that comes the number of times that each item is expected in an epoch, and from that, each epoch anew, how
many times it does come: the number rounded down or up.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from detkit.data.dataset import DetectionDataset
from detkit.data.tiles import TiledDataset


def expected_draws(dataset: DetectionDataset | TiledDataset, data: Mapping[str, Any]) -> np.ndarray | None:
    """Return how often each item is expected in an epoch, (N,) float64, by ``data.sampling``; None for once each."""
    sampling = data.get("sampling")
    if sampling == "repeat_factor":
        return repeat_factors(*dataset.labels_by_item(), len(dataset), data.get("repeat_threshold", 0.001))
    if sampling == "class_balanced":
        return class_balanced(*dataset.labels_by_item(), len(dataset))
    return None


def repeat_factors(items: np.ndarray, labels: np.ndarray, length: int, threshold: float) -> np.ndarray:
    """Return LVIS' repeat factor of each of ``length`` items (Gupta et al., arXiv 1908.03195), (N,), 1 or more.

    A class c that a share f(c) of the items show has r(c) = max(1, sqrt(threshold / f(c))); an item has the largest
    r(c) of its classes. So the epoch gets longer, by the items of the classes rarer than ``threshold``.
    """
    items, labels = _item_classes(items, labels)
    frequency = np.bincount(labels) / length
    factor = np.sqrt(threshold / np.maximum(frequency, 1 / length)).clip(min=1)
    expected = np.ones(length)
    np.maximum.at(expected, items, factor[labels])
    return expected


def class_balanced(items: np.ndarray, labels: np.ndarray, length: int) -> np.ndarray:
    """Return how often each of ``length`` items is expected where every class comes equally often, (N,).

    As if each draw chose one of the classes that occur, and then one of the items that show it, both uniformly
    (class-aware sampling, Shen et al., arXiv 1512.05830). What is equal is the number of draws for a class: a common
    class still gains from being in the pictures of others. Items without boxes come once an epoch, as ever; the epoch
    stays as long as it was. A class in few items repeats each of them often: ``repeat_factor`` is gentler.
    """
    items, labels = _item_classes(items, labels)
    counts = np.bincount(labels)
    weights = np.bincount(items, weights=1 / counts[labels], minlength=length)
    shown = weights > 0
    return np.where(shown, weights * (shown.sum() / max(weights.sum(), 1e-9)), 1.0)


def epoch_length(expected: np.ndarray) -> int:
    """Return the number of draws of every epoch: the sum of what is expected, rounded down."""
    return int(np.floor(expected.sum() + 1e-6))


def draw_items(expected: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw the items of one epoch, in ascending order; ``epoch_length(expected)`` of them.

    Every item comes as often as expected rounded down, or once more: with the probability of the fraction, as in
    stochastic rounding, but drawn systematically, so that the number of all draws does not vary. (The fractions
    are shrunk together to sum to a whole number, which costs an epoch less than one draw.)

    Returns:
        the items (L,), and which draw of its item each is: 0, 1, 2, ... (L,).
    """
    whole = np.floor(expected)
    order = rng.permutation(len(expected))  # else neighbours would exclude each other
    fractions = (expected - whole)[order]
    extra = epoch_length(expected) - int(whole.sum())
    steps = np.cumsum(fractions)
    steps *= extra / max(steps[-1], 1e-9)
    steps[-1] = extra
    passed = np.floor(steps + rng.random()).astype(np.int64)
    counts = whole.astype(np.int64)
    counts[order] += np.diff(passed, prepend=0)
    items = np.repeat(np.arange(len(expected)), counts)
    return items, np.arange(len(items)) - np.repeat(np.cumsum(counts) - counts, counts)


def _item_classes(items: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return each pair of an item and a class once."""
    classes = int(labels.max(initial=0)) + 1
    pairs = np.sort(items.astype(np.int64) * classes + labels)
    pairs = pairs[np.diff(pairs, prepend=-1) > 0]  # np.unique takes thirty times as long
    return pairs // classes, pairs % classes
