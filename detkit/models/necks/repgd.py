"""RepGD, the neck of Gold-YOLO: gather all levels, fuse them once, and distribute the result (arXiv 2309.11331)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from detkit.errors import DetkitError
from detkit.layers.conv import BlockSpec, Conv, build_block
from detkit.layers.rep import ConvBN, ConvBNReLU, RepVGG
from detkit.models.scaling import scaled_width
from detkit.registry import NECKS

CONTEXT_WIDTH = 1024


@NECKS.register("repgd")
class RepGD(nn.Module):
    """Gather-and-distribute neck over P2 to P5.

    ::

        C2, C3, C4, C5 - gather - LowIFM --+-- g4       C5 - context - narrow -- c5h
                                           +-- g3
        P4 = rep(inject(LAF(C3, C4, c5h), g4))          P4 - narrow -- p4h
        P3 = rep(inject(LAF(C2, C3, p4h), g3))
        P3, P4, C5 ----- gather - HighIFM -+-- h4
                                           +-- h5
        N4 = rep(inject(cat(pool P3, p4h), h4))
        N5 = rep(inject(cat(pool N4, c5h), h5))         out: P3, N4, N5

    Args:
        in_channels, strides: of the backbone's features, derived by the builder.
        width, max_channels: compound scaling (models/scaling.py).
        widths: base widths of P3, P4 and P5; the paper's are half of those in the YOLOv8 port.
        context: context block on C5, (c1, c2); None for none.
        embed: base width of the low stage's fusion.
        low_blocks, high_blocks, rep_blocks: RepVGG blocks of LowIFM, transformer blocks of HighIFM, RepVGG blocks
            after each injection.
        high_stride: stride of the high stage's pooling; 1 in the YOLOv8 port, 2 in the paper.
        drop_path: probability of skipping a transformer block's branch.

    Raises:
        DetkitError: the strides are not 4 to 32, or a value is out of range.
    """

    in_strides = (4, 8, 16, 32)

    def __init__(  # noqa: PLR0913  (the arguments are the keys of the configuration)
        self,
        in_channels: Sequence[int],
        strides: Sequence[int],
        width: float = 0.25,
        max_channels: int = 1024,
        widths: Sequence[int] = (256, 512, 1024),
        context: BlockSpec | None = "sppf",
        embed: int = 384,
        low_blocks: int = 3,
        high_blocks: int = 2,
        rep_blocks: int = 4,
        high_stride: int = 1,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        if tuple(strides) != self.in_strides:
            raise DetkitError(f"neck 'repgd' takes the strides {list(self.in_strides)}, not {list(strides)}")
        if len(widths) != 3:
            raise DetkitError(f"neck.widths={list(widths)} must list one number for each of P3, P4 and P5")
        for key, value, least in (
            ("low_blocks", low_blocks, 0),
            ("high_blocks", high_blocks, 0),
            ("rep_blocks", rep_blocks, 0),
            ("high_stride", high_stride, 1),
        ):
            if value < least:
                raise DetkitError(f"neck.{key}={value} must be {least} or more")
        if not 0 <= drop_path < 1:
            raise DetkitError(f"neck.drop_path={drop_path} must be a number of at least 0 and below 1")
        c2, c3, c4, c5 = in_channels
        p3, p4, p5 = (scaled_width(base, width, max_channels) for base in widths)
        self.context: nn.Module = nn.Identity()
        if context:
            widened = scaled_width(CONTEXT_WIDTH, width, max_channels)
            self.context = build_block("context", context, c5, widened)
            c5 = widened
        self.low_widths, self.high_widths = (p4, p3), (p4, p5)
        self.low_ifm = LowIFM(c2 + c3 + c4 + c5, scaled_width(embed, width, max_channels), p4 + p3, low_blocks)
        self.narrow_c5, self.narrow_p4 = ConvBNReLU(c5, p4), ConvBNReLU(p4, p3)
        self.laf_p4, self.laf_p3 = LowLAF(c3, c4, p4, p4), LowLAF(c2, c3, p3, p3)
        self.inject_p4, self.inject_p3 = Inject(p4, p4, p4), Inject(p3, p3, p3)
        high = p3 + p4 + c5
        self.high_ifm = HighIFM(high, high_blocks, drop_path)
        self.high_split = nn.Conv2d(high, p4 + p5, 1)
        self.inject_n4, self.inject_n5 = Inject(p3 + p3, p4, p4), Inject(p4 + p4, p5, p5)
        self.rep_p4, self.rep_p3, self.rep_n4, self.rep_n5 = (
            nn.Sequential(*(RepVGG(c, c) for _ in range(rep_blocks))) for c in (p4, p3, p4, p5)
        )
        self.high_stride = high_stride
        self.out_channels = (p3, p4, p5)
        self.strides = tuple(strides[1:])

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Map C2 to C5, each (B, c, h, w), to P3, N4, N5 with the sizes of C3, C4 and C5."""
        c2, c3, c4, c5 = features
        c5 = self.context(c5)
        g4, g3 = self.low_ifm(align_low((c2, c3, c4, c5))).split(self.low_widths, 1)
        c5_half = self.narrow_c5(c5)
        p4 = self.rep_p4(self.inject_p4(self.laf_p4(c3, c4, c5_half), g4))
        p4_half = self.narrow_p4(p4)
        p3 = self.rep_p3(self.inject_p3(self.laf_p3(c2, c3, p4_half), g3))
        high = self.high_split(self.high_ifm(align_high((p3, p4, c5), self.high_stride)))
        h4, h5 = high.split(self.high_widths, 1)
        n4 = self.rep_n4(self.inject_n4(torch.cat((_pool(p3, p4.shape[-2:]), p4_half), 1), h4))
        n5 = self.rep_n5(self.inject_n5(torch.cat((_pool(n4, c5.shape[-2:]), c5_half), 1), h5))
        return p3, n4, n5


