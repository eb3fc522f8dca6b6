"""Measure a training step, prediction, data loading or memory: ``detkit benchmark task=train model=yolov8n``."""

from typing import Any

from detkit.benchmarks import akconv, data, infer, reversible, train_step
from detkit.benchmarks.common import BenchmarkConfig
from detkit.errors import DetkitError

TASKS = {
    "train": train_step.run,
    "infer": infer.run,
    "reversible": reversible.run,
    "akconv": akconv.run,
    "data": data.run,
}


def run(cfg: BenchmarkConfig) -> dict[str, Any]:
    """Run the benchmark ``task``, which prints a table and one line of JSON; return the latter's content.

    Raises:
        DetkitError: the benchmark does not exist.
    """
    if cfg.task not in TASKS:
        raise DetkitError(f"task={cfg.task} is unknown: use {', '.join(TASKS)}")
    return TASKS[cfg.task](cfg)
