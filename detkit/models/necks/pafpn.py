"""PAFPN, the neck of YOLOv8: a top-down pass, then a bottom-up pass (path aggregation, arXiv 1803.01534)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from detkit.layers.conv import BlockSpec, build_block, per_stage
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

    Args:
        in_channels, strides: of the backbone's features, derived by the builder.
        depth, width, max_channels: compound scaling (models/scaling.py).
        context: context block in front, (c1, c2); None for a plain pass.
        block: CSP block after each concatenation, (c1, c2, n, shortcut); one, or one each in the order they run.
        downsample: stride-2 convolution of the bottom-up pass, (c1, c2, 3, 2); one, or one each.
    """

    in_strides = (8, 16, 32)

    def __init__(
        self,
        in_channels: Sequence[int],
        strides: Sequence[int],
        depth: float = 0.33,
        width: float = 0.25,
        max_channels: int = 1024,
        context: BlockSpec | None = "sppf",
        block: BlockSpec | Sequence[BlockSpec] = "c2f",
        downsample: BlockSpec | Sequence[BlockSpec] = "conv",
    ) -> None:
        super().__init__()
        widths = [scaled_width(BASE_WIDTHS[stride], width, max_channels) for stride in strides]
        n = scaled_depth(REPEATS, depth)
        levels = len(strides)
        blocks = iter(per_stage(block, 2 * (levels - 1), "neck.block"))
        downsamples = iter(per_stage(downsample, levels - 1, "neck.downsample"))
        self.context = build_block("context", context, in_channels[-1], widths[-1]) if context else nn.Identity()
        coarser = widths[-1] if context else in_channels[-1]
        pyramid_channels = [coarser]  # of the bottom-up pass' lateral inputs, coarsest first
        self.top_down = nn.ModuleList()
        for level in reversed(range(levels - 1)):
            self.top_down.append(
                build_block("csp", next(blocks), in_channels[level] + coarser, widths[level], n, False)
            )
            coarser = widths[level]
            pyramid_channels.append(coarser)
        self.downs = nn.ModuleList()
        self.bottom_up = nn.ModuleList()
        for level in range(1, levels):
            finer, lateral = widths[level - 1], pyramid_channels[levels - 1 - level]
            self.downs.append(build_block("conv", next(downsamples), finer, finer, 3, 2))
            self.bottom_up.append(build_block("csp", next(blocks), finer + lateral, widths[level], n, False))
        self.upsample = nn.Upsample(scale_factor=2, mode="nearest")
        self.out_channels = tuple(widths)
        self.strides = tuple(strides)

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Features finest first -> as many maps with the same sizes and ``out_channels``."""
        pyramid = [self.context(features[-1])]
        for block, lateral in zip(self.top_down, reversed(features[:-1]), strict=True):
            pyramid.append(block(torch.cat((self.upsample(pyramid[-1]), lateral), 1)))
        pyramid.reverse()
        outputs = [pyramid[0]]
        for down, block, lateral in zip(self.downs, self.bottom_up, pyramid[1:], strict=True):
            outputs.append(block(torch.cat((down(outputs[-1]), lateral), 1)))
        return tuple(outputs)
