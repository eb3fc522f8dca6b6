"""The embedded data set: coloured shapes on cluttered, textured backgrounds, drawn on first use.

It is small enough to train on a laptop's CPU in minutes. Shapes of five classes, each with a typical colour, have any
rotation and at least a quarter of the image's side. Some are partly occluded, scribbles serve as distractors, and some
images are empty.
"""

import colorsys
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np

from detkit.data.annotations import Annotations
from detkit.data.formats.coco import read_coco
from detkit.data.issues import IssueLog
from detkit.errors import DetkitError
from detkit.ops.files import cache_dir
from detkit.registry import DATASETS, SPLIT_NAMES

VERSION = "shapes-v2"  # of the images, and name of their folder
SPLITS = {"train": 400, "val": 100}
SIZE = 256  # pixels
OVERSAMPLING = 2  # for antialiasing
MIN_SHAPE, MAX_SHAPE = 64, 180  # diameter in pixels, before a slight compression
HUE_SPREAD = 0.03  # standard deviation of a class' hue in turns; classes are 0.2 apart
MIN_VISIBLE = 0.5  # minimum visible fraction of a shape


@DATASETS.register("shapes")
def read_shapes(split: str, *, root: str | None = None, log: IssueLog | None = None) -> Annotations:
    """Read a split, after drawing the data set if its folder is missing or empty.

    Args:
        split: ``"train"`` or ``"val"``.
        root: folder of the data set; by default in the user's cache folder (XDG_CACHE_HOME or ~/.cache).
        log: see ``read_coco``.

    Raises:
        DetkitError: the folder cannot be written, there is no such split, or as for ``read_coco``.
    """
    folder = Path(root) if root else cache_dir() / VERSION
    if not (folder / "annotations").exists():
        try:
            _draw_set(folder)
        except OSError as error:
            raise DetkitError(
                f"cannot write the shapes to {folder} ({error}): set data.root to a folder you own"
            ) from None
    return read_coco(split, root=str(folder), log=log)


@SPLIT_NAMES.register("shapes")
def shapes_splits(**_: str | None) -> list[str]:
    """Return the splits of the embedded data set."""
    return [*SPLITS]


