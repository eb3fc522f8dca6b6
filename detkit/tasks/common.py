"""What the tasks share: run directories and loaders."""

import itertools
import json
import re
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import OmegaConf
from rich.console import Console

import detkit.data  # noqa: F401  (registers the formats)
from detkit.data.annotations import Annotations
from detkit.data.dataset import DetectionDataset, LetterboxDataset
from detkit.data.loader import BatchLoader, local_ranks, worker_count
from detkit.data.problems import LEFT_OUT, MENDED, ProblemLog
from detkit.data.splits import TRAINED, MissingSplit, splits_of
from detkit.data.workers import TIMEOUT, check_shared_memory
from detkit.errors import DetkitError
from detkit.ops.ranks import rank_count
from detkit.registry import DATASETS

AUTO = "auto"  # resume=auto: go on with the run in the named folder, if there is one
# Keys of data that are no arguments of its reader.
DATA_OPTIONS = ("preset", "strict", "allow_empty", "cache", "sampling", "repeat_threshold", "tiles")


def make_run_dir(cfg: Mapping[str, Any], task: str, name: str) -> Path:
    """Create and return the run directory: ``named_folder``, or a new one under ``runs/TASK`` named after the run.

    Raises:
        DetkitError: ``run_dir`` holds files already; nothing is overwritten. Hidden files do not count: a run that was
            killed at its very start leaves them.
    """
    path = named_folder(cfg)
    try:
        if path is None or (cfg["run_dir"] is None and cfg.get("resume") != AUTO):
            return _new_folder(path or Path("runs") / task / f"{name}_{time.strftime('%Y%m%d-%H%M%S')}")
        if path.is_dir() and any(not file.name.startswith(".") for file in path.iterdir()):
            there = f"go on with the run there by resume={path}" if (path / "config.yaml").exists() else "empty it"
            raise DetkitError(f"run_dir={path} is not empty: name another folder, or {there}")
        path.mkdir(parents=True, exist_ok=True)
        return path
    except OSError as error:
        raise DetkitError(f"cannot create the run directory {error.filename}: {error.strerror}") from None


def named_folder(cfg: Mapping[str, Any]) -> Path | None:
    """Return the run directory that the command names: ``run_dir``, or in a sweep the job's; None if it names none."""
    return sweep_folder() if cfg["run_dir"] is None else Path(str(cfg["run_dir"]))


def checkpoint_name(ckpt: object) -> str:
    """Return the name of a checkpoint's run and file, such as ``yolov8n_shapes_20261122-101508_best``."""
    path = Path(str(ckpt)).resolve()
    return f"{path.parent.name}_{path.stem}".strip("_")


def model_name(cfg: Mapping[str, Any]) -> str:
    """Return the model's name and the parts put in place of its own, such as ``yolov8s_revcol_tiny``."""
    swapped = []
    if HydraConfig.initialized():
        typed = [override.partition("=") for override in HydraConfig.get().overrides.task]
        swapped = [option for group, _, option in typed if group in ("backbone", "neck", "head", "loss")]
    return "_".join((cfg["model"]["name"], *swapped))


def sweep_folder() -> Path | None:
    """Return a job's folder in a sweep, named by its number and what it was swept over; None outside a sweep."""
    if not HydraConfig.initialized() or HydraConfig.get().mode is not RunMode.MULTIRUN:
        return None
    hydra = HydraConfig.get()
    # The folder Hydra made at the start; hydra.sweep.dir would tell the time anew for every job.
    sweep = Path(hydra.runtime.output_dir)
    chosen = [override for override in hydra.overrides.task if override.partition("=")[0] in _swept_keys(sweep)]
    return sweep / numbered_name(hydra.job.num, chosen)


def numbered_name(number: int, choices: Sequence[str]) -> str:
    """Return a folder's name of a number and what was chosen, such as ``3_seed-1_backbone-revcol_tiny``."""
    words = re.sub(r"[^\w.+-]+", "-", "_".join(choices)).strip("-")[:100]
    return f"{number}_{words}"


def _swept_keys(sweep: Path) -> set[str]:
    """Return the keys that a sweep varies, from ``multirun.yaml``, where Hydra leaves the arguments it began with."""
    hydra = OmegaConf.load(sweep / "multirun.yaml").hydra
    arguments = [*hydra.overrides.task, *(f"{key}={values}" for key, values in (hydra.sweeper.params or {}).items())]
    parsed = OverridesParser.create().parse_overrides(arguments)
    return {override.get_key_element() for override in parsed if override.is_sweep_override()}


def _new_folder(path: Path) -> Path:
    """Create ``path``, or ``path-2``, ``path-3``, ... where it is taken."""
    for suffix in itertools.chain([""], (f"-{k}" for k in itertools.count(2))):
        try:
            candidate = path.with_name(path.name + suffix)
            candidate.mkdir(parents=True)
            return candidate
        except FileExistsError:
            continue


