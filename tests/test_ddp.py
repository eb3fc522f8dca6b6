"""Two processes against one: the same gradients, weights and metrics; and how a run of several ends."""

import csv
import json
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import detkit
from detkit.data.annotations import Annotations
from detkit.data.dataset import DetectionDataset, LetterboxDataset
from detkit.data.loader import BatchLoader
from detkit.data.shapes import read_shapes
from detkit.engine import distributed
from detkit.engine.evaluator import evaluate
from detkit.engine.optim import Recipe, Schedule
from detkit.engine.precision import Precision
from detkit.engine.step import TrainStep
from detkit.errors import DetkitError
from detkit.layers.sync_norm import SyncBatchNorm, synchronise_norms
from detkit.models.detector import build_loss
from detkit.ops.ranks import rank_count

TOOLS = Path(__file__).parents[1] / "tools"
CPU = torch.device("cpu")


def take_part(rank: int, work, folder: Path, arguments: tuple) -> None:
    """Be one of two ranks; leave what ``work`` returns in a file."""
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meet"
    torch.distributed.init_process_group(
        "gloo", meeting, world_size=2, rank=rank, timeout=timedelta(seconds=60)
    )
    torch.save(work(*arguments), folder / f"result{rank}.pt")
    torch.distributed.destroy_process_group()


def on_two_ranks(folder: Path, work, *arguments) -> list:
    """Return what ``work`` returns on either of two ranks."""
    context = torch.multiprocessing.get_context("spawn")
    ranks = [context.Process(target=take_part, args=(r, work, folder, arguments), daemon=True) for r in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
    assert [process.exitcode for process in ranks] == [0, 0]
    return [torch.load(folder / f"result{rank}.pt") for rank in range(2)]


def make_step(model: str, num_classes: int = 5, **swaps: str) -> TrainStep:
    torch.manual_seed(0)
    detector = detkit.create_model(model, num_classes=num_classes, **swaps).train()
    if rank_count() > 1:
        synchronise_norms(detector)
    recipe = Recipe("sgd", 0.01, 0.9, 5e-4, 0.1)
    schedule = Schedule(recipe, epochs=10, final=0.01, shape="linear", warmup=0, warmup_momentum=0.8)
    loss = build_loss({"loss": {"name": detector.cfg["loss"]["name"]}}, detector.head)
    return TrainStep(detector, loss, recipe, schedule, Precision(CPU, None), accumulate=1, clip=10.0)


class Drawn(torch.utils.data.Dataset):
    """Seven images: the boxes of a batch's halves are few, many, or none."""

    counts = (3, 0, 1, 5, 0, 0, 2)

    def __len__(self) -> int:
        return len(self.counts)

    def __getitem__(self, key):
        from detkit.structures import Origin, Sample

        rng = np.random.default_rng(key[1])
        n = self.counts[key[1]]
        corner = rng.uniform(0, 30, (n, 2))
        boxes = np.concatenate((corner, corner + rng.uniform(8, 33, (n, 2))), 1).astype(np.float32)
        image = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
        return Sample(image, boxes, rng.integers(0, 5, n), Origin(key[1], Path(), (64, 64)))


def train_two_epochs(model: str, swaps: dict[str, str], batch_size: int) -> dict[str, dict]:
    """Train on Drawn in order; return first gradients, last weights, average, and every step's losses."""
    step = make_step(model, **swaps)
    loader = BatchLoader(Drawn(), batch_size, workers=0)
    first: dict[str, torch.Tensor] = {}
    update = step.update

    def keep_gradients() -> None:
        if not first:
            first.update({n: p.grad.clone() for n, p in step.detector.named_parameters() if p.grad is not None})
        update()

    step.update = keep_gradients
    losses = []
    for epoch in range(2):
        for batch in loader.epoch(epoch):
            losses.append({name: float(term) for name, term in step(batch, len(losses), epoch).items()})
    return {
        "gradients": first,
        "weights": step.detector.state_dict(),
        "average": step.ema.model.state_dict(),
        "losses": losses,
    }


def difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """The largest difference of two sets of tensors, relative to each tensor's largest value."""
    assert a.keys() == b.keys()
    pairs = [(a[name].double(), b[name].double()) for name in a]
    return max(float((x - y).abs().max() / y.abs().max().clamp(min=1e-2)) for x, y in pairs if y.numel())


@pytest.mark.parametrize(
    ("model", "swaps", "batch_size"),
    [("yolov8n", {}, 4), ("yolov8n", {}, 6), ("yolov5n", {}, 6)],
    ids=["one-without-boxes", "one-without-image", "anchors"],
)
def test_two_ranks_train_as_one(model, swaps, batch_size, tmp_path):
    """Of 7 images in batches of 4, the second batch has boxes on the second rank only; of 6, it is a single image."""
    alone = train_two_epochs(model, swaps, batch_size)
    for rank in on_two_ranks(tmp_path, train_two_epochs, model, swaps, batch_size):
        for name in ("gradients", "weights", "average"):
            print(name, difference(rank[name], alone[name]))
        for mine, theirs in zip(rank["losses"], alone["losses"], strict=True):
            print(mine, theirs)
