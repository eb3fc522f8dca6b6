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
    """``configs/import_weights.yaml``."""

    src: Location = location("checkpoint of another project")
    dst: Location = location("new .safetensors file to write")
    sampling: Literal["paper", "tutorial"] | None = field(
        "sampling grid of the AKConv layers in the file; null for files without any"
    )
    backbone: PartConfig = field(
        "backbone in the file, for a file that holds only a backbone; inferred if not given", default=None
    )
    neck: NeckConfig = field("neck of the model; set by model", default=None)
    head: HeadConfig = field("head of the model; set by model", default=None)
    model: ModelConfig = field("model in the file; inferred from the tensors if not given", default=None)


def run(cfg: ImportWeightsConfig) -> Checkpoint:
    """Read ``src``, log what it is (or check that it is the ``model=`` named), write ``dst``.

    Raises:
        DetkitError: a file that cannot be read, that would run code, or of another model; or ``dst`` is taken.
    """
    src, dst, given = Path(str(cfg.src)), Path(str(cfg.dst)), cfg.as_dict()
    _check_destination(dst)
    if src.is_file() and is_checkpoint(src):
        if "backbone" in given:
            raise DetkitError(f"{src} is a checkpoint of detkit, which says by itself what it is: leave model= out")
        build_from_checkpoint(src)  # whether it is whole
        checkpoint, sentence = read_checkpoint(src), f"{src} is a checkpoint of detkit: copied to {dst}"
    else:
        source = read_source(src)
        found = identify(src, source.tensors)
        chosen, named = _chosen(src, given, found)
        chosen = _with_sampling(src, found, chosen, cfg.sampling)
        checkpoint = make_checkpoint(src, source, found, chosen, named)
        known = shlex.join(found.choices) if found.choices and checkpoint.part else named
        model = f"model={cfg.model.name} " if checkpoint.part and cfg.model else ""
        sentence = _tell(src, dst, found, f"{model}{known}", checkpoint, source.place)
    try:
        write_checkpoint(dst, checkpoint)
    except OSError as error:
        raise DetkitError(f"cannot write dst={dst}: {error.strerror}") from None
    logger.info(sentence)
    return checkpoint


def _tell(src: Path, dst: Path, found: Identified, named: str, checkpoint: Checkpoint, place: str) -> str:
    """Say what was imported, and what to do with it."""
    told = f"{src}{f', in its {shorten(place)!r},' if place else ''} is {found.what} ({named})"
    if checkpoint.part:
        left_out = f", without {len(found.unused)} other tensors" if found.unused else ""
        model = "" if named.startswith("model=") else "model=yolov8n "
        return (
            f"{told}: its backbone is in {dst}{left_out}\nto start from it: detkit train {model}{named} weights={dst}"
        )
    names = shorten(", ".join(checkpoint.class_names[:5])) + (", ..." if len(checkpoint.class_names) > 5 else "")
    told += f", {len(checkpoint.class_names)} classes ({names}), {checkpoint.cfg['image_size']} pixels: it is in {dst}"
    return "\n".join((told, *found.notes, f"to measure it: detkit eval ckpt={dst} data=coco data.root=DIR"))


def _check_destination(dst: Path) -> None:
    if dst.suffix != ".safetensors":
        raise DetkitError(f"dst={dst} must end in .safetensors: that is what detkit's checkpoints are")
    if dst.exists():
        raise DetkitError(f"dst={dst} exists already: name another file, or remove it")
    if not dst.parent.is_dir():
        raise DetkitError(f"dst={dst}: the folder {dst.parent} does not exist")


def _chosen(src: Path, cfg: dict[str, Any], found: Identified) -> tuple[dict[str, Any], str]:
    """Return the config the user named, or else the one recognised; and its choices in words."""
    if "backbone" in cfg:
        if found.part is None and "neck" not in cfg:
            raise DetkitError(
                f"{src} holds a whole detector, {found.what}: name it with model=NAME, not by its backbone"
            )
        named = [f"model={cfg['model']['name']}"] if "model" in cfg else []
        return cfg, " ".join(named or [f"backbone={cfg['backbone']['name']}"])
    if not found.choices:
        key = found.part or "model"
        raise DetkitError(f"{src} is {found.what}, but of which size its tensors do not tell: add {key}=NAME")
    return resolve(compose_config("train", ["~data", *found.choices])), shlex.join(found.choices)