def read_split(data: Mapping[str, Any], split: str, log: ProblemLog | None = None) -> Annotations:
    """Read one split of the configured data set.

    Args:
        log: where problems go; given one, the files are read anew, and no problem is refused.

    Raises:
        DetkitError: it cannot be read, or has problems where ``data.strict`` is set.
    """
    if log is not None:
        return DATASETS.build(_reader_arguments(data), split, log=log)
    annotations = DATASETS.build(_reader_arguments(data), split)
    if data.get("strict"):
        annotations.problems.refuse()
    return annotations


def read_splits(data: Mapping[str, Any], console: Console, kept: int | None = None) -> dict[str, Annotations]:
    """Read every split of the configured data set; say which are left out, as their files are not there or
    their classes are others.

    Args:
        kept: read the files anew and keep so many problems of a kind.

    Raises:
        DetkitError: one cannot be read, train or val are not there, or have different classes.
    """
    splits: dict[str, Annotations] = {}
    for split in splits_of(_reader_arguments(data)):
        try:
            splits[split] = read_split(data, split, None if kept is None else ProblemLog(kept))
        except MissingSplit as error:
            if split in TRAINED:
                raise
            console.print(f"{split} is left out: {error}", style="bold red")
    train_set = splits["train"]
    for split, annotations in list(splits.items()):
        if not annotations.class_names:  # images alone
            ids = train_set.category_ids
            splits[split] = replace(annotations, class_names=train_set.class_names, category_ids=ids)
        try:
            check_classes(train_set, splits[split])
        except DetkitError as error:
            if split in TRAINED:
                raise
            console.print(f"{split} is left out: {error}", style="bold red")
            del splits[split]
    return splits


def read_training(data: Mapping[str, Any]) -> tuple[Annotations, Annotations]:
    """Read the splits that a training takes, train and val.

    Raises:
        DetkitError: one cannot be read, their classes differ, or one has no boxes and ``data.allow_empty`` is not set.
    """
    train_set, val_set = (read_split(data, split) for split in TRAINED)
    check_classes(train_set, val_set)
    for split, annotations in zip(TRAINED, (train_set, val_set), strict=True):
        if not len(annotations.labels) and not data.get("allow_empty"):
            words = "correct that, or train all the same with data.allow_empty=true (check_data lists what is wrong)"
            raise DetkitError(f"{split} has no boxes: {explain_empty(annotations)}; {words}")
    return train_set, val_set


def explain_empty(annotations: Annotations) -> str:
    """Say where the boxes of a split without any were looked for, and what was found there."""
    problems, count = annotations.problems, len(annotations)
    without = problems.counts["unlabelled_image"]
    words = [f"{count} images in {annotations.source}"]
    if without:
        first = next(problem for problem in problems.problems if problem.kind == "unlabelled_image")
        words += [f"label files found: {max(count - without, 0)} of {count}", f"the first image: {first}"]
    if problems.summary():
        words += [problems.summary(), f"the first: {problems.first(LEFT_OUT, MENDED)}"]
    return "; ".join(words)


def _reader_arguments(data: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in data.items() if key not in DATA_OPTIONS}


def check_classes(train_set: Annotations, other: Annotations) -> None:
    """Check that two splits define the same classes.

    Raises:
        DetkitError: they do not.
    """
    if train_set.class_names != other.class_names:
        raise DetkitError(f"{other.source} has other classes than {train_set.source}: give both the same")


def train_command(data: Mapping[str, str]) -> str:
    """Return the command that trains on a set, from the keys of ``data`` that read it."""
    words = [f"data={data['name']}"]
    for key, value in data.items():
        if key != "name":
            quoted = value if re.fullmatch(r"[\w./-]+", value, re.ASCII) else json.dumps(value, ensure_ascii=False)
            words.append(f"data.{key}={quoted}")
    return f"python tools/train.py {shlex.join(words)}"


def tell_split(split: str, annotations: Annotations, console: Console) -> None:
    """Print a line of what a split holds, and one of what was mended or left out, if anything was."""
    console.print(f"{split}: {len(annotations)} images, {len(annotations.labels)} boxes")
    summary = annotations.problems.summary()
    if summary:
        first = annotations.problems.first(LEFT_OUT, MENDED)
        console.print(f"{split}: {summary}; the first: {first} (check_data lists all, data.strict=true refuses them)")


def check_room(cfg: Mapping[str, Any]) -> None:
    """Check that the loader processes of this node's ranks have the shared memory that their batches take.

    Raises:
        DetkitError: they have not.
    """
    images = -(-cfg["batch_size"] // rank_count())
    check_shared_memory(3 * images * cfg["image_size"] ** 2, worker_count(cfg["workers"]) * local_ranks())


def val_loader(annotations: Annotations, cfg: Mapping[str, Any], device: torch.device) -> BatchLoader:
    """Return every image letterboxed, in order, or each in its own smallest frame where ``rect`` is set."""
    dataset = LetterboxDataset(DetectionDataset(annotations), cfg["image_size"], cfg["rect"])
    return BatchLoader(
        dataset,
        cfg["batch_size"],
        workers=worker_count(cfg["workers"]),
        pin=device.type == "cuda",
        starts=dataset.batch_starts(cfg["batch_size"]),
        timeout=cfg["trainer"]["loader_timeout"] if "trainer" in cfg else TIMEOUT,
    )
