"""Turn another project's checkpoint into one of detkit's."""

from pathlib import Path
from typing import Any

from detkit.config import compose_config, resolve
from detkit.engine.checkpoint import Checkpoint, build_from_checkpoint, is_checkpoint, read_checkpoint, write_checkpoint
from detkit.errors import DetkitError
from detkit.report.console import make_console
from detkit.weights.importer import make_checkpoint
from detkit.weights.recognise import Recognised, recognise
from detkit.weights.source import read_source


def run(cfg: dict[str, Any]) -> Checkpoint:
    """Read ``cfg["src"]``, tell what it is (or check that it is the ``model=`` named), write ``cfg["dst"]``.

    Raises:
        DetkitError: a file that cannot be read, that would run code, or of another model; or ``dst`` is taken.
    """
    src, dst = Path(str(cfg["src"])), Path(str(cfg["dst"]))
    _check_destination(dst)
    if is_checkpoint(src):
        if "backbone" in cfg:
            raise DetkitError(f"{src} is a checkpoint of detkit, which says by itself what it is: leave model= out")
        build_from_checkpoint(src)  # whether it is whole
        checkpoint, sentence = read_checkpoint(src), f"{src} is a checkpoint of detkit: copied to {dst}"
    else:
        source = read_source(src)
        found = recognise(src, source.tensors)
        chosen, named = _chosen(src, cfg, found)
        checkpoint = make_checkpoint(src, source, found, chosen, named)
        known = " ".join(found.choices) if found.choices and checkpoint.part else named
        model = f"model={cfg['model']['name']} " if checkpoint.part and "model" in cfg else ""
        sentence = _tell(src, dst, found, f"{model}{known}", checkpoint)
    try:
        write_checkpoint(dst, checkpoint)
    except OSError as error:
        raise DetkitError(f"cannot write dst={dst}: {error.strerror}") from None
    make_console().print(sentence)
    return checkpoint


def _tell(src: Path, dst: Path, found: Recognised, named: str, checkpoint: Checkpoint) -> str:
    """Say what was imported, and what to do with it."""
    told = f"{src} is {found.what} ({named})"
    if checkpoint.part:
        left_out = f", without {len(found.left_out)} other tensors" if found.left_out else ""
        model = "" if named.startswith("model=") else "model=yolov8n "
        return (
            f"{told}: its backbone is in {dst}{left_out}\nto start from it: detkit train {model}{named} weights={dst}"
        )
    names = ", ".join(checkpoint.class_names[:5]) + (", ..." if len(checkpoint.class_names) > 5 else "")
    told += f", {len(checkpoint.class_names)} classes ({names}), {checkpoint.cfg['image_size']} pixels: it is in {dst}"
    return f"{told}\nto measure it: detkit eval ckpt={dst} data=coco data.root=DIR"


def _check_destination(dst: Path) -> None:
    if dst.suffix != ".safetensors":
        raise DetkitError(f"dst={dst} must end in .safetensors: that is what detkit's checkpoints are")
    if dst.exists():
        raise DetkitError(f"dst={dst} exists already: name another file, or remove it")
    if not dst.parent.is_dir():
        raise DetkitError(f"dst={dst}: the folder {dst.parent} does not exist")


def _chosen(src: Path, cfg: dict[str, Any], found: Recognised) -> tuple[dict[str, Any], str]:
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
    return resolve(compose_config("train", ["~data", *found.choices])), " ".join(found.choices)
