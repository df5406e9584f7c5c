"""Quantizers, and quantized modules: shapes of alphas, checkpoints, dtypes, tied weights, gradients."""

import copy
import io
import json
import pickle
import re
from functools import partial

import pytest
import torch
from torch import nn

import fogzo_kernels as fk

GRID, STE = fk.Grid.uniform(2), fk.StraightThrough("identity")


def quantizer(alpha):
    return fk.Quantizer(GRID, fk.Scale.fixed(alpha), STE)


def row_mean(w):
    return w.abs().mean(1, keepdim=True)


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4, bias=False))


def test_forward_uses_quantized_weights(backend):
    plain, model = mlp(), mlp()
    fk.quantize_model(model, quantizer(0.3), backend=backend)
    x = torch.randn(5, 8)
    for i in (0, 2):
        assert isinstance(model[i], fk.QuantLinear)
        codes = model[i].codes()
        assert codes.dtype == torch.int8
        values = fk.dequantize(codes, model[i].alpha, grid=GRID, dtype=torch.float32)
        assert len(values.unique()) > 1
        plain[i].weight.data = values
    assert torch.equal(model(x), plain(x))


def test_gradient_is_straight_through(backend):
    model = mlp()
    fk.quantize_model(model, quantizer(0.1), backend=backend)
    linear = model[0]
    x, upstream = torch.randn(5, 8), torch.randn(5, 6)
    linear(x).backward(upstream)
    w = linear.weight.detach() / 0.1
    inside = (w > GRID.qmin) & (w < GRID.qmax)
    assert 0 < inside.sum() < inside.numel()
    torch.testing.assert_close(linear.weight.grad, (upstream.t() @ x) * inside)
    assert linear.bias.grad is not None
    assert linear.alpha.grad is None


def test_plain_checkpoint_loads_strictly_and_own_restores_alpha():
    plain, model = mlp(), mlp()
    fk.quantize_model(model, quantizer(0.3))
    with pytest.warns(UserWarning, match="was not quantized, and the fixed alpha stays as it was"):
        assert model.load_state_dict(plain.state_dict()).missing_keys == []
    assert model[0].alpha == torch.tensor(0.3)
    other = mlp()
    fk.quantize_model(other, quantizer(0.7))
    other.load_state_dict(model.state_dict())
    assert other[0].alpha == torch.tensor(0.3)
    added = {f"{i}.{name}" for i in (0, 2) for name in ("alpha", "_extra_state")}
    assert set(model.state_dict()) == {*plain.state_dict(), *added}
    with (
        pytest.raises(RuntimeError, match="Missing key"),
        pytest.warns(UserWarning, match="the fixed alpha stays as it was"),
    ):
        model.load_state_dict({k: v for k, v in plain.state_dict().items() if k != "0.weight"})


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_floating_alphas_become_float32(dtype):
    for alpha in (torch.tensor(0.3, dtype=dtype), lambda w: torch.tensor(0.3, dtype=dtype)):
        model = mlp()
        fk.quantize_model(model, quantizer(alpha))
        assert torch.equal(model[0].alpha, torch.tensor(0.3, dtype=dtype).float())


def test_alpha_stays_float32():
    model = mlp()
    fk.quantize_model(model, quantizer(row_mean))
    before = model[0].alpha.clone()
    model.to(torch.bfloat16)
    assert model[0].weight.dtype == torch.bfloat16
    assert model[0].alpha.dtype == torch.float32
    assert torch.equal(model[0].alpha, before)
    model.half().float()
    assert torch.equal(model[0].alpha, before)
    assert model.to("meta")[0].alpha.device.type == "meta"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_and_autocast_keep_their_dtype(dtype):
    model = mlp()
    fk.quantize_model(model, quantizer(0.3))
    if dtype == torch.bfloat16:
        with torch.autocast("cpu", dtype=dtype):
            assert model(torch.randn(2, 8)).dtype == dtype
    model.to(dtype)
    out = model(torch.randn(2, 8, dtype=dtype))
    out.sum().backward()
    assert out.dtype == model[0].weight.grad.dtype == dtype


