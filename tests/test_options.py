"""The options of data, sampling and validation in a run from end to end, and the values they may have."""

import json
from pathlib import Path

import pytest

from detkit.config import check_values, compose_config, resolve
from detkit.data.dataset import DetectionDataset
from detkit.data.formats.shapes import read_shapes
from detkit.data.tiles import TiledDataset
from detkit.engine.evaluator import METRICS
from detkit.errors import DetkitError
from detkit.tasks import eval as eval_task
from detkit.tasks import load_config, train


def test_a_run_with_every_option(train_overrides, shapes_root: Path, tmp_path):
    """Tiles, sampling, multi-scale, rectangles and heavy augmentation together; square images evaluate the same."""
    options = [
        "augment=heavy",
        "augment.mosaic.close_epochs=1",
        "+augment.transforms.RandomCrop={height: 40, width: 40}",
    ]
    options += ["data.tiles={size: 160}", "data.sampling=class_balanced", "trainer.multi_scale=0.5", "rect=true"]
    train.run(load_config("train", [*train_overrides, *options, f"run_dir={tmp_path / 'run'}"]))
    tiled = TiledDataset(DetectionDataset(read_shapes("train", root=str(shapes_root))), 160, 0.2, 0.5)
    assert len(tiled.windows) == 4 * 24
    reported = json.loads((tmp_path / "run" / "metrics.json").read_text())["last"]
    ckpt = tmp_path / "run" / "last.safetensors"
    for rect in ("true", "false"):
        overrides = [f"ckpt={ckpt}", f"run_dir={tmp_path / rect}", "workers=0", f"rect={rect}", "device=cpu"]
        metrics = eval_task.run(load_config("eval", overrides))
        assert [metrics[name] for name in METRICS] == pytest.approx([reported[name] for name in METRICS], abs=1e-6)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.sampling=often", "data.sampling=often must be null, repeat_factor or class_balanced"),
        ("data.repeat_threshold=0", "data.repeat_threshold=0 must be a number above 0, and 1 at most"),
        ("data.tiles.size=8", "data.tiles.size=8 must be a whole number, 32 or more, or null"),
        ("data.tiles.overlap=1", "data.tiles.overlap=1 must be a number from 0 to 0.9"),
        ("data.tiles.positive_fraction=0", "data.tiles.positive_fraction=0 must be a number above 0, and 1 at most"),
        ("+data.tiles.stride=3", "data.tiles=.* must be null, or a mapping of size, overlap and positive_fraction"),
        ("trainer.multi_scale=1", "trainer.multi_scale=1 must be a number from 0 to 0.9"),
        ("rect=2", "rect=2 must be true or false"),
        ("augment.mixup.p=2", "augment.mixup.p=2 must be a number from 0 to 1"),
        ("augment.mixup.alpha=0", "augment.mixup.alpha=0 must be a number above 0"),
        ("augment.copy_paste.max_objects=0", "augment.copy_paste.max_objects=0 must be a whole number, 1 or more"),
        ("augment.copy_paste.max_side=2", "augment.copy_paste.max_side=2 must be a number above 0, and 1 at most"),
    ],
)
def test_values_that_make_no_sense_are_refused(override, message):
    cfg = resolve(compose_config("train", [override]))
    with pytest.raises(DetkitError, match=message):
        check_values(cfg)


def test_no_options_at_all_is_fine():
    check_values(resolve(compose_config("train", ["data.tiles=null", "data.sampling=null"])))
