"""Train a detector."""

import errno
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console

from detkit.data.annotations import Annotations
from detkit.data.augment.pipeline import Augmentation, AugmentedDataset, mosaic_window
from detkit.data.dataset import DetectionDataset
from detkit.data.loader import BatchLoader, worker_count
from detkit.data.read import read_training
from detkit.data.sampling import expected_draws
from detkit.data.shard_loader import ShardLoader
from detkit.data.tiles import TiledDataset
from detkit.distributed.collectives import world_size
from detkit.distributed.process_group import (
    init_distributed,
    is_main_process,
    main_process_first,
    per_rank_batch_size,
    rank,
    run_on_main,
)
from detkit.distributed.rendezvous import store_set
from detkit.distributed.sync_batch_norm import convert_sync_batchnorm
from detkit.engine.auto_batch import (
    COPIES_TRAINED,
    check_batch,
    choose_batch_size,
    explain_out_of_memory,
    make_trial_step,
)
from detkit.engine.compile import compile_network
from detkit.engine.loggers import check_loggers
from detkit.engine.optimizer import Recipe, Schedule, accumulation, describe_factors
from detkit.engine.param_groups import freeze
from detkit.engine.precision import Precision, is_out_of_memory, seed_everything, tune_malloc
from detkit.engine.signals import ignore_hangup
from detkit.engine.state import STATE, TrainState, load_training_state, read_state, saved_recipe
from detkit.engine.step import TrainStep
from detkit.engine.trainer import Trainer, early_stopping
from detkit.engine.transfer import TransferReport, load_weights
from detkit.errors import DetkitError
from detkit.models.detector import Detector, build_detector, build_loss, without_pretrained
from detkit.ops.atomic_write import write_atomically
from detkit.ops.image import set_max_pixels
from detkit.tasks.common import AUTO, check_room, make_run_dir, model_name, tell_split, val_loader
from detkit.tasks.resume import job_name, restarted_run, resumed_run, tell_progress
from detkit.tasks.run_lock import RELEASE, run_lock
from detkit.tasks.run_logging import open_log, print_transfer
from detkit.viz.console import make_console
from detkit.viz.tables import print_metrics


@dataclass
class Training:
    """A training that is ready to begin, or to go on.

    Attributes:
        cfg: resolved, every ``auto`` that the data or the device decides decided.
        state: where it stands.
        attempt: tries a batch of so many images on the device; see ``make_trial_step``.
        frozen: how many numbers do not learn.
        transfer: what ``weights`` gave; None without it.
        console: silent but on rank 0.
    """

    cfg: dict[str, Any]
    step: TrainStep
    state: TrainState
    train_set: Annotations
    val_set: Annotations
    train_loader: BatchLoader | ShardLoader
    attempt: Callable[[int], None]
    frozen: int
    transfer: TransferReport | None
    console: Console


