"""detkit check finds what is broken, and nothing else; detkit summary adds up."""

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import detkit
from detkit import cli
from detkit.checks.harness import Composition
from detkit.checks.model_checks import empty_targets, run_check
from detkit.models.profiling import activation_bytes, module_seconds
from detkit.models.summary import add_times, summarize
from detkit.tasks import load_config, summary

PLUGIN = '''
import torch
from torch import nn
from detkit.layers.conv import Conv
from detkit.registry import BACKBONES

class Sound(nn.Module):
    """The README's."""

    def __init__(self, width, out_strides):
        super().__init__()
        self.strides = tuple(out_strides)
        self.out_channels = (width,) * len(out_strides)
        self.stem = nn.Sequential(Conv(3, width, 3, 2), Conv(width, width, 3, 2))
        self.levels = nn.ModuleList(Conv(width, width, 3, 2) for _ in out_strides)

    def forward(self, x):
        x = self.stem(x)
        features = []
        for level in self.levels:
            x = level(x)
            features.append(x)
        return tuple(features)

class Misdeclared(Sound):
    def __init__(self, width, out_strides):
        super().__init__(width, out_strides)
        self.strides = (8, 16, 32)
        self.levels[2] = Conv(width, width, 3, 1)

class Unused(Sound):
    def __init__(self, width, out_strides):
        super().__init__(width, out_strides)
        self.spare = nn.Linear(2, 3)

class Misfused(Sound):
    gain = 1.0

    def forward(self, x):
        return tuple(feature * self.gain for feature in super().forward(x))

    def fuse(self):
        self.gain = 1.1

class Overwriting(Sound):
    def forward(self, x):
        return super().forward(x.sub_(0.5))

class Attached(Sound):
    def __init__(self, width, out_strides):
        super().__init__(width, out_strides)
        self.run_stem = lambda x: self.stem(x)

    def forward(self, x):
        x = self.run_stem(x)
        features = []
        for level in self.levels:
            x = level(x)
            features.append(x)
        return tuple(features)

class Pooling(Sound):
    def __init__(self, width, out_strides):
        super().__init__(width, out_strides)
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), Conv(width, width, 1))

    def forward(self, x):
        return tuple(feature * self.gate(feature) for feature in super().forward(x))

class Coarse(Sound):
    def forward(self, x):
        return tuple(feature + 300 - 300 for feature in super().forward(x))

class Turned(Sound):
    def forward(self, x):
        return super().forward(x.transpose(2, 3))

class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad

class Irreversible(Sound):
    save_memory = True

    def forward(self, x):
        features = super().forward(x)
        return tuple(map(Double.apply, features)) if self.save_memory else features

for part in (Sound, Misdeclared, Unused, Misfused, Overwriting, Attached, Pooling, Coarse, Turned, Irreversible):
    BACKBONES.register(part.__name__.lower())(part)
'''


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a module of backbones, one sound and others that each break one promise, and their YAML."""
    folder = tmp_path_factory.mktemp("plugin")
    (folder / "checked_backbones.py").write_text(PLUGIN)
    (folder / "conf" / "backbone").mkdir(parents=True)
    for name in ("sound", *(name for name, _, _ in BROKEN)):
        (folder / "conf" / "backbone" / f"{name}.yaml").write_text(f"name: {name}\nwidth: 16\n")
    return folder


def check(folder: Path, backbone: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """Run the command; return its exit status."""
    arguments = [f"backbone={backbone}", "plugins=[checked_backbones]", "image_size=64", "num_classes=2", "device=cpu"]
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "argv", ["detkit", "check", "--config-dir", "conf", *arguments])
    try:
        cli.main()
    except SystemExit as stop:
        return int(stop.code)
    return 0


def test_a_sound_part_passes_every_check(plugin, monkeypatch, capsys):
    assert check(plugin, "sound", monkeypatch) == 0
    out = capsys.readouterr().out
    assert out.strip().splitlines()[-1] == "yolov8n_sound on cpu: every check passed."
    detector = detkit.create_model(num_classes=2)
    assert f"{sum(p.numel() for p in detector.parameters()):,}" not in out  # another backbone, other figures
    assert " at 64x64" in out


BROKEN = [  # backbone, the rows that fail, what the table says
    (
        "misdeclared",
        None,
        "the backbone declares 2x16x8x8, 2x16x4x4, 2x16x2x2 but returns 2x16x8x8, 2x16x4x4, 2x16x4x4",
    ),
    ("unused", "unused parameters", "no gradient reaches backbone.spare.weight, backbone.spare.bias"),
    ("misfused", "fused outputs", "(tolerance 1e-03)"),
    ("overwriting", "output shapes, non-square input", "the backbone changes its input in place"),
    ("attached", "deepcopy", "training the copy gives the original gradients: backbone.stem.0.conv.weight"),
    ("pooling", "batch of 1, activation memory", "ValueError: Expected more than 1 value per channel when training"),
    ("coarse", "half precision", "from rounded weights"),
    ("turned", "non-square input", "the backbone declares 2x16x8x12"),
    ("irreversible", "reversible gradients", "the gradient of backbone."),
]


@pytest.mark.parametrize(("backbone", "rows", "expected"), BROKEN, ids=[name for name, _, _ in BROKEN])
def test_each_fault_is_caught_by_its_row(backbone, rows, expected, plugin, monkeypatch, capsys):
    assert check(plugin, backbone, monkeypatch) == 1
    out = capsys.readouterr().out
    assert expected in out
    message = out.strip().splitlines()[-1]
    assert message.startswith(f"yolov8n_{backbone} on cpu: ")
    if rows is None:  # nothing behind it runs either
        assert "rows failed: output shapes, non-square input, " in message
    else:
        assert message.endswith(f" of 12 rows failed: {rows}.")


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (lambda out, batch: {"a": out.cls.sum() / batch.valid_bm.sum(), "b": out.reg.sum()}, "the loss is "),
        (
            lambda out, batch: {"a": out.cls.sum(), "b": out.reg.sum() if batch.boxes_bm4.numel() else 0},
            "without boxes no gradient reaches head.box_branches.0.0.bn.bias, ",
        ),
    ],
)
def test_a_loss_that_fails_without_boxes_is_found(loss, expected):
    finding = run_check(Composition(detkit.create_model(num_classes=2), loss), "empty targets", empty_targets)
    assert finding.status == "fail"
    assert expected in finding.message


def test_saved_bytes_are_counted_by_hand():
    module = nn.Sequential(nn.Linear(4, 8, bias=False), nn.Sigmoid(), nn.Linear(8, 2, bias=False))
    x = torch.rand(3, 4)
    assert activation_bytes(module, x) == 4 * (3 * 4 + 3 * 8)  # the input; the sigmoid's output, which two keep


MODELS = [
    ["model=yolov8n"],
    ["model=yolov8n_gold"],
    ["model=yolov8n_dynamicbnact"],
    ["model=yolov5n_akconv", "neck=pafpn_p2"],
    ["model=yolov8n", "backbone=revcol_tiny"],
    ["model=yolov8n", "backbone=timm"],
]


@pytest.mark.parametrize("overrides", MODELS, ids=" ".join)
def test_a_summary_adds_up(overrides):
    device = torch.device(
        "cpu" if "model=yolov5n_akconv" in overrides else "meta"
    )  # where AKConv's autocast is not known
    with device:
        detector = detkit.create_model(overrides=overrides, num_classes=3)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        detector.eval()(torch.zeros(1, 3, 64, 64, device=device))
    for depth in (1, 2, 3, 9):
        *rows, total = summarize(detector, 64, depth)
        assert total.parameters == sum(p.numel() for p in detector.parameters())
        assert total.flops == counter.get_total_flops()
        assert sum(row.parameters for row in rows if row.leaf) == total.parameters
        assert sum(row.flops for row in rows if row.leaf) == total.flops
        for part in ("backbone", "neck", "head"):
            (row,) = (row for row in rows if row.name == part)
            assert row.parameters == sum(p.numel() for p in getattr(detector, part).parameters())
            assert row.leaf == (depth == 1)
        assert len({row.name for row in rows}) == len(rows)


def test_a_summary_knows_shapes_and_what_is_not_called():
    with torch.device("meta"):
        detector = detkit.create_model(backbone="revcol_tiny", num_classes=3)
    rows = {row.name: row for row in summarize(detector, 64, 3)}
    assert rows["backbone"].shapes == ("1x128x8x8", "1x256x4x4", "1x512x2x2")
    assert rows["head"].shapes == ("cls 1x84x3", "reg 1x84x64", "points 84x2", "strides 84x1")
    assert rows["backbone.subnet1"].shapes == ()
    assert rows["backbone.subnet1.level3"].shapes == ("1x512x2x2",)
    assert rows["backbone.subnet1 (own)"].parameters == 64 + 128 + 256 + 512  # alpha of each level
    levels = [row for name, row in rows.items() if name.startswith("backbone.subnet1.")]
    assert rows["backbone.subnet1"].flops == sum(row.flops for row in levels) > 0
    assert rows["neck.context.pool"].shapes == ("1x256x2x2",)


class Twice(nn.Module):
    """One layer under two names, run three times at two sizes, and a product of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 3, 1, bias=False)
        self.lists = nn.ModuleDict({"a": nn.ModuleList([self.first, nn.ReLU()])})
        self.weight = nn.Parameter(torch.rand(3, 3))

    def forward(self, x: Tensor) -> dict[str, list[Tensor]]:
        x = self.lists["a"][1](self.first(self.first(x)))
        return {"maps": [x, self.lists["a"][0](x[:, :, ::2])], "product": [self.weight @ self.weight]}


