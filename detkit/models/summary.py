"""Model summary: output shapes, parameters, FLOPs and time of each module of a detector."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

CONTAINERS = (nn.ModuleList, nn.ModuleDict)  # they compute nothing: their entries are listed instead


@dataclass(frozen=True)
class Row:
    """One module, or a module's own parameters and computation without its children.

    Attributes:
        name: dotted path within the detector; ends in ``(own)`` for a module without its children.
        kind: name of its class.
        shapes: shapes of its outputs, for example ``1x64x80x80``; empty if it is never called.
        parameters, flops: including submodules; shared parameters and modules count once, where they first appear.
        leaf: its children are not listed; the leaves add up to the detector.
        ms: measured milliseconds including submodules; None if nothing was measured.
    """

    name: str
    kind: str
    shapes: tuple[str, ...]
    parameters: int
    flops: int
    leaf: bool
    ms: float | None = None


def summarize(detector: nn.Module, image_size: int, depth: int) -> list[Row]:
    """Run one image through a detector and return its modules down to ``depth``, parents first.

    Every operation is attributed to the innermost running module, so that the leaves add up to the total even if a
    module runs several times, or its children are called directly.
    """
    device = next(detector.parameters()).device
    with _record_calls(detector) as (own_flops, outputs), torch.no_grad():
        detector.eval()(torch.zeros(1, 3, image_size, image_size, device=device))
    seen: set[int] = set()  # modules and parameters already counted

    def count_own(modules: list[nn.Module]) -> tuple[int, int]:
        """Return parameters and FLOPs of these modules without their children, skipping those already counted."""
        parameters = flops = 0
        for module in modules:
            if id(module) not in seen:
                flops += own_flops[module]
            new = {id(p): p.numel() for p in module.parameters(recurse=False) if id(p) not in seen}
            parameters += sum(new.values())
            seen.update(new, [id(module)])
        return parameters, flops

    def walk(name: str, module: nn.Module, level: int) -> list[Row]:
        kind, shapes = type(module).__name__, tuple(dict.fromkeys(outputs.get(module, ())))
        children = _children(module)
        if level == depth or not children:
            return [Row(name, kind, shapes, *count_own(list(module.modules())), leaf=True)]
        rows: list[Row] = []
        for path, child in children:
            if id(child) not in seen:
                rows += walk(f"{name}.{path}".lstrip("."), child, level + 1)
        own = Row(f"{name} (own)".strip(), kind, (), *count_own([module]), leaf=True)
        rows += [own] if own.parameters or own.flops else []
        leaves = [row for row in rows if row.leaf]
        total = sum(row.parameters for row in leaves), sum(row.flops for row in leaves)
        return [Row(name or "total", kind, shapes, *total, leaf=False), *rows]

    total, *rows = walk("", detector, 0)
    return [*rows, total]


def add_times(rows: list[Row], seconds: Mapping[str, float]) -> list[Row]:
    """Return the rows with the measured times.

    Args:
        rows: of ``summarize``.
        seconds: of ``module_seconds``, of the same detector or its deployed form. Time of a module that is not listed
            counts for the listed one that it is part of.
    """
    names = {row.name for row in rows}
    own: dict[str, float] = defaultdict(float)  # by listed module; "" is the detector itself
    for path, value in seconds.items():
        while path and path not in names:
            path = path.rpartition(".")[0]
        own[path] += value

    def milliseconds(name: str) -> float:
        if name.endswith("(own)"):
            return 1000 * own[name.removesuffix("(own)").rstrip()]
        return 1000 * sum(value for path, value in own.items() if name == "total" or f"{path}.".startswith(f"{name}."))

    return [replace(row, ms=milliseconds(row.name)) for row in rows]


def print_summary(rows: list[Row], console: Console) -> None:
    """Print one row per module, parents in bold, and the total last."""
    table = Table(header_style="bold")
    table.add_column("module", overflow="fold")
    table.add_column("class", overflow="fold")
    table.add_column("output", overflow="fold")
    table.add_column("parameters", justify="right", no_wrap=True)
    table.add_column("GFLOPs", justify="right", no_wrap=True)
    if rows[-1].ms is not None:
        table.add_column("ms", justify="right", no_wrap=True)
    *modules, total = rows
    for row in modules:
        table.add_row(row.name, row.kind, "\n".join(row.shapes), *_figures(row), style=None if row.leaf else "bold")
    table.add_section()
    table.add_row(total.name, total.kind, "", *_figures(total), style="bold")
    console.print(table, soft_wrap=False)


def summary_markdown(rows: list[Row]) -> str:
    """Return the table of ``summarize`` as Markdown."""
    lines = ["| module | class | output | parameters | GFLOPs |", "| --- | --- | --- | ---: | ---: |"]
    for row in rows:
        lines.append(f"| {' | '.join((row.name, row.kind, ', '.join(row.shapes), *_figures(row)))} |")
    return "\n".join(lines)


def _figures(row: Row) -> tuple[str, ...]:
    times = () if row.ms is None else (f"{row.ms:.2f}",)
    return f"{row.parameters:,}", f"{row.flops / 1e9:.2f}", *times


def _children(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the direct submodules with their dotted names; containers are replaced by their entries."""
    found: list[tuple[str, nn.Module]] = []
    for name, child in module.named_children():
        if type(child) in CONTAINERS:
            found += [(f"{name}.{path}", entry) for path, entry in _children(child)]
        else:
            found.append((name, child))
    return found


@contextmanager
def _record_calls(module: nn.Module) -> Iterator[tuple[Mapping[nn.Module, int], Mapping[nn.Module, list[str]]]]:
    """Yield two mappings filled while the module runs: each module's FLOPs without children, and its output shapes."""
    own_flops: Counter[nn.Module] = Counter()
    outputs: dict[nn.Module, list[str]] = {}
    running = [module]
    counted = 0
    counter = FlopCounterMode(display=False)

    def record_flops() -> None:
        nonlocal counted
        total = counter.get_total_flops()
        own_flops[running[-1]] += total - counted
        counted = total

    def enter(entered: nn.Module, _: Any) -> None:
        record_flops()
        running.append(entered)

    def leave(left: nn.Module, _: Any, output: Any) -> None:
        record_flops()
        running.pop()
        outputs.setdefault(left, []).extend(_shapes(output))

    handles = [m.register_forward_pre_hook(enter) for m in module.modules()]
    handles += [m.register_forward_hook(leave) for m in module.modules()]
    try:
        with counter:
            yield own_flops, outputs
        record_flops()
    finally:
        for handle in handles:
            handle.remove()


def _shapes(output: Any, name: str = "") -> list[str]:
    """Return the shape of every tensor in a nested output of tensors, sequences, mappings and dataclasses."""
    if isinstance(output, Tensor):
        return [f"{name} {'x'.join(map(str, output.shape))}".strip()]
    if is_dataclass(output):
        return [s for field in fields(output) for s in _shapes(getattr(output, field.name), field.name)]
    if isinstance(output, Mapping):
        return [s for key, value in output.items() for s in _shapes(value, str(key))]
    if isinstance(output, (list, tuple)):
        return [s for value in output for s in _shapes(value, name)]
    return []
