"""Foreign checkpoints are read without running anything, within bounded memory, and exactly."""

import contextlib
import io
import os
import pickle
import random
import struct
import sys
import time
import tracemalloc
import zipfile
from pathlib import Path

import pytest
import torch

from detkit.errors import DetkitError
from detkit.weights import pickle_reader
from detkit.weights.pickle_names import Global, Record
from detkit.weights.pickle_reader import read_pickle
from detkit.weights.source import read_source
from detkit.weights.torch_file import open_torch_file

MiB = 1 << 20


def as_zip(path: Path, data: bytes, storages: dict[str, bytes] | None = None, compress: bool = False) -> Path:
    """Write a file such as torch.save's around a pickle."""
    method = zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("archive/data.pkl", data)
        for key, content in (storages or {}).items():
            archive.writestr(f"archive/data/{key}", content)
    return path


def as_legacy(path: Path, data: bytes) -> Path:
    """The same in the format before torch 1.6, without storages."""
    head = [0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True}]
    path.write_bytes(b"".join(pickle.dumps(part, 2) for part in head) + data + pickle.dumps([], 2))
    return path


class Call:
    """Pickles as a call of ``function``."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def attacks(sentinel: Path) -> dict[str, bytes]:
    """Pickles that create ``sentinel`` (or would, by one step more) when they are run."""
    shell = f"touch {sentinel}"
    code = f"open({str(sentinel)!r}, 'w')"
    import subprocess

    stack_global = b"\x80\x04" + text("o") + b"0" + text("os") + text("system") + b"\x93" + text(shell) + b"\x85R."
    foreign = b"\x80\x02cultralytics.nn.tasks\nDetectionModel\n)\x81"
    return {
        **{f"os.system {p}": pickle.dumps({"model": Call(os.system, shell)}, p) for p in range(6)},
        "eval": pickle.dumps(Call(eval, code), 2),
        "exec": pickle.dumps([Call(exec, code)], 4),
        "import": pickle.dumps(Call(__import__, "this"), 2),
        "getattr": pickle.dumps(Call(getattr, Call(__import__, "os"), "system"), 2),
        "popen": pickle.dumps(Call(subprocess.Popen, ["touch", str(sentinel)]), 2),
        "stack global": stack_global,
        "inst": b"(S'" + shell.encode() + b"'\nios\nsystem\n.",
        "obj": b"(cos\nsystem\n" + text(shell) + b"o.",
        "newobj": b"\x80\x02csubprocess\nPopen\n" + text(shell) + b"\x85\x81.",
        "newobj_ex": b"\x80\x04csubprocess\nPopen\n" + text(shell) + b"\x85}\x92.",
        "setstate": foreign + b"}" + text("__setstate__") + b"cos\nsystem\nsb" + text(shell) + b"b.",
        "class tricks": foreign + b"}" + text("__class__") + b"cbuiltins\ntype\nsb.",
        "dotted": b"\x80\x04" + text("collections") + text("OrderedDict.__init__.__globals__") + b"\x93.",
        "extension": b"\x80\x02\x82\x01)R.",
        "extension 4": b"\x80\x02\x84\x01\x00\x00\x00.",
        "text id": b"Pevil\n.",
        "number id": b"K\x01Q.",
        "invalid id": b"(X\x07\x00\x00\x00storagecos\nsystem\n" + text("0") + text("cpu") + b"K\x01tQ.",
        "class id": b"(X\x06\x00\x00\x00modulecos\nsystem\n" + text("a") + text("b") + b"tQ" + text(shell) + b"\x85R.",
        "buffer": b"\x80\x05\x97.",
        "foreign function": b"\x80\x02ctorch.hub\nload\n" + text(str(sentinel)) + b"\x85R.",
        "numpy.load": b"\x80\x02cnumpy\nload\n" + text(str(sentinel)) + b"\x85R.",
        "pip": b"\x80\x02cpip\nmain\n" + text("install") + b"\x85R.",
        "python 2": b"\x80\x02c__builtin__\neval\n" + text(code) + b"\x85R.",
        "posix": b"\x80\x02cposix\nsystem\n" + text(shell) + b"\x85R.",
        "reconstructor": b"\x80\x02ccopyreg\n_reconstructor\ncos\nsystem\ncbuiltins\nobject\nN\x87R.",
        "partial": b"\x80\x02cfunctools\npartial\ncos\nsystem\n\x85R.",
        "call a tensor": b"\x80\x02ctorch\nSize\n)\x85R)R.",
    }


@pytest.mark.parametrize("wrap", [as_zip, as_legacy])
@pytest.mark.parametrize("name", attacks(Path("x")))
def test_a_pickle_that_would_run_code_is_refused_in_one_message(name, wrap, tmp_path):
    sentinel = tmp_path / "sentinel"
    path = wrap(tmp_path / "evil.pt", attacks(sentinel)[name])
    with pytest.raises(DetkitError) as error:
        read_source(path)
    message = str(error.value)
    assert str(path) in message
    assert "\n" not in message
    assert len(message) < len(str(path)) + 200
    assert not sentinel.exists()
    assert "this" not in sys.modules


def test_what_is_refused_is_named(tmp_path):
    path = as_zip(tmp_path / "evil.pt", pickle.dumps(Call(os.system, "true"), 2))
    with pytest.raises(DetkitError, match=r"evil.pt refers to posix.system, which is not data: .* nothing was exec"):
        read_source(path)


def test_an_attack_works_when_it_is_run(tmp_path):
    """So that the tests above test something."""
    sentinel = tmp_path / "sentinel"
    pickle.loads(attacks(sentinel)["stack global"])
    assert sentinel.exists()


def test_a_module_object_is_a_record_and_its_module_is_not_imported(tmp_path, monkeypatch):
    sentinel = tmp_path / "sentinel"
    (tmp_path / "evil_package.py").write_text(f"open({str(sentinel)!r}, 'w')\nclass Model: pass")
    monkeypatch.syspath_prepend(tmp_path)
    data = b"\x80\x02cevil_package\nModel\n)\x81}" + text("width") + b"K\x07sb."
    record, _ = read_pickle(io.BytesIO(data), "file")
    assert isinstance(record, Record)
    assert (record.kind, record.state) == (Global("evil_package", "Model"), {"width": 7})
    assert not sentinel.exists()
    assert "evil_package" not in sys.modules


def test_harmless_objects_of_real_checkpoints_are_read(tmp_path):
    import argparse
    import datetime
    from collections import OrderedDict, defaultdict

    import numpy as np

    content = {
        "numbers": [1, -2, 2**70, 1.5, True, None, 3 + 4j],
        "texts": ("a", b"b", "猫"),
        "sets": [{1, 2}, frozenset("ab")],
        "paths": [Path("/tmp/x")],
        "numpy": [np.float64(0.5), np.arange(4), np.dtype("f4")],
        "opt": argparse.Namespace(imgsz=320),
        "when": datetime.datetime(2024, 1, 2),
        "counts": defaultdict(int, {"x": 1}),
        "model": OrderedDict(weight=torch.ones(2)),
        "dtype": [torch.float16, torch.device("cpu"), torch.Size([1, 2])],
    }
    for protocol in (2, 4, 5):
        torch.save(content, tmp_path / "x.pt", pickle_protocol=protocol)
        source = read_source(tmp_path / "x.pt")
        assert torch.equal(source.tensors["weight"], torch.ones(2))
        assert source.image_size == 320
        found = open_torch_file(tmp_path / "x.pt").content
        assert found["numbers"][:6] == content["numbers"][:6]
        assert found["texts"][::2] == content["texts"][::2]
        assert found["counts"] == {"x": 1}
        assert found["dtype"][2] == (1, 2)


@pytest.mark.parametrize("legacy", [False, True])
def test_tensors_are_read_as_torch_reads_them(tmp_path, legacy):
    base = torch.randn(4, 6)
    state = {
        "half": torch.randn(3, 5).half(),
        "double": torch.randn(2).double(),
        "bfloat": torch.randn(7).bfloat16(),
        "long": torch.tensor(2**40),
        "flags": torch.tensor([True, False]),
        "channels_last": torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        "transposed": torch.randn(2, 3).t(),
        "row": base[1],
        "column": base[:, 2],
        "parameter": torch.nn.Parameter(torch.randn(2, 2)),
        "empty": torch.zeros(0),
    }
    path = tmp_path / "x.pth"
    torch.save({"state_dict": state}, path, _use_new_zipfile_serialization=not legacy)
    found = read_source(path).tensors
    assert found.keys() == state.keys()
    for name, tensor in state.items():
        reference = tensor.float() if tensor.is_floating_point() else tensor
        assert torch.equal(found[name], reference.detach()), name
        assert found[name].dtype == reference.dtype


def test_the_average_is_preferred(tmp_path):
    average, last = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    for content, reference in (
        ({"model": last, "ema": average}, average),
        ({"model": last, "ema": None}, last),
        ({"state_dict": {f"module.{k}": v for k, v in last.state_dict().items()}}, last),
        (last.state_dict(), last),
        (last, last),
    ):
        torch.save(content, tmp_path / "x.pt")
        found = read_source(tmp_path / "x.pt").tensors
        assert found.keys() == {"weight", "bias"}
        assert torch.equal(found["weight"], reference.weight)


def tensor_pickle(numel: int, size: tuple, stride: tuple, offset: int = 0) -> bytes:
    """{"model": {"w": a tensor that claims this of the storage "0"}}."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            return ("storage", torch.FloatStorage, "0", "cpu", numel) if value is storage else None

    storage = object()
    out = io.BytesIO()
    tensor = Call(torch._utils._rebuild_tensor_v2, storage, offset, size, stride, False, {})
    Pickler(out, 2).dump({"model": {"w": tensor}})
    return out.getvalue()


