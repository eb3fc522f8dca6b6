"""Finding the text file with the labels of an image, in YOLO's layout."""

import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from detkit.data.file_utils import Listings, images_in

# Tools leave these beside the labels.
NO_LABELS = {
    *("classes.txt", "labels.txt", "readme.txt", "notes.txt"),
    *("train.txt", "val.txt", "valid.txt", "test.txt"),
}


def label_folders(folder: Path) -> list[Path]:
    """Return where the labels of the images in a folder may be: first where ``images`` in its path is ``labels``.

    Where several parts of the path are called so, the last one counts first. The folder itself comes at the end.
    """
    beside: dict[str, Path] = {}
    for parts in (folder.parts, Path(os.path.abspath(folder)).parts):
        for k in reversed(range(len(parts))):
            if parts[k] == "images":
                place = Path(*parts[:k], "labels", *parts[k + 1 :])
                beside.setdefault(os.path.abspath(place), place)
    return [*beside.values(), folder]


class LabelFiles:
    """Finds the label files of images."""

    def __init__(self) -> None:
        self.places: dict[Path, list[Path]] = {}  # of each folder of images: the folders where its labels may be
        self.stems: dict[Path, set[str]] = defaultdict(set)  # names, without suffix, of the images looked for in each
        self.listings = Listings()
        self.used: set[Path] = set()  # folders in which labels were found

    def candidates(self, image: Path) -> list[Path]:
        """Return the text files that may hold the labels of an image, in the order of their claim."""
        if image.parent not in self.places:
            self.places[image.parent] = label_folders(image.parent)
        return [folder / f"{image.stem}.txt" for folder in self.places[image.parent]]

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
        for image_folder, places in self.places.items():
            for folder in places:
                known[folder] |= self.stems[image_folder] | {image.stem for image in images_in(image_folder)}
            folders |= set(places[: len(places) > 1])
        for folder in sorted(folders):
            for name in sorted(self.listings[str(folder)] - NO_LABELS):
                if name.endswith(".txt") and name[0] != "." and name.removesuffix(".txt") not in known[folder]:
                    yield folder / name
