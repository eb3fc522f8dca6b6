"""Whole commands on a GPU: training in every precision, going on, evaluating, predicting, several ranks, benchmarks."""

import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn

from detkit.data.dataset import DetectionDataset, LetterboxDataset
from detkit.data.formats.shapes import read_shapes
from detkit.data.loader import BatchLoader
from detkit.distributed import collectives, process_group
from detkit.engine import saver
from detkit.engine.checkpoint import build_from_checkpoint
from detkit.engine.evaluator import METRICS, evaluate
from detkit.inference.model import TorchModel
from detkit.ops.precision import Precision
from detkit.tasks import benchmark, check, load_config, predict, train
from detkit.tasks import eval as eval_task
from tests.gpu.conftest import SMALL, make_step, noise
from tests.test_resume import assert_same_run, go_on, history

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "train.py"


@pytest.fixture
def overrides(shapes_root: Path, cuda: torch.device) -> list[str]:
    """A run of 2 epochs of 6 batches, saved after each; two batches make a step, each of a size of its own."""
    sizes = ["image_size=64", "batch_size=4", "optim.nominal_batch=8", "optim.warmup_min_batches=2"]
    options = ["trainer.epochs=2", "trainer.save_every=1", "trainer.multi_scale=0.5", f"device={cuda}", "workers=0"]
    return [f"data.root={shapes_root}", "model.width=0.125", *sizes, *options]


def run(*arguments: str) -> dict:
    return train.run(load_config("train", list(arguments)))


@pytest.mark.parametrize(
    "arguments",
    [
        ("amp=off",),
        ("amp=bf16", "workers=2"),
        ("amp=fp16", "optim=sgd"),
        ("amp=bf16", "trainer.compile=true", "trainer.multi_scale=0"),
        ("amp=auto", "model=yolov5n"),
        ("optim=muon", "model=goldyolo_n"),
        ("backbone=revcol_tiny", "backbone.columns=2", "backbone.layers=[1,1,1,1]"),
    ],
    ids=" ".join,
)
def test_a_training_ends_with_all_it_should(arguments, overrides, cuda, tmp_path):
    if cuda.type == "cpu":
        arguments = [argument for argument in arguments if argument not in ("amp=fp16", "trainer.compile=true")]
    results = run(*overrides, *arguments, f"run_dir={tmp_path / 'run'}")
    assert results["last"]["epoch"] == 2
    with open(tmp_path / "run" / "history.csv") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["skipped_steps"]) for row in rows] == [0, 0]
    assert all(float(row["memory_gib"]) > 0 for row in rows)
    assert {"best.safetensors", "state.pt", "metrics.json"} <= {file.name for file in (tmp_path / "run").iterdir()}


@pytest.mark.parametrize(
    "arguments", [("amp=bf16",), ("amp=fp16", "optim=sgd"), ("model=yolov5n", "amp=bf16")], ids=" ".join
)
def test_every_saved_state_leads_to_the_same_end(arguments, overrides, cuda, tmp_path, monkeypatch):
    arguments = [argument for argument in arguments if cuda.type == "cuda" or argument != "amp=fp16"]
    write, saves = saver.write_state, []

    def keep(folder: Path, content: dict, count: int) -> None:
        write(folder, content, count)
        saves.append(tmp_path / f"save{len(saves)}")
        shutil.copytree(folder, saves[-1])

    monkeypatch.setattr(saver, "write_state", keep)
    run(*overrides, *arguments, f"run_dir={tmp_path / 'run'}")
    monkeypatch.undo()
    assert len(saves) == 12
    for save in (saves[2], saves[5], saves[8]):
        go_on(save)
        assert_same_run(save, tmp_path / "run")


def test_a_killed_run_goes_on(overrides, tmp_path):
    """SIGKILL, with 0 or 2 loader processes by turns."""
    run(*overrides, f"run_dir={tmp_path / 'whole'}")
    run_dir, rng = tmp_path / "run", random.Random(time.time_ns())
    arguments = [*overrides, f"run_dir={run_dir}"]
    for turn in range(3):
        process = subprocess.Popen([sys.executable, TOOL, *arguments, f"workers={2 * (turn % 2)}"])
        if turn < 2:
            saved = (run_dir / "state.pt").stat().st_mtime_ns if turn else 0
            while not (run_dir / "state.pt").exists() or (run_dir / "state.pt").stat().st_mtime_ns == saved:
                time.sleep(0.01)
                assert process.poll() is None
            time.sleep(rng.uniform(0, 0.5))
            process.kill()
        assert process.wait(300) in (0, -signal.SIGKILL)
        arguments = [f"resume={run_dir}"]
    assert_same_run(run_dir, tmp_path / "whole")


def test_a_run_changes_its_device(overrides, cuda, tmp_path):
    """To the CPU and back, an epoch on each; the scaler stays behind."""
    run_dir = tmp_path / "run"
    options = [f"run_dir={run_dir}", "trainer.epochs=1", "amp=bf16"]
    run(*[argument for argument in overrides if not argument.startswith("trainer.epochs")], *options)
    go_on(run_dir, "device=cpu", "trainer.epochs=2")
    go_on(run_dir, f"device={cuda}", "trainer.epochs=3")
    assert [row["epoch"] for row in history(run_dir)] == ["1", "2", "3"]


