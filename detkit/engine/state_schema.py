"""Schema of ``state.pt``, against which its values are checked before use."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, ConfigDict, FailFast
from torch import Tensor

from detkit.config.check import first_unsupported_value, validate
from detkit.config.fields import field, fraction, is_number, is_whole, number, positive, whole
from detkit.config.schema import Factors, Section

# Names in an optimizer's state of a parameter; for Muon, of kernels and of the others.
STATE_NAMES = {
    "SGD": ({"momentum_buffer"},),
    "AdamW": ({"step", "exp_avg", "exp_avg_sq"},),
    "Muon": ({"use_muon", "momentum_buffer"}, {"use_muon", "step", "exp_avg", "exp_avg_sq"}),
}
SCALARS = ("step",)  # the other tensors have the shape of the parameter


def _health(values: list[Any]) -> list[Any]:
    *counts, fine = values
    if len(counts) != 4 or not all(is_whole(count, 0) for count in counts) or not isinstance(fine, bool):
        raise ValueError("invalid counts")
    return values


def _numpy(values: Any) -> Any:
    """Check the state of NumPy's generator, which itself accepts positions out of bounds and reads there."""
    name, keys, position, has_gauss, gauss = values
    valid_keys = isinstance(keys, list) and len(keys) == 624 and all(is_whole(k, 0) and k < 2**32 for k in keys)
    if name != "MT19937" or not valid_keys or not is_whole(position, 0) or position > 624:
        raise ValueError("invalid state")
    if has_gauss not in (0, 1) or not is_number(gauss, -1e9, 1e9):
        raise ValueError("invalid state")
    return values


class SavedRecipe(Section):
    """Hyperparameters of the optimizer, see ``engine.optimizer.Recipe``."""

    name: Literal["sgd", "adamw", "muon"]
    lr: float = positive("learning rate")
    momentum: float = number("momentum, or first beta of AdamW", 0, 1)
    weight_decay: float = number("weight decay")
    warmup_bias_lr: float = number("initial learning rate of biases")
    lr_factors: Factors | None = field(
        "multipliers by module", "null, or a mapping of modules to numbers above 0", default=None
    )
    layer_decay: float | None = fraction("decay by backbone layer", default=None)


class Current(Section):
    """Progress of the current epoch, see ``engine.state.EpochState``."""

    position: int = whole("position of the last batch")
    batches: int = whole("batches trained on")
    images: int = whole("images trained on")
    seconds: float = number("total time")
    waited: float = number("time spent waiting; missing in files of the first versions", default=0.0)
    losses: dict[str, Any] = field("sums of the loss terms", "a mapping of terms to tensors")
    grad_norm: Any = field("norm of the latest gradient; missing in files of the first versions", default=None)


class ClassResult(Section):
    """Metrics of a class."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, float]

    boxes: int = whole("boxes of the class")
    AP: float
    AP50: float


class Result(Section):
    """Metrics of an epoch."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, float]

    epoch: int = whole("from 1", 1)
    AP: float = number("average precision", -1, 1)
    AP50: float = number("average precision at IoU 0.5", -1, 1)
    per_class: dict[str, ClassResult] = field("metrics by class", "a mapping of classes to their numbers")


class Results(Section):
    """Metrics of the best and the last epoch; None before the first one is finished."""

    best: Result | None = field("of the epoch with the best AP", default=None)
    last: Result | None = field("of the last epoch", default=None)


