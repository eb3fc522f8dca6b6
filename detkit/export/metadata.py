"""What an exported file says about itself, as JSON inside the file."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import detkit
from detkit.config.check import check_values, first_unsupported_value
from detkit.config.fields import is_number, is_whole
from detkit.errors import DetkitError, is_name, shorten
from detkit.inference.model import FixedShape
from detkit.models.detector import Detector
from detkit.ops.files import read_regular
from detkit.ops.image import PAD_VALUE
from detkit.ops.nms import Thresholds

KEY = "detkit"  # of the JSON text in a file
VERSION = 1
MAX_TEXT = 2**25  # characters, as in the header of a checkpoint
MAX_SIDE = 2**16
LETTERBOX = {
    "color": "RGB",
    "range": [0, 1],
    "scale": "min(frame height / height, frame width / width), sides rounded to the nearest, at least 1",
    "interpolation": "bilinear; by area if a side shrinks to less than half",
    "position": "centred; left and top padding rounded down",
    "pad_value": PAD_VALUE,
}


@dataclass(frozen=True)
class Metadata:
    """Description of an exported file.

    Attributes:
        class_names: one name per class.
        image_size: side of the letterboxed square input in pixels, unless another is given.
        strides: of the levels that are predicted from.
        max_stride: both sides of an input are divisible by it.
        fixed_shape: (B, H, W) that every input must have; None in place of a number that may vary.
        nms: whether the file returns detections instead of all boxes and scores.
        score, iou, max_det: thresholds; with ``nms`` they are those inside the file.
        precision: float32, float16 or int8.
        cfg: resolved configuration of the detector.
    """

    class_names: tuple[str, ...]
    image_size: int
    strides: tuple[int, ...]
    max_stride: int
    fixed_shape: FixedShape
    nms: bool
    score: float
    iou: float
    max_det: int
    precision: str
    cfg: Mapping[str, Any]

    @property
    def thresholds(self) -> Thresholds:
        """The thresholds as those of a prediction."""
        return Thresholds(self.score, self.iou, self.max_det)

    def to_json(self) -> str:
        """Return the text that a file holds."""
        origin = {"version": VERSION, "detkit_version": detkit.__version__, "letterbox": LETTERBOX}
        return json.dumps(origin | asdict(self))


def describe(detector: Detector, **values: Any) -> Metadata:
    """Return the metadata of a detector's export; ``values`` are the fields that depend on the export."""
    strides = tuple(int(stride) for stride in detector.head.strides)
    return Metadata(
        class_names=detector.class_names, strides=strides, max_stride=detector.max_stride, cfg=detector.cfg, **values
    )


def parse_metadata(text: Any, path: object) -> Metadata:
    """Read what ``Metadata.to_json`` wrote; the file may be anybody's.

    Args:
        text: the JSON text; anything that is not text means that the file has none.
        path: the file, for messages.

    Raises:
        DetkitError: it is missing, of another version, or holds invalid values.
    """
    if not isinstance(text, str) or not text:
        raise DetkitError(f"{path} was not exported by detkit: it does not name its classes; use detkit export")
    if len(text) > MAX_TEXT:
        raise DetkitError(f"{path} is damaged: its metadata has more than {MAX_TEXT} characters")
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DetkitError(f"{path} is damaged: its metadata is not valid JSON ({shorten(str(error), 100)})") from None
    if not isinstance(content, dict):
        raise DetkitError(f"{path} is damaged: its metadata is not a mapping")
    if content.get("version") != VERSION:
        raise DetkitError(
            f"{path} has metadata of version {shorten(content.get('version'), 50)}, but this version of detkit reads "
            f"{VERSION}: export it again"
        )
    if message := _first_invalid_value(content):
        raise DetkitError(f"{path} is damaged: in its metadata {message}")
    values = {key: content[key] for key in Metadata.__dataclass_fields__}
    for key in ("class_names", "strides", "fixed_shape"):
        values[key] = tuple(values[key])
    return Metadata(**values)


def _first_invalid_value(content: dict[str, Any]) -> str:
    """Return a message about the first invalid value; an empty string if there is none."""
    names = content.get("class_names")
    if not isinstance(names, list) or not names or not all(map(is_name, names)) or len(set(names)) < len(names):
        return "class_names is not a list of different names"
    stride = content.get("max_stride")
    sizes = [content.get("image_size"), stride, *_as_list(content, "strides"), *_as_list(content, "fixed_shape")]
    if not all(is_whole(size, 1) and size <= MAX_SIDE for size in sizes if size is not None) or None in sizes[:2]:
        return "a size or stride is not a whole number of pixels"
    if len(content["fixed_shape"]) != 3 or not content["strides"] or content["image_size"] % stride:
        return "the sizes and strides do not fit together"
    if type(content.get("nms")) is not bool or content.get("precision") not in ("float32", "float16", "int8"):
        return "nms or precision is invalid"
    if not is_number(content.get("score"), 0, 1) or not is_number(content.get("iou"), 0, 1):
        return "score and iou must be numbers from 0 to 1"
    if not is_whole(content.get("max_det"), 1):
        return "max_det must be a whole number, 1 or more"
    if not isinstance(content.get("cfg"), dict):
        return "cfg is missing"
    try:
        check_values(content["cfg"], partial=True)
    except DetkitError as error:
        return str(error)
    return first_unsupported_value(content)


def _as_list(content: dict[str, Any], key: str) -> list[Any]:
    value = content.get(key)
    return value if isinstance(value, list) else ["invalid"]


def read_beside(path: Path) -> str | None:
    """Return the text of the .json file beside a file; None if there is none."""
    beside = path.with_suffix(".json")
    return read_regular(beside).decode("utf-8", "replace") if beside.exists() else None
