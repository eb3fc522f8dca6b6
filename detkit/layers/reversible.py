"""Reversible columns: training without saving their activations (arXiv 2212.11696).

A column maps the four features of the previous column and the stem's output x to four new features::

    c_l  <-  Level_l(c_{l-1} of this column, c_{l+1} of the previous) + alpha_l * c_l of the previous

with x below level 0. Given a column's features, the previous ones follow from the top level down::

    previous c_l  =  (c_l - Level_l(c_{l-1}, previous c_{l+1})) / alpha_l

Backward therefore only needs the last column's features. Two measures make its gradients match plain autograd:

- The sums are accumulated in float64 while the levels compute in float32. In float32 every reconstructed feature
  would be slightly wrong, and so would its level's output; the error would grow about fivefold per column. In float64
  it is so small that features rounded to float32 equal those of the forward pass bit for bit (except for at most a few
  in 10,000), and the levels repeat exactly. What remains is each channel's own rounding error, which every division
  magnifies by 1 / |alpha|.
- A channel is saved before that product exceeds ``MAX_MAGNIFICATION``, which resets it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

Features = tuple[Tensor, ...]
Channels = Tensor | slice | None  # channels of a feature to save: indices, all, or none

# With 2**16, 16 columns of alpha 0.5 save nothing. If the levels themselves compute in float64, the sums cannot be
# wider, errors do spread, and only a few columns in a row can be inverted.
MAX_MAGNIFICATION, MAX_MAGNIFICATION_FLOAT64 = 2.0**16, 2.0**4


@dataclass(frozen=True)
class Columns:
    """K columns of L levels, ready to run.

    Attributes:
        levels: [K][L] modules, called with the lower input, the upper input (None at the top and in the first
            column) and their random numbers.
        noise: [K][L] random numbers or None, drawn in advance so that recomputing a level uses the same ones.
    """

    levels: Sequence[Sequence[nn.Module]]
    noise: Sequence[Sequence[Tensor | None]]

    def parameters(self) -> list[nn.Parameter]:
        """Return the parameters of all levels, column by column."""
        return [p for column in self.levels for level in column for p in level.parameters()]

    def run_level(self, k: int, level: int, lower: Tensor, upper: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Return the output of a level of column ``k`` in ``dtype``, the dtype of its inputs."""
        # Under autocast the level computes in half precision, but the sums do not.
        return self.levels[k][level](lower, upper, self.noise[k][level]).to(dtype)

    def run_column(
        self, k: int, x: Tensor, previous: Features | None, alphas: Sequence[Tensor], sums: torch.dtype
    ) -> Features:
        """Return the features of column ``k``.

        Args:
            k: index of the column.
            x: the stem's output; the levels compute in its dtype.
            previous: features of the previous column; None for the first.
            alphas: alpha of each level; () for the first column.
            sums: dtype of the returned features; those of the first column, which are not sums, have x's.
        """
        features: list[Tensor] = []
        lower = x
        for level in range(len(self.levels[k])):
            upper = None
            if previous is not None and level + 1 < len(previous):
                upper = previous[level + 1].to(x.dtype)
            feature = self.run_level(k, level, lower.to(x.dtype), upper, x.dtype)
            lower = feature if previous is None else feature + alphas[level] * previous[level].to(sums)
            features.append(lower)
        return tuple(features)


def run_columns(columns: Columns, x: Tensor, alphas: Sequence[Sequence[Tensor]]) -> Features:
    """Run all columns with plain autograd, which saves all activations; ``alphas`` are [K - 1][L]."""
    features = columns.run_column(0, x, None, (), x.dtype)
    for k in range(1, len(columns.levels)):
        features = columns.run_column(k, x, features, alphas[k - 1], x.dtype)
    return features