@ignore_hangup()  # a training goes on without its terminal
def run(cfg: dict[str, Any], stop_early: Callable[[TrainState], str | None] = lambda state: None) -> dict[str, Any]:
    """Train what ``cfg`` (configs/train.yaml, resolved) describes; return the best and the last metrics.

    Args:
        stop_early: gives a reason to stop early, as in ``Trainer``; ``trainer.patience`` is another.

    Raises:
        DetkitError: a user's mistake, found before the first step where that is possible; or the system refuses a file.
        SystemExit: a signal asked for the end; the state is saved.
    """
    said: list[str] = []
    run_dir, saved = None, None
    restarted = restarted_run(cfg)
    started_again = cfg["resume"] == AUTO or restarted is not None  # what the command says, not the run's own file
    if cfg["resume"] is not None or restarted is not None:
        run_dir, cfg, saved = resumed_run(cfg, restarted, said.append)
    set_max_pixels(cfg["max_pixels"])
    check_loggers(cfg["trainer"]["loggers"])
    device = init_distributed(cfg["device"], cfg["trainer"]["rank_timeout"])
    _agree(run_dir, saved)
    console = make_console(quiet=not is_main_process())
    for sentence in said:
        console.print(sentence)
    training = _prepare(cfg, saved, device, console)
    name = model_name(cfg)
    run_dir = run_dir or Path(run_on_main(lambda: str(make_run_dir(cfg, "train", f"{name}_{cfg['data']['name']}"))))
    _announce(training, name, run_dir)
    with run_lock(run_dir, job_name(), patience=RELEASE if started_again else 0):
        store_set(job_name(), str(run_dir.resolve()))
        run_on_main(lambda: _check_unchanged(run_dir, training.state))
        results = _fit(training, run_dir, stop_early)
    if results is None:
        training.step.optimizer.zero_grad()
        raise DetkitError(explain_out_of_memory(training.attempt, cfg["batch_size"] // world_size(), device))
    best = results["best"]
    print_metrics(best, console)
    console.print(f"best epoch {best['epoch']}: AP {best['AP']:.4f}, AP50 {best['AP50']:.4f}")
    console.print(f"weights, metrics and pictures: {run_dir}")
    return results


def _agree(run_dir: Path | None, saved: dict[str, Any] | None) -> None:
    """Check that all ranks found the same run, saved at the same step.

    Raises:
        DetkitError: they did not; on those that differ from rank 0.
    """
    mine = [run_dir is not None, saved["state"]["step"] if saved else 0]
    theirs = run_on_main(lambda: mine)
    if mine != theirs:
        words = f"rank {rank()} finds {_found(*mine)}, rank 0 finds {_found(*theirs)}"
        raise DetkitError(f"the run's folder looks different from different nodes ({words}): start again when not")


def _found(is_there: bool, step: int) -> str:
    return f"a run saved after {step} batches" if is_there else "no run"


def _check_unchanged(run_dir: Path, state: TrainState) -> None:
    """Check, when nobody else writes there any more, that what was read of a run is what it has saved last.

    Raises:
        DetkitError: another process has gone on with it meanwhile.
    """
    saved = read_state(run_dir, lambda sentence: None)
    step = saved["state"]["step"] if saved else 0
    if step != state.step:
        raise DetkitError(
            f"{run_dir} was at {state.step} batches when it was read, and is at {step} now: another process went on "
            "with it; start again"
        )


def _prepare(cfg: dict[str, Any], saved: dict[str, Any] | None, device: torch.device, console: Console) -> Training:
    """Read the data and build the model and its step, as they were ``saved`` or as they begin; ``cfg`` is completed.

    Raises:
        DetkitError: a user's mistake.
    """
    if cfg["batch_size"] != "auto":
        per_rank_batch_size(cfg["batch_size"])
    check_batch(cfg["batch_size"], cfg["image_size"], device)
    precision = Precision.from_config(cfg["amp"], device)
    seed_everything(cfg["seed"])
    if device.type == "cpu":
        tune_malloc()
    cfg["workers"] = worker_count(cfg["workers"])
    for key in ("root", "yaml"):
        if cfg["data"].get(key) is not None:  # made absolute, so that a checkpoint finds it from anywhere
            cfg["data"][key] = os.path.realpath(str(cfg["data"][key]))  # of a link to itself, too
    with main_process_first():  # which leaves an index, or draws the set
        train_set, val_set = read_training(cfg["data"])

    built_as, copies = without_pretrained(cfg) if saved else cfg, COPIES_TRAINED if device.type == "cpu" else 1
    detector = build_detector(built_as, train_set.class_names, copies).to(device)
    detector.cfg = cfg
    transfer = load_weights(detector, str(cfg["weights"])) if cfg["weights"] is not None and not saved else None
    frozen = freeze(detector, cfg["trainer"]["freeze"])
    attempt = make_trial_step(detector, build_loss(cfg, detector.head), precision, _largest_image(detector, cfg))
    if cfg["batch_size"] == "auto":
        cfg["batch_size"] = run_on_main(lambda: choose_batch_size(attempt, device)) * world_size()
        console.print(f"batch_size=auto: {cfg['batch_size']} images")
    check_room(cfg)
    loader = _train_loader(train_set, cfg, device)
    if cfg["trainer"]["sync_bn"] and world_size() > 1:
        convert_sync_batchnorm(detector)
    recipe = saved_recipe(saved) if saved else _recipe(detector, cfg, loader.samples)
    step = _train_step(detector, cfg, precision, recipe, len(loader), console.print)
    state = load_training_state(saved, step, len(loader)) if saved else TrainState()
    if state.current.position and isinstance(loader, ShardLoader):
        _check_shares(cfg, saved)
    if rank():
        torch.manual_seed(cfg["seed"] + rank() + state.step)  # after the weights are drawn: what is dropped differs
    return Training(cfg, step, state, train_set, val_set, loader, attempt, frozen, transfer, console)


def _announce(training: Training, name: str, run_dir: Path) -> None:
    """Print what is trained, on what, and how it differs from what one may expect."""
    cfg, step, console = training.cfg, training.step, training.console
    recipe, images, samples = step.schedule.recipe, len(training.train_set), training.train_loader.samples
    parameters = sum(p.numel() for p in step.detector.parameters())
    ranks = f" and {world_size() - 1} more" if world_size() > 1 else ""
    console.print(f"{name}: {parameters:,} parameters on {step.precision.device}{ranks}, {step.precision}")
    if getattr(step.detector.backbone, "loaded", None):
        console.print(step.detector.backbone.loaded)
    if samples != images:
        console.print(f"an epoch has {samples} samples, by data.tiles or data.sampling")
    mosaic, epochs = cfg["augment"]["mosaic"], cfg["trainer"]["epochs"]
    if mosaic["p"] and mosaic["close_epochs"] >= epochs:
        off = f"augment.mosaic.close_epochs={mosaic['close_epochs']} of trainer.epochs={epochs}"
        console.print(f"no image is mixed with others (mosaic, mixup, copy-paste): {off}")
    if training.frozen:
        console.print(f"frozen: {training.frozen:,} parameters, of {', '.join(cfg['trainer']['freeze'])}")
    if recipe.lr_factors or recipe.layer_decay is not None:
        console.print(f"parameters that learn: {describe_factors(step.optimizer)}")
    tell_split("train", training.train_set, console)
    tell_split("val", training.val_set, console)
    if training.transfer is not None:
        print_transfer(training.transfer, console)
    console.print(f"{recipe.name}, learning rate {recipe.lr:g}; writing to {run_dir}")
    if training.state.step:
        tell_progress(training.state, epochs, console)


def _check_shares(cfg: dict[str, Any], saved: dict[str, Any]) -> None:
    """Check that tar shards are shared among as many processes as when the epoch under way began.

    Raises:
        DetkitError: they are not, so images would come twice, or never.
    """
    now, then = (cfg["workers"], world_size()), (saved["cfg"].get("workers"), saved["ranks"])
    if now != then:
        words = f"of {now[1]} ranks: within an epoch of tar shards, go on with workers={then[0]} of {then[1]} ranks"
        raise DetkitError(f"workers={now[0]} {words}")


def _largest_image(detector: Detector, cfg: dict[str, Any]) -> int:
    """Return the largest side, in pixels, at which a batch is trained."""
    stride = detector.max_stride
    return max(int(cfg["image_size"] * (1 + cfg["trainer"]["multi_scale"]) / stride), 1) * stride


def _fit(training: Training, run_dir: Path, stop_early: Callable[[TrainState], str | None]) -> dict[str, Any] | None:
    """Train from ``training.state`` on; None where the device has too little memory.

    Raises:
        DetkitError: the system refuses a file: the disk is full, say.
    """
    cfg, step, state, val_set = training.cfg, training.step, training.state, training.val_set
    options = ("epochs", "max_nonfinite_steps", "save_every", "keep_last", "log_every")
    waited = early_stopping(cfg["trainer"]["patience"])
    try:
        if is_main_process():
            write_atomically(run_dir / "config.yaml", yaml.safe_dump(cfg, sort_keys=False).encode())
        loaders = training.train_loader, val_loader(val_set, cfg, step.precision.device)
        chosen = {key: cfg["trainer"][key] for key in options}
        chosen |= {"run_dir": run_dir, "stop_early": lambda state: waited(state) or stop_early(state)}
        with open_log(cfg, step, training.train_set, run_dir, state, training.console) as log:
            return Trainer(step, *loaders, val_set, state=state, log=log, **chosen).fit()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return None  # and not the error: it holds the tensors of its frames
    except OSError as error:
        if error.errno is None:
            raise  # a library's own
        first = "make room there, then " if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        later = f"; {first}resume={run_dir} goes on from what is saved" if (run_dir / STATE).exists() else ""
        raise DetkitError(f"{error.filename or run_dir}: {error.strerror}{later}") from None


def _train_loader(annotations: Annotations, cfg: dict[str, Any], device: torch.device) -> BatchLoader | ShardLoader:
    """Return the augmented set, with its tiles and the sampling that ``data`` asks for, shuffled every epoch.

    Tar shards are read as streams, unless something is asked for that needs single images.
    """
    data, batch_size, epochs = cfg["data"], cfg["batch_size"], cfg["trainer"]["epochs"]
    images = DetectionDataset(annotations, cfg["image_size"], data.get("cache"))
    tiles = data.get("tiles")
    if tiles and tiles["size"] is not None:
        images = TiledDataset(images, **tiles)
    expected = expected_draws(images, data)
    options = {"workers": worker_count(cfg["workers"]), "seed": cfg["seed"], "pin": device.type == "cuda"}
    options["timeout"] = cfg["trainer"]["loader_timeout"]
    streams = expected is None and data.get("cache") is None and not isinstance(images, TiledDataset)
    if data["name"] == "webdataset" and streams:
        augmentation = Augmentation(cfg["image_size"], cfg["augment"], epochs)
        return ShardLoader(images, augmentation, per_rank_batch_size(batch_size), **options)
    dataset = AugmentedDataset(images, cfg["image_size"], cfg["augment"], cfg["seed"], epochs)
    window = mosaic_window(cfg["augment"]["mosaic"].get("partners", "auto"), images, batch_size)
    return BatchLoader(dataset, batch_size, shuffle=True, expected=expected, window=window, **options)


def _recipe(detector: Detector, cfg: dict[str, Any], images: int) -> Recipe:
    """Work the recipe out for a run over ``images`` an epoch."""
    optim, batch_size = cfg["optim"], cfg["batch_size"]
    total_steps = math.ceil(images / max(batch_size, optim["nominal_batch"])) * cfg["trainer"]["epochs"]
    num_classes = len(detector.class_names)
    return Recipe.from_config(optim, batch_size=batch_size, total_steps=total_steps, num_classes=num_classes)


def _train_step(
    detector: Detector,
    cfg: dict[str, Any],
    precision: Precision,
    recipe: Recipe,
    batches: int,
    tell: Callable[[str], None],
) -> TrainStep:
    """Return the step of a run of ``batches`` an epoch."""
    optim, trainer = cfg["optim"], cfg["trainer"]
    schedule = Schedule.from_config(recipe, optim, epochs=trainer["epochs"], batches=batches)
    network = detector
    if trainer["compile"]:
        size, share = cfg["image_size"], per_rank_batch_size(cfg["batch_size"])
        network = compile_network(detector, precision, size, share, tell, dynamic=trainer["multi_scale"] > 0)
    return TrainStep(
        detector,
        build_loss(cfg, detector.head),
        recipe,
        schedule,
        precision,
        accumulate=accumulation(cfg["batch_size"], optim["nominal_batch"]),
        clip=trainer["clip_grad_norm"],
        multi_scale=trainer["multi_scale"],
        seed=cfg["seed"],
        network=network,
    )
