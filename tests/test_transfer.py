"""``weights=FILE``: what fits is taken, and the report says how much that was."""

import pytest
import torch
from torch import nn

import detkit
from detkit.engine.checkpoint import Checkpoint, write_checkpoint
from detkit.engine.transfer import TransferRow, load_weights
from detkit.errors import DetkitError
from detkit.tasks.runs.run_logging import print_transfer


class Small(nn.Module):
    """60 + 5 numbers in the backbone, 40 in the neck, 21 + 3 in the head; the batch norm's statistics do not count."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(12, 5), nn.BatchNorm1d(5, affine=False))
        self.neck = nn.Linear(5, 8, bias=False)
        self.head = nn.Linear(7, 3)


@pytest.fixture
def small_checkpoint(tmp_path):
    """Of the backbone all, of the neck another shape, of the head the bias alone; and a tensor of nobody's."""
    weights = {
        "backbone.0.weight": torch.full((5, 12), 2.0),
        "backbone.0.bias": torch.full((5,), 2.0),
        "neck.weight": torch.zeros(8, 6),
        "head.bias": torch.full((3,), 2.0),
        "aux.weight": torch.zeros(4),
    }
    path = tmp_path / "small.safetensors"
    write_checkpoint(path, Checkpoint(weights, {}, (), {}))
    return path


def test_the_report_counts_numbers(small_checkpoint):
    model = Small()
    report = load_weights(model, small_checkpoint)
    assert report.rows == (
        TransferRow("backbone", 65, 0, 0),
        TransferRow("neck", 0, 40, 0),
        TransferRow("head", 3, 0, 21),
    )
    assert report.total == TransferRow("all", 68, 40, 21)
    assert report.unexpected_keys == 1
    assert set(report.missing_keys) == {
        "neck.weight",
        "head.weight",
        *(f"backbone.1.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")),
    }
    assert (model.backbone[0].weight == 2).all()
    assert (model.head.bias == 2).all()
    assert not (model.neck.weight == 0).all()


def test_the_table_says_it_in_percent(small_checkpoint, capsys):
    print_transfer(load_weights(Small(), small_checkpoint))
    out = capsys.readouterr().out
    rows = [line.replace("│", " ").split() for line in out.splitlines() if "│" in line]
    assert rows == [
        ["backbone", "65", "100", "%", "0", "%", "0", "%"],
        ["neck", "40", "0", "%", "100", "%", "0", "%"],
        ["head", "24", "12.5", "%", "0", "%", "87.5", "%"],
        ["all", "129", "52.7", "%", "31.0", "%", "16.3", "%"],
    ]
    assert "unexpected tensors in the file: 1" in out


def test_randomly_initialized_parts_are_reported(tmp_path, small_checkpoint, capsys):
    model = Small()
    assert load_weights(model, small_checkpoint).warnings == ("the neck is randomly initialized",)
    write_checkpoint(tmp_path / "named.safetensors", Checkpoint({"neck.weight": torch.zeros(8, 5)}, {}, ("cat",), {}))
    model.class_names = ("cat", "dog")
    report = load_weights(model, tmp_path / "named.safetensors")
    assert report.warnings[:2] == ("the backbone is randomly initialized", "the head is randomly initialized")
    assert "the file has 1 classes (cat, ...), this model has 2 (cat, dog, ...)" in report.warnings[2]
    print_transfer(report)
    assert "warning: the head is randomly initialized" in capsys.readouterr().out
    model.class_names = ("cat",)
    assert len(load_weights(model, tmp_path / "named.safetensors").warnings) == 2


def test_nearly_all_is_not_called_all(capsys):
    report = detkit.engine.transfer.TransferReport("x", (TransferRow("head", 99_999, 1, 0),), (), 0)
    print_transfer(report)
    out = capsys.readouterr().out
    assert "99.9 %" in out
    assert "0.1 %" in out


def test_weights_of_another_model_are_refused(tmp_path):
    """The bins of the head fit everywhere, and are worth nothing."""
    weights = {"head.bins": torch.arange(16.0), "backbone.stem.conv.weight": torch.zeros(7, 3, 3, 3)}
    write_checkpoint(tmp_path / "x.safetensors", Checkpoint(weights, {}, (), {}))
    detector = detkit.create_model("yolov8n")
    with pytest.raises(DetkitError, match=r"weights=.*x.safetensors: no kernel in it matches this model"):
        detkit.load_weights(detector, tmp_path / "x.safetensors")
