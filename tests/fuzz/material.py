"""The sound files that trials change: one small set in four formats, a finished run, other projects' checkpoints."""

import json
import shutil
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from .pictures import encode
from .trial import Server

CLASSES = ("RBC", "WBC", "Platelets")
TRAINING = ("image_size=64", "batch_size=2", "workers=0", "device=cpu", "model.width=0.0625", "trainer.epochs=1")
# Where the layers of a published YOLOv8 are in its flat list.
_BACKBONE = ["stem", *(f"stages.{k}.{j}" for k in range(4) for j in range(2))]
_YOLOV8 = {f"backbone.{name}": k for k, name in enumerate(_BACKBONE)} | {
    "neck.context": 9,
    "neck.top_down.0": 12,
    "neck.top_down.1": 15,
    "neck.downs.0": 16,
    "neck.bottom_up.0": 18,
    "neck.downs.1": 19,
    "neck.bottom_up.1": 21,
}
_YOLOV8_HEAD = {"head.box_branches": "cv2", "head.cls_branches": "cv3", "head.bins": "dfl.conv.weight"}


def make_material(root: Path, server: Server) -> None:
    """Fill ``root`` with ``set`` (four formats side by side), ``run``, and ``foreign``.

    Raises:
        AssertionError: a command that should work does not.
    """
    root.mkdir(parents=True, exist_ok=True)
    _write_set(root / "set")
    _run(server, root, "convert_data", "data=coco", f"data.root={root}/set", "format=webdataset", f"dst={root}/shards")
    (root / "shards").rename(root / "set" / "shards")
    options = (*TRAINING, "trainer.save_every=1", f"run_dir={root}/run", "data=coco", f"data.root={root}/set")
    _run(server, root, "train", *options)
    (root / "run" / "loggers.json").write_text(json.dumps({"wandb": "abc123", "mlflow": "def456"}))
    _write_foreign(root / "foreign")


def _run(server: Server, folder: Path, *arguments: str) -> None:
    outcome = server.run("cli", list(arguments), folder)
    assert outcome.status == 0, outcome


