"""Steps that must not be made, parts that must not learn, and what fits into memory."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import detkit
from detkit.config import check_values, compose_config, resolve
from detkit.engine.auto_batch import choose_batch_size, explain_out_of_memory, largest_batch, make_trial_step
from detkit.engine.ema import EMA
from detkit.engine.evaluator import METRICS, Evaluation
from detkit.engine.nonfinite import NonFiniteCounts, NonFiniteMonitor
from detkit.engine.optimizer import Recipe, Schedule
from detkit.engine.param_groups import freeze, train_mode
from detkit.engine.state import TrainState
from detkit.engine.step import TrainStep
from detkit.engine.trainer import Trainer, early_stopping
from detkit.errors import DetkitError
from detkit.models.losses.task_aligned import TaskAlignedLoss
from detkit.models.losses.yolov5 import YOLOv5Loss
from detkit.models.profiling import dummy_batch
from detkit.ops.precision import Precision
from detkit.structures import Batch, DenseOutput, ImageMeta
from detkit.tasks import find_task, load_config, train
from tests.conftest import trainer_options

CPU = torch.device("cpu")


class Toy(nn.Module):
    """A detector in small: a frozen-able backbone with a batch norm, a neck and a head of a few numbers."""

    max_stride = 32

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, 2))
        self.neck = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
        self.head = nn.Conv2d(4, 2, 1)
        self.class_names, self.cfg = ("a",), {}

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.neck(self.backbone(images)).relu())


class ToyLoss(nn.Module):
    """The mean square, to which the sum of the boxes' left sides is added: infinity makes a bad loss of a good one."""

    def forward(self, out: Tensor, batch: Batch) -> dict[str, Tensor]:
        return {"square": out.square().mean(), "added": batch.boxes_bm4[..., 0].sum() + out.sum() * 0}


def toy_step(name: str = "sgd", accumulate: int = 1, seed: int = 0) -> TrainStep:
    torch.manual_seed(seed)
    recipe = Recipe(name, 0.05, 0.9, 1e-3, 0.0)
    schedule = Schedule(recipe, epochs=10, final=0.01, shape="constant", warmup=0, warmup_momentum=0.8)
    precision = Precision.from_config("off", CPU)
    return TrainStep(Toy().train(), ToyLoss(), recipe, schedule, precision, accumulate=accumulate, clip=10.0)


