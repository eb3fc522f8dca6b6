"""Copy-paste augmentation with boxes: objects of one image are pasted into another.

Ghiasi et al. (arXiv 2012.07177) paste segmented objects; Kisantal et al. (arXiv 1902.07296) paste several copies of
small objects without occluding others. Here, the content of a box is pasted including its background. Its edges are not
blurred, as Kisantal et al. found that this does not help.
"""

import numpy as np

from detkit.data.augment.mosaic import clip_boxes
from detkit.structures import Sample

MAX_HIDDEN = 0.3  # fraction of a box that all pastes together may occlude
MIN_SHOWN = 0.5  # visible fraction of another object in a crop from which it is labelled
TRIES = 10  # random positions per object; if none is suitable, it is left out


def paste_objects(
    sample: Sample, donor: Sample, rng: np.random.Generator, *, max_objects: int, max_side: float
) -> Sample:
    """Paste crops of the donor's boxes into the sample at random positions inside the image.

    One to ``max_objects`` boxes are drawn from the donor with replacement. Crops move by integer pixels, so that boxes
    match the pasted pixels exactly. Other objects with at least MIN_SHOWN of their area in a crop are labelled, clipped
    to the crop. At most MAX_HIDDEN of the area of any box, including pasted ones, is occluded.

    Args:
        sample: to paste into.
        donor: the other image; may be the sample itself.
        rng: random generator.
        max_objects: maximum number of pasted objects.
        max_side: maximum side of pasted boxes as a fraction of the sample's longer side.
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
    hidden = np.zeros(len(boxes))  # occluded fraction of each box; overlaps of pastes count twice
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
    """Return the fraction of each of (N, 4) boxes that each of (P, 4) places covers, (P, N)."""
    low = np.maximum(places[:, None, :2], boxes[None, :, :2])
    high = np.minimum(places[:, None, 2:], boxes[None, :, 2:])
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    return (high - low).clip(0).prod(2) / np.maximum(area, 1e-9)