def test_a_module_that_runs_several_times_counts_once_in_parameters_and_each_time_in_flops():
    rows = {row.name: row for row in summarize(Twice(), 32, 1)}
    assert rows["first"].flops == 2 * 9 * 32 * 32 * 2.5
    assert rows["first"].shapes == ("1x3x32x32", "1x3x16x32")
    assert rows["(own)"].parameters == 9
    assert rows["(own)"].flops == 2 * 27
    assert rows["total"].parameters == 18
    assert rows["total"].shapes == ("maps 1x3x32x32", "maps 1x3x16x32", "product 3x3")
    assert "lists.a.0" not in rows  # it stands as first already


def test_times_count_for_the_nearest_listed_module():
    rows = summarize(Twice(), 32, 1)
    seconds = {"": 1.0, "first": 2.0, "lists.a.1": 4.0, "first.part": 8.0, "firstly": 16.0}
    ms = {row.name: row.ms for row in add_times(rows, seconds)}
    assert ms == {"first": 10_000, "lists.a.1": 4_000, "(own)": 17_000, "total": 31_000}


def test_every_module_is_timed_without_those_it_calls():
    module = Twice()
    seconds = module_seconds(module, torch.rand(1, 3, 32, 32), rounds=2)
    assert set(seconds) == {"", "first", "lists.a.1"}
    assert all(value > 0 for value in seconds.values())
    assert not module._forward_hooks  # nothing is left behind
    assert not module.first._forward_pre_hooks


