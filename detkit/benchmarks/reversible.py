"""Benchmark of RevCol's memory, exactness and speed by number of columns, compared to plain autograd."""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from detkit.benchmarks.common import BenchmarkConfig, describe, print_result, time_in_turns
from detkit.models.backbones.revcol import STRIDES, RevCol
from detkit.models.profiling import activation_bytes
from detkit.ops.device import pick_device
from detkit.ops.precision import seed_everything

COLUMNS = (1, 2, 4, 8, 16)
PLAIN = "plain"
SETTINGS = {PLAIN: None} | {f"keep_every={k}": k for k in (0, 1, 2, 4)}
SIZE, CHANNELS = 256, (64, 128, 256, 512)
ERROR_SIZE, ERROR_CHANNELS = 64, (16, 32, 64, 128)  # float64 convolutions are slow
GAMMA = 0.3
PRECISIONS = {"float64": torch.float64, "float32": torch.float32, "bf16": torch.float32}


def run(cfg: BenchmarkConfig) -> dict[str, Any]:
    """Measure RevCol with the widths of revcol_tiny, batch size 1, for all numbers of columns and settings.

    The error is measured on a narrower model and a smaller image. It is the maximum over all parameters of the norm of
    the difference to plain autograd's gradient in the same precision, relative to the norm of that gradient. The
    blocks' gammas are 0.3: their initial value, 1e-6, would hide the blocks.
    """
    device = pick_device(cfg.device)
    seed_everything(cfg.seed)
    caption = f"errors: {ERROR_SIZE} px, {ERROR_CHANNELS} channels, gamma {GAMMA}, alpha 0.5; bf16: autocast"
    columns = ("columns", "keep_every", "MiB saved", *(f"error, {name}" for name in PRECISIONS), "ms")
    table = Table(*columns, header_style="bold", title=f"RevCol, {SIZE} px, batch 1", caption=caption)
    result: dict[str, Any] = {"task": "reversible", **describe(device), "image_size": SIZE, "columns": {}}
    for count in COLUMNS:
        measured = _measure(count, cfg.rounds, device)
        result["columns"][count] = measured
        for name, row in measured.items():
            errors = (f"{row['error'][precision]:.1e}" for precision in PRECISIONS)
            table.add_row(
                str(count), name.removeprefix("keep_every="), f"{row['mib']:.1f}", *errors, f"{row['ms']:.0f}"
            )
    return print_result(table, result)


def _measure(columns: int, rounds: int, device: torch.device) -> dict[str, dict[str, Any]]:
    """Return MiB, errors and milliseconds of every setting."""
    model = _make(CHANNELS, columns).to(device)
    x = torch.randn(1, 3, SIZE, SIZE, device=device)

    def step(setting: str) -> None:
        model.zero_grad()
        _total(_set(model, setting)(x)).backward()

    seconds = time_in_turns({name: partial(step, name) for name in SETTINGS}, rounds, device)
    mib = {name: activation_bytes(_set(model, name), x) / 2**20 for name in SETTINGS}
    small = torch.randn(1, 3, ERROR_SIZE, ERROR_SIZE, device=device)
    narrow = _make(ERROR_CHANNELS, columns).to(device)
    errors = {precision: _errors(narrow, small, precision) for precision in PRECISIONS}
    return {
        name: {"mib": mib[name], "error": {p: errors[p][name] for p in PRECISIONS}, "ms": 1000 * seconds[name]}
        for name in SETTINGS
    }


def _make(channels: Sequence[int], columns: int) -> RevCol:
    """Build a RevCol with gammas large enough for the blocks to matter."""
    model = RevCol(channels, columns=columns, drop_path=0.0, out_strides=STRIDES)
    for name, parameter in model.named_parameters():
        if name.endswith("gamma"):
            nn.init.constant_(parameter, GAMMA)
    return model


def _errors(model: RevCol, x: Tensor, precision: str) -> dict[str, float]:
    """Return the largest relative error of a parameter's gradient, for every setting."""
    dtype = PRECISIONS[precision]
    model.to(dtype)

    def gradients(setting: str) -> tuple[Tensor, ...]:
        _set(model, setting)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=precision == "bf16"):
            features = model(x.to(dtype))
        return torch.autograd.grad(_total(features), [p for p in model.parameters() if p.requires_grad])

    plain = gradients(PLAIN)
    errors = {}
    for setting in SETTINGS:
        found = gradients(setting)
        norms = [(f - p).norm() / p.norm() for f, p in zip(found, plain, strict=True)]
        errors[setting] = float(torch.stack(norms).max())
    model.to(torch.float32)
    return errors


def _set(model: RevCol, setting: str) -> RevCol:
    """Apply a setting to the model."""
    model.save_memory = setting != PLAIN
    model.keep_every = SETTINGS[setting] or 0
    return model


def _total(features: Iterable[Tensor]) -> Tensor:
    """Return the sum of the features, weighted by the same random numbers every time."""
    generator = torch.Generator().manual_seed(0)
    weighted = [(f * torch.randn(f.shape, generator=generator).to(f)).sum() for f in features]
    return torch.stack(weighted).sum()
