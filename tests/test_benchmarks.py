"""The benchmarks run and end with their line of JSON, on sizes of no interest."""

import json
import os
import sys

import pytest

from detkit.benchmarks import akconv, infer, reversible, train_step
from detkit.benchmarks.data import CACHES
from detkit.errors import DetkitError
from detkit.tasks import benchmark, load_config


def last_line(task: str, capsys: pytest.CaptureFixture, *overrides: str) -> dict:
    result = benchmark.run(load_config("benchmark", [f"task={task}", "rounds=1", "device=cpu", *overrides]))
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert line == json.loads(json.dumps(result))
    return line


def test_reversible(monkeypatch, capsys):
    monkeypatch.setattr(reversible, "COLUMNS", (1, 5))
    monkeypatch.setattr(reversible, "SIZE", 64)
    monkeypatch.setattr(reversible, "CHANNELS", (8, 8, 16, 16))
    monkeypatch.setattr(reversible, "ERROR_CHANNELS", (8, 8, 16, 16))
    rows = last_line("reversible", capsys)["columns"]["5"]
    assert (
        rows["keep_every=0"]["mib"] < rows["keep_every=4"]["mib"] < rows["keep_every=1"]["mib"] < rows["plain"]["mib"]
    )
    assert 0 < rows["keep_every=0"]["error"]["float32"] < 1e-4
    assert 0 < rows["keep_every=0"]["error"]["float64"] < 1e-9


def test_akconv_computes_what_gathering_does(monkeypatch, capsys):
    """The benchmark itself compares the outputs."""
    monkeypatch.setattr(akconv, "SIZE", 7)
    monkeypatch.setattr(akconv, "CHANNELS", 4)
    assert set(last_line("akconv", capsys)["ratio"]) == {"3", "5", "9"}


STAND_IN = """#!{python}
import sys
print("chatter", file=sys.stderr)
assert sys.argv[1] == "-c" and len(sys.argv) in (7, 9, 12)
compile(sys.argv[2], "peer", "exec")
print(0, flush=True)
answers = {{
    "uncached": "4.0",
    "cached": "2.0",
    "go": '{{"seconds": 0.5, "memory": 1048576}}',
    "1": '{{"predict": 0.5, "preprocess": 0.25, "network": 0.125, "postprocess": 0.125}}',
    "2": '{{"predict": 0.75, "preprocess": 0.25, "network": 0.25, "postprocess": 0.25}}',
    "folder": '{{"folder": 0.25}}',
    "nms": '{{"nms": 2.0}}',
}}
for line in sys.stdin:
    print(answers[line.strip()], flush=True)
"""


@pytest.fixture
def peer(tmp_path):
    """A stand-in with the same manners: it says when it is ready, and answers every line."""
    path = tmp_path / "peer"
    path.write_text(STAND_IN.format(python=sys.executable))
    path.chmod(0o755)
    return path


def test_a_training_step_beside_a_peer(monkeypatch, peer, capsys):
    monkeypatch.setattr(train_step, "VARIANTS", train_step.VARIANTS[:2])
    sizes = ("image_size=64", "batch_size=2", "num_classes=3", "boxes=2")
    result = last_line("train", capsys, *sizes, f"peer={peer}")
    plain, layout = (variant.name for variant in train_step.VARIANTS)
    assert set(result["images_per_s"]) == {plain, layout, "peer", "peer_equal_threads"}
    assert result["device_name"]
    assert result["compile"] is False
    assert result["images_per_s"]["peer"] == 4  # 2 images in half a second
    for name in ("peer", "peer_equal_threads"):
        assert result[f"ratio_to_{name}"][plain] == pytest.approx(result["images_per_s"][plain] / 4)
    assert result["memory_mib"]["peer"] == 1
    # a step is about three forward passes of 8.1 GFLOPs at 640 pixels
    assert result["gflops_per_step"] == pytest.approx(3 * 8.1 * 2 / 100, rel=0.1)
    assert all(0 < fraction < 1.5 for fraction in result["fraction_of_limit"].values())


def test_data_beside_a_peer(shapes_root, peer, capsys):
    cores, overrides = os.sched_getaffinity(0), ("data=shapes", f"data.root={shapes_root}", "image_size=64")
    result = last_line("data", capsys, *overrides, f"peer={peer}")
    assert os.sched_getaffinity(0) == cores
    assert (result["peer_uncached"], result["peer_cached"]) == (0.25, 0.5)
    assert result["ratio_cached"] == pytest.approx(2 * result["cached"])
    assert result["ratio_nothing_kept"] == pytest.approx(4 * result["nothing_kept"])
    assert set(last_line("data", capsys, *overrides)) == {"task", "images", "image_size", *CACHES}


def test_prediction_beside_a_peer(monkeypatch, shapes_root, peer, capsys):
    monkeypatch.setattr(infer, "CANDIDATES", (2, 84, 3, 30))
    monkeypatch.setattr(infer, "IMAGES", 3)
    sizes = ("image_size=64", "batch_size=2", "num_classes=3", "exports=false")
    result = last_line("infer", capsys, *sizes, "data=shapes", f"data.root={shapes_root}", f"peer={peer}")
    assert {"float32", "fused", "channels-last", "peer", "peer_equal_threads"} <= set(result["variants"])
    ms = result["ms"]
    assert all(ms[key] > 0 for key in ("predict", "preprocess", "network", "postprocess"))
    assert ms["predict"] == result["variants"][result["default"]]["1"]["predict"]
    assert (ms["peer_predict"], ms["peer_equal_threads_predict"]) == (500, 500)
    assert result["images_per_s"]["peer"] == {"1": 2, "2": pytest.approx(2 / 0.75)}
    assert result["folder_images_per_s"]["peer"] == 4
    assert result["nms_ms"]["peer"] == 2000
    ratio = result["ratio_to_peer_equal_threads"]
    assert ratio["fused"] == pytest.approx(ms["fused"] / 500)
    assert ratio["folder"] == pytest.approx(4 / result["folder_images_per_s"][result["default"]])
    assert ratio["nms"] == pytest.approx(result["nms_ms"][result["default"]] / 2000)


def test_prediction_of_a_checkpoint_without_a_peer(monkeypatch, finished_run, shapes_root, capsys):
    monkeypatch.setattr(infer, "CANDIDATES", (2, 84, 3, 30))
    monkeypatch.setattr(infer, "IMAGES", 2)
    data = ("data=shapes", f"data.root={shapes_root}", "exports=false")
    ckpt = finished_run / "best.safetensors"
    result = last_line("infer", capsys, *data, "image_size=64", "batch_size=1", f"ckpt={ckpt}")
    assert result["model"] == str(ckpt)
    assert set(result["images_per_s"]["fused"]) == {"1"}
    assert not any(key.startswith("ratio") for key in result)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["task=data"], "task=data needs a data set: add data=coco data.root=DIR"),
        (["task=data", "data=shapes", "peer=/nowhere"], "peer=/nowhere cannot be run: No such file"),
        (["task=data", "data=shapes", "peer=/bin/false"], "peer=/bin/false must be a Python with ultralytics"),
        (["backbone.block=[c2f,c2f]", "image_size=64"], "'float32' cannot be measured: .*backbone"),
    ],
)
def test_mistakes_of_the_benchmarks(overrides, message, shapes_root):
    root = [f"data.root={shapes_root}", "image_size=64"] if "data=shapes" in overrides else []
    with pytest.raises(DetkitError, match=message):
        benchmark.run(load_config("benchmark", [*overrides, *root]))
