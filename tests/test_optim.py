import math

import pytest
import torch
from torch import nn

import detkit
from detkit.config import compose_config, resolve
from detkit.config.schema import OptimConfig
from detkit.engine.ema import EMA
from detkit.engine.optimizer import Recipe, Schedule, accumulation, describe_factors, parameter_groups
from detkit.engine.param_groups import backbone_layers, learning_rate_factors
from detkit.errors import DetkitError


def optim(**changes) -> OptimConfig:
    return OptimConfig(**resolve(compose_config("train", ["~data"]))["optim"] | changes)


def test_every_parameter_is_in_one_group():
    detector = detkit.create_model("yolov8n", num_classes=3)
    groups = {g["name"]: g for g in parameter_groups(detector, 5e-4)}
    grouped = [id(p) for g in groups.values() for p in g["params"]]
    assert sorted(grouped) == sorted(id(p) for p in detector.parameters() if p.requires_grad)
    assert len(set(grouped)) == len(grouped)
    norms = [m for m in detector.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {id(m.weight) for m in norms} == {id(p) for p in groups["no_decay"]["params"]}
    assert all(p.ndim == 4 for p in groups["weight"]["params"])
    assert {name: g["weight_decay"] for name, g in groups.items()} == {"weight": 5e-4, "no_decay": 0, "bias": 0}


def test_weights_decay_and_scales_do_not():
    """One class makes a weight of (1, c, 1, 1), the shape of RevCol's alpha; only the weight decays."""
    detector = detkit.create_model(backbone="revcol_tiny", num_classes=1, overrides=["backbone.columns=2"])
    groups = {g["name"]: {id(p) for p in g["params"]} for g in parameter_groups(detector, 5e-4)}
    for name, parameter in detector.named_parameters():
        if parameter.requires_grad and ("alpha" in name or "gamma" in name):
            assert id(parameter) in groups["no_decay"], name
    assert {id(branch[-1].weight) for branch in detector.head.cls_branches} <= groups["weight"]


@pytest.mark.parametrize(("batch", "expected"), [(1, 64), (16, 4), (48, 1), (64, 1), (256, 1)])
def test_accumulation(batch, expected):
    assert accumulation(batch, 64) == expected


@pytest.mark.parametrize(
    ("changes", "steps", "expected"),
    [
        ({}, 9_999, ("adamw", 0.001429, 0.9, 0.0)),
        ({}, 10_000, ("sgd", 0.01, 0.937, 0.1)),
        ({"lr": 0.05, "momentum": 0.5}, 10, ("adamw", 0.05, 0.5, 0.0)),
        ({"name": "sgd"}, 10, ("sgd", 0.01, 0.937, 0.1)),
        ({"name": "muon"}, 10, ("muon", 0.001429, 0.95, 0.0)),
    ],
)
def test_recipe(changes, steps, expected):
    recipe = Recipe.from_config(optim(**changes), batch_size=16, total_steps=steps, num_classes=3)
    assert (recipe.name, recipe.lr, recipe.momentum, recipe.warmup_bias_lr) == expected
    assert recipe.weight_decay == pytest.approx(5e-4)


def test_weight_decay_follows_the_images_of_a_step():
    recipe = Recipe.from_config(optim(), batch_size=128, total_steps=10, num_classes=3)
    assert recipe.weight_decay == pytest.approx(1e-3)


@pytest.mark.parametrize(("epochs", "warmup"), [(1, 0), (2, 100), (3, 140), (60, 210)])
def test_warm_up_is_shorter_than_the_run(epochs, warmup):
    recipe = Recipe.from_config(optim(), batch_size=16, total_steps=10, num_classes=3)
    assert Schedule.from_config(recipe, optim(), epochs=epochs, batches=70).warmup == warmup


def test_warm_up_and_decay():
    recipe = Recipe("sgd", 0.01, 0.937, 5e-4, 0.1)
    schedule = Schedule(recipe, epochs=10, final=0.01, shape="linear", warmup=100, warmup_momentum=0.8)
    optimizer = recipe.build(detkit.create_model("yolov8n"))

    def at(step: int, epoch: int) -> dict[str, tuple[float, float]]:
        schedule.apply(optimizer, step, epoch)
        return {g["name"]: (g["lr"], g["momentum"]) for g in optimizer.param_groups}

    start, middle, end = at(0, 0), at(50, 0), at(1000, 5)
    assert start["bias"] == (0.1, 0.8)
    assert start["weight"] == start["no_decay"] == (0.0, 0.8)
    assert middle["weight"] == pytest.approx((0.005, 0.8685))
    assert middle["bias"] == pytest.approx((0.055, 0.8685))
    assert end["weight"] == end["bias"]
    assert end["weight"] == pytest.approx((0.01 * (1 - 0.99 * 0.5), 0.937))
    cosine = Schedule(recipe, 10, 0.01, "cosine", 0, 0.8)
    assert [cosine.factor(e) for e in (0, 5, 10)] == pytest.approx([1, 0.505, 0.01])


def test_average_equals_its_formula():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    ema = EMA(model)
    expected = {k: v.double() for k, v in model.state_dict().items()}
    for step in range(1, 6):
        model(torch.randn(2, 3, 4, 4))
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p))
        ema.update(model)
        decay = 0.9999 * (1 - math.exp(-step / 2000))
        for key, value in model.state_dict().items():
            expected[key] = decay * expected[key] + (1 - decay) * value.double()
    found = ema.model.state_dict()
    for key in expected:
        if found[key].is_floating_point():
            torch.testing.assert_close(found[key].double(), expected[key], atol=1e-5, rtol=1e-5)
    assert found["1.num_batches_tracked"] == 5
    assert not ema.model.training


