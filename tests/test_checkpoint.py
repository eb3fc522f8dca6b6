import json
import os
import struct

import pytest
import torch
from safetensors.torch import save_file

import detkit
from detkit.engine import checkpoint as checkpoint_module
from detkit.engine.checkpoint import read_checkpoint, save_checkpoint
from detkit.errors import DetkitError
from detkit.ops.atomic_write import write_atomically
from tests.conftest import run_command


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
    assert report.missing_keys == tuple(f"head.cls_branches.{k}.2.{p}" for k in range(3) for p in ("weight", "bias"))
    assert torch.equal(other.backbone.stem.conv.weight, detector.backbone.stem.conv.weight)


def rewritten(path, change):
    content = read_checkpoint(path)
    header = {"schema_version": 1, "cfg": content.cfg, "class_names": content.class_names, "metrics": {}}
    weights = content.weights
    change(header, weights)
    save_file(weights, path, {"detkit": json.dumps(header)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h, w: h.update(schema_version=99), "schema version 99, .* reads 1"),
        (lambda h, w: h.pop("class_names"), "its header has no 'class_names'"),
        (lambda h, w: w.pop("backbone.stem.conv.weight"), "does not match the model in its header"),
        (lambda h, w: w.update({"head.bins": torch.zeros(3)}), "does not match the model in its header"),
        (lambda h, w: h["cfg"]["backbone"].update(name="resnet"), "unknown backbone 'resnet'"),
        (
            lambda h, w: (h["cfg"]["neck"].update(name="mine"), h["cfg"].update(plugins=["m"])),
            r"trained with plugins=\['m'\]",
        ),
    ],
)
def test_what_does_not_fit_is_named(checkpoint, change, message):
    _, path = checkpoint
    rewritten(path, change)
    with pytest.raises(DetkitError, match=message):
        detkit.load(path)


EDITS = [
    lambda h: h["cfg"].pop("image_size"),
    lambda h: h["cfg"].update(image_size="x"),
    lambda h: h["cfg"].update(image_size=-64),
    lambda h: h["cfg"].update(image_size=2**20),
    lambda h: h["cfg"].update(image_size=True),
    lambda h: h["cfg"].pop("neck"),
    lambda h: h["cfg"].update(backbone=None),
    lambda h: h["cfg"]["backbone"].update(width="x"),
    lambda h: h["cfg"]["backbone"].update(width=1e30),
    lambda h: h["cfg"]["backbone"].update(name=[]),
    lambda h: h["cfg"]["backbone"].update(block={"name": "c3", "conv": {"name": "akconv", "n": 10**9}}),
    lambda h: h["cfg"]["backbone"].update(repeats=[10**9, 6, 6, 3]),
    lambda h: h["cfg"]["backbone"].update({"wid\x1b[31m": 1}),
    lambda h: h["cfg"]["head"].update(reg_max=10**9),
    lambda h: h["cfg"]["head"].update(reg_max=float("nan")),
    lambda h: h["cfg"].update(data="x"),
    lambda h: h["cfg"].update(data={"name": 3}),
    lambda h: h["cfg"].update(amp="\x1b[31m"),
    lambda h: h["cfg"].update(plugins="os"),
    lambda h: h["cfg"].update(seed=[[[["y" * 5000]]]]),
    lambda h: h.update(cfg=[]),
    lambda h: h.update(class_names=[]),
    lambda h: h.update(class_names=[1, 2]),
    lambda h: h.update(class_names=["a", "a"]),
    lambda h: h.update(class_names=["a", " "]),
    lambda h: h.update(class_names=["a", "\x1b[31mred"]),
    lambda h: h.update(class_names=[str(k) for k in range(100_000)]),
    lambda h: h.update(metrics=3),
    lambda h: h.update(metrics={"AP\0": 1}),
    lambda h: h.update(part={}),
    lambda h: h.update(schema_version=True),
    lambda h: h.update(schema_version={}),
    lambda h: h.update(cfg={"a": json.loads("[" * 900 + "]" * 900)}),
]


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_header_is_refused_before_the_weights_are_read(checkpoint, edit, monkeypatch):
    _, path = checkpoint
    rewritten(path, lambda header, weights: edit(header))
    monkeypatch.setattr(checkpoint_module, "read_weights", lambda *_: pytest.fail("it reads the weights"))
    with pytest.raises(DetkitError) as error:
        detkit.load(path)
    message = str(error.value)
    assert message.startswith(str(path))
    assert message.isprintable()
    assert len(message) < 1000


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(checkpoint, value):
    _, path = checkpoint
    rewritten(path, lambda h, w: w["backbone.stem.bn.running_var"].fill_(value))
    for read in (detkit.load, lambda path: detkit.load_weights(detkit.create_model("yolov8n"), path)):
        with pytest.raises(DetkitError, match=r"not finite: 'backbone\.stem\.bn\.running_var' holds NaN or infinity"):
            read(path)