def test_copies_keep_ties_and_tensor_ids():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    fk.quantize_model(model, quantizer(0.3))
    assert [m.tensor_id for m in model] == [0, 1, 0]
    twin = copy.deepcopy(model)
    assert twin[2].weight is twin[0].weight
    x = torch.randn(2, 4)
    assert torch.equal(twin(x), model(x))


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_skipped_modules_stay_and_subclasses_keep_their_forward():
    """Attention reads the weight of its projection without running that module: a child of it quantizes it."""
    model = nn.ModuleDict({
        "attention": nn.MultiheadAttention(4, 2), "head": nn.Linear(4, 4), "body": nn.Linear(4, 4),
        "own": Doubled(4, 4),
    })  # fmt: skip
    fk.quantize_model(model, quantizer(0.3), skip=["he*"])
    assert type(model["head"]) is nn.Linear
    assert type(model["body"]) is fk.QuantLinear
    own, x = model["own"], torch.randn(3, 4)
    assert isinstance(own, Doubled)
    assert not torch.equal(own.effective_weight(), own.weight)
    assert torch.equal(own(x), 2 * nn.functional.linear(x, own.effective_weight(), own.bias))
    projection = model["attention"].out_proj
    assert isinstance(projection, nn.Linear)
    assert not isinstance(projection, fk.QuantLinear)
    assert projection.weight_quantizer.latent is projection.weight


def test_one_name_is_a_pattern_of_skip():
    model = nn.ModuleDict({"head": nn.Linear(4, 4), "body": nn.Linear(4, 4)})
    fk.quantize_model(model, quantizer(0.3), skip="head")
    assert type(model["head"]) is nn.Linear
    assert type(model["body"]) is fk.QuantLinear


@pytest.mark.parametrize("alpha", [0.3, torch.tensor(0.3), row_mean, lambda w: w.abs().amax()])
def test_copies_and_saved_models_compute_the_same(alpha):
    """A lambda cannot be saved, but its model can: the alphas are there."""
    model, x = mlp(), torch.randn(3, 8)
    fk.quantize_model(model, quantizer(alpha))
    twin = copy.deepcopy(model)
    assert [twin[i].quantizer == model[i].quantizer for i in (0, 2)] == [True, True]
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for other in (twin, loaded, pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), model(x))
        assert other[0].quantizer.grid == GRID
        assert str(other) == str(model)
    assert loaded[0].quantizer.scale == loaded[2].quantizer.scale


def test_a_function_that_was_not_saved_says_so():
    quantizer_of_file = pickle.loads(pickle.dumps(quantizer(lambda w: 0.5)))
    with pytest.raises(RuntimeError, match="alpha must be given anew: it was a function"):
        fk.quantize_model(mlp(), quantizer_of_file)
    assert pickle.loads(pickle.dumps(quantizer(row_mean))) == quantizer(row_mean)


def test_quantizers_are_values():
    """Tensors and functions by identity: neither compares, or hashes, as a value."""
    alpha, function = torch.ones(3), partial(row_mean)
    parts = [0.5, 1, alpha, alpha.clone(), function, partial(row_mean), row_mean]
    quantizers = [quantizer(x) for x in parts]
    again = [quantizer(x) for x in (0.5, 1.0, *parts[2:])]
    for i, q in enumerate(quantizers):
        assert [q == other for other in again] == [i == k for k in range(len(parts))]
        assert {q: i}[again[i]] == i
    assert quantizers[0] != fk.Quantizer(fk.Grid.uniform(3), fk.Scale.fixed(0.5), STE)
    assert quantizers[0].scale != 0.5
    assert quantizers[0].epsilon == STE.epsilon(GRID)
    assert repr(quantizers[2].scale) == "Scale.fixed(tensor of shape (3,))"