class Row(Section):
    """Row of ``history.csv`` for an epoch; the norm of a gradient that overflowed is infinite."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=True)
    __pydantic_extra__: dict[str, float]

    epoch: int = whole("from 1", 1)
    seconds: float = number("duration")


class Progress(Section):
    """Progress of a run, see ``engine.state.TrainState``."""

    epoch: int = whole("epochs done")
    step: int = whole("batches done")
    best: float = number("best AP", -1, 1)
    best_epoch: int = whole("epoch of the best AP")
    current: Current
    results: Results
    history: Annotated[list[Row], FailFast()] = field(
        "rows of history.csv", "a list of rows of numbers, each with epoch and seconds"
    )


class Optimizer(Section):
    """State of the optimizer."""

    state: dict[Any, Any] = field("state by index of the parameter", "a mapping of parameters to tensors")
    param_groups: list[dict[str, Any]] = field("parameters by group", "a list of groups of parameters")


class Generators(Section):
    """States of the random generators."""

    python: Any
    numpy: Annotated[Any, AfterValidator(_numpy)] = field("state of NumPy's generator", "the state of an MT19937")
    torch: Any
    cuda: Any = None


class SavedState(Section):
    """Contents of ``state.pt``."""

    schema_version: int
    cfg: dict[str, Any] = field("the run's configuration", "a mapping")
    recipe: SavedRecipe
    batches: int = whole("batches per epoch", 1)
    ranks: int = whole("world size", 1, 1_000_000)
    state: Progress
    model: dict[str, Any] = field("weights", "a mapping of names to tensors")
    ema: dict[str, Any] = field("averaged weights", "a mapping of names to tensors")
    ema_updates: int = whole("updates of the average")
    optimizer: Optimizer
    scaler: dict[str, float] = field("state of the fp16 gradient scaler", "a mapping of names to numbers")
    gradients: dict[str, Any] = field("accumulated gradients", "a mapping of names to tensors")
    pending: int = whole("batches accumulated since the last step")
    health: Annotated[list[Any], AfterValidator(_health)] = field(
        "see NonFiniteMonitor", "a list of four counts, and true or false"
    )
    rng: Generators


def first_invalid_value(content: Mapping[str, Any]) -> str:
    """Return a message about the first invalid value; an empty string if there is none.

    Tensors of the model are not checked, as their shapes depend on it.
    """
    if message := first_unsupported_value(content["cfg"]) or validate(SavedState, content)[1]:
        return message
    state = content["state"]
    current = state["current"]
    numbers = current["losses"] | {"grad_norm": current["grad_norm"]} if "grad_norm" in current else current["losses"]
    for name, tensor in numbers.items():
        if not _is_plain(tensor) or tensor.ndim:
            return f"state.current: '{name}' must be a tensor of one number"
    if state["epoch"] and not all(state["results"].get(key) for key in ("best", "last")):
        return f"state.results lacks the metrics, though state.epoch={state['epoch']}"
    if state["best_epoch"] > state["epoch"]:
        return f"state.best_epoch={state['best_epoch']} is after state.epoch={state['epoch']}"
    if current["position"] > content["batches"]:
        return f"state.current.position={current['position']} is beyond the epoch's {content['batches']} batches"
    scaler = {"scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker"}
    if content["scaler"] and set(content["scaler"]) != scaler:
        return f"scaler must be a mapping of {', '.join(sorted(scaler))}"
    return ""


def optimizer_mismatch(content: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> str:
    """Return a message if a saved optimizer state does not match ``optimizer``; an empty string if it does."""
    groups, expected = content["param_groups"], optimizer.state_dict()["param_groups"]
    if [group.get("params") for group in groups] != [group["params"] for group in expected]:
        return "it has other parameter groups"
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    allowed = STATE_NAMES.get(type(optimizer).__name__)
    for index, state in content["state"].items():
        if not is_whole(index, 0) or index >= len(parameters) or not isinstance(state, Mapping):
            return "it has a state for a parameter that does not exist"
        if allowed and set(state) not in allowed:
            return f"its state of a parameter has the keys {', '.join(map(str, state))}"
        for name, value in state.items():
            if isinstance(value, bool):
                continue
            shape = () if name in SCALARS else parameters[index].shape
            if not _is_plain(value) or value.shape != shape:
                found = [*value.shape] if isinstance(value, Tensor) else type(value).__name__
                return f"its '{name}' has shape {found}, not {[*shape]}"
            if not value.is_floating_point() or not value.isfinite().all():
                return f"its '{name}' holds NaN or infinity"
    return ""


def _is_plain(value: Any) -> bool:
    """Whether a value is a plain dense tensor on the CPU."""
    return type(value) is Tensor and value.layout is torch.strided and value.device.type == "cpu"
