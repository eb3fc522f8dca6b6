"""Optimizer, parameter groups, warm-up and decay of the learning rate."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

AUTO_ADAMW_BELOW = 10_000  # optimizer steps


def accumulation(batch_size: int, nominal_batch: int) -> int:
    """Return how many batches make one optimizer step: about ``nominal_batch`` images."""
    return max(round(nominal_batch / batch_size), 1)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Sort the trainable parameters into ``weight`` (decayed), ``no_decay`` and ``bias``, each exactly once.

    Convolution and linear weights decay; biases, norms and scale parameters (RevCol's alpha and gamma) do not. A module
    with an attribute ``lr_factor`` has groups of its own, whose learning rate is multiplied by it.
    """
    groups: dict[tuple[str, float], list[nn.Parameter]] = {}
    for module in model.modules():
        factor = getattr(module, "lr_factor", 1.0)
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                matrix = name == "weight" and parameter.ndim >= 2
                kind = "bias" if name == "bias" else "weight" if matrix else "no_decay"
                groups.setdefault((kind, factor), []).append(parameter)
    decay = {"weight": weight_decay, "no_decay": 0.0, "bias": 0.0}
    return [
        {"name": kind, "lr_factor": factor, "params": params, "weight_decay": decay[kind]}
        for (kind, factor), params in groups.items()
    ]


@dataclass(frozen=True)
class Recipe:
    """The optimizer's numbers after ``auto`` is decided; see configs/optim."""

    name: str
    lr: float
    momentum: float
    weight_decay: float
    warmup_bias_lr: float

    @classmethod
    def pick(cls, optim: Mapping[str, Any], *, batch_size: int, total_steps: int, num_classes: int) -> "Recipe":
        """Read the ``optim`` group.

        ``auto`` takes AdamW for runs shorter than 10,000 optimizer steps, else SGD. Where ``lr`` and the like are null,
        AdamW starts from 0.01 / (4 + classes) with a first beta of 0.9, SGD from 0.01 with a momentum of 0.937. The
        weight decay is scaled to the images that really make one optimizer step.
        """
        name = optim["name"]
        if name == "auto":
            name = "adamw" if total_steps < AUTO_ADAMW_BELOW else "sgd"
        if name == "adamw":
            defaults = {"lr": round(0.002 * 5 / (4 + num_classes), 6), "momentum": 0.9, "warmup_bias_lr": 0.0}
        else:
            defaults = {"lr": 0.01, "momentum": 0.937, "warmup_bias_lr": 0.1}
        chosen = {key: default if optim[key] is None else optim[key] for key, default in defaults.items()}
        nominal = optim["nominal_batch"]
        decay = optim["weight_decay"] * batch_size * accumulation(batch_size, nominal) / nominal
        return cls(name, weight_decay=decay, **chosen)

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
        final: share of the learning rate towards which it falls; an epoch after the last one would have it.
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

    @classmethod
    def pick(cls, recipe: Recipe, optim: Mapping[str, Any], *, epochs: int, batches: int) -> "Schedule":
        """Read the ``optim`` group for a run of ``epochs`` of ``batches`` each.

        The warm-up lasts ``warmup_epochs``, but one fewer than the run has, and at least ``warmup_min_batches``.
        """
        warmup_epochs = min(optim["warmup_epochs"], epochs - 1)
        warmup = max(round(warmup_epochs * batches), optim["warmup_min_batches"]) if warmup_epochs > 0 else 0
        return cls(recipe, epochs, optim["final"], optim["shape"], warmup, optim["warmup_momentum"])

    def factor(self, epoch: int) -> float:
        """Return the share of the starting learning rate in ``epoch`` (from 0)."""
        progress = epoch / max(self.epochs, 1)
        if self.shape == "cosine":
            progress = (1 - math.cos(math.pi * progress)) / 2
        return 1 + (self.final - 1) * progress

    def lr(self, epoch: int) -> float:
        """Return the learning rate of ``epoch`` (from 0) after the warm-up."""
        return self.recipe.lr * self.factor(epoch)

    def apply(self, optimizer: torch.optim.Optimizer, step: int, epoch: int) -> None:
        """Set the groups' learning rate and momentum for batch ``step`` of the run, which lies in ``epoch``."""
        target = self.lr(epoch)
        progress = min(step / self.warmup, 1.0) if self.warmup else 1.0
        for group in optimizer.param_groups:
            start = self.recipe.warmup_bias_lr if group["name"] == "bias" else 0.0
            group["lr"] = group["lr_factor"] * (start * (1 - progress) + target * progress)
            if "momentum" in group:
                group["momentum"] = self.warmup_momentum + (self.recipe.momentum - self.warmup_momentum) * progress
