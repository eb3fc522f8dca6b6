"""Where a model is in a file: in whatever wraps it, under whatever key; and what is refused for damage."""

import os
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from detkit.errors import DetkitError
from detkit.tasks import load_config
from detkit.tasks.import_weights import run as import_weights
from detkit.weights.identify import identify
from detkit.weights.source import read_source

# A few tensors of YOLOv8: enough to be recognised.
YOLO = {
    "model.0.conv.weight": torch.rand(16, 3, 3, 3),
    "model.0.bn.weight": torch.rand(16),
    "model.0.bn.num_batches_tracked": torch.tensor(7),
    "model.22.cv3.0.2.bias": torch.rand(4),
    "model.22.dfl.conv.weight": torch.arange(16.0).view(1, 16, 1, 1),
}
ZEROS = {name: tensor * 0 for name, tensor in YOLO.items()}
MOMENTS = {k: {"step": torch.tensor(1.0), "exp_avg": torch.rand(9), "exp_avg_sq": torch.rand(9)} for k in range(40)}


def below(prefix: str, tensors: dict[str, Tensor] = YOLO) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


def thop(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What counting operations leaves behind in every module."""
    modules = {name.rpartition(".")[0] for name in tensors}
    extra = {
        f"{m}.{key}": torch.zeros(1, dtype=torch.float64) for m in modules for key in ("total_ops", "total_params")
    }
    return tensors | extra | {"total_ops": torch.zeros(1)}


CONTENTS = {
    "plain": YOLO,
    "torch.compile": below("_orig_mod."),
    "DDP of torch.compile": {"model": below("module._orig_mod.")},
    "a compiled part": {name.replace("model.", "model._orig_mod.", 1): tensor for name, tensor in YOLO.items()},
    "YOLO().state_dict()": below("model."),
    "the list of layers alone": {name.removeprefix("model."): tensor for name, tensor in YOLO.items()},
    "Lightning": {
        "pytorch-lightning_version": "2.5.0",
        "state_dict": below("model.") | {"criterion.weight": torch.rand(3)},
        "optimizer_states": [{"state": MOMENTS, "param_groups": []}],
        "callbacks": {"ModelCheckpoint{'monitor': 'AP'}": {"best_model_score": torch.tensor(0.5)}},
    },
    "Lightning of Ultralytics": {"state_dict": below("net.model.")},
    "model_state_dict": {"epoch": 3, "model_state_dict": YOLO, "optimizer_state_dict": {"state": MOMENTS}},
    "net": {"net": YOLO, "acc": torch.tensor(0.9), "optimizer": below("exp_avg.") | below("exp_avg_sq.")},
    "a list": [{"epoch": 3}, (YOLO, {"state": MOMENTS})],
    "an average in a module": {"model": ZEROS, "ema": {"module": YOLO, "updates": 9}},
    "state_dict_ema": {"state_dict": ZEROS, "state_dict_ema": YOLO},
    "an average of the parameters alone": {"model": YOLO, "ema": {"shadow": {"model.0.conv.weight": torch.zeros(9)}}},
    "AveragedModel": {"swa": below("module.") | {"n_averaged": torch.tensor(3)}, "model": ZEROS},
    "thop": {"model": thop(YOLO)},
    "nothing is average about it": {"model": YOLO, "cinema": {"schema": ZEROS}},
}


@pytest.mark.parametrize("name", CONTENTS)
def test_the_model_is_found_by_its_tensors(tmp_path, name):
    torch.save(CONTENTS[name], tmp_path / "x.pt")
    found = identify(tmp_path / "x.pt", read_source(tmp_path / "x.pt").tensors)
    assert (found.choices, found.num_classes, found.unused) == (("model=yolov8n",), 4, ())
    assert torch.equal(found.tensors["backbone.stem.conv.weight"], YOLO["model.0.conv.weight"])
    assert len(found.tensors) == len(YOLO)


@pytest.mark.parametrize(
    "wrap", [lambda m: [m], lambda m: {"ema": {"module": m}}, lambda m: nn.DataParallel(m), nn.Sequential]
)
def test_a_module_is_found_too(tmp_path, wrap):
    module = nn.Linear(2, 3)
    module.register_buffer("total_ops", torch.zeros(1))
    torch.save(wrap(module), tmp_path / "x.pt")
    tensors = read_source(tmp_path / "x.pt").tensors
    assert {name.rpartition(".")[2]: tensor.shape for name, tensor in tensors.items()} == {
        "weight": (3, 2),
        "bias": (3,),
    }


def test_a_tensor_with_attributes_is_its_numbers(tmp_path):
    """As torch saves that of nn.Buffer, too."""
    tensor = torch.rand(2, 3)
    tensor.note = "x"
    torch.save({"w": tensor}, tmp_path / "x.pt")
    assert torch.equal(read_source(tmp_path / "x.pt").tensors["w"], tensor)


def test_the_source_is_reported(tmp_path):
    torch.save({"model": ZEROS, "ema": {"module": YOLO}, "names": ["a", "b", "c", "d"]}, tmp_path / "x.pt")
    source = read_source(tmp_path / "x.pt")
    assert (source.place, source.class_names) == ("ema.module", ("a", "b", "c", "d"))


def test_a_part_of_an_unknown_detector_is_no_backbone(tmp_path):
    """Its backbone would be taken for one that was trained on ImageNet's normalised images."""
    revcol = {"model.0.stem.0.weight": torch.rand(64, 3, 4, 4), "model.0.subnet0.alpha0": torch.rand(1, 64, 1, 1)}
    with pytest.raises(DetkitError, match="contains no model that detkit can import"):
        identify(tmp_path, revcol)


def damaged(path: Path, part: str) -> Path:
    """Flip a bit of one part of a zip."""
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        entry = next(entry for entry in archive.infolist() if entry.filename.endswith(part))
    skipped = sum(struct.unpack_from("<HH", data, entry.header_offset + 26))
    data[entry.header_offset + 30 + skipped + entry.file_size // 2] ^= 1
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(("part", "what"), [("data/0", "storage '0'"), ("data.pkl", "pickle")])
def test_a_flipped_bit_is_seen(tmp_path, part, what):
    torch.save(YOLO, tmp_path / "x.pt")
    with pytest.raises(DetkitError, match=rf"x.pt is damaged: the checksum of its {what} is wrong"):
        read_source(damaged(tmp_path / "x.pt", part))


def test_files_without_checksums_are_read(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(YOLO, tmp_path / "x.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert read_source(tmp_path / "x.pt").tensors.keys() == YOLO.keys()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_weights_that_are_no_numbers_are_refused(tmp_path, value, suffix):
    name, path = "model.0.bn.weight", tmp_path / f"x{suffix}"
    state = YOLO | {name: torch.full((16,), value)}
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    with pytest.raises(DetkitError, match=rf"its tensor '{name}' contains NaN or infinity"):
        read_source(path)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_pipe_is_not_waited_for(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    os.mkfifo(path)
    with pytest.raises(DetkitError, match=r"src=.*x\.\w+: it is not a regular file"):
        import_weights(load_config("import_weights", [f"src={path}", f"dst={tmp_path / 'y.safetensors'}"]))


def test_names_are_escaped(tmp_path):
    torch.save({"\x1b[2Jmodel.weight": torch.full((1,), torch.nan)}, tmp_path / "x.pt")
    with pytest.raises(DetkitError) as error:
        read_source(tmp_path / "x.pt")
    assert "\x1b" not in str(error.value)


def test_an_index_of_a_million_parts_is_refused(tmp_path):
    """A zip's index takes ten times its size in memory; nobody's model has so many tensors."""
    path = tmp_path / "x.pt"
    torch.save(YOLO, path)
    data = path.read_bytes()
    start = data.rfind(b"PK\x01\x02")
    end = next(place for magic in (b"PK\x06\x06", b"PK\x05\x06") if (place := data.find(magic, start)) >= 0)
    padded = data[start:end] * (9 * 2**20 // (end - start) + 1)
    tail = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 65535, 65535, len(padded), start, 0)
    path.write_bytes(data[:start] + padded + tail)
    with pytest.raises(DetkitError, match="is truncated or damaged"):
        read_source(path)
