"""Measure a training step, or a claim of detkit's: ``detkit benchmark task=train model=yolov8n``."""

from typing import Any

from detkit.benchmarks import akconv, data, reversible, train_step
from detkit.benchmarks.common import BenchmarkConfig
from detkit.errors import DetkitError

TASKS = {"train": train_step.run, "reversible": reversible.run, "akconv": akconv.run, "data": data.run}


def run(cfg: BenchmarkConfig) -> dict[str, Any]:
    """Run the benchmark called ``task``: it prints a table and ends with one line of JSON, which is returned, too.

    Raises:
        DetkitError: there is no such benchmark.
    """
    if cfg.task not in TASKS:
        raise DetkitError(f"task={cfg.task} is unknown: use {', '.join(TASKS)}")
    return TASKS[cfg.task](cfg)