def test_a_quantizer_comes_back_from_its_dict():
    """What JSON holds of them comes back; a function or a tensor says that it did not."""
    for scale in (0.5, torch.ones(3, 1), row_mean):
        q = fk.Quantizer(fk.Grid.sign(), fk.Scale.fixed(scale), fk.StraightThrough("tanh", noise="gaussian"))
        found = fk.Quantizer.from_dict(copy.deepcopy(q.to_dict()))
        assert (found.grid, found.straight_through) == (q.grid, q.straight_through)
        assert (found.scale == q.scale) == (scale == 0.5 if isinstance(scale, float) else False)
        if not isinstance(scale, float):
            with pytest.raises(RuntimeError, match="alpha must be given anew"):
                fk.quantize_model(nn.Linear(4, 4), found)
    for clip in (True, False, "trust"):
        q = fk.Quantizer(fk.Grid.uniform(2), fk.Scale.fixed(0.5), fk.StraightThrough(clip=clip))
        assert fk.Quantizer.from_dict(json.loads(json.dumps(q.to_dict()))) == q
        assert pickle.loads(pickle.dumps(q)) == q
    for wrong in ({}, {"version": 2}, "2", q.to_dict() | {"grid": {"bits": 2}}):
        with pytest.raises(ValueError, match="the quantizer must be"):
            fk.Quantizer.from_dict(wrong)


@pytest.mark.parametrize(
    ("grid", "bits"),
    [
        (fk.Grid.uniform(4), 4.0),
        (fk.Grid.half_offset(1), 1.0),
        (fk.Grid.sign(), 1.0),
        (fk.Grid.ternary(), 1.585),
    ],
    ids=str,
)
def test_a_grid_knows_its_bits(grid, bits):
    assert grid.bits == pytest.approx(bits, abs=1e-3)


