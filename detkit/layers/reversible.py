"""Columns of levels that run backwards, so that training need not remember what they computed (arXiv 2212.11696).

A column turns the four features of the one before it, and the stem's output x, into four new ones::

    c_l  <-  Level_l(c_{l-1} of this column, c_{l+1} of the previous) + alpha_l * c_l of the previous

with x below level 0. Knowing a column's features, those before it follow from the top level down::

    previous c_l  =  (c_l - Level_l(c_{l-1}, previous c_{l+1})) / alpha_l

Backward therefore needs the last column's features only. Two things keep its gradients those of plain autograd:

- The sums are held in float64 while the levels compute in float32. In float32 every feature found again would be a
  little wrong, its level's output with it, and the error, going from level to level, grow about fivefold a column. In
  float64 it is so small that features rounded to float32 are the ones that forward saw, bit for bit (all but a few
  in 10,000 at worst), and the levels repeat themselves exactly. What is left is each channel's own rounding error,
  which a division magnifies by 1 / |alpha|.
- A channel is remembered before that product exceeds ``MAX_MAGNIFICATION``, and its arithmetic starts afresh.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

Features = tuple[Tensor, ...]
Kept = Tensor | slice | None  # channels of a feature to remember: indices, all, or none

# With 2**16, 16 columns of alpha 0.5 remember nothing. Nothing is wider than float64: where the levels compute in it,
# errors do spread, and only a few columns are undone at a stretch.
MAX_MAGNIFICATION, MAX_MAGNIFICATION_FLOAT64 = 2.0**16, 2.0**4


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

    def parameters(self) -> list[nn.Parameter]:
        """Return the parameters of all levels, column by column."""
        return [p for column in self.levels for level in column for p in level.parameters()]

    def run_level(self, k: int, level: int, lower: Tensor, upper: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Return what a level of column ``k`` adds, in ``dtype``, which its inputs have too."""
        # Under autocast the level computes in half precision; the chain of sums does not.
        return self.levels[k][level](lower, upper, self.noise[k][level]).to(dtype)

    def run_column(
        self, k: int, x: Tensor, previous: Features | None, alphas: Sequence[Tensor], sums: torch.dtype
    ) -> Features:
        """Return the features of column ``k``.

        Args:
            x: the stem's output; the levels compute in its dtype.
            previous: the features before the column, None for the first.
            alphas: of the column, () for the first.
            sums: the dtype of the features returned; the first column's, which sum nothing, have x's.
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
    """Run all columns with plain autograd, which remembers everything; ``alphas`` are [K - 1][L]."""
    features = columns.run_column(0, x, None, (), x.dtype)
    for k in range(1, len(columns.levels)):
        features = columns.run_column(k, x, features, alphas[k - 1], x.dtype)
    return features


def run_columns_reversibly(
    columns: Columns, x: Tensor, alphas: Sequence[Sequence[Tensor]], keep: frozenset[int]
) -> Features:
    """The same, remembering x, the last column's features, those of the columns in ``keep``, and channels as above."""
    flat_alphas = [alpha for column in alphas for alpha in column]
    return _Reversible.apply(columns, keep, x, len(flat_alphas), *flat_alphas, *columns.parameters())


@torch.no_grad()
def channels_to_keep(alphas: Sequence[Sequence[Tensor]], keep: frozenset[int], dtype: torch.dtype) -> list[list[Kept]]:
    """Decide which channels of the features before each column are remembered, [K - 1][L].

    Undoing column after column multiplies a channel's rounding error by 1 / |alpha| each time; it is remembered where
    the product since it last was would exceed MAX_MAGNIFICATION; ``dtype`` is what the levels compute in. In float64
    the worst channel decides for all. Columns in ``keep`` are remembered whole.
    """
    if not alphas:
        return []
    sizes = [alpha.numel() for alpha in alphas[0]]
    limit = MAX_MAGNIFICATION_FLOAT64 if dtype is torch.float64 else MAX_MAGNIFICATION
    # One copy to the host, which waits for the device once a forward pass: what to remember is the host's decision.
    alphas_kc = torch.stack([torch.cat([alpha.flatten() for alpha in column]) for column in alphas]).abs().cpu()
    magnification_c = torch.ones(alphas_kc.shape[1])
    kept: list[list[Kept]] = []
    for k, alpha_c in enumerate(alphas_kc):
        magnification_c = (magnification_c / alpha_c).clamp(min=1)
        if dtype is torch.float64:
            magnification_c[:] = magnification_c.max()
        over_c = torch.ones_like(alpha_c, dtype=torch.bool) if k in keep else magnification_c > limit
        magnification_c[over_c] = 1
        if k in keep:
            kept.append([slice(None)] * len(sizes))
            continue
        rows = [over.nonzero().flatten() for over in over_c.split(sizes)]
        kept.append([row.to(alphas[0][0].device) if len(row) else None for row in rows])
    return kept


