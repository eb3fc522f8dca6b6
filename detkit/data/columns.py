"""From what a format's reader meets, record by record, to clean Annotations."""

from array import array
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from detkit.data.annotations import Annotations, PathTable
from detkit.data.images import probe_all
from detkit.data.mending import judge_boxes, judge_images
from detkit.data.problems import ProblemLog
from detkit.errors import DetkitError, shorten


def check_class_names(names: Sequence[str], where: str) -> None:
    """Check that every class has a name of its own that can be shown.

    Raises:
        DetkitError: one has none; begins with ``where``, the file and key.
    """
    for name in names:
        if not name.strip():
            raise DetkitError(f"{where} holds the name {name!r}; give every class a name")
        if not name.isprintable():
            raise DetkitError(
                f"{where} holds the name {shorten(repr(name))}, which cannot be printed; rename the class"
            )
    if len(set(names)) < len(names):
        raise DetkitError(f"{where} holds the same name twice; give every class one of its own")


class Columns:
    """Images and boxes as they stand in the files, in flat columns; ``finish`` mends what can be mended.

    Args:
        source: the file or folder they come from.
        log: where problems go.
        class_names, category_ids: the classes; a box's label is a position in them. They may be set later.
        normalised: boxes are in 0..1 of the upright image instead of pixels.
    """

    def __init__(
        self,
        source: Path,
        log: ProblemLog,
        class_names: Sequence[str] = (),
        category_ids: Sequence[int] = (),
        normalised: bool = False,
    ) -> None:
        self.source = source
        self.class_names = tuple(class_names)
        self.category_ids = tuple(category_ids)
        self.log = log
        self.normalised = normalised
        self.paths: list[str] = []
        self.image_ids = array("q")
        self.stated = array("q")
        self.image_of, self.label, self.line = array("q"), array("q"), array("q")
        self.xyxy, self.area = array("d"), array("d")
        self.crowd = array("b")

    def add_image(self, path: str | Path, image_id: int, stated: tuple[int, int] = (0, 0)) -> int:
        """Append an image, of which the labels state (height, width), 0 where they do not; return its position.

        Raises:
            OverflowError: an id or a size beyond 64 bits.
        """
        self.image_ids.append(image_id)
        self.stated.extend(stated)
        self.paths.append(str(path))
        return len(self.paths) - 1

    def add_box(
        self,
        image: int,
        label: int,
        xyxy: Sequence[float],
        line: int,
        *,
        area: float = float("nan"),
        crowd: bool = False,
    ) -> None:
        """Append a finite box of the image at position ``image``, found in ``line`` of its label file.

        A reader that meets ids before it knows what they stand for gives these, and calls ``choose``.

        Args:
            area: in pixels; not a number: that of the box.
            crowd: a region of many objects.
        """
        self.xyxy.extend(xyxy)
        self.area.append(area)
        self.image_of.append(image)
        self.label.append(label)
        self.line.append(line)
        self.crowd.append(crowd)

    def choose(self, image_of: np.ndarray, label: np.ndarray, keep: np.ndarray) -> None:
        """Put positions of images and classes (T,) in place of the boxes' ids; keep the boxes of ``keep`` (T,) bool."""
        self.image_of, self.label = image_of[keep], label[keep]
        for name, width in (("line", 1), ("xyxy", 4), ("area", 1), ("crowd", 1)):
            column = np.asarray(getattr(self, name)).reshape(len(keep), width)
            setattr(self, name, column[keep].reshape(-1))

    def finish(self, place: Callable[[int, int], tuple[object, int | None, str]]) -> Annotations:
        """Look at the image files, clip the boxes, drop what cannot be used.

        Args:
            place: (image, line) of a box -> its file, its line and words that introduce it, for messages.

        Raises:
            DetkitError: no image is left.
        """
        if not self.paths:
            first = f": {self.log.problems[0]}" if self.log.problems else ""
            raise DetkitError(f"{self.source} lists no images{first}")
        probes = probe_all(self.paths)
        image_of, lines, labels, boxes, areas = map(
            np.asarray, (self.image_of, self.line, self.label, self.xyxy, self.area)
        )
        boxes = boxes.reshape(-1, 4).astype(np.float64)
        stated = np.asarray(self.stated).reshape(-1, 2)
        usable, image_of, boxes, areas = judge_images(self.paths, probes, stated, image_of, boxes, areas, self.log)
        if not usable.any():
            raise DetkitError(
                f"{self.source} leaves no image to use: {self.log.summary()}; the first is {self.log.problems[0]}"
            )
        sizes = probes[:, :2]
        boxes, keep = judge_boxes(
            boxes,
            labels,
            image_of,
            sizes,
            usable,
            self.normalised,
            lambda k: place(int(image_of[k]), int(lines[k])),
            self.log,
        )
        order = np.flatnonzero(keep)
        order = order[np.argsort(image_of[order], kind="stable")]  # an image's boxes keep the order of the file
        boxes = boxes[order]
        areas = areas[order]
        own = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
        position = (np.cumsum(usable) - 1)[image_of[order]]
        offsets = np.searchsorted(position, np.arange(usable.sum() + 1)).astype(np.int64)
        names = [path for path, good in zip(self.paths, usable, strict=True) if good]
        empty = np.flatnonzero(np.diff(offsets) == 0)
        self.log.extend("without_boxes", empty, lambda k: (names[k], None, "has no boxes"))
        return Annotations(
            source=self.source,
            paths=PathTable.of(names),
            image_ids=np.asarray(self.image_ids, np.int64)[usable],
            sizes=np.ascontiguousarray(sizes[usable]),
            offsets=offsets,
            boxes=boxes,
            labels=labels[order].astype(np.int32),
            areas=np.where(np.isfinite(areas) & (areas >= 0), areas, own),
            crowd=np.asarray(self.crowd, np.int8)[order].astype(bool),
            class_names=self.class_names,
            category_ids=self.category_ids,
            problems=self.log,
        )
