"""Starting from a checkpoint: what fits is taken, and a report tells how much that was."""

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from detkit.engine.checkpoint import alike, read_header, read_weights
from detkit.errors import DetkitError, shorten


@dataclass(frozen=True)
class TransferRow:
    """One part of a detector, in numbers (elements of its parameters): together they are ``parameters``.

    Attributes:
        loaded: copied from the file.
        mismatched: in the file under the same name, in another shape.
        missing: not in the file.
    """

    part: str
    loaded: int
    mismatched: int
    missing: int

    @property
    def parameters(self) -> int:
        """Return how many there are."""
        return self.loaded + self.mismatched + self.missing


@dataclass(frozen=True)
class TransferReport:
    """What a detector took from a checkpoint.

    Attributes:
        rows: one for each of backbone, neck and head.
        afresh: names of the detector's tensors that kept their own values.
        unexpected_keys: how many of the file's tensors have no place in the detector.
        warnings: sentences on what starts from noise though a percentage may look well.
    """

    path: Path
    rows: tuple[TransferRow, ...]
    missing_keys: tuple[str, ...]
    unexpected_keys: int
    warnings: tuple[str, ...] = ()

    @property
    def total(self) -> TransferRow:
        """Return the rows' sum."""
        return TransferRow(
            "all", *(sum(getattr(r, key) for r in self.rows) for key in ("loaded", "mismatched", "missing"))
        )


def load_weights(detector: nn.Module, path: str | Path) -> TransferReport:
    """Copy into ``detector`` every tensor of a checkpoint whose name and shape it shares, and report on it.

    Raises:
        DetkitError: an unreadable file, or one of which not a single kernel or matrix fits.
    """
    path = Path(path)
    header = read_header(path)
    theirs, own = header.tensors, detector.state_dict()
    names = [name for name in theirs if name in own and alike(own[name], theirs[name])]
    if not any(len(theirs[name].shape) > 1 for name in names):
        raise DetkitError(
            f"weights={path}: not a single kernel in it fits this model: name the model it is of, or leave it out"
        )
    fitting = read_weights(path, names)
    detector.load_state_dict(fitting, strict=False)

    def row(part: str) -> TransferRow:
        counts = {"loaded": 0, "mismatched": 0, "missing": 0}
        for name, parameter in detector.named_parameters():
            if name.startswith(f"{part}."):
                kind = "loaded" if name in fitting else "mismatched" if name in theirs else "missing"
                counts[kind] += parameter.numel()
        return TransferRow(part, **counts)

    missing_keys = tuple(name for name in own if name not in fitting)
    rows = tuple(row(part) for part, _ in detector.named_children())
    warnings = [f"the {row.part} starts from noise" for row in rows if row.loaded < 0.01 * row.parameters]
    known, ours = header.class_names, getattr(detector, "class_names", ())
    if known and ours and known != ours:
        few, wanted = (shorten(", ".join((*names[:3], "..."))) for names in (known, ours))
        warnings.append(
            f"the file knows {len(known)} classes ({few}), this model has {len(ours)} ({wanted}): "
            "what tells them apart has to be learnt"
        )
    return TransferReport(path, rows, missing_keys, sum(name not in own for name in theirs), tuple(warnings))
