"""PAFPN, the neck of YOLOv5 and YOLOv8: a top-down, then a bottom-up path (path aggregation, arXiv 1803.01534)."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from detkit.errors import DetkitError
from detkit.layers.conv import BlockSpec, Conv, build_block, per_stage
from detkit.models.scaling import scaled_depth, scaled_width
from detkit.registry import NECKS

BASE_WIDTHS = {4: 128, 8: 256, 16: 512, 32: 1024}  # by stride
REPEATS = 3


@NECKS.register("pafpn")
class PAFPN(nn.Module):
    """Path-aggregation feature pyramid.

    ::

        C3 ----------------- cat - block ---------------------------- P3
                             up                 down
        C4 ------- cat - block ---------------- cat - block --------- N4
                   up                                  down
        C5 - context --------------------------------- cat - block -- N5

    With ``lateral`` (YOLOv5) a 1x1 convolution reduces the channels of each map before upsampling, and the bottom-up
    path takes the reduced map. Drawn for three levels; with ``in_strides: [4, 8, 16, 32]`` there are four, P2 to N5.

    Args:
        in_channels, strides: of the backbone's features, derived by the builder.
        depth, width, max_channels: compound scaling (models/scaling.py).
        context: context block on the coarsest input, (c1, c2); None for none.
        block: CSP block after each concatenation, (c1, c2, n, shortcut); one for all, or a list in execution order.
        downsample: stride-2 convolution of the bottom-up path, (c1, c2, 3, 2); one for all, or a list.
        lateral: reduce channels by 1x1 convolutions before upsampling.

    Raises:
        DetkitError: the strides are not consecutive, or a list has the wrong length.
    """

    in_strides = (8, 16, 32)

    def __init__(  # noqa: PLR0913  (the arguments are the keys of the configuration)
        self,
        in_channels: Sequence[int],
        strides: Sequence[int],
        depth: float = 0.33,
        width: float = 0.25,
        max_channels: int = 1024,
        context: BlockSpec | None = "sppf",
        block: BlockSpec | Sequence[BlockSpec] = "c2f",
        downsample: BlockSpec | Sequence[BlockSpec] = "conv",
        lateral: bool = False,
    ) -> None:
        super().__init__()
        if not set(strides) <= set(BASE_WIDTHS) or any(2 * a != b for a, b in pairwise(strides)):
            raise DetkitError(
                f"neck.in_strides={list(strides)} must be consecutive strides of {list(BASE_WIDTHS)}, ascending"
            )
        widths = [scaled_width(BASE_WIDTHS[stride], width, max_channels) for stride in strides]
        n = scaled_depth(REPEATS, depth)
        levels = len(strides)
        blocks = iter(per_stage(block, 2 * (levels - 1), "neck.block"))
        downsamples = iter(per_stage(downsample, levels - 1, "neck.downsample"))
        self.context = build_block("context", context, in_channels[-1], widths[-1]) if context else nn.Identity()
        coarser = widths[-1] if context else in_channels[-1]
        lateral_channels = []  # of the maps that the bottom-up path takes, coarsest first
        self.laterals = nn.ModuleList()
        self.top_down = nn.ModuleList()
        for level in reversed(range(levels - 1)):
            self.laterals.append(Conv(coarser, widths[level], 1) if lateral else nn.Identity())
            coarser = widths[level] if lateral else coarser
            lateral_channels.append(coarser)
            c1 = in_channels[level] + coarser
            self.top_down.append(build_block("csp", next(blocks), c1, widths[level], n, False))
            coarser = widths[level]
        self.downs = nn.ModuleList()
        self.bottom_up = nn.ModuleList()
        for level in range(1, levels):
            finer, skip = widths[level - 1], lateral_channels[-level]
            self.downs.append(build_block("conv", next(downsamples), finer, finer, 3, 2))
            self.bottom_up.append(build_block("csp", next(blocks), finer + skip, widths[level], n, False))
        self.upsample = nn.Upsample(scale_factor=2, mode="nearest")
        self.out_channels = tuple(widths)
        self.strides = tuple(strides)

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Map features (B, c, h, w), finest first, to maps of the same sizes with ``out_channels``."""
        x = self.context(features[-1])
        skips = []
        for lateral, block, finer in zip(self.laterals, self.top_down, reversed(features[:-1]), strict=True):
            skips.append(lateral(x))
            x = block(torch.cat((self.upsample(skips[-1]), finer), 1))
        outputs = [x]
        for down, block in zip(self.downs, self.bottom_up, strict=True):
            outputs.append(block(torch.cat((down(outputs[-1]), skips.pop()), 1)))
        return tuple(outputs)
