"""Exponential moving average of the weights: what is evaluated and saved."""

import copy
import math
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)


class EMA(Generic[Model]):
    """A float32 copy of a model that follows it slowly, buffers too.

    The decay starts near 0 and approaches ``decay``: ``decay * (1 - exp(-updates / ramp))``.

    Attributes:
        model: the average, in eval mode.
        updates: how often ``update`` was called.
    """

    def __init__(self, model: Model, decay: float = 0.9999, ramp: float = 2000) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        self.ramp = ramp
        self.updates = 0

    @torch.no_grad()
    def update(self, model: nn.Module, share: float | Tensor = 1.0) -> None:
        """Move the average towards ``model``, whose numbers are finite.

        Args:
            share: of the way that the decay leaves to go; 0, or a tensor () of it, keeps the average as it is.
        """
        self.updates += 1
        decay = self.decay * (1 - math.exp(-self.updates / self.ramp))
        average, current = [], []
        for mine, theirs in zip(self.model.state_dict().values(), model.state_dict().values(), strict=True):
            if mine.is_floating_point():
                average.append(mine)
                current.append(theirs.detach())
            else:
                mine.copy_(theirs)  # counters of batch norms
        way = torch._foreach_sub(current, average)
        torch._foreach_mul_(way, (1 - decay) * share)
        torch._foreach_add_(average, way)
