"""Inputs whose scale is learned: calibrated, trained with LSQ's gradient, held, saved."""

import copy
import math
import re
import warnings

import pytest
import torch
import torch.nn.functional as F
from support.layers import LAYERS, WITH_INPUTS
from torch import nn

import fogzo_kernels as fk

WEIGHTS = fk.presets.lsq(4)
INPUTS = fk.presets.lsq(3)
QUEST = fk.presets.quest(4, block=16)
#: A learned scale in a rotated basis.
TURNED = fk.Quantizer(
    fk.Grid.half_offset(3),
    fk.Scale.learned(init=fk.Scale.rms(factor=0.4)),
    QUEST.straight_through,
    fk.Hadamard(16),
)


def net(activation=INPUTS):
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 3))
    fk.quantize_model(model, WEIGHTS, activation=activation)
    return model


def calibrated(activation=INPUTS, x=None):
    model, x = net(activation), torch.randn(8, 16) if x is None else x
    fk.calibrate_inputs_(model, lambda: model(x))
    return model, x


def names(model):
    return [name for name, _ in model.named_parameters() if name.endswith("input_alpha")]


# ---- the first value


@pytest.mark.parametrize("name", WITH_INPUTS)
def test_an_input_alpha_begins_as_lsq_says_from_the_first_input(name, backend):
    layer = LAYERS[name]
    module = layer.make()
    fk.quantize_model(module, WEIGHTS, activation=INPUTS, backend=backend)
    first, second = layer.input(), layer.input()

    def run():
        module(first)
        module(second)

    fk.calibrate_inputs_(module, run)
    torch.testing.assert_close(module.input_alpha.detach(), 2 * first.abs().mean() / math.sqrt(3))
    assert module.input_alpha.dtype == torch.float32
    assert module.input_alpha.requires_grad


def test_each_layer_takes_its_own_input_as_it_is_when_those_before_are_quantized():
    model, x = calibrated()
    hidden = model[1](model[0](x))
    torch.testing.assert_close(model[2].input_alpha.detach(), 2 * hidden.detach().abs().mean() / math.sqrt(3))


def test_an_input_alpha_without_a_value_is_an_error():
    model = net()
    message = "input_alpha, the learned scale of the input of 0, has no value yet"
    with pytest.raises(RuntimeError, match=re.escape(message)):
        model(torch.randn(2, 16))


@pytest.mark.parametrize("broken", ["raises", "misses", "zero", "nan"])
def test_a_calibration_whose_run_fails_changes_nothing(broken):
    model, x = calibrated()
    before = copy.deepcopy(model.state_dict())

    def run():
        if broken == "raises":
            model[0](x)
            raise KeyError("data")
        model[0](x) if broken == "misses" else model(x * (math.nan if broken == "nan" else 0.0))

    message = r"data|run must reach every .* got none for 2|each input a scale > 0"
    with pytest.raises((KeyError, ValueError), match=message):
        fk.calibrate_inputs_(model, run)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert torch.isfinite(model(x)).all()
    assert not any(m.input_quantizer.calibrating for m in (model[0], model[2]))


def test_calibrate_inputs_names_a_model_without_learned_inputs():
    with pytest.raises(ValueError, match="whose inputs have a learned scale, got none"):
        fk.calibrate_inputs_(net(fk.presets.dynamic(8)), lambda: None)
    with pytest.raises(TypeError, match="run must be a function that runs the model, got Tensor"):
        fk.calibrate_inputs_(net(), torch.zeros(1))


# ---- forward and gradients


@pytest.mark.parametrize("activation", [INPUTS, TURNED], ids=["lsq", "rotated"])
def test_gradients_of_input_alphas_are_lsqs(activation, backend):
    """Of a linear layer, in float64 by the formulas; the features of a token share the scale."""
    torch.manual_seed(1)  # a tie would go another way in float64
    linear, x = nn.Linear(16, 5), torch.randn(6, 16)
    fk.quantize_model(linear, WEIGHTS, activation=activation, backend=backend)
    fk.calibrate_inputs_(linear, lambda: linear(x))
    x.requires_grad_()
    y = linear(x)
    upstream = torch.randn_like(y)
    y.backward(upstream)
    grid, alpha, wq = activation.grid, linear.input_alpha.detach().double(), linear.effective_weight().double()
    turn = activation.transform is not None
    h = fk.hadamard(torch.eye(16), block=16).double() if turn else torch.eye(16).double()
    u = x.detach().double() @ h
    z = u / alpha - grid.offset
    code = z.round().clamp(grid.qmin, grid.qmax)
    dq = upstream.double() @ wq.detach() @ h
    torch.testing.assert_close(
        y.double(), (alpha * (code + grid.offset)) @ h @ wq.t() + linear.bias.double(), rtol=1e-4, atol=1e-4
    )
    inside = (z > grid.qmin) & (z < grid.qmax)
    passes = (z >= grid.qmin - 0.5) & (z <= grid.qmax + 0.5) if turn else inside
    torch.testing.assert_close(x.grad.double(), (dq * passes) @ h, rtol=1e-4, atol=1e-4)
    slope = torch.where((z >= grid.qmin) & (z <= grid.qmax), code - z, code + grid.offset)
    wanted = (dq * slope).sum() / math.sqrt(16 * grid.qmax)
    torch.testing.assert_close(linear.input_alpha.grad.double(), wanted, rtol=1e-4, atol=1e-4)


