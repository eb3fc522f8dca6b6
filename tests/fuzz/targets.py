"""What trials are about: each target changes one thing in a folder, and says what to run there."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch

from .binaries import mutate_bytes, mutate_safetensors, mutate_tar
from .commands import command_line
from .documents import mutate_text
from .material import TRAINING, copy_file, module_checkpoint, stub_classes
from .pictures import mutate_picture, replace_file
from .torch_files import mutate_saved, mutate_zip
from .trial import Trial
from .values import odd_value

TEXTS = (".json", ".yaml", ".xml", ".txt", ".csv")
PICTURES = (".jpg", ".png")
# What other projects' checkpoints may say.
NAMES = (
    *(["a", "b", ""], [" ", "b", "c"], ["\x1b[1m", "b", "c"], ["x" * 10_000] * 3, {0: "a", 1: "a", 2: "b"}, {5: "a"}),
    *(None, 3, [], {}, ["a"], [1, 2, 3], "abc"),
)
SIZES = (320, -64, 0, 2**20, 10**30, "x", None, [320, 320], 3.5, True)


def change_file(rng: Random, file: Path) -> tuple[str, bool]:
    """Change a file as its kind suggests, or its bytes, or put something else in its place.

    Returns:
        what was done, and whether using the file would be wrong.
    """
    chance = rng.random()
    if chance < 0.1:
        return replace_file(rng, file), False
    content = file.read_bytes()
    if chance < 0.2:
        change = mutate_bytes(rng, content)
    elif file.suffix in TEXTS:
        change = mutate_text(rng, file.suffix, content)
    elif file.suffix in PICTURES:
        change = mutate_picture(rng, content)
    elif file.suffix == ".tar":
        change = mutate_tar(rng, content)
    elif file.suffix == ".safetensors":
        change = mutate_safetensors(rng, content)
    elif content.startswith(b"PK"):
        change = mutate_zip(rng, content)
    else:
        change = mutate_bytes(rng, content)
    file.write_bytes(change.content)
    return f"{file.name}: {change.what}", change.refuse


# Image sets


@dataclass(frozen=True)
class ImageSet:
    """A set of which one file is changed.

    Attributes:
        options: of the command line, which read it.
        needed: what of the material's set it consists of.
        changed: patterns of files that may be changed, each as often as another.
    """

    options: tuple[str, ...]
    needed: tuple[str, ...]
    changed: tuple[str, ...]

    def __call__(self, rng: Random, material: Path, folder: Path) -> Trial:
        """The set with a changed file, read in one of the ways there are."""
        for name in self.needed:
            source = material / "set" / name
            (shutil.copytree if source.is_dir() else copy_file)(source, folder / "set" / name)
        file = rng.choice(sorted((folder / "set").glob(rng.choice(self.changed))))
        what, refuse = change_file(rng, file)
        named = (file.name, file.stem, "the list")
        strict = ["data.strict=true"] if rng.random() < 0.2 else []
        way = rng.random()
        if way < 0.65:
            return Trial([*self.options, *strict], what, named, "load", refuse)
        if way < 0.8:
            return Trial(["check_data", *self.options, "workers=1"], what, named, refuse=refuse)
        if way < 0.93:
            form = rng.choice(("coco", "yolo", "voc", "webdataset"))
            return Trial(["convert_data", *self.options, f"format={form}", "dst=new"], what, named, refuse=refuse)
        return Trial(["train", *TRAINING, *self.options, *strict], what, named, refuse=refuse)


SETS = {
    "coco": ImageSet(
        ("data=coco", "data.root=set"),
        ("annotations", "images"),
        (*["annotations/instances_train.json"] * 3, "images/train/*"),
    ),
    "yolo": ImageSet(
        ("data=yolo", "data.yaml=set/data.yaml"),
        ("labels", "images", "data.yaml"),
        ("data.yaml", "data.yaml", "labels/train/*.txt", "images/train/*"),
    ),
    "yolo_lists": ImageSet(
        ("data=yolo", "data.yaml=set/lists.yaml"),
        ("labels", "images", "lists.yaml", "train.txt", "val.txt"),
        ("lists.yaml", "train.txt", "train.txt"),
    ),
    "voc": ImageSet(
        ("data=voc", "data.root=set"),
        ("Annotations", "ImageSets", "images"),
        ("Annotations/train*.xml", "Annotations/train*.xml", "ImageSets/Main/train.txt", "images/train/*"),
    ),
    "webdataset": ImageSet(
        ("data=webdataset", "data.root=set/shards"),
        ("shards",),
        ("shards/train.json", "shards/train-000000.tar", "shards/train-000000.tar"),
    ),
}


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
        torch.save(content, file)
    else:
        state = torch.load(material / "foreign" / "state.pt")["model"]
        names, size = rng.choice(NAMES), rng.choice(SIZES)
        file = folder / "module.pt"
        with stub_classes() as classes:
            content = module_checkpoint(state, classes, names=names)
            content["train_args"]["imgsz"] = size
            content[rng.choice(("ema", "model", "x"))] = rng.choice((content["model"], None, odd_value(rng)))
            torch.save(content, file)
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
    name = rng.choice((*names, "best.safetensors", "last.safetensors", "state-1.pt", ".lock", ".filelock"))
    file = folder / "run" / name
    if name == "state.pt" and rng.random() < 0.7:
        content, what = mutate_saved(rng, torch.load(file, weights_only=True))
        torch.save(content, file)
        what = f"{name}: {what}"
    elif name in (".lock", ".filelock"):
        what = replace_file(rng, file) if file.exists() else "nothing"
    else:
        what, _ = change_file(rng, file)
    more = rng.choice(([], [], ["trainer.epochs=2"]))
    alike = {"config.yaml", "state.pt"}  # both hold the configuration
    return Trial(["train", "resume=run", *more], what, tuple({name, *alike} if name in alike else {name}))


# Pictures


def picture(rng: Random, material: Path, folder: Path) -> Trial:
    """A picture, changed, alone or in a folder, given to ``predict``."""
    name = f"picture{rng.choice(('.jpg', '.png', '.webp', '.tif', '.bmp', '.JPEG', '.gif', '.txt', ''))}"
    source = material / "set" / "images" / "val" / "val ü0.jpg"
    file = copy_file(source, folder / "pictures" / name)
    if rng.random() < 0.85:
        change = mutate_picture(rng, file.read_bytes())
        file.write_bytes(change.content)
        what = change.what
    else:
        what = replace_file(rng, file)
    copy_file(source, folder / "pictures" / "sound.jpg")
    chosen = rng.choice(("pictures", f"pictures/{name}"))
    arguments = ["predict", f"ckpt={material}/run/best.safetensors", f"source={chosen}", "score=0.0001"]
    return Trial(arguments, f"{name}: {what}", (name, "pictures"))


TARGETS: dict[str, Callable[[Random, Path, Path], Trial]] = {
    **SETS,
    "checkpoints": own_checkpoint,
    "foreign": foreign_checkpoint,
    "runs": run_directory,
    "pictures": picture,
    "commands": command_line,
}
