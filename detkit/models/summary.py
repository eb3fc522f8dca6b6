"""What each module of a detector gives, holds and costs."""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

LISTS = (nn.ModuleList, nn.ModuleDict)  # they compute nothing: their entries stand in their place


@dataclass(frozen=True)
class Row:
    """One module, or what a module does itself beside its children.

    Attributes:
        name: dotted, from the detector; ends in ``(own)`` for a module's own share.
        kind: its class.
        shapes: of the tensors it gives, such as ``1x64x80x80``; empty where it is not called as a module.
        parameters, flops: with all it contains; a parameter or module met before counts there only.
        leaf: its children are not shown; the leaves add up to the detector.
    """

    name: str
    kind: str
    shapes: tuple[str, ...]
    parameters: int
    flops: int
    leaf: bool


def summarize(detector: nn.Module, image_size: int, depth: int) -> list[Row]:
    """Run one image through a detector and return its modules down to ``depth``, parents first.

    Every operation counts for the innermost module that is running, so that the leaves add up to the total also where
    a module runs several times, or is never called while its children are.
    """
    device = next(detector.parameters()).device
    with _watch(detector) as (own_flops, outputs), torch.no_grad():
        detector.eval()(torch.zeros(1, 3, image_size, image_size, device=device))
    seen: set[int] = set()  # modules and parameters that a row holds already

    def share(modules: list[nn.Module]) -> tuple[int, int]:
        """Parameters and operations of these modules themselves, without what was met before."""
        parameters = flops = 0
        for module in modules:
            if id(module) not in seen:
                flops += own_flops[module]
            fresh = {id(p): p.numel() for p in module.parameters(recurse=False) if id(p) not in seen}
            parameters += sum(fresh.values())
            seen.update(fresh, [id(module)])
        return parameters, flops

    def walk(name: str, module: nn.Module, level: int) -> list[Row]:
        kind, shapes = type(module).__name__, tuple(dict.fromkeys(outputs.get(module, ())))
        children = _children(module)
        if level == depth or not children:
            return [Row(name, kind, shapes, *share(list(module.modules())), leaf=True)]
        rows: list[Row] = []
        for path, child in children:
            if id(child) not in seen:
                rows += walk(f"{name}.{path}".lstrip("."), child, level + 1)
        own = Row(f"{name} (own)".strip(), kind, (), *share([module]), leaf=True)
        rows += [own] if own.parameters or own.flops else []
        leaves = [row for row in rows if row.leaf]
        total = sum(row.parameters for row in leaves), sum(row.flops for row in leaves)
        return [Row(name or "total", kind, shapes, *total, leaf=False), *rows]

    total, *rows = walk("", detector, 0)
    return [*rows, total]


def print_summary(rows: list[Row], console: Console) -> None:
    """Print a row a module, those whose children follow in bold, the total last."""
    table = Table(header_style="bold")
    table.add_column("module", overflow="fold")
    table.add_column("class", overflow="fold")
    table.add_column("output", overflow="fold")
    table.add_column("parameters", justify="right", no_wrap=True)
    table.add_column("GFLOPs", justify="right", no_wrap=True)
    *modules, total = rows
    for row in modules:
        table.add_row(row.name, row.kind, "\n".join(row.shapes), *_figures(row), style=None if row.leaf else "bold")
    table.add_section()
    table.add_row(total.name, total.kind, "", *_figures(total), style="bold")
    console.print(table, soft_wrap=False)


def summary_markdown(rows: list[Row]) -> str:
    """Return the table as Markdown."""
    lines = ["| module | class | output | parameters | GFLOPs |", "| --- | --- | --- | ---: | ---: |"]
    for row in rows:
        lines.append(f"| {' | '.join((row.name, row.kind, ', '.join(row.shapes), *_figures(row)))} |")
    return "\n".join(lines)


def _figures(row: Row) -> tuple[str, str]:
    return f"{row.parameters:,}", f"{row.flops / 1e9:.2f}"


def _children(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the modules directly below, those of lists in place of the lists, with their dotted names."""
    found: list[tuple[str, nn.Module]] = []
    for name, child in module.named_children():
        if type(child) in LISTS:
            found += [(f"{name}.{path}", entry) for path, entry in _children(child)]
        else:
            found.append((name, child))
    return found


@contextmanager
def _watch(module: nn.Module) -> Iterator[tuple[Mapping[nn.Module, int], Mapping[nn.Module, list[str]]]]:
    """Yield, filled while the module runs: the operations of each module itself, and the shapes of its outputs."""
    own_flops: Counter[nn.Module] = Counter()
    outputs: dict[nn.Module, list[str]] = {}
    running = [module]
    counted = 0
    counter = FlopCounterMode(display=False)

    def settle() -> None:
        nonlocal counted
        total = counter.get_total_flops()
        own_flops[running[-1]] += total - counted
        counted = total

    def enter(entered: nn.Module, _: Any) -> None:
        settle()
        running.append(entered)

    def leave(left: nn.Module, _: Any, output: Any) -> None:
        settle()
        running.pop()
        outputs.setdefault(left, []).extend(_shapes(output))

    handles = [m.register_forward_pre_hook(enter) for m in module.modules()]
    handles += [m.register_forward_hook(leave) for m in module.modules()]
    try:
        with counter:
            yield own_flops, outputs
        settle()
    finally:
        for handle in handles:
            handle.remove()


def _shapes(output: Any, name: str = "") -> list[str]:
    """Return the shape of every tensor in an output: a tensor, a sequence, a mapping or a dataclass of these."""
    if isinstance(output, Tensor):
        return [f"{name} {'x'.join(map(str, output.shape))}".strip()]
    if is_dataclass(output):
        return [s for field in fields(output) for s in _shapes(getattr(output, field.name), field.name)]
    if isinstance(output, Mapping):
        return [s for key, value in output.items() for s in _shapes(value, str(key))]
    if isinstance(output, (list, tuple)):
        return [s for value in output for s in _shapes(value, name)]
    return []
