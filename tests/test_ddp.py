"""Two processes against one: the same gradients, weights and metrics; and how a run of several ends."""

import copy
import csv
import json
import os
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from timm.layers import BatchNormAct2d
from torch import nn

import detkit
from detkit.data.dataset import DetectionDataset, LetterboxDataset
from detkit.data.formats.shapes import read_shapes
from detkit.data.loader import BatchLoader
from detkit.distributed import process_group, rendezvous
from detkit.distributed.collectives import world_size
from detkit.distributed.sync_batch_norm import SyncBatchNorm, convert_sync_batchnorm
from detkit.engine.evaluator import evaluate
from detkit.engine.optimizer import Recipe, Schedule
from detkit.engine.step import TrainStep
from detkit.errors import DetkitError
from detkit.models.detector import build_loss
from detkit.ops.nms import Thresholds
from detkit.ops.precision import Precision
from detkit.structures import ImageMeta, Sample
from detkit.tasks import eval as eval_task
from detkit.tasks import load_config

ROOT = Path(__file__).parents[1]
CASES = {  # model, batch norms, images of a batch
    "boxes on one rank only": ("yolov8n", "frozen", 4),
    "an image for one rank only": ("yolov8n", "frozen", 6),
    "synchronised": ("yolov8n", "sync", 6),
    "anchors": ("yolov5n", "sync", 4),
}


class Drawn(torch.utils.data.Dataset):
    """Seven noise images of 64 px in their order; in batches of 4, the second has boxes in its last image alone."""

    boxes = (3, 0, 1, 5, 0, 0, 2)

    def __len__(self) -> int:
        return len(self.boxes)

    def __getitem__(self, key):
        rng = np.random.default_rng(key[1])
        n = self.boxes[key[1]]
        corner = rng.uniform(0, 30, (n, 2))
        boxes = np.concatenate((corner, corner + rng.uniform(8, 33, (n, 2))), 1).astype(np.float32)
        image = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
        return Sample(image, boxes, rng.integers(0, 5, n), ImageMeta(key[1], Path(), (64, 64)))


def train(model: str, norms: str, batch_size: int) -> dict:
    """Train for two epochs of two batches; return the first gradients, the last weights, their average, all losses."""
    torch.manual_seed(0)
    detector = detkit.create_model(model, num_classes=5)
    detector.train(norms == "sync")
    if norms == "sync" and world_size() > 1:
        convert_sync_batchnorm(detector)
    recipe = Recipe("sgd", 0.01, 0.9, 5e-4, 0.1)
    schedule = Schedule(recipe, epochs=10, final=0.01, shape="linear", warmup=0, warmup_momentum=0.8)
    loss = build_loss(detector.cfg, detector.head)
    precision = Precision(torch.device("cpu"), None)
    step = TrainStep(detector, loss, recipe, schedule, precision, accumulate=1, clip=10.0)
    gradients: dict[str, torch.Tensor] = {}
    update = step.update

    def keep_the_first() -> None:
        found = {name: p.grad.clone() for name, p in detector.named_parameters() if p.grad is not None}
        gradients.update({} if gradients else found)
        update()

    step.update = keep_the_first
    loader = BatchLoader(Drawn(), batch_size, workers=0)
    losses = []
    for epoch in range(2):
        for batch in loader.epoch(epoch):
            losses.append([float(term.detach()) for term in step(batch, len(losses), epoch).values()])
    floating = {name: w for name, w in step.ema.model.state_dict().items() if w.is_floating_point()}
    return {"gradients": gradients, "weights": detector.state_dict(), "average": floating, "losses": losses}


def normalise(norm: nn.BatchNorm2d, share: slice) -> dict[str, torch.Tensor]:
    """Send a share of a batch, far from zero, through a batch norm and back."""
    rng = torch.Generator().manual_seed(0)
    x = (100 + torch.randn(5, 3, 4, 6, generator=rng))[share].requires_grad_()
    (norm.train()(x) * torch.randn(5, 3, 4, 6, generator=rng)[share]).sum().backward()
    return {"x": x.grad, "grad_weight": norm.weight.grad, "grad_bias": norm.bias.grad, **norm.state_dict()}


def predict(root: Path) -> tuple[dict, list]:
    """Evaluate an untrained detector, all its boxes, on 10 images in batches of 4."""
    torch.manual_seed(0)
    val = read_shapes("val", root=str(root))
    loader = BatchLoader(LetterboxDataset(DetectionDataset(val), 64), 4, workers=0)
    result = evaluate(
        detkit.create_model("yolov8n", num_classes=5).as_model("off"),
        loader.epoch(0),
        val,
        Thresholds(0.0, multi_label=True),
    )
    return result.metrics, result.predictions


def refuse() -> None:
    raise DetkitError("not here")


