"""Build what a run trains: data, detector, training step and their state."""

import logging
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from detkit.config.common import TrainConfig
from detkit.data.annotations import Annotations
from detkit.data.augment.pipeline import Augmentation, AugmentedDataset, mosaic_window
from detkit.data.dataset import DetectionDataset
from detkit.data.loader import BatchLoader, worker_count
from detkit.data.read import read_training
from detkit.data.sampling import expected_draws
from detkit.data.shard_loader import ShardLoader
from detkit.data.tiles import TiledDataset
from detkit.distributed.collectives import world_size
from detkit.distributed.process_group import main_process_first, per_rank_batch_size, rank, run_on_main
from detkit.distributed.sync_batch_norm import convert_sync_batchnorm
from detkit.engine.auto_batch import COPIES_TRAINED, check_batch, choose_batch_size, make_trial_step
from detkit.engine.compile import compile_network
from detkit.engine.optimizer import Recipe, Schedule, accumulation
from detkit.engine.param_groups import freeze
from detkit.engine.state import TrainState, load_training_state, saved_recipe
from detkit.engine.step import TrainStep
from detkit.engine.transfer import TransferReport, load_weights
from detkit.errors import DetkitError
from detkit.models.detector import Detector, build_detector, build_loss, without_pretrained
from detkit.ops.precision import Precision, seed_everything, tune_malloc
from detkit.tasks.runs.data import check_batch_memory
from detkit.tasks.runs.resume import RunPlan

logger = logging.getLogger(__name__)


@dataclass
class Training:
    """Everything needed to start or resume training.

    Attributes:
        cfg: resolved; ``auto`` values that depend on the data or the device are replaced.
        batch_size: images per forward pass, over all ranks, as in ``cfg``.
        step: the training step, which holds the detector.
        state: the training progress.
        train_set: annotations of the training split.
        val_set: annotations of the validation split.
        train_loader: loader of augmented training batches.
        trial_step: runs a batch of the given size on the device; see ``make_trial_step``.
        frozen: number of parameters that are not trained.
        transfer: report on the loaded ``weights``; None without them.
    """

    cfg: TrainConfig
    batch_size: int
    step: TrainStep
    state: TrainState
    train_set: Annotations
    val_set: Annotations
    train_loader: BatchLoader | ShardLoader
    trial_step: Callable[[int], None]
    frozen: int
    transfer: TransferReport | None


def build_training(plan: RunPlan, device: torch.device) -> Training:
    """Read the data and build the detector, the training step and their state, new or as saved.

    Raises:
        DetkitError: a user error.
    """
    cfg, saved = _absolute_paths(plan.cfg), plan.saved
    if cfg.batch_size != "auto":
        per_rank_batch_size(cfg.batch_size)
        check_batch(cfg.batch_size, cfg.image_size, device)
    precision = Precision.from_config(cfg.amp, device)
    seed_everything(cfg.seed)
    if device.type == "cpu":
        tune_malloc()
    with main_process_first():  # which writes an index, or draws the embedded set
        train_set, val_set = read_training(cfg.data.as_dict())

    values = cfg.as_dict()
    built_as, copies = without_pretrained(values) if saved else values, COPIES_TRAINED if device.type == "cpu" else 1
    detector = build_detector(built_as, train_set.class_names, copies).to(device)
    transfer = load_weights(detector, str(cfg.weights)) if cfg.weights is not None and not saved else None
    frozen = freeze(detector, cfg.trainer.freeze)
    trial_step = make_trial_step(detector, build_loss(values, detector.head), precision, _largest_image(detector, cfg))
    batch_size = _auto_batch_size(trial_step, device) if cfg.batch_size == "auto" else cfg.batch_size
    cfg = cfg.replace(batch_size=batch_size)
    detector.cfg = cfg.as_dict()
    check_batch_memory(batch_size, cfg.image_size, cfg.workers)
    loader = _train_loader(train_set, cfg, batch_size, device)
    if cfg.trainer.sync_bn and world_size() > 1:
        convert_sync_batchnorm(detector)
    recipe = saved_recipe(saved) if saved else _recipe(detector, cfg, batch_size, loader.samples)
    step = _train_step(detector, cfg, batch_size, precision, recipe, len(loader))
    state = load_training_state(saved, step, len(loader)) if saved else TrainState()
    if saved and state.current.position and isinstance(loader, ShardLoader):
        _check_shard_division(cfg, saved)
    if rank():
        torch.manual_seed(cfg.seed + rank() + state.step)  # after weight initialization: dropout differs between ranks
    return Training(cfg, batch_size, step, state, train_set, val_set, loader, trial_step, frozen, transfer)