def run_columns_reversibly(
    columns: Columns, x: Tensor, alphas: Sequence[Sequence[Tensor]], keep: frozenset[int]
) -> Features:
    """Run all columns, saving only x and the features of the last column, of those in ``keep``, and some channels."""
    flat_alphas = [alpha for column in alphas for alpha in column]
    return _Reversible.apply(columns, keep, x, len(flat_alphas), *flat_alphas, *columns.parameters())


@torch.no_grad()
def channels_to_save(
    alphas: Sequence[Sequence[Tensor]], keep: frozenset[int], dtype: torch.dtype
) -> list[list[Channels]]:
    """Select the channels to save of the features before each column, [K - 1][L].

    Inverting a column multiplies a channel's rounding error by 1 / |alpha|; a channel is saved before the product
    since it was last saved exceeds MAX_MAGNIFICATION. ``dtype`` is the one the levels compute in; in float64 the worst
    channel decides for all. Columns in ``keep`` are saved completely.
    """
    if not alphas:
        return []
    sizes = [alpha.numel() for alpha in alphas[0]]
    limit = MAX_MAGNIFICATION_FLOAT64 if dtype is torch.float64 else MAX_MAGNIFICATION
    # One copy to the host, and so one synchronization per forward pass: the host selects what to save.
    alphas_kc = torch.stack([torch.cat([alpha.flatten() for alpha in column]) for column in alphas]).abs().cpu()
    magnification_c = torch.ones(alphas_kc.shape[1])
    saved: list[list[Channels]] = []
    for k, alpha_c in enumerate(alphas_kc):
        magnification_c = (magnification_c / alpha_c).clamp(min=1)
        if dtype is torch.float64:
            magnification_c[:] = magnification_c.max()
        over_c = torch.ones_like(alpha_c, dtype=torch.bool) if k in keep else magnification_c > limit
        magnification_c[over_c] = 1
        if k in keep:
            saved.append([slice(None)] * len(sizes))
            continue
        rows = [over.nonzero().flatten() for over in over_c.split(sizes)]
        saved.append([row.to(alphas[0][0].device) if len(row) else None for row in rows])
    return saved


class _Reversible(torch.autograd.Function):
    """Takes alphas and parameters as arguments, so that autograd and its hooks see their gradients."""

    @staticmethod
    def forward(
        ctx: Any, columns: Columns, keep: frozenset[int], x: Tensor, num_alphas: int, *rest: Tensor
    ) -> tuple[Tensor, ...]:
        alphas = _chunk(rest[:num_alphas], len(columns.levels[0]))
        ctx.channels = channels_to_save(alphas, keep, x.dtype)
        features = columns.run_column(0, x, None, (), x.dtype)
        saved: list[Tensor] = []
        for k in range(1, len(columns.levels)):
            channels = ctx.channels[k - 1]
            saved += [f[:, c] for f, c in zip(features, channels, strict=True) if c is not None]
            sums = x.dtype if k - 1 in keep else torch.float64  # float64 where they will be inverted
            features = columns.run_column(k, x, features, alphas[k - 1], sums)
        ctx.columns, ctx.num_alphas = columns, num_alphas
        device = x.device.type
        ctx.autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        # Saving the parameters costs nothing and makes backward raise if they were changed in place.
        ctx.save_for_backward(x, *features, *rest, *saved)
        return tuple(f.to(x.dtype) for f in features)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        columns: Columns = ctx.columns
        depth, num_rest = len(columns.levels[0]), ctx.num_alphas + len(columns.parameters())
        x, *tensors = ctx.saved_tensors
        features: Sequence[Tensor] = tensors[:depth]
        alphas = _chunk(tensors[depth : depth + ctx.num_alphas], depth)
        values = iter(tensors[depth + num_rest :])
        saved = [[None if c is None else (c, next(values)) for c in channels] for channels in ctx.channels]
        grad_features: Sequence[Tensor] = [
            torch.zeros_like(f, dtype=x.dtype) if g is None else g for f, g in zip(features, grads, strict=True)
        ]
        grad_x = torch.zeros_like(x)
        grad_alphas: list[Tensor] = []
        grad_parameters: list[Tensor | None] = []
        device, dtype, enabled = ctx.autocast
        with torch.autocast(device, dtype, enabled, cache_enabled=False):
            for k in reversed(range(len(columns.levels))):
                alphas_k, saved_k = (alphas[k - 1], saved[k - 1]) if k else (None, None)
                step = _invert_column(columns, k, x, features, grad_features, alphas_k, saved_k)
                features, grad_features = step.features, step.grads
                grad_x += step.grad_x
                grad_alphas[:0] = step.grad_alphas
                grad_parameters[:0] = step.grad_parameters
        return None, None, grad_x, None, *grad_alphas, *grad_parameters