@pytest.mark.parametrize(
    ("shape", "expected"),  # at 0, 15, 30, 65 and 100 % of the run; one_cycle: 1/25 up to 1, down to 0.01
    [
        ("constant", (1, 1, 1, 1, 1)),
        ("linear", (1, 0.8515, 0.703, 0.3565, 0.01)),
        ("cosine", (1, 0.9460, 0.7960, 0.2803, 0.01)),
        ("one_cycle", (0.04, 0.52, 1, 0.505, 0.01)),
    ],
)
def test_shapes_of_the_schedule(shape, expected):
    schedule = Schedule(Recipe("sgd", 0.01, 0.9, 0, 0.1), 20, 0.01, shape, 0, 0.8)
    assert [schedule.factor(20 * p) for p in (0, 0.15, 0.3, 0.65, 1)] == pytest.approx(expected, abs=5e-5)


def test_one_cycle_moves_every_batch_and_the_momentum_against_it():
    changes = optim(name="sgd", schedule="one_cycle")
    recipe = Recipe.from_config(changes, batch_size=64, total_steps=10, num_classes=3)
    schedule = Schedule.from_config(recipe, changes, epochs=10, batches=10)
    assert schedule.warmup == 0
    optimizer = recipe.build(nn.Linear(2, 2))
    rates, momenta = [], []
    for step in range(100):
        schedule.apply(optimizer, step, step // 10)
        assert len({(g["lr"], g["momentum"]) for g in optimizer.param_groups}) == 1
        rates.append(optimizer.param_groups[0]["lr"])
        momenta.append(optimizer.param_groups[0]["momentum"])
    assert max(rates) == rates[30] == 0.01
    assert min(momenta) == momenta[30] == 0.8
    assert momenta[0] == pytest.approx(0.937)
    assert rates == sorted(rates[:31]) + sorted(rates[31:], reverse=True)


def test_the_longest_name_decides_the_factor():
    detector = detkit.create_model("yolov8n", num_classes=3)
    by_part = {"backbone": 0.1, "backbone.stages.1": 0.5, "backbone.stages.1.0": 0.0625, "head": 2.0}
    factors = learning_rate_factors(detector, by_part)
    assert factors["backbone.stem.conv.weight"] == 0.1
    assert factors["backbone.stages.1.0.conv.weight"] == 0.0625
    assert {f for name, f in factors.items() if name.startswith("backbone.stages.1.1.")} == {0.5}
    assert {f for name, f in factors.items() if name.startswith("neck.")} == {1.0}
    recipe = Recipe("adamw", 0.001, 0.9, 5e-4, 0.0, by_part)
    optimizer = recipe.build(detector)
    grouped = [id(p) for g in optimizer.param_groups for p in g["params"]]
    assert sorted(grouped) == sorted(id(p) for p in detector.parameters() if p.requires_grad)
    Schedule(recipe, 10, 0.01, "constant", 0, 0.8).apply(optimizer, 5, 0)
    rates = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    for name, parameter in detector.named_parameters():
        if parameter.requires_grad:
            assert rates[id(parameter)] == pytest.approx(0.001 * factors[name])
    count = sum(p.numel() for n, p in detector.named_parameters() if p.requires_grad and factors[n] == 2.0)
    assert f"{count:,} at 2 of the learning rate" in describe_factors(optimizer)


def test_factors_of_a_part_that_is_not_there():
    with pytest.raises(DetkitError, match=r"optim\.lr_factors: .* no module 'backbone\.stage\.0'; did you mean"):
        learning_rate_factors(detkit.create_model("yolov8n"), {"backbone.stage.0": 0.1})


def test_the_factor_of_a_layer_by_hand():
    """Five layers at a decay of a half: the stem learns at 1/32, the last stage at 1/2, neck and head whole."""
    detector = detkit.create_model("yolov8n", num_classes=3)
    factors = learning_rate_factors(detector, {"backbone.stages.2": 10.0}, layer_decay=0.5)
    expected = {"backbone.stem.": 1 / 32, "neck.": 1.0, "head.": 1.0}
    expected |= {f"backbone.stages.{k}.": 0.5 ** (4 - k) * (10 if k == 2 else 1) for k in range(4)}
    for name, factor in factors.items():
        assert factor == next(f for prefix, f in expected.items() if name.startswith(prefix)), name


@pytest.mark.parametrize(
    ("backbone", "layers"),
    [("csp_darknet", 5), ("mobilenetv2", 18), ("revcol_tiny", 5), ("timm", 5)],  # timm: resnet18
)
def test_backbones_fall_into_layers(backbone, layers):
    detector = detkit.create_model("yolov8n", overrides=[f"backbone={backbone}"])
    found = backbone_layers(detector.backbone)
    assert len(found) == layers
    assert sorted(id(p) for layer in found for p in layer) == sorted(id(p) for p in detector.backbone.parameters())


def test_muon_moves_kernels_alike_in_every_direction():
    """The step of a matrix is orthogonal, about as long as AdamW's: 0.2 times the learning rate a number."""
    layer = nn.Linear(24, 16)
    optimizer = Recipe("muon", 0.01, 0.95, 0.0, 0.0).build(layer)
    before = layer.weight.detach().clone()
    (layer(torch.randn(64, 24)) * torch.linspace(1, 10, 16)).square().sum().backward()
    optimizer.step()
    step = layer.weight.detach() - before
    values = torch.linalg.svdvals(step)
    assert values.max() < 2 * values.min()  # of the gradient: a hundred times
    assert 0.5 < step.square().mean().sqrt() / (0.2 * 0.01) < 1.5