def _absolute_paths(cfg: TrainConfig) -> TrainConfig:
    """Return the configuration with the number of workers and absolute data paths, as stored in checkpoints."""
    given = {key: getattr(cfg.data, key) for key in ("root", "yaml")}
    paths = {
        key: os.path.realpath(str(path)) for key, path in given.items() if path is not None
    }  # unlike Path.resolve, does not raise on a link loop
    return cfg.replace(workers=worker_count(cfg.workers), data=cfg.data.replace(**paths))


def _auto_batch_size(trial_step: Callable[[int], None], device: torch.device) -> int:
    """Return and log the batch size chosen for ``batch_size=auto``."""
    per_rank: int = run_on_main(lambda: choose_batch_size(trial_step, device))
    batch_size = per_rank * world_size()
    logger.info("batch_size=auto: %d images", batch_size)
    return batch_size


def _check_shard_division(cfg: TrainConfig, saved: dict[str, Any]) -> None:
    """Check that tar shards are divided among as many processes as at the start of the interrupted epoch.

    Raises:
        DetkitError: they are not, so that images would be repeated or missed.
    """
    now, then = (cfg.workers, world_size()), (saved["cfg"].get("workers"), saved["ranks"])
    if now != then:
        raise DetkitError(
            f"workers={now[0]} with {now[1]} ranks: within an epoch of tar shards, resume with workers={then[0]} and "
            f"{then[1]} ranks"
        )


def _largest_image(detector: Detector, cfg: TrainConfig) -> int:
    """Return the largest side of a training batch in pixels."""
    stride = detector.max_stride
    return max(int(cfg.image_size * (1 + cfg.trainer.multi_scale) / stride), 1) * stride


def _train_loader(
    annotations: Annotations, cfg: TrainConfig, batch_size: int, device: torch.device
) -> BatchLoader | ShardLoader:
    """Return a loader of augmented samples, shuffled every epoch, with the tiling and sampling of ``data``.

    Tar shards are read sequentially, unless an option needs random access to images.
    """
    data, epochs = cfg.data, cfg.trainer.epochs
    full = DetectionDataset(annotations, cfg.image_size, data.cache)
    images: DetectionDataset | TiledDataset = full
    if data.tiles and data.tiles.size is not None:
        images = TiledDataset(full, **data.tiles.as_dict())
    expected = expected_draws(images, data.as_dict())
    options: dict[str, Any] = {"workers": worker_count(cfg.workers), "seed": cfg.seed, "pin": device.type == "cuda"}
    options["timeout"] = cfg.trainer.loader_timeout
    if data.name == "webdataset" and expected is None and data.cache is None and images is full:
        augmentation = Augmentation(cfg.image_size, cfg.augment.as_dict(), epochs)
        return ShardLoader(full, augmentation, per_rank_batch_size(batch_size), **options)
    dataset = AugmentedDataset(images, cfg.image_size, cfg.augment.as_dict(), cfg.seed, epochs)
    window = mosaic_window(cfg.augment.mosaic.partners, images, batch_size)
    return BatchLoader(dataset, batch_size, shuffle=True, expected=expected, window=window, **options)


def _recipe(detector: Detector, cfg: TrainConfig, batch_size: int, images: int) -> Recipe:
    """Return the recipe of a new run over ``images`` per epoch."""
    optim = cfg.optim
    total_steps = math.ceil(images / max(batch_size, optim.nominal_batch)) * cfg.trainer.epochs
    num_classes = len(detector.class_names)
    return Recipe.from_config(optim, batch_size=batch_size, total_steps=total_steps, num_classes=num_classes)


def _train_step(
    detector: Detector,
    cfg: TrainConfig,
    batch_size: int,
    precision: Precision,
    recipe: Recipe,
    batches: int,
) -> TrainStep:
    """Return the training step of a run with ``batches`` per epoch."""
    optim, trainer = cfg.optim, cfg.trainer
    schedule = Schedule.from_config(recipe, optim, epochs=trainer.epochs, batches=batches)
    network: nn.Module = detector
    if trainer.compile:
        size, per_rank = cfg.image_size, per_rank_batch_size(batch_size)
        network = compile_network(detector, precision, size, per_rank, dynamic=trainer.multi_scale > 0)
    return TrainStep(
        detector,
        build_loss(cfg.as_dict(), detector.head),
        recipe,
        schedule,
        precision,
        accumulate=accumulation(batch_size, optim.nominal_batch),
        clip=trainer.clip_grad_norm,
        multi_scale=trainer.multi_scale,
        seed=cfg.seed,
        network=network,
    )
