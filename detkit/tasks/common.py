"""What the tasks share: run directories and loaders."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import OmegaConf

import detkit.data  # noqa: F401  (registers the formats)
from detkit.data.annotations import Annotations
from detkit.data.dataset import DetectionDataset, LetterboxDataset
from detkit.data.loader import BatchLoader, worker_count
from detkit.errors import DetkitError
from detkit.registry import DATASETS


def make_run_dir(cfg: Mapping[str, Any], task: str, name: str) -> Path:
    """Create and return the run directory: ``run_dir``, or a new one under ``runs/TASK`` named after the run.

    Raises:
        DetkitError: ``run_dir`` holds files already; nothing is overwritten.
    """
    if cfg["run_dir"]:
        path = Path(cfg["run_dir"])
        if path.is_dir() and any(path.iterdir()):
            raise DetkitError(f"run_dir={path} is not empty: name another folder, or remove it")
    else:
        path = Path("runs") / task / f"{name}_{time.strftime('%Y%m%d-%H%M%S')}"
        if HydraConfig.initialized() and HydraConfig.get().mode is RunMode.MULTIRUN:
            job = HydraConfig.get().job
            choices = job.override_dirname.translate(str.maketrans("=,/ ", "-_--"))
            path = Path(HydraConfig.get().sweep.dir) / f"{job.num}_{choices}"
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DetkitError(f"cannot create run_dir={path}: {error.strerror}") from None
    return path


def read_split(data: Mapping[str, Any], split: str) -> Annotations:
    """Read one split of the configured data set."""
    return DATASETS.build({key: value for key, value in data.items() if key != "preset"}, split)


def val_loader(annotations: Annotations, cfg: Mapping[str, Any], device: torch.device) -> BatchLoader:
    """Return the letterboxed set in order, as the evaluation wants it."""
    dataset = LetterboxDataset(DetectionDataset(annotations), cfg["image_size"])
    workers = worker_count(cfg["workers"])
    return BatchLoader(dataset, cfg["batch_size"], workers=workers, pin=device.type == "cuda")


def check_image_size(size: Any, stride: int) -> None:
    """Check the ``image_size`` key against the detector's largest stride."""
    if not isinstance(size, int) or size <= 0 or size % stride:
        below = max(int(size) // stride, 1) * stride if isinstance(size, (int, float)) else 640
        raise DetkitError(
            f"image_size={size} must be a multiple of {stride} pixels, such as {below} or {below + stride}"
        )


def check_at_least(cfg: Mapping[str, Any], key: str, least: int) -> None:
    """Check that the whole number under a dotted ``key`` is not smaller than ``least``."""
    value = OmegaConf.select(OmegaConf.create(dict(cfg)), key)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise DetkitError(f"{key}={value} must be a whole number, {least} or more")
