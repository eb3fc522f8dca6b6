"""Compute the COCO metrics of a checkpoint: ``detkit eval ckpt=FILE``."""

import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from detkit.config.common import Amp, BatchSize, ImageSize, ViewsConfig, batch_size_field, image_size_field
from detkit.config.fields import Location, field, location, number, whole
from detkit.config.schema import DataConfig
from detkit.data.annotations import Annotations
from detkit.data.loader import reader_threads
from detkit.data.read import explain_empty, read_split
from detkit.distributed.collectives import world_size
from detkit.distributed.process_group import init_distributed, is_main_process, main_process_first, run_on_main
from detkit.engine.auto_batch import check_batch
from detkit.engine.checkpoint import build_from_checkpoint
from detkit.engine.evaluator import Evaluation, evaluate, evaluate_views
from detkit.errors import DetkitError, error_context, shorten
from detkit.export.formats import find_format
from detkit.export.model import ExportedModel
from detkit.export.runtime import load_model
from detkit.inference.model import FixedShape, Model
from detkit.inference.predictor import make_predictor
from detkit.ops.atomic_write import write_atomically
from detkit.ops.nms import Thresholds
from detkit.ops.precision import seed_everything
from detkit.tasks.runs.data import check_batch_memory, log_split, val_loader
from detkit.tasks.runs.run_dir import checkpoint_name, make_run_dir
from detkit.viz.console import make_console
from detkit.viz.plots import draw_evaluation, save_figure
from detkit.viz.progress import show_progress
from detkit.viz.tables import print_metrics

logger = logging.getLogger(__name__)

RANK_TIMEOUT = 60  # seconds to wait for the other ranks to start


class EvalConfig(ViewsConfig):
    """Keys of ``configs/eval.yaml``."""

    data: DataConfig = field("data set; by default the one the checkpoint was trained with", default=None)
    ckpt: Location = location("checkpoint, or exported file, to load")
    split: str = field("split to evaluate", "the name of a split", min_length=1, max_length=200)
    image_size: ImageSize | None = image_size_field()
    batch_size: BatchSize = batch_size_field()
    rect: bool = field("evaluate each image in the smallest frame that holds it instead of a square")
    amp: Amp | None = field("precision of the forward pass; null uses that of the training run")
    score: float = number("minimum score of a detection", 0, 1)
    iou: float = number("IoU threshold of non-maximum suppression", 0, 1)
    max_det: int = whole("maximum number of detections per image", 1, 100_000)


def run(cfg: EvalConfig) -> dict[str, Any]:
    """Evaluate ``cfg.ckpt`` on its own data set, or on ``data=...``; return the metrics.

    Writes ``metrics.json``, ``predictions.json`` (COCO results) and ``plots/*.png`` to the run directory. The images
    are divided among the ranks.

    Raises:
        DetkitError: the checkpoint cannot be read, or the data set has other classes.
    """
    device = init_distributed(cfg.device, RANK_TIMEOUT)
    seed_everything(cfg.seed)
    model = _load_model(cfg, device)
    image_size = cfg.image_size or model.image_size
    _check_shape(cfg, image_size, model.fixed_shape)
    check_batch(cfg.batch_size, image_size, device)
    data = cfg.data.as_dict() if cfg.data else model.cfg.get("data")
    if data is None:
        raise DetkitError(f"{cfg.ckpt} does not name its data set: add data=coco data.root=DIR")
    with main_process_first(), error_context(None if cfg.data else cfg.ckpt):  # the main process writes the index
        annotations = read_split(data, cfg.split)
    if not len(annotations.labels) and not data.get("allow_empty"):
        hint = "to detect objects in its images, run predict with source=FOLDER"
        raise DetkitError(f"split={cfg.split} has no boxes to compare with: {explain_empty(annotations)}; {hint}")
    if annotations.class_names != model.class_names:
        expected, found = (shorten(", ".join(names)) for names in (model.class_names, annotations.class_names))
        raise DetkitError(f"{cfg.ckpt} was trained with the classes {expected}; {annotations.source} has {found}")
    log_split(cfg.split, annotations)
    run_dir = Path(run_on_main(lambda: str(make_run_dir(cfg, "eval", checkpoint_name(cfg.ckpt)))))

    result = _evaluate(cfg, model, annotations, image_size)
    try:
        if is_main_process():
            assert result.curves is not None  # on rank 0
            write_atomically(run_dir / "metrics.json", json.dumps(result.metrics, indent=2).encode())
            write_atomically(run_dir / "predictions.json", json.dumps(result.predictions).encode())
            for name, figure in draw_evaluation(result.curves, result.predictions, annotations, cfg.score).items():
                save_figure(figure, run_dir / "plots" / f"{name}.png")
    finally:
        for message in result.issues:
            logger.warning("skipped, its boxes count as missed: %s", message)
        if is_main_process():
            print_metrics(result.metrics, make_console())
    logger.info("AP %.6f on %d images; results are in %s", result.metrics["AP"], len(annotations), run_dir)
    return result.metrics