@pytest.mark.parametrize(
    ("numel", "size", "stride", "offset"),
    [
        (4, (10**12,), (1,), 0),
        (10**12, (10**12,), (1,), 0),
        (4, (10**9, 10**9), (0, 0), 0),
        (4, (10**6,), (0,), 0),
        (4, (2, 2), (2, 2**60), 0),
        (4, (4,), (1,), 1),
        (4, (4,), (1,), 2**60),
        (4, (-1,), (1,), 0),
        (4, (4,), (-1,), 3),
        (4, (4,), (1, 1), 0),
        (4, (1,) * 100, (1,) * 100, 0),
        (-4, (4,), (1,), 0),
        (2**70, (4,), (1,), 0),
    ],
)
def test_a_tensor_cannot_claim_more_than_the_file_holds(tmp_path, numel, size, stride, offset):
    path = as_zip(tmp_path / "x.pt", tensor_pickle(numel, size, stride, offset), {"0": bytes(16)})
    with pytest.raises(DetkitError, match=r"claims more elements|damaged|unknown type"):
        read_source(path)


def test_tensors_together_cannot_claim_more_than_the_file_holds(tmp_path):
    shared = torch.zeros(1000)
    torch.save({f"w{k}": shared for k in range(100)}, tmp_path / "x.pt")
    with pytest.raises(DetkitError, match="claim more memory than the file contains"):
        read_source(tmp_path / "x.pt")