class _Reversible(torch.autograd.Function):
    """Alphas and parameters are arguments, so that autograd (and whatever hooks into it) sees their gradients."""

    @staticmethod
    def forward(
        ctx: Any, columns: Columns, keep: frozenset[int], x: Tensor, num_alphas: int, *rest: Tensor
    ) -> tuple[Tensor, ...]:
        alphas = _rows(rest[:num_alphas], len(columns.levels[0]))
        ctx.channels = channels_to_keep(alphas, keep, x.dtype)
        features = columns.run_column(0, x, None, (), x.dtype)
        kept: list[Tensor] = []
        for k in range(1, len(columns.levels)):
            channels = ctx.channels[k - 1]
            kept += [f[:, c] for f, c in zip(features, channels, strict=True) if c is not None]
            sums = x.dtype if k - 1 in keep else torch.float64  # wide where they will be undone
            features = columns.run_column(k, x, features, alphas[k - 1], sums)
        ctx.columns, ctx.num_alphas = columns, num_alphas
        device = x.device.type
        ctx.autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        # The parameters cost nothing; saved, they make backward refuse after a change in place, as it should.
        ctx.save_for_backward(x, *features, *rest, *kept)
        return tuple(f.to(x.dtype) for f in features)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        columns: Columns = ctx.columns
        depth, num_rest = len(columns.levels[0]), ctx.num_alphas + len(columns.parameters())
        x, *saved = ctx.saved_tensors
        features: Sequence[Tensor] = saved[:depth]
        alphas = _rows(saved[depth : depth + ctx.num_alphas], depth)
        kept = iter(saved[depth + num_rest :])
        known = [[None if c is None else (c, next(kept)) for c in channels] for channels in ctx.channels]
        flowing: Sequence[Tensor] = [
            torch.zeros_like(f, dtype=x.dtype) if g is None else g for f, g in zip(features, grads, strict=True)
        ]
        grad_x = torch.zeros_like(x)
        grad_alphas: list[Tensor] = []
        grad_parameters: list[Tensor | None] = []
        device, dtype, enabled = ctx.autocast
        with torch.autocast(device, dtype, enabled, cache_enabled=False):
            for k in reversed(range(len(columns.levels))):
                alphas_k, known_k = (alphas[k - 1], known[k - 1]) if k else (None, None)
                step = _undo(columns, k, x, features, flowing, alphas_k, known_k)
                features, flowing = step.features, step.grads
                grad_x += step.grad_x
                grad_alphas[:0] = step.grad_alphas
                grad_parameters[:0] = step.grad_parameters
        return None, None, grad_x, None, *grad_alphas, *grad_parameters


@dataclass
class _Step:
    """One column undone: the features before it, the gradients to them, to x, to its alphas and its parameters."""

    features: list[Tensor]
    grads: list[Tensor]
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
    known: Sequence[tuple[Kept, Tensor] | None] | None,
) -> _Step:
    """Undo column ``k`` from the top level down, each level run once more, with its graph this time.

    Args:
        features, grads: of the column, and the gradients to them.
        alphas: of the column; None for the first, which has nothing before it.
        known: of each feature before it, the channels that were remembered, and their values.
    """
    depth = len(features)
    grads = list(grads)
    step = _Step(list(features), list(grads), torch.zeros_like(x), [], [])  # each overwritten, but for the first column
    for level in reversed(range(depth)):
        lower = (features[level - 1] if level else x).detach().to(x.dtype).requires_grad_()
        upper = None
        if alphas is not None and level + 1 < depth:
            upper = step.features[level + 1].detach().to(x.dtype).requires_grad_()
        with torch.enable_grad():
            out = columns.run_level(k, level, lower, upper, x.dtype)
        parameters = list(columns.levels[k][level].parameters())
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
        if alphas is not None and known is not None:
            before = _before(features[level], out.detach(), alphas[level], known[level])
            step.features[level] = before
            step.grads[level] = alphas[level] * grads[level]
            step.grad_alphas.insert(0, (grads[level] * before.to(x.dtype)).sum((0, 2, 3), keepdim=True))
    return step


def _before(feature: Tensor, added: Tensor, alpha: Tensor, known: tuple[Kept, Tensor] | None) -> Tensor:
    """Return the feature before ``feature = added + alpha * before``; its ``known`` channels are taken as they are."""
    if known is not None and isinstance(known[0], slice):
        return known[1]
    before = (feature - added) / alpha
    if known is not None:
        channels, values = known
        before[:, channels] = values.to(before.dtype)
    return before


def _rows(tensors: Sequence[Tensor], length: int) -> list[Features]:
    """Cut a flat list into rows of ``length``."""
    return [tuple(tensors[k : k + length]) for k in range(0, len(tensors), length)]
