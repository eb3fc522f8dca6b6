"""Evaluate a checkpoint."""

import json
from pathlib import Path
from typing import Any

from rich.console import Console

from detkit.engine.checkpoint import build_from_checkpoint, write_atomically
from detkit.engine.evaluator import evaluate
from detkit.engine.precision import Precision, pick_device
from detkit.errors import DetkitError
from detkit.report.tables import print_metrics
from detkit.tasks.common import check_at_least, check_image_size, make_run_dir, read_split, val_loader


def run(cfg: dict[str, Any]) -> dict[str, Any]:
    """Evaluate ``cfg["ckpt"]`` on the set it was trained with, or on ``data=...``; return the metrics.

    Writes ``metrics.json`` and ``predictions.json`` (COCO results) into the run directory.

    Raises:
        DetkitError: an unreadable checkpoint, or a set with other classes.
    """
    console = Console()
    check_at_least(cfg, "batch_size", 1)
    device = pick_device(cfg["device"])
    detector = build_from_checkpoint(cfg["ckpt"]).to(device)
    cfg["image_size"] = cfg["image_size"] or detector.cfg["image_size"]
    check_image_size(cfg["image_size"], detector.max_stride)
    annotations = read_split(cfg.get("data") or detector.cfg["data"], cfg["split"])
    if annotations.class_names != detector.class_names:
        ours, theirs = ", ".join(detector.class_names), ", ".join(annotations.class_names)
        raise DetkitError(f"{cfg['ckpt']} knows the classes {ours}; {annotations.source} has {theirs}")

    loader = val_loader(annotations, cfg, device)
    precision = Precision.pick(cfg["amp"], device)
    thresholds = {key: cfg[key] for key in ("score", "iou", "max_det")}
    with precision.autocast():
        result = evaluate(detector, loader.epoch(0), annotations, **thresholds)
    run_dir = make_run_dir(cfg, "eval", Path(cfg["ckpt"]).stem)
    write_atomically(run_dir / "metrics.json", json.dumps(result.metrics, indent=2).encode())
    write_atomically(run_dir / "predictions.json", json.dumps(result.predictions).encode())
    print_metrics(result.metrics, console)
    console.print(f"AP {result.metrics['AP']:.6f} on {len(annotations)} images; written to {run_dir}", highlight=False)
    return result.metrics