def test_training_moves_input_alphas_and_lowers_the_loss():
    torch.manual_seed(0)
    model, x = calibrated()
    y = torch.randint(3, (8,))
    fogzo = fk.Fogzo(model, total_steps=60, kappa=1.0, seed=1, directions=1)
    optimizer = fk.AdamW(model.parameters(), lr=5e-3, fogzo=fogzo)
    before = [model.get_parameter(name).item() for name in names(model)]
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        losses.append(float(optimizer.step(lambda: F.cross_entropy(model(x), y))))
    assert losses[-1] < 0.5 * losses[0]
    assert all(model.get_parameter(n).item() != b for n, b in zip(names(model), before, strict=True))


def test_fogzo_leaves_the_gradient_of_input_alphas_alone():
    """Its gradient is that of the gradient pass, whatever the probes do."""
    model, x = calibrated()
    y = torch.randint(3, (8,))
    F.cross_entropy(model(x), y).backward()
    plain = {name: model.get_parameter(name).grad.clone() for name in names(model)}
    model.zero_grad()
    fk.Fogzo(model, total_steps=5, kappa=1.0, directions=1).backward(lambda: F.cross_entropy(model(x), y))
    for name, grad in plain.items():
        torch.testing.assert_close(model.get_parameter(name).grad, grad)


# ---- out of range


@pytest.mark.parametrize("value", [-0.1, 0.0, math.nan, math.inf])
@pytest.mark.parametrize("by", ["forward", "fogzo"])
def test_an_input_alpha_out_of_range_is_held_counted_and_warned_of_once(value, by):
    model, x = calibrated()
    y, first = torch.randint(3, (8,)), model[0].input_alpha.item()
    fogzo = fk.Fogzo(model, total_steps=5, kappa=1.0, directions=1)
    with torch.no_grad():
        model[0].input_alpha.fill_(value)

    def run():
        model.zero_grad()
        return model(x).sum() if by == "forward" else fogzo.backward(lambda: F.cross_entropy(model(x), y))

    with pytest.warns(UserWarning, match="an update drove a learned alpha out of range"):
        loss = run()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run()
    assert torch.isfinite(loss)
    assert model[0].input_alpha.item() == pytest.approx(first * 2**-20)
    if by == "fogzo":
        assert fogzo.diagnostics()["bad_alphas"] == 1


# ---- groups, checkpoints


def test_an_input_alpha_does_not_decay():
    model, _ = calibrated()
    decays, _, alphas = fk.parameter_groups(model, weight_decay=0.1)
    ids = {id(p) for p in alphas["params"]}
    assert ids == {id(model.get_parameter(n)) for n, _ in model.named_parameters() if n.endswith("alpha")}
    assert {id(model.get_parameter(name)) for name in names(model)} < ids
    assert len(decays["params"]) == 2


@pytest.mark.parametrize("activation", [INPUTS, TURNED], ids=["lsq", "rotated"])
def test_checkpoints_keep_the_learned_input_alpha(activation):
    model, x = calibrated(activation)
    other = net(activation)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))
    untrained = net(activation)
    untrained.load_state_dict(net(activation).state_dict())
    with pytest.raises(RuntimeError, match="has no value yet"):
        untrained(x)
    with pytest.raises(RuntimeError, match="activation must be None, got a state with"):
        net(None).load_state_dict(model.state_dict())
    moved = copy.deepcopy(model).to(torch.bfloat16)
    assert moved[0].input_alpha.dtype == torch.float32
    assert torch.equal(moved[0].input_alpha, model[0].input_alpha)
    plain = fk.dequantize_model(copy.deepcopy(model))
    assert set(plain.state_dict()) == {"0.weight", "0.bias", "2.weight", "2.bias"}


def test_transformers_keep_the_learned_input_alpha(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    import fogzo_kernels.integrations.transformers  # noqa: F401

    config = transformers.GPT2Config(
        vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0
    )
    model, x = transformers.GPT2LMHeadModel(config).eval(), torch.randint(32, (2, 9))
    fk.quantize_model(model, WEIGHTS, activation=INPUTS)
    fk.calibrate_inputs_(model, lambda: model(x))
    model.save_pretrained(tmp_path)
    loaded = transformers.GPT2LMHeadModel.from_pretrained(tmp_path)
    assert torch.equal(loaded(x).logits, model(x).logits)


def test_a_compiled_model_gives_the_eager_output():
    model, x = calibrated()
    wanted = model(x)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), wanted)
