"""What trials are about: each target changes one thing in a folder, and says what to run there."""

import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random

import torch

from . import commands
from .binaries import mutate_bytes, mutate_safetensors, mutate_saved, mutate_tar, mutate_zip, save
from .documents import mutate_text
from .material import TRAINING, copy_file, module_checkpoint, stub_classes
from .pictures import mutate_picture, replace_file
from .trial import Trial
from .values import odd_value

TEXTS = (".json", ".yaml", ".xml", ".txt", ".csv")
PICTURES = (".jpg", ".png")


def change_file(rng: Random, file: Path) -> tuple[str, bool]:
    """Change a file as its kind suggests, or its bytes, or put something else in its place.

    Returns:
        what was done, and whether the file must be refused.
    """
    chance, refuse = rng.random(), False
    if chance < 0.1:
        return replace_file(rng, file), False
    content = file.read_bytes()
    if chance < 0.2:
        new, what = mutate_bytes(rng, content)
    elif file.suffix in TEXTS:
        new, what = mutate_text(rng, file.suffix, content)
    elif file.suffix in PICTURES:
        new, what = mutate_picture(rng, content)
    elif file.suffix == ".tar":
        new, what = mutate_tar(rng, content)
    elif file.suffix == ".safetensors":
        new, what = mutate_safetensors(rng, content)
    elif content.startswith(b"PK"):
        new, what, refuse = mutate_zip(rng, content)
    else:
        new, what = mutate_bytes(rng, content)
    file.write_bytes(new)
    return f"{file.name}: {what}", refuse


# Image sets


def _set_trial(
    kind: str, files: list[str], data: list[str], needed: list[str]
) -> Callable[[Random, Path, Path], Trial]:
    """Return a target: a set of which one of ``files`` (or a training picture) is changed, then read in some way."""

    def prepare(rng: Random, material: Path, folder: Path) -> Trial:
        for name in needed:
            source = material / "set" / name
            (shutil.copytree if source.is_dir() else copy_file)(source, folder / "set" / name)
        choices = [file for pattern in files for file in sorted((folder / "set").glob(pattern))]
        file = rng.choice(choices)
        what, _ = change_file(rng, file)
        arguments = [f"data={kind}", *(f"data.{option}" for option in data)]
        strict = ["data.strict=true"] if rng.random() < 0.2 else []
        named = (file.name, file.stem, "the list")
        way = rng.random()
        if way < 0.5:
            return Trial([*arguments, *strict], what, named, "load")
        if way < 0.75:
            return Trial(["check_data", *arguments, "workers=1"], what, named)
        if way < 0.9:
            form = rng.choice(("coco", "yolo", "voc", "webdataset"))
            return Trial(["convert_data", *arguments, f"format={form}", "dst=converted"], what, named)
        return Trial(["train", *TRAINING, *arguments, *strict], what, named)

    return prepare


# Checkpoints


def own_checkpoint(rng: Random, material: Path, folder: Path) -> Trial:
    """A detkit checkpoint, changed; used by whatever reads one."""
    file = copy_file(material / "run" / "best.safetensors", folder / "mine.safetensors")
    what, refuse = change_file(rng, file)
    return Trial(_use(rng, "mine.safetensors", material), what, ("mine.safetensors",), refuse=refuse)


def foreign_checkpoint(rng: Random, material: Path, folder: Path) -> Trial:
    """Another project's checkpoint, changed as a file or in what it holds."""
    refuse, kind = False, rng.randrange(10)
    if kind < 6:
        name = rng.choice(("state.pt", "module.pt", "module.pt", "legacy.pth", "plain.safetensors"))
        file = copy_file(material / "foreign" / name, folder / name)
        what, refuse = change_file(rng, file)
    elif kind < 8:
        content, what = mutate_saved(rng, torch.load(material / "foreign" / "state.pt"))
        file = folder / "state.pt"
        save(content, file)
    else:
        state = torch.load(material / "foreign" / "state.pt")["model"]
        names = rng.choice(
            (
                ["a", "b", ""],
                [" ", "b", "c"],
                ["\x1b[1m", "b", "c"],
                {0: "a", 1: "a", 2: "b"},
                {5: "a"},
                None,
                3,
                ["x" * 10_000] * 3,
            )
        )
        size = rng.choice((320, -64, 0, 2**20, 10**30, "x", None, [320, 320], 3.5, True))
        file = folder / "module.pt"
        with stub_classes() as classes:
            content = module_checkpoint(state, classes, names=names)
            content["train_args"]["imgsz"] = size
            content[rng.choice(("ema", "model", "x"))] = rng.choice((content["model"], None, odd_value(rng)))
            save(content, file)
        what = f"names are {names!r:.60}, imgsz is {size!r}"
    if rng.random() < 0.8:
        return Trial(["import_weights", f"src={file.name}", "dst=new.safetensors"], what, (file.name,), refuse=refuse)
    return Trial(_use(rng, file.name, material), what, (file.name,), refuse=refuse)


