"""Benchmark of AKConv against the usual implementation, which gathers the four neighbours of every sample."""

import copy
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from detkit.benchmarks.common import BenchmarkConfig, describe, print_result, time_in_turns
from detkit.layers.akconv import AKConv
from detkit.ops.device import pick_device
from detkit.ops.precision import seed_everything

POINTS = (3, 5, 9)
BATCH, CHANNELS, SIZE = 4, 64, 80


class GatherAKConv(AKConv):
    """AKConv sampled by four gathers from flattened maps."""

    def sample(self, x: Tensor, offsets: Tensor) -> Tensor:
        """Map (B, C, H, W) and offsets (B, 2N, h, w) to (B, C, h * N, w), as in AKConv."""
        batch, channels, height, width = x.shape
        h, w = offsets.shape[-2:]
        y, z = torch.meshgrid(torch.arange(h, device=x.device), torch.arange(w, device=x.device), indexing="ij")
        start_2nhw = self.base_n2.T.reshape(2, self.n, 1, 1) + self.stride * torch.stack((y, z)).unsqueeze(1)
        points = offsets + start_2nhw.flatten(0, 1)
        rows, columns = (p.permute(0, 2, 3, 1) for p in points.chunk(2, 1))  # (B, h, w, N)
        rows, columns = rows.clamp(0, height - 1), columns.clamp(0, width - 1)
        top, left = rows.detach().floor(), columns.detach().floor()
        down, across = rows - top, columns - left
        bottom, right = (top + 1).clamp(max=height - 1), (left + 1).clamp(max=width - 1)
        flat = x.flatten(2)

        def pixels(row: Tensor, column: Tensor) -> Tensor:
            index = (row * width + column).long().reshape(batch, 1, -1).expand(-1, channels, -1)
            return flat.gather(-1, index).view(batch, channels, h, w, self.n)

        samples = (
            ((1 - down) * (1 - across)).unsqueeze(1) * pixels(top, left)
            + ((1 - down) * across).unsqueeze(1) * pixels(top, right)
            + (down * (1 - across)).unsqueeze(1) * pixels(bottom, left)
            + (down * across).unsqueeze(1) * pixels(bottom, right)
        )
        return samples.transpose(3, 4).reshape(batch, channels, h * self.n, w)


def run(cfg: BenchmarkConfig) -> dict[str, Any]:
    """Time forward and backward of both implementations for N = 3, 5, 9, detkit's in both memory layouts."""
    device = pick_device(cfg.device)
    seed_everything(cfg.seed)
    title = f"AKConv, {CHANNELS} channels {SIZE}x{SIZE}, batch {BATCH}, forward and backward"
    table = Table("N", "implementation", "ms", "speedup", header_style="bold", title=title)
    result: dict[str, Any] = {"task": "akconv", **describe(device), "ms": {}, "ratio": {}}
    for n in POINTS:
        seconds = _time(n, cfg.rounds, device)
        result["ms"][n] = {name: 1000 * value for name, value in seconds.items()}
        result["ratio"][n] = {name: seconds["gather"] / value for name, value in seconds.items()}
        for name in seconds:
            table.add_row(str(n), name, f"{result['ms'][n][name]:.0f}", f"{result['ratio'][n][name]:.2f}")
    return print_result(table, result)


def _time(n: int, rounds: int, device: torch.device) -> dict[str, float]:
    """Return the median seconds of each implementation, after checking that their outputs are equal."""
    gather = GatherAKConv(CHANNELS, CHANNELS, n=n).to(device)
    torch.nn.init.normal_(gather.p_conv.weight, std=0.05)  # initially all points lie on integer positions
    modules: dict[str, tuple[AKConv, torch.memory_format]] = {"gather": (gather, torch.contiguous_format)}
    for name, layout in (("detkit", torch.contiguous_format), ("detkit, channels-last", torch.channels_last)):
        module = AKConv(CHANNELS, CHANNELS, n=n).to(device).to(memory_format=layout)
        module.load_state_dict(gather.state_dict())
        modules[name] = (module, layout)
    x = torch.randn(BATCH, CHANNELS, SIZE, SIZE, device=device)
    grad = torch.randn_like(x)
    runs = {}
    for name, (module, layout) in modules.items():
        inputs = x.to(memory_format=layout)
        # Compared in float64, since a float32 coordinate of 80 has a resolution of 8e-6.
        exact, expected = (copy.deepcopy(m).double()(x.double()) for m in (module, gather))
        torch.testing.assert_close(exact, expected, atol=1e-9, rtol=0)
        inputs.requires_grad_()
        grads = torch.empty_like(module(inputs)).copy_(grad)  # in the output's layout, as from a next layer

        def step(module: AKConv = module, inputs: Tensor = inputs, grads: Tensor = grads) -> None:
            module(inputs).backward(grads)

        runs[name] = step
    return time_in_turns(runs, rounds, device)
