"""What several tests share: golden tensors, a tiny image set, a finished run."""

import json
import os
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tensors are tiny, and tests run side by side

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

import detkit
from detkit import cli
from detkit.data.formats import shapes
from detkit.engine.checkpoint import save_checkpoint
from detkit.engine.run_log import RunLog
from detkit.engine.saver import Saver
from detkit.engine.state import TrainState
from detkit.tasks import load_config
from detkit.viz.console import setup_logging

GOLDEN = Path(__file__).parent / "golden"
TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs a GPU without one."""
    if item.get_closest_marker("gpu") and item.config.getoption("--on") == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark kill and fuzz tests slow, too; begin with the files that hold slow tests, so that at the end no process is
    left alone with one."""
    for item in items:
        if item.get_closest_marker("kill") or item.get_closest_marker("fuzz"):
            item.add_marker(pytest.mark.slow)
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of the tests that need a GPU, and of the fuzz harness, ``pytest -m fuzz tests/fuzz``."""
    parser.addoption(
        "--on", default="cuda", help="device of the tests that need a GPU; cpu: to try the tests themselves"
    )
    group = parser.getgroup("fuzz")
    group.addoption("--fuzz-trials", type=int, default=300, help="trials of each target (300)")
    group.addoption("--fuzz-seed", type=int, default=1000, help="seed of a target's first trial (1000)")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print how many trials of each target ended how."""
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.getreports(kind)]
    for line in sorted(value for report in reports for name, value in report.user_properties if name == "fuzz"):
        terminalreporter.write_line(line)


@pytest.fixture
def cuda(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """The GPU, or what ``--on`` names in its place; float32 is float32 there."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    return torch.device(request.config.getoption("--on"))


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    """The CPU, and the GPU where there is one."""
    return torch.device("cpu") if request.param == "cpu" else request.getfixturevalue("cuda")


@pytest.fixture
def golden(device: torch.device) -> Iterator[Callable[[str], dict[str, Tensor]]]:
    """A function that loads a golden file by name; all that the test makes is on the same device."""
    with torch.device(device):
        yield lambda name: load_file(GOLDEN / f"{name}.safetensors", device=str(device))


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache folder of the tests' own, for indexes."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


@pytest.fixture(scope="session")
def shapes_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small drawing of the embedded set: 24 training and 10 validation images."""
    root = tmp_path_factory.mktemp("shapes") / "set"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shapes, "SPLITS", {"train": 24, "val": 10})
        shapes.read_shapes("train", root=str(root))
    return root


@pytest.fixture(scope="session")
def train_overrides(shapes_root: Path) -> list[str]:
    """Overrides that make a training of seconds: 64 px, 2 epochs."""
    return [f"data.root={shapes_root}", "image_size=64", "batch_size=8", "trainer.epochs=2", "workers=0", "device=cpu"]


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory, train_overrides: list[str]) -> Path:
    """The run directory of such a training."""
    from detkit.tasks.train import run

    run_dir = tmp_path_factory.mktemp("runs") / "run"
    run(load_config("train", [*train_overrides, f"run_dir={run_dir}"]))
    return run_dir


@pytest.fixture
def coco_set(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Return a function that writes a COCO set of blank images and returns its root."""

    def write(images: list[dict], annotations: list[dict], categories: list[dict]) -> Path:
        root = tmp_path / "coco"
        for split in ("train", "val"):
            (root / "images" / split).mkdir(parents=True)
            for image in images:
                pixels = np.zeros((image["height"], image["width"], 3), np.uint8)
                Image.fromarray(pixels).save(root / "images" / split / image["file_name"])
            file = root / "annotations" / f"instances_{split}.json"
            file.parent.mkdir(exist_ok=True)
            file.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
        return root

    return write


@pytest.fixture
def ultralytics(monkeypatch: pytest.MonkeyPatch) -> Callable[..., nn.Module]:
    """Return a function that builds a module tree of a class of ``ultralytics``, which exists while it is saved."""

    class DetectionModel(nn.Module):
        pass

    def build(state: dict[str, torch.Tensor], **attributes) -> nn.Module:
        module = types.ModuleType("ultralytics.nn.tasks")
        module.DetectionModel = DetectionModel
        DetectionModel.__module__, DetectionModel.__qualname__ = module.__name__, "DetectionModel"
        for name in ("ultralytics", "ultralytics.nn", "ultralytics.nn.tasks"):
            monkeypatch.setitem(sys.modules, name, module)
        root = DetectionModel()
        for name, tensor in state.items():
            *path, leaf = name.split(".")
            node = root
            for step in path:
                if step not in node._modules:
                    node.add_module(step, nn.Module())
                node = node._modules[step]
            if "running" in leaf or "num_batches" in leaf or leaf == "anchors":
                node.register_buffer(leaf, tensor)
            else:
                node.register_parameter(leaf, nn.Parameter(tensor.detach()))
        root.__dict__.update(attributes)
        return root

    return build


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _log_messages() -> None:
    setup_logging()


def trainer_options(tmp_path: Path, **changes: object) -> dict:
    """The arguments of a Trainer that writes into ``tmp_path``; ``changes`` are keys of the group ``trainer``."""
    options = load_config("train").trainer.replace(**changes)
    return {"state": TrainState(), "log": RunLog(tmp_path), "saver": Saver(tmp_path), "options": options}


def run_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, *arguments: str
) -> tuple[int, str, str]:
    """Run ``detkit ARGUMENTS`` in this process; return exit status, stdout and stderr."""
    monkeypatch.setattr(sys, "argv", ["detkit", *arguments])
    try:
        cli.main()
        status = 0
    except SystemExit as stop:
        status = stop.code
    return status, *capsys.readouterr()


@pytest.fixture(scope="session")
def checkpoint(finished_run, tmp_path_factory) -> Path:
    """That of ``finished_run`` with other weights, whose scores are distinct, not all low and of all classes."""
    path = tmp_path_factory.mktemp("checkpoint") / "random.safetensors"
    detector = detkit.load(finished_run / "best.safetensors")
    torch.manual_seed(0)
    for module in detector.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            nn.init.uniform_(module.weight, 0.5, 1.5)
    for branch in detector.head.cls_branches:
        nn.init.normal_(branch[-1].weight, std=0.5)
        nn.init.constant_(branch[-1].bias, -1.0)
    save_checkpoint(detector, path, {})
    return path