def test_weights_of_another_type_do_not_fit(checkpoint):
    _, path = checkpoint
    rewritten(path, lambda h, w: w.update({"backbone.stem.conv.weight": w["backbone.stem.conv.weight"].int()}))
    with pytest.raises(DetkitError, match="does not match the model in its header"):
        detkit.load(path)
    rewritten(path, lambda h, w: w.update({name: t.half() for name, t in w.items() if t.is_floating_point()}) or None)
    with pytest.raises(DetkitError, match="does not match"):
        detkit.load(path)


def test_only_regular_files_of_a_sensible_header_are_opened(tmp_path):
    path = tmp_path / "x.safetensors"
    for make, message in (
        (lambda: os.mkfifo(path), "it is not a regular file"),
        (path.mkdir, "it is a folder"),
        (lambda: path.symlink_to("/dev/zero"), "it is not a regular file"),
        (lambda: path.symlink_to(path), "cannot be read"),
        (lambda: path.write_bytes(struct.pack("<Q", 2**60)), "not a safetensors file, or is truncated"),
        (lambda: path.write_bytes(struct.pack("<Q", 2**26) + bytes(2**26)), "or is truncated"),
        (lambda: save_file({"a": torch.zeros(1)}, path, {"detkit": "[" * 9999}), "its header is not valid JSON"),
        (lambda: save_file({"a": torch.zeros(1)}, path, {"detkit": "9" * 9999}), "its header is not valid JSON"),
    ):
        make()
        with pytest.raises(DetkitError, match=message):
            detkit.load(path)
        path.rmdir() if path.is_dir() else path.unlink()
    for name in ("a\0b", "y" * 300):
        with pytest.raises(DetkitError, match=r"cannot be read|does not exist"):
            detkit.load(name)


def test_a_checkpoint_larger_than_the_memory_is_not_read(checkpoint, monkeypatch):
    _, path = checkpoint
    monkeypatch.setattr(checkpoint_module, "free_memory", lambda: 2**20)
    with pytest.raises(DetkitError, match=r"of weights, more than the 0\.00 GiB of free memory"):
        detkit.load(path)


def test_the_data_set_of_a_header_that_cannot_be_read_names_the_file(checkpoint, monkeypatch, capsys, tmp_path):
    _, path = checkpoint
    monkeypatch.chdir(tmp_path)
    for data in (
        {"name": "coco", "root": "/nowhere"},
        {"name": "coco", "root": "x", "train_images": 3},
        {"name": "mine"},
    ):
        rewritten(path, lambda h, w, data=data: h["cfg"].update(data=data))
        status, _, error = run_command(monkeypatch, capsys, "eval", f"ckpt={path}", "device=cpu", "workers=0")
        assert status == 2
        assert error.startswith(f"error: {path}: ")


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
    for content, message in (
        (data[: len(data) // 2], "not a safetensors file, or is truncated"),
        (b"", "not a safetensors file, or is truncated"),
        (b"\x80\x04K\x01.", "not a safetensors file, or is truncated"),
    ):
        path.write_bytes(content)
        with pytest.raises(DetkitError, match=message):
            detkit.load(path)
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(DetkitError, match="was not written by detkit"):
        detkit.load(path)
    with pytest.raises(DetkitError, match="does not exist"):
        detkit.load(tmp_path / "none.safetensors")


def test_what_lies_at_the_temporary_name_is_neither_waited_for_nor_followed(tmp_path):
    (tmp_path / "other").write_bytes(b"kept")
    for make in (os.mkfifo, lambda path: path.symlink_to(tmp_path / "other")):
        make(tmp_path / ".file.tmp")
        write_atomically(tmp_path / "file", b"new")
        assert (tmp_path / "file").read_bytes() == b"new"
        assert not (tmp_path / "file").is_symlink()
    assert (tmp_path / "other").read_bytes() == b"kept"
