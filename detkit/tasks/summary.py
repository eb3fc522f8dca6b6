"""Show what a composition is made of."""

from typing import Any

import torch

from detkit.engine.precision import pick_device
from detkit.models.detector import Detector, build_detector
from detkit.report.console import make_console
from detkit.report.summary import Row, print_summary, summarize
from detkit.tasks.common import model_name


def run(cfg: dict[str, Any]) -> list[Row]:
    """Print and return the modules of what ``cfg`` (configs/summary.yaml, resolved) composes.

    Nothing is computed: a detector of shapes alone (torch's meta device) runs, unless a part of it needs values.

    Raises:
        DetkitError: parts that do not fit.
    """
    try:
        rows = _summarize(cfg, torch.device("meta"))
    except (NotImplementedError, RuntimeError):  # a part that looks at values
        rows = _summarize(cfg, pick_device(cfg["device"]))
    console = make_console()
    print_summary(rows, console)
    size = cfg["image_size"]
    console.print(f"{model_name(cfg)}: one image of {size}x{size} pixels, {cfg['num_classes']} classes.")
    return rows


def _summarize(cfg: dict[str, Any], device: torch.device) -> list[Row]:
    with device:
        detector: Detector = build_detector(cfg, [str(k) for k in range(cfg["num_classes"])]).to(device)
    return summarize(detector, cfg["image_size"], cfg["depth"])
