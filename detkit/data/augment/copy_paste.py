"""Copy-paste of boxes: objects of one picture pasted into another.

Ghiasi et al. (arXiv 2012.07177) paste along masks, Kisantal et al. (arXiv 1902.07296) several copies of small objects,
at places where they hide no other. There are only boxes here, so a crop is pasted with what is around the object in
its box. Its edges are left sharp: Kisantal et al. found that blurring them does not help.
"""

import numpy as np

from detkit.data.augment.mosaic import clip_boxes
from detkit.structures import Sample

MAX_HIDDEN = 0.3  # share of a box that all pastes together may hide
MIN_SHOWN = 0.5  # share of a neighbour that must show in a crop to be labelled there
TRIES = 10  # random places for each object; where none will do, it is left out


def paste_objects(
    sample: Sample, donor: Sample, rng: np.random.Generator, *, max_objects: int, max_side: float
) -> Sample:
    """Paste crops of the donor's boxes into the sample, each at a random place wholly inside the picture.

    One to ``max_objects`` boxes are drawn from the donor, again and again the same where it has few. A crop moves by
    whole pixels, so a box comes out exactly where its pixels are. Another object of which half or more shows in a
    crop is labelled too, clipped to it. No box of the sample, pasted ones included, ends up hidden by more than
    MAX_HIDDEN of its area.

    Args:
        donor: the other picture; the sample itself will do.
        max_side: paste boxes whose sides are at most this share of the sample's longer side.
    """
    height, width = sample.image.shape[:2]
    donor_boxes, keep = clip_boxes(donor.boxes, np.array((0, 0, *donor.image.shape[1::-1])))
    donor_labels = donor.labels[keep]
    low, high = np.floor(donor_boxes[:, :2]).astype(int), np.ceil(donor_boxes[:, 2:]).astype(int)
    limit = np.minimum(max_side * max(height, width), (width, height))
    chosen = np.flatnonzero((high - low <= limit).all(1))
    if not chosen.size:
        return sample
    image, boxes, labels = sample.image.copy(), sample.boxes, sample.labels
    hidden = np.zeros(len(boxes))  # share of each box, where pastes overlap counted twice
    for k in rng.choice(chosen, rng.integers(1, max_objects + 1)):
        extent = high[k] - low[k]
        corners = rng.integers(0, (width, height) - extent + 1, (TRIES, 2))
        covered = _covered_fraction(np.concatenate((corners, corners + extent), 1), boxes)
        free = (hidden + covered <= MAX_HIDDEN).all(1)
        if not free.any():
            continue
        place = int(free.argmax())
        (x, y), (w, h) = corners[place], extent
        image[y : y + h, x : x + w] = donor.image[low[k, 1] : high[k, 1], low[k, 0] : high[k, 0]]
        crop = np.concatenate((low[k], high[k]))
        shown = _covered_fraction(crop[None], donor_boxes)[0] >= MIN_SHOWN
        pasted, keep = clip_boxes(donor_boxes[shown], crop)
        boxes = np.concatenate((boxes, pasted + np.tile(corners[place] - low[k], 2)))
        labels = np.concatenate((labels, donor_labels[shown][keep]))
        hidden = np.concatenate((hidden + covered[place], np.zeros(len(pasted))))
    return Sample(image, boxes.astype(np.float32), labels, sample.meta)


def _covered_fraction(places: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Return the share of each of (N, 4) boxes that each of (P, 4) places covers, (P, N)."""
    low = np.maximum(places[:, None, :2], boxes[None, :, :2])
    high = np.minimum(places[:, None, 2:], boxes[None, :, 2:])
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    return (high - low).clip(0).prod(2) / np.maximum(area, 1e-9)