def toy_batch(seed: int, added: float = 0.0) -> Batch:
    pixels = torch.randint(256, (4, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    boxes = torch.zeros(4, 1, 4)
    boxes[0, 0, 0] = added
    metas = [ImageMeta(k, Path(f"image{seed}_{k}.png"), (16, 16)) for k in range(4)]
    labels = torch.zeros(4, 1, dtype=torch.int64)
    return Batch(pixels, boxes, labels, labels == 0, metas)


class NaNPixels:
    """Makes the network see NaN in one image: a forward pass that would spoil the batch norms."""

    def __init__(self, step: TrainStep) -> None:
        self.step = step

    def __call__(self, batch: Batch, number: int) -> None:
        handle = self.step.detector.register_forward_pre_hook(lambda _, args: (args[0] * torch.nan,))
        self.step(batch, number, 0)
        handle.remove()


class InfiniteGradient(NaNPixels):
    """A finite loss, of which one parameter's gradient is infinite."""

    def __call__(self, batch: Batch, number: int) -> None:
        handle = self.step.detector.head.bias.register_hook(lambda grad: grad / 0)
        self.step(batch, number, 0)
        handle.remove()


class InfiniteLoss(NaNPixels):
    """A loss of infinity whose gradient is finite."""

    def __call__(self, batch: Batch, number: int) -> None:
        self.step(replace(batch, boxes_bm4=batch.boxes_bm4 + torch.inf), number, 0)


def everything(step: TrainStep) -> dict[str, Tensor]:
    """All that a step changes: weights, batch norms, average, the optimizer's state."""
    found = {f"model/{k}": v for k, v in step.detector.state_dict().items()}
    found |= {f"ema/{k}": v for k, v in step.ema.model.state_dict().items()}
    for k, state in step.optimizer.state_dict()["state"].items():
        found |= {f"optimizer/{k}/{name}": torch.as_tensor(value) for name, value in state.items()}
    return {k: v.detach().clone() for k, v in found.items()}


@pytest.mark.parametrize("name", ["sgd", "adamw", "muon"])
@pytest.mark.parametrize("spoil", [NaNPixels, InfiniteGradient, InfiniteLoss])
@pytest.mark.parametrize("when", [0, 2])
def test_a_step_that_is_not_finite_changes_nothing(name, spoil, when):
    """Steps 0, 1, (spoilt), 2, 3: as if the spoilt one had never been, to the last bit."""
    step, clean = toy_step(name), toy_step(name)

    def compared(key: str) -> bool:
        """The batch norms have seen a batch whose loss was finite, and may."""
        return spoil is not InfiniteGradient or ("running" not in key and "num_batches" not in key)

    for k in range(4):
        if k == when:
            before = everything(step)
            spoil(step)(toy_batch(9), k)
            after = everything(step)
            assert all(torch.equal(before[key], after[key]) for key in filter(compared, before))
            assert step.health.read() == NonFiniteCounts(int(spoil is not InfiniteGradient), 1, 0, 1)
            clean.ema.updates += 1  # it counts calls
        for one in (step, clean):
            terms = one(toy_batch(k), k, 0)
            assert terms["square"] > 0
    found, expected = everything(step), everything(clean)
    assert found.keys() == expected.keys()
    for key in filter(compared, expected):
        assert torch.equal(found[key], expected[key]), key
    assert step.health.read().in_a_row == 0


def test_the_terms_of_a_bad_loss_are_zero():
    step = toy_step()
    assert step(toy_batch(0, torch.inf), 0, 0) == {"square": 0, "added": 0}


def test_a_bad_batch_costs_the_step_it_was_gathered_for():
    step = toy_step(accumulate=2)
    start = everything(step)
    step(toy_batch(0), 0, 0)
    step(toy_batch(1, torch.inf), 1, 0)
    kept = everything(step)
    assert all(torch.equal(start[k], kept[k]) for k in start if "running" not in k and "num_batches" not in k)
    step(toy_batch(2), 2, 0)
    step(toy_batch(3), 3, 0)
    assert step.health.read() == NonFiniteCounts(1, 1, 0, 0)
    assert not torch.equal(everything(step)["model/head.weight"], start["model/head.weight"])
    assert {p.name for p in step.health.suspects()} == {f"image3_{k}.png" for k in range(4)}  # no bad one remembered


def test_two_gathered_batches_equal_one_twice_as_large():
    """For a loss that is a mean over images (a detection loss is normalised by its batch's targets instead)."""
    small, large = toy_step("adamw", accumulate=2), toy_step("adamw")
    for step in (small, large):
        step.detector.eval()  # a batch norm in train mode knows how large its batch is
    for k in range(0, 6, 2):
        parts = [toy_batch(k), toy_batch(k + 1)]
        tensors = zip(*((b.images, b.boxes_bm4, b.labels_bm, b.valid_bm) for b in parts), strict=True)
        large(Batch(*map(torch.cat, tensors)), k, 0)
        for part in parts:
            small(part, k, 0)
    found, expected = everything(small), everything(large)
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], atol=1e-6, rtol=1e-4)


def test_a_scale_that_is_too_large_falls_until_steps_are_made():
    step, plain = toy_step(), toy_step()
    step.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    steps = 0
    while step.health.read().overflow_steps == steps:
        step(toy_batch(0), 0, 0)
        steps += 1
    assert 1 < steps < 20
    assert step.health.read() == NonFiniteCounts(0, 0, steps - 1, 0)
    plain(toy_batch(0), 0, 0)
    torch.testing.assert_close(step.detector.head.weight, plain.detector.head.weight)


@pytest.mark.parametrize(
    ("losses", "gradient", "scale", "expected"),
    [
        ([True], False, 65536.0, NonFiniteCounts(0, 0, 1, 0)),  # fp16: the scale was too large
        ([False], False, 65536.0, NonFiniteCounts(1, 1, 0, 1)),  # fp16: the loss itself
        ([True], False, 1.0, NonFiniteCounts(0, 1, 0, 1)),  # no scale to blame
        ([True, False], False, 1.0, NonFiniteCounts(1, 1, 0, 1)),
        ([True, True], True, 1.0, NonFiniteCounts(0, 0, 0, 0)),
    ],
)
def test_overflow_is_distinguished_from_non_finite_losses(losses, gradient, scale, expected):
    health = NonFiniteMonitor(CPU, max_batches=4)
    for finite in losses:
        health.add_loss(torch.tensor(finite), toy_batch(0))
    health.add_step(torch.tensor(gradient), torch.tensor(scale))
    assert health.read() == expected


