"""Problems of data sets, and how training handles them."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from detkit.errors import DetkitError, printable, shorten

NOTE = "note"  # not an error
FIXED = "fixed"  # used after a correction
SKIPPED = "skipped"  # not used
UNFIXED = "unfixed"  # used as is; found only by check_data
MAX_DETAIL = 1000  # characters of a message, and of the file name in it


@dataclass(frozen=True)
class Kind:
    """A kind of problem: ``title`` in the plural, and ``outcome`` (NOTE, FIXED, SKIPPED or UNFIXED)."""

    title: str
    outcome: str


KINDS: dict[str, Kind] = {
    "empty_split": Kind("splits without any box, which training rejects", UNFIXED),
    "broken_shard": Kind("tar shards that are damaged or contain fewer samples than listed", SKIPPED),
    "missing_image": Kind("images that do not exist", SKIPPED),
    "unreadable_image": Kind("images that cannot be read", SKIPPED),
    "truncated_image": Kind("truncated images", SKIPPED),
    "contradicting_size": Kind("images whose shape contradicts their labels", SKIPPED),
    "stated_size": Kind("images whose size differs from their labels, boxes scaled or rotated", FIXED),
    "repeated_image": Kind("images listed twice", SKIPPED),
    "malformed_image": Kind("malformed image records", SKIPPED),
    "unreadable_labels": Kind("images whose label file cannot be read", SKIPPED),
    "missing_labels": Kind("images whose label file does not exist", SKIPPED),
    "labels_without_image": Kind("labels without an image", SKIPPED),
    "malformed_box": Kind("malformed boxes", SKIPPED),
    "unknown_class": Kind("boxes of an undefined class", SKIPPED),
    "degenerate_box": Kind("boxes without area", SKIPPED),
    "outside_box": Kind("boxes outside their image", SKIPPED),
    "duplicate_box": Kind("duplicate boxes", SKIPPED),
    "overhanging_box": Kind("boxes partly outside their image, clipped", FIXED),
    "beyond_one": Kind("boxes with normalised values beyond 0..1, clipped", FIXED),
    "damaged_image": Kind("corrupt images, found by decoding them", UNFIXED),
    "leaked_image": Kind("images that are also in another split", UNFIXED),
    "trained_on": Kind("splits used for both training and validation", UNFIXED),
    "unlabelled_split": Kind("splits without any box, which cannot be evaluated", NOTE),
    "same_split": Kind("splits that contain only images of other splits", NOTE),
    "exif_rotated": Kind("images rotated by their EXIF orientation", NOTE),
    "gray_image": Kind("gray images", NOTE),
    "deep_image": Kind("images with more than 8 bits per channel, read as 8", NOTE),
    "cmyk_image": Kind("CMYK images, read as RGB", NOTE),
    "alpha_image": Kind("images with transparency, which is dropped", NOTE),
    "keypoints": Kind("data sets with keypoints, which are ignored", NOTE),
    "without_boxes": Kind("images without boxes, used as background", NOTE),
    "unlabelled_image": Kind("image files without labels", NOTE),
    "equal_image": Kind("images identical to another one of their split", NOTE),
}


@dataclass(frozen=True)
class Issue:
    """A problem at a file and line (from 1; None if the file has no lines), described by ``detail``."""

    kind: str
    file: str
    line: int | None
    detail: str

    def __str__(self) -> str:
        place = self.file if self.line is None else f"{self.file}:{self.line}"
        return printable(f"{place}: {self.detail}")


class IssueLog:
    """Counts all problems and stores the first ``limit`` of each kind, to bound the memory.

    Attributes:
        counts: number of problems of each kind.
        issues: the stored problems, in the order in which they were found.
    """

    def __init__(self, limit: int = 20) -> None:
        self.limit = limit
        self.counts: Counter[str] = Counter()
        self.issues: list[Issue] = []

    def add(self, kind: str, file: object, line: int | None, detail: str) -> None:
        """Count a problem; store it unless the limit is reached."""
        if self.counts[kind] < self.limit:
            name = str(file)
            if len(name) > MAX_DETAIL:  # longer than file systems allow
                name = shorten(name, MAX_DETAIL)
            self.issues.append(Issue(kind, name, line, shorten(detail, MAX_DETAIL)))
        self.counts[kind] += 1

    def extend(self, kind: str, found: np.ndarray, describe: Callable[[int], tuple[object, int | None, str]]) -> None:
        """Count many problems at once.

        Args:
            kind: of all of them.
            found: (K,) int, arguments of ``describe``.
            describe: returns file, line and message; called only for those that are stored.
        """
        if not len(found):
            return
        room = max(self.limit - self.counts[kind], 0)
        for k in found[:room].tolist():
            self.add(kind, *describe(k))
        self.counts[kind] += max(len(found) - room, 0)

    def of(self, *outcomes: str) -> dict[str, int]:
        """Return the counts of the kinds with one of these outcomes, in the order of KINDS."""
        return {
            name: self.counts[name] for name, kind in KINDS.items() if kind.outcome in outcomes and self.counts[name]
        }

    def summary(self) -> str:
        """Return one line, for example ``skipped: boxes without area (2); fixed: ...``; empty if there is nothing."""
        parts = []
        for outcome in (SKIPPED, FIXED):
            counts = [f"{KINDS[name].title} ({count})" for name, count in self.of(outcome).items()]
            if counts:
                parts.append(f"{outcome}: {', '.join(counts)}")
        return "; ".join(parts)

    def first(self, *outcomes: str) -> Issue | None:
        """Return the first stored problem with one of these outcomes."""
        return next((p for p in self.issues if KINDS[p.kind].outcome in outcomes), None)

    def raise_if_any(self) -> None:
        """Raise an error if anything was fixed or skipped.

        Raises:
            DetkitError: states the first problem and the number of others.
        """
        first = self.first(SKIPPED, FIXED)
        if first is not None:
            others = sum(self.of(SKIPPED, FIXED).values()) - 1
            more = f" (and {others} more)" if others else ""
            message = shorten(str(first), 600)
            raise DetkitError(f"{message}{more}; data.strict=true rejects it, and check_data lists all problems")

    def as_dict(self) -> dict[str, Any]:
        """Return a json-serializable dictionary."""
        return {
            "counts": dict(self.counts),
            "problems": [[p.kind, p.file, p.line, p.detail] for p in self.issues],
        }

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "IssueLog":
        """Restore a log from ``as_dict``."""
        log = cls()
        log.counts.update(content["counts"])
        log.issues = [Issue(*row) for row in content["problems"]]
        return log