def _draw_set(folder: Path) -> None:
    """Draw all images in a temporary folder, then rename it, so that an incomplete data set is never visible."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        for seed, (split, count) in enumerate(SPLITS.items()):
            _draw_split(scratch, split, count, seed)
        scratch.chmod(0o755)  # temporary folders are created with 0o700
        try:
            scratch.rename(folder)
        except OSError:
            if not (folder / "annotations").exists():
                raise
            # Another process was faster; its images are the same.
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _draw_split(root: Path, split: str, count: int, seed: int) -> None:
    """Write ``count`` JPEGs and their COCO json."""
    image_dir = root / "images" / split
    image_dir.mkdir(parents=True)
    images: list[dict] = []
    annotations: list[dict] = []
    for k in range(count):
        image, objects = draw_image(np.random.default_rng((seed, k)))
        name = f"{k:04d}.jpg"
        ok, data = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), (cv2.IMWRITE_JPEG_QUALITY, 92))
        assert ok
        (image_dir / name).write_bytes(data.tobytes())
        images.append({"id": k + 1, "file_name": name, "height": SIZE, "width": SIZE})
        for label, box, area in objects:
            record = {"image_id": k + 1, "category_id": label + 1, "bbox": box, "area": area, "iscrowd": 0}
            annotations.append({"id": len(annotations) + 1, **record})
    categories = [{"id": label + 1, "name": name} for label, name in enumerate(OUTLINES)]
    file = root / "annotations" / f"instances_{split}.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))


def draw_image(rng: np.random.Generator) -> tuple[np.ndarray, list[tuple[int, list[float], float]]]:
    """Draw one image.

    Returns:
        (SIZE, SIZE, 3) uint8 RGB, and for each shape its label, the bounding box [x, y, width, height] of its visible
        part in pixels, and its visible area in pixels.
    """
    canvas = _background(rng)
    _scribble(rng, canvas, int(rng.integers(4, 12)))
    owner = np.zeros(canvas.shape[:2], np.uint8)  # shape at each pixel, from 1; 0 is background
    labels: list[int] = []
    sizes, visible = np.zeros((2, 0), int)  # pixels of each shape, total and visible
    count = 0 if rng.random() < 0.06 else rng.integers(1, 5)
    for _ in range(count):
        label = int(rng.integers(len(OUTLINES)))
        corners = _place(rng, label, canvas.shape[0])
        mask = np.zeros_like(owner)
        cv2.fillPoly(mask, [corners], 1)
        mask = mask.astype(bool)
        remaining = visible - np.bincount(owner[mask], minlength=len(labels) + 1)[1:]
        if (remaining < MIN_VISIBLE * sizes).any():
            continue  # it would occlude another shape too much
        labels.append(label)
        sizes, visible = np.append(sizes, mask.sum()), np.append(remaining, mask.sum())
        owner[mask] = len(labels)
        _paint(rng, canvas, mask, corners, label)
    _scribble(rng, canvas, int(rng.integers(0, 3)))
    image = cv2.resize(canvas, (SIZE, SIZE), interpolation=cv2.INTER_AREA)
    noise = rng.standard_normal((SIZE, SIZE, 1), np.float32) * rng.uniform(1, 8)
    image = np.clip(image + noise, 0, 255).astype(np.uint8)
    return image, [(label, *_box_and_area(owner == k)) for k, label in enumerate(labels, 1)]


def _regular(corners: int) -> np.ndarray:
    angles = np.arange(corners) * 2 * np.pi / corners
    return np.stack((np.cos(angles), np.sin(angles)), -1)


def _star() -> np.ndarray:
    return _regular(10) * np.where(np.arange(10) % 2, 0.42, 1.0)[:, None]


def _cross() -> np.ndarray:
    a = 0.32
    quarter = np.array(((1, -a), (1, a), (a, a)))
    turn = np.array(((0, 1), (-1, 0)))  # a quarter turn
    return np.concatenate([quarter @ np.linalg.matrix_power(turn, k) for k in range(4)])


OUTLINES: dict[str, Callable[[], np.ndarray]] = {  # corners within the unit circle
    "circle": lambda: _regular(48),
    "square": lambda: _regular(4),
    "triangle": lambda: _regular(3),
    "star": _star,
    "cross": _cross,
}


def _place(rng: np.random.Generator, label: int, size: int) -> np.ndarray:
    """Return the corners of an outline with random position, size, rotation and slight compression, (K, 2) int32."""
    diameter = MIN_SHAPE + (MAX_SHAPE - MIN_SHAPE) * rng.random() ** 1.3  # favours small ones
    radius = OVERSAMPLING * diameter / 2
    points = list(OUTLINES.values())[label]() * radius * (1, rng.uniform(0.8, 1))
    angle = rng.uniform(0, 2 * np.pi)
    c, s = np.cos(angle), np.sin(angle)
    points = points @ np.array(((c, s), (-s, c))) + rng.uniform(radius * 0.8, size - radius * 0.8, 2)
    return np.round(points).astype(np.int32)


def _paint(rng: np.random.Generator, canvas: np.ndarray, mask: np.ndarray, corners: np.ndarray, label: int) -> None:
    """Fill a shape with approximately the hue of its class, sometimes with stripes or a dark outline."""
    hue = (label / len(OUTLINES) + rng.normal(0, HUE_SPREAD)) % 1
    colour = 255 * np.array(colorsys.hsv_to_rgb(hue, rng.uniform(0.4, 1), rng.uniform(0.4, 1)), np.float32)
    cv2.fillPoly(canvas, [corners], colour.tolist())
    if rng.random() < 0.3:
        canvas[mask] *= 1 - 0.35 * _stripes(rng, canvas.shape[0])[mask][:, None]
    if rng.random() < 0.4:
        cv2.polylines(canvas, [corners], True, (colour * 0.4).tolist(), 2)


def _background(rng: np.random.Generator) -> np.ndarray:
    """Return a soft cloud of two colours, sometimes striped, (H, W, 3) float32 in 0..255, oversampled."""
    coarse = int(rng.integers(3, 24))
    cloud = cv2.resize(rng.random((coarse, coarse), np.float32), (SIZE, SIZE), interpolation=cv2.INTER_CUBIC)[..., None]
    first, second = rng.uniform(0, 255, (2, 3)).astype(np.float32)
    image = first + np.clip(cloud, 0, 1) * (second - first)
    if rng.random() < 0.4:
        image *= 1 - np.float32(rng.uniform(0.1, 0.4)) * _stripes(rng, SIZE)[..., None]
    side = SIZE * OVERSAMPLING
    return cv2.resize(image, (side, side), interpolation=cv2.INTER_LINEAR)


def _stripes(rng: np.random.Generator, size: int) -> np.ndarray:
    """Return parallel stripes at a random angle, (size, size) float32 in 0..1."""
    angle, period = rng.uniform(0, np.pi), rng.uniform(0.025, 0.12) * size
    ramp = np.arange(size, dtype=np.float32) * np.float32(2 * np.pi / period)
    return 0.5 + 0.5 * np.sin(ramp * np.float32(np.cos(angle)) + ramp[:, None] * np.float32(np.sin(angle)))


def _scribble(rng: np.random.Generator, canvas: np.ndarray, count: int) -> None:
    """Draw open curves and specks as distractors."""
    size = canvas.shape[0]
    for _ in range(count):
        colour = rng.uniform(0, 255, 3).tolist()
        start = rng.uniform(0, size, 2)
        steps = rng.normal(0, rng.uniform(4, 40), (rng.integers(2, 8), 2)).cumsum(0)
        points = np.round(start + steps).astype(np.int32)
        cv2.polylines(canvas, [points], False, colour, int(rng.integers(1, 5)))


def _box_and_area(visible: np.ndarray) -> tuple[list[float], float]:
    """Return the bounding box [x, y, width, height] of a mask and its area, in pixels of the final image."""
    (x,), (y,) = np.nonzero(visible.any(0)), np.nonzero(visible.any(1))
    box = np.array((x[0], y[0], x[-1] + 1 - x[0], y[-1] + 1 - y[0])) / OVERSAMPLING
    return box.tolist(), float(visible.sum()) / OVERSAMPLING**2
