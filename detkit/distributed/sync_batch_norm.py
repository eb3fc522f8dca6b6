"""Batch normalization over the images of all ranks, also on a CPU (torch's SyncBatchNorm needs CUDA)."""

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
    """BatchNorm2d that computes training statistics over the images of all ranks.

    Running statistics with a momentum are tracked, the default of BatchNorm2d.

    Attributes:
        excluded: do not count this rank's images in the statistics; see ``without_bn_stats``.
    """

    excluded = False
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float

    def forward(self, x: Tensor) -> Tensor:
        """Normalize ``x`` (B, C, H, W)."""
        if not self.training or world_size() == 1:
            return super().forward(x)
        out, mean, var, count = _Normalize.apply(x, self.weight, self.bias, self.eps, self.excluded)
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * count / (count - 1).clamp(min=1), self.momentum)
        return out


class SyncBatchNormAct(SyncBatchNorm):
    """SyncBatchNorm for timm's BatchNormAct2d, which applies dropout and an activation afterwards."""

    act: nn.Module
    drop: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """Normalize ``x`` (B, C, H, W)."""
        return self.act(self.drop(super().forward(x)))


class _Normalize(torch.autograd.Function):
    """Returns the output (B, C, H, W), and mean (C,), variance (C,) and number () of the values per channel."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, excluded: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        wide = x.float()
        values = 0 if excluded else x.numel() // x.shape[1]
        var, mean = torch.var_mean(wide, (0, 2, 3), correction=0)
        number = torch.full_like(mean[:1], values)
        sums = all_reduce_sum(torch.cat((mean * values, number)))
        count = sums[-1]
        mean_all = sums[:-1] / count
        # E[x^2] - E[x]^2 would lose precision if the variance is small compared to the mean.
        var_all = all_reduce_sum((var + (mean - mean_all).square()) * values) / count
        ctx.save_for_backward(x, weight, mean_all, (var_all + eps).rsqrt(), count)
        ctx.excluded = excluded
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
        mean_grads = (all_reduce_sum(torch.stack((grad_bias, grad_weight))) / count)[:, :, None, None]
        grad_statistics = 0 if ctx.excluded else mean_grads[0] + normal * mean_grads[1]
        grad_x = (wide - grad_statistics) * (scale * weight[:, None, None])
        return grad_x.to(x.dtype), grad_weight, grad_bias, None, None


def convert_sync_batchnorm(model: nn.Module) -> None:
    """Convert every BatchNorm2d and timm BatchNormAct2d of ``model`` to SyncBatchNorm, in place.

    Parameters, buffers and names are unchanged.

    Raises:
        DetkitError: the model has a batch norm of another type.
    """
    from timm.layers import BatchNormAct2d  # imported here to keep other imports fast

    sync_types: dict[type[nn.Module], type[nn.Module]] = {
        nn.BatchNorm2d: SyncBatchNorm,
        BatchNormAct2d: SyncBatchNormAct,
    }
    for name, module in model.named_modules():
        if type(module) in sync_types:
            module.__class__ = sync_types[type(module)]
        elif isinstance(module, nn.modules.batchnorm._BatchNorm) and not isinstance(module, SyncBatchNorm):
            kind = type(module).__name__
            raise DetkitError(f"trainer.sync_bn=true cannot synchronize {name}, a {kind}: use trainer.sync_bn=false")


@contextmanager
def without_bn_stats(model: nn.Module) -> Iterator[None]:
    """Exclude a dummy input, on a rank without images, from the statistics of all batch norms."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training]
    for norm in norms:
        if isinstance(norm, SyncBatchNorm):
            norm.excluded = True  # it still takes part in the reductions
        else:
            norm.eval()
    yield
    for norm in norms:
        if isinstance(norm, SyncBatchNorm):
            norm.excluded = False
        norm.train()


def average_bn_stats(model: nn.Module) -> None:
    """Average the running statistics of ordinary batch norms over the ranks."""
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
