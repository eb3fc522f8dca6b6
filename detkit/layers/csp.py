"""Cross-stage-partial blocks: part of the channels goes through bottlenecks, part goes around.

A CSP block takes (c1, c2, n, shortcut): channels in and out, number of bottlenecks, residual or not.
"""

import torch
from torch import Tensor, nn

from detkit.layers.conv import Conv
from detkit.registry import BLOCKS


class Bottleneck(nn.Module):
    """Two 3x3 convolutions of c channels, with a residual where asked."""

    def __init__(self, c: int, shortcut: bool) -> None:
        super().__init__()
        self.cv1 = Conv(c, c, 3)
        self.cv2 = Conv(c, c, 3)
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        """(B, c, H, W) -> (B, c, H, W)."""
        y = self.cv2(self.cv1(x))
        return x + y if self.shortcut else y


@BLOCKS.register("c2f")
class C2f(nn.Module):
    """YOLOv8's CSP block: every bottleneck's output is kept.

    ::

        x -- 1x1 --+-- a ----------------------------+
                   +-- b --+-------------------------+-- concat (2 + n) c -- 1x1 --
                           +-- m0 --+----------------+
                                    +-- m1 -- ... ---+
    """

    slot = "csp"

    def __init__(self, c1: int, c2: int, n: int = 1, shortcut: bool = False) -> None:
        super().__init__()
        c = c2 // 2
        self.cv1 = Conv(c1, 2 * c, 1)
        self.cv2 = Conv((2 + n) * c, c2, 1)
        self.m = nn.ModuleList(Bottleneck(c, shortcut) for _ in range(n))

    def forward(self, x: Tensor) -> Tensor:
        """(B, c1, H, W) -> (B, c2, H, W)."""
        parts = list(self.cv1(x).chunk(2, 1))
        for bottleneck in self.m:
            parts.append(bottleneck(parts[-1]))
        return self.cv2(torch.cat(parts, 1))
