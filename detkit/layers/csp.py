"""Cross-stage-partial blocks: some channels pass through bottlenecks, the others bypass them (arXiv 1911.11929).

A CSP block takes (c1, c2, n, shortcut): input and output channels, number of bottlenecks, residual or not.
"""

import torch
from torch import Tensor, nn

from detkit.layers.conv import BlockSpec, Conv, build_block
from detkit.registry import BLOCKS


class Bottleneck(nn.Module):
    """Two convolutions that preserve the shape, with an optional residual."""

    def __init__(self, cv1: nn.Module, cv2: nn.Module, shortcut: bool) -> None:
        super().__init__()
        self.cv1 = cv1
        self.cv2 = cv2
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, c, H, W) to (B, c, H, W)."""
        y = self.cv2(self.cv1(x))
        return x + y if self.shortcut else y


@BLOCKS.register("c2f")
class C2f(nn.Module):
    """YOLOv8's CSP block: the outputs of all bottlenecks are concatenated.

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
        self.m = nn.ModuleList(Bottleneck(Conv(c, c, 3), Conv(c, c, 3), shortcut) for _ in range(n))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, c1, H, W) to (B, c2, H, W)."""
        features = list(self.cv1(x).chunk(2, 1))
        for bottleneck in self.m:
            features.append(bottleneck(features[-1]))
        return self.cv2(torch.cat(features, 1))


@BLOCKS.register("c3")
class C3(nn.Module):
    """YOLOv5's CSP block: one half passes through all bottlenecks (1x1, then 3x3), the other bypasses them.

    ::

        x --+-- 1x1 -- m0 -- m1 ... --+
            +-- 1x1 ------------------+-- concat 2c -- 1x1 --

    Args:
        c1: input channels.
        c2: output channels.
        n: number of bottlenecks.
        shortcut: whether the bottlenecks have a residual.
        conv: second convolution of the bottlenecks, (c, c, 3, 1).
    """

    slot = "csp"

    def __init__(self, c1: int, c2: int, n: int = 1, shortcut: bool = False, conv: BlockSpec = "conv") -> None:
        super().__init__()
        c = c2 // 2
        self.cv1 = Conv(c1, c, 1)
        self.cv2 = Conv(c1, c, 1)
        self.cv3 = Conv(2 * c, c2, 1)
        self.m = nn.Sequential(
            *(Bottleneck(Conv(c, c, 1), build_block("conv", conv, c, c, 3, 1), shortcut) for _ in range(n))
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, c1, H, W) to (B, c2, H, W)."""
        return self.cv3(torch.cat((self.m(self.cv1(x)), self.cv2(x)), 1))


@BLOCKS.register("c3_akconv")
class C3AKConv(C3):
    """C3 with an AKConv (arXiv 2311.11587) of N ``points`` as the second convolution of each bottleneck.

    ``sampling`` is AKConv's, "paper" or "tutorial".
    """

    def __init__(
        self, c1: int, c2: int, n: int = 1, shortcut: bool = False, points: int = 3, sampling: str = "paper"
    ) -> None:
        super().__init__(c1, c2, n, shortcut, {"name": "akconv", "n": points, "sampling": sampling})
