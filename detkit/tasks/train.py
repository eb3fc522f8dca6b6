"""Train a detector."""

import math
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from detkit.data.augment import AugmentedDataset
from detkit.data.dataset import DetectionDataset
from detkit.data.loader import BatchLoader, worker_count
from detkit.engine.checkpoint import load_weights
from detkit.engine.logging import RunLog
from detkit.engine.optim import Recipe
from detkit.engine.precision import Precision, keep_freed_memory, pick_device, seed_everything
from detkit.engine.trainer import Trainer
from detkit.errors import DetkitError
from detkit.models.detector import build_detector
from detkit.registry import LOSSES
from detkit.report.tables import print_metrics
from detkit.tasks.common import check_at_least, check_image_size, make_run_dir, read_split, val_loader


def run(cfg: dict[str, Any]) -> dict[str, Any]:
    """Train what ``cfg`` (configs/train.yaml, resolved) describes; return the best and the last metrics.

    Raises:
        DetkitError: a user's mistake, found before the first step where that is possible.
    """
    console = Console()
    for key, least in (("batch_size", 1), ("trainer.epochs", 1)):
        check_at_least(cfg, key, least)
    device = pick_device(cfg["device"])
    precision = Precision.pick(cfg["amp"], device)
    seed_everything(cfg["seed"])
    if device.type == "cpu":
        keep_freed_memory()

    if cfg["data"].get("root"):
        cfg["data"]["root"] = str(Path(cfg["data"]["root"]).resolve())  # so that a checkpoint finds it from anywhere
    train_set, val_set = read_split(cfg["data"], "train"), read_split(cfg["data"], "val")
    if train_set.class_names != val_set.class_names:
        raise DetkitError(
            f"{val_set.source} has other classes than {train_set.source}: give both the same 'categories'"
        )

    detector = build_detector(cfg, train_set.class_names).to(device)
    check_image_size(cfg["image_size"], detector.max_stride)
    loss = LOSSES.build(cfg["loss"])
    steps = math.ceil(len(train_set) / max(cfg["batch_size"], cfg["optim"]["nominal_batch"])) * cfg["trainer"]["epochs"]
    recipe = Recipe.pick(
        cfg["optim"], batch_size=cfg["batch_size"], total_steps=steps, num_classes=len(train_set.class_names)
    )
    kept = load_weights(detector, cfg["weights"]) if cfg["weights"] else []
    dataset = AugmentedDataset(
        DetectionDataset(train_set), cfg["image_size"], cfg["augment"], cfg["seed"], cfg["trainer"]["epochs"]
    )
    train_loader = BatchLoader(
        dataset,
        cfg["batch_size"],
        workers=worker_count(cfg["workers"]),
        seed=cfg["seed"],
        shuffle=True,
        pin=device.type == "cuda",
    )

    run_dir = make_run_dir(cfg, "train", f"{cfg['model']['name']}_{cfg['data']['name']}")
    (run_dir / "config.yaml").write_text(yaml.safe_dump(cfg, sort_keys=False))
    parameters = sum(p.numel() for p in detector.parameters())
    console.print(f"{cfg['model']['name']}: {parameters:,} parameters on {device}, {precision}", highlight=False)
    for name, annotations in (("train", train_set), ("val", val_set)):
        left_out = f", {annotations.left_out} boxes without area left out" if annotations.left_out else ""
        console.print(f"{name}: {len(annotations)} images, {len(annotations.labels)} boxes{left_out}", highlight=False)
    if cfg["weights"]:
        console.print(f"weights: {cfg['weights']}; {len(kept)} tensors do not fit and start afresh", highlight=False)
    console.print(f"{recipe.name}, learning rate {recipe.lr:g}; writing to {run_dir}", highlight=False, soft_wrap=True)

    log = RunLog(run_dir, console)
    trainer = Trainer(
        detector, loss, train_loader, val_loader(val_set, cfg, device), val_set, recipe, cfg, precision, run_dir, log
    )
    results = trainer.fit()
    log.close()
    print_metrics(results["best"], console)
    best = results["best"]
    console.print(f"best epoch {best['epoch']}: AP {best['AP']:.4f}, AP50 {best['AP50']:.4f}", highlight=False)
    console.print(f"weights, metrics and pictures: {run_dir}", highlight=False, soft_wrap=True)
    return results