def _with_sampling(src: Path, found: Identified, cfg: dict[str, Any], sampling: str | None) -> dict[str, Any]:
    """Return the config whose AKConvs sample as ``sampling=`` says, which a file's tensors do not tell.

    Raises:
        DetkitError: it is not said of a file with AKConvs, or said of one without.
    """
    if not found.akconv:
        if sampling is not None:
            raise DetkitError(f"sampling={sampling} is for files with AKConv layers: {src} has none")
        return cfg
    if sampling is None:
        raise DetkitError(
            f"{src} is {found.what} with AKConv, whose tensors do not tell how they sample: the code that tutorials "
            "patch into YOLO has a transposed grid and counts borders twice, which the paper's sampling does not undo; "
            "add sampling=tutorial for weights trained with that code, sampling=paper for those of the paper's grid"
        )
    if sampling == "tutorial":
        found.notes.append(
            "its AKConvs sample as the tutorials' code does; a training that starts from it with weights= may have the "
            "paper's sampling, and has to learn it"
        )
    return cfg | {key: _sampled(cfg[key], sampling) for key in ("backbone", "neck") if key in cfg}


def _sampled(spec: Any, sampling: str) -> Any:
    """Set the sampling of every AKConv in a part of a configuration."""
    if spec in AKCONVS:
        return {"name": spec, "sampling": sampling}
    if isinstance(spec, list):
        return [_sampled(item, sampling) for item in spec]
    if isinstance(spec, Mapping):
        own = {"sampling": sampling} if spec.get("name") in AKCONVS else {}
        return {key: value if key == "name" else _sampled(value, sampling) for key, value in spec.items()} | own
    return spec


def make_checkpoint(path: Path, source: Source, found: Identified, cfg: Mapping[str, Any], named: str) -> Checkpoint:
    """Return the checkpoint of what was recognised in ``path``, built as ``cfg`` says.

    Args:
        cfg: resolved; ``backbone``, and ``model``, ``neck`` and ``head`` of a whole detector.
        named: the choices that led to ``cfg``, for the sentence.

    Raises:
        DetkitError: the tensors do not fit that model, name by name and shape by shape.
    """
    parts = ("backbone",) if found.part else ("model", "backbone", "neck", "head")
    kept = without_pretrained({key: dict(cfg[key]) for key in parts})
    if found.part:
        names: tuple[str, ...] = ()
    elif found.num_classes < 1:
        raise DetkitError(f"{path} is {found.what}, but its head's last layer is missing: it has no classes")
    elif found.num_classes > MAX_CLASSES:
        raise DetkitError(f"{path} is refused: its head's last layer claims {found.num_classes:,} classes")
    else:
        kept["head"] |= found.head or {}
        kept["image_size"] = source.image_size or 640
        told = source.class_names or ()
        names = told if len(told) == found.num_classes else tuple(f"class{k}" for k in range(found.num_classes))
        if names != told:
            found.notes.append("its classes have no names, or not one each: they are called class0, class1 and so on")
    shapes = _shapes(kept, names)
    fused = 0 if found.part else unfuse(found.tensors, shapes)
    if fused:
        found.notes.append(
            f"{fused} of its batch norms and RepVGG blocks had been fused away: outputs are the same, but a training "
            "should start from the file that was not fused, as their statistics are lost"
        )
    for name in shapes:  # older checkpoints have no such counters, and nothing depends on them
        if name.endswith("num_batches_tracked"):
            found.tensors.setdefault(name, torch.tensor(0))
    odd = _first_odd(shapes, found)
    if odd:
        hint = (
            f"; by its tensors it is {shlex.join(found.choices)}"
            if found.choices and named != shlex.join(found.choices)
            else ""
        )
        raise DetkitError(f"{path} is {found.what}, but does not fit {named}: {odd}{hint}")
    weights = {name: found.tensors[name] for name in shapes}
    return Checkpoint(weights, kept, names, {}, found.part)


def _shapes(cfg: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every tensor of a detector, or of a backbone where ``cfg`` has no more."""
    with torch.device("meta"):
        if "neck" in cfg:
            state = build_detector(cfg, names).state_dict()
        else:
            backbone = BACKBONES.build(cfg["backbone"])
            state = {f"backbone.{name}": tensor for name, tensor in backbone.state_dict().items()}
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def _first_odd(shapes: Mapping[str, tuple[int, ...]], found: Identified) -> str:
    """Say what the first tensor is that does not fit; an empty string where all do."""
    for name, shape in shapes.items():
        if name not in found.tensors:
            return f"its '{name}' is missing"
        theirs = tuple(found.tensors[name].shape)
        if theirs != shape:
            return f"its '{name}' has the shape {list(theirs)} instead of {list(shape)}"
    unknown = [name for name in found.tensors if name not in shapes]
    if not found.part:
        unknown += found.unused
    return f"its {shorten(unknown[0])!r} has no place there" if unknown else ""
