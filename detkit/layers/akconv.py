"""AKConv: convolution with any number of samples at learnt places (arXiv 2311.11587, also called LDConv)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detkit.errors import DetkitError
from detkit.registry import BLOCKS

MAX_POINTS = 1000


@BLOCKS.register("akconv")
class AKConv(nn.Module):
    """Sample N points around every position, bilinearly, and mix them: a conv block, (c1, c2, k, s).

    The points start on a compact grid (rows of round(sqrt N), the rest in one more row), anchored at the position;
    a 3x3 convolution moves each. Points beyond the border take the value at the border.

    Args:
        k: of the convolution that this stands in for; the number of points takes its place.
        n: N, the number of points.
    """

    slot = "conv"

    def __init__(self, c1: int, c2: int, k: int = 3, s: int = 1, n: int = 3) -> None:
        super().__init__()
        if not 1 <= n <= MAX_POINTS:
            raise DetkitError(f"akconv samples n={n} points: it needs 1 or more, and {MAX_POINTS} at most")
        self.n = n
        self.stride = s
        self.p_conv = nn.Conv2d(c1, 2 * n, 3, s, 1)
        self.p_conv.lr_factor = 0.1  # engine/optim.py gives it a parameter group of its own
        nn.init.zeros_(self.p_conv.weight)
        norm = nn.BatchNorm2d(c2, eps=1e-3, momentum=0.03)
        self.conv = nn.Sequential(nn.Conv2d(c1, c2, (n, 1), (n, 1), bias=False), norm, nn.SiLU(inplace=True))
        self.register_buffer("base_n2", base_grid(n), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, c1, H, W) -> (B, c2, H / s, W / s), rounded up."""
        return self.conv(self.sample(x, self.offsets(x)))

    @torch.autocast("cpu", enabled=False)
    @torch.autocast("cuda", enabled=False)
    def offsets(self, x: Tensor) -> Tensor:
        """How far each point is moved, (B, 2N, h, w): N rows, then N columns, in pixels."""
        return self.p_conv(x.to(self.p_conv.weight.dtype))

    @torch.autocast("cpu", enabled=False)
    @torch.autocast("cuda", enabled=False)
    def sample(self, x: Tensor, offsets: Tensor) -> Tensor:
        """Sample (B, C, H, W) at the moved points: offsets (B, 2N, h, w), rows first -> (B, C, h * N, w).

        Coordinates stay in float32 under autocast: half precision would round 159.03 to 159.
        """
        batch, channels, height, width = x.shape
        h, w = offsets.shape[-2:]
        values = x.to(torch.promote_types(x.dtype, torch.float32))
        rows_bhnw, columns_bhnw = offsets.to(values.dtype).view(batch, 2, self.n, h, w).transpose(2, 3).unbind(1)
        base_n2 = self.base_n2.to(values.dtype)
        y = torch.arange(h, device=x.device, dtype=values.dtype) * self.stride
        z = torch.arange(w, device=x.device, dtype=values.dtype) * self.stride
        upper, lower, down = _neighbours(rows_bhnw + base_n2[:, :1] + y.view(-1, 1, 1), height)
        left, right, across = _neighbours(columns_bhnw + base_n2[:, 1:] + z, width)
        image = torch.arange(batch, device=x.device).view(-1, 1, 1, 1) * height
        upper, lower = (image + upper) * width, (image + lower) * width
        corners_p4 = torch.stack((upper + left, upper + right, lower + left, lower + right), -1).view(-1, 4)
        shares = ((1 - down) * (1 - across), (1 - down) * across, down * (1 - across), down * across)
        # A sample is a weighted sum of four pixels, each a row of C numbers: nothing larger is ever made.
        pixels = values.permute(0, 2, 3, 1).reshape(-1, channels)
        shares_p4 = torch.stack(shares, -1).view(-1, 4)
        sampled = F.embedding_bag(corners_p4, pixels, mode="sum", per_sample_weights=shares_p4)
        # A position's N samples stand in one column.
        return sampled.view(batch, h * self.n, w, channels).permute(0, 3, 1, 2).to(x.dtype)


def _neighbours(position: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the indices of the pixels before and after a position, and how far it lies from the first to the second.

    Positions beyond the first and the last pixel are theirs.
    """
    position = position.clamp(0, size - 1)
    before = position.detach().floor()
    first = before.long().clamp(0, size - 1)  # NaN has no index, and an index beyond the image would be a crash
    return first, (first + 1).clamp(max=size - 1), position - before


def base_grid(n: int) -> Tensor:
    """Return where the N points start, (N, 2) as (row, column), from (0, 0)."""
    side = round(n**0.5)
    return torch.tensor([(k // side, k % side) for k in range(n)], dtype=torch.float32)
