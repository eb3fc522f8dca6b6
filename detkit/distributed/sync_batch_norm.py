"""Batch normalisation over the images of all ranks (torch's own SyncBatchNorm knows CUDA only)."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from detkit.distributed.collectives import all_reduce_sum, world_size
from detkit.errors import DetkitError


class SyncBatchNorm(nn.BatchNorm2d):
    """A BatchNorm2d whose statistics in training are those of the images of all ranks.

    It keeps running statistics, with a momentum, as BatchNorm2d does by default.

    Attributes:
        absent: this rank's images count nothing in the statistics; see ``without_bn_stats``.
    """

    absent = False
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same shape."""
        if not self.training or world_size() == 1:
            return super().forward(x)
        out, mean, var, count = _Normalise.apply(x, self.weight, self.bias, self.eps, self.absent)
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * count / (count - 1).clamp(min=1), self.momentum)
        return out


class SyncBatchNormAct(SyncBatchNorm):
    """The same for timm's BatchNormAct2d, which drops and activates what it has normalised."""

    act: nn.Module
    drop: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same shape."""
        return self.act(self.drop(super().forward(x)))


class _Normalise(torch.autograd.Function):
    """Returns the output, and the mean (C,), variance (C,) and number () of the values of each channel."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, absent: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        wide = x.float()
        values = 0 if absent else x.numel() // x.shape[1]
        var, mean = torch.var_mean(wide, (0, 2, 3), correction=0)
        number = torch.full_like(mean[:1], values)
        sums = all_reduce_sum(torch.cat((mean * values, number)))
        count = sums[-1]
        mean_all = sums[:-1] / count
        # About the mean of all: a difference of squares would lose the digits of a variance small against its mean.
        var_all = all_reduce_sum((var + (mean - mean_all).square()) * values) / count
        ctx.save_for_backward(x, weight, mean_all, (var_all + eps).rsqrt(), count)
        ctx.absent = absent
        ctx.mark_non_differentiable(mean_all, var_all, count)
        return F.batch_norm(x, mean_all, var_all, weight, bias, eps=eps), mean_all, var_all, count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, scale, count = ctx.saved_tensors
        mean, scale = mean[:, None, None], scale[:, None, None]
        wide = grad.float()
        normal = (x.float() - mean) * scale
        grad_bias, grad_weight = wide.sum((0, 2, 3)), (wide * normal).sum((0, 2, 3))  # of this rank's images
        shares = (all_reduce_sum(torch.stack((grad_bias, grad_weight))) / count)[:, :, None, None]
        through_statistics = 0 if ctx.absent else shares[0] + normal * shares[1]
        grad_x = (wide - through_statistics) * (scale * weight[:, None, None])
        return grad_x.to(x.dtype), grad_weight, grad_bias, None, None


def convert_sync_batchnorm(model: nn.Module) -> None:
    """Make every BatchNorm2d of ``model``, and timm's with an activation, a SyncBatchNorm, in place.

    Parameters, buffers and names stay.

    Raises:
        DetkitError: a batch norm of another kind.
    """
    from timm.layers import BatchNormAct2d  # here, as nothing else waits for timm

    synchronised: dict[type[nn.Module], type[nn.Module]] = {
        nn.BatchNorm2d: SyncBatchNorm,
        BatchNormAct2d: SyncBatchNormAct,
    }
    for name, module in model.named_modules():
        if type(module) in synchronised:
            module.__class__ = synchronised[type(module)]
        elif isinstance(module, nn.modules.batchnorm._BatchNorm) and not isinstance(module, SyncBatchNorm):
            kind = type(module).__name__
            raise DetkitError(f"trainer.sync_bn=true cannot synchronise {name}, a {kind}: use trainer.sync_bn=false")


@contextmanager
def without_bn_stats(model: nn.Module) -> Iterator[None]:
    """Run ``model`` on something that no batch norm shall count: a stand-in where a rank has no image."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training]
    for norm in norms:
        if isinstance(norm, SyncBatchNorm):
            norm.absent = True  # the other ranks wait for its sums
        else:
            norm.eval()
    yield
    for norm in norms:
        if isinstance(norm, SyncBatchNorm):
            norm.absent = False
        norm.train()


def average_bn_stats(model: nn.Module) -> None:
    """Replace the running statistics of plain batch norms by their means over the ranks."""
    if world_size() == 1:
        return
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    plain = [m for m in norms if m.training and m.track_running_stats and not isinstance(m, SyncBatchNorm)]
    if not plain:
        return
    both = [buffer for norm in plain for buffer in (norm.running_mean, norm.running_var)]
    buffers = [buffer for buffer in both if buffer is not None]
    means = all_reduce_sum(torch.cat(buffers)) / world_size()
    torch._foreach_copy_(buffers, list(means.split([len(buffer) for buffer in buffers])))
