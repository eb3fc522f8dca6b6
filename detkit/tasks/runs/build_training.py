"""From a resolved run to everything that it trains: data, detector, step, and where they stand."""

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
from detkit.engine.precision import Precision, seed_everything, tune_malloc
from detkit.engine.state import TrainState, load_training_state, saved_recipe
from detkit.engine.step import TrainStep
from detkit.engine.transfer import TransferReport, load_weights
from detkit.errors import DetkitError
from detkit.models.detector import Detector, build_detector, build_loss, without_pretrained
from detkit.tasks.runs.data import check_room
from detkit.tasks.runs.resume import RunPlan

logger = logging.getLogger(__name__)


@dataclass
class Training:
    """A training that is ready to begin, or to go on.

    Attributes:
        cfg: resolved, every ``auto`` that the data or the device decides decided.
        batch_size: that of ``cfg``: images of one forward pass, of all ranks together.
        state: where it stands.
        trial_step: tries a batch of so many images on the device; see ``make_trial_step``.
        frozen: number of parameters that are not trained.
        transfer: what ``weights`` gave; None without it.
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
    """Read the data and build the detector, its step and its state, as saved or as they begin.

    Raises:
        DetkitError: a user's mistake.
    """
    cfg, saved = _absolute_paths(plan.cfg), plan.saved
    if cfg.batch_size != "auto":
        per_rank_batch_size(cfg.batch_size)
        check_batch(cfg.batch_size, cfg.image_size, device)
    precision = Precision.from_config(cfg.amp, device)
    seed_everything(cfg.seed)
    if device.type == "cpu":
        tune_malloc()
    with main_process_first():  # which leaves an index, or draws the set
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
    check_room(batch_size, cfg.image_size, cfg.workers)
    loader = _train_loader(train_set, cfg, batch_size, device)
    if cfg.trainer.sync_bn and world_size() > 1:
        convert_sync_batchnorm(detector)
    recipe = saved_recipe(saved) if saved else _recipe(detector, cfg, batch_size, loader.samples)
    step = _train_step(detector, cfg, batch_size, precision, recipe, len(loader))
    state = load_training_state(saved, step, len(loader)) if saved else TrainState()
    if saved and state.current.position and isinstance(loader, ShardLoader):
        _check_shares(cfg, saved)
    if rank():
        torch.manual_seed(cfg.seed + rank() + state.step)  # after the weights are drawn: what is dropped differs
    return Training(cfg, batch_size, step, state, train_set, val_set, loader, trial_step, frozen, transfer)


def _absolute_paths(cfg: TrainConfig) -> TrainConfig:
    """Return the configuration with a number of workers, and the data set's absolute paths: a checkpoint keeps them."""
    given = {key: getattr(cfg.data, key) for key in ("root", "yaml")}
    paths = {key: os.path.realpath(str(path)) for key, path in given.items() if path is not None}  # of a link to itself
    return cfg.replace(workers=worker_count(cfg.workers), data=cfg.data.replace(**paths))


def _auto_batch_size(trial_step: Callable[[int], None], device: torch.device) -> int:
    """Return what ``batch_size=auto`` stands for, and say so."""
    of_one_rank: int = run_on_main(lambda: choose_batch_size(trial_step, device))
    batch_size = of_one_rank * world_size()
    logger.info("batch_size=auto: %d images", batch_size)
    return batch_size


def _check_shares(cfg: TrainConfig, saved: dict[str, Any]) -> None:
    """Check that tar shards are shared among as many processes as when the epoch under way began.

    Raises:
        DetkitError: they are not, so images would come twice, or never.
    """
    now, then = (cfg.workers, world_size()), (saved["cfg"].get("workers"), saved["ranks"])
    if now != then:
        words = f"of {now[1]} ranks: within an epoch of tar shards, go on with workers={then[0]} of {then[1]} ranks"
        raise DetkitError(f"workers={now[0]} {words}")


def _largest_image(detector: Detector, cfg: TrainConfig) -> int:
    """Return the largest side, in pixels, at which a batch is trained."""
    stride = detector.max_stride
    return max(int(cfg.image_size * (1 + cfg.trainer.multi_scale) / stride), 1) * stride


def _train_loader(
    annotations: Annotations, cfg: TrainConfig, batch_size: int, device: torch.device
) -> BatchLoader | ShardLoader:
    """Return the augmented set, with its tiles and the sampling that ``data`` asks for, shuffled every epoch.

    Tar shards are read as streams, unless something is asked for that needs single images.
    """
    data, epochs = cfg.data, cfg.trainer.epochs
    whole = DetectionDataset(annotations, cfg.image_size, data.cache)
    images: DetectionDataset | TiledDataset = whole
    if data.tiles and data.tiles.size is not None:
        images = TiledDataset(whole, **data.tiles.as_dict())
    expected = expected_draws(images, data.as_dict())
    options: dict[str, Any] = {"workers": worker_count(cfg.workers), "seed": cfg.seed, "pin": device.type == "cuda"}
    options["timeout"] = cfg.trainer.loader_timeout
    if data.name == "webdataset" and expected is None and data.cache is None and images is whole:
        augmentation = Augmentation(cfg.image_size, cfg.augment.as_dict(), epochs)
        return ShardLoader(whole, augmentation, per_rank_batch_size(batch_size), **options)
    dataset = AugmentedDataset(images, cfg.image_size, cfg.augment.as_dict(), cfg.seed, epochs)
    window = mosaic_window(cfg.augment.mosaic.partners, images, batch_size)
    return BatchLoader(dataset, batch_size, shuffle=True, expected=expected, window=window, **options)


def _recipe(detector: Detector, cfg: TrainConfig, batch_size: int, images: int) -> Recipe:
    """Work the recipe out for a run over ``images`` an epoch."""
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
    """Return the step of a run of ``batches`` an epoch."""
    optim, trainer = cfg.optim, cfg.trainer
    schedule = Schedule.from_config(recipe, optim, epochs=trainer.epochs, batches=batches)
    network: nn.Module = detector
    if trainer.compile:
        size, share = cfg.image_size, per_rank_batch_size(batch_size)
        network = compile_network(detector, precision, size, share, dynamic=trainer.multi_scale > 0)
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
