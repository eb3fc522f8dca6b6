"""Parsing the xml files of Pascal VOC in one pass, in any encoding, with limits for malicious files."""

import codecs
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from xml.parsers import expat

from detkit.data.formats.unsupported import other_format
from detkit.data.issues import IssueLog
from detkit.errors import shorten
from detkit.ops.files import read_regular

SIDES = ("xmin", "ymin", "xmax", "ymax")
FIELDS = {"name", "difficult", *SIDES}  # of an object that are read
MAX_XML = 2**25  # bytes of one file
MAX_DEPTH = 100  # of nested elements
MAX_OBJECTS = 100_000
MAX_VALUE = 1000  # characters of a field that are read
DECLARATION = re.compile(rb"""\s*<\?xml\s[^>]{0,200}?encoding\s*=\s*["']([\w.:-]{1,40})["']""")
# Declared encodings, and the supersets that are usually meant.
SUPERSETS = {"gb2312": "gb18030", "gbk": "gb18030", "big5": "cp950", "shift_jis": "cp932", "euc_kr": "cp949"}
NON_TEXT_CODECS = {"idna", "punycode", "unicode_escape", "raw_unicode_escape"}  # specific to Python, some of them slow


@dataclass
class VocObject:
    """One <object>: its fields as text, and its first line."""

    line: int
    fields: dict[str, str] = field(default_factory=dict)


def parse_xml(file: Path, log: IssueLog) -> tuple[tuple[int, int], list[VocObject]] | None:
    """Read one label file; entities are rejected, as a small file could expand without limit.

    Returns:
        the stated (height, width), 0 if there is none, and the objects; None if the file is missing or malformed,
        which is logged.
    """
    if not os.path.lexists(file):
        log.add("missing_labels", file, None, "does not exist, but is in the list of the split")
        return None
    reader = _XmlReader()
    try:
        data = read_regular(file, MAX_XML)
        reader.parser.Parse(_decoded(data), True)
        if reader.root != "annotation" and not reader.objects:
            raise ValueError(
                f"it is not a Pascal VOC annotation{other_format(data) or f', its root is <{reader.root}>'}"
            )
    except expat.ExpatError as error:
        message = f"malformed xml: {expat.ErrorString(error.code)}{other_format(data)}"
        log.add("unreadable_labels", file, error.lineno, message)
        return None
    except (OSError, ValueError, LookupError) as error:  # LookupError: an unknown encoding
        message = f"cannot be read: {getattr(error, 'strerror', None) or error}"
        log.add("unreadable_labels", file, None, shorten(message, 400))
        return None
    try:
        stated = int(float(reader.size.get("height", "0"))), int(float(reader.size.get("width", "0")))
    except (ValueError, OverflowError):
        stated = (0, 0)
    return stated if min(stated) >= 0 and max(stated) < 2**31 else (0, 0), reader.objects


def _decoded(data: bytes) -> bytes | str:
    """Decode a file with its declared encoding; without one, return the bytes for the parser to detect it.

    Raises:
        ValueError: the file is not in that encoding.
        LookupError: the encoding is unknown.
    """
    text = data.removeprefix(codecs.BOM_UTF8)
    match = DECLARATION.match(text[:1000])
    if match is None:
        return data
    declared = match[1].decode()
    name = codecs.lookup(declared).name
    if name in NON_TEXT_CODECS:
        raise LookupError(f"unknown encoding: {declared}")
    # The declaration would not have matched in a file that really is UTF-16 or UTF-32.
    if data.startswith(codecs.BOM_UTF8) or name.startswith(("utf-16", "utf-32")):
        name = "utf-8"
    try:
        return text.decode(SUPERSETS.get(name, name))
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not in the encoding {declared} that it declares (byte {error.start})") from None


class _XmlReader:
    """Collects the <size> and the <object>s of an annotation, at any depth.

    Only the fields of an object itself and of its <bndbox> are read, not those of its <part>s. A <bndbox> outside of an
    object is an object without a name.
    """

    def __init__(self) -> None:
        self.parser = expat.ParserCreate()
        self.parser.buffer_text = True
        self.parser.StartElementHandler = self.start
        self.parser.EndElementHandler = self.end
        self.parser.CharacterDataHandler = self.characters
        self.parser.EntityDeclHandler = self.reject_entity
        self.root = ""
        self.size: dict[str, str] = {}
        self.objects: list[VocObject] = []
        self.path: list[str] = []
        self.container_depth = 0  # depth of the open <object>, <size> or <bndbox>, 0 if none is open
        self.text = ""

    def start(self, tag: str, _: dict[str, str]) -> None:
        self.path.append(tag)
        self.text = ""
        if len(self.path) > MAX_DEPTH:
            raise ValueError(f"its elements are nested more than {MAX_DEPTH} deep")
        if len(self.path) == 1:
            self.root = shorten(tag, 40)
        elif not self.container_depth and tag in ("object", "size", "bndbox"):
            self.container_depth = len(self.path)
            if tag != "size":
                if len(self.objects) == MAX_OBJECTS:
                    raise ValueError(f"it holds more than {MAX_OBJECTS:,} objects")
                self.objects.append(VocObject(self.parser.CurrentLineNumber))

    def characters(self, text: str) -> None:
        if self.container_depth and len(self.text) < MAX_VALUE:
            self.text += text[:MAX_VALUE]

    def end(self, tag: str) -> None:
        below = len(self.path) - self.container_depth if self.container_depth else 0
        if below and self.path[self.container_depth - 1] == "size":
            if below == 1 and tag in ("width", "height"):
                self.size[tag] = self.text.strip()
        elif tag in FIELDS and (below == 1 or (below == 2 and self.path[-2] == "bndbox")):
            self.objects[-1].fields[tag] = self.text.strip()
        elif not below:
            self.container_depth = 0
        self.path.pop()
        self.text = ""

    @staticmethod
    def reject_entity(*_: object) -> None:
        raise ValueError("it declares entities")
