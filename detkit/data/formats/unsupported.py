"""Recognizing label files of unsupported formats, to suggest what to export instead."""

import re
from pathlib import Path

from detkit.ops.files import open_regular

HEADER_BYTES = 2**16  # that are inspected
_EXPORT = "export COCO json, YOLO or Pascal VOC instead"
# Description of a file, and the strings that its beginning contains.
FORMATS: tuple[tuple[str, tuple[bytes, ...]], ...] = (
    (f"a project of the VGG Image Annotator (VIA): {_EXPORT}", (b'"_via_',)),
    (f"the VGG Image Annotator's own json: {_EXPORT}", (b'"regions"', b'"shape_attributes"')),
    (f"the VGG Image Annotator's own json: {_EXPORT}", (b'"regions"', b'"filename"')),
    (f"Label Studio's own json: {_EXPORT}", (b'"from_name"', b'"to_name"')),
    (f"Label Studio's own json: {_EXPORT}", (b'"rectanglelabels"',)),
    (f"Label Studio's own json: {_EXPORT}", (b'"annotations"', b'"result"')),
    ("CreateML json: save the labels as YOLO or Pascal VOC", (b'"coordinates"', b'"annotation')),
    ("LabelMe's json of one image: convert the set to COCO json", (b'"shapes"', b'"imagePath"')),
    ("BDD100K json: convert it to COCO json", (b'"box2d"',)),
    ("GeoJSON: convert it to COCO json", (b'"FeatureCollection"',)),
    ("COCO panoptic json: use the instances file", (b'"segments_info"',)),
    ("a list of COCO results, not of labels", (b'"image_id"', b'"score"')),
    (f"CVAT's own xml: {_EXPORT}", (b"<annotations>", b"<image ")),
    (f"CVAT's own xml: {_EXPORT}", (b"<annotations>", b"<track ")),
    ("Pascal VOC xml: use data=voc", (b"<annotation", b"<object>")),
    ("a YOLO data.yaml: use data=yolo", (b"\nnames:", b"train:")),
)


def other_format(start: bytes) -> str:
    """Return ``: it is ...`` with the format of a label file, given its start, and a suggestion; "" if unknown."""
    start = start[:HEADER_BYTES]
    for description, markers in FORMATS:
        if all(marker in start for marker in markers):
            return f": it is {description}"
    first, _, rest = start.partition(b"\n")
    if rest and first.count(b",") >= 3 and re.fullmatch(rb"[^{}\[\]<>]+", first):
        return ": it is a table (CSV): convert it to COCO json, YOLO or Pascal VOC"
    if start.lstrip().startswith(b"<"):
        return ": it is xml or a web page"
    return ""


def other_format_of(file: Path) -> str:
    """Return ``other_format`` of a file."""
    try:
        with open_regular(file) as stream:
            return other_format(stream.read(HEADER_BYTES))
    except OSError:
        return ""
