"""Configurations: every key has a type, and whatever is put in its place is used or refused in one sentence."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from detkit.config import as_hydra, check_values, compose_config, group_options, resolve, split_flags
from detkit.config.check import first_unsupported_value
from detkit.data.augment import transforms  # noqa: F401  (the readers and transforms register themselves)
from detkit.errors import DetkitError
from detkit.hints import fits
from detkit.models.budget import TooLarge
from detkit.models.detector import build_detector, build_loss, build_meta_detector
from detkit.registry import BACKBONES
from detkit.tasks import find_task, list_tasks

NONSENSE: list[Any] = [
    "x",
    "",
    [],
    {},
    None,
    -1,
    0,
    1.5,
    1e30,
    math.nan,
    math.inf,
    True,
    2**63,
    16**5000,  # too long for Python to write down in tens
    "a\0b",
    "\x1b[31m",
    "y" * 5000,
    ["x"],
    [0, -1],
    {"a": "x"},
    {"name": "c2f", "n": "x"},
    [[["x"]]],
]
GIVEN = {  # what has no default
    "tune": ["search={optim.lr: [0.1]}"],
    "eval": ["ckpt=x", "data=shapes"],
    "predict": ["ckpt=x", "source=x"],
    "export": ["ckpt=x", "format=onnx"],
    "convert_data": ["dst=x", "format=yolo"],
    "import_weights": ["src=x", "dst=x", "model=yolov8n"],
    "benchmark": ["data=shapes"],
}
PARTS = ("backbone", "neck", "head", "loss")
FOR_PARTS: list[Any] = ["x", [], None, -1, 0, 1e30, 2**31 - 1, ["x"], {"a": "x"}]
COMPOSITIONS = ["head=yolov5", "backbone=revcol_tiny", "neck=repgd", "backbone=mobilenetv2", "neck.block=c3_akconv"]


@pytest.fixture
def few_modules(monkeypatch):
    """A limit that is reached soon."""
    monkeypatch.setattr("detkit.models.budget.MAX_MODULES", 2000)


def composed(task: str, *overrides: str) -> dict[str, Any]:
    return resolve(compose_config(task, [*GIVEN.get(task, []), *overrides]))


def places(node: dict[str, Any], prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The keys of nested mappings, those of the mappings themselves too."""
    found = []
    for key, value in node.items():
        found.append((*prefix, key))
        found += places(value, (*prefix, key)) if isinstance(value, dict) else []
    return found


def with_value(cfg: dict[str, Any], place: tuple[str, ...], value: Any) -> dict[str, Any]:
    changed = copy.deepcopy(cfg)
    node = changed
    for key in place[:-1]:
        node = node[key]
    node[place[-1]] = value
    return changed


def assert_readable(error: DetkitError) -> None:
    message = str(error)
    assert 10 < len(message) < 1000, message
    assert message.isprintable(), message


@pytest.mark.parametrize("task", list_tasks())
def test_every_key_has_a_type_and_survives_nonsense(task):
    cfg = composed(task)
    check_values(cfg, find_task(task).config)
    untyped = [key for key in cfg if key not in find_task(task).config.model_fields]
    assert not untyped
    refused = 0
    for place in places(cfg):
        for value in NONSENSE:
            try:
                check_values(with_value(cfg, place, value), find_task(task).config)
            except DetkitError as error:
                assert_readable(error)
                refused += 1
    assert refused > 0.6 * len(places(cfg)) * len(NONSENSE) - 300  # open mappings take nearly anything


@pytest.mark.parametrize("options", [[], *([name] for name in COMPOSITIONS)], ids=str)
def test_parts_are_built_of_nonsense_or_refused(options, few_modules):
    """Without memory: what is built here is built of shapes alone."""
    cfg = composed("train", *options)
    known = set(places(composed("train"))) if options else set()
    for place in (p for p in places(cfg) if p[0] in PARTS and len(p) > 1 and p not in known):
        for value in FOR_PARTS:
            changed = with_value(cfg, place, value)
            try:
                check_values(changed)
                detector = build_meta_detector(changed, ["a", "b"]) or build_detector(changed, ["a", "b"])
                build_loss(changed, detector.head)
            except DetkitError as error:
                assert_readable(error)


@pytest.mark.parametrize("group", ["model", "backbone", "neck", "head", "loss", "augment", "optim", "trainer", "data"])
def test_every_option_is_allowed(group):
    for option in group_options(group):
        given = {"yolo": ["data.yaml=x"], "shapes": []}.get(option, ["data.root=x"]) if group == "data" else []
        check_values(composed("train", f"{group}={option}", *given))