def _use(rng: Random, name: str, material: Path) -> list[str]:
    data = ["data=coco", f"data.root={material}/set"]
    return rng.choice(
        (
            ["predict", f"ckpt={name}", f"source={material}/set/images/val"],
            ["predict", f"ckpt={name}", f"source={material}/set/images/val", "image_size=64"],
            ["eval", f"ckpt={name}", "workers=0"],
            ["eval", f"ckpt={name}", "workers=0", "image_size=64", *data],
            ["import_weights", f"src={name}", "dst=new.safetensors"],
            ["train", *TRAINING, f"weights={name}", *data],
        )
    )


# Run directories


def run_directory(rng: Random, material: Path, folder: Path) -> Trial:
    """A finished run of which one file is changed, resumed; in some trials for another epoch."""
    shutil.copytree(material / "run", folder / "run")
    names = ("state.pt",) * 6 + ("config.yaml",) * 5 + ("metrics.json", "history.csv", "loggers.json") * 2
    name = rng.choice((*names, "best.safetensors", "last.safetensors", "state-1.pt", ".lock"))
    file = folder / "run" / name
    if name == "state.pt" and rng.random() < 0.7:
        content, what = mutate_saved(rng, torch.load(file, weights_only=True))
        save(content, file)
    elif name == ".lock":
        what = replace_file(rng, file) if file.exists() else "nothing"
    else:
        what, _ = change_file(rng, file)
    more = rng.choice(([], [], ["trainer.epochs=2"]))
    return Trial(["train", "resume=run", *more], f"{name}: {what}", (name,))


# Pictures


def picture(rng: Random, material: Path, folder: Path) -> Trial:
    """A picture, changed, alone or in a folder, given to ``predict``."""
    name = f"picture{rng.choice(('.jpg', '.png', '.webp', '.tif', '.bmp', '.JPEG', '.gif', '.txt', ''))}"
    source = material / "set" / "images" / "val" / "val ü0.jpg"
    file = copy_file(source, folder / "pictures" / name)
    if rng.random() < 0.85:
        new, what = mutate_picture(rng, file.read_bytes())
        file.write_bytes(new)
    else:
        what = replace_file(rng, file)
    copy_file(source, folder / "pictures" / "sound.jpg")
    chosen = rng.choice(("pictures", f"pictures/{name}"))
    arguments = ["predict", f"ckpt={material}/run/best.safetensors", f"source={chosen}", "score=0.0001"]
    return Trial(arguments, f"{name}: {what}", (name, "pictures"))


TARGETS: dict[str, Callable[[Random, Path, Path], Trial]] = {
    "coco": _set_trial(
        "coco",
        ["annotations/instances_train.json"] * 6 + ["images/train/*"],
        ["root=set"],
        ["annotations", "images"],
    ),
    "yolo": _set_trial(
        "yolo",
        ["labels/train/*.txt"] * 2 + ["data.yaml"] * 6 + ["images/train/*"],
        ["yaml=set/data.yaml"],
        ["labels", "images", "data.yaml"],
    ),
    "yolo_lists": _set_trial(
        "yolo",
        ["train.txt"] * 2 + ["lists.yaml"],
        ["yaml=set/lists.yaml"],
        ["labels", "images", "lists.yaml", "train.txt", "val.txt"],
    ),
    "voc": _set_trial(
        "voc",
        ["Annotations/train*.xml"] * 2 + ["ImageSets/Main/train.txt"] * 3 + ["images/train/*"],
        ["root=set"],
        ["Annotations", "ImageSets", "images"],
    ),
    "webdataset": _set_trial(
        "webdataset",
        ["shards/train.json", "shards/train-000000.tar", "shards/train-000000.tar"],
        ["root=set/shards"],
        ["shards"],
    ),
    "checkpoints": own_checkpoint,
    "foreign": foreign_checkpoint,
    "runs": run_directory,
    "pictures": picture,
    "commands": commands.prepare,
}
