"""Command lines: every key of every task with every kind of nonsense, and arguments that are none."""

import re
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

from omegaconf import OmegaConf

from detkit.config import compose_config

from .material import TRAINING
from .trial import Trial
from .values import LONG_TEXT, NUMBERS

# fmt: off
VALUES = (  # as they are typed
    *(str(number) if isinstance(number, int) else repr(number) for number in NUMBERS),
    "", "''", "' '", "null", "true", "no", "abc", "auto", "???", "ü", "0x10", "1_000", "1e999", ".5", "cuda:99", "'1'",
    "[]", "{}", "[[]]", "[1,2]", "[a,b,c]", "[null]", "[-1,-1]", "[nan,nan]", "{a: b}", "{name: x}", "{1: 2}", "[{}]",
    "{name: c2f, n: -1}", "{name: null}", f"[{','.join(['0'] * 3000)}]", "[" * 50 + "]" * 50, LONG_TEXT[:5000],
    "9" * 400, "'\x1b[31mred'", "'a\nb'", "'a\0b'", "'\u202e'", "\udc80", "'[/x]'", "'%s'", "'{0}'", "'a,b'", "'a=b'",
    "a b", "'\\'", "${image_size}", "${nowhere}", "${oc.env:NOWHERE}", "${oc.env:PATH}", "${now:}", "${", "${seed:}",
    "${.}", "$x", "1,2", "glob(*)", "range(1,3)", "choice(1,2)", "interval(0,1)", "sort(1)", "int(x)", "str(1)",
    "float(nan)", ".", "..", "~", "/dev/null", "/dev/zero", "/dev/null/x", "/proc/nowhere/x", "/etc/passwd",
    "x.safetensors", "http://127.0.0.1:9/x", "sqlite:///x/y.db", "https://[", "[/etc/passwd]", "os", "[os.path]",
    "[nowhere]", "csp_darknet",
)
# A large number is a wish for much work here, and no mistake; for workers at least these two are.
WORK = {"trainer.epochs", "trials", "rounds", "workers"}
LITTLE = (
    "-1", "0", "0.5", "nan", "inf", "1e999", "''", "null", "true", "abc", "[]", "{}", "[1]", "${nowhere}", "'\x1b[1m'",
)
MANY_WORKERS = ("100000", "4294967296")
SEARCHES = (
    "{optim.lr: 5}", "{nowhere: [1,2]}", "{optim.lr: {low: 2, high: 1}}", "{optim.lr: []}", "{optim.lr: null}",
    "{optim.lr: {low: nan, high: 1}}", "{optim.lr: {low: 0, high: 1, log: true}}", "{model: [yolov8n, nowhere]}",
    "{optim.lr: {low: 1, high: 2, step: 0}}", "{optim.lr: {low: 1, high: inf}}", "{optim.lr: {low: a, high: b}}",
    "{optim.lr: {high: 1}}", "{optim: {low: 1, high: 2}}", "{'\x1b[1m': [1]}", "{image_size: [abc]}",
    "{seed: [[],{}]}", "{optim.lr: {low: 1, high: 2, log: 7}}",
)
BROKEN = (  # whole arguments
    "=", "a=", "=b", "seed==1", "seed=[", "seed={", "seed='", 'seed="', "seed=(", "seed=a=b", "a b", "", " ", "seed",
    "@x=1", "a@b=1", ".seed=1", "seed.=1", "optim..lr=1", "optim.lr.x=1", "optim[lr]=1", "optim[0]=1", "+", "~", "++",
    "+seed", "~seed", "~seed=5", "~nowhere", "++seed=x", "+nowhere=1", "++nowhere=1", "+optim.nowhere=1", "nowhere=1",
    "optim.nowhere=1", "\x1b[31m=1", "ü=1", "${a}=1", "seed=${", "seed=\\", "%s", "x" * 5000, f"{'x' * 5000}=1",
    f"{'a.' * 2000}b=1", "model@x=yolov8n", "model=[yolov8n,yolov8s]", "seed: 1", "seed:=1", "--nowhere",
    "--cfg=nowhere", "--config-dir=/proc/nowhere", "--config-name=nowhere", "--config-path=nowhere", "--package=x",
    "--info=x",
)
CHOICES = (
    "backbone=mobilenetv2", "backbone=revcol_tiny", "neck=repgd", "neck=pafpn_p2", "head=yolov5", "loss=yolov5",
    "augment=heavy", "augment=light", "augment=small_objects", "augment=none", "optim=sgd", "optim=muon",
)
# fmt: on


def command_line(rng: Random, material: Path, folder: Path) -> Trial:
    """One command of which an argument is nonsense; all others are as they should be."""
    data = ["data=coco", f"data.root={material}/set"]
    network = ["model.width=0.0625", "image_size=64", "device=cpu"]
    checkpoint = f"ckpt={material}/run/best.safetensors"
    commands = {
        "train": [*TRAINING, *data, *rng.choice(([], [], [rng.choice(CHOICES)]))],
        "eval": [checkpoint, "workers=0", "device=cpu"],
        "predict": [checkpoint, f"source={material}/set/images/val", "device=cpu"],
        "check": network,
        "summary": [*network, "rounds=1"],
        "check_data": [*data, "workers=1"],
        "convert_data": [*data, "format=yolo", "dst=converted"],
        "import_weights": [f"src={material}/foreign/state.pt", "dst=new.safetensors"],
        "benchmark": [*network, "rounds=1", "batch_size=2", "peer=/nowhere/python"],
        "tune": [*TRAINING, *data, "trials=1", "search={optim.lr: {low: 0.001, high: 0.01}}"],
    }
    task = rng.choice(("train",) * 6 + tuple(commands))
    arguments = commands[task]
    if rng.random() < 0.12:
        odd = rng.choice(BROKEN)
        return Trial([task, *arguments, odd], f"{odd!r:.60}", tuple(re.findall(r"[\w%]{1,12}", odd)))
    key = rng.choice(_keys(task, tuple(arguments)))
    chance = rng.random()
    if chance < 0.1:
        odd = f"~{key}"
    elif chance < 0.2:
        odd = f"+{key}.nowhere={rng.choice(VALUES)}"
    elif key in WORK:
        odd = f"{key}={rng.choice((*LITTLE, *MANY_WORKERS) if key == 'workers' else LITTLE)}"
    else:
        odd = f"{key}={rng.choice(SEARCHES if key == 'search' else VALUES)}"
    arguments = [argument for argument in arguments if argument.partition("=")[0] != key]
    named = (*re.findall(r"\w{4,20}", odd), *re.findall(r"\w+", odd.partition("=")[2])[:3])  # of the key or the value
    return Trial([task, *arguments, odd], f"{odd!r:.80}", named if task != "benchmark" else (*named, "peer"))


@cache
def _keys(task: str, arguments: tuple[str, ...]) -> list[str]:
    """Every key and group of a task's configuration, by the options that the arguments choose."""
    keys: list[str] = []

    def walk(node: Any, prefix: str) -> None:
        if isinstance(node, dict):
            for key, value in node.items():
                keys.append(f"{prefix}{key}")
                walk(value, f"{prefix}{key}.")

    walk(OmegaConf.to_container(compose_config(task, arguments), resolve=False), "")
    return keys