@dataclass
class _Step:
    """Inverse of one column: the previous features, and the gradients w.r.t. them, x, the alphas and the parameters."""

    features: list[Tensor]
    grads: list[Tensor]
    grad_x: Tensor
    grad_alphas: list[Tensor]
    grad_parameters: list[Tensor | None]


def _invert_column(
    columns: Columns,
    k: int,
    x: Tensor,
    features: Sequence[Tensor],
    grads: Sequence[Tensor],
    alphas: Sequence[Tensor] | None,
    saved: Sequence[tuple[Channels, Tensor] | None] | None,
) -> _Step:
    """Invert column ``k`` from the top level down, recomputing each level with its autograd graph.

    Args:
        columns: all columns.
        k: index of the column.
        x: the stem's output.
        features: features of the column, finest first.
        grads: gradients w.r.t. ``features``.
        alphas: alpha of each level; None for the first column, which has no previous one.
        saved: for each previous feature, the saved channels and their values, or None.
    """
    depth = len(features)
    grads = list(grads)
    step = _Step(list(features), list(grads), torch.zeros_like(x), [], [])  # overwritten below, except for k = 0
    for level in reversed(range(depth)):
        lower = (features[level - 1] if level else x).detach().to(x.dtype).requires_grad_()
        upper = None
        if alphas is not None and level + 1 < depth:
            upper = step.features[level + 1].detach().to(x.dtype).requires_grad_()
        with torch.enable_grad():
            out = columns.run_level(k, level, lower, upper, x.dtype)
        parameters = list(columns.levels[k][level].parameters())
        inputs = [lower, *([] if upper is None else [upper]), *(p for p in parameters if p.requires_grad)]
        input_grads = iter(torch.autograd.grad(out, inputs, grads[level], allow_unused=True))
        grad_lower = next(input_grads)
        if level:
            grads[level - 1] = grads[level - 1] + grad_lower
        else:
            step.grad_x = grad_lower
        if upper is not None:
            step.grads[level + 1] = step.grads[level + 1] + next(input_grads)
        step.grad_parameters[:0] = [next(input_grads) if p.requires_grad else None for p in parameters]
        if alphas is not None and saved is not None:
            previous = _invert_sum(features[level], out.detach(), alphas[level], saved[level])
            step.features[level] = previous
            step.grads[level] = alphas[level] * grads[level]
            step.grad_alphas.insert(0, (grads[level] * previous.to(x.dtype)).sum((0, 2, 3), keepdim=True))
    return step


def _invert_sum(feature: Tensor, added: Tensor, alpha: Tensor, saved: tuple[Channels, Tensor] | None) -> Tensor:
    """Solve ``feature = added + alpha * previous`` for ``previous``; saved channels are copied."""
    if saved is not None and isinstance(saved[0], slice):
        return saved[1]
    previous = (feature - added) / alpha
    if saved is not None:
        channels, values = saved
        previous[:, channels] = values.to(previous.dtype)
    return previous


def _chunk(tensors: Sequence[Tensor], length: int) -> list[Features]:
    """Split a flat list into chunks of ``length``."""
    return [tuple(tensors[k : k + length]) for k in range(0, len(tensors), length)]
