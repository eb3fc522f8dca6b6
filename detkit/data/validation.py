"""Vectorized validation of images and boxes: keep, fix or skip."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from detkit.data.image_probe import (
    ALPHA,
    CMYK,
    DEEP,
    GRAY,
    MISSING,
    ORIENTATION_SHIFT,
    ROTATED,
    TRUNCATED,
    UNREADABLE,
    UNUSABLE,
    why_unreadable,
)
from detkit.data.issues import IssueLog

PIXEL_TOLERANCE = 1.0  # by which a box may exceed its image without being reported, for rounding
NORMALISED_TOLERANCE = 1e-3  # the same for normalised values
ASPECT_TOLERANCE = 0.02  # relative difference in aspect ratio of a resized image
ISSUES_OF_FLAGS = {
    MISSING: ("missing_image", "the file does not exist"),
    UNREADABLE: ("unreadable_image", ""),  # why: see image_probe.why_unreadable
    TRUNCATED: ("truncated_image", "the file ends before the image data"),
    ROTATED: ("exif_rotated", "rotated by its EXIF orientation"),
    GRAY: ("gray_image", "gray"),
    DEEP: ("deep_image", "more than 8 bits per channel"),
    CMYK: ("cmyk_image", "CMYK"),
    ALPHA: ("alpha_image", "has transparency"),
}


@dataclass
class ImageValidation:
    """The validation of N images, and the transforms of their boxes.

    Attributes:
        usable: (N,) bool.
        first_index: (N,) int64, the first index of the same file, which gets the boxes of its duplicates.
        scale: (N, 2) factors in x and y by which an image was resized after labelling, usually 1.
        is_rotated: (N,) bool, whether the boxes refer to the image without its EXIF orientation.
        stored: (N, 2) height and width without the EXIF orientation.
        orientation: (N,) EXIF orientation.
    """

    usable: np.ndarray
    first_index: np.ndarray
    scale: np.ndarray
    is_rotated: np.ndarray
    stored: np.ndarray
    orientation: np.ndarray

    def to_upright(self, image_of: np.ndarray, boxes: np.ndarray, areas: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Transform (T, 4) boxes and (T,) areas of the images ``image_of`` (T,) to the upright image."""
        if (self.scale != 1).any():
            factors = self.scale[image_of]
            boxes, areas = boxes * np.tile(factors, 2), areas * factors.prod(1)
        rows = np.flatnonzero(self.is_rotated[image_of])
        if rows.size:
            images = image_of[rows]
            boxes = boxes.copy()
            boxes[rows] = orient_boxes(boxes[rows], self.stored[images], self.orientation[images])
        return boxes, areas


