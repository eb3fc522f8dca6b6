"""The commands: a user's mistake is one message, exit status 2 and no traceback."""

import functools
import subprocess
import sys
import time
from pathlib import Path

import pytest

import detkit
from detkit import cli
from detkit.config import compose_config, config_dir, group_options, resolve
from detkit.engine.trainer import Trainer
from detkit.errors import DetkitError
from detkit.tasks import list_tasks, load_config
from detkit.tasks.runs.run_dir import make_run_dir

TOOLS = Path(__file__).parents[1] / "tools"
GROUPS = ("model", "backbone", "neck", "head", "loss", "data", "augment", "optim", "trainer", "experiment")


@pytest.mark.parametrize("name", [path.stem for path in config_dir().glob("*.yaml") if path.stem != "common"])
def test_every_task_s_config_composes(name):
    assert compose_config(name)["seed"] == 0


@pytest.mark.parametrize("choice", [f"{group}={option}" for group in GROUPS for option in group_options(group)])
def test_every_option_composes_and_resolves(choice):
    key = "data.yaml" if choice == "data=yolo" else "data.root"
    resolve(compose_config("train", [choice, *([f"{key}=/x"] if choice.startswith("data=") else [])]))


def test_the_command_line_beats_the_experiment_which_beats_the_model():
    assert compose_config("train", ["experiment=smoke"]).trainer.epochs == 2
    for order in (["experiment=smoke", "trainer.epochs=5"], ["trainer.epochs=5", "experiment=smoke"]):
        assert compose_config("train", order).trainer.epochs == 5
    cfg = resolve(compose_config("train", ["backbone=csp_darknet", "model=yolov8s", "data=coco", "data.root=/x"]))
    assert (cfg["backbone"]["width"], cfg["image_size"], cfg["trainer"]["epochs"]) == (0.5, 640, 100)


