"""AKConv: convolution with any number of samples at learned positions (arXiv 2311.11587, also called LDConv)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detkit.errors import DetkitError, shorten
from detkit.layers.conv import batch_norm
from detkit.registry import BLOCKS

MAX_POINTS = 1000
SAMPLINGS = ("paper", "tutorial")


@BLOCKS.register("akconv")
class AKConv(nn.Module):
    """Convolution over N bilinearly sampled points around every position; a conv block, (c1, c2, k, s).

    The points start on a compact grid (rows of round(sqrt N), the rest in one more row) anchored at the position;
    a 3x3 convolution predicts an offset for each. Points beyond the border take the value at the border.

    ``sampling="tutorial"`` reproduces the code that tutorials patch into YOLO, for weights trained with it. That code
    builds its two grids with ``torch.meshgrid(rows, columns, indexing="xy")``, which is column-major, and reads them
    as row-major: the positions of an h x w map are transposed if h = w and scrambled otherwise, and the full rows of
    the N points are permuted. It also computes the bilinear weights after clamping both neighbours to the map: at and
    beyond a border both are the same pixel, which counts twice.

    Args:
        c1: input channels.
        c2: output channels.
        k: kernel size of the convolution that this block replaces; unused.
        s: stride.
        n: N, the number of points.
        sampling: "paper" or "tutorial".

    Raises:
        DetkitError: ``n`` or ``sampling`` is invalid.
    """

    slot = "conv"
    base_n2: Tensor

    def __init__(
        self,
        c1: int,
        c2: int,
        k: int = 3,  # noqa: ARG002  (part of the interface of conv blocks)
        s: int = 1,
        n: int = 3,
        sampling: str = "paper",
    ) -> None:
        super().__init__()
        if not 1 <= n <= MAX_POINTS:
            raise DetkitError(f"akconv: n={n} points must be from 1 to {MAX_POINTS}")
        if sampling not in SAMPLINGS:
            raise DetkitError(f"akconv: sampling must be one of {', '.join(SAMPLINGS)}, not {shorten(sampling)!r}")
        self.n = n
        self.stride = s
        self.sampling = sampling
        self.p_conv = nn.Conv2d(c1, 2 * n, 3, s, 1)
        # engine/optimizer.py puts it in a parameter group of its own
        self.p_conv.lr_factor = 0.1  # type: ignore[assignment]
        nn.init.zeros_(self.p_conv.weight)
        mix = nn.Conv2d(c1, c2, (n, 1), (n, 1), bias=False)
        self.conv = nn.Sequential(mix, batch_norm(c2), nn.SiLU(inplace=True))
        grid = transposed_grid(n) if sampling == "tutorial" else base_grid(n)
        self.register_buffer("base_n2", grid, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, c1, H, W) to (B, c2, ceil(H / s), ceil(W / s))."""
        return self.conv(self.sample(x, self.offsets(x)))

    @torch.autocast("cpu", enabled=False)
    @torch.autocast("cuda", enabled=False)
    def offsets(self, x: Tensor) -> Tensor:
        """Predict the offset of each point from (B, c1, H, W): (B, 2N, h, w), N rows then N columns, in pixels."""
        return self.p_conv(x.to(self.p_conv.weight.dtype))

    @torch.autocast("cpu", enabled=False)
    @torch.autocast("cuda", enabled=False)
    def sample(self, x: Tensor, offsets: Tensor) -> Tensor:
        """Sample (B, C, H, W) at the points moved by ``offsets`` (B, 2N, h, w), rows first -> (B, C, h * N, w).

        Coordinates stay in float32 under autocast: half precision would round 159.03 to 159.
        """
        batch, channels, height, width = x.shape
        h, w = offsets.shape[-2:]
        values = x.to(torch.promote_types(x.dtype, torch.float32))
        rows_bhnw, columns_bhnw = offsets.to(values.dtype).view(batch, 2, self.n, h, w).transpose(2, 3).unbind(1)
        base_n2 = self.base_n2.to(values.dtype)
        y_h1w, x_h1w = (self.stride * axis for axis in self._positions(h, w, values))
        neighbours = _doubled_neighbours if self.sampling == "tutorial" else _neighbours
        upper, lower, above, below = neighbours(rows_bhnw + base_n2[:, :1] + y_h1w, height)
        left, right, before, behind = neighbours(columns_bhnw + base_n2[:, 1:] + x_h1w, width)
        image = torch.arange(batch, device=x.device).view(-1, 1, 1, 1) * height
        upper, lower = (image + upper) * width, (image + lower) * width
        corners_p4 = torch.stack((upper + left, upper + right, lower + left, lower + right), -1).view(-1, 4)
        weights = (above * before, above * behind, below * before, below * behind)
        # embedding_bag sums four weighted pixels (rows of C numbers) per sample without materializing them.
        pixels = values.permute(0, 2, 3, 1).reshape(-1, channels)
        weights_p4 = torch.stack(weights, -1).view(-1, 4)
        sampled = F.embedding_bag(corners_p4, pixels, mode="sum", per_sample_weights=weights_p4)
        # The N samples of a position go into one column.
        return sampled.view(batch, h * self.n, w, channels).permute(0, 3, 1, 2).to(x.dtype)

    def _positions(self, h: int, w: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return row and column of every position of an h x w map, each broadcastable to (h, 1, w)."""
        if self.sampling == "tutorial":  # column-major order, read as row-major
            row, column = (torch.arange(n, device=like.device, dtype=like.dtype) for n in (h, w))
            return row.expand(w, h).reshape(h, 1, w), column[:, None].expand(w, h).reshape(h, 1, w)
        rows = torch.arange(h, device=like.device, dtype=like.dtype)
        return rows.view(h, 1, 1), torch.arange(w, device=like.device, dtype=like.dtype)


def _neighbours(position: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the indices of the pixels before and after each position, and their bilinear weights.

    Positions beyond the border are clamped to it. All shapes equal that of ``position``.
    """
    position = position.clamp(0, size - 1)
    before = position.detach().floor()
    first = before.long().clamp(0, size - 1)  # NaN converts to an index out of range, which would crash
    return first, (first + 1).clamp(max=size - 1), 1 - (position - before), position - before


def _doubled_neighbours(position: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Do the same as the tutorials' code: at and beyond a border both pixels are the last one, with weight 1 each."""
    before = position.detach().floor()
    first, second = before.long().clamp(0, size - 1), (before + 1).long().clamp(0, size - 1)
    position = position.clamp(0, size - 1)
    return first, second, 1 - (position - first), 1 - (second - position)


def base_grid(n: int) -> Tensor:
    """Return the initial positions of the N points, (N, 2) as (row, column), from (0, 0)."""
    side = round(n**0.5)
    return torch.tensor([(k // side, k % side) for k in range(n)], dtype=torch.float32)


def transposed_grid(n: int) -> Tensor:
    """Return the points of ``base_grid`` in the tutorials' order, (N, 2): full rows column-major, then the last row."""
    side = round(n**0.5)
    full = base_grid(n)[: n // side * side].view(n // side, side, 2)
    return torch.cat((full.transpose(0, 1).reshape(-1, 2), base_grid(n)[n // side * side :]))
