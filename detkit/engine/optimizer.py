"""Optimizer, parameter groups and learning-rate schedule."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from detkit.config.schema import OptimConfig
from detkit.engine.param_groups import learning_rate_factors

AUTO_ADAMW_BELOW = 10_000  # optimizer steps
ONE_CYCLE_START = 1 / 25  # learning-rate factor at the start of the cycle
ONE_CYCLE_PEAK = 0.3  # fraction of the run after which the learning rate peaks


def accumulation(batch_size: int, nominal_batch: int) -> int:
    """Return the number of batches per optimizer step, which is about ``nominal_batch`` images."""
    return max(round(nominal_batch / batch_size), 1)


def parameter_groups(
    model: nn.Module, weight_decay: float, factors: Mapping[str, float] | None = None
) -> list[dict[str, Any]]:
    """Sort the trainable parameters into the groups ``weight``, ``no_decay`` and ``bias``, each exactly once.

    Weight decay applies to convolution and linear weights, not to biases, norms and scales (RevCol's alpha and gamma).

    Args:
        model: its parameters that require gradients are used.
        weight_decay: of the group ``weight``.
        factors: learning-rate multiplier by parameter name; by default ``learning_rate_factors`` of the model. There is
            a separate group for each factor.
    """
    factors = learning_rate_factors(model) if factors is None else factors
    groups: dict[tuple[str, float], list[nn.Parameter]] = {}
    for path, parameter in model.named_parameters():
        if parameter.requires_grad:
            name = path.rpartition(".")[2]
            matrix = name == "weight" and parameter.ndim >= 2
            kind = "bias" if name == "bias" else "weight" if matrix else "no_decay"
            groups.setdefault((kind, factors[path]), []).append(parameter)
    decay = {"weight": weight_decay, "no_decay": 0.0, "bias": 0.0}
    return [
        {"name": kind, "lr_factor": factor, "params": params, "weight_decay": decay[kind]}
        for (kind, factor), params in groups.items()
    ]


def describe_factors(optimizer: torch.optim.Optimizer) -> str:
    """Return parameter counts by learning-rate factor, lowest first."""
    counts: dict[float, int] = {}
    for group in optimizer.param_groups:
        counts[group["lr_factor"]] = counts.get(group["lr_factor"], 0) + sum(p.numel() for p in group["params"])
    return ", ".join(f"{counts[factor]:,} at {factor:.3g}" for factor in sorted(counts)) + " of the learning rate"


def step_if(finite: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Step the optimizer if ``finite``, () bool, is true; otherwise leave weights and optimizer state unchanged.

    Fused optimizers decide on the device; other optimizers need a synchronization.
    """
    if optimizer.defaults.get("fused"):
        # As a GradScaler sets them; both are missing in the stubs.
        optimizer.grad_scale, optimizer.found_inf = None, (~finite).float()  # type: ignore[attr-defined]
        optimizer.step()
    elif finite:
        optimizer.step()


@dataclass(frozen=True)
class Recipe:
    """Hyperparameters of the optimizer with ``auto`` resolved; see configs/optim."""

    name: str
    lr: float
    momentum: float
    weight_decay: float
    warmup_bias_lr: float
    lr_factors: Mapping[str, float] | None = None
    layer_decay: float | None = None

    @classmethod
    def from_config(cls, optim: OptimConfig, *, batch_size: int, total_steps: int, num_classes: int) -> "Recipe":
        """Create a recipe from the config group ``optim``.

        ``auto`` is AdamW for runs of fewer than 10,000 optimizer steps, else SGD. The defaults of ``lr`` and momentum
        are 0.01 / (4 + classes) and a first beta of 0.9 for AdamW, the same learning rate and 0.95 for Muon, and 0.01
        and 0.937 for SGD. Weight decay is scaled by the actual number of images per optimizer step.
        """
        name = optim.name
        if name == "auto":
            name = "adamw" if total_steps < AUTO_ADAMW_BELOW else "sgd"
        if name in ("adamw", "muon"):
            momentum = {"adamw": 0.9, "muon": 0.95}[name]
            defaults = {"lr": round(0.002 * 5 / (4 + num_classes), 6), "momentum": momentum, "warmup_bias_lr": 0.0}
        else:
            defaults = {"lr": 0.01, "momentum": 0.937, "warmup_bias_lr": 0.1}
        chosen = {
            key: default if getattr(optim, key) is None else getattr(optim, key) for key, default in defaults.items()
        }
        nominal = optim.nominal_batch
        decay = optim.weight_decay * batch_size * accumulation(batch_size, nominal) / nominal
        return cls(name, weight_decay=decay, lr_factors=optim.lr_factors, layer_decay=optim.layer_decay, **chosen)

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """Return the optimizer for the model's parameter groups, with fused kernels if available.

        Muon (timm's) orthogonalizes the momentum of kernels and matrices and uses NAdamW for everything else; its
        updates are scaled to the magnitude of AdamW's (arXiv 2502.16982), so the same learning rates suit both.
        """
        factors = learning_rate_factors(model, self.lr_factors, self.layer_decay)
        groups = parameter_groups(model, self.weight_decay, factors)
        if self.name == "adamw":
            return torch.optim.AdamW(groups, self.lr, betas=(self.momentum, 0.999), fused=True)
        if self.name == "muon":
            for group in groups:
                group["use_fallback"] = group["name"] != "weight"
            betas = (0.9, 0.999)
            from timm.optim import Muon  # imported here to keep other imports fast

            return Muon(groups, self.lr, momentum=self.momentum, nesterov=True, betas=betas)
        optimizer = torch.optim.SGD(groups, self.lr, self.momentum, nesterov=True, fused=True)
        for group in groups:
            for parameter in group["params"]:  # uninitialized by torch if the first step is skipped
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return optimizer


@dataclass(frozen=True)
class Schedule:
    """Learning rate and momentum as functions of the batch number alone, so that a resumed run continues them.

    Attributes:
        recipe: holds the learning rate after the warm-up.
        epochs: length of the run.
        final: learning-rate factor at the end of the run, reached one epoch after the last.
        shape: ``"linear"`` or ``"cosine"`` decay, updated once per epoch; ``"constant"``; or ``"one_cycle"``
            (arXiv 1803.09820), updated every batch: half a cosine up from 1/25 in the first 30 % of the run, then half
            a cosine down, while the momentum falls to ``warmup_momentum`` and rises again. It has no warm-up.
        warmup: number of warm-up batches.
        warmup_momentum: momentum at the start of the warm-up.
        batches: number of batches per epoch; only used by ``one_cycle``.
    """

    recipe: Recipe
    epochs: int
    final: float
    shape: str
    warmup: int
    warmup_momentum: float
    batches: int = 1

    @classmethod
    def from_config(cls, recipe: Recipe, optim: OptimConfig, *, epochs: int, batches: int) -> "Schedule":
        """Create a schedule from the config group ``optim`` for ``epochs`` epochs of ``batches`` batches.

        The warm-up lasts ``warmup_epochs``, at most ``epochs - 1``, and at least ``warmup_min_batches``.
        """
        warmup_epochs = min(optim.warmup_epochs, epochs - 1) if optim.schedule != "one_cycle" else 0
        warmup = max(round(warmup_epochs * batches), optim.warmup_min_batches) if warmup_epochs > 0 else 0
        return cls(recipe, epochs, optim.final_lr_factor, optim.schedule, warmup, optim.warmup_momentum, batches)

    def factor(self, epoch: float) -> float:
        """Return the learning-rate factor at ``epoch`` (from 0; 0.5 is the middle of the first)."""
        progress = min(epoch / max(self.epochs, 1), 1.0)
        if self.shape == "constant":
            return 1.0
        if self.shape == "one_cycle":
            start = ONE_CYCLE_START if progress < ONE_CYCLE_PEAK else self.final
            return start + (1 - start) * self.cycle_height(epoch)
        if self.shape == "cosine":
            progress = (1 - math.cos(math.pi * progress)) / 2
        return 1 + (self.final - 1) * progress

    def cycle_height(self, epoch: float) -> float:
        """Return the position on the cycle at ``epoch``: 0 at both ends of the run, 1 at the peak."""
        progress = min(epoch / max(self.epochs, 1), 1.0)
        up, down = progress / ONE_CYCLE_PEAK, (1 - progress) / (1 - ONE_CYCLE_PEAK)
        return (1 - math.cos(math.pi * min(up, down))) / 2

    def lr(self, epoch: float) -> float:
        """Return the learning rate of ``epoch`` (from 0) after the warm-up."""
        return self.recipe.lr * self.factor(epoch)

    def apply(self, optimizer: torch.optim.Optimizer, step: int, epoch: int) -> None:
        """Set learning rate and momentum of all groups for batch ``step`` of the run, which is in ``epoch``."""
        cycling = self.shape == "one_cycle"
        position = step / self.batches if cycling else epoch
        target = self.lr(position)
        progress = min(step / self.warmup, 1.0) if self.warmup else 1.0
        momentum_progress = 1 - self.cycle_height(position) if cycling else progress  # from warm-up to full momentum
        for group in optimizer.param_groups:
            start = self.recipe.warmup_bias_lr if group["name"] == "bias" else 0.0
            group["lr"] = group["lr_factor"] * (start * (1 - progress) + target * progress)
            if "momentum" in group:
                full = self.recipe.momentum
                group["momentum"] = self.warmup_momentum + (full - self.warmup_momentum) * momentum_progress