MISTAKES = [
    ("train", ["model=yolov8q"], "model=yolov8q does not exist: known are goldyolo_n"),
    ("summary", ["hydra.run.dir=${nope}"], "nope"),
    ("train", ["modle=yolov8n"], "there is no key 'modle'; did you mean 'model'?"),
    ("train", ["trainer.epoks=3"], "there is no key 'trainer.epoks'; did you mean 'trainer.epochs'?"),
    ("train", ["bakbone=csp_darknet"], "did you mean 'backbone'?"),
    ("train", ["data=coco"], "data.root is not set"),
    ("train", ["data=coco", "data.root=/nowhere"], "data.root=/nowhere is not a folder"),
    ("train", ["trainer.epochs=0"], "trainer.epochs=0 must be a whole number, 1 or more"),
    ("train", ["batch_size=1.5"], "batch_size=1.5 must be a whole number"),
    ("train", ["image_size=100"], "image_size=100 must be a multiple of 32 pixels, 64 or more"),
    ("train", ["image_size=null"], "image_size is not set"),
    ("train", ["device=tpu9"], "device=tpu9 must be auto, cpu, cuda or cuda:N"),
    ("train", ["amp=half"], "amp=half must be auto, off, bf16 or fp16"),
    ("train", ["workers=-1"], "workers=-1 must be auto, or a whole number"),
    ("train", ["optim.schedule=cosin"], "optim.schedule=cosin must be linear, cosine, constant or one_cycle"),
    ("train", ["augment.affine.scale=0.5"], "augment.affine.scale=0.5 must be a pair"),
    ("train", ["model=null"], "model=null is not an option: known are"),
    ("train", ["plugins=my_backbone"], "plugins=my_backbone must be a list of modules"),
    ("train", ["neck.block=[c2f,c2f]"], "neck.block lists 2 blocks"),
    ("train", ["backbone.downsample=c2f"], "block 'c2f' does not fit a conv slot"),
    (
        "train",
        ["data=coco", "data.train_imges=x"],
        "there is no key 'data.train_imges'; did you mean 'data.train_images'?",
    ),
    ("train", ["data=coco", "data.root=2024"], "2024 is not a folder"),
    ("train", ["+modle=yolov8n"], "there is no key 'modle'; did you mean 'model'?"),
    ("eval", ["ckpt=x", "split=''"], "split= must be the name of a split"),
    ("eval", ["ckpt=x", "score=abc"], "score=abc must be a number from 0 to 1"),
    ("train", ["augment.transforms={Blurr: {p: 1}}"], "cannot set 'augment.transforms': Key 'Blurr' is not in struct"),
    ("train", ["+augment.transforms.Blurr={p: 1}"], "unknown transform 'Blurr'; did you mean 'Blur'?"),
    ("train", ["plugins=[no_such_module]"], "plugins: cannot import 'no_such_module'"),
    ("train", ["weights=none.safetensors"], "checkpoint none.safetensors does not exist"),
    ("train", ["model"], "cannot read the argument 'model'"),
    ("train", ["--resolve"], "--resolve needs --cfg job"),
    ("train", [f"backbone.width={'[' * 500}{']' * 500}"], "more than 50 nested brackets"),
    ("train", [f"backbone.width={'[1,' * 500}1{']' * 500}"], "more than 50 nested brackets"),
    ("train", ["run_dir=."], "run_dir=. is not empty"),
    ("eval", [], "ckpt is not set: add ckpt=VALUE"),
    ("eval", ["ckpt=none.safetensors"], "checkpoint none.safetensors does not exist"),
    ("predict", ["ckpt=none.safetensors", "source=x"], "checkpoint none.safetensors does not exist"),
    ("benchmark", ["task=sleep"], "task=sleep is unknown: use train, infer, reversible, akconv"),
    ("train", ["neck.in_strides=8"], "neck.in_strides=8 must be a list of strides, ascending"),
    ("train", ["neck.in_strides=[]"], "neck.in_strides=[] must be a list of strides, ascending"),
    (
        "train",
        ["head=yolov5", "head.anchors={8: wide}"],
        "must be a mapping of each stride to a list of widths and heights",
    ),
    (
        "train",
        ["head=yolov5", "head.anchors={8: [0,1]}"],
        "must be a mapping of each stride to a list of widths and heights",
    ),
    ("train", ["backbone=revcol_tiny", "backbone.channels=[8,8]"], "must list one number for each of the 4 levels"),
    ("train", ["backbone.block={name: c3_akconv, points: 0}"], "akconv: n=0 points"),
    ("check", ["backbone=revcol_tny"], "did you mean 'revcol_tiny'?"),
    ("check", ["neck.block=[c2f,c2f]"], "neck.block lists 2 blocks"),
    ("check", ["head=yolov5", "loss=yolov8"], "head 'yolov5' returns AnchorOutput: omit loss="),
    ("check", ["image_size=null"], "image_size is not set"),
    ("summary", ["depth=0"], "depth=0 must be a whole number, 1 or more"),
]


