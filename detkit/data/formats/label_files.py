"""Finding the text file with the labels of an image, in YOLO's layout."""

import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from detkit.data.file_utils import Listings, images_in

# Tools leave these beside the labels.
NON_LABEL_FILES = {
    *("classes.txt", "labels.txt", "readme.txt", "notes.txt"),
    *("train.txt", "val.txt", "valid.txt", "test.txt"),
}


def label_folders(folder: Path) -> list[Path]:
    """Return where the labels of the images in a folder may be: first where ``images`` in its path is ``labels``.

    Where several parts of the path are called so, the last one counts first. The folder itself comes at the end.
    """
    label_dirs: dict[str, Path] = {}
    for parts in (folder.parts, Path(os.path.abspath(folder)).parts):
        for k in reversed(range(len(parts))):
            if parts[k] == "images":
                label_dir = Path(*parts[:k], "labels", *parts[k + 1 :])
                label_dirs.setdefault(os.path.abspath(label_dir), label_dir)
    return [*label_dirs.values(), folder]


class LabelFiles:
    """Finds the label files of images."""

    def __init__(self) -> None:
        self.label_dirs: dict[Path, list[Path]] = {}  # of each folder of images: the folders where its labels may be
        self.stems: dict[Path, set[str]] = defaultdict(set)  # names, without suffix, of the images looked for in each
        self.listings = Listings()
        self.used: set[Path] = set()  # folders in which labels were found

    def candidates(self, image: Path) -> list[Path]:
        """Return the text files that may hold the labels of an image, in the order of their claim."""
        if image.parent not in self.label_dirs:
            self.label_dirs[image.parent] = label_folders(image.parent)
        return [folder / f"{image.stem}.txt" for folder in self.label_dirs[image.parent]]

    def find(self, image: Path) -> Path | None:
        """Return the text file with the labels of an image, the first that is there."""
        self.stems[image.parent].add(image.stem)
        file = next((file for file in self.candidates(image) if self.listings.has(str(file))), None)
        if file is not None:
            self.used.add(file.parent)
        return file

    def without_image(self) -> Iterator[Path]:
        """Yield the text files that belong to no image, in the folders where labels are or should be."""
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