class LowIFM(nn.Module):
    """Low-stage fusion: 1x1 convolution, RepVGG blocks, 1x1 convolution."""

    def __init__(self, c1: int, hidden: int, c2: int, blocks: int = 3) -> None:
        super().__init__()
        self.conv1 = Conv(c1, hidden, 1)
        self.block = nn.ModuleList(RepVGG(hidden, hidden) for _ in range(blocks))
        self.conv2 = Conv(hidden, c2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, c1, h, w) to (B, c2, h, w)."""
        x = self.conv1(x)
        for block in self.block:
            x = block(x)
        return self.conv2(x)


class LowLAF(nn.Module):
    """Low-stage alignment: pool the finer, reduce the middle and resize the coarser level, concatenate, and fuse."""

    def __init__(self, finer: int, same: int, coarser: int, c2: int) -> None:
        super().__init__()
        self.cv1 = ConvBNReLU(same, c2)
        self.cv_fuse = ConvBNReLU(finer + c2 + coarser, c2)

    def forward(self, finer: Tensor, same: Tensor, coarser: Tensor) -> Tensor:
        """Map three neighbouring levels (B, c, h, w) to (B, c2, h, w) at the size of the middle one."""
        size = same.shape[-2:]
        return self.cv_fuse(torch.cat((_pool(finer, size), self.cv1(same), _resize(coarser, size)), 1))


class Inject(nn.Module):
    """Inject a global feature g into a local one: ``local * gate(g) + embedding(g)``."""

    def __init__(self, local: int, c2: int, global_: int) -> None:
        super().__init__()
        self.local_embedding = ConvBN(local, c2)
        self.global_embedding = ConvBN(global_, c2)
        self.global_act = ConvBN(global_, c2)

    def forward(self, local: Tensor, global_: Tensor) -> Tensor:
        """Map (B, local, h, w) and a global feature of the same or a smaller size to (B, c2, h, w)."""
        size = local.shape[-2:]
        gate, embedding = F.hardsigmoid(self.global_act(global_)), self.global_embedding(global_)
        return self.local_embedding(local) * _resize(gate, size) + _resize(embedding, size)


class Attention(nn.Module):
    """Multi-head attention over all positions, without scaling by 1 / sqrt(d); 1x1 convolutions with batch norm."""

    def __init__(self, channels: int, heads: int = 4, key: int = 8, value: int = 16) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = ConvBN(channels, heads * key)
        self.to_k = ConvBN(channels, heads * key)
        self.to_v = ConvBN(channels, heads * value)
        self.proj = nn.Sequential(nn.ReLU6(), ConvBN(heads * value, channels))
        nn.init.zeros_(self.proj.get_parameter("1.bn.weight"))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, h, w) to (B, C, h, w)."""
        h, w = x.shape[-2:]
        q, k, v = (
            rearrange(conv(x), "b (heads d) h w -> b heads (h w) d", heads=self.heads)
            for conv in (self.to_q, self.to_k, self.to_v)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, scale=1.0)
        return self.proj(rearrange(mixed, "b heads (h w) d -> b (heads d) h w", h=h, w=w))