@pytest.mark.parametrize(
    ("task", "override", "message"),
    [
        ("train", "seed=4294967296", "seed=4294967296 must be a whole number, 0 or more, and 4294967295 at most"),
        ("train", "image_size=100000", "a multiple of 32 pixels, 64 or more, and 8192 at most"),
        ("train", "workers=100000", "and 1024 at most"),
        ("train", "model.width=1000", "model.width=1000 must be a number above 0, and 64 at most"),
        ("train", "model.depth=10000", "model.depth=10000 must be a number above 0, and 64 at most"),
        ("train", "model.name=[]", "model.name=[] must be a name"),
        ("train", "loss=[]", "loss is not set"),
        ("train", "augment.mosaic=x", "augment.mosaic=x must be a mapping of p, close_epochs and partners"),
        ("train", "+trainer.epoks=3", "there is no key 'trainer.epoks'; did you mean 'trainer.epochs'?"),
        ("train", "~trainer.epochs", "trainer.epochs is not set: add trainer.epochs=VALUE"),
        ("train", "~optim", "optim is not set"),
        ("train", "run_dir='a\0b'", "run_dir=a\\x00b must not contain control characters"),
        ("train", f"run_dir={'y' * 300}", "must be a path"),
        ("train", "trainer.epochs=null", "trainer.epochs is not set: it must be a whole number"),
        ("train", "trainer.compile=1", "trainer.compile=1 must be true or false"),
        ("train", "trainer.epochs=true", "trainer.epochs=true must be a whole number"),
        ("train", "optim.lr='1'", "optim.lr=1 must be a number above 0"),
        ("predict", "max_det=9223372036854775808", "and 100000 at most"),
        ("summary", "num_classes=1000000000", "and 100000 at most"),
    ],
)
def test_values_of_no_sense_are_named(task, override, message):
    with pytest.raises(DetkitError) as error:
        check_values(composed(task, override), find_task(task).config)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=${x}", "does not resolve"),
        ("seed=${seed}", "does not resolve"),
        ("run_dir=${oc.env:NO_SUCH_VARIABLE}", "does not resolve"),
        ("model=[]", "specify 'head'"),
        (f"model={'y' * 5000}", "is too long: known are goldyolo_n"),
        (f"seed={'9' * 5000}", "is too long"),
        (f"modle={'y' * 5000}", "there is no key 'modle'"),
        ("run_dir=a\0b", "cannot read the argument 'run_dir=a\\x00b'"),
    ],
)
def test_what_does_not_compose_is_a_message(override, message):
    with pytest.raises(DetkitError) as error:
        composed("train", override)
    assert message in str(error.value)
    assert_readable(error.value)


def test_a_tuple_of_different_hints_is_checked_member_by_member():
    assert fits([1, 0.5], tuple[int, float]) and fits([1, 2, 3], tuple[int, ...]) and fits([], list[int])
    assert not fits([0.5, 1], tuple[int, float]) and not fits([1], tuple[int, float]) and not fits([1, "x"], list[int])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("backbone.width=x", "backbone.width=x must be a number"),
        ("head.reg_max=1e9", "head.reg_max=1000000000.0 must be a whole number"),
        ("head.reg_max=1000000000", "head.reg_max=1000000000 must be a whole number from 2 to 1024"),
        ("backbone.block={name: c3, conv: [x]}", "block 'c3': conv=['x'] must be text or a mapping"),
        ("backbone.repeats=[1,x,1,1]", "backbone.repeats=[1, 'x', 1, 1] must be a list of whole numbers"),
        ("backbone.stem_kernel=-3", "kernel size k=-3"),
        ("loss.topk=0", "loss.topk=0 must be a whole number, 1 or more"),
        ("loss.box={}", "loss.box={} must be a number"),
        ("backbone.block=[c2f,c2f,c2f,7]", "backbone.block=['c2f', 'c2f', 'c2f', 7] must be text, a mapping or a list"),
    ],
)
def test_arguments_of_parts_are_checked_by_their_type_hints(override, message):
    cfg = composed("train", override)
    check_values(cfg)
    with pytest.raises(DetkitError) as error:
        build_loss(cfg, build_detector(cfg, ["a"]).head)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.width=64", "model.max_channels=65536"], "more than the .* GiB of free memory: lower model.width"),
        (["backbone.repeats=[1000000,6,6,3]"], "more than 2,000 modules"),
        (["neck=repgd", "neck.rep_blocks=2000000000"], "more than 2,000 modules"),
    ],
)
def test_a_model_too_large_is_refused_before_it_is_made(overrides, message, few_modules):
    with pytest.raises(TooLarge, match=message):
        build_detector(composed("train", *overrides), ["a"])