@pytest.mark.parametrize(
    ("alpha", "got"),
    [
        (torch.ones(1, 64), "(1, 64)"),  # by its count, groups of 32
        (torch.ones(32, 64), "(32, 64)"),  # a scale of its own for each weight
        (torch.ones(64), "(64,)"),
        (torch.ones(32, 5), "(32, 5)"),
        (torch.ones(1, 32), "(1, 32)"),
        (torch.ones(16, 2), "(16, 2)"),
        (torch.ones(0), "(0,)"),
        (torch.ones(32, 1, 2), "(32, 1, 2)"),
    ],
    ids=str,
)
def test_alphas_of_a_wrong_shape_are_refused(alpha, got):
    message = f"for weight with 32 rows of 64, got shape {got}"
    linear = nn.Linear(64, 32)
    with pytest.raises(ValueError, match=re.escape(message)):
        fk.quantize_model(linear, quantizer(alpha))
    assert type(linear) is nn.Linear


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (32,), (32, 1), (32, 2), (32, 32)], ids=str)
def test_alphas_of_a_right_shape_are_taken(shape):
    alpha = torch.rand(shape) + 0.01
    linear = nn.Linear(64, 32)
    fk.quantize_model(linear, quantizer(alpha))
    assert torch.equal(linear.alpha, alpha)
    each = alpha.reshape(32 if alpha.numel() > 1 else 1, -1)
    each = each.repeat_interleave(64 // each.shape[1], 1).expand(32, 64)
    q = each * (linear.weight / each).round().clamp(-2, 1)
    torch.testing.assert_close(linear.effective_weight(), q, rtol=1e-6, atol=0)


# ---- what a user can get wrong


def taken():
    model = mlp()
    model[2].probe = None
    return model


PARAMETER = nn.Parameter(torch.tensor(0.3))


@pytest.mark.parametrize(
    ("make", "call", "exception", "message"),
    [
        (mlp, lambda: (GRID,), TypeError, "quantizer must be a Quantizer or None, got Grid: try "),
        (lambda: "model", lambda: (quantizer(0.3),), TypeError, "model must be a Module, got str"),
        (mlp, lambda: (quantizer(torch.ones(6)),), ValueError,
         "alpha must have one element, one per row, shape (4, 1), or one per group of a row"),
        (mlp, lambda: (quantizer(PARAMETER),), ValueError,
         "alpha must not require grad, as no gradient reaches it, got a Parameter that does"),
        (mlp, lambda: (quantizer(lambda w: PARAMETER),), ValueError, "alpha must not require grad"),
        (mlp, lambda: (quantizer(lambda w: "1"),), TypeError,
         "alpha must be a function of a weight that returns a number or a floating tensor, got str"),
        (mlp, lambda: (quantizer(True),), TypeError, "alpha must be a number, a floating tensor or a function"),
        (taken, lambda: (quantizer(0.3),), ValueError, "2 must not have an attribute 'probe' of its own"),
        (mlp, lambda: (fk.Quantizer("sign", fk.Scale.fixed(1), STE),), TypeError,
         "grid must be a Grid, Grid.uniform(2) say, got the str 'sign'"),
        (mlp, lambda: (fk.Quantizer(GRID, 0.5, STE),), TypeError,
         "scale must be a Scale, Scale.fixed(alpha) say, got float"),
        (mlp, lambda: (fk.Quantizer(GRID, fk.Scale.fixed(1), "identity"),), TypeError,
         'straight_through must be a StraightThrough, StraightThrough("identity") say, got the str'),
        (mlp, lambda: (fk.Quantizer(GRID, fk.Scale.fixed(1), fk.StraightThrough("tanh")),), ValueError,
         "straight_through must be 'identity' for rounding grids"),
    ],
)  # fmt: skip
def test_errors_leave_the_model_alone(make, call, exception, message):
    model = make()
    before = [(type(m), dict(vars(m))) for m in model.modules()] if isinstance(model, nn.Module) else None
    with pytest.raises(exception, match=re.escape(message)):
        fk.quantize_model(model, *call())
    assert before is None or before == [(type(m), dict(vars(m))) for m in model.modules()]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"skip": 2}, "skip must be a name, a type or a function, or a list of them, got int"),
        ({"skip": ["0", 2]}, "skip[1] must be a name, a type or a function, got int"),
        ({"rules": "0"}, "rules must be a list of pairs, got str"),
        ({"rules": ["0"]}, "rules[0] must be (which modules, quantizer) or that and an activation, got '0'"),
        ({"rules": [("0", GRID)]}, "rules[0][1] must be a Quantizer or None, got Grid"),
        ({"rules": [("0", None, GRID)]}, "rules[0][2] must be a Quantizer or None, got Grid"),
        ({"activation": GRID}, "activation must be a Quantizer or None, got Grid: try "),
        ({"rules": [(0, None)]}, "rules[0] must be a name, a type or a function, got int"),
        ({"backend": 2}, "backend must be a string or None, got int"),
    ],
)
def test_wrong_types_are_named(options, message):
    model = mlp()
    with pytest.raises(TypeError, match=re.escape(message)):
        fk.quantize_model(model, quantizer(0.3), **options)
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize(
    "set_alpha",
    [
        lambda m: setattr(m, "alpha", nn.Parameter(m.alpha)),
        lambda m: m.alpha.requires_grad_(),
    ],
)
def test_an_alpha_that_would_not_train_is_refused(set_alpha):
    model = mlp()
    fk.quantize_model(model, quantizer(0.3))
    set_alpha(model[0])
    with pytest.raises(ValueError, match="alpha must not require grad"):
        model(torch.randn(2, 8))


def test_quantize_gradcheck_of_the_smooth_derivative(backend):
    """The straight-through derivative of tanh is that of alpha tanh(theta / alpha)."""
    theta = torch.linspace(-1, 1, 41).requires_grad_()
    alpha = torch.tensor(0.5)
    tanh = fk.StraightThrough("tanh")
    q = fk.quantize(theta, alpha, grid=fk.Grid.sign(), straight_through=tanh, backend=backend)
    assert set(q.unique().tolist()) == {-0.5, 0.5}
    q.sum().backward()
    smooth = theta.detach().clone().double().requires_grad_()
    (0.5 * torch.tanh(smooth / 0.5)).sum().backward()
    torch.testing.assert_close(theta.grad.double(), smooth.grad, rtol=0, atol=2e-6)
