"""AKConv: convolution with any number of samples at learnt places (arXiv 2311.11587, also called LDConv)."""

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
    """Sample N points around every position, bilinearly, and mix them: a conv block, (c1, c2, k, s).

    The points start on a compact grid (rows of round(sqrt N), the rest in one more row), anchored at the position;
    a 3x3 convolution moves each. Points beyond the border take the value at the border.

    ``sampling="tutorial"`` reproduces the code that tutorials patch into YOLO, for the weights trained with it. That
    code makes its two grids with ``torch.meshgrid(rows, columns, indexing="xy")``, which counts down the columns, and
    reads them as if it counted along the rows: the positions of an h x w map are transposed where h = w and scrambled
    where not, and the full rows of the N points come in another order. It also weighs a point between its neighbours
    after both were clamped to the map: at and beyond a border both are the same pixel, which counts twice.

    Args:
        k: of the convolution that this stands in for; the number of points takes its place.
        n: N, the number of points.
        sampling: "paper", or "tutorial" as above.
    """

    slot = "conv"
    base_n2: Tensor

    def __init__(self, c1: int, c2: int, k: int = 3, s: int = 1, n: int = 3, sampling: str = "paper") -> None:
        super().__init__()
        if not 1 <= n <= MAX_POINTS:
            raise DetkitError(f"akconv samples n={n} points: it needs 1 or more, and {MAX_POINTS} at most")
        if sampling not in SAMPLINGS:
            raise DetkitError(f"akconv's sampling is one of {', '.join(SAMPLINGS)}, not {shorten(sampling)!r}")
        self.n = n
        self.stride = s
        self.sampling = sampling
        self.p_conv = nn.Conv2d(c1, 2 * n, 3, s, 1)
        # engine/optimizer.py gives it a parameter group of its own
        self.p_conv.lr_factor = 0.1  # type: ignore[assignment]
        nn.init.zeros_(self.p_conv.weight)
        mix = nn.Conv2d(c1, c2, (n, 1), (n, 1), bias=False)
        self.conv = nn.Sequential(mix, batch_norm(c2), nn.SiLU(inplace=True))
        grid = transposed_grid(n) if sampling == "tutorial" else base_grid(n)
        self.register_buffer("base_n2", grid, persistent=False)

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
        y_h1w, x_h1w = (self.stride * axis for axis in self._positions(h, w, values))
        neighbours = _doubled_neighbours if self.sampling == "tutorial" else _neighbours
        upper, lower, above, below = neighbours(rows_bhnw + base_n2[:, :1] + y_h1w, height)
        left, right, before, behind = neighbours(columns_bhnw + base_n2[:, 1:] + x_h1w, width)
        image = torch.arange(batch, device=x.device).view(-1, 1, 1, 1) * height
        upper, lower = (image + upper) * width, (image + lower) * width
        corners_p4 = torch.stack((upper + left, upper + right, lower + left, lower + right), -1).view(-1, 4)
        shares = (above * before, above * behind, below * before, below * behind)
        # A sample is a weighted sum of four pixels, each a row of C numbers: nothing larger is ever made.
        pixels = values.permute(0, 2, 3, 1).reshape(-1, channels)
        shares_p4 = torch.stack(shares, -1).view(-1, 4)
        sampled = F.embedding_bag(corners_p4, pixels, mode="sum", per_sample_weights=shares_p4)
        # A position's N samples stand in one column.
        return sampled.view(batch, h * self.n, w, channels).permute(0, 3, 1, 2).to(x.dtype)

    def _positions(self, h: int, w: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Row and column of every position of an h x w map, each of a shape that broadcasts to (h, 1, w)."""
        if self.sampling == "tutorial":  # the k-th position has the place of the k-th, counted down the columns
            index = torch.arange(h * w, device=like.device).view(h, 1, w)
            return (index % h).to(like.dtype), (index // h).to(like.dtype)
        rows = torch.arange(h, device=like.device, dtype=like.dtype)
        return rows.view(h, 1, 1), torch.arange(w, device=like.device, dtype=like.dtype)


def _neighbours(position: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the indices of the pixels before and after a position, and the share of each in its value.

    Positions beyond the first and the last pixel are theirs.
    """
    position = position.clamp(0, size - 1)
    before = position.detach().floor()
    first = before.long().clamp(0, size - 1)  # NaN has no index, and an index beyond the image would be a crash
    return first, (first + 1).clamp(max=size - 1), 1 - (position - before), position - before


def _doubled_neighbours(position: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same as tutorials have it: at and beyond a border both pixels are the last one, with a share of 1 each."""
    before = position.detach().floor()
    first, second = before.long().clamp(0, size - 1), (before + 1).long().clamp(0, size - 1)
    position = position.clamp(0, size - 1)
    return first, second, 1 - (position - first), 1 - (second - position)


def base_grid(n: int) -> Tensor:
    """Return where the N points start, (N, 2) as (row, column), from (0, 0)."""
    side = round(n**0.5)
    return torch.tensor([(k // side, k % side) for k in range(n)], dtype=torch.float32)


def transposed_grid(n: int) -> Tensor:
    """Return the same points in tutorials' order: the full rows counted down the columns, then the last row."""
    side = round(n**0.5)
    full = base_grid(n)[: n // side * side].view(n // side, side, 2)
    return torch.cat((full.transpose(0, 1).reshape(-1, 2), base_grid(n)[n // side * side :]))