def test_overflows_do_not_end_what_comes_in_a_row():
    health = NonFiniteMonitor(CPU, max_batches=1)
    for scale in (1.0, 1024.0, 1.0):
        health.add_loss(torch.tensor(True), toy_batch(0))
        health.add_step(torch.tensor(False), torch.tensor(scale))
    health.start_epoch()
    assert health.read() == NonFiniteCounts(0, 0, 0, 2)


class Batches(list):
    """A loader of the same batches every epoch."""

    def epoch(self, epoch: int, skip: int = 0) -> Iterator[Batch]:
        for position, batch in enumerate(self, 1):
            batch.position = position
            yield batch


def test_too_many_in_a_row_end_the_run_with_a_message(tmp_path, monkeypatch):
    step = toy_step()
    batches = Batches([toy_batch(0), *(toy_batch(k, torch.inf) for k in (1, 2, 3))])
    trainer = Trainer(step, batches, [], None, **trainer_options(tmp_path, epochs=1, max_nonfinite_steps=3))
    monkeypatch.setattr(trainer, "save", lambda: None)  # of what is no detector
    with pytest.raises(DetkitError, match=r"not finite in 3 steps in a row.*image3_0\.png, .*last\.safetensors"):
        trainer.train_epoch(0)
    assert (tmp_path / "last.safetensors").is_file()
    trainer.options = trainer.options.replace(max_nonfinite_steps=4)
    step.health = NonFiniteMonitor(CPU, max_batches=1)
    trainer.state = TrainState()
    losses, _ = trainer.train_epoch(0)
    trainer.log.close()
    assert losses["square"] > 0  # the mean over the one batch that was finite
    assert trainer.skipped() == {"skipped_steps": 3, "overflow_steps": 0}


def test_patience_counts_epochs_without_a_better_ap(tmp_path, monkeypatch):
    scores = iter((0.1, 0.3, 0.2, 0.3, 0.2, 0.1, 0.9))
    options = trainer_options(tmp_path, epochs=7)
    trainer = Trainer(toy_step(), [], [], None, stop_early=early_stopping(2), **options)
    monkeypatch.setattr(trainer, "save", lambda: None)
    monkeypatch.setattr(trainer, "train_epoch", lambda epoch: ({"box": 1.0}, 1.0))
    blank = dict.fromkeys(METRICS, 0.0)
    evaluation = lambda: Evaluation(blank | {"AP": next(scores), "per_class": {}}, [], [], [])  # noqa: E731
    monkeypatch.setattr(trainer, "validate", evaluation)
    results = trainer.fit()
    trainer.log.close()
    assert (results["best"]["epoch"], results["last"]["epoch"]) == (4, 6)


@pytest.mark.parametrize("amp", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("model", "loss"), [("yolov8n", TaskAlignedLoss()), ("yolov5n", YOLOv5Loss())])
def test_losses_are_float32_under_autocast(model, loss, amp):
    """The terms of half-precision outputs are those of the same numbers in float32, bit for bit."""
    detector = detkit.create_model(model, num_classes=3)
    batch = dummy_batch(2, (64, 96), 3, 3)
    with torch.no_grad():
        out = detector(batch.images / 255)
        assert out.points.dtype is torch.float32
        halved = {k: v.to(amp) for k, v in vars(out).items() if k in ("cls", "reg", "objectness")}
        with torch.autocast("cpu", amp):
            found = loss(replace(out, **halved), batch)
        expected = loss(replace(out, **{k: v.float() for k, v in halved.items()}), batch)
    for name, term in found.items():
        assert term.dtype is torch.float32
        assert torch.equal(term, expected[name])


@pytest.mark.parametrize("names", [["backbone"], ["backbone.0", "neck"]])
def test_frozen_parts_stay_as_they_are(names):
    step = toy_step()
    count = freeze(step.detector, names)
    step = TrainStep(
        step.detector, ToyLoss(), step.schedule.recipe, step.schedule, step.precision, accumulate=1, clip=10.0
    )
    train_mode(step.detector)
    before = {k: v.clone() for k, v in step.detector.state_dict().items()}
    for k in range(3):
        step(toy_batch(k), k, 0)
    frozen = tuple(f"{name}." for name in names)
    parameters = dict(step.detector.named_parameters())
    assert count == sum(p.numel() for n, p in parameters.items() if n.startswith(frozen))
    for name, value in step.detector.state_dict().items():
        assert torch.equal(value, before[name]) == name.startswith(frozen), name


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["backbon"], "no module 'backbon'; did you mean 'backbone'"),
        (["backbone", "neck", "head"], "no trainable parameter"),
    ],
)
def test_freezing_what_is_not_there_or_all(names, message):
    with pytest.raises(DetkitError, match=message):
        freeze(Toy(), names)


