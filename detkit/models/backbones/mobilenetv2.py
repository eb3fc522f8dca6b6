"""MobileNetV2: inverted residuals with linear bottlenecks (arXiv 1801.04381)."""

from collections.abc import Sequence

from torch import Tensor, nn

from detkit.errors import DetkitError
from detkit.layers.conv import batch_norm
from detkit.registry import BACKBONES

PLAN = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
"""Expansion, channels, repeats and stride of each stage, after a stride-2 stem of 32 channels."""


@BACKBONES.register("mobilenetv2")
class MobileNetV2(nn.Module):
    """MobileNetV2 with features at strides 4, 8, 16 and 32, from the last block at each.

    Parameter names match torchvision's ``mobilenet_v2().features[0:18]``. Its batch norms have an eps of 1e-5, these
    1e-3: ``detkit import_weights`` rescales the weights of its checkpoints so that the outputs are equal.

    Args:
        width: multiplier of all channels, rounded to multiples of 8.
        out_strides: strides of the features to return, ascending; derived by the builder.

    Raises:
        DetkitError: a stride is not available.
    """

    def __init__(self, width: float = 1.0, out_strides: Sequence[int] = (8, 16, 32)) -> None:
        super().__init__()
        if not set(out_strides) <= {4, 8, 16, 32}:
            raise DetkitError(f"backbone mobilenetv2 has strides [4, 8, 16, 32], the neck takes {list(out_strides)}")
        channels = _rounded(32 * width)
        layers: list[nn.Module] = [_conv_bn_relu6(3, channels, 3, 2)]
        stride = 2
        last_at: dict[int, tuple[int, int]] = {}  # stride -> index and channels of its last block
        for expansion, base, repeats, stage_stride in PLAN:
            c2 = _rounded(base * width)
            for k in range(repeats):
                step = stage_stride if k == 0 else 1
                stride *= step
                layers.append(InvertedResidual(channels, c2, step, expansion))
                channels = c2
                last_at[stride] = (len(layers) - 1, c2)
        self.features = nn.ModuleList(layers)
        self.strides = tuple(out_strides)
        self.taps = tuple(last_at[s][0] for s in out_strides)
        self.out_channels = tuple(last_at[s][1] for s in out_strides)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Map (B, 3, H, W) to feature maps (B, out_channels[i], H / strides[i], W / strides[i])."""
        features = []
        for k, layer in enumerate(self.features):
            x = layer(x)
            if k in self.taps:
                features.append(x)
        return tuple(features)


class InvertedResidual(nn.Module):
    """1x1 expansion (unless 1), 3x3 depthwise, 1x1 linear projection; residual if the shape is preserved."""

    def __init__(self, c1: int, c2: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = c1 * expansion
        expand = [_conv_bn_relu6(c1, hidden, 1, 1)] if expansion > 1 else []
        depthwise = _conv_bn_relu6(hidden, hidden, 3, stride, groups=hidden)
        self.conv = nn.Sequential(*expand, depthwise, nn.Conv2d(hidden, c2, 1, bias=False), batch_norm(c2))
        self.residual = stride == 1 and c1 == c2

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, c1, H, W) to (B, c2, H / stride, W / stride)."""
        return x + self.conv(x) if self.residual else self.conv(x)


def _conv_bn_relu6(c1: int, c2: int, k: int, s: int, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(c1, c2, k, s, k // 2, groups=groups, bias=False)
    return nn.Sequential(conv, batch_norm(c2), nn.ReLU6(inplace=True))


def _rounded(channels: float) -> int:
    """Round to the nearest multiple of 8, but not below 90 % of ``channels``."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded
