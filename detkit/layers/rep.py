"""RepVGG: three branches for training, one convolution for deployment (arXiv 2101.03697)."""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_conv_bn_weights

from detkit.layers.conv import batch_norm


class ConvBN(nn.Module):
    """Conv2d without bias (padding k // 2) and batch norm: (B, c1, H, W) -> (B, c2, H / s, W / s)."""

    def __init__(self, c1: int, c2: int, k: int = 1, s: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c1, c2, k, s, k // 2, bias=False)
        self.bn: nn.BatchNorm2d | nn.Identity = batch_norm(c2)

    def forward(self, x: Tensor) -> Tensor:
        """Return bn(conv(x))."""
        return self.bn(self.conv(x))

    def fuse(self) -> None:
        """Fold the batch norm into the convolution, in place."""
        assert isinstance(self.bn, nn.BatchNorm2d), "already fused"
        self.conv = fuse_conv_bn_eval(self.conv, self.bn)
        self.bn = nn.Identity()


class ConvBNReLU(ConvBN):
    """ConvBN and ReLU, YOLOv6's "SimConv"."""

    def forward(self, x: Tensor) -> Tensor:
        """Return relu(bn(conv(x)))."""
        return F.relu(super().forward(x))


class RepVGG(nn.Module):
    """ReLU of a 3x3 plus a 1x1 convolution plus, if the shape is preserved, the input, each with batch norm."""

    def __init__(self, c1: int, c2: int, s: int = 1) -> None:
        super().__init__()
        self.rbr_dense = ConvBN(c1, c2, 3, s)
        self.rbr_1x1 = ConvBN(c1, c2, 1, s)
        same = c1 == c2 and s == 1
        self.rbr_identity = batch_norm(c1) if same else None
        self.rbr_deployed: nn.Conv2d | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, c1, H, W) to (B, c2, H / s, W / s)."""
        if self.rbr_deployed is not None:
            return F.relu(self.rbr_deployed(x))
        y = self.rbr_dense(x) + self.rbr_1x1(x)
        return F.relu(y if self.rbr_identity is None else y + self.rbr_identity(x))

    def fuse(self) -> None:
        """Merge the branches into one biased 3x3 convolution, in place."""
        dense, point, identity = self.rbr_dense, self.rbr_1x1, self.rbr_identity
        branches = [(dense.conv.weight, dense.bn), (F.pad(point.conv.weight, (1, 1, 1, 1)), point.bn)]
        if identity is not None:
            branches.append((nn.init.dirac_(torch.empty_like(dense.conv.weight)), identity))
        kernels, biases = zip(*(_fold(*branch) for branch in branches), strict=True)
        merged = copy.deepcopy(dense.conv)
        merged.weight = nn.Parameter(torch.stack(kernels).sum(0), requires_grad=False)
        merged.bias = nn.Parameter(torch.stack(biases).sum(0), requires_grad=False)
        self.rbr_deployed = merged
        del self.rbr_dense, self.rbr_1x1, self.rbr_identity


def _fold(kernel: Tensor, bn: nn.Module) -> tuple[Tensor, Tensor]:
    """Return kernel and bias of a bias-free convolution with the batch norm after it folded in (eval mode)."""
    assert isinstance(bn, nn.BatchNorm2d) and bn.running_mean is not None and bn.running_var is not None
    return fuse_conv_bn_weights(kernel, None, bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias)