def validate_images(paths: Sequence[str], probes: np.ndarray, stated: np.ndarray, log: IssueLog) -> ImageValidation:
    """Decide which images are usable, and how to transform the boxes of images whose size differs from their labels.

    If the stated size is that without the EXIF orientation, the boxes are rotated. If the aspect ratio matches, the
    image was resized after labelling, and the boxes are scaled. Otherwise the image is skipped.

    Args:
        paths: of the N images.
        probes: (N, 5) int32 of ``image_probe.probe``.
        stated: (N, 2) height and width according to the labels, 0 if they do not say.
        log: receives the problems.
    """
    sizes, stored, flags = probes[:, :2], probes[:, 2:4], probes[:, 4]
    for bit, (kind, message) in ISSUES_OF_FLAGS.items():

        def describe_flag(k: int, message: str = message) -> tuple[str, None, str]:
            return paths[k], None, message or why_unreadable(paths[k])

        log.extend(kind, np.flatnonzero(flags & bit), describe_flag)
    positions, first_index = np.arange(len(paths)), _first_indices(paths)
    first = first_index == positions
    log.extend("repeated_image", np.flatnonzero(~first), lambda k: (paths[k], None, "listed before"))
    readable = (flags & UNUSABLE) == 0

    differs = readable & (stated > 0).all(1) & (stated != sizes).any(1)
    is_rotated = differs & (flags & ROTATED > 0) & (stated == stored).all(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        scale = sizes / stated
        resized = differs & ~is_rotated & (np.abs(scale[:, 0] / scale[:, 1] - 1) < ASPECT_TOLERANCE)
    contradicting = differs & ~is_rotated & ~resized

    def describe(k: int) -> tuple[str, None, str]:
        (h, w), (stated_h, stated_w) = sizes[k], stated[k]
        return paths[k], None, f"is {w}x{h} pixels, its labels state {stated_w}x{stated_h}"

    log.extend("stated_size", np.flatnonzero(is_rotated | resized), describe)
    log.extend("contradicting_size", np.flatnonzero(contradicting), describe)
    scale = np.where(resized[:, None], scale[:, ::-1], 1.0)
    usable = readable & first & ~contradicting
    first_index = np.where(contradicting, positions, first_index)  # boxes of skipped images are dropped
    return ImageValidation(usable, first_index, scale, is_rotated, stored, flags >> ORIENTATION_SHIFT)


def orient_boxes(boxes: np.ndarray, stored: np.ndarray, orientation: np.ndarray) -> np.ndarray:
    """Apply EXIF ``orientation`` (T,), 5 to 8, to (T, 4) xyxy boxes of images of size ``stored``, (T, 2)."""
    x, y = boxes[:, 0::2], boxes[:, 1::2]
    height, width = stored[:, :1], stored[:, 1:]
    new_x = np.where(np.isin(orientation, (6, 7))[:, None], height - y, y)
    new_y = np.where(np.isin(orientation, (7, 8))[:, None], width - x, x)
    return np.stack((new_x.min(1), new_y.min(1), new_x.max(1), new_y.max(1)), 1)


def validate_boxes(
    boxes: np.ndarray,
    labels: np.ndarray,
    image_of: np.ndarray,
    sizes: np.ndarray,
    normalised: bool,
    locate: Callable[[int], tuple[object, int | None, str]],
    log: IssueLog,
) -> tuple[np.ndarray, np.ndarray]:
    """Clip boxes to their images, and decide which are usable.

    Args:
        boxes: (T, 4) finite xyxy, in pixels, or in 0..1 if ``normalised``.
        labels: (T,).
        image_of: (T,) image of each box.
        sizes: (N, 2) height and width of the images.
        normalised: whether boxes are in 0..1.
        locate: maps the index of a box to its file, its line and the start of a message.
        log: receives the problems.

    Returns:
        the clipped boxes in pixels (T, 4), and whether to keep them (T,) bool.
    """
    original = boxes

    def report(kind: str, mask: np.ndarray, message: str) -> None:
        def describe(k: int) -> tuple[object, int | None, str]:
            file, line, intro = locate(k)
            return file, line, f"{intro}[{', '.join(f'{v:g}' for v in original[k])}] {message}"

        log.extend(kind, np.flatnonzero(mask), describe)

    height, width = sizes.T.astype(np.float64)[:, image_of]
    if normalised:
        out_of_range = ((boxes < -NORMALISED_TOLERANCE) | (boxes > 1 + NORMALISED_TOLERANCE)).any(1)
        boxes = boxes * np.stack((width, height, width, height), 1)
    clipped = np.empty_like(boxes)
    for side, limit in enumerate((width, height, width, height)):
        np.clip(boxes[:, side], 0, limit, out=clipped[:, side])
    w, h = (boxes[:, 2:] - boxes[:, :2]).T
    visible_w, visible_h = (clipped[:, 2:] - clipped[:, :2]).T
    flat = (w <= 0) | (h <= 0)
    report("degenerate_box", flat, "(x1, y1, x2, y2) has no area")
    outside = ~flat & ((visible_w <= 0) | (visible_h <= 0))
    report("outside_box", outside, "(x1, y1, x2, y2) lies outside its image")
    keep = ~flat & ~outside
    duplicate = _find_duplicates(clipped, labels, image_of, keep)
    report("duplicate_box", duplicate, "(x1, y1, x2, y2) duplicates an earlier box of the same class")
    keep &= ~duplicate
    if normalised:
        report("beyond_one", keep & out_of_range, "(x1, y1, x2, y2 from centre and size) exceeds 0..1")
    else:
        overhanging = np.abs(clipped - boxes).max(1, initial=0) > PIXEL_TOLERANCE
        report("overhanging_box", keep & overhanging, "(x1, y1, x2, y2) exceeds its image")
    return clipped, keep


def _find_duplicates(boxes: np.ndarray, labels: np.ndarray, image_of: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """Return whether the same box and label occur earlier in the same image, (T,) bool."""
    rows = np.flatnonzero(keep)
    order = rows[
        np.lexsort((*boxes[rows].T, labels[rows], image_of[rows]))
    ]  # stable: the first of duplicates stays first
    same = (boxes[order][1:] == boxes[order][:-1]).all(1)
    same &= (labels[order][1:] == labels[order][:-1]) & (image_of[order][1:] == image_of[order][:-1])
    duplicate = np.zeros(len(keep), bool)
    duplicate[order[1:][same]] = True
    return duplicate


def _first_indices(paths: Sequence[str]) -> np.ndarray:
    """Return the index of the first occurrence of each path, (N,) int64."""
    first = np.arange(len(paths))
    hashes = np.fromiter((hash(path) for path in paths), np.int64, len(paths))  # smaller than a dictionary of all
    order = np.argsort(hashes, kind="stable")
    equal = np.flatnonzero(hashes[order][1:] == hashes[order][:-1])
    seen: dict[str, int] = {}
    for k in np.union1d(order[equal], order[equal + 1]).tolist():
        first[k] = seen.setdefault(paths[k], k)
    return first
