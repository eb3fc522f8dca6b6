"""What a checkpoint was recognised to be, and renaming its tensors as detkit names them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Identified:
    """What a checkpoint is.

    Attributes:
        what: in words, such as ``YOLOv8``.
        choices: the arguments of the command line that build it; empty where the tensors do not tell.
        tensors: under detkit's names.
        left_out: names of the file's tensors that are not among them.
        part: "backbone" where the file holds no whole detector that detkit knows, else None.
        head: keys of the head's config that the file decides.
        akconv: whether it has AKConv layers, of which the tensors do not tell how they sample.
        notes: sentences on what else the user should know.
    """

    what: str
    choices: tuple[str, ...]
    tensors: dict[str, Tensor]
    left_out: tuple[str, ...] = ()
    part: str | None = None
    head: Mapping[str, Any] | None = None
    akconv: bool = False
    notes: list[str] = field(default_factory=list)

    @property
    def num_classes(self) -> int:
        """Return C, by the head's last layer."""
        if "head.cls_branches.0.2.bias" in self.tensors:
            return rows(self.tensors["head.cls_branches.0.2.bias"])
        return rows(self.tensors.get("head.predictions.0.bias")) // 3 - 5


def rows(tensor: Tensor | None) -> int:
    """Return the length of the first dimension; 0 where there is none."""
    return tensor.shape[0] if tensor is not None and tensor.ndim else 0


def renamed(tensors: Mapping[str, Tensor], places: Mapping[str, str]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Rename each tensor by the longest of its name's beginnings in ``places``; the others are left out."""
    taken, left_out = {}, []
    for name, tensor in tensors.items():
        begin = next((begin for begin in _beginnings(name) if begin in places), None)
        if begin is None:
            left_out.append(name)
        else:
            taken[places[begin] + name.removeprefix(begin)] = tensor
    return taken, tuple(left_out)


def _beginnings(name: str) -> Iterator[str]:
    """``a.b.c`` -> ``a.b.c``, ``a.b``, ``a``; at most six steps, which no key of ``places`` exceeds."""
    steps = name.split(".", 6)[:6]
    for count in range(len(steps), 0, -1):
        yield ".".join(steps[:count])