def be_a_rank(rank: int, folder: Path, root: Path) -> None:
    """Do all of the above as one of two ranks."""
    torch.set_num_threads(1)
    limit = timedelta(seconds=60)
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", world_size=2, rank=rank, timeout=limit)
    found = {case: train(*arguments) for case, arguments in CASES.items()}
    found["norm"] = normalise(SyncBatchNorm(3), slice(0, 2) if rank == 0 else slice(2, 5))
    model = nn.Sequential(BatchNormAct2d(3))
    convert_sync_batchnorm(model)
    found["norm_act"] = normalise(model[0], slice(0, 2) if rank == 0 else slice(2, 5))
    found["predictions"] = predict(root)
    found["broadcast"] = process_group.run_on_main(lambda: {"rank": process_group.rank()})
    found["lines"] = process_group.gather_messages([f"of {rank}"] * rank)
    with pytest.raises(DetkitError, match="not here"):
        process_group.run_on_main(refuse)
    with pytest.raises(DetkitError, match="batch_size=3 counts the images of all ranks"):
        process_group.per_rank_batch_size(3)
    with process_group.main_process_first():
        found["first"] = (folder / "first").exists()
        (folder / "first").touch()
    torch.save(found, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory, shapes_root) -> list[dict]:
    """What each of two ranks found."""
    folder = tmp_path_factory.mktemp("ranks")
    context = torch.multiprocessing.get_context("spawn")
    processes = [context.Process(target=be_a_rank, args=(r, folder, shapes_root), daemon=True) for r in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    return [torch.load(folder / f"{r}.pt", weights_only=True) for r in range(2)]


def difference(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The length of the difference of all tensors taken together, relative to their own."""
    assert found.keys() == expected.keys()
    a, b = (torch.cat([tensors[name].double().flatten() for name in expected]) for tensors in (found, expected))
    return float((a - b).norm() / b.norm())


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_ranks_train_as_one(ranks, case):
    """Batch norms in training magnify rounding: one process differs from itself by 7e-5 when a batch is reordered."""
    tolerance = 1e-5 if "frozen" in CASES[case] else 2e-4
    alone = train(*CASES[case])
    for rank in ranks:
        for name in ("gradients", "weights", "average"):
            assert difference(rank[case][name], alone[name]) < tolerance, name
        np.testing.assert_allclose(rank[case]["losses"], alone["losses"], rtol=2e-3, atol=1e-6)
    for name in ("gradients", "weights", "average"):
        assert difference(ranks[0][case][name], ranks[1][case][name]) == 0


@pytest.mark.parametrize(("case", "norm"), [("norm", nn.BatchNorm2d(3)), ("norm_act", BatchNormAct2d(3))])
def test_statistics_are_those_of_all_ranks(ranks, case, norm):
    alone = normalise(norm, slice(None))
    found = [rank[case] for rank in ranks]
    torch.testing.assert_close(torch.cat([f["x"] for f in found]), alone["x"], atol=1e-5, rtol=1e-4)
    for name in ("grad_weight", "grad_bias"):
        torch.testing.assert_close(sum(f[name] for f in found), alone[name], atol=1e-4, rtol=1e-4)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        for f in found:
            torch.testing.assert_close(f[name], alone[name])


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_050"])
def test_timm_s_norms_are_synchronised(name):
    """All of them, names and output stay; one of a kind that cannot be is named."""
    torch.manual_seed(0)
    model = timm.create_model(name)
    before, keys = copy.deepcopy(model).train(), list(model.state_dict())
    convert_sync_batchnorm(model.train())
    assert all(isinstance(m, SyncBatchNorm) for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    assert list(model.state_dict()) == keys
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(model.forward_features(x), before.forward_features(x))
    model.global_pool = nn.BatchNorm1d(3)
    with pytest.raises(DetkitError, match="cannot synchronize global_pool, a BatchNorm1d"):
        convert_sync_batchnorm(model)


def test_two_ranks_evaluate_as_one(ranks, shapes_root):
    metrics, predictions = predict(shapes_root)
    assert [rank["predictions"][0] for rank in ranks] == [metrics, metrics]
    assert len(predictions) > 100
    assert ranks[0]["predictions"][1] == predictions
    assert ranks[1]["predictions"][1] == []


def test_rank_0_speaks_for_all(ranks):
    assert [rank["broadcast"] for rank in ranks] == [{"rank": 0}] * 2
    assert [rank["lines"] for rank in ranks] == [["of 1"], []]
    assert [rank["first"] for rank in ranks] == [False, True]


def torchrun(folder: Path, *arguments: str, plugin: str = "", tool: str = "train.py") -> subprocess.CompletedProcess:
    """Run a tool by two ranks in ``folder``."""
    (folder / "my_plugin.py").write_text(plugin)
    path = os.pathsep.join((str(ROOT), str(folder)))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "MASTER_ADDR": "localhost"}
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*start, str(ROOT / "tools" / tool), "plugins=[my_plugin]", "amp=off", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.slow
def test_a_run_of_two_ranks_leaves_one_directory(tmp_path, train_overrides):
    """24 images in batches of 22: the second is one for each rank."""
    done = torchrun(tmp_path, *train_overrides, "batch_size=22", "trainer.sync_bn=true")
    assert done.returncode == 0, done.stderr
    (run_dir,) = (tmp_path / "runs" / "train").iterdir()
    names = {path.name for path in run_dir.iterdir()}
    assert {"config.yaml", "best.safetensors", "last.safetensors", "history.csv", "metrics.json", "plots"} <= names
    assert len([name for name in names if name.startswith("events")]) == 1
    with open(run_dir / "history.csv") as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["1", "2"]
    assert done.stdout.count("epoch 1/2") == done.stdout.count("writing to") == 1
    assert detkit.load(run_dir / "best.safetensors").class_names


@pytest.mark.slow
def test_eval_by_two_ranks_is_that_of_one(tmp_path, finished_run):
    arguments = [f"ckpt={finished_run / 'last.safetensors'}", "device=cpu", "workers=0", "batch_size=3", "amp=off"]
    done = torchrun(tmp_path, *arguments, "run_dir=two", tool="eval.py")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("results are in") == 1
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as torchrun's ranks have; sums of more are another in the last digit
    eval_task.run(load_config("eval", [*arguments, f"run_dir={tmp_path / 'one'}"]))
    torch.set_num_threads(threads)
    one, two = (json.loads((tmp_path / folder / "predictions.json").read_text()) for folder in ("one", "two"))
    assert one and [(p["image_id"], p["category_id"]) for p in one] == [(p["image_id"], p["category_id"]) for p in two]
    for key in ("bbox", "score"):  # a batch of another size is convolved by another algorithm, on some machines
        np.testing.assert_allclose([p[key] for p in one], [p[key] for p in two], rtol=1e-4, atol=1e-4)
    one, two = (json.loads((tmp_path / folder / "metrics.json").read_text()) for folder in ("one", "two"))
    assert one["AP"] == pytest.approx(two["AP"], abs=1e-3) and one.keys() == two.keys()


FAULT = """
import os
from detkit.engine.step import TrainStep
original = TrainStep.__call__
def call(self, batch, step, epoch):
    if os.environ["RANK"] == "1" and step == 1:
        RAISE
    return original(self, batch, step, epoch)
TrainStep.__call__ = call
"""
MISTAKE = 'from detkit.errors import DetkitError; raise DetkitError("a mistake of one")'


@pytest.mark.slow
@pytest.mark.parametrize("raised", ['raise ValueError("a fault")', MISTAKE], ids=["fault", "mistake"])
def test_a_rank_that_fails_ends_the_run(tmp_path, train_overrides, raised):
    start = time.monotonic()
    done = torchrun(tmp_path, *train_overrides, plugin=FAULT.replace("RAISE", raised))
    assert done.returncode != 0
    assert time.monotonic() - start < 60
    if raised is not MISTAKE:
        assert "a fault" in done.stderr
        assert done.stderr.count("error: another process of this run failed or was killed") == 1
        assert "[rank0]: Traceback" not in done.stderr
    if raised is MISTAKE:
        assert [line for line in done.stderr.splitlines() if "a mistake" in line] == ["error: a mistake of one"]


def test_slurm_s_variables_are_understood():
    given = {"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "8", "SLURM_JOB_ID": "123"}
    environment = given | {"SLURM_NODELIST": "gpu[003-007,9],login1", "SLURM_NTASKS": "16"}
    rendezvous.take_slurm_variables(environment)
    found = {name: environment[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
    expected = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "MASTER_ADDR": "gpu003", "MASTER_PORT": "20123"}
    assert found == expected


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "1"},  # srun --ntasks=1
        {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "2", "RANK": "0"},  # srun torchrun
        {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "8"},  # sbatch --ntasks=8, and no srun
        {"SLURM_NTASKS": "8", "SLURM_JOB_ID": "1"},  # salloc
        # the interactive step of salloc
        {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1"},
    ],
)
def test_slurm_starts_one_process(environment):
    before = dict(environment)
    rendezvous.take_slurm_variables(environment)
    assert environment == before


@pytest.mark.parametrize(("nodes", "first"), [("a", "a"), ("b1,b2", "b1"), ("r[2-3]n[01,04],x", "r2n01")])
def test_the_first_host_of_a_list(nodes, first):
    assert rendezvous.first_host(nodes) == first
