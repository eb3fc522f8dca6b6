"""Builds validated Annotations from the raw records of a format's reader."""

from array import array
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from detkit.data.annotations import Annotations, PathBuilder
from detkit.data.box_table import BoxTable, GrowingArray
from detkit.data.image_probe import MISSING, probe_all
from detkit.data.issues import IssueLog
from detkit.data.splits import MissingSplit
from detkit.data.validation import validate_boxes, validate_images
from detkit.errors import DetkitError, is_name, shorten

Locate = Callable[[int, int, int], tuple[object, int | None, str]]


def check_class_names(names: Sequence[str], where: str) -> None:
    """Check that every class has a name of its own that can be shown.

    Raises:
        DetkitError: one has none; begins with ``where``, the file and key.
    """
    for name in names:
        if not name.strip():
            raise DetkitError(f"{where} holds the name {name!r}; give every class a name")
        if not is_name(name):
            raise DetkitError(
                f"{where} holds the name {shorten(repr(name))}, which cannot be printed; rename the class"
            )
    if len({name.strip() for name in names}) < len(names):  # nobody sees, and not every format keeps, the space around
        raise DetkitError(f"{where} holds the same name twice; give every class one of its own")


class AnnotationBuilder:
    """Images and boxes as they stand in the files, in flat columns; ``build`` fixes what can be fixed.

    Args:
        source: the file or folder they come from.
        log: where problems go.
        class_names, category_ids: the classes; a box's label is a position in them. They may be set later.
        normalised: boxes are in 0..1 of the upright image instead of pixels.
    """

    def __init__(
        self,
        source: Path,
        log: IssueLog,
        class_names: Sequence[str] = (),
        category_ids: Sequence[int] = (),
        normalised: bool = False,
    ) -> None:
        self.source = source
        self.class_names = tuple(class_names)
        self.category_ids = tuple(category_ids)
        self.log = log
        self.normalised = normalised
        self.paths = PathBuilder()
        self.image_ids = array("q")
        self.stated = array("q")
        self.boxes = BoxTable()

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
        position: int = 0,
        *,
        area: float = float("nan"),
        crowd: bool = False,
    ) -> None:
        """Append a finite box of the image at position ``image``, found in ``line`` of its label file.

        A reader that meets ids before it knows what they stand for gives these, and a ``translate`` to ``build``.

        Args:
            position: in a list of the label file.
            area: in pixels; not a number: that of the box.
            crowd: a region of many objects.
        """
        self.boxes.append(image, label, line, position, xyxy, area, crowd)

    def build(self, locate: Locate, translate: Callable[[np.ndarray], np.ndarray] = lambda rows: rows) -> Annotations:
        """Look at the image files, clip the boxes, drop what cannot be used.

        Args:
            place: (image, line, position) of a box -> its file, its line and words that introduce it, for messages.
            translate: takes ``box_table.ROW`` arrays, puts positions of images and classes in place of ids, and
                returns the rows that have any.

        Raises:
            DetkitError: no image is left.
        """
        if not self.paths:
            first = f": {self.log.issues[0]}" if self.log.issues else ""
            raise DetkitError(f"{self.source} lists no images{first}")
        probes = probe_all(self.paths)
        validation = validate_images(self.paths, probes, np.asarray(self.stated).reshape(-1, 2), self.log)
        usable, sizes = validation.usable, probes[:, :2]
        if not usable.any():
            missing = (probes[:, 4] & MISSING).all()
            raise (MissingSplit if missing else DetkitError)(
                f"{self.source} leaves no image to use: {self.log.summary()}; the first is {self.log.issues[0]}"
            )

        def to_upright_image(rows: np.ndarray) -> np.ndarray:
            rows = translate(rows)
            rows["xyxy"], rows["area"] = validation.to_upright(rows["image"], rows["xyxy"], rows["area"])
            rows["image"] = validation.first_index[rows["image"]]
            return rows[usable[rows["image"]]]

        count, large = len(self.paths), self.boxes.on_disk
        counts = np.zeros(count, np.int64)
        boxes, labels = GrowingArray(np.float64, (4,), large), GrowingArray(np.int32, (), large)
        areas, crowd = GrowingArray(np.float64, (), large), GrowingArray(np.bool_, (), large)
        for rows in self.boxes.by_image(count, to_upright_image):
            clipped, order = self._validate(rows, sizes, locate)
            rows, stated = rows[order], rows["area"][order]
            box_areas = np.prod(clipped[:, 2:] - clipped[:, :2], axis=1)
            boxes.append(clipped)
            labels.append(rows["label"])
            areas.append(np.where(np.isfinite(stated) & (stated >= 0), stated, box_areas))
            crowd.append(rows["crowd"])
            counts += np.bincount(rows["image"], minlength=count)
        counts = counts[usable]
        paths = self.paths.table(usable)
        self.log.extend("without_boxes", np.flatnonzero(counts == 0), lambda k: (paths[k], None, "has no boxes"))
        return Annotations(
            source=self.source,
            paths=paths,
            image_ids=np.asarray(self.image_ids, np.int64)[usable],
            sizes=np.ascontiguousarray(sizes[usable]),
            offsets=np.concatenate(([0], counts.cumsum())),
            boxes=boxes.to_array(),
            labels=labels.to_array(),
            areas=areas.to_array(),
            crowd=crowd.to_array(),
            class_names=self.class_names,
            category_ids=self.category_ids,
            issues=self.log,
        )

    def _validate(self, rows: np.ndarray, sizes: np.ndarray, locate: Locate) -> tuple[np.ndarray, np.ndarray]:
        """Return the clipped boxes (K, 4) of the rows to keep, by image, and which rows these are (K,)."""

        def describe(k: int) -> tuple[object, int | None, str]:
            return locate(*(int(rows[name][k]) for name in ("image", "line", "position")))

        boxes, image_of = rows["xyxy"].copy(), rows["image"].copy()
        boxes, keep = validate_boxes(boxes, rows["label"], image_of, sizes, self.normalised, describe, self.log)
        order = np.flatnonzero(keep)
        order = order[np.argsort(image_of[order], kind="stable")]  # an image's boxes keep the order of the file
        return boxes[order], order
