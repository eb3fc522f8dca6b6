"""Reading a json file record by record, as a COCO file of ten million boxes would not fit into memory as objects."""

import json
import re
from collections.abc import Iterator
from io import TextIOWrapper
from pathlib import Path
from typing import Any, TextIO

from detkit.data.formats.unsupported import other_format_of
from detkit.errors import DetkitError
from detkit.ops.files import open_regular

CHUNK = 2**20  # characters read at a time
MAX_VALUE = 2**28  # characters of one record
SPACE = " \t\r\n"
DELIMITERS = tuple(f"{SPACE},:]}}")  # what may follow a value
_spaces = re.compile(f"[{SPACE}]*").match
_decode = json.JSONDecoder().raw_decode


def read_records(file: Path, lists: tuple[str, ...]) -> Iterator[tuple[str, int, int, Any]]:
    """Yield the elements of the named lists of a json object, in the order of the file.

    Yields:
        key of the list, position in it, line in the file, record; at the start of the list, position -1 and None.

    Raises:
        DetkitError: it is not a file, not a json object, malformed (with line and column), or a value is not a list.
    """
    try:
        with TextIOWrapper(open_regular(file), encoding="utf-8-sig") as stream:
            yield from _Reader(stream, file).records(lists)
    except OSError as error:
        raise DetkitError(f"cannot read annotations {file}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise DetkitError(f"{file} is not a json file: it is not UTF-8 text{other_format_of(file)}") from None


class _Reader:
    """A json parser over a sliding window of the file."""

    def __init__(self, stream: TextIO, file: Path) -> None:
        self.stream = stream
        self.file = file
        self.text = ""
        self.position = 0
        self.line = 1
        self.column = 0  # characters of the current line before the window

    def records(self, lists: tuple[str, ...]) -> Iterator[tuple[str, int, int, Any]]:
        if self.next_character() != "{":
            message = (
                f"is not a COCO detection file: it is not a json object with lists {lists}{other_format_of(self.file)}"
            )
            raise DetkitError(f"{self.file} {message}")
        self.advance(1)
        seen: set[str] = set()
        while self.next_character() != "}":
            key = self.value()
            if not isinstance(key, str):
                raise self.malformed("a key is expected")
            self.expect(":")
            if key not in lists:
                self.skip_value()
            elif self.next_character() != "[":
                message = f"is not a COCO detection file: '{key}' is not a list (line {self.line})"
                raise DetkitError(f"{self.file} {message}{other_format_of(self.file)}")
            elif key in seen:
                raise self.malformed(f"there is another list '{key}' before this one")
            else:
                seen.add(key)
                yield key, -1, self.line, None
                yield from ((key, *element) for element in self.elements())
            if self.next_character() != "}":
                self.expect(",")
        self.advance(1)
        if not self.at_end():
            raise self.malformed("there is text after the end of the object, as in two concatenated files")

    def skip_value(self) -> None:
        """Skip a value; a list one element at a time."""
        if self.next_character() == "[":
            for _ in self.elements():
                pass
        else:
            self.value()

    def elements(self) -> Iterator[tuple[int, int, Any]]:
        self.advance(1)
        position = 0
        while self.next_character() != "]":
            line = self.line
            yield position, line, self.value()
            position += 1
            if self.next_character() != "]":
                self.expect(",")
        self.advance(1)

    def next_character(self) -> str:
        """Skip whitespace and return the next character without consuming it."""
        if self.position < len(self.text) and self.text[self.position] not in SPACE:
            return self.text[self.position]
        if self.at_end():
            raise self.malformed("unexpected end of file")
        return self.text[self.position]

    def at_end(self) -> bool:
        """Skip whitespace and return whether the end of the file is reached."""
        while True:
            self.advance(_spaces(self.text, self.position).end() - self.position)  # type: ignore[union-attr]  # it always matches
            if self.position < len(self.text) or not self.read_more():
                return self.position == len(self.text)

    def expect(self, character: str) -> None:
        if self.next_character() != character:
            raise self.malformed(f"'{character}' is expected")
        self.advance(1)

    def value(self) -> Any:
        """Parse one json value."""
        self.next_character()
        while True:
            try:
                value, end = _decode(self.text, self.position)
                length = end - self.position
                if (
                    self.text[end : end + 1] in DELIMITERS or not self.read_more()
                ):  # otherwise an incomplete number: 12 of 12.5
                    self.advance(length)
                    return value
            except json.JSONDecodeError as error:
                error_offset = error.pos - self.position
                if not self.read_more():
                    self.advance(error_offset)
                    raise self.malformed(error.msg) from None
            except (ValueError, RecursionError) as error:  # a number with thousands of digits, deeply nested lists
                raise self.malformed(str(error)) from None

    def advance(self, count: int) -> None:
        end = self.position + count
        lines = self.text.count("\n", self.position, end)
        if lines:
            self.line += lines
            self.column = -self.text.rfind("\n", self.position, end) - 1
        self.position = end

    def read_more(self) -> bool:
        """Read at least as much as is unparsed; return False at the end of the file."""
        unread = len(self.text) - self.position
        if unread > MAX_VALUE:
            raise self.malformed(f"one record is longer than {MAX_VALUE} characters, or broken")
        chunk = self.stream.read(max(CHUNK, unread))
        self.column += self.position
        self.text = self.text[self.position :] + chunk
        self.position = 0
        return bool(chunk)

    def malformed(self, message: str) -> DetkitError:
        return DetkitError(
            f"{self.file} is malformed json, line {self.line} column {self.column + self.position + 1}: {message}"
        )
