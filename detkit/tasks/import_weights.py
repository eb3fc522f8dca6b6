"""Convert another project's checkpoint to detkit's format: ``detkit import_weights src=FILE dst=FILE``."""

import logging
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch

import detkit.layers  # noqa: F401  (registers the blocks)
from detkit.config import compose_config, resolve
from detkit.config.common import CommonConfig
from detkit.config.fields import Location, field, location
from detkit.config.schema import HeadConfig, ModelConfig, NeckConfig, PartConfig
from detkit.engine.checkpoint import (
    Checkpoint,
    build_from_checkpoint,
    is_checkpoint,
    read_checkpoint,
    without_pretrained,
    write_checkpoint,
)
from detkit.errors import DetkitError, shorten
from detkit.models.detector import build_detector
from detkit.registry import BACKBONES
from detkit.weights.fused import unfuse
from detkit.weights.identify import identify
from detkit.weights.naming import Identified
from detkit.weights.source import Source, read_source

logger = logging.getLogger(__name__)

MAX_CLASSES = 10_000
AKCONVS = ("akconv", "c3_akconv")


class ImportWeightsConfig(CommonConfig):
    """Keys of ``configs/import_weights.yaml``."""

    src: Location = location("checkpoint of another project")
    dst: Location = location("new .safetensors file to write")
    sampling: Literal["paper", "tutorial"] | None = field(
        "sampling grid of the AKConv layers in the file; null for files without any"
    )
    backbone: PartConfig = field("backbone in the file, if it holds nothing else; inferred if not given", default=None)
    neck: NeckConfig = field("neck of the model; set by model", default=None)
    head: HeadConfig = field("head of the model; set by model", default=None)
    model: ModelConfig = field("model in the file; inferred from the tensors if not given", default=None)


def run(cfg: ImportWeightsConfig) -> Checkpoint:
    """Identify the model in ``src``, or check that it is the given ``model=``, and write ``dst``.

    Raises:
        DetkitError: ``src`` cannot be read, would run code or holds another model, or ``dst`` exists.
    """
    src, dst, given = Path(str(cfg.src)), Path(str(cfg.dst)), cfg.as_dict()
    _check_destination(dst)
    if src.is_file() and is_checkpoint(src):
        if "backbone" in given:
            raise DetkitError(f"{src} is a detkit checkpoint, which names its own model: omit model=")
        build_from_checkpoint(src)  # checks that it is complete
        checkpoint, message = read_checkpoint(src), f"{src} is a detkit checkpoint: copied to {dst}"
    else:
        source = read_source(src)
        found = identify(src, source.tensors)
        chosen, named = _chosen(src, given, found)
        chosen = _with_sampling(src, found, chosen, cfg.sampling)
        checkpoint = make_checkpoint(src, source, found, chosen, named)
        known = shlex.join(found.choices) if found.choices and checkpoint.part else named
        model = f"model={cfg.model.name} " if checkpoint.part and cfg.model else ""
        message = _describe(src, dst, found, f"{model}{known}", checkpoint, source.place)
    try:
        write_checkpoint(dst, checkpoint)
    except OSError as error:
        raise DetkitError(f"cannot write dst={dst}: {error.strerror}") from None
    logger.info(message)
    return checkpoint


def _describe(src: Path, dst: Path, found: Identified, named: str, checkpoint: Checkpoint, place: str) -> str:
    """Return a message with what was imported and the command to use it."""
    text = f"{src}{f', in its {shorten(place)!r},' if place else ''} is {found.what} ({named})"
    if checkpoint.part:
        left_out = f", without {len(found.unused)} other tensors" if found.unused else ""
        model = "" if named.startswith("model=") else "model=yolov8n "
        return f"{text}: its backbone is in {dst}{left_out}\nto fine-tune it: detkit train {model}{named} weights={dst}"
    names = shorten(", ".join(checkpoint.class_names[:5])) + (", ..." if len(checkpoint.class_names) > 5 else "")
    text += f", {len(checkpoint.class_names)} classes ({names}), {checkpoint.cfg['image_size']} pixels: it is in {dst}"
    return "\n".join((text, *found.notes, f"to evaluate it: detkit eval ckpt={dst} data=coco data.root=DIR"))


def _check_destination(dst: Path) -> None:
    if dst.suffix != ".safetensors":
        raise DetkitError(f"dst={dst} must end in .safetensors, the format of detkit's checkpoints")
    if dst.exists():
        raise DetkitError(f"dst={dst} already exists: name another file, or remove it")
    if not dst.parent.is_dir():
        raise DetkitError(f"dst={dst}: the folder {dst.parent} does not exist")


def _chosen(src: Path, cfg: dict[str, Any], found: Identified) -> tuple[dict[str, Any], str]:
    """Return the given config, or else the one identified, and the overrides that select it."""
    if "backbone" in cfg:
        if found.part is None and "neck" not in cfg:
            raise DetkitError(
                f"{src} holds a whole detector, {found.what}: name it with model=NAME, not by its backbone"
            )
        named = [f"model={cfg['model']['name']}"] if "model" in cfg else []
        return cfg, " ".join(named or [f"backbone={cfg['backbone']['name']}"])
    if not found.choices:
        key = found.part or "model"
        raise DetkitError(f"{src} is {found.what}, but its size is ambiguous: add {key}=NAME")
    return resolve(compose_config("train", ["~data", *found.choices])), shlex.join(found.choices)


