"""What ``state.pt`` may hold: its values are checked before anything of them is used."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, ConfigDict, FailFast
from torch import Tensor

from detkit.config.check import first_unsupported_value, validate
from detkit.config.fields import field, fraction, is_number, is_whole, number, positive, whole
from detkit.config.schema import Factors, Section

# What an optimizer remembers of a parameter; Muon of kernels and of the others.
MEMORY = {
    "SGD": ({"momentum_buffer"},),
    "AdamW": ({"step", "exp_avg", "exp_avg_sq"},),
    "Muon": ({"use_muon", "momentum_buffer"}, {"use_muon", "step", "exp_avg", "exp_avg_sq"}),
}
SCALARS = ("step",)  # of these; the others have the parameter's shape


def _health(values: list[Any]) -> list[Any]:
    *counts, fine = values
    if len(counts) != 4 or not all(is_whole(count, 0) for count in counts) or not isinstance(fine, bool):
        raise ValueError("no counts")
    return values


def _numpy(values: Any) -> Any:
    """NumPy itself takes positions beyond the end of its 624 numbers, and reads there."""
    name, keys, position, has_gauss, gauss = values
    words = isinstance(keys, list) and len(keys) == 624 and all(is_whole(k, 0) and k < 2**32 for k in keys)
    if name != "MT19937" or not words or not is_whole(position, 0) or position > 624:
        raise ValueError("no state")
    if has_gauss not in (0, 1) or not is_number(gauss, -1e9, 1e9):
        raise ValueError("no state")
    return values


class SavedRecipe(Section):
    """The optimizer's numbers, see ``engine.optim.Recipe``."""

    name: Literal["sgd", "adamw", "muon"]
    lr: float = positive("learning rate")
    momentum: float = number("or AdamW's first beta", 0, 1)
    weight_decay: float = number("of weights")
    warmup_bias_lr: float = number("where the biases start")
    lr_factors: Factors | None = field("by part", "null, or a mapping of parts to numbers above 0", default=None)
    layer_decay: float | None = fraction("of the backbone's layers", default=None)


class Current(Section):
    """The epoch under way, see ``engine.state.EpochState``."""

    position: int = whole("of the last batch")
    batches: int = whole("learned from")
    images: int = whole("learned from")
    seconds: float = number("spent")
    waited: float = number("of these; the first versions did not save it", default=0.0)
    losses: dict[str, Any] = field("sums of the loss terms", "a mapping of terms to tensors")
    grad_norm: Any = field("of the latest gradient; likewise", default=None)


class ClassResult(Section):
    """A class' row of the metrics."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, float]

    boxes: int = whole("of the class")
    AP: float
    AP50: float


class Result(Section):
    """The metrics of an epoch."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, float]

    epoch: int = whole("from 1", 1)
    AP: float = number("average precision", -1, 1)
    AP50: float = number("the same at IoU 0.5", -1, 1)
    per_class: dict[str, ClassResult] = field("the same by class", "a mapping of classes to their numbers")


class Results(Section):
    """Those of the best and the last epoch; neither where none has ended."""

    best: Result | None = field("of the epoch with the best AP", default=None)
    last: Result | None = field("of the last epoch", default=None)


class Row(Section):
    """An epoch's row of ``history.csv``; of a gradient that overflowed the norm is infinite."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=True)
    __pydantic_extra__: dict[str, float]

    epoch: int = whole("from 1", 1)
    seconds: float = number("that it took")


class Progress(Section):
    """Where a run stands, see ``engine.state.TrainState``."""

    epoch: int = whole("epochs done")
    step: int = whole("batches done")
    best: float = number("AP", -1, 1)
    best_epoch: int = whole("when that was")
    current: Current
    results: Results
    history: Annotated[list[Row], FailFast()] = field(
        "rows of history.csv", "a list of rows of numbers, each with epoch and seconds"
    )


class Optimizer(Section):
    """What the optimizer remembers."""

    state: dict[Any, Any] = field("by the parameter's number", "a mapping of parameters to tensors")
    param_groups: list[dict[str, Any]] = field("parameters by group", "a list of groups of parameters")


class Generators(Section):
    """The states of all generators of random numbers."""

    python: Any
    numpy: Annotated[Any, AfterValidator(_numpy)] = field("NumPy's", "the state of an MT19937")
    torch: Any
    cuda: Any = None


class SavedState(Section):
    """The content of ``state.pt``."""

    schema_version: int
    cfg: dict[str, Any] = field("the run's configuration", "a mapping")
    recipe: SavedRecipe
    batches: int = whole("of an epoch", 1)
    ranks: int = whole("that trained together", 1, 1_000_000)
    state: Progress
    model: dict[str, Any] = field("weights", "a mapping of names to tensors")
    ema: dict[str, Any] = field("averaged weights", "a mapping of names to tensors")
    ema_updates: int = whole("of the average")
    optimizer: Optimizer
    scaler: dict[str, float] = field("fp16's scale", "a mapping of names to numbers")
    gradients: dict[str, Any] = field("that wait for the optimizer", "a mapping of names to tensors")
    pending: int = whole("batches whose gradients wait")
    health: Annotated[list[Any], AfterValidator(_health)] = field(
        "see Health", "a list of four counts, and true or false"
    )
    rng: Generators


def first_wrong(content: Mapping[str, Any]) -> str:
    """Return a sentence on the first value that no training saves; an empty string where all is well.

    Tensors are not looked into: their shapes depend on the model.
    """
    if odd := first_unsupported_value(content["cfg"]) or validate(SavedState, content)[1]:
        return odd
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


def wrong_memory(content: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> str:
    """Say what of the saved optimizer does not fit this one; an empty string where all does."""
    groups, own = content["param_groups"], optimizer.state_dict()["param_groups"]
    if [group.get("params") for group in groups] != [group["params"] for group in own]:
        return "it has other groups of parameters"
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    forms = MEMORY.get(type(optimizer).__name__)
    for number_, memory in content["state"].items():
        if not is_whole(number_, 0) or number_ >= len(parameters) or not isinstance(memory, Mapping):
            return "it remembers something of a parameter that there is not"
        if forms and set(memory) not in forms:
            return f"of a parameter it remembers {', '.join(map(str, memory))}"
        for name, value in memory.items():
            if isinstance(value, bool):
                continue
            shape = () if name in SCALARS else parameters[number_].shape
            if not _is_plain(value) or value.shape != shape:
                found = [*value.shape] if isinstance(value, Tensor) else type(value).__name__
                return f"its '{name}' is of shape {found}, not {[*shape]}"
            if not value.is_floating_point() or not value.isfinite().all():
                return f"its '{name}' holds numbers that are not finite"
    return ""


def _is_plain(value: Any) -> bool:
    """Whether a value is a tensor as training has them, in memory and dense."""
    return type(value) is Tensor and value.layout is torch.strided and value.device.type == "cpu"
