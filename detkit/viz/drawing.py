"""Drawing boxes on images, image grids, and encoding of images and figures."""

import io
import math
import warnings
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from detkit.errors import shorten
from detkit.structures import Detections

PALETTE = (  # visible on light and dark images; assigned to classes in turn
    (230, 25, 75), (60, 180, 75), (0, 130, 200), (245, 130, 48), (145, 30, 180), (70, 240, 240), (240, 50, 230),
    (210, 245, 60), (250, 190, 212), (0, 128, 128), (220, 190, 255), (170, 110, 40), (255, 225, 25), (128, 0, 0),
    (170, 255, 195), (128, 128, 0), (255, 215, 180), (0, 0, 128),
)  # fmt: skip


def draw_boxes(
    image: np.ndarray,
    boxes: np.ndarray,
    labels: Sequence[int],
    class_names: Sequence[str],
    scores: Sequence[float] | None = None,
    tracks: Sequence[int] | None = None,
    trails: Mapping[int, Sequence[tuple[float, float]]] | None = None,
) -> np.ndarray:
    """Return a copy of an (H, W, 3) uint8 RGB image with (N, 4) xyxy boxes, class names and scores drawn on it.

    Line and font size scale with the image. The first boxes, usually those with the highest scores, are drawn on top.

    Args:
        image: the image.
        boxes: xyxy in pixels.
        labels: class indices, which choose the colours.
        class_names: of all classes.
        scores: written behind the names.
        tracks: ids of tracked objects, -1 for none, which are written before the names and choose the colours.
        trails: by id, the points (x, y) through which an object came, drawn as a line.
    """
    canvas = Image.fromarray(image)
    draw = ImageDraw.Draw(canvas)
    line = max(round(max(image.shape[:2]) / 400), 1)
    font = _font(max(round(max(image.shape[:2]) / 45), 9))
    for track, points in (trails or {}).items():
        draw.line(list(points), fill=PALETTE[track % len(PALETTE)], width=2 * line, joint="curve")
    for k in reversed(range(len(boxes))):
        track = -1 if tracks is None else tracks[k]
        colour = PALETTE[(int(labels[k]) if track < 0 else track) % len(PALETTE)]
        x1, y1, x2, y2 = (float(v) for v in boxes[k])
        draw.rectangle((x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)), outline=colour, width=line)
        text = "" if track < 0 else f"#{track} "
        text += shorten(class_names[int(labels[k])], 40) + ("" if scores is None else f" {float(scores[k]):.2f}")
        left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
        width, height = right - left + 4, bottom - top + 4
        x = min(max(x1, 0), max(canvas.width - width, 0))
        y = y1 - height if y1 >= height else y1  # inside the box if there is no room above it
        draw.rectangle((x, y, x + width, y + height), fill=colour)
        draw.text((x + 2 - left, y + 2 - top), text, font=font, fill=_text_colour(colour))
    return np.asarray(canvas)


def save_drawn(path: Path, image: np.ndarray, found: Detections) -> None:
    """Write an (H, W, 3) uint8 RGB image with its boxes, class names and scores."""
    boxes, labels, scores = found.boxes.numpy(), found.labels.tolist(), found.scores.tolist()
    path.parent.mkdir(parents=True, exist_ok=True)
    save_image(draw_boxes(image, boxes, labels, found.class_names, scores), path)


def image_grid(
    images: Sequence[np.ndarray], columns: int = 4, side: int = 320, titles: Sequence[str] = ()
) -> np.ndarray:
    """Arrange images in a grid of cells, into which they are resized with their aspect ratio kept.

    Args:
        images: (H, W, 3) uint8 RGB, of any size.
        columns: number of columns.
        side: width and height of a cell in pixels.
        titles: one per column, or none.

    Returns:
        the (H, W, 3) uint8 RGB grid.
    """
    rows = math.ceil(len(images) / columns)
    top = 28 if titles else 0
    canvas = Image.new("RGB", (columns * side, rows * side + top), (114, 114, 114))
    for k, title in enumerate(titles):
        ImageDraw.Draw(canvas).text((k * side + 8, 4), title, font=_font(16), fill=(255, 255, 255))
    for k, image in enumerate(images):
        cell = Image.fromarray(image)
        ratio = side / max(cell.size)
        cell = cell.resize((max(round(cell.width * ratio), 1), max(round(cell.height * ratio), 1)))
        x, y = k % columns * side, k // columns * side + top
        canvas.paste(cell, (x + (side - cell.width) // 2, y + (side - cell.height) // 2))
    return np.asarray(canvas)


def save_image(image: np.ndarray, path: Path) -> None:
    """Write an (H, W, 3) uint8 RGB image as JPEG.

    Raises:
        OSError: the file cannot be written (no partial file is left), or a side exceeds 65,500 pixels.
    """
    data = encode_image(image)
    try:
        path.write_bytes(data)
    except OSError:
        path.unlink(missing_ok=True)
        raise


def encode_image(image: np.ndarray) -> bytes:
    """Encode an (H, W, 3) uint8 RGB image as JPEG."""
    data = io.BytesIO()
    Image.fromarray(image).save(data, "jpeg", quality=92)
    return data.getvalue()


def encode_figure(figure: Figure) -> bytes:
    """Encode a figure as PNG."""
    data = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # in a class name; a box is drawn instead
        figure.savefig(data, dpi=100)
    return data.getvalue()


def _text_colour(colour: tuple[int, int, int]) -> tuple[int, int, int]:
    """Return black or white, whichever contrasts better with ``colour``."""
    r, g, b = colour
    return (0, 0, 0) if 0.299 * r + 0.587 * g + 0.114 * b > 140 else (255, 255, 255)


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf", size)
