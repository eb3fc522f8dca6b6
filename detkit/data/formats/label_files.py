"""Finding the label files of images in YOLO's layout."""

import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from detkit.data.file_utils import Listings, images_in

# Other text files that tools write next to the labels.
NON_LABEL_FILES = {
    *("classes.txt", "labels.txt", "readme.txt", "notes.txt"),
    *("train.txt", "val.txt", "valid.txt", "test.txt"),
}


def label_folders(folder: Path) -> list[Path]:
    """Return the possible label folders of an image folder: its path with ``images`` replaced by ``labels``.

    If several parts of the path are ``images``, each one is replaced, the last part first. The last candidate is the
    folder itself.
    """
    label_dirs: dict[str, Path] = {}
    absolute = Path(os.path.abspath(folder))  # noqa: PTH100  (Path.resolve would follow links)
    for parts in (folder.parts, absolute.parts):
        for k in reversed(range(len(parts))):
            if parts[k] == "images":
                label_dir = Path(*parts[:k], "labels", *parts[k + 1 :])
                label_dirs.setdefault(os.path.abspath(label_dir), label_dir)  # noqa: PTH100  (as above)
    return [*label_dirs.values(), folder]


class LabelFiles:
    """Finds the label files of images."""

    def __init__(self) -> None:
        self.label_dirs: dict[Path, list[Path]] = {}  # possible label folders of each image folder
        self.stems: dict[Path, set[str]] = defaultdict(set)  # stems of the requested images of each folder
        self.listings = Listings()
        self.used: set[Path] = set()  # folders that contain labels

    def candidates(self, image: Path) -> list[Path]:
        """Return the possible label files of an image in order of priority."""
        if image.parent not in self.label_dirs:
            self.label_dirs[image.parent] = label_folders(image.parent)
        return [folder / f"{image.stem}.txt" for folder in self.label_dirs[image.parent]]

    def find(self, image: Path) -> Path | None:
        """Return the first existing label file of an image."""
        self.stems[image.parent].add(image.stem)
        file = next((file for file in self.candidates(image) if self.listings.has(str(file))), None)
        if file is not None:
            self.used.add(file.parent)
        return file

    def without_image(self) -> Iterator[Path]:
        """Yield the text files without an image in the label folders."""
        known: dict[Path, set[str]] = defaultdict(set)
        folders = set(self.used)
        for image_folder, label_dirs in self.label_dirs.items():
            for folder in label_dirs:
                known[folder] |= self.stems[image_folder] | {image.stem for image in images_in(image_folder)}
            folders |= set(label_dirs[: len(label_dirs) > 1])
        for folder in sorted(folders):
            for name in sorted(self.listings[str(folder)] - NON_LABEL_FILES):
                if name.endswith(".txt") and name[0] != "." and name.removesuffix(".txt") not in known[folder]:
                    yield folder / name
