"""What values the keys of a configuration may have, checked before any work starts."""

import re
from collections.abc import Callable, Mapping
from typing import Any

from detkit.errors import DetkitError

Rule = tuple[str, Callable[[Any], bool]]  # what is allowed, in words and as a test


def is_whole(value: Any, least: int) -> bool:
    """Whether ``value`` is an integer, and not below ``least``."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_number(value: Any, low: float, high: float = float("inf")) -> bool:
    """Whether ``value`` is a number from ``low`` to ``high``."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high


def _whole(least: int) -> Rule:
    return f"a whole number, {least} or more", lambda v: is_whole(v, least)


def _number(low: float, high: float = float("inf")) -> Rule:
    words = f"a number from {low:g} to {high:g}" if high < float("inf") else f"a number, {low:g} or more"
    return words, lambda v: is_number(v, low, high)


def _optional(rule: Rule) -> Rule:
    return f"{rule[0]}, or null", lambda v: v is None or rule[1](v)


PATH: Rule = ("a path", lambda v: isinstance(v, (str, int)) and not isinstance(v, bool) and v != "")
POSITIVE: Rule = ("a number above 0", lambda v: is_number(v, 0) and v > 0)
FRACTION: Rule = ("a number above 0, and 1 at most", lambda v: is_number(v, 0, 1) and v > 0)
BOOLEAN: Rule = ("true or false", lambda v: isinstance(v, bool))

