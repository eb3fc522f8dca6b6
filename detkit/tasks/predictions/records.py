"""Files of records that grow with every image: predictions.json, predictions.csv and COCO results."""

import csv
import errno
import io
import json
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from detkit.inference.frames import Frame
from detkit.structures import Detections

CSV_COLUMNS = ("file", "frame", "track", "name", "label", "score", "x1", "y1", "x2", "y2")


class RecordFile:
    """A text file that is written record by record, and renamed from a temporary file by ``close``.

    It is complete after every record, so that nothing is lost if the program ends in between.

    Args:
        path: file to write.
        head, tail: text before the first and after the last record.
        separator: text between records.
        make_room: called on a full disk; frees some space and returns True, or returns False.

    Raises:
        OSError: the file cannot be written; ``filename`` is ``path``.
    """

    def __init__(
        self,
        path: Path,
        head: str,
        tail: str = "",
        separator: str = "",
        make_room: Callable[[], bool] = lambda: False,
    ) -> None:
        self.path, self.tail, self.separator, self.make_room = path, tail.encode(), separator, make_room
        self.temporary = path.with_name(f".{path.name}.tmp")
        try:
            self.temporary.unlink(missing_ok=True)  # it might be a pipe, which blocks on opening, or a symlink
            self.file = self.temporary.open("xb", buffering=0)
        except OSError as error:
            raise self._named(error) from None
        self.size = 0  # in bytes, without the tail
        self.count = 0
        try:
            self._write(head.encode())
        except OSError:
            self.file.close()
            self.temporary.unlink(missing_ok=True)
            raise

    def append(self, text: str) -> None:
        """Write one record; what is not Unicode in it, as in file names, is escaped.

        Raises:
            OSError: the disk is full, for instance; the file still holds the records before.
        """
        separator = self.separator if self.count else ""
        self._write((separator + text).encode(errors="backslashreplace"))
        self.count += 1

    def close(self) -> None:
        """Give the file its name; all records are on disk then.

        Raises:
            OSError: it cannot be written or renamed.
        """
        try:
            with self.file:
                os.fsync(self.file.fileno())
            self.temporary.replace(self.path)
        except OSError as error:
            raise self._named(error) from None

    def _write(self, data: bytes) -> None:
        """Write ``data`` over the tail, and the tail behind it."""
        while True:
            try:
                self._write_at(data + self.tail, self.size)
                self.size += len(data)
                return
            except OSError as error:
                os.ftruncate(self.file.fileno(), self.size)
                if error.errno in (errno.ENOSPC, errno.EDQUOT) and self.make_room():
                    continue
                with suppress(OSError):
                    self._write_at(self.tail, self.size)
                raise self._named(error) from None

    def _write_at(self, data: bytes, position: int) -> None:
        while data:
            written = os.pwrite(self.file.fileno(), data, position)
            data, position = data[written:], position + written

    def _named(self, error: OSError) -> OSError:
        error.filename, error.filename2 = str(self.path), None
        return error


class Records:
    """``predictions.json`` and ``predictions.csv``, and with ``coco`` ``coco_results.json`` and ``coco_images.json``.

    Args:
        run_dir: an existing folder.
        class_names: of the model.
        coco: whether to write COCO files, in which images are numbered from 1 in the order they are predicted, and
            classes from 1.
        make_room: see RecordFile.
    """

    def __init__(self, run_dir: Path, class_names: Sequence[str], coco: bool, make_room: Callable[[], bool]) -> None:
        self.count = 0
        with ExitStack() as files:  # closed here only if one of them cannot be opened

            def add(name: str, head: str, tail: str = "", separator: str = "") -> RecordFile:
                file = RecordFile(run_dir / name, head, tail, separator, make_room)
                files.callback(file.close)
                return file

            self.json = add("predictions.json", "[\n", "\n]\n", ",\n")
            self.csv = add("predictions.csv", _csv_row(CSV_COLUMNS))
            self.coco: tuple[RecordFile, RecordFile] | None = None
            if coco:
                categories = [{"id": k, "name": name} for k, name in enumerate(class_names, 1)]
                head = f'{{"categories": {json.dumps(categories)},\n"images": [\n'
                images = add("coco_images.json", head, "\n]}\n", ",\n")
                self.coco = images, add("coco_results.json", "[\n", "\n]\n", ",\n")
            self.files = files.pop_all()

    def write(self, frame: Frame, found: Detections) -> None:
        """Write what was found in a frame.

        Raises:
            OSError: a file cannot be written.
        """
        record = found.to_dict() | {"file": frame.name}
        self.json.append(json.dumps(record))
        self.count += 1
        if record["detections"]:
            self.csv.append("".join(_csv_row(row) for row in _csv_rows(record)))
        if self.coco is not None:
            images, results = self.coco
            name = frame.name if frame.index is None else f"{frame.name}#{frame.index}"
            image = {"id": self.count, "file_name": name, "height": found.size[0], "width": found.size[1]}
            images.append(json.dumps(image))
            if len(found):
                results.append(",\n".join(json.dumps(result) for result in found.to_coco(self.count)))

    def __enter__(self) -> "Records":
        return self

    def __exit__(self, *_: object) -> None:
        self.files.close()


def _csv_rows(record: dict[str, Any]) -> list[tuple[Any, ...]]:
    return [
        (record["file"], record.get("frame"), d.get("track"), d["name"], d["label"], d["score"], *d["box"])
        for d in record["detections"]
    ]


def _csv_row(values: Sequence[Any]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(values)
    return text.getvalue()