def peak_of(action) -> float:
    """Peak of Python's memory in MiB while ``action`` runs into its DetkitError."""
    tracemalloc.start()
    try:
        with pytest.raises(DetkitError):
            action()
        return tracemalloc.get_traced_memory()[1] / MiB
    finally:
        tracemalloc.stop()


def test_a_zip_bomb_is_not_unpacked(tmp_path):
    bomb = tensor_pickle(50 * MiB, (50 * MiB,), (1,))
    path = as_zip(tmp_path / "x.pt", bomb, {"0": bytes(200 * MiB)}, compress=True)
    assert path.stat().st_size < MiB
    assert peak_of(lambda: read_source(path)) < 5
    with pytest.raises(DetkitError, match="an entry of it is compressed"):
        read_source(path)


MODULE = b"ctorch.nn\nModule\n)\x81"


def tower(height: int, closed: bool) -> bytes:
    """Modules, each with the one below as two children; ``closed``: the lowest holds the highest."""
    out = b"\x80\x02" + MODULE + b"q\x00"  # memo 0: the lowest
    for k in range(1, height + 1):
        below = b"j" + struct.pack("<I", k - 1)
        children = b"}(" + text("a") + below + text("b") + below + b"u"
        out += MODULE + b"r" + struct.pack("<I", k) + b"}" + text("_modules") + children + b"sb0"
    top = b"j" + struct.pack("<I", height)
    if closed:
        out += b"h\x00}" + text("_modules") + b"}" + text("top") + top + b"ssb0"
    return out + top + b"."


def long_list(count: int) -> bytes:
    """Push a list of ``count`` strings and file it as memo 0."""
    return b"](" + b"".join(text(f"{k:06}") for k in range(count)) + b"eq\x00"


def crowd(width: int) -> bytes:
    """One module with ``width`` parameters, the child of another under ``width`` names: width**2 tensors."""

    def text(value: bytes) -> bytes:
        return b"X" + struct.pack("<I", len(value)) + value

    def table(value: bytes) -> bytes:
        return b"}(" + b"".join(text(b"%d" % k) + value for k in range(width)) + b"u"

    record = b"cultralytics.nn\nConv\n)\x81"
    storage = b"(" + text(b"storage") + b"ctorch\nFloatStorage\n" + text(b"0") + text(b"cpu") + b"K\x01tQ"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\x00))\x89}tR"
    child = record + b"}(" + text(b"_parameters") + tensor + b"q\x010" + table(b"h\x01") + b"ub"
    return b"\x80\x02" + child + b"q\x020" + record + b"}(" + text(b"_modules") + table(b"h\x02") + b"ub."


