import json

import pytest
import torch
from safetensors.torch import save_file

import detkit
from detkit.engine.checkpoint import read_checkpoint, save_checkpoint
from detkit.errors import DetkitError


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "model.safetensors"
    detector = detkit.create_model("yolov8n", num_classes=2)
    detector.class_names = ("Hund", "猫")
    save_checkpoint(detector, path, {"AP": 0.5})
    return detector, path


def test_a_detector_returns_from_its_file_alone(checkpoint):
    detector, path = checkpoint
    loaded = detkit.load(path)
    assert loaded.class_names == ("Hund", "猫")
    assert loaded.cfg == detector.cfg
    assert not loaded.training
    assert read_checkpoint(path).metrics == {"AP": 0.5}
    for name, tensor in detector.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_weights_move_to_another_class_count(checkpoint):
    detector, path = checkpoint
    other = detkit.create_model("yolov8n", num_classes=7)
    report = detkit.load_weights(other, path)
    assert report.afresh == tuple(f"head.cls_branches.{k}.2.{p}" for k in range(3) for p in ("weight", "bias"))
    assert torch.equal(other.backbone.stem.conv.weight, detector.backbone.stem.conv.weight)


def rewritten(path, change):
    content = read_checkpoint(path)
    header = {"schema_version": 1, "cfg": content.cfg, "class_names": content.class_names, "metrics": {}}
    weights = content.weights
    change(header, weights)
    save_file(weights, path, {"detkit": json.dumps(header)})


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda h, w: h.update(schema_version=99), "schema version 99, this detkit reads 1"),
        (lambda h, w: h.pop("class_names"), "its header has no 'class_names'"),
        (lambda h, w: w.pop("backbone.stem.conv.weight"), "does not fit the model in its header"),
        (lambda h, w: w.update({"head.bins": torch.zeros(3)}), "does not fit the model in its header"),
        (lambda h, w: h["cfg"]["backbone"].update(name="resnet"), "unknown backbone 'resnet'"),
        (
            lambda h, w: (h["cfg"]["neck"].update(name="mine"), h["cfg"].update(plugins=["m"])),
            r"trained with plugins=\['m'\]",
        ),
    ],
)
def test_what_does_not_fit_is_named(checkpoint, change, sentence):
    _, path = checkpoint
    rewritten(path, change)
    with pytest.raises(DetkitError, match=sentence):
        detkit.load(path)


def test_a_checkpoint_that_does_not_fit_says_so_briefly(checkpoint):
    _, path = checkpoint
    rewritten(path, lambda h, w: h["cfg"]["backbone"].update(width=0.5))
    with pytest.raises(DetkitError) as error:
        detkit.load(path)
    assert len(str(error.value)) < 400


def test_the_weights_bring_their_image_size(checkpoint):
    _, path = checkpoint
    assert detkit.create_model("yolov8n").cfg["image_size"] == 640
    rewritten(path, lambda h, w: h["cfg"].update(image_size=320))
    assert detkit.create_model("yolov8n", num_classes=2, weights=path).cfg["image_size"] == 320


def test_other_files_are_refused(checkpoint, tmp_path):
    _, path = checkpoint
    data = path.read_bytes()
    for content, sentence in (
        (data[: len(data) // 2], "not a safetensors file, or is truncated"),
        (b"", "not a safetensors file, or is truncated"),
        (b"\x80\x04K\x01.", "not a safetensors file, or is truncated"),
    ):
        path.write_bytes(content)
        with pytest.raises(DetkitError, match=sentence):
            detkit.load(path)
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(DetkitError, match="was not written by detkit"):
        detkit.load(path)
    with pytest.raises(DetkitError, match="does not exist"):
        detkit.load(tmp_path / "none.safetensors")
