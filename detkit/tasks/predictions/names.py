"""Names of the files that ``predict`` writes."""

import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from detkit.inference.frames import Frame
from detkit.inference.sources import Item
from detkit.inference.video import stream_name


class OutputNames:
    """Unique names, without suffix, for the frames of a source.

    They are those of the files without their suffix; or with it, if several have the same without; or with their
    folders below the one that all files have in common, if several have the same name. A stream is named by its URL.
    What is still equal, as streams may be, or files that differ in case only, is numbered.
    """

    def __init__(self, items: Iterable[Item]) -> None:
        items = list(items)
        files = {item for item in items if isinstance(item, Path)}
        folders = {file.parent: os.path.abspath(file.parent) for file in files}  # noqa: PTH100  (may not exist)
        common = os.path.commonpath(folders.values()) if folders else ""
        stems, names = Counter(file.stem for file in files), Counter(file.name for file in files)
        self.names: dict[str, str] = {}
        taken: set[str] = set()
        for item in dict.fromkeys(item for item in items if isinstance(item, (Path, str, int))):
            if not isinstance(item, Path):
                key, name = stream_name(item), safe_name(stream_name(item))
            elif stems[item.stem] == 1 and item.stem not in names:
                key, name = str(item), item.stem
            elif names[item.name] == 1:
                key, name = str(item), item.name
            else:
                key, name = str(item), str(Path(os.path.relpath(folders[item.parent], common), item.name))
            unique, number = name, 1
            while unique.lower() in taken:
                number += 1
                unique = f"{name}-{number}"
            taken.add(unique.lower())
            self.names[key] = unique

    def source(self, frame: Frame) -> str:
        """Return the name of a frame's file, video or stream."""
        return self.names.get(frame.name) or safe_name(frame.name)

    def frame(self, frame: Frame) -> str:
        """Return the name of a frame: that of its image, or for a video with the frame's index."""
        name = self.source(frame)
        return name if frame.index is None else f"{name}_{frame.index:06}"


def safe_name(text: str) -> str:
    """Return a text as a file name: letters, digits, ``_``, ``-``, ``.`` and ``+``; anything else becomes ``-``."""
    return re.sub(r"[^\w.+-]+", "-", text).strip("-.")[:100] or "unnamed"


def class_folders(class_names: Sequence[str]) -> list[str]:
    """Return a file name for each class, unique whatever the names are and however the file system compares them."""
    names = [safe_name(name) for name in class_names]
    counts = Counter(name.lower() for name in names)
    return [f"{name}_{k}" if counts[name.lower()] > 1 else name for k, name in enumerate(names)]
