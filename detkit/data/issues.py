"""What can be wrong with an image set, and what training does about it."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from detkit.errors import DetkitError, printable, shorten

NOTE = "note"  # worth knowing; nothing is lost
FIXED = "fixed"  # used after a correction
SKIPPED = "skipped"  # not used
MAX_DETAIL = 1000  # characters of a finding, and of the file's name in it
UNFIXED = "unfixed"  # used as it is: only check_data looks for it


@dataclass(frozen=True)
class Kind:
    """A kind of problem: ``title`` in the plural, as it is counted, and what becomes of such a thing."""

    title: str
    outcome: str


KINDS: dict[str, Kind] = {
    "empty_split": Kind("splits without any box, which stop a training", UNFIXED),
    "broken_shard": Kind("tar shards that are damaged or hold less than is listed", SKIPPED),
    "missing_image": Kind("images that do not exist", SKIPPED),
    "unreadable_image": Kind("images that cannot be read", SKIPPED),
    "truncated_image": Kind("truncated images", SKIPPED),
    "contradicting_size": Kind("images of another shape than their labels state", SKIPPED),
    "stated_size": Kind("images of another size than their labels state, boxes scaled or turned along", FIXED),
    "repeated_image": Kind("images listed twice", SKIPPED),
    "malformed_image": Kind("malformed image records", SKIPPED),
    "unreadable_labels": Kind("images whose label file cannot be read", SKIPPED),
    "missing_labels": Kind("images whose label file does not exist", SKIPPED),
    "labels_without_image": Kind("labels without an image", SKIPPED),
    "malformed_box": Kind("malformed boxes", SKIPPED),
    "unknown_class": Kind("boxes of a class that the set does not define", SKIPPED),
    "degenerate_box": Kind("boxes without area", SKIPPED),
    "outside_box": Kind("boxes outside their image", SKIPPED),
    "duplicate_box": Kind("boxes given twice", SKIPPED),
    "overhanging_box": Kind("boxes partly outside their image, clipped", FIXED),
    "beyond_one": Kind("boxes with normalised values beyond 0..1, clipped", FIXED),
    "damaged_image": Kind("images damaged within, found by decoding them", UNFIXED),
    "leaked_image": Kind("images that are in another split, too", UNFIXED),
    "trained_on": Kind("splits that are trained on and validated with", UNFIXED),
    "unlabelled_split": Kind("splits without any box, which cannot be evaluated", NOTE),
    "same_split": Kind("splits without an image of their own", NOTE),
    "exif_rotated": Kind("images turned upright by their EXIF orientation", NOTE),
    "gray_image": Kind("gray images", NOTE),
    "deep_image": Kind("images of more than 8 bits a channel, read as 8", NOTE),
    "cmyk_image": Kind("CMYK images, read as RGB", NOTE),
    "alpha_image": Kind("images with transparency, which is dropped", NOTE),
    "keypoints": Kind("label sets with keypoints, which are not used", NOTE),
    "without_boxes": Kind("images without boxes, background", NOTE),
    "unlabelled_image": Kind("image files without labels", NOTE),
    "equal_image": Kind("images that show the same as another of their split", NOTE),
}


@dataclass(frozen=True)
class Issue:
    """One finding: where (``line`` counts from 1; None where a file has no lines) and what in words."""

    kind: str
    file: str
    line: int | None
    detail: str

    def __str__(self) -> str:
        place = self.file if self.line is None else f"{self.file}:{self.line}"
        return printable(f"{place}: {self.detail}")


class IssueLog:
    """Counts every problem and keeps the first ``limit`` of a kind, so that a bad set cannot fill the memory.

    Attributes:
        counts: how many of each kind.
        problems: those kept, in the order they were found.
    """

    def __init__(self, limit: int = 20) -> None:
        self.limit = limit
        self.counts: Counter[str] = Counter()
        self.issues: list[Issue] = []

    def add(self, kind: str, file: object, line: int | None, detail: str) -> None:
        """Count a problem; keep it while there is room."""
        if self.counts[kind] < self.limit:
            name = str(file)
            if len(name) > MAX_DETAIL:  # longer than most systems have them: not a name, or not of this machine
                name = shorten(name, MAX_DETAIL)
            self.issues.append(Issue(kind, name, line, shorten(detail, MAX_DETAIL)))
        self.counts[kind] += 1

    def extend(self, kind: str, found: np.ndarray, describe: Callable[[int], tuple[object, int | None, str]]) -> None:
        """Count many problems at once: ``describe`` gives file, line and words of those that are kept.

        Args:
            found: (K,) int, whatever ``describe`` takes.
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
        """Return one line such as ``skipped: boxes without area (2); fixed: ...``, empty where there is nothing."""
        parts = []
        for outcome in (SKIPPED, FIXED):
            counts = [f"{KINDS[name].title} ({count})" for name, count in self.of(outcome).items()]
            if counts:
                parts.append(f"{outcome}: {', '.join(counts)}")
        return "; ".join(parts)

    def first(self, *outcomes: str) -> Issue | None:
        """Return the first problem kept that has one of these outcomes."""
        return next((p for p in self.issues if KINDS[p.kind].outcome in outcomes), None)

    def raise_if_any(self) -> None:
        """Check that nothing was fixed or skipped.

        Raises:
            DetkitError: names the first problem and how many more there are.
        """
        first = self.first(SKIPPED, FIXED)
        if first is not None:
            others = sum(self.of(SKIPPED, FIXED).values()) - 1
            more = f" (and {others} more)" if others else ""
            message = shorten(str(first), 600)
            raise DetkitError(f"{message}{more}; data.strict=true refuses it, and check_data lists everything")

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for json."""
        return {
            "counts": dict(self.counts),
            "problems": [[p.kind, p.file, p.line, p.detail] for p in self.issues],
        }

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "IssueLog":
        """Return the log that ``as_dict`` described."""
        log = cls()
        log.counts.update(content["counts"])
        log.issues = [Issue(*row) for row in content["problems"]]
        return log