def tuples(height: int) -> bytes:
    """Push tuples, each of the one before twice, and file them as memos 0, 1, ..."""
    return b")q\x00" + b"".join(b"h%ch%c\x86q%c" % (k - 1, k - 1, k) for k in range(1, height + 1))


CONV = b"cultralytics.nn\nConv\n"  # filed as memo 1 by those who need it again


def alike(count: int, state: bytes) -> bytes:
    """A list of ``count`` objects that share one state."""
    return b"\x80\x02](" + CONV + b"q\x010" + state + b"q\x02" + b"h\x01)\x81h\x02b" * count + b"e."


def numbers(count: int) -> bytes:
    """A mapping with as many numbers as keys."""
    return b"}(" + b"".join(b"J" + struct.pack("<I", k) + b"N" for k in range(count)) + b"u"


def crowd_of_empty(count: int) -> bytes:
    """The state of a module with as many children that hold nothing."""
    empty = CONV + b")\x81}" + text("_modules") + b"}sb"
    return b"}" + text("_modules") + b"}(" + b"".join(text(f"{k}") + empty for k in range(count)) + b"us"


def family(count: int) -> bytes:
    """A module with as many children, which share one table of parameters, all of them without a name."""
    child = b"h\x01)\x81h\x02b"
    shared = b"}" + text("_parameters") + numbers(20_000) + b"s"
    children = b"}(" + b"".join(text(f"{k}") + child for k in range(count)) + b"u"
    return b"\x80\x02" + CONV + b"q\x010" + shared + b"q\x020h\x01)\x81}" + text("_modules") + children + b"sb."


def long_names(depth: int, width: int) -> bytes:
    """A tower of modules of long names, the lowest of which has ``width`` parameters."""
    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + b"K\x01tQ"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\x00))\x89}tRq\x000"
    out = b"}(" + b"".join(text(f"{k}") + b"h\x00" for k in range(width)) + b"u"
    out = CONV + b")\x81}" + text("_parameters") + out + b"s" + text("_modules") + b"}sb"
    for _ in range(depth):
        out = CONV + b")\x81}" + text("_modules") + b"}" + text("n" * 100) + out + b"ssb"
    return b"\x80\x02" + tensor + out + b"."


BOMBS = {
    "huge string": b"\x80\x04\x8d" + struct.pack("<Q", 2**60) + b"x.",
    "huge bytes": b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"x.",
    "huge bytearray": b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"x.",
    "huge number": b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b"x.",
    "huge frame": b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b".",
    "huge memo": b"\x80\x02Nr\xff\xff\xff\xff0Nr\xfe\xff\xff\xff.",
    "key that takes 2**60 steps to hash": b"\x80\x02)" + b"2\x86" * 60 + b"q\x00}h\x00Ns.",
    "the same without an instruction to duplicate": b"\x80\x02}](" + tuples(60) + b"e0h\x3cNs.",
    "calls with one long tuple": b"\x80\x02("
    + b"N" * 200_000
    + b"tq\x000cpathlib\nPosixPath\nq\x01("
    + b"h\x01h\x00R" * 100_000
    + b"t.",
    "sets of one long list": b"\x80\x02" + long_list(5000) + b"](" + b"cbuiltins\nset\nh\x00\x85R" * 2000 + b"e.",
    "dicts of one long list": b"\x80\x02"
    + long_list(5000)
    + b"]("
    + b"ccollections\nOrderedDict\nh\x00\x85R" * 2000
    + b"e.",
    "sizes of one long list": b"\x80\x02" + long_list(5000) + b"](" + b"ctorch\nSize\nh\x00\x85R" * 2000 + b"e.",
    "modules, 2**40 paths": tower(40, closed=False),
    "modules, too deep": tower(3000, closed=False),
    "one wide module under many names": crowd(1000),
    "modules in a circle": tower(3, closed=True),
    "modules that share a crowd of empty ones": alike(6_000, crowd_of_empty(6_000)),
    "objects that share a long state": alike(20_000, numbers(20_000)),
    "modules that share a table of nothing": family(20_000),
    "long names of modules in modules": long_names(45, 20_000),
    "deep lists": b"\x80\x02" + b"](" * 50_000 + b"e" * 50_000 + b".",
    "deep tuples": b"\x80\x02)" + b"\x85" * 50_000 + b".",
    "deep records": b"\x80\x02N" + (b"ctorch.nn\nModule\n)\x81" + b"N\x86") * 20_000 + b".",
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_costs_little(name, tmp_path):
    path = as_zip(tmp_path / "x.pt", BOMBS[name])
    start = time.process_time()
    assert peak_of(lambda: read_source(path)) < 60
    assert time.process_time() - start < 30  # seconds of computing


def test_a_pickle_of_endless_instructions_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(pickle_reader, "MAX_OPCODES", 1000)
    with pytest.raises(DetkitError, match="more than 1,000 opcodes"):
        read_source(as_zip(tmp_path / "x.pt", b"\x80\x02" + b"N0" * 1000 + b"N."))


def test_a_pickle_beyond_the_limit_is_not_read(tmp_path):
    path = tmp_path / "x.pt"
    with zipfile.ZipFile(path, "w") as archive:
        info = zipfile.ZipInfo("archive/data.pkl")
        with archive.open(info, "w") as entry:
            for _ in range(65):
                entry.write(bytes(MiB))
    assert peak_of(lambda: read_source(path)) < 5


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"not a checkpoint", "is not a checkpoint"),
        (b"\x80\x02K\x01.", "is a pickle, but not of torch.save"),
        (b"PK\x03\x04" + bytes(100), "is truncated or damaged"),
        (pickle.dumps({"model": 1}), "is a pickle, but not of torch.save"),
    ],
)
def test_other_files_are_distinguished(tmp_path, content, message):
    path = tmp_path / "x.pt"
    path.write_bytes(content)
    with pytest.raises(DetkitError, match=message):
        read_source(path)


