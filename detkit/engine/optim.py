"""Optimizer, parameter groups, warm-up and decay of the learning rate."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from detkit.errors import DetkitError

AUTO_ADAMW_BELOW = 10_000  # optimizer steps


def accumulation(batch_size: int, nominal_batch: int) -> int:
    """Return how many batches make one optimizer step: about ``nominal_batch`` images."""
    return max(round(nominal_batch / batch_size), 1)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Sort the trainable parameters into ``weight`` (decayed), ``no_decay`` and ``bias``, each exactly once.

    Convolution and linear weights decay; biases, norms and scale parameters (of fewer than two dimensions) do not.
    """
    groups: dict[str, list[nn.Parameter]] = {"weight": [], "no_decay": [], "bias": []}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        kind = "bias" if name.endswith("bias") else "weight" if parameter.ndim >= 2 else "no_decay"
        groups[kind].append(parameter)
    decay = {"weight": weight_decay, "no_decay": 0.0, "bias": 0.0}
    return [{"name": kind, "params": params, "weight_decay": decay[kind]} for kind, params in groups.items()]


@dataclass(frozen=True)
class Recipe:
    """The optimizer's numbers after ``auto`` is decided; see configs/optim."""

    name: str
    lr: float
    momentum: float
    weight_decay: float
    bias_warmup_lr: float

    @classmethod
    def pick(cls, optim: Mapping[str, Any], *, batch_size: int, total_steps: int, num_classes: int) -> "Recipe":
        """Read the ``optim`` group.

        ``auto`` takes AdamW with a learning rate of 0.01 / (4 + classes) for runs shorter than 10,000 optimizer
        steps, else SGD. The weight decay is scaled to the images that really make one optimizer step.

        Raises:
            DetkitError: an unknown optimizer.
        """
        name, lr, momentum, bias_lr = optim["name"], optim["lr"], optim["momentum"], optim["bias_warmup_lr"]
        if name == "auto":
            if total_steps < AUTO_ADAMW_BELOW:
                name, lr, momentum, bias_lr = "adamw", round(0.002 * 5 / (4 + num_classes), 6), 0.9, 0.0
            else:
                name, lr, momentum = "sgd", 0.01, 0.9
        if name not in ("sgd", "adamw"):
            raise DetkitError(f"optim.name={name} is unknown: use auto, sgd or adamw")
        nominal = optim["nominal_batch"]
        decay = optim["weight_decay"] * batch_size * accumulation(batch_size, nominal) / nominal
        return cls(name, lr, momentum, decay, bias_lr)

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """Return the optimizer over the model's parameter groups, with fused or foreach kernels."""
        groups = parameter_groups(model, self.weight_decay)
        if self.name == "adamw":
            return torch.optim.AdamW(groups, self.lr, betas=(self.momentum, 0.999), fused=True)
        return torch.optim.SGD(groups, self.lr, self.momentum, nesterov=True, fused=True)


@dataclass(frozen=True)
class Schedule:
    """Learning rate and momentum of every batch.

    Attributes:
        recipe: where the learning rate starts after the warm-up.
        epochs: of the run.
        final: the last epoch's learning rate, as a share of the first's.
        shape: ``"linear"`` or ``"cosine"`` on the way.
        warmup: batches of warm-up.
        warmup_momentum: momentum at its start.
    """

    recipe: Recipe
    epochs: int
    final: float
    shape: str
    warmup: int
    warmup_momentum: float

    def factor(self, epoch: int) -> float:
        """Return the share of the starting learning rate in ``epoch`` (from 0)."""
        progress = epoch / max(self.epochs, 1)
        if self.shape == "cosine":
            progress = (1 - math.cos(math.pi * progress)) / 2
        return 1 + (self.final - 1) * progress

    def apply(self, optimizer: torch.optim.Optimizer, step: int, epoch: int) -> None:
        """Set the groups' learning rate and momentum for batch ``step`` of the run, which lies in ``epoch``."""
        target = self.recipe.lr * self.factor(epoch)
        progress = min(step / self.warmup, 1.0) if self.warmup else 1.0
        for group in optimizer.param_groups:
            start = self.recipe.bias_warmup_lr if group["name"] == "bias" else 0.0
            group["lr"] = start * (1 - progress) + target * progress
            if "momentum" in group:
                group["momentum"] = self.warmup_momentum + (self.recipe.momentum - self.warmup_momentum) * progress