def test_what_training_keeps_of_the_weights_counts(monkeypatch):
    cfg = composed("train")
    monkeypatch.setattr("detkit.models.budget.free_memory", lambda: 30_000_000)  # yolov8n: 12 MB
    build_detector(cfg, ["a"])
    with pytest.raises(TooLarge, match="4 copies for training"):
        build_detector(cfg, ["a"], copies=4)


def test_a_meta_detector_takes_no_memory_and_no_random_numbers():
    before = torch.get_rng_state()
    on_meta = build_meta_detector(composed("train"), ["a"])
    assert torch.equal(torch.get_rng_state(), before)
    built = build_detector(composed("train"), ["a"])
    assert {k: v.shape for k, v in on_meta.state_dict().items()} == {k: v.shape for k, v in built.state_dict().items()}
    assert all(tensor.is_meta for tensor in on_meta.state_dict().values())


@BACKBONES.register("test_refusing")
class Refusing(torch.nn.Module):
    """Raises what a part may raise for arguments of no sense; without type hints."""

    def __init__(self, kind, out_strides):
        raise {"type": TypeError, "zero": ZeroDivisionError, "bug": NameError}[kind]("no\nsense")


def test_what_a_part_raises_is_reported():
    cfg = composed("train")
    for kind in ("type", "zero", "\x1b"):
        with pytest.raises(DetkitError, match="backbone 'test_refusing' cannot be built with kind=") as error:
            build_detector(cfg | {"backbone": {"name": "test_refusing", "kind": kind}}, ["a"])
        assert_readable(error.value)
    with pytest.raises(NameError):
        build_detector(cfg | {"backbone": {"name": "test_refusing", "kind": "bug"}}, ["a"])


def test_values_without_end_are_refused():
    endless: dict[str, Any] = {}
    endless["a"] = endless
    laughs: list[Any] = ["ha"]
    for _ in range(60):
        laughs = [laughs] * 10
    for value in (endless, laughs, {"a": {"b\0": 1}}, {"a": object()}, {"a": 10**5000}, {10**5000: 1}):
        assert first_unsupported_value({"x": value})
    assert not first_unsupported_value({"a": [1, "ü", None, {"b": 1.5, 3: True}]})


def test_names_of_files_need_not_be_utf8():
    check_values(with_value(composed("predict"), ("source",), "caf\udce9.jpg"), find_task("predict").config)


@pytest.mark.parametrize("path", ["/data/caf\udce9/x", "/data/ü 中/x", '"/data/ü"', "plain"])
def test_a_path_beyond_ascii_needs_no_quotes(path):
    assert composed("predict", f"source={path}")["source"] == path.strip('"')


def test_a_resumed_run_may_have_another_data_set():
    overrides = ["resume=runs/x", "data.yaml=moved.yaml", "trainer.epochs=9"]
    assert as_hydra(overrides) == ["resume=runs/x", "++data.yaml=moved.yaml", "trainer.epochs=9"]
    assert composed("train", *overrides)["data"]["yaml"] == "moved.yaml"
    with pytest.raises(DetkitError, match=r"there is no key 'data\.yaml'"):
        composed("train", "resume=auto", "data.yaml=moved.yaml")


def test_the_schema_is_where_the_configs_are():
    """A key of a YAML file without a type would be a key that nobody can set."""
    assert set(list_tasks()) == {path.stem for path in (Path(__file__).parents[1] / "tools").glob("*.py")}


@pytest.mark.parametrize(
    ("arguments", "flags", "overrides"),
    [
        (["seed=0,1", "-m", "~data"], ["-m"], ["seed=0,1", "~data"]),
        (["a=1", "--cfg", "job", "b=2"], ["--cfg", "job"], ["a=1", "b=2"]),
        (["-cd", "my=configs", "neck=x"], ["-cd", "my=configs"], ["neck=x"]),
        (["--config-dir=my", "typo"], ["--config-dir=my"], ["typo"]),
    ],
)
def test_flags_and_overrides_may_be_in_any_order(arguments, flags, overrides):
    assert split_flags(arguments) == (flags, overrides)