@pytest.mark.parametrize(("task", "arguments", "message"), MISTAKES, ids=lambda v: v if isinstance(v, str) else None)
def test_a_user_error_is_one_message(task, arguments, message, monkeypatch, capsys, tmp_path, shapes_root):
    (tmp_path / "here").write_text("a file, so that the folder is not empty")
    monkeypatch.chdir(tmp_path)
    if task == "train" and not any(a.startswith("data") for a in arguments):
        arguments = [f"data.root={shapes_root}", *arguments]
    monkeypatch.setattr(Trainer, "fit", lambda self: pytest.fail("it began to train"))
    monkeypatch.setattr(sys, "argv", ["detkit", task, *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len(error.splitlines()) == 1
    assert {p.name for p in tmp_path.iterdir()} <= {"here", "runs"}


def test_a_sweep_runs_every_choice_in_a_directory_of_its_own(monkeypatch, tmp_path, shapes_root):
    from detkit.tasks import train

    seen = []

    def run(cfg):
        seen.append((cfg.seed, make_run_dir(cfg, "train", "x")))
        time.sleep(0.6)  # the clock of a sweep's name moves on while its jobs run

    monkeypatch.setattr(train, "run", functools.wraps(train.run)(run))
    monkeypatch.chdir(tmp_path)
    arguments = ["-m", "seed=0,1", "backbone.block=c2f,[c2f,c2f,c2f,c2f]", f"data.root={shapes_root}"]
    monkeypatch.setattr(sys, "argv", ["detkit", "train", *arguments])
    cli.main()
    assert [seed for seed, _ in seen] == [0, 0, 1, 1]
    names = [path.name for _, path in seen]
    assert names[0] == "0_seed-0_backbone.block-c2f"
    assert len(set(names)) == 4
    assert len({path.parent for _, path in seen}) == len(list((tmp_path / "runs").iterdir())) == 1


def test_default_run_directories_never_meet(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    cfg = load_config("train")
    assert len({make_run_dir(cfg, "train", "yolov8n") for _ in range(3)}) == 3


def test_an_unknown_task_is_named(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["detkit", "trian"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert "did you mean 'train'?" in capsys.readouterr().err


def test_a_fault_is_not_dressed_as_a_mistake(monkeypatch):
    from detkit.tasks import train

    def broken(cfg: dict) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(train, "run", functools.wraps(train.run)(broken))
    monkeypatch.setattr(sys, "argv", ["detkit", "train"])
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main()


def test_tools_are_the_commands_from_any_folder(tmp_path):
    run = [sys.executable, str(TOOLS / "train.py"), "model=yolov8q"]
    result = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2
    assert "model=yolov8q does not exist" in result.stderr
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())
    assert {path.stem for path in TOOLS.glob("*.py")} == set(list_tasks())


def test_a_plugin_brings_a_part(tmp_path, monkeypatch):
    (tmp_path / "my_backbone.py").write_text(
        "from torch import nn\n"
        "from detkit.registry import BACKBONES\n"
        "@BACKBONES.register('my_backbone')\n"
        "class MyBackbone(nn.Module):\n"
        "    def __init__(self, channels, out_strides):\n"
        "        super().__init__()\n"
        "        self.strides, self.out_channels = tuple(out_strides), (channels,) * len(out_strides)\n"
        "        self.convs = nn.ModuleList(nn.Conv2d(3, channels, s, s) for s in out_strides)\n"
        "    def forward(self, x):\n"
        "        return tuple(conv(x) for conv in self.convs)\n"
    )
    from detkit.config import import_plugins
    from detkit.models.detector import build_detector

    monkeypatch.chdir(tmp_path)
    import_plugins(["my_backbone"])
    cfg = resolve(compose_config("train")) | {"backbone": {"name": "my_backbone", "channels": 24}}
    assert build_detector(cfg, ["a"]).backbone.out_channels == (24, 24, 24)
    with pytest.raises(DetkitError, match="plugins: cannot import 'your_backbone'"):
        import_plugins(["your_backbone"])
    (tmp_path / "broken.py").write_text("x = (")
    with pytest.raises(DetkitError, match="plugins: cannot import 'broken': SyntaxError"):
        import_plugins(["broken"])


def test_help_waits_for_neither_torch_nor_hydra():
    code = "import sys, detkit.cli; detkit.cli.main(); print({'torch', 'hydra', 'numpy'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.startswith("usage: detkit TASK")
    assert result.stdout.endswith("set()\n")


def test_functions_are_imported_when_asked_for():
    assert {"create_model", "list_models", "load", "load_weights", "DetkitError"} <= set(dir(detkit))
    assert detkit.load_weights.__module__ == "detkit.engine.transfer"
    with pytest.raises(AttributeError, match="module 'detkit' has no attribute 'create_modle'"):
        detkit.create_modle  # noqa: B018
