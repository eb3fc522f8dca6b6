"""Class-aware sampling of the items of a data set.

``labels_by_item()`` of a data set returns two flat arrays, the item of each box and its label. They determine the
expected number of draws of each item per epoch. In each epoch, this number is randomly rounded down or up.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from detkit.data.dataset import DetectionDataset
from detkit.data.tiles import TiledDataset


def expected_draws(dataset: DetectionDataset | TiledDataset, data: Mapping[str, Any]) -> np.ndarray | None:
    """Return the expected draws of each item per epoch under ``data.sampling``, (N,) float64; None for once each."""
    sampling = data.get("sampling")
    if sampling == "repeat_factor":
        return repeat_factors(*dataset.labels_by_item(), len(dataset), data.get("repeat_threshold", 0.001))
    if sampling == "class_balanced":
        return class_balanced(*dataset.labels_by_item(), len(dataset))
    return None


def repeat_factors(items: np.ndarray, labels: np.ndarray, length: int, threshold: float) -> np.ndarray:
    """Return LVIS' repeat factor of each item (Gupta et al., arXiv 1908.03195), (length,), 1 or more.

    A class c in a fraction f(c) of the items has r(c) = max(1, sqrt(threshold / f(c))); an item has the largest r(c) of
    its classes. The epoch grows by the repeated items of classes rarer than ``threshold``.

    Args:
        items: (T,) item of each box.
        labels: (T,) label of each box.
        length: number of items.
        threshold: frequency below which a class is oversampled.
    """
    items, labels = _item_classes(items, labels)
    frequency = np.bincount(labels) / length
    factor = np.sqrt(threshold / np.maximum(frequency, 1 / length)).clip(min=1)
    expected = np.ones(length)
    np.maximum.at(expected, items, factor[labels])
    return expected


def class_balanced(items: np.ndarray, labels: np.ndarray, length: int) -> np.ndarray:
    """Return the expected draws of each item for class-balanced sampling, (length,).

    Each draw samples one of the occurring classes, then one of the items that contain it, both uniformly (class-aware
    sampling, Shen et al., arXiv 1512.05830). All classes have equally many draws, but a common class also occurs in
    images drawn for others. Items without boxes are drawn once per epoch, and the length of the epoch is unchanged. A
    class in few items repeats each of them often: ``repeat_factor`` is gentler.

    Args:
        items: (T,) item of each box.
        labels: (T,) label of each box.
        length: number of items.
    """
    items, labels = _item_classes(items, labels)
    counts = np.bincount(labels)
    weights = np.bincount(items, weights=1 / counts[labels], minlength=length)
    shown = weights > 0
    return np.where(shown, weights * (shown.sum() / max(weights.sum(), 1e-9)), 1.0)


def epoch_length(expected: np.ndarray) -> int:
    """Return the number of draws per epoch: the sum of the expected draws, rounded down."""
    return int(np.floor(expected.sum() + 1e-6))


def draw_items(expected: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw ``L = epoch_length(expected)`` items for one epoch.

    Stochastic rounding: each item is drawn ``floor(expected)`` times, and once more with the probability of the
    fractional part. Systematic sampling keeps the total constant. (The fractions are scaled down to sum to an integer,
    which costs less than one draw per epoch.)

    Args:
        expected: (N,) expected draws of each item.
        rng: random generator.

    Returns:
        the items in ascending order (L,), and the number of each draw among those of its item, from 0 (L,).
    """
    whole = np.floor(expected)
    order = rng.permutation(len(expected))  # otherwise neighbours would exclude each other
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
    """Return the unique pairs of an item and a class, (P,) each."""
    classes = int(labels.max(initial=0)) + 1
    pairs = np.sort(items.astype(np.int64) * classes + labels)
    pairs = pairs[np.diff(pairs, prepend=-1) > 0]  # np.unique takes thirty times as long
    return pairs // classes, pairs % classes