def test_zips_and_folders_that_are_no_checkpoints(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("a/b.txt", "text")
    with zipfile.ZipFile(tmp_path / "script.pt", "w") as archive:
        archive.writestr("a/data.pkl", b"N.")
        archive.writestr("a/constants.pkl", b"N.")
    torch.save({"epoch": 3}, tmp_path / "empty.pt")
    for name, message in (
        ("x.zip", "contains no data.pkl"),
        ("script.pt", "is a TorchScript program"),
        ("empty.pt", "contains no model"),
        (".", "is a folder"),
        ("none.pt", "does not exist"),
    ):
        with pytest.raises(DetkitError, match=message):
            read_source(tmp_path / name)


@pytest.fixture(params=[False, True], ids=["zip", "legacy"])
def small_file(request, tmp_path) -> bytes:
    """The bytes of a small checkpoint: a module, its state dict, and what surrounds them."""
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    model.names = {0: "a", 1: "b"}
    content = {
        "epoch": 3,
        "ema": None,
        "model": model.half(),
        "train_args": {"imgsz": 320},
        "state": model.state_dict(),
    }
    path = tmp_path / "small.pt"
    torch.save(content, path, _use_new_zipfile_serialization=not request.param)
    return path.read_bytes()


def survives(path: Path, data: bytes) -> bool:
    """Whether ``data`` is still read; DetkitError is the only other way out."""
    path.write_bytes(data)
    try:
        read_source(path)
        return True
    except DetkitError as error:
        assert "\n" not in str(error)
        return False


def test_truncation_anywhere_is_one_message(small_file, tmp_path):
    assert survives(tmp_path / "x.pt", small_file)
    for length in {*range(0, len(small_file), max(1, len(small_file) // 150)), len(small_file) - 1}:
        assert not survives(tmp_path / "x.pt", small_file[:length]), length


@pytest.mark.filterwarnings("ignore:invalid escape sequence")
def test_no_damage_is_a_fault(small_file, tmp_path):
    rng = random.Random(0)
    outcomes = []
    for _ in range(400):
        data = bytearray(small_file)
        for _ in range(rng.choice((1, 1, 3, 20))):
            place = rng.randrange(len(data))
            if rng.random() < 0.7:
                data[place] = rng.randrange(256)
            else:
                del data[place : place + rng.randrange(1, 9)]
        outcomes.append(survives(tmp_path / "x.pt", bytes(data)))
    assert True in outcomes
    assert False in outcomes


@pytest.mark.filterwarnings("ignore:invalid escape sequence")
def test_no_damaged_pickle_is_a_fault():
    """Denser than above: every byte of a pickle, set to other instructions."""
    rng = random.Random(0)
    data = pickle.dumps({"a": [1, (2.0, "x")], "b": {"c": {1, 2}, "d": Call(Record, Global("a", "B"))}}, 2)
    for place in range(len(data)):
        for _ in range(20):
            damaged = bytes((*data[:place], rng.randrange(256), *data[place + 1 :]))
            with contextlib.suppress(DetkitError):
                read_pickle(io.BytesIO(damaged), "file")
