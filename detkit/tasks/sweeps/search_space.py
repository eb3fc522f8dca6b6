"""The search space of ``tune``: keys of the training configuration and the values to try."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from detkit.config import check_values, compose_config, is_number, resolve
from detkit.errors import DetkitError, shorten
from detkit.tasks.runs.run_dir import numbered_name

if TYPE_CHECKING:
    from optuna import Trial
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    Distribution = CategoricalDistribution | FloatDistribution | IntDistribution

TUNING = ("search", "trials", "pruner", "storage")  # keys of tune.yaml that train.yaml lacks
FORM = "a list of choices, or {low: A, high: B}, optionally with log: true or step: N"


def read_space(search: Any) -> dict[str, "Distribution"]:
    """Return Optuna's distribution for every key of ``search``.

    Raises:
        DetkitError: it is not a mapping of keys to ranges or choices.
    """
    if not isinstance(search, Mapping) or not search:
        raise DetkitError("search must be a mapping of keys to values, such as {optim.lr: {low: 1e-4, high: 1e-2}}")
    for key in search:
        if str(key).partition(".")[0] in (*TUNING, "run_dir", "resume"):
            raise DetkitError(f"search: {shorten(str(key))} cannot be searched")
    return {str(key): _distribution(shorten(str(key)), values) for key, values in search.items()}


def check_space(space: Mapping[str, "Distribution"], typed: Sequence[str]) -> None:
    """Validate the training configuration with every choice, and with both ends of every range.

    Raises:
        DetkitError: an unknown key or an invalid value.
    """
    from optuna.distributions import CategoricalDistribution

    for key, values in space.items():
        for value in values.choices if isinstance(values, CategoricalDistribution) else (values.low, values.high):
            check_values(trial_config(typed, {key: value}))


def trial_config(typed: Sequence[str], chosen: Mapping[str, Any]) -> dict[str, Any]:
    """Return the training configuration with the command line's overrides and the ``chosen`` values.

    Raises:
        DetkitError: an unknown key or option.
    """
    cfg = resolve(compose_config("tune", [*typed, *as_overrides(chosen)]))
    return {key: value for key, value in cfg.items() if key not in TUNING}


def suggest(trial: "Trial", space: Mapping[str, "Distribution"]) -> dict[str, Any]:
    """Return a value for every key: those that the trial already has, or new ones from the sampler."""
    from optuna.distributions import CategoricalDistribution, IntDistribution

    chosen: dict[str, Any] = {}
    for key, values in space.items():
        if isinstance(values, CategoricalDistribution):
            chosen[key] = trial.suggest_categorical(key, values.choices)
        elif isinstance(values, IntDistribution):
            chosen[key] = trial.suggest_int(key, values.low, values.high, step=values.step, log=values.log)
        else:
            chosen[key] = trial.suggest_float(key, values.low, values.high, step=values.step, log=values.log)
    return chosen


def as_overrides(chosen: Mapping[str, Any]) -> list[str]:
    """Return the overrides ``key=value``."""
    return [f"{key}={_text(value)}" for key, value in chosen.items()]


def folder_name(number: int, chosen: Mapping[str, Any]) -> str:
    """Return the name of a trial's folder, such as ``7_optim.lr-0.00123_augment-light``."""
    values = {key: f"{value:.3g}" if isinstance(value, float) else value for key, value in chosen.items()}
    return numbered_name(number, as_overrides(values))


def _distribution(key: str, values: Any) -> "Distribution":
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(values, Sequence) and not isinstance(values, str) and values:
        return CategoricalDistribution(
            [v if v is None or isinstance(v, str | int | float) else _text(v) for v in values]
        )
    if not isinstance(values, Mapping) or not {"low", "high"} <= set(values) <= {"low", "high", "log", "step"}:
        raise DetkitError(f"search: {key} must be {FORM}")
    low, high, log, step = values["low"], values["high"], values.get("log"), values.get("step")
    numbers = all(is_number(v, float("-inf")) for v in (low, high)) and (step is None or is_number(step, 0))
    if not numbers or log not in (None, True, False):
        raise DetkitError(f"search: {key} must be {FORM}")
    try:
        if isinstance(low, int) and isinstance(high, int) and isinstance(step or 1, int):
            return IntDistribution(low, high, log=bool(log), step=1 if step is None else step)
        return FloatDistribution(float(low), float(high), log=bool(log), step=step)
    except (ValueError, OverflowError) as error:
        raise DetkitError(f"search: {key}: {shorten(str(error).splitlines()[0])}") from None


def _text(value: Any) -> str:
    """Format a value in Hydra's syntax."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{_text(item)}" for key, item in value.items()) + "}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "[" + ",".join(map(_text, value)) + "]"
    return str(value)
