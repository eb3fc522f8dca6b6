"""Unfusing checkpoints: restoring folded batch norms and RepVGG's merged branches."""

from collections.abc import Iterable

import torch
from torch import Tensor

EPS = 1e-3  # of the batch norms in detkit's own parts
NORM = ("weight", "bias", "running_mean", "running_var")


def unfuse(tensors: dict[str, Tensor], expected: Iterable[str]) -> int:
    """Restore folded layers in place, with equal outputs in eval mode.

    A folded batch norm becomes one that only adds the convolution's bias; a merged RepVGG block becomes a 3x3 and a 1x1
    convolution with the same sum, and an identity branch with weight 0.

    Args:
        tensors: tensors of the checkpoint by name.
        expected: names of the model's tensors.

    Returns:
        The number of restored layers. Their statistics are lost: use the unfused file for further training.
    """
    expected = list(expected)
    dense = ".rbr_dense.conv.weight"
    merged = [name.removesuffix(dense) for name in expected if name.endswith(dense)]
    merged = [block for block in merged if _split_branches(tensors, block, f"{block}.rbr_identity.weight" in expected)]
    norms = [name.removesuffix(".running_var") for name in expected if name.endswith(".running_var")]
    folded = [norm for norm in norms if _restore_norm(tensors, norm)]
    return len(merged) + len(folded)


def _restore_norm(tensors: dict[str, Tensor], norm: str) -> bool:
    """Restore a missing batch norm from the bias of the convolution before it; return whether that was possible."""
    parent, _, leaf = norm.rpartition(".")
    bias = f"{parent}.{int(leaf) - 1 if leaf.isdigit() else 'conv'}.bias"
    if bias not in tensors or any(f"{norm}.{name}" in tensors for name in NORM):
        return False
    _put_norm(tensors, norm, weight=1.0, bias=tensors.pop(bias))
    return True


def _split_branches(tensors: dict[str, Tensor], block: str, identity: bool) -> bool:
    """Restore the branches of a RepVGG block from its merged convolution; return whether it has one."""
    kernel, bias = f"{block}.rbr_reparam.weight", f"{block}.rbr_reparam.bias"
    if kernel not in tensors or bias not in tensors or tensors[kernel].shape[2:] != (3, 3):
        return False
    merged, shift = tensors.pop(kernel).clone(), tensors.pop(bias)
    tensors[f"{block}.rbr_1x1.conv.weight"] = merged[..., 1:2, 1:2].clone()
    merged[..., 1, 1] = 0
    tensors[f"{block}.rbr_dense.conv.weight"] = merged
    _put_norm(tensors, f"{block}.rbr_dense.bn", weight=1.0, bias=shift)
    _put_norm(tensors, f"{block}.rbr_1x1.bn", weight=1.0, bias=torch.zeros_like(shift))
    if identity:
        _put_norm(tensors, f"{block}.rbr_identity", weight=0.0, bias=torch.zeros_like(shift))
    return True


def _put_norm(tensors: dict[str, Tensor], norm: str, weight: float, bias: Tensor) -> None:
    """Write a batch norm that multiplies by ``weight`` and adds ``bias``."""
    values = (torch.full_like(bias, weight), bias, torch.zeros_like(bias), torch.full_like(bias, 1 - EPS))
    tensors.update({f"{norm}.{name}": value for name, value in zip(NORM, values, strict=True)})
