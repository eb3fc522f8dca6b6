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
    folders below the one that all files have in common, if several have the same name.
    """

    def __init__(self, items: Iterable[Item]) -> None:
        streams = [item for item in items if isinstance(item, (str, int))]
        self.names: dict[str, str] = {str(item): safe_name(stream_name(item)) for item in streams}
        files = {item for item in items if isinstance(item, Path)}
        folders = {file.parent: os.path.abspath(file.parent) for file in files}  # noqa: PTH100  (may not exist)
        common = os.path.commonpath(folders.values()) if folders else ""
        stems, names = Counter(file.stem for file in files), Counter(file.name for file in files)
        for file in files:
            if stems[file.stem] == 1 and file.stem not in names:
                self.names[str(file)] = file.stem
            elif names[file.name] == 1:
                self.names[str(file)] = file.name
            else:
                self.names[str(file)] = str(Path(os.path.relpath(folders[file.parent], common), file.name))

    def source(self, frame: Frame) -> str:
        """Return the name of a frame's file, video or stream."""
        return self.names.get(str(frame.path)) or safe_name(frame.name)

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
