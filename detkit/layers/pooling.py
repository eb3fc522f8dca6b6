"""Context blocks, which enlarge the receptive field of the deepest level. A context block takes (c1, c2)."""

import torch
from torch import Tensor, nn

from detkit.errors import DetkitError
from detkit.layers.conv import Conv
from detkit.registry import BLOCKS


@BLOCKS.register("sppf")
class SPPF(nn.Module):
    """Spatial pyramid pooling - fast: three chained k x k max-pools cover k, 2k-1 and 3k-2 cells."""

    slot = "context"

    def __init__(self, c1: int, c2: int, k: int = 5) -> None:
        super().__init__()
        if k < 1 or k % 2 == 0:
            raise DetkitError(f"sppf: kernel size k={k} must be odd and 1 or more")
        self.cv1 = Conv(c1, c1 // 2, 1)
        self.cv2 = Conv(4 * (c1 // 2), c2, 1)
        self.pool = nn.MaxPool2d(k, stride=1, padding=k // 2)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, c1, H, W) to (B, c2, H, W)."""
        features = [self.cv1(x)]
        for _ in range(3):
            features.append(self.pool(features[-1]))
        return self.cv2(torch.cat(features, 1))
