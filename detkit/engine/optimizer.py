"""Optimizer, parameter groups, and the learning rate of every batch."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from detkit.config.schema import OptimConfig
from detkit.engine.param_groups import learning_rate_factors

AUTO_ADAMW_BELOW = 10_000  # optimizer steps
ONE_CYCLE_START = 1 / 25  # share of the learning rate from which the cycle starts
ONE_CYCLE_PEAK = 0.3  # share of the run at which it is at its highest


def accumulation(batch_size: int, nominal_batch: int) -> int:
    """Return how many batches make one optimizer step: about ``nominal_batch`` images."""
    return max(round(nominal_batch / batch_size), 1)


def parameter_groups(
    model: nn.Module, weight_decay: float, factors: Mapping[str, float] | None = None
) -> list[dict[str, Any]]:
    """Sort the trainable parameters into ``weight`` (decayed), ``no_decay`` and ``bias``, each exactly once.

    Convolution and linear weights decay; biases, norms and scale parameters (RevCol's alpha and gamma) do not.

    Args:
        factors: what each parameter's learning rate is multiplied by, by name; by default ``learning_rate_factors``
            of the model. Parameters of another factor make groups of their own.
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
    """Return parameter counts per learning-rate factor, the slowest first."""
    counts: dict[float, int] = {}
    for group in optimizer.param_groups:
        counts[group["lr_factor"]] = counts.get(group["lr_factor"], 0) + sum(p.numel() for p in group["params"])
    return ", ".join(f"{counts[factor]:,} at {factor:.3g}" for factor in sorted(counts)) + " of the learning rate"


def step_if(finite: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Step the optimizer if ``finite``, () bool, is true; else leave the weights and its own state as they are.

    Fused optimizers decide on the device; for the others this waits for it.
    """
    if optimizer.defaults.get("fused"):
        # What a GradScaler would hand them; the stubs do not know the two.
        optimizer.grad_scale, optimizer.found_inf = None, (~finite).float()  # type: ignore[attr-defined]
        optimizer.step()
    elif finite:
        optimizer.step()


@dataclass(frozen=True)
class Recipe:
    """The optimizer's numbers after ``auto`` is decided; see configs/optim."""

    name: str
    lr: float
    momentum: float
    weight_decay: float
    warmup_bias_lr: float
    lr_factors: Mapping[str, float] | None = None
    layer_decay: float | None = None

    @classmethod
    def from_config(cls, optim: OptimConfig, *, batch_size: int, total_steps: int, num_classes: int) -> "Recipe":
        """Read the ``optim`` group.

        ``auto`` takes AdamW for runs shorter than 10,000 optimizer steps, else SGD. Where ``lr`` and the like are null,
        AdamW starts from 0.01 / (4 + classes) with a first beta of 0.9, Muon from the same with a momentum of 0.95, SGD
        from 0.01 with a momentum of 0.937. The weight decay is scaled to the images that really make an optimizer step.
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
        """Return the optimizer over the model's parameter groups, with fused kernels where it has them.

        Muon (timm's) orthogonalises the momentum of kernels and matrices, and is NAdamW for all else; its steps are
        scaled to be about as long as AdamW's (arXiv 2502.16982), so that the same learning rates suit both.
        """
        factors = learning_rate_factors(model, self.lr_factors, self.layer_decay)
        groups = parameter_groups(model, self.weight_decay, factors)
        if self.name == "adamw":
            return torch.optim.AdamW(groups, self.lr, betas=(self.momentum, 0.999), fused=True)
        if self.name == "muon":
            for group in groups:
                group["use_fallback"] = group["name"] != "weight"
            betas = (0.9, 0.999)
            from timm.optim import Muon  # here, as nothing else waits for timm

            return Muon(groups, self.lr, momentum=self.momentum, nesterov=True, betas=betas)
        optimizer = torch.optim.SGD(groups, self.lr, self.momentum, nesterov=True, fused=True)
        for group in groups:
            for parameter in group["params"]:  # torch would leave them uninitialised if the first step were skipped
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return optimizer


@dataclass(frozen=True)
class Schedule:
    """Learning rate and momentum of every batch, from its number alone: a resumed run goes on where it was.

    Attributes:
        recipe: where the learning rate starts after the warm-up.
        epochs: of the run.
        final: share of the learning rate towards which it falls; an epoch after the last one would have it.
        shape: ``"linear"`` or ``"cosine"`` on the way down, an epoch a stair; ``"constant"``; or ``"one_cycle"``
            (arXiv 1803.09820): batch by batch up from a 25th in the first 30 % of the run, then down, each half a
            cosine, while SGD's momentum goes down to ``warmup_momentum`` and up again. It has no warm-up.
        warmup: batches of warm-up.
        warmup_momentum: momentum at its start.
        batches: of an epoch; ``one_cycle`` alone asks.
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
        """Read the ``optim`` group for a run of ``epochs`` of ``batches`` each.

        The warm-up lasts ``warmup_epochs``, but one fewer than the run has, and at least ``warmup_min_batches``.
        """
        warmup_epochs = min(optim.warmup_epochs, epochs - 1) if optim.schedule != "one_cycle" else 0
        warmup = max(round(warmup_epochs * batches), optim.warmup_min_batches) if warmup_epochs > 0 else 0
        return cls(recipe, epochs, optim.final_lr_factor, optim.schedule, warmup, optim.warmup_momentum, batches)

    def factor(self, epoch: float) -> float:
        """Return the share of the starting learning rate in ``epoch`` (from 0; 0.5 is the middle of the first)."""
        progress = min(epoch / max(self.epochs, 1), 1.0)
        if self.shape == "constant":
            return 1.0
        if self.shape == "one_cycle":
            start = ONE_CYCLE_START if progress < ONE_CYCLE_PEAK else self.final
            return start + (1 - start) * self.height(epoch)
        if self.shape == "cosine":
            progress = (1 - math.cos(math.pi * progress)) / 2
        return 1 + (self.final - 1) * progress

    def height(self, epoch: float) -> float:
        """Return how far up the one cycle ``epoch`` is: from 0 at both ends of the run to 1 at the peak."""
        progress = min(epoch / max(self.epochs, 1), 1.0)
        up, down = progress / ONE_CYCLE_PEAK, (1 - progress) / (1 - ONE_CYCLE_PEAK)
        return (1 - math.cos(math.pi * min(up, down))) / 2

    def lr(self, epoch: float) -> float:
        """Return the learning rate of ``epoch`` (from 0) after the warm-up."""
        return self.recipe.lr * self.factor(epoch)

    def apply(self, optimizer: torch.optim.Optimizer, step: int, epoch: int) -> None:
        """Set the groups' learning rate and momentum for batch ``step`` of the run, which lies in ``epoch``."""
        cycling = self.shape == "one_cycle"
        position = step / self.batches if cycling else epoch
        target = self.lr(position)
        progress = min(step / self.warmup, 1.0) if self.warmup else 1.0
        calm = 1 - self.height(position) if cycling else progress  # 1: the recipe's momentum, 0: the warm-up's
        for group in optimizer.param_groups:
            start = self.recipe.warmup_bias_lr if group["name"] == "bias" else 0.0
            group["lr"] = group["lr_factor"] * (start * (1 - progress) + target * progress)
            if "momentum" in group:
                group["momentum"] = self.warmup_momentum + (self.recipe.momentum - self.warmup_momentum) * calm
