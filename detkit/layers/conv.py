"""Convolution + batch norm + activation, the basic block of the YOLO family, and building blocks by name."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from detkit.errors import DetkitError
from detkit.registry import BLOCKS

BlockSpec = str | Mapping[str, Any]


def build_block(slot: str, spec: BlockSpec, *args: Any) -> nn.Module:
    """Build the block that a config names for a slot.

    Args:
        slot: kind of slot: ``"conv"`` (c1, c2, k, s), ``"csp"`` (c1, c2, n, shortcut) or ``"context"`` (c1, c2);
            block classes declare theirs in the attribute ``slot``.
        spec: a registered name, or ``{name, keyword arguments}``.
        args: positional arguments of the slot, as above.

    Raises:
        DetkitError: the block is unknown, or is for another kind of slot.
    """
    if not isinstance(spec, (str, Mapping)):
        raise DetkitError(f"a {slot} block must be a name or a mapping {{name, arguments}}, not {spec}")
    spec = {"name": spec} if isinstance(spec, str) else spec
    fits = [name for name in BLOCKS.names() if _slot(name) == slot]
    if "name" in spec and _slot(spec["name"]) != slot:
        raise DetkitError(f"block '{spec['name']}' does not fit a {slot} slot: use one of {', '.join(fits)}")
    return BLOCKS.build(spec, *args)


def _slot(name: str) -> str | None:
    return getattr(BLOCKS.get(name), "slot", None)


def per_stage(spec: BlockSpec | Sequence[BlockSpec], stages: int, where: str) -> list[BlockSpec]:
    """Repeat one block specification for every stage, or check that a list has one per stage.

    Raises:
        DetkitError: the list has another length; ``where`` names the config key.
    """
    if isinstance(spec, str) or not isinstance(spec, Sequence):
        return [spec] * stages
    if len(spec) != stages:
        raise DetkitError(f"{where} lists {len(spec)} blocks: give one, or one for each of the {stages} stages")
    return list(spec)


def batch_norm(channels: int) -> nn.BatchNorm2d:
    """Return a batch norm with YOLOv8's settings, used by all of detkit's own parts (timm backbones keep their own)."""
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.03)


@BLOCKS.register("conv")
class Conv(nn.Module):
    """Conv2d without bias, batch norm, SiLU: (B, c1, H, W) -> (B, c2, H / s, W / s).

    The padding is (k - 1) // 2, so that stride 2 halves even sides with odd and even kernels alike.
    """

    slot = "conv"

    def __init__(self, c1: int, c2: int, k: int = 1, s: int = 1) -> None:
        super().__init__()
        if k < 1:
            raise DetkitError(f"conv: kernel size k={k} must be 1 or more")
        self.conv = nn.Conv2d(c1, c2, k, s, (k - 1) // 2, bias=False)
        self.bn: nn.BatchNorm2d | nn.Identity = batch_norm(c2)

    def forward(self, x: Tensor) -> Tensor:
        """Return silu(bn(conv(x)))."""
        y = self.bn(self.conv(x))
        return F.silu(y, inplace=not torch.is_grad_enabled())  # in place, autograd would first copy y

    def fuse(self) -> None:
        """Fold the batch norm into the convolution, in place."""
        assert isinstance(self.bn, nn.BatchNorm2d), "already fused"
        self.conv = fuse_conv_bn_eval(self.conv, self.bn)
        self.bn = nn.Identity()