RULES: dict[str, Rule] = {
    "device": (
        "auto, cpu, cuda or cuda:N",
        lambda v: isinstance(v, str) and bool(re.fullmatch(r"auto|cpu|cuda(:\d+)?", v)),
    ),
    "amp": ("auto, off, bf16 or fp16", lambda v: v in (None, "auto", "off", "bf16", "fp16")),
    "workers": ("auto, or a whole number, 0 or more", lambda v: v == "auto" or is_whole(v, 0)),
    "seed": _whole(0),
    "run_dir": _optional(PATH),
    "plugins": (
        "a list of modules, such as [my_backbone]",
        lambda v: isinstance(v, list) and all(isinstance(n, str) for n in v),
    ),
    "ckpt": PATH,
    "source": PATH,
    "src": PATH,
    "sampling": ("tutorial, paper or null", lambda v: v in (None, "tutorial", "paper")),
    "dst": PATH,
    "format": ("the name of a format", lambda v: v is None or isinstance(v, str)),
    "fix": _optional(PATH),
    "weights": _optional(PATH),
    "backbone.weights": _optional(PATH),
    "resume": _optional(PATH),
    "trials": _whole(1),
    "pruner.name": ("median, hyperband or none", lambda v: v in ("median", "hyperband", "none")),
    "pruner.startup_trials": _whole(0),
    "pruner.warmup_epochs": _whole(0),
    "storage": ("null, or the URL of a database", lambda v: v is None or (isinstance(v, str) and "://" in v)),
    "rect": BOOLEAN,
    "data.root": _optional(PATH),
    "data.sampling": (
        "null, repeat_factor or class_balanced",
        lambda v: v in (None, "repeat_factor", "class_balanced"),
    ),
    "data.repeat_threshold": FRACTION,
    "data.tiles": (
        "null, or a mapping of size, overlap and share",
        lambda v: v is None or (isinstance(v, dict) and set(v) == {"size", "overlap", "share"}),
    ),
    "data.tiles.size": _optional(_whole(32)),
    "data.tiles.overlap": _number(0, 0.9),
    "data.tiles.share": FRACTION,
    "data.yaml": PATH,
    "data.images": _optional(PATH),
    "data.strict": BOOLEAN,
    "data.one_based": BOOLEAN,
    "data.cache": ("null, ram or disk", lambda v: v in (None, "ram", "disk")),
    "split": ("train or val", lambda v: v in ("train", "val")),
    "image_size": _optional(("a multiple of 32 pixels, 64 or more", lambda v: is_whole(v, 64) and v % 32 == 0)),
    "batch_size": ("a whole number, 1 or more, or in training auto", lambda v: v == "auto" or is_whole(v, 1)),
    "score": _number(0, 1),
    "iou": _number(0, 1),
    "max_det": _whole(1),
    "rounds": _whole(1),
    "compile": BOOLEAN,
    "peer": _optional(PATH),
    "boxes": _whole(0),
    "num_classes": _whole(1),
    "depth": _whole(1),
    "model.depth": POSITIVE,
    "model.width": POSITIVE,
    "neck.in_strides": (
        "a list of strides, ascending, such as [8,16,32]",
        lambda v: isinstance(v, list) and len(v) > 0 and all(is_whole(s, 1) for s in v) and sorted(set(v)) == v,
    ),
    "head.anchors": (
        "a mapping of each stride to a list of widths and heights above 0",
        lambda v: (
            isinstance(v, dict) and all(isinstance(s, list) and all(is_number(x, 1e-6) for x in s) for s in v.values())
        ),
    ),
    "trainer.epochs": _whole(1),
    "trainer.clip_grad_norm": POSITIVE,
    "trainer.multi_scale": _number(0, 0.9),
    "trainer.sync_bn": BOOLEAN,
    "trainer.compile": BOOLEAN,
    "trainer.rank_timeout": POSITIVE,
    "trainer.log_every": _whole(1),
    "trainer.loggers": (
        "a list of loggers, each once, such as [wandb]",
        lambda v: isinstance(v, list) and all(isinstance(n, str) for n in v) and len({*v}) == len(v),
    ),
    "trainer.freeze": (
        "a list of parts, such as [backbone.stem]",
        lambda v: isinstance(v, list) and all(isinstance(n, str) for n in v),
    ),
    "trainer.max_bad_steps": _whole(1),
    "trainer.patience": _optional(_whole(1)),
    "optim.name": ("auto, sgd, adamw or muon", lambda v: v in ("auto", "sgd", "adamw", "muon")),
    "trainer.save_every": _optional(_whole(1)),
    "trainer.keep_last": _whole(1),
    "optim.lr": _optional(POSITIVE),
    "optim.momentum": _optional(_number(0, 1)),
    "optim.nominal_batch": _whole(1),
    "optim.weight_decay": _number(0),
    "optim.shape": (
        "linear, cosine, constant or one_cycle",
        lambda v: v in ("linear", "cosine", "constant", "one_cycle"),
    ),
    "optim.final": _number(0, 1),
    "optim.warmup_epochs": _number(0),
    "optim.warmup_min_batches": _whole(0),
    "optim.warmup_momentum": _number(0, 1),
    "optim.warmup_bias_lr": _optional(_number(0)),
    "optim.lr_factors": (
        "null, or a mapping of parts to numbers above 0, such as {backbone: 0.1}",
        lambda v: v is None or (isinstance(v, dict) and all(is_number(x, 0) and x > 0 for x in v.values())),
    ),
    "optim.layer_decay": _optional(FRACTION),
    "augment.mosaic.p": _number(0, 1),
    "augment.mosaic.off_epochs": _whole(0),
    "augment.mosaic.partners": ("auto, set or window", lambda v: v in ("auto", "set", "window")),
    "augment.affine.scale": (
        "a pair [smallest, largest] of numbers above 0",
        lambda v: isinstance(v, list) and len(v) == 2 and is_number(v[0], 1e-3) and is_number(v[1], v[0]),
    ),
    "augment.affine.translate": _number(0, 1),
    "augment.copy_paste.p": _number(0, 1),
    "augment.copy_paste.max_objects": _whole(1),
    "augment.copy_paste.max_side": FRACTION,
    "augment.mixup.p": _number(0, 1),
    "augment.mixup.alpha": POSITIVE,
    "augment.affine.degrees": _number(0, 180),
    "augment.affine.shear": ("a number from 0 to below 45", lambda v: is_number(v, 0) and v < 45),
    "augment.transforms": ("a mapping of transforms to their arguments", lambda v: isinstance(v, dict)),
}


def check_values(cfg: Mapping[str, Any]) -> None:
    """Check every key of a resolved configuration that has a rule.

    Raises:
        DetkitError: names the first key whose value is not allowed, and what is.
    """
    for group in ("backbone", "neck", "head", "loss", "model", "optim", "trainer", "augment", "data", "pruner"):
        if group in cfg and not isinstance(cfg[group], Mapping):
            raise DetkitError(f"{group}={cfg[group]} must be one of the options of configs/{group}")
    if "ckpt" not in cfg and cfg.get("image_size", 0) is None:  # a checkpoint knows its own
        raise DetkitError("image_size is not set: add image_size=640")
    if cfg.get("batch_size") == "auto" and "resume" not in cfg:
        raise DetkitError("batch_size=auto is for training: give it a number")
    for key, (words, allowed) in RULES.items():
        node: Any = cfg
        for part in key.split("."):
            node = node.get(part, _ABSENT) if isinstance(node, Mapping) else _ABSENT
        if node is not _ABSENT and not allowed(node):
            raise DetkitError(f"{key}={node} must be {words}")


_ABSENT = object()