class Mlp(nn.Module):
    """1x1, depthwise 3x3 with bias, ReLU6, 1x1; the 1x1 with batch norm."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1 = ConvBN(channels, channels)
        self.dwconv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.fc2 = ConvBN(channels, channels)
        nn.init.zeros_(self.fc2.get_parameter("bn.weight"))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, h, w) to (B, C, h, w)."""
        return self.fc2(F.relu6(self.dwconv(self.fc1(x))))


class HighIFM(nn.Module):
    """High-stage fusion: transformer blocks ``x + drop(attn(x))``, ``x + drop(mlp(x))``."""

    def __init__(self, channels: int, blocks: int = 2, drop_path: float = 0.0) -> None:
        super().__init__()
        self.transformer_blocks = nn.ModuleList(TransformerBlock(channels, drop_path) for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, h, w) to (B, C, h, w)."""
        for block in self.transformer_blocks:
            x = block(x)
        return x


class TransformerBlock(nn.Module):
    """Attention and Mlp, each with a residual and dropped per image with probability ``drop_path``."""

    def __init__(self, channels: int, drop_path: float = 0.0, heads: int = 4, key: int = 8, value: int = 16) -> None:
        super().__init__()
        self.attn = Attention(channels, heads, key, value)
        self.mlp = Mlp(channels)
        self.drop_path = drop_path

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, h, w) to (B, C, h, w)."""
        x = x + self._drop(self.attn(x))
        return x + self._drop(self.mlp(x))

    def _drop(self, x: Tensor) -> Tensor:
        if not self.training or self.drop_path == 0:
            return x
        keep = torch.rand(len(x), 1, 1, 1, device=x.device) >= self.drop_path
        return x * keep / (1 - self.drop_path)


def align_low(features: Sequence[Tensor]) -> Tensor:
    """Concatenate P2 and P3 pooled, P4, and P5 resized, all at the size of P4 (Low_FAM)."""
    p2, p3, p4, p5 = features
    size = p4.shape[-2:]
    return torch.cat((_pool(p2, size), _pool(p3, size), p4, _resize(p5, size)), 1)


def align_high(features: Sequence[Tensor], stride: int) -> Tensor:
    """Concatenate P3, P4 and P5 pooled to ((h5 - 1) // stride + 1, (w5 - 1) // stride + 1) (High_FAM)."""
    h, w = features[-1].shape[-2:]
    size = ((h - 1) // stride + 1, (w - 1) // stride + 1)
    if stride > 1 and any(isinstance(n, torch.SymInt) for n in size):  # torch.export with dynamic sides
        size = (_unbacked_size(size[0]), _unbacked_size(size[1]))
        return torch.cat([pool_by_products(x, size) for x in features], 1)
    return torch.cat([_pool(x, size) for x in features], 1)


def pool_by_products(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Pool (B, C, h, w) adaptively to ``size`` (h', w') by matrix products, which support a symbolic size."""
    rows, columns = (_window_weights(n, length, x) for n, length in zip(size, x.shape[-2:], strict=True))
    return rows @ x @ columns.T


def _window_weights(windows: int, length: int, like: Tensor) -> Tensor:
    """Return the weight of each position in each window's average, (windows, length)."""
    window, position = torch.arange(windows, device=like.device)[:, None], torch.arange(length, device=like.device)
    start, end = window * length // windows, ((window + 1) * length + windows - 1) // windows
    return ((position >= start) & (position < end)).to(like.dtype) / (end - start)


def _unbacked_size(size: int) -> int:
    """Return an unbacked copy of ``size``: torch.export would specialize a size that is 1 in the example."""
    if not isinstance(size, torch.SymInt):
        return size
    size = torch.scalar_tensor(size, dtype=torch.int64).item()
    torch._check(size >= 1)
    return size


def _pool(x: Tensor, size: tuple[int, ...]) -> Tensor:
    (height, width), (h, w) = x.shape[-2:], size
    if torch.compiler.is_exporting() or height % h or width % w:
        return F.adaptive_avg_pool2d(x, (h, w))
    return F.avg_pool2d(x, (height // h, width // w))  # the same, with deterministic gradients on a GPU


def _resize(x: Tensor, size: tuple[int, ...]) -> Tensor:
    return F.interpolate(x, size, mode="bilinear", align_corners=False)
