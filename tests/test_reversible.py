"""RevCol run backwards: the gradients of plain autograd, without its memory."""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from detkit.engine.ema import EMA
from detkit.errors import DetkitError
from detkit.layers import reversible
from detkit.models.backbones.revcol import RevCol
from detkit.models.profiling import activation_bytes

ALL_STRIDES = (4, 8, 16, 32)


def small_revcol(columns: int = 3, **kwargs) -> RevCol:
    return RevCol((8, 16, 24, 40), (1, 2, 2, 1), columns, out_strides=ALL_STRIDES, **{"drop_path": 0.0} | kwargs)


def stirred_revcol(columns: int, alphas: Callable[[Tensor], object] | None = None, **kwargs) -> RevCol:
    """One whose blocks matter: gamma 0.3 instead of 1e-6, weights of 0.3; ``alphas`` changes them in place."""
    model = small_revcol(columns, **kwargs)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gamma"):
                parameter.fill_(0.3)
            elif "alpha" not in name:
                parameter.normal_(0, 0.3)
            elif alphas is not None:
                alphas(parameter.view(-1))
    return model


def gradients(model: RevCol, x: Tensor, save_memory: bool = True) -> dict[str, Tensor]:
    model.save_memory = save_memory
    model.zero_grad()
    torch.manual_seed(3)  # what the blocks drop
    features = model(x)
    torch.manual_seed(4)
    sum((f * torch.randn_like(f)).sum() for f in features).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def largest_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Of all parameters, relative to each one's norm; NaN counts as infinite."""
    assert found.keys() == expected.keys()
    errors = [(found[n] - expected[n]).norm() / expected[n].norm().clamp(min=1e-12) for n in expected]
    return float(torch.stack(errors).nan_to_num(nan=torch.inf).max())


@pytest.mark.parametrize("settings", [{"save_memory": False}, {"keep_every": 0}, {"keep_every": 1}, {"keep_every": 2}])
def test_revcol_is_golden(golden, settings):
    g = golden("revcol_small_cfg")
    model = small_revcol(**settings)
    model.load_state_dict({k.removeprefix("state_dict/"): v for k, v in g.items() if k.startswith("state_dict/")})
    features = model(g["x0"])
    sum((f * g[f"cot{k}"]).sum() for k, f in enumerate(features)).backward()
    for k, feature in enumerate(features):
        torch.testing.assert_close(feature, g[f"out{k}"], atol=1e-4, rtol=0)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad.norm(), g[f"grad_norms/{name}"], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("keep_every", [0, 1, 3])
@pytest.mark.parametrize(("drop_path", "frozen"), [(0.0, None), (0.4, None), (0.0, "stem"), (0.0, "subnet1")])
def test_gradients_equal_plain_ones(keep_every, drop_path, frozen):
    model = stirred_revcol(6, drop_path=drop_path, keep_every=keep_every).double()
    if frozen:
        getattr(model, frozen).requires_grad_(False)
    x = torch.randn(2, 3, 64, 32, dtype=torch.float64)
    assert largest_error(gradients(model, x), gradients(model, x, save_memory=False)) < 1e-9


def alphas_zero(alpha: Tensor) -> None:
    alpha.zero_()


def alphas_near_zero(alpha: Tensor) -> None:
    """A fifth exactly 0, a fifth 1e-4, a fifth negative."""
    alpha[::5], alpha[1::5] = 0, 1e-4
    alpha[2::5] *= -1


def alphas_small(alpha: Tensor) -> None:
    """None of them near 0, but seven columns magnify a million times."""
    alpha.fill_(0.14)


