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
        build_from_checkpoint(src)  # whether it is whole
        checkpoint, told = read_checkpoint(src), "a checkpoint of detkit"
    else:
        source = read_source(src)
        found = recognise(src, source.tensors)
        chosen, named = _chosen(src, cfg, found)
        checkpoint, told = make_checkpoint(src, source, found, chosen, named), f"{found.what}, {named}"
    write_checkpoint(dst, checkpoint)

    console = make_console()
    if checkpoint.part:
        left_out = (
            f"; {len(found.left_out)} other tensors left out, such as {found.left_out[0]}" if found.left_out else ""
        )
        console.print(f"{src} is {told}: its backbone is in {dst}{left_out}")
        console.print(f"start a training from it: detkit train model=yolov8n {named} weights={dst}")
    else:
        names = ", ".join(checkpoint.class_names[:5]) + (", ..." if len(checkpoint.class_names) > 5 else "")
        console.print(f"{src} is {told}, {len(checkpoint.class_names)} classes ({names}): it is in {dst}")
        console.print(f"evaluate it: detkit eval ckpt={dst} data=coco data.root=DIR")
    return checkpoint


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
        raise DetkitError(f"{src} is {found.what}, but of which size its tensors do not tell: add model=NAME")
    return resolve(compose_config("train", ["~data", *found.choices])), " ".join(found.choices)
