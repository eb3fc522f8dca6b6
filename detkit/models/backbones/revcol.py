"""RevCol: columns of a ConvNeXt-like network, each refining the one before it (arXiv 2212.11696)."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detkit.errors import DetkitError
from detkit.layers.reversible import Columns, run_columns, run_columns_reversibly
from detkit.registry import BACKBONES

STRIDES = (4, 8, 16, 32)
MIN_ALPHA = 1e-3
MAX_BLOCKS = 1000  # per level


@BACKBONES.register("revcol")
class RevCol(nn.Module):
    """RevCol; returns the last column's features. Parameter names match the official checkpoints.

    Args:
        channels, layers: channels and number of blocks of the four levels, the same in every column.
        columns: number of columns.
        drop_path: probability of skipping a block, rising linearly from 0 at the first block of a column to this at
            the last.
        save_memory: recompute features in backward instead of saving them (layers/reversible.py).
        keep_every: save the features of every N-th column; 0: only those of the last, so that memory does not grow
            with the number of columns. Gradients are equally exact.
        out_strides: strides of the features to return, ascending, among 4, 8, 16 and 32; derived by the builder.

    Raises:
        DetkitError: an argument is out of range, or a list does not have one entry per level.
    """

    def __init__(
        self,
        channels: Sequence[int] = (64, 128, 256, 512),
        layers: Sequence[int] = (2, 2, 4, 2),
        columns: int = 4,
        drop_path: float = 0.1,
        save_memory: bool = True,
        keep_every: int = 0,
        out_strides: Sequence[int] = (8, 16, 32),
    ) -> None:
        super().__init__()
        if not set(out_strides) <= set(STRIDES):
            raise DetkitError(f"backbone revcol has strides {list(STRIDES)}, the neck takes {list(out_strides)}")
        for key, values in (("channels", channels), ("layers", layers)):
            if not isinstance(values, Sequence) or len(values) != len(STRIDES):
                raise DetkitError(f"backbone.{key}={values} must list one number for each of the {len(STRIDES)} levels")
        if min(channels) < 1:
            raise DetkitError(f"backbone.channels={list(channels)} must be 1 or more")
        if min(layers) < 0 or max(layers) > MAX_BLOCKS:
            raise DetkitError(f"backbone.layers={list(layers)} must be from 0 to {MAX_BLOCKS}")
        if columns < 1:
            raise DetkitError(f"backbone.columns={columns} must be 1 or more")
        if not 0 <= drop_path < 1:
            raise DetkitError(f"backbone.drop_path={drop_path} must be a number of at least 0 and below 1")
        if keep_every < 0:
            raise DetkitError(f"backbone.keep_every={keep_every} must be 0 or more")
        self.stem = nn.Sequential(nn.Conv2d(3, channels[0], 4, 4), LayerNorm2d(channels[0]))
        ramp = iter(np.linspace(0, drop_path, sum(layers)).tolist())
        rates = [[next(ramp) for _ in range(count)] for count in layers]
        for k in range(columns):
            self.add_module(f"subnet{k}", Column(channels, rates, first=k == 0))
        self.columns = columns
        self.save_memory = save_memory
        self.keep_every = keep_every
        self.strides = tuple(out_strides)
        self.out_channels = tuple(channels[STRIDES.index(stride)] for stride in out_strides)
        self.apply(_init_weights)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Map (B, 3, H, W), sides divisible by 32, to the last column's features at ``strides``."""
        x = self.stem(x)
        # under autocast, too, the sums over columns have the precision of the weights
        x = x.to(self.stem.get_parameter("0.weight").dtype)
        subnets = [getattr(self, f"subnet{k}") for k in range(self.columns)]
        alphas = [subnet.alphas() for subnet in subnets[1:]]
        noise = [subnet.draw_noise(len(x), x.device) if self.training else [None] * 4 for subnet in subnets]
        columns = Columns([subnet.levels() for subnet in subnets], noise)
        if self.save_memory and torch.is_grad_enabled() and not torch.compiler.is_exporting():
            features = run_columns_reversibly(columns, x, alphas, self.saved_columns())
        else:
            features = run_columns(columns, x, alphas)
        return tuple(features[STRIDES.index(stride)] for stride in self.strides)

    def saved_columns(self) -> frozenset[int]:
        """Return the indices of the columns whose features are saved in addition to the last one's."""
        if self.keep_every == 0:
            return frozenset()
        return frozenset(k for k in range(self.columns - 1) if (k + 1) % self.keep_every == 0)