@pytest.mark.parametrize("overrides", [[], ["backbone=revcol_tiny"], ["model=yolov8n_gold", "amp=off"]], ids=" ".join)
def test_a_summary_measures_the_network_that_predict_runs(overrides):
    sizes = ["image_size=64", "num_classes=3", "device=cpu", "rounds=1", "depth=2"]
    rows = {row.name: row for row in summary.run(load_config("summary", [*overrides, *sizes]))}
    total = rows["total"].ms
    assert total is not None
    assert total > 0
    assert 0 < sum(rows[part].ms or 0 for part in ("backbone", "neck", "head")) <= total * (1 + 1e-9)
    leaves = [row.ms for row in rows.values() if row.leaf and row.flops]
    assert all(ms is not None and ms > 0 for ms in leaves)
    untimed = summary.run(load_config("summary", [*overrides, *sizes, "time=false"]))
    assert [row.name for row in untimed] == list(rows)
    assert all(row.ms is None for row in untimed)


@pytest.mark.parametrize("overrides", MODELS, ids=" ".join)
def test_a_summary_fits_into_a_hundred_columns(overrides, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(sys, "argv", ["detkit", "summary", *overrides, "depth=3", "rounds=1", "image_size=320"])
    cli.main()
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    assert not any("…" in line for line in lines)
    assert lines[-2].endswith("one image of 320x320 pixels, 80 classes.")
