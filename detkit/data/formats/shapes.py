"""The embedded image set: coloured shapes on cluttered, textured backgrounds, drawn on first use.

Small enough to train on a laptop's CPU in minutes: five classes, each leaning to a colour, at any angle, from a quarter
of the picture up, some half hidden behind others, among scribbles that are no shapes at all; and images with nothing.
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

VERSION = "shapes-v2"  # of the drawings: a change of them is another folder
SPLITS = {"train": 400, "val": 100}
SIZE = 256  # pixels
OVERSAMPLING = 2  # drawn this much larger, for smooth edges
MIN_SHAPE, MAX_SHAPE = 64, 180  # pixels across, before a slight squeeze
HUE_SPREAD = 0.03  # of a class, in turns: neighbours are 0.2 apart
MIN_VISIBLE = 0.5  # share of a shape that others may not cover


@DATASETS.register("shapes")
def read_shapes(split: str, *, root: str | None = None, log: IssueLog | None = None) -> Annotations:
    """Read the ``"train"`` or ``"val"`` split, drawing the set first where its folder is new or empty.

    Args:
        root: folder of the set; by default one in the user's cache folder (XDG_CACHE_HOME or ~/.cache).
        log: as for read_coco.
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
    """Return the splits of the embedded set, drawn or not."""
    return [*SPLITS]


def _draw_set(folder: Path) -> None:
    """Draw all images beside ``folder`` and move them there at once, so that nobody sees half a set."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        for seed, (split, count) in enumerate(SPLITS.items()):
            _draw_split(scratch, split, count, seed)
        scratch.chmod(0o755)  # temporary folders are private
        try:
            scratch.rename(folder)
        except OSError:
            if not (folder / "annotations").exists():
                raise
            # another process was quicker; its drawings are the same
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
    """Draw one picture.

    Returns:
        (SIZE, SIZE, 3) uint8 RGB, and for each shape: label, box [x, y, width, height] around its visible part in
        pixels, visible area in pixels.
    """
    canvas = _background(rng)
    _scribble(rng, canvas, int(rng.integers(4, 12)))
    owner = np.zeros(canvas.shape[:2], np.uint8)  # which shape a pixel shows, counted from 1; 0 is background
    labels: list[int] = []
    sizes, visible = np.zeros((2, 0), int)  # pixels of each shape, drawn and still to be seen
    count = 0 if rng.random() < 0.06 else rng.integers(1, 5)
    for _ in range(count):
        label = int(rng.integers(len(OUTLINES)))
        corners = _place(rng, label, canvas.shape[0])
        mask = np.zeros_like(owner)
        cv2.fillPoly(mask, [corners], 1)
        mask = mask.astype(bool)
        remaining = visible - np.bincount(owner[mask], minlength=len(labels) + 1)[1:]
        if (remaining < MIN_VISIBLE * sizes).any():
            continue  # it would hide another one
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
    """Return one outline's corners at a random place, size, angle and slight squeeze: (K, 2) int32."""
    diameter = MIN_SHAPE + (MAX_SHAPE - MIN_SHAPE) * rng.random() ** 1.3  # more small ones than large ones
    radius = OVERSAMPLING * diameter / 2
    points = list(OUTLINES.values())[label]() * radius * (1, rng.uniform(0.8, 1))
    angle = rng.uniform(0, 2 * np.pi)
    c, s = np.cos(angle), np.sin(angle)
    points = points @ np.array(((c, s), (-s, c))) + rng.uniform(radius * 0.8, size - radius * 0.8, 2)
    return np.round(points).astype(np.int32)


def _paint(rng: np.random.Generator, canvas: np.ndarray, mask: np.ndarray, corners: np.ndarray, label: int) -> None:
    """Colour a shape in about the hue of its class, sometimes with stripes or a dark rim."""
    hue = (label / len(OUTLINES) + rng.normal(0, HUE_SPREAD)) % 1
    colour = 255 * np.array(colorsys.hsv_to_rgb(hue, rng.uniform(0.4, 1), rng.uniform(0.4, 1)), np.float32)
    cv2.fillPoly(canvas, [corners], colour.tolist())
    if rng.random() < 0.3:
        canvas[mask] *= 1 - 0.35 * _stripes(rng, canvas.shape[0])[mask][:, None]
    if rng.random() < 0.4:
        cv2.polylines(canvas, [corners], True, (colour * 0.4).tolist(), 2)


def _background(rng: np.random.Generator) -> np.ndarray:
    """A soft cloud of two colours, sometimes striped: the oversampled canvas, float32 in 0..255."""
    coarse = int(rng.integers(3, 24))
    cloud = cv2.resize(rng.random((coarse, coarse), np.float32), (SIZE, SIZE), interpolation=cv2.INTER_CUBIC)[..., None]
    first, second = rng.uniform(0, 255, (2, 3)).astype(np.float32)
    image = first + np.clip(cloud, 0, 1) * (second - first)
    if rng.random() < 0.4:
        image *= 1 - np.float32(rng.uniform(0.1, 0.4)) * _stripes(rng, SIZE)[..., None]
    side = SIZE * OVERSAMPLING
    return cv2.resize(image, (side, side), interpolation=cv2.INTER_LINEAR)


def _stripes(rng: np.random.Generator, size: int) -> np.ndarray:
    """Parallel bands at any angle: (size, size) float32 in 0..1."""
    angle, period = rng.uniform(0, np.pi), rng.uniform(0.025, 0.12) * size
    ramp = np.arange(size, dtype=np.float32) * np.float32(2 * np.pi / period)
    return 0.5 + 0.5 * np.sin(ramp * np.float32(np.cos(angle)) + ramp[:, None] * np.float32(np.sin(angle)))


def _scribble(rng: np.random.Generator, canvas: np.ndarray, count: int) -> None:
    """Draw open curves and specks, which are no objects."""
    size = canvas.shape[0]
    for _ in range(count):
        colour = rng.uniform(0, 255, 3).tolist()
        start = rng.uniform(0, size, 2)
        steps = rng.normal(0, rng.uniform(4, 40), (rng.integers(2, 8), 2)).cumsum(0)
        points = np.round(start + steps).astype(np.int32)
        cv2.polylines(canvas, [points], False, colour, int(rng.integers(1, 5)))


def _box_and_area(visible: np.ndarray) -> tuple[list[float], float]:
    """Return [x, y, width, height] around a mask and its area, in pixels of the finished picture."""
    (x,), (y,) = np.nonzero(visible.any(0)), np.nonzero(visible.any(1))
    box = np.array((x[0], y[0], x[-1] + 1 - x[0], y[-1] + 1 - y[0])) / OVERSAMPLING
    return box.tolist(), float(visible.sum()) / OVERSAMPLING**2