def _write_set(root: Path) -> None:
    """Three pictures a split, with a name that is not ASCII; COCO json, YOLO txt, VOC xml, and both kinds of lists."""
    rng = Random(0)
    for folder in ("annotations", "Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    for split in ("train", "val"):
        (root / "images" / split).mkdir(parents=True)
        (root / "labels" / split).mkdir(parents=True)
        images, annotations, names = [], [], []
        for k in range(3):
            stem, form = f"{split} ü{k}", ("JPEG", "PNG", "JPEG")[k]
            name = f"{stem}.{'png' if form == 'PNG' else 'jpg'}"
            (root / "images" / split / name).write_bytes(encode(form, _noise(rng)))
            (root / "labels" / split / f"{stem}.txt").write_text("0 0.5 0.5 0.5 0.5\n1 0.25 0.25 0.2 0.3\n")
            box = "<bndbox><xmin>16</xmin><ymin>12</ymin><xmax>48</xmax><ymax>36</ymax></bndbox>"
            objects = "".join(f"<object><name>{c}</name><difficult>0</difficult>{box}</object>" for c in CLASSES)
            size = "<size><width>64</width><height>48</height><depth>3</depth></size>"
            xml = f"<annotation><filename>{name}</filename>{size}{objects}</annotation>"
            (root / "Annotations" / f"{stem}.xml").write_text(xml)
            images.append({"id": k, "file_name": name, "height": 48, "width": 64})
            annotations += [
                {"id": 3 * k + c, "image_id": k, "category_id": c, "bbox": [16, 12, 32, 24], "area": 768, "iscrowd": 0}
                for c in range(3)
            ]
            names.append(name)
        categories = [{"id": k, "name": name, "supercategory": "cell"} for k, name in enumerate(CLASSES)]
        annotations[0]["segmentation"] = [[16, 12, 48, 12, 48, 36]]
        content = {"info": {}, "images": images, "annotations": annotations, "categories": categories}
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
        (root / "ImageSets" / "Main" / f"{split}.txt").write_text("".join(f"{Path(n).stem}\n" for n in names))
        (root / f"{split}.txt").write_text("".join(f"images/{split}/{name}\n" for name in names))
    names = "names:\n" + "".join(f"  {k}: {name}\n" for k, name in enumerate(CLASSES))
    (root / "data.yaml").write_text(f"train: images/train\nval: images/val\nnc: {len(CLASSES)}\n{names}")
    (root / "lists.yaml").write_text("path: .\ntrain:\n  - train.txt\nval: val.txt\nnames: [RBC, WBC, Platelets]\n")


def _noise(rng: Random) -> Image.Image:
    return Image.frombytes("RGB", (64, 48), rng.randbytes(64 * 48 * 3))


def _write_foreign(root: Path) -> None:
    """A published YOLOv8n's layout, in half precision: as its own project saves it, as a state dict, and so on."""
    from detkit import create_model

    root.mkdir()
    state = yolov8_state(create_model("yolov8n", num_classes=len(CLASSES)).state_dict())
    torch.save({"model": state, "epoch": 3}, root / "state.pt")
    torch.save({"state_dict": state}, root / "legacy.pth", _use_new_zipfile_serialization=False)
    save_file(state, root / "plain.safetensors")
    with stub_classes() as classes:
        torch.save(module_checkpoint(state, classes), root / "module.pt")


def yolov8_state(own: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return detkit's YOLOv8 tensors under the names they have in the published checkpoints, as float16."""
    state = {}
    for name, tensor in own.items():
        layer = next((b for b in sorted(_YOLOV8, key=len, reverse=True) if name.startswith(f"{b}.")), None)
        branch = next((b for b in _YOLOV8_HEAD if name.startswith(b)), None)
        assert layer or branch, name
        new = f"model.{_YOLOV8[layer]}{name.removeprefix(layer)}" if layer else ""
        new = new or f"model.22.{_YOLOV8_HEAD[branch]}{name.removeprefix(branch)}"
        tensor = tensor.view(1, -1, 1, 1) if name == "head.bins" else tensor
        state[new] = tensor.half().contiguous() if tensor.is_floating_point() else tensor
    return state


def module_checkpoint(state: dict[str, Tensor], classes: dict[str, type], **attributes) -> dict:
    """Return what a training of that project saves: a module of its own classes, and its arguments."""
    root = classes["DetectionModel"]()
    for name, tensor in state.items():
        *path, leaf = name.split(".")
        node = root
        for step in path:
            if step not in node._modules:
                node.add_module(step, nn.Module())
            node = node._modules[step]
        if "running" in leaf or "num_batches" in leaf:
            node.register_buffer(leaf, tensor)
        else:
            node.register_parameter(leaf, nn.Parameter(tensor))
    root.__dict__.update({"names": dict(enumerate(CLASSES)), "yaml": {"nc": len(CLASSES)}} | attributes)
    return {"epoch": -1, "model": root, "ema": None, "train_args": {"imgsz": 320, "model": "yolov8n.pt"}, "date": "x"}


@contextmanager
def stub_classes() -> Iterator[dict[str, type]]:
    """Classes of another project, which exist while something is pickled, and not when it is read."""
    module = types.ModuleType("ultralytics.nn.tasks")
    module.DetectionModel = type("DetectionModel", (nn.Module,), {"__module__": module.__name__})
    names = ("ultralytics", "ultralytics.nn", "ultralytics.nn.tasks")
    sys.modules.update(dict.fromkeys(names, module))
    try:
        yield {"DetectionModel": module.DetectionModel}
    finally:
        for name in names:
            del sys.modules[name]


def copy_file(source: Path, target: Path) -> Path:
    """Copy a file into a folder that may not be there yet; return the copy."""
    target.parent.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copyfile(source, target))
