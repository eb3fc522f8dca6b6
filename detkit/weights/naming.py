"""The result of identifying a checkpoint, and renaming its tensors to detkit's names."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Identified:
    """An identified checkpoint.

    Attributes:
        what: name of the model, for example ``YOLOv8``.
        choices: command-line arguments that build it; empty if the tensors do not determine them.
        tensors: tensors by detkit's names.
        unused: names in the file of the other tensors.
        part: "backbone" if the file contains no complete detector known to detkit, else None.
        head: keys of the head's config that are taken from the file.
        akconv: whether it has AKConv layers, whose ``sampling`` cannot be inferred from the tensors.
        notes: further messages for the user.
    """

    what: str
    choices: tuple[str, ...]
    tensors: dict[str, Tensor]
    unused: tuple[str, ...] = ()
    part: str | None = None
    head: Mapping[str, Any] | None = None
    akconv: bool = False
    notes: list[str] = field(default_factory=list)

    @property
    def num_classes(self) -> int:
        """Number of classes, from the head's last layer."""
        if "head.cls_branches.0.2.bias" in self.tensors:
            return rows(self.tensors["head.cls_branches.0.2.bias"])
        return rows(self.tensors.get("head.predictions.0.bias")) // 3 - 5


def rows(tensor: Tensor | None) -> int:
    """Return the size of the first dimension; 0 without a tensor or dimension."""
    return tensor.shape[0] if tensor is not None and tensor.ndim else 0


def renamed(tensors: Mapping[str, Tensor], places: Mapping[str, str]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Replace the longest prefix of each name that is in ``places``; return the tensors, and the names without one."""
    taken, unused = {}, []
    for name, tensor in tensors.items():
        prefix = next((prefix for prefix in _prefixes(name) if prefix in places), None)
        if prefix is None:
            unused.append(name)
        else:
            taken[places[prefix] + name.removeprefix(prefix)] = tensor
    return taken, tuple(unused)


def _prefixes(name: str) -> Iterator[str]:
    """Yield the prefixes of ``a.b.c``: ``a.b.c``, ``a.b``, ``a``; at most six parts, the maximum in ``places``."""
    parts = name.split(".", 6)[:6]
    for count in range(len(parts), 0, -1):
        yield ".".join(parts[:count])
