"""Building validated Annotations from the raw records of a format's reader."""

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
    """Check that every class has a unique, printable name.

    Args:
        names: of the classes.
        where: file and key, with which the message begins.

    Raises:
        DetkitError: a name is missing, cannot be printed, or is repeated.
    """
    for name in names:
        if not name.strip():
            raise DetkitError(f"{where} holds the name {name!r}; give every class a name")
        if not is_name(name):
            raise DetkitError(
                f"{where} holds the name {shorten(repr(name))}, which cannot be printed; rename the class"
            )
    if len({name.strip() for name in names}) < len(names):  # not every format keeps surrounding whitespace
        raise DetkitError(f"{where} holds the same name twice; give every class a unique name")


class AnnotationBuilder:
    """Collects images and boxes as the files state them; ``build`` validates and fixes them.

    Args:
        source: the file or folder they come from.
        log: receives the problems.
        class_names: C names; labels are indices into them. May be set before ``build`` instead.
        category_ids: C ids in the source. May be set before ``build`` instead.
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
        """Append an image and return its index.

        Args:
            path: of the image file.
            image_id: in the source.
            stated: (height, width) according to the labels, 0 if they do not say.

        Raises:
            OverflowError: the id or a size does not fit in 64 bits.
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
        """Append a box.

        A reader that does not know the indices yet passes ids, and a ``translate`` to ``build``.

        Args:
            image: index of the image, or its id.
            label: index of the class, or its id.
            xyxy: four finite numbers.
            line: of the label file.
            position: in a list of the label file.
            area: in pixels; NaN for that of the box.
            crowd: whether it is a region of many objects.

        Raises:
            struct.error: an integer does not fit in 64 bits.
            DetkitError: the temporary folder is full.
        """
        self.boxes.append(image, label, line, position, xyxy, area, crowd)

    def build(self, locate: Locate, translate: Callable[[np.ndarray], np.ndarray] = lambda rows: rows) -> Annotations:
        """Probe the image files, clip the boxes, and drop unusable images and boxes.

        Args:
            locate: maps (image, line, position) of a box to its file, its line and the start of a message.
            translate: replaces ids of images and classes by indices in (K,) ``box_table.ROW`` arrays, and returns the
                rows for which there are any.

        Raises:
            DetkitError: no image is left, or the temporary folder is full.
            MissingSplit: none of the image files exists.
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
                f"{self.source} leaves no usable image: {self.log.summary()}; the first problem: {self.log.issues[0]}"
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
        """Return the clipped boxes (K, 4) to keep, sorted by image, and their rows (K,)."""

        def describe(k: int) -> tuple[object, int | None, str]:
            return locate(*(int(rows[name][k]) for name in ("image", "line", "position")))

        boxes, image_of = rows["xyxy"].copy(), rows["image"].copy()
        boxes, keep = validate_boxes(boxes, rows["label"], image_of, sizes, self.normalised, describe, self.log)
        order = np.flatnonzero(keep)
        order = order[np.argsort(image_of[order], kind="stable")]  # stable: keeps the file's order within an image
        return boxes[order], order
