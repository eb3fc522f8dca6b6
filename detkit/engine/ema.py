"""Exponential moving average of the weights: what is evaluated and saved."""

import copy
import math

import torch
from torch import nn


class EMA:
    """A float32 copy of a model that follows it slowly, buffers too.

    The decay starts near 0 and approaches ``decay``: ``decay * (1 - exp(-updates / ramp))``.

    Attributes:
        model: the average, in eval mode.
        updates: how often it was updated.
    """

    def __init__(self, model: nn.Module, decay: float = 0.9999, ramp: float = 2000) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        self.ramp = ramp
        self.updates = 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the average towards ``model``."""
        self.updates += 1
        decay = self.decay * (1 - math.exp(-self.updates / self.ramp))
        average, current = [], []
        for mine, theirs in zip(self.model.state_dict().values(), model.state_dict().values(), strict=True):
            if mine.is_floating_point():
                average.append(mine)
                current.append(theirs.detach())
            else:
                mine.copy_(theirs)  # counters of batch norms
        torch._foreach_lerp_(average, current, 1 - decay)
