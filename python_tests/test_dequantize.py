"""calibrate_ and dequantize_model: alphas made anew, and the way back to plain modules."""

import copy
import re

import pytest
import torch
from support.savable import (
    IDENTITY,
    LAYERS,
    Tied,
    assert_equal,
    layer_of,
    mlp,
    quantized,
    quantizer,
    row_mean,
    state_of,
)
from support.training import batch, loss_of, make
from torch import nn

import fogzo_kernels as fk

# ---- calibrate_


def test_calibrate_makes_alphas_from_the_weights_in_place():
    model = quantized(mlp())
    alphas = [model[i].alpha for i in (0, 2)]
    with torch.no_grad():
        for p in model.parameters():
            p *= 3
    before = [a.clone() for a in alphas]
    fk.calibrate_(model)
    assert all(model[i].alpha is a for i, a in zip((0, 2), alphas, strict=True))  # in place
    assert [torch.equal(a, row_mean(model[i].weight)) for i, a in zip((0, 2), alphas, strict=True)] == [
        True
    ] * 2
    assert not any(torch.equal(a, b) for a, b in zip(alphas, before, strict=True))


def test_calibrate_takes_another_scale():
    model = quantized(Tied())
    scale = fk.Scale.fixed(lambda w: w.abs().mean())
    fk.calibrate_(model, scale)
    for m in (model.embedding, model.head, model.body):
        assert torch.equal(m.alpha, m.weight.abs().mean())
        assert m.quantizer == fk.Quantizer(fk.Grid.uniform(2), scale, IDENTITY)
    assert model.embedding.alpha is not model.head.alpha
    fk.Fogzo(model, total_steps=1, kappa=1, directions=1)


def test_calibrate_gives_a_model_from_the_meta_device_its_alphas():
    with torch.device("meta"):
        model = quantized(mlp())
    model.to_empty(device="cpu")
    for p, q in zip(model.parameters(), mlp().parameters(), strict=True):
        p.data.copy_(q.data)
    fk.calibrate_(model)
    assert_equal(model.state_dict(), quantized(mlp()).state_dict())


def bad_for_the_second(w):
    if w.shape[1] == 12:
        return torch.ones(5)
    return w.abs().mean()


@pytest.mark.parametrize(
    ("call", "exception", "message"),
    [
        (lambda m: fk.calibrate_(m, 0.5), TypeError, "scale must be a Scale, got float"),
        (lambda m: fk.calibrate_("m"), TypeError, "model must be a Module, got str"),
        (lambda m: fk.calibrate_(mlp()), ValueError,
         "model must have quantized modules to calibrate, got none"),
        (lambda m: fk.calibrate_(m, fk.Scale.fixed(bad_for_the_second)), ValueError, "alpha must have one"),
        (lambda m: fk.dequantize_model("m"), TypeError, "model must be a Module, got str"),
        (lambda m: fk.dequantize_model(mlp()), ValueError,
         "model must have quantized modules to dequantize, got none"),
    ],
)  # fmt: skip
def test_errors_change_nothing(call, exception, message):
    model = quantized(mlp())
    before, quantizers = state_of(model), [model[i].quantizer for i in (0, 2)]
    with pytest.raises(exception, match=re.escape(message)):
        call(model)
    assert_equal(state_of(model), before)
    assert [model[i].quantizer for i in (0, 2)] == quantizers


# ---- dequantize_model


@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated:DeprecationWarning")
@pytest.mark.parametrize("layer", LAYERS)
def test_dequantize_gives_the_plain_layer_with_q_as_its_weight(layer):
    make_layer, x = layer_of(layer)
    plain = nn.Sequential(make_layer())
    model = quantized(copy.deepcopy(plain))
    weight, codes, alpha = model[0].effective_weight(), model[0].codes(), model[0].alpha.clone()
    parameters = list(model.parameters())
    assert fk.dequantize_model(model) is model
    assert type(model[0]) is type(plain[0])
    assert vars(model[0]).keys() == vars(plain[0]).keys()
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert torch.equal(model[0].weight, weight)
    expected = model(x)
    assert expected.requires_grad
    fresh = nn.Sequential(make_layer())
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(x), expected)
    traced = torch.jit.trace(model, x)
    assert torch.equal(traced(x), expected)
    again = fk.quantize_model(model, quantizer(alpha=alpha))  # Q of a value of the grid is that value
    assert torch.equal(model[0].codes(), codes)
    assert len(again.quantized) == 1


@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated:DeprecationWarning")
def test_a_dequantized_model_can_be_scripted():
    model = quantized(mlp())
    x = torch.randn(3, 8)
    expected = model(x)
    assert torch.equal(torch.jit.script(fk.dequantize_model(model))(x), expected)


def test_dequantize_keeps_ties_and_dtype():
    model = quantized(Tied()).bfloat16()
    expected = model(torch.arange(5))
    fk.dequantize_model(model)
    assert not model._load_state_dict_post_hooks
    assert model.head.weight is model.embedding.weight
    assert model.head.weight.dtype == torch.bfloat16
    assert torch.equal(model(torch.arange(5)), expected)


def test_dequantized_latents_may_be_quantized_in_another_way():
    plain = Tied()
    model = quantized(copy.deepcopy(plain))
    fk.dequantize_model(model, latents=True)
    assert_equal(model.state_dict(), plain.state_dict())
    fk.quantize_model(model, quantizer(bits=4))
    assert_equal(model.state_dict(), quantized(plain, bits=4).state_dict())
    assert [m.tensor_id for m in (model.embedding, model.head, model.body)] == [0, 0, 1]


def test_dequantize_takes_a_module_that_is_the_model():
    model = quantized(nn.Linear(8, 4))
    expected = model.effective_weight()
    assert torch.equal(fk.dequantize_model(model).weight, expected)
    assert type(model) is nn.Linear


@pytest.mark.parametrize("call", [fk.dequantize_model, fk.calibrate_])
def test_inside_a_pass_dequantize_is_refused(call):
    model, fogzo = make()
    before = model.first.weight.clone()
    for i, probe in enumerate(fogzo.probes()):
        with probe:
            if i:
                with pytest.raises(RuntimeError, match="model must not be inside a pass of Fogzo"):
                    call(model)
            probe.backward(loss_of(model, *batch()))
    fogzo.estimate_()
    assert type(model.first) is fk.QuantLinear
    assert torch.equal(model.first.weight, before)


def test_an_alpha_out_of_range_is_named_before_anything_changes():
    model = quantized(mlp())
    model[2].alpha.fill_(float("nan"))
    before = model[0].weight.clone()
    with pytest.raises(ValueError, match="alphas"):
        fk.dequantize_model(model)
    assert torch.equal(model[0].weight, before)
    assert type(model[0]) is fk.QuantLinear