def _evaluate(cfg: EvalConfig, model: Model, annotations: Annotations, image_size: int) -> Evaluation:
    """Evaluate a model on letterboxed batches, or with tiles or test-time augmentation as ``predict`` does."""
    thresholds = _thresholds(cfg, model)
    if cfg.tiles is not None or cfg.tta:
        predictor = make_predictor(
            model,
            cfg.score,
            cfg.iou,
            cfg.max_det,
            image_size=image_size,
            multi_label=thresholds.multi_label,
            batch_size=cfg.batch_size,
            rect=cfg.rect,
            tiles=cfg.tiles,
            overlap=cfg.overlap,
            tta=cfg.tta,
            merge=cfg.merge,
            threads=reader_threads(cfg.workers),
        )
        with show_progress("evaluation", len(annotations) // world_size()) as bar:
            return evaluate_views(predictor, annotations, bar.advance)
    check_batch_memory(cfg.batch_size, image_size, cfg.workers)
    loader = val_loader(annotations, cfg.batch_size, image_size, model.device, rect=cfg.rect, workers=cfg.workers)
    with show_progress("evaluation", len(loader)) as bar:
        return evaluate(model, loader.epoch(0), annotations, thresholds, bar.advance)


def _thresholds(cfg: EvalConfig, model: Model) -> Thresholds:
    """Return the thresholds of the keys; a file with non-maximum suppression inside has limits of its own."""
    thresholds = Thresholds(cfg.score, cfg.iou, cfg.max_det, multi_label=True)
    if isinstance(model, ExportedModel) and model.has_nms:
        thresholds = replace(thresholds, score=max(cfg.score, model.metadata.score), multi_label=False)
        logger.warning(
            "%s has non-maximum suppression inside: only boxes of one class above score %g count, so that AP is lower "
            "than the checkpoint's; with nms=false they are the same",
            cfg.ckpt,
            thresholds.score,
        )
    return thresholds


def _load_model(cfg: EvalConfig, device: torch.device) -> Model:
    """Load the checkpoint, in the precision of its training unless ``amp`` is given, or an exported file."""
    path = Path(str(cfg.ckpt))
    if find_format(path) is not None:
        return load_model(path, device, cfg.amp or "auto")
    detector = build_from_checkpoint(path).to(device)
    return detector.as_model(cfg.amp or _training_amp(detector.cfg, device))


def _check_shape(cfg: EvalConfig, image_size: int, fixed: FixedShape) -> None:
    """Check that a file whose input does not vary in size takes what is evaluated."""
    if fixed[1:] != (None, None) and (cfg.rect or fixed[1:] != (image_size, image_size)):
        raise DetkitError(f"{cfg.ckpt} only takes {fixed[1]}x{fixed[2]} pixels: use image_size={fixed[1]} rect=false")


def _training_amp(cfg: Mapping[str, Any], device: torch.device) -> str:
    """Return the ``amp`` of a checkpoint's training run; for imported checkpoints ``off``."""
    amp = str(cfg.get("amp", "off"))
    return "auto" if amp == "fp16" and device.type == "cpu" else amp
