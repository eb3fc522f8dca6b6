"""Where one watches a training: its log, and what that tells at the start."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from hydra.core.hydra_config import HydraConfig
from rich.console import Console
from rich.table import Table

from detkit.config import flatten
from detkit.data.annotations import Annotations
from detkit.distributed.process_group import barrier, is_main_process
from detkit.engine.loggers import open_loggers
from detkit.engine.loggers.base import Value
from detkit.engine.optimizer import Recipe
from detkit.engine.run_log import RunLog
from detkit.engine.state import TrainState
from detkit.engine.step import TrainStep
from detkit.engine.transfer import TransferReport
from detkit.models.summary import summarize, summary_markdown
from detkit.viz.data_plots import draw_labels

SUMMARY_DEPTH = 2  # as configs/summary.yaml
# What of a configuration changes what is learnt, or from what; of a group, all but what is ignored.
KEYS = ("image_size", "batch_size", "amp", "seed", "weights")
GROUPS = ("model", "backbone", "neck", "head", "loss", "data", "optim", "augment", "trainer")
IGNORED = {
    "trainer": (
        "rank_timeout",
        "loader_timeout",
        "max_nonfinite_steps",
        "save_every",
        "keep_last",
        "log_every",
        "loggers",
    ),
    "data": ("root", "yaml", "preset", "strict", "cache"),
}


def open_log(
    cfg: Mapping[str, Any],
    step: TrainStep,
    train_set: Annotations,
    run_dir: Path,
    state: TrainState,
    console: Console,
) -> RunLog:
    """Open a run's log, on rank 0 with its loggers, and say there what is trained.

    Raises:
        DetkitError: a logger of a new run does not open.
    """
    if not is_main_process():
        barrier()
        return RunLog(run_dir, console)
    names = cfg["trainer"]["loggers"]
    channels = open_loggers(names, run_dir, state.step, console.print, resumed=bool(state.step))
    log = RunLog(run_dir, console, channels)
    texts = {"config": "\n".join(f"    {line}" for line in yaml.safe_dump(cfg, sort_keys=False).splitlines())}
    with log.drawing("the model's summary"):
        texts["model"] = summary_markdown(summarize(step.ema.model, cfg["image_size"], SUMMARY_DEPTH))
    values = hyper_parameters(cfg, step.schedule.recipe)
    if HydraConfig.initialized() and not state.step:
        values["augment"] = str(HydraConfig.get().runtime.choices.get("augment"))  # a group without a name in it
    log.start(values, texts)
    if not state.step:
        with log.drawing("labels.png"):
            log.plot("labels", draw_labels(train_set), 0)
    barrier()  # with patience: a server may be slow to answer
    return log


def hyper_parameters(cfg: Mapping[str, Any], recipe: Recipe) -> dict[str, Value]:
    """Return what a run is compared by: the dotted keys of its configuration, ``optim.name=auto`` decided."""
    chosen = {key: cfg[key] for key in KEYS}
    for group in GROUPS:
        kept = {key: value for key, value in cfg[group].items() if key not in IGNORED.get(group, ())}
        chosen |= flatten(kept, f"{group}.")
    chosen |= {f"optim.{key}": getattr(recipe, key) for key in ("name", "lr", "momentum", "weight_decay")}
    return {key: value if isinstance(value, Value) else str(value) for key, value in chosen.items()}


def print_transfer(report: TransferReport, console: Console) -> None:
    """Print what of a detector came from a checkpoint, in percent of each part's numbers; the whole in the last row."""
    table = Table(header_style="bold")
    table.add_column("part")
    for name in ("parameters", "loaded", "mismatched shape", "missing"):
        table.add_column(name, justify="right")
    for row in (*report.rows, report.total):
        shares = (_percent(count, row.parameters) for count in (row.loaded, row.mismatched, row.missing))
        table.add_row(row.part, f"{row.parameters:,}", *shares, style="bold" if row is report.total else "")
    console.print(f"weights: {report.path}; what of the model comes from it, in percent of the parameters' numbers")
    console.print(table, soft_wrap=False)
    if report.unexpected_keys:
        console.print(f"tensors of the file without a place in this model: {report.unexpected_keys}")
    for warning in report.warnings:
        console.print(f"mind: {warning}")


def _percent(count: int, whole: int) -> str:
    """One decimal; 0 and 100 only where that is exact."""
    if count in (0, whole):
        return "-" if not whole else f"{100 * count // whole} %"
    return f"{min(max(100 * count / whole, 0.1), 99.9):.1f} %"
