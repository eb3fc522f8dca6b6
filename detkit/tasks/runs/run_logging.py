"""Opening the log of a training run, and what is logged at its start."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from hydra.core.hydra_config import HydraConfig
from rich.table import Table

from detkit.config import flatten
from detkit.config.common import TrainConfig
from detkit.data.annotations import Annotations
from detkit.distributed.collectives import world_size
from detkit.distributed.process_group import barrier, is_main_process
from detkit.engine.loggers import open_loggers
from detkit.engine.loggers.base import Value
from detkit.engine.optimizer import Recipe, describe_factors
from detkit.engine.run_log import RunLog
from detkit.engine.state import TrainState
from detkit.engine.step import TrainStep
from detkit.engine.transfer import TransferReport
from detkit.models.summary import summarize, summary_markdown
from detkit.tasks.runs.build_training import Training
from detkit.tasks.runs.data import log_split
from detkit.tasks.runs.resume import log_progress
from detkit.viz.console import make_console
from detkit.viz.data_plots import draw_labels

logger = logging.getLogger(__name__)

SUMMARY_DEPTH = 2  # as configs/summary.yaml
# Hyperparameters: these keys, and those of the groups except the ignored ones.
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
    cfg: TrainConfig,
    step: TrainStep,
    train_set: Annotations,
    run_dir: Path,
    state: TrainState,
) -> RunLog:
    """Open a run's log, on rank 0 with its loggers, and log the configuration, model and labels.

    Raises:
        DetkitError: a logger of a new run cannot be opened.
    """
    if not is_main_process():
        barrier()
        return RunLog(run_dir)
    names = cfg.trainer.loggers
    log = RunLog(run_dir, open_loggers(names, run_dir, state.step, resumed=bool(state.step)))
    texts = {"config": "\n".join(f"    {line}" for line in yaml.safe_dump(cfg.as_dict(), sort_keys=False).splitlines())}
    with log.drawing("the model's summary"):
        texts["model"] = summary_markdown(summarize(step.ema.model, cfg.image_size, SUMMARY_DEPTH))
    values = hyper_parameters(cfg.as_dict(), step.schedule.recipe)
    if HydraConfig.initialized() and not state.step:
        values["augment"] = str(HydraConfig.get().runtime.choices.get("augment"))  # the group has no name key
    log.start(values, texts)
    if not state.step:
        with log.drawing("labels.png"):
            log.plot("labels", draw_labels(train_set), 0)
    barrier()  # long timeout: a logging server may be slow
    return log


def log_start(training: Training, name: str, run_dir: Path) -> None:
    """Log the model, device, data and optimizer, and deviations from the usual training."""
    cfg, step, state = training.cfg, training.step, training.state
    recipe, images, samples = step.schedule.recipe, len(training.train_set), training.train_loader.samples
    parameters = sum(p.numel() for p in step.detector.parameters())
    ranks = f" and {world_size() - 1} more" if world_size() > 1 else ""
    where = f"{step.precision.device}{ranks}, {step.precision}"
    logger.info("%s: %s parameters on %s", name, f"{parameters:,}", where)
    if getattr(step.detector.backbone, "loaded", None):
        logger.info(step.detector.backbone.loaded)
    if samples != images:
        logger.info("an epoch has %d samples because of data.tiles or data.sampling", samples)
    mosaic, epochs = cfg.augment.mosaic, cfg.trainer.epochs
    if mosaic.p and mosaic.close_epochs >= epochs:
        reason = f"augment.mosaic.close_epochs={mosaic.close_epochs}, trainer.epochs={epochs}"
        logger.info("mosaic, mixup and copy-paste are off: %s", reason)
    if training.frozen:
        logger.info("frozen: %s parameters, in %s", f"{training.frozen:,}", ", ".join(cfg.trainer.freeze))
    if recipe.lr_factors or recipe.layer_decay is not None:
        logger.info("trained parameters: %s", describe_factors(step.optimizer))
    log_split("train", training.train_set)
    log_split("val", training.val_set)
    if training.transfer is not None and is_main_process():
        print_transfer(training.transfer)
    logger.info("%s, learning rate %g; writing to %s", recipe.name, recipe.lr, run_dir)
    if state.step:
        log_progress(state, epochs)


def hyper_parameters(cfg: Mapping[str, Any], recipe: Recipe) -> dict[str, Value]:
    """Return the hyperparameters of a run by dotted key, with ``optim.name=auto`` replaced by the choice."""
    chosen = {key: cfg[key] for key in KEYS}
    for group in GROUPS:
        values = {key: value for key, value in cfg[group].items() if key not in IGNORED.get(group, ())}
        chosen |= flatten(values, f"{group}.")
    chosen |= {f"optim.{key}": getattr(recipe, key) for key in ("name", "lr", "momentum", "weight_decay")}
    return {key: value if isinstance(value, Value) else str(value) for key, value in chosen.items()}


def print_transfer(report: TransferReport) -> None:
    """Print the percentage of each part's parameters loaded from a checkpoint, and the total in the last row."""
    table = Table(header_style="bold")
    table.add_column("part")
    for name in ("parameters", "loaded", "mismatched shape", "missing"):
        table.add_column(name, justify="right")
    for row in (*report.rows, report.total):
        percentages = (_percent(count, row.parameters) for count in (row.loaded, row.mismatched, row.missing))
        table.add_row(row.part, f"{row.parameters:,}", *percentages, style="bold" if row is report.total else "")
    logger.info("weights: %s; percentage of each part's parameters that were loaded", report.path)
    make_console().print(table, soft_wrap=False)
    if report.unexpected_keys:
        logger.info("unexpected tensors in the file: %d", report.unexpected_keys)
    for warning in report.warnings:
        logger.warning("warning: %s", warning)


def _percent(count: int, total: int) -> str:
    """Format a percentage with one decimal; 0 and 100 only if exact."""
    if count in (0, total):
        return "-" if not total else f"{100 * count // total} %"
    return f"{min(max(100 * count / total, 0.1), 99.9):.1f} %"
