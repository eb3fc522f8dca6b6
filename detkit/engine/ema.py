"""Exponential moving average (EMA) of the weights, which is evaluated and saved."""

import copy
import math
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)


class EMA(Generic[Model]):
    """Exponential moving average of a model's weights and buffers, in float32.

    The decay starts near 0 and approaches ``decay``: ``decay * (1 - exp(-updates / ramp))``.

    Attributes:
        model: the average, in eval mode.
        updates: number of calls of ``update``.
    """

    def __init__(self, model: Model, decay: float = 0.9999, ramp: float = 2000) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        self.ramp = ramp
        self.updates = 0

    @torch.no_grad()
    def update(self, model: nn.Module, scale: float | Tensor = 1.0) -> None:
        """Move the average towards ``model``.

        Args:
            model: same architecture as the average; its weights must be finite.
            scale: factor of the update, a float or () tensor; 0 leaves the average unchanged.
        """
        self.updates += 1
        decay = self.decay * (1 - math.exp(-self.updates / self.ramp))
        average, current = [], []
        for averaged, live in zip(self.model.state_dict().values(), model.state_dict().values(), strict=True):
            if averaged.is_floating_point():
                average.append(averaged)
                current.append(live.detach())
            else:
                averaged.copy_(live)  # num_batches_tracked of batch norms
        delta = torch._foreach_sub(current, average)
        torch._foreach_mul_(delta, (1 - decay) * scale)
        torch._foreach_add_(average, delta)