def _with_sampling(src: Path, found: Identified, cfg: dict[str, Any], sampling: str | None) -> dict[str, Any]:
    """Return the config with the ``sampling=`` of the AKConvs, which cannot be inferred from the tensors.

    Raises:
        DetkitError: ``sampling`` is missing for a file with AKConvs, or given for one without.
    """
    if not found.akconv:
        if sampling is not None:
            raise DetkitError(f"sampling={sampling} is for files with AKConv layers: {src} has none")
        return cfg
    if sampling is None:
        raise DetkitError(
            f"{src} is {found.what} with AKConv, whose sampling cannot be inferred from the tensors: the code that "
            "tutorials patch into YOLO uses a transposed grid and counts borders twice, unlike the paper; add "
            "sampling=tutorial for weights trained with that code, or sampling=paper for those of the paper's grid"
        )
    if sampling == "tutorial":
        found.notes.append(
            "its AKConvs sample like the tutorials' code; a run that starts from it with weights= uses the paper's "
            "sampling by default, and has to adapt to it"
        )
    return cfg | {key: _sampled(cfg[key], sampling) for key in ("backbone", "neck") if key in cfg}


def _sampled(spec: Any, sampling: str) -> Any:
    """Return a part's config with the sampling of every AKConv set."""
    if spec in AKCONVS:
        return {"name": spec, "sampling": sampling}
    if isinstance(spec, list):
        return [_sampled(item, sampling) for item in spec]
    if isinstance(spec, Mapping):
        own = {"sampling": sampling} if spec.get("name") in AKCONVS else {}
        return {key: value if key == "name" else _sampled(value, sampling) for key, value in spec.items()} | own
    return spec


def make_checkpoint(path: Path, source: Source, found: Identified, cfg: Mapping[str, Any], named: str) -> Checkpoint:
    """Return the checkpoint of the model identified in ``path``, as configured by ``cfg``.

    Args:
        path: the file, for error messages.
        source: its contents.
        found: the identified model and its tensors, by detkit's names.
        cfg: resolved; ``backbone``, and for a complete detector ``model``, ``neck`` and ``head``.
        named: the overrides that select ``cfg``, for error messages.

    Raises:
        DetkitError: the name or shape of a tensor does not match that model.
    """
    parts = ("backbone",) if found.part else ("model", "backbone", "neck", "head")
    saved_cfg = without_pretrained({key: dict(cfg[key]) for key in parts})
    if found.part:
        names: tuple[str, ...] = ()
    elif found.num_classes < 1:
        raise DetkitError(f"{path} is {found.what}, but its head's last layer is missing: it has no classes")
    elif found.num_classes > MAX_CLASSES:
        raise DetkitError(f"{path} is refused: its head's last layer claims {found.num_classes:,} classes")
    else:
        saved_cfg["head"] |= found.head or {}
        saved_cfg["image_size"] = source.image_size or 640
        given = source.class_names or ()
        names = given if len(given) == found.num_classes else tuple(f"class{k}" for k in range(found.num_classes))
        if names != given:
            found.notes.append("the class names are missing or incomplete: the classes are named class0, class1, ...")
    shapes = _shapes(saved_cfg, names)
    fused = 0 if found.part else unfuse(found.tensors, shapes)
    if fused:
        found.notes.append(
            f"{fused} of its batch norms and RepVGG blocks had been fused: the outputs are the same, but fine-tuning "
            "should start from the unfused file, as their statistics are lost"
        )
    for name in shapes:  # missing in older checkpoints, and unused
        if name.endswith("num_batches_tracked"):
            found.tensors.setdefault(name, torch.tensor(0))
    if mismatch := _first_mismatch(shapes, found):
        hint = (
            f"; its tensors are those of {shlex.join(found.choices)}"
            if found.choices and named != shlex.join(found.choices)
            else ""
        )
        raise DetkitError(f"{path} is {found.what}, but does not match {named}: {mismatch}{hint}")
    weights = {name: found.tensors[name] for name in shapes}
    return Checkpoint(weights, saved_cfg, names, {}, found.part)


def _shapes(cfg: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every tensor of a detector, or of a backbone if ``cfg`` has nothing else."""
    with torch.device("meta"):
        if "neck" in cfg:
            state = build_detector(cfg, names).state_dict()
        else:
            backbone = BACKBONES.build(cfg["backbone"])
            state = {f"backbone.{name}": tensor for name, tensor in backbone.state_dict().items()}
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def _first_mismatch(shapes: Mapping[str, tuple[int, ...]], found: Identified) -> str:
    """Return a message about the first tensor that does not match; an empty string if all do."""
    for name, shape in shapes.items():
        if name not in found.tensors:
            return f"its '{name}' is missing"
        actual = tuple(found.tensors[name].shape)
        if actual != shape:
            return f"its '{name}' has the shape {list(actual)} instead of {list(shape)}"
    unknown = [name for name in found.tensors if name not in shapes]
    if not found.part:
        unknown += found.unused
    return f"its {shorten(unknown[0])!r} is unexpected" if unknown else ""
