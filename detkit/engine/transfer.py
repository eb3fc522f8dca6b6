"""Transfer learning: load matching weights from a checkpoint, and report how many."""

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from detkit.engine.checkpoint import is_compatible, read_header, read_weights
from detkit.errors import DetkitError, shorten


@dataclass(frozen=True)
class TransferRow:
    """Number of parameters of one part of a detector; the three counts add up to ``parameters``.

    Attributes:
        part: backbone, neck or head.
        loaded: copied from the file.
        mismatched: in the file under the same name with another shape.
        missing: not in the file.
    """

    part: str
    loaded: int
    mismatched: int
    missing: int

    @property
    def parameters(self) -> int:
        """Return the total number of parameters."""
        return self.loaded + self.mismatched + self.missing


@dataclass(frozen=True)
class TransferReport:
    """Result of loading a checkpoint into a detector.

    Attributes:
        path: the checkpoint.
        rows: one for each of backbone, neck and head.
        missing_keys: names of the detector's tensors that were not loaded.
        unexpected_keys: number of tensors in the file that the detector does not have.
        warnings: messages about parts that remain randomly initialized.
    """

    path: Path
    rows: tuple[TransferRow, ...]
    missing_keys: tuple[str, ...]
    unexpected_keys: int
    warnings: tuple[str, ...] = ()

    @property
    def total(self) -> TransferRow:
        """Return the sum of the rows."""
        return TransferRow(
            "all", *(sum(getattr(r, key) for r in self.rows) for key in ("loaded", "mismatched", "missing"))
        )


def load_weights(detector: nn.Module, path: str | Path) -> TransferReport:
    """Load every tensor of a checkpoint that matches ``detector`` in name and shape, and return a report.

    Raises:
        DetkitError: the file cannot be read, or no kernel or matrix in it matches.
    """
    path = Path(path)
    header = read_header(path)
    saved, expected = header.tensors, detector.state_dict()
    names = [name for name in saved if name in expected and is_compatible(expected[name], saved[name])]
    if not any(len(saved[name].shape) > 1 for name in names):
        raise DetkitError(
            f"weights={path}: no kernel in it matches this model: use the model that it was saved from, or omit weights"
        )
    matching = read_weights(path, names)
    detector.load_state_dict(matching, strict=False)

    def row(part: str) -> TransferRow:
        counts = {"loaded": 0, "mismatched": 0, "missing": 0}
        for name, parameter in detector.named_parameters():
            if name.startswith(f"{part}."):
                kind = "loaded" if name in matching else "mismatched" if name in saved else "missing"
                counts[kind] += parameter.numel()
        return TransferRow(part, **counts)

    missing_keys = tuple(name for name in expected if name not in matching)
    rows = tuple(row(part) for part, _ in detector.named_children())
    warnings = [f"the {row.part} is randomly initialized" for row in rows if row.loaded < 0.01 * row.parameters]
    old, new = header.class_names, getattr(detector, "class_names", ())
    if old and new and old != new:
        old_names, new_names = (shorten(", ".join((*names[:3], "..."))) for names in (old, new))
        warnings.append(
            f"the file has {len(old)} classes ({old_names}), this model has {len(new)} ({new_names}): "
            "classification must be trained again"
        )
    return TransferReport(path, rows, missing_keys, sum(name not in expected for name in saved), tuple(warnings))