def test_batches_are_page_locked_and_keep_their_layout(shapes_root, cuda):
    annotations = read_shapes("val", root=str(shapes_root))
    dataset = LetterboxDataset(DetectionDataset(annotations), 64, None)
    for workers in (0, 2):
        loader = BatchLoader(dataset, 4, workers=workers, pin=cuda.type == "cuda")
        batches = list(loader.epoch(0))
        assert len(batches) == 3
        for batch in batches:
            moved = batch.to(cuda)
            for mine, theirs in zip(vars(moved).values(), vars(batch).values(), strict=True):
                if isinstance(theirs, torch.Tensor):
                    assert theirs.is_pinned() == (cuda.type == "cuda" and theirs.numel() > 0)
                    assert torch.equal(mine.cpu(), theirs)
            assert moved.images.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_validation_finds_what_a_cpu_finds(amp, finished_run, shapes_root, cuda):
    """Of a detector that was trained on the CPU."""
    detector = build_from_checkpoint(finished_run / "best.safetensors")
    annotations = read_shapes("val", root=str(shapes_root))
    dataset = LetterboxDataset(DetectionDataset(annotations), 64, None)

    def metrics(device: torch.device, amp: str) -> dict[str, float]:
        loader = BatchLoader(dataset, 4, workers=0, pin=device.type == "cuda")
        precision = Precision.from_config(amp if device.type == "cuda" or amp != "fp16" else "bf16", device)
        return evaluate(TorchModel(detector.to(device), precision), loader.epoch(0), annotations).metrics

    mine, theirs = metrics(cuda, amp), metrics(torch.device("cpu"), "off")
    for name in METRICS:
        assert mine[name] == pytest.approx(theirs[name], abs=1e-3 if amp == "off" else 0.02)


def test_evaluating_and_predicting(finished_run, shapes_root, cuda, tmp_path):
    ckpt = f"ckpt={finished_run / 'best.safetensors'}"
    arguments = [ckpt, "workers=2", f"device={cuda}", f"run_dir={tmp_path / 'eval'}"]
    metrics = eval_task.run(load_config("eval", arguments))
    assert set(METRICS) <= metrics.keys()
    found = []
    for k, device in enumerate((cuda, "cpu")):
        out = tmp_path / f"predict{k}"
        arguments = [ckpt, f"source={shapes_root / 'images' / 'val'}", f"run_dir={out}", "score=0.001", "max_det=3"]
        predict.run(load_config("predict", [*arguments, f"device={device}"]))
        found.append(json.loads((out / "predictions.json").read_text()))
    scores = [[detection["score"] for record in records for detection in record["detections"]] for records in found]
    assert scores[0] == pytest.approx(scores[1], abs=1e-3)


def test_one_rank_for_each_gpu(overrides, cuda, tmp_path):
    """As torchrun starts them: one where there is one GPU."""
    count = torch.cuda.device_count() if cuda.type == "cuda" else 1
    arguments = [argument for argument in overrides if not argument.startswith(("batch_size", "optim.nominal_batch"))]
    arguments += [f"batch_size={4 * count}", f"optim.nominal_batch={8 * count}", f"run_dir={tmp_path / 'run'}"]
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={count}", str(TOOL), *arguments]
    subprocess.run(command, check=True, timeout=600, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert load_file(tmp_path / "run" / "best.safetensors")


def test_nccl_carries_a_step(cuda, monkeypatch):
    """One rank that believes that there are two: every sum goes through NCCL, what rank 0 says through gloo."""
    backend = "nccl" if cuda.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        monkeypatch.setattr(process_group, "_cpu_group", dist.new_group(backend="gloo"))
        for module in (collectives, process_group):
            monkeypatch.setattr(module, "world_size", lambda: 2)
        step = make_step(f"model=yolov8n {SMALL}", cuda, "bf16")
        assert isinstance(step.network, nn.parallel.DistributedDataParallel)
        for k in range(3):
            terms = step(noise(cuda), k, 0)
        assert all(term.isfinite() for term in terms.values())
        assert step.health.read().skipped_steps == 0
        assert process_group.run_on_main(lambda: {"a": [1, "b"]}) == {"a": [1, "b"]}
        assert process_group.all_reduce_max(3) == 3
        assert process_group.gather_objects(b"data")[0] == b"data"
        process_group.barrier()
    finally:
        dist.destroy_process_group()


def test_a_benchmark_names_the_card(cuda, capsys):
    arguments = ["task=train", "image_size=64", "batch_size=2", "rounds=1", f"device={cuda}", "model.width=0.125"]
    result = benchmark.run(load_config("benchmark", arguments))
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert line["device_name"] == result["device_name"]
    assert line["device_name"] == (torch.cuda.get_device_name(cuda) if cuda.type == "cuda" else line["device_name"])
    assert all(0 < value < 2000 for value in result["memory_mib"].values()) or cuda.type == "cpu"
    assert line["compile"] is False


def test_check_runs(cuda):
    findings = check.run(load_config("check", [f"device={cuda}", "image_size=64", "num_classes=3"]))
    assert not [finding for finding in findings if finding.status == "fail"]