class Column(nn.Module):
    """One column: four levels, and alpha, the weight of the previous column's feature in each level.

    Args:
        channels: channels of each level.
        rates: DropPath rate of each block of each level.
        first: whether this is the first column, in which no level has an upper input.
    """

    def __init__(self, channels: Sequence[int], rates: Sequence[Sequence[float]], first: bool) -> None:
        super().__init__()
        for k, c in enumerate(channels):
            # Unused in the first column; official checkpoints contain it.
            setattr(self, f"alpha{k}", nn.Parameter(torch.full((1, c, 1, 1), 0.5), requires_grad=not first))
        for k in range(len(channels)):
            setattr(self, f"level{k}", Level(channels, k, rates[k], first))

    def levels(self) -> list["Level"]:
        """Return the four levels, finest first."""
        return [getattr(self, f"level{k}") for k in range(4)]

    def alphas(self) -> tuple[Tensor, ...]:
        """Return alpha of each level (1, C, 1, 1), clamped to |alpha| >= MIN_ALPHA with a straight-through gradient."""
        return tuple(_away_from_zero(getattr(self, f"alpha{k}")) for k in range(4))

    def draw_noise(self, batch: int, device: torch.device) -> list[Tensor]:
        """Draw the random numbers for DropPath: (blocks, batch) for each level, uniform in 0..1."""
        return [torch.rand(len(level.blocks), batch, device=device) for level in self.levels()]


class Level(nn.Module):
    """Fusion of the finer feature of this column and the coarser one of the previous, then ConvNeXt blocks."""

    def __init__(self, channels: Sequence[int], level: int, rates: Sequence[float], first: bool) -> None:
        super().__init__()
        self.fusion = Fusion(channels, level, first)
        self.blocks = nn.Sequential(*(ConvNextBlock(channels[level], rate) for rate in rates))

    def forward(self, lower: Tensor, upper: Tensor | None, noise: Tensor | None) -> Tensor:
        """Map finer feature, coarser feature or None, and random numbers (blocks, B) or None to (B, C, h, w)."""
        x = self.fusion(lower, upper)
        for k, block in enumerate(self.blocks):
            x = block(x, None if noise is None else noise[k])
        return x


class Fusion(nn.Module):
    """Down: 2x2 stride-2 convolution and LayerNorm, from level 1 on. Up: linear, LayerNorm, nearest x2, to level 2."""

    def __init__(self, channels: Sequence[int], level: int, first: bool) -> None:
        super().__init__()
        self.down: nn.Module = nn.Identity()
        if level > 0:
            self.down = nn.Sequential(
                nn.Conv2d(channels[level - 1], channels[level], 2, 2), LayerNorm2d(channels[level])
            )
        self.up = None
        if not first and level + 1 < len(channels):
            self.up = Upsample(channels[level + 1], channels[level])

    def forward(self, lower: Tensor, upper: Tensor | None) -> Tensor:
        """Return the sum of both inputs at this level's size, (B, C, h, w)."""
        x = self.down(lower)
        return x if self.up is None else x + self.up(upper)


class Upsample(nn.Module):
    """Linear over channels, LayerNorm, nearest x2: (B, c1, h, w) -> (B, c2, 2h, 2w)."""

    def __init__(self, c1: int, c2: int) -> None:
        super().__init__()
        self.channel_reschedule = nn.Sequential(nn.Linear(c1, c2), nn.LayerNorm(c2, eps=1e-6))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, c1, h, w) to (B, c2, 2h, 2w)."""
        x = self.channel_reschedule(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return F.interpolate(x, scale_factor=2, mode="nearest")


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of (B, C, H, W)."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize the channels of every pixel."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNextBlock(nn.Module):
    """Depthwise 3x3, LayerNorm, linear x4, GELU, linear, gamma; dropped with probability ``rate``; residual."""

    def __init__(self, channels: int, rate: float = 0.0) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((channels,), 1e-6))
        self.dwconv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.pwconv1 = nn.Linear(channels, 4 * channels)
        self.pwconv2 = nn.Linear(4 * channels, channels)
        self.rate = rate

    def forward(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """Map (B, C, h, w) and uniform random numbers (B,), or None for no dropping, to (B, C, h, w)."""
        y = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        y = self.gamma * self.pwconv2(F.gelu(self.pwconv1(y)))
        y = y.permute(0, 3, 1, 2)
        if noise is not None and self.rate > 0:
            keep = (noise >= self.rate).to(y.dtype) / (1 - self.rate)
            y = y * keep.view(-1, 1, 1, 1)
        return x + y


def _away_from_zero(alpha: Tensor) -> Tensor:
    with torch.no_grad():
        sign = torch.where(alpha < 0, -1.0, 1.0).to(alpha.dtype)
        correction = sign * alpha.abs().clamp(min=MIN_ALPHA) - alpha
    return alpha + correction


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        nn.init.trunc_normal_(module.weight, std=0.02)
        assert module.bias is not None  # all layers have one
        nn.init.zeros_(module.bias)