def alphas_anywhere(alpha: Tensor) -> None:
    alpha.uniform_(-0.8, 0.8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("alphas", [None, alphas_zero, alphas_near_zero, alphas_small, alphas_anywhere])
def test_gradients_at_sixteen_columns_whatever_the_alphas(alphas, dtype):
    model = stirred_revcol(16, alphas).to(dtype)
    x = torch.randn(1, 3, 64, 64, dtype=dtype)
    plain = gradients(model, x, save_memory=False)
    for model.keep_every in (0, 1, 2, 4):
        assert largest_error(gradients(model, x), plain) < {torch.float32: 1e-4, torch.float64: 1e-9}[dtype]


def test_channels_are_saved_before_rounding_errors_grow():
    alphas = [[torch.tensor([0.5, 1e-3, -1e-3, 2.0]), torch.tensor([0.5])]] * 4
    saved = reversible.channels_to_save(
        alphas, frozenset(), torch.float32
    )  # 1000 a column: every second column, as 2**16 < 1e6
    assert [row if row is None else row.tolist() for row, _ in saved] == [None, [1, 2], None, [1, 2]]
    assert [row for _, row in saved] == [None] * 4
    saved = reversible.channels_to_save(
        alphas, frozenset({1}), torch.float32
    )  # the second whole: all start afresh there
    assert saved[0] == saved[2] == [None, None]
    assert saved[1] == [slice(None), slice(None)]
    assert saved[3][0].tolist() == [1, 2]
    ordinary = [[torch.full((8,), 0.5)]] * 16
    assert reversible.channels_to_save(ordinary, frozenset(), torch.float32) == [[None]] * 16
    assert sum(row is not None for (row,) in reversible.channels_to_save(ordinary, frozenset(), torch.float64)) == 3


def saved(model: RevCol, x: Tensor) -> int:
    return activation_bytes(model, x)


def test_memory_does_not_grow_with_columns():
    x = torch.randn(1, 3, 128, 128)
    two, sixteen = (saved(small_revcol(columns, keep_every=0), x) for columns in (2, 16))
    assert sixteen < 1.1 * two
    assert saved(small_revcol(16, save_memory=False), x) > 20 * sixteen
    few = saved(stirred_revcol(16, lambda alpha: alpha[:1].zero_()), x)
    assert few < 1.5 * sixteen  # one channel of each feature is saved, in every second column


def test_evaluation_keeps_nothing():
    model = small_revcol().eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert saved(model, x) == 0
    model.requires_grad_(False)
    assert saved(model, x) == 0
    assert not any(f.requires_grad for f in model(x))


def test_gradients_of_two_batches_add_up():
    model = stirred_revcol(3)
    one, two = torch.randn(2, 2, 3, 64, 64)
    first, second = gradients(model, one), gradients(model, two)
    expected = {n: first[n] + second[n] for n in first}
    model.zero_grad()
    for x in (one, two):
        torch.manual_seed(3)
        features = model(x)
        torch.manual_seed(4)
        sum((f * torch.randn_like(f)).sum() for f in features).backward()
    assert largest_error({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, expected) < 1e-5


def test_the_average_follows_a_reversible_model():
    model = stirred_revcol(3)
    ema = EMA(model, decay=0.5, ramp=1e-9)
    x = torch.randn(1, 3, 64, 64)
    before = {n: p.clone() for n, p in model.named_parameters()}
    gradients(model, x)
    torch.optim.SGD(model.parameters(), 0.01).step()
    ema.update(model)
    for name, average in ema.model.named_parameters():
        torch.testing.assert_close(average, (before[name] + model.get_parameter(name)) / 2)
    assert not any(f.requires_grad for f in ema.model(x))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_memory_layout_changes_nothing(layout):
    model = stirred_revcol(4)
    x = torch.randn(2, 3, 64, 96)
    expected = gradients(model, x, save_memory=False)
    model = model.to(memory_format=layout)
    assert largest_error(gradients(model, x.to(memory_format=layout)), expected) < 1e-5
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert parameter.grad.is_contiguous(memory_format=layout) or parameter.ndim < 4, name
    # LayerNorm and the linear layers work on pixels' channels: features are channels-last from the stem on.
    assert all(f.is_contiguous(memory_format=torch.channels_last) for f in model(x.to(memory_format=layout)))


def test_the_chain_stays_float32_under_autocast():
    model = stirred_revcol(4)
    seen = []
    for k in range(4):
        for level in getattr(model, f"subnet{k}").levels():
            level.register_forward_pre_hook(lambda _, inputs: seen.extend(i.dtype for i in inputs if i is not None))
    x = torch.randn(1, 3, 64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        features = model(x)
    sum(f.square().mean() for f in features).backward()
    assert {f.dtype for f in features} == {torch.float32}
    assert set(seen) == {torch.float32}
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(g.isfinite().all() and g.dtype == torch.float32 for g in grads)


def test_autocast_repeats_what_forward_computed(monkeypatch):
    """The levels, in bf16, see the same features again: where they did not, a last bit would become a third digit."""
    model = stirred_revcol(8)
    x = torch.randn(1, 3, 64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(model, x)
        monkeypatch.setattr(reversible, "MAX_MAGNIFICATION", 0.0)  # the same sums, all of them remembered
        assert largest_error(found, gradients(model, x)) < 1e-5


def test_weights_changed_before_backward_are_refused():
    model = stirred_revcol(3)
    features = model(torch.randn(1, 3, 64, 64))
    with torch.no_grad():
        model.subnet1.level0.blocks[0].gamma.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        features[0].sum().backward()


def test_keep_every_below_zero_is_refused():
    with pytest.raises(DetkitError, match="keep_every=-1 must be 0 or more"):
        small_revcol(keep_every=-1)


def half_of_a_batch(rank: int, folder: Path) -> None:
    """Write the gradients that one of two processes has after a pass over its half."""
    torch.distributed.init_process_group(
        "gloo", f"file://{folder}/meet", world_size=2, rank=rank, timeout=timedelta(seconds=60)
    )
    state = torch.load(folder / "state.pt")
    model = small_revcol(4)
    model.load_state_dict(state["model"])
    parallel = nn.parallel.DistributedDataParallel(model)
    for _ in range(2):  # the second pass would raise if a parameter had been left without a gradient
        model.zero_grad()
        features = parallel(state["x"][2 * rank : 2 * rank + 2])
        sum(f.square().sum() for f in features).backward()
    torch.save({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, folder / f"grads{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:Grad strides")  # of a depthwise weight: a dimension of size 1
def test_two_processes_average_their_gradients(tmp_path):
    model = stirred_revcol(4)
    x = torch.randn(4, 3, 64, 64)
    torch.save({"model": model.state_dict(), "x": x}, tmp_path / "state.pt")
    other = torch.multiprocessing.get_context("spawn").Process(target=half_of_a_batch, args=(1, tmp_path), daemon=True)
    other.start()
    half_of_a_batch(0, tmp_path)
    other.join(60)
    assert other.exitcode == 0
    sum(f.square().sum() / 2 for f in model(x)).backward()
    expected = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    for rank in range(2):
        assert largest_error(torch.load(tmp_path / f"grads{rank}.pt"), expected) < 1e-5


def test_a_model_in_half_precision_runs_backward():
    model = small_revcol(4).to(torch.bfloat16)
    features = model(torch.rand(2, 3, 64, 64, dtype=torch.bfloat16))
    assert {f.dtype for f in features} == {torch.bfloat16}
    sum(f.square().sum() for f in features).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
