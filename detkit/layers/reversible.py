"""Columns of levels that run backwards, so that training need not remember what they computed (arXiv 2212.11696).

A column turns the four features of the one before it, and the stem's output x, into four new ones::

    c_l  <-  Level_l(c_{l-1} of this column, c_{l+1} of the previous) + alpha_l * c_l of the previous

with x below level 0. Knowing a column's features, those before it follow from the top level down::

    previous c_l  =  (c_l - Level_l(c_{l-1}, previous c_{l+1})) / alpha_l

Backward therefore needs the last column's features only. Each column undone divides by alpha, about 0.5, so rounding
errors double; the features of some columns may be kept on the way, and the arithmetic starts afresh there.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

Features = tuple[Tensor, ...]


@dataclass(frozen=True)
class Columns:
    """K columns of L levels, ready to run.

    Attributes:
        levels: [K][L] modules, called with the lower input, the upper input (None at the top and in the first
            column) and their random numbers.
        noise: [K][L] random numbers, drawn beforehand so that a second run of a level sees the same; None for none.
    """

    levels: Sequence[Sequence[nn.Module]]
    noise: Sequence[Sequence[Tensor | None]]

    def parameters(self) -> list[list[list[nn.Parameter]]]:
        """Return the parameters of every level, [K][L]."""
        return [[list(level.parameters()) for level in column] for column in self.levels]

    def run_column(self, k: int, x: Tensor, previous: Features | None, alphas: Sequence[Tensor]) -> Features:
        """Return the features of column ``k``; ``previous`` are the ones before it, None for the first."""
        features: list[Tensor] = []
        lower = x
        for level, module in enumerate(self.levels[k]):
            upper = previous[level + 1] if previous is not None and level + 1 < len(self.levels[k]) else None
            # Under autocast the levels compute in half precision; the chain of sums stays in x's.
            feature = module(lower, upper, self.noise[k][level]).to(x.dtype)
            lower = feature if previous is None else feature + alphas[level] * previous[level]
            features.append(lower)
        return tuple(features)


def run_columns(columns: Columns, x: Tensor, alphas: Sequence[Sequence[Tensor]]) -> Features:
    """Run all columns with plain autograd, which remembers everything; ``alphas`` are [K - 1][L]."""
    features = columns.run_column(0, x, None, ())
    for k in range(1, len(columns.levels)):
        features = columns.run_column(k, x, features, alphas[k - 1])
    return features


def run_columns_reversibly(
    columns: Columns, x: Tensor, alphas: Sequence[Sequence[Tensor]], keep: frozenset[int]
) -> Features:
    """The same, remembering x, the last column's features and those of the columns in ``keep``."""
    parameters = [p for column in columns.parameters() for level in column for p in level]
    flat_alphas = [alpha for column in alphas for alpha in column]
    return _Reversible.apply(columns, keep, x, len(flat_alphas), *flat_alphas, *parameters)


class _Reversible(torch.autograd.Function):
    """Alphas and parameters are arguments, so that autograd (and whatever hooks into it) sees their gradients."""

    @staticmethod
    def forward(ctx: FunctionCtx, columns: Columns, keep: frozenset[int], x: Tensor, num_alphas: int, *rest: Tensor):
        count = len(columns.levels)
        alphas = _rows(rest[:num_alphas], len(columns.levels[0]))
        features = columns.run_column(0, x, None, ())
        kept: list[Tensor] = []
        kept_columns = []
        for k in range(1, count):
            if k - 1 in keep:
                kept.extend(features)
                kept_columns.append(k - 1)
            features = columns.run_column(k, x, features, alphas[k - 1])
        ctx.columns, ctx.kept_columns = columns, kept_columns
        device = x.device.type
        ctx.autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        ctx.num_alphas = num_alphas
        ctx.save_for_backward(x, *features, *kept, *rest[:num_alphas])
        return features

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, *grads: Tensor | None):
        columns: Columns = ctx.columns
        depth = len(columns.levels[0])
        x, *saved = ctx.saved_tensors
        features, *rows = _rows(saved, depth)
        kept = dict(zip(ctx.kept_columns, rows, strict=False))
        alphas = rows[len(kept) :]
        grads = [torch.zeros_like(f) if g is None else g for f, g in zip(features, grads, strict=True)]
        grad_x = torch.zeros_like(x)
        grad_alphas: list[Tensor] = []
        grad_parameters: list[Tensor | None] = []
        device, dtype, enabled = ctx.autocast
        with torch.autocast(device, dtype, enabled, cache_enabled=False):
            for k in reversed(range(len(columns.levels))):
                step = _undo(columns, k, x, features, grads, alphas[k - 1] if k else None, kept.get(k - 1))
                features, grads = step.features, step.grads
                grad_x += step.grad_x
                grad_alphas[:0] = step.grad_alphas
                grad_parameters[:0] = step.grad_parameters
        return None, None, grad_x, None, *grad_alphas, *grad_parameters


@dataclass
class _Step:
    """One column undone: the features before it, the gradients to them, to x, to its alphas and its parameters."""

    features: list[Tensor | None]
    grads: list[Tensor | None]
    grad_x: Tensor
    grad_alphas: list[Tensor]
    grad_parameters: list[Tensor | None]


def _undo(
    columns: Columns,
    k: int,
    x: Tensor,
    features: Sequence[Tensor],
    grads: Sequence[Tensor],
    alphas: Sequence[Tensor] | None,
    known: Features | None,
) -> _Step:
    """Undo column ``k`` from the top level down, each level run once more, with its graph this time.

    Args:
        features, grads: of the column, and the gradients to them.
        alphas: of the column; None for the first, which has nothing before it.
        known: the features before it, where they were kept.
    """
    depth = len(features)
    grads = list(grads)
    step = _Step([None] * depth, [None] * depth, torch.zeros_like(x), [], [])
    for level in reversed(range(depth)):
        module = columns.levels[k][level]
        lower = (features[level - 1] if level else x).detach().requires_grad_()
        upper = None
        if alphas is not None and level + 1 < depth:
            upper = step.features[level + 1].detach().requires_grad_()
        with torch.enable_grad():
            out = module(lower, upper, columns.noise[k][level]).to(x.dtype)
        parameters = list(module.parameters())
        wanted = [lower, *([] if upper is None else [upper]), *(p for p in parameters if p.requires_grad)]
        found = iter(torch.autograd.grad(out, wanted, grads[level], allow_unused=True))
        grad_lower = next(found)
        if level:
            grads[level - 1] = grads[level - 1] + grad_lower
        else:
            step.grad_x = grad_lower
        if upper is not None:
            step.grads[level + 1] = step.grads[level + 1] + next(found)
        step.grad_parameters[:0] = [next(found) if p.requires_grad else None for p in parameters]
        if alphas is not None:
            before = known[level] if known else (features[level] - out.detach()) / alphas[level]
            step.features[level] = before
            step.grads[level] = alphas[level] * grads[level]
            step.grad_alphas.insert(0, (grads[level] * before).sum((0, 2, 3), keepdim=True))
    return step


def _rows(tensors: Sequence[Tensor], length: int) -> list[Features]:
    """Cut a flat list into rows of ``length``."""
    return [tuple(tensors[k : k + length]) for k in range(0, len(tensors), length)]
