"""Sets with mutated files finish or are refused in a sentence; nothing else is raised, nothing hangs."""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detkit.data.coco import read_coco
from detkit.data.dataset import DetectionDataset, LetterboxDataset
from detkit.data.loader import BatchLoader
from detkit.data.voc import read_voc
from detkit.data.yolo import read_yolo
from detkit.errors import DetkitError

CASES = 60  # a format
NONSENSE = [
    None,
    True,
    -1,
    0,
    3.7,
    10**30,
    -(2**63),
    1e308,
    float("nan"),
    float("inf"),
    "",
    "text",
    "\ud800",
    [],
    {},
    [[]],
]
TOKENS = ["nan", "-1", "1e999", "", "text", "0", "99999999999999999999", "\x00", "ü", "<a>", "&x;", "]]>", "1_0", "0x1"]


def mutate_json(rng: random.Random, content: object) -> None:
    """Replace, drop or repeat one value anywhere in a json document."""
    places = []

    def walk(node):
        if isinstance(node, (dict, list)):
            for key in node if isinstance(node, dict) else range(len(node)):
                places.append((node, key))
                walk(node[key])

    walk(content)
    node, key = rng.choice(places)
    change = rng.randrange(4)
    if change == 0 and isinstance(node, dict):
        del node[key]
    elif change == 1 and isinstance(node, list):
        node.append(node[key])
    else:
        node[key] = rng.choice(NONSENSE)


def mutate_bytes(rng: random.Random, content: bytes) -> bytes:
    """Cut, overwrite, insert or empty."""
    at = rng.randrange(max(len(content), 1))
    noise = rng.randbytes(rng.randrange(1, 20))
    return rng.choice(
        [content[:at], content[:at] + noise + content[at + len(noise) :], content[:at] + noise + content[at:], b""]
    )


def mutate_text(rng: random.Random, content: bytes) -> bytes:
    """Replace one word or number."""
    words = content.decode(errors="replace").replace(">", "> ").replace("<", " <").split(" ")
    words[rng.randrange(len(words))] = rng.choice(TOKENS)
    return " ".join(words).encode("utf-8", "surrogatepass")


def mutate_labels(rng: random.Random, file: Path) -> None:
    """Change one label file."""
    content = file.read_bytes()
    if file.suffix == ".json" and rng.random() < 0.8:
        content = json.loads(content)
        for _ in range(rng.randrange(1, 4)):
            mutate_json(rng, content)
        file.write_text(json.dumps(content))
    else:
        file.write_bytes((mutate_text if rng.random() < 0.7 else mutate_bytes)(rng, content))


def mutate_image(rng: random.Random, file: Path) -> None:
    """Change one image file, or put something else in its place."""
    content = file.read_bytes()
    kind = rng.randrange(6)
    if kind < 3:
        file.write_bytes(mutate_bytes(rng, content))
        return
    file.unlink()
    if kind == 3:
        os.symlink(file.name, file)
    elif kind == 4:
        os.mkfifo(file)
    else:
        file.mkdir()


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    """One set of four pictures a split in the three formats."""
    root = tmp_path_factory.mktemp("sound")
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for folder in ("images", "labels"):
            (root / folder / split).mkdir(parents=True)
        for folder in ("annotations", "voc/Annotations", "voc/ImageSets/Main"):
            (root / folder).mkdir(parents=True, exist_ok=True)
        images, annotations, names = [], [], []
        for k in range(4):
            name = f"{split} ü{k}"
            picture = Image.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8))
            picture.save(root / "images" / split / f"{name}.{'png' if k == 3 else 'jpg'}")
            (root / "labels" / split / f"{name}.txt").write_text("0 0.5 0.5 0.5 0.5\n1 0.25 0.25 0.2 0.3\n")
            box = "<bndbox><xmin>16</xmin><ymin>12</ymin><xmax>48</xmax><ymax>36</ymax></bndbox>"
            size = "<size><width>64</width><height>48</height></size>"
            objects = "".join(f"<object><name>{c}</name>{box}</object>" for c in "ab")
            xml = f"<annotation>{size}{objects}</annotation>"
            (root / "voc" / "Annotations" / f"{name}.xml").write_text(xml)
            images.append({"id": k, "file_name": f"{name}.{'png' if k == 3 else 'jpg'}", "height": 48, "width": 64})
            for c in (1, 2):
                annotations.append(
                    {"id": 2 * k + c, "image_id": k, "category_id": c, "bbox": [16, 12, 32, 24], "area": 9}
                )
            names.append(name)
        categories = [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
        (root / "voc" / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(names))
    (root / "data.yaml").write_text("train: images/train\nval: images/val\nnames: [a, b]\n")
    return root


FORMATS: dict[str, tuple[list[str], Callable]] = {
    "coco": (["annotations/instances_train.json"], lambda root: read_coco("train", root=str(root))),
    "yolo": (
        ["labels/train/train ü1.txt"] * 3 + ["data.yaml"],
        lambda root: read_yolo("train", yaml=str(root / "data.yaml")),
    ),
    "voc": (
        ["voc/Annotations/train ü1.xml"] * 3 + ["voc/ImageSets/Main/train.txt"],
        lambda root: read_voc("train", root=str(root)),
    ),
}


@pytest.mark.parametrize("kind", FORMATS)
def test_mutated_labels_and_images_are_used_or_refused(sound, tmp_path, kind):
    files, read = FORMATS[kind]
    outcomes = {"used": 0, "refused": 0}
    for case in range(CASES):
        rng = random.Random(case)
        root = tmp_path / f"{case}"
        shutil.copytree(sound, root)
        mutate_labels(rng, root / rng.choice(files))
        mutate_image(rng, rng.choice(sorted((root / "images" / "train").iterdir())))
        try:
            annotations = read(root)
            assert np.isfinite(annotations.boxes).all()
            assert (annotations.boxes[:, 2:] > annotations.boxes[:, :2]).all()
            images = sum(len(batch.images) for batch in BatchLoader(
                LetterboxDataset(DetectionDataset(annotations), 64), 2, workers=0
            ).epoch(0))  # fmt: skip
            assert images <= len(annotations)
            outcomes["used"] += 1
        except DetkitError as error:
            assert "\n" not in str(error), error
            outcomes["refused"] += 1
    assert outcomes["used"] > CASES / 3, outcomes