@pytest.mark.parametrize("names", [["backbone.stem"], ["backbone.subnet0", "backbone.stem"], ["backbone"]])
def test_revcol_learns_behind_its_frozen_parts(names):
    detector = detkit.create_model(backbone="revcol_tiny", num_classes=2, overrides=["backbone.columns=2"])
    freeze(detector, names)
    train_mode(detector)
    batch = dummy_batch(2, (64, 64), 2, 2)
    out: DenseOutput = detector(batch.images / 255)
    sum(TaskAlignedLoss()(out, batch).values()).backward()
    for name, parameter in detector.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


def test_an_average_scaled_by_zero_stays():
    model = nn.Linear(3, 2)
    ema = EMA(model, decay=0.5, ramp=1e-9)
    start = ema.model.weight.clone()
    with torch.no_grad():
        model.weight += 1
    ema.update(model, torch.tensor(False))
    assert torch.equal(ema.model.weight, start)
    ema.update(model, torch.tensor(True))
    torch.testing.assert_close(ema.model.weight, start + 0.5)


@pytest.mark.parametrize(("capacity", "expected"), [(0, 0), (1, 1), (5, 4), (64, 64), (10**6, 1024)])
def test_the_largest_batch_is_found_by_doubling(capacity, expected):
    tried = []

    def attempt(images: int) -> None:
        tried.append(images)
        if images > capacity:
            raise torch.OutOfMemoryError("full")

    assert largest_batch(attempt) == expected
    assert tried == [2**k for k in range(len(tried))]
    assert max(tried) <= 1024
    cuda = torch.device("cuda", 0)
    if expected:
        assert choose_batch_size(attempt, cuda) == expected
        assert f"batch_size={min(expected, 32)} would fit" in explain_out_of_memory(attempt, 100, cuda)
    else:
        with pytest.raises(DetkitError, match="one image fits"):
            choose_batch_size(attempt, cuda)
        assert "lower image_size" in explain_out_of_memory(attempt, 100, cuda)


def test_running_out_of_memory_is_one_message(train_overrides, tmp_path, monkeypatch):
    def fit(self: Trainer) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Trainer, "fit", fit)
    overrides = [*train_overrides, f"run_dir={tmp_path / 'run'}", "batch_size=3"]
    with pytest.raises(DetkitError, match=r"batch_size=3 .* memory of cpu: batch_size=1 would fit"):
        train.run(load_config("train", overrides))


def test_other_faults_of_a_trial_are_not_taken_for_memory():
    with pytest.raises(ZeroDivisionError):
        largest_batch(lambda images: 1 / 0)


def test_a_trial_leaves_the_detector_as_it_is():
    detector = detkit.create_model("yolov8n", num_classes=2)
    before = {k: v.clone() for k, v in detector.state_dict().items()}
    make_trial_step(detector, TaskAlignedLoss(), Precision.from_config("off", CPU), 64)(2)
    assert all(torch.equal(v, before[k]) for k, v in detector.state_dict().items())
    assert all(p.grad is None for p in detector.parameters())


def test_auto_batch_is_for_training_on_a_gpu():
    with pytest.raises(DetkitError, match="batch_size=auto needs a GPU"):
        choose_batch_size(lambda images: None, CPU)
    with pytest.raises(DetkitError, match="batch_size=auto is only for training"):
        check_values(resolve(compose_config("eval", ["ckpt=x", "batch_size=auto"])), find_task("eval").config)
    check_values(resolve(compose_config("train", ["batch_size=auto"])))


@pytest.mark.parametrize(
    "override",
    [
        "trainer.freeze=backbone",
        "trainer.max_nonfinite_steps=0",
        "trainer.patience=0",
        "optim.schedule=step",
        "optim.lr_factors={backbone:0}",
        "optim.layer_decay=1.5",
        "optim.name=lion",
    ],
)
def test_wrong_values_are_refused(override):
    with pytest.raises(DetkitError, match=override.partition("=")[0]):
        check_values(resolve(compose_config("train", [override])))
