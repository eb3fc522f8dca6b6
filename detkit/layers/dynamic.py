"""ParameterNet's dynamic convolution: a mixture of experts over kernels (arXiv 2306.14525).

Many parameters, few FLOPs: each image mixes its own kernel from a few experts, then convolves once.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detkit.errors import DetkitError
from detkit.layers.conv import batch_norm
from detkit.registry import BLOCKS

MAX_EXPERTS = 256


class MixedConv2d(nn.Module):
    """Convolution with a kernel that each sample mixes from E experts: ``sum_e r_e W_e``.

    ``weight`` is (E, c2 * c1 / groups * k * k): the flattened kernels of the experts.
    """

    bias: nn.Parameter | None

    def __init__(self, c1: int, c2: int, k: int, s: int, groups: int, experts: int) -> None:
        super().__init__()
        self.kernel_shape = (c2, c1 // groups, k, k)
        self.stride = s
        self.groups = groups
        self.weight = nn.Parameter(torch.empty(experts, c2 * (c1 // groups) * k * k))
        self.register_parameter("bias", None)  # set when a batch norm is folded in; not mixed
        with torch.no_grad():
            for expert in self.weight:
                nn.init.kaiming_uniform_(expert.view(self.kernel_shape), a=5**0.5)

    def forward(self, x: Tensor, routing_be: Tensor) -> Tensor:
        """Map (B, c1, H, W) and mixing weights (B, E) to (B, c2, H / s, W / s)."""
        c2, _, k, _ = self.kernel_shape
        if torch.compiler.is_exporting():  # an exported graph has a dynamic batch, but a fixed number of groups
            return self._mix_outputs(x, routing_be)
        batch, _, height, width = x.shape
        kernels = (routing_be @ self.weight).view(batch * c2, *self.kernel_shape[1:])
        folded = x.reshape(1, -1, height, width)  # one group per image
        out = F.conv2d(folded, kernels, None, self.stride, k // 2, groups=batch * self.groups)
        out = out.view(batch, c2, *out.shape[-2:])
        return out if self.bias is None else out + self.bias.view(-1, 1, 1)

    def _mix_outputs(self, x: Tensor, routing_be: Tensor) -> Tensor:
        """Compute the same by linearity: mix the outputs of all experts. Takes E times the FLOPs."""
        k = self.kernel_shape[-1]
        outputs = [
            F.conv2d(x, expert.view(self.kernel_shape), None, self.stride, k // 2, groups=self.groups)
            for expert in self.weight
        ]
        weighted = zip(outputs, routing_be.unbind(1), strict=True)
        out = sum((y * r.view(-1, 1, 1, 1) for y, r in weighted), start=x.new_zeros(()))
        return out if self.bias is None else out + self.bias.view(-1, 1, 1)


class RoutedConv2d(nn.Module):
    """MixedConv2d routed by its own input: average pool, linear, sigmoid (the weights need not sum to 1)."""

    def __init__(self, c1: int, c2: int, k: int, s: int, groups: int, experts: int) -> None:
        super().__init__()
        if groups < 1 or c1 % groups or c2 % groups:
            raise DetkitError(f"dynamic convolution: groups={groups} must divide the channels {c1} and {c2}")
        if not 1 <= experts <= MAX_EXPERTS:
            raise DetkitError(f"dynamic convolution: experts={experts} must be from 1 to {MAX_EXPERTS}")
        self.routing = nn.Linear(c1, experts)
        self.cond_conv = MixedConv2d(c1, c2, k, s, groups, experts)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, c1, H, W) to (B, c2, H / s, W / s)."""
        return self.cond_conv(x, self.routing(x.mean((2, 3))).sigmoid())


@BLOCKS.register("dynamic_conv")
class DynamicConv(nn.Module):
    """Routed convolution (no bias, padding k // 2), batch norm, SiLU; a conv block, (c1, c2, k, s)."""

    slot = "conv"

    def __init__(self, c1: int, c2: int, k: int = 1, s: int = 1, groups: int = 1, experts: int = 4) -> None:
        super().__init__()
        routed = RoutedConv2d(c1, c2, k, s, groups, experts)
        self.conv = nn.Sequential(routed, batch_norm(c2), nn.SiLU(inplace=True))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, c1, H, W) to (B, c2, H / s, W / s)."""
        return self.conv(x)

    def fuse(self) -> None:
        """Fold the batch norm into every expert and one shared bias, in place."""
        routed, bn = self.conv[0], self.conv[1]
        assert isinstance(routed, RoutedConv2d) and isinstance(bn, nn.BatchNorm2d), "already fused"
        assert bn.running_mean is not None and bn.running_var is not None
        mixed = routed.cond_conv
        with torch.no_grad():
            scale = bn.weight / torch.sqrt(bn.running_var + bn.eps)
            experts = mixed.weight.view(-1, *mixed.kernel_shape) * scale.view(-1, 1, 1, 1)
            mixed.weight.copy_(experts.flatten(1))
            mixed.bias = nn.Parameter(bn.bias - bn.running_mean * scale, requires_grad=False)
        self.conv[1] = nn.Identity()


@BLOCKS.register("dynamic_bn_act")
class DynamicBnAct(nn.Module):
    """DynamicConv, then a second batch norm and ReLU, with an optional residual; a conv block, (c1, c2, k, s)."""

    slot = "conv"

    def __init__(
        self, c1: int, c2: int, k: int = 1, s: int = 1, groups: int = 1, experts: int = 4, residual: bool = False
    ) -> None:
        super().__init__()
        if residual and (c1 != c2 or s != 1):
            raise DetkitError("dynamic_bn_act: residual=true needs equal input and output channels and stride 1")
        self.conv = DynamicConv(c1, c2, k, s, groups, experts)
        self.bn1 = batch_norm(c2)
        self.act = nn.ReLU(inplace=True)
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, c1, H, W) to (B, c2, H / s, W / s)."""
        y = self.act(self.bn1(self.conv(x)))
        return x + y if self.residual else y
