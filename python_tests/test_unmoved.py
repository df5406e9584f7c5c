"""Learned alphas that are in no optimizer are named at the second step; nobody else is."""

import warnings

import pytest
import torch
from torch import nn

import fogzo_kernels as fk

X = torch.randn(32, 16)
WARNING = (
    r"no optimizer has the learned alphas: .* did not move 0.alpha, 2.alpha\."
    r" Make the optimizer after quantize_model.*add_param"
)


def network(**options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 1))
    weights = list(model.parameters())
    fk.quantize_model(model, options.pop("quantizer", fk.presets.lsq(2)), **options)
    return model, weights, fk.Fogzo(model, total_steps=10, kappa=1.0, directions=1)


def steps(model, fogzo, optimizer, count=4, before=lambda step: None):
    for step in range(count):
        before(step)
        optimizer.zero_grad()
        if hasattr(optimizer, "fogzo"):
            optimizer.step(lambda: model(X).square().mean())
        else:
            fogzo.backward(lambda: model(X).square().mean())
            optimizer.step()


OPTIMIZERS = {
    "AdamW": lambda params, fogzo, lr: torch.optim.AdamW(params, lr=lr),
    "SGD": lambda params, fogzo, lr: torch.optim.SGD(params, lr=lr, foreach=False),
    "fused AdamW": lambda params, fogzo, lr: fk.AdamW(params, lr=lr, fogzo=fogzo),
    "fused SGD": lambda params, fogzo, lr: fk.SGD(params, lr=lr, fogzo=fogzo),
}


@pytest.mark.parametrize("lr", [1e-3, 0.0])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_an_optimizer_made_before_quantize_model_is_told_at_the_second_step(kind, lr):
    model, weights, fogzo = network()
    optimizer = OPTIMIZERS[kind](weights, fogzo, lr)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steps(model, fogzo, optimizer, 1)
    with pytest.warns(UserWarning, match=WARNING):
        steps(model, fogzo, optimizer, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steps(model, fogzo, optimizer, 2)  # once


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("lr", [1e-3, 0.0])
@pytest.mark.parametrize("quantizer", [fk.presets.lsq(2), fk.presets.bitnet()], ids=["learned", "measured"])
def test_an_optimizer_that_has_the_alphas_draws_no_warning(kind, lr, quantizer):
    model, _, fogzo = network(quantizer=quantizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steps(model, fogzo, OPTIMIZERS[kind](model.parameters(), fogzo, lr))


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_named_remedy_moves_the_alphas(kind):
    model, weights, fogzo = network()
    optimizer = OPTIMIZERS[kind](weights, fogzo, 1e-3)
    optimizer.add_param_group({"params": list(fk.learned_alphas(model))})
    before = model[0].alpha.clone()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steps(model, fogzo, optimizer)
    assert not torch.equal(before, model[0].alpha)


def test_input_alphas_that_do_not_move_are_named():
    model, weights, fogzo = network(activation=fk.presets.lsq(4))
    fk.calibrate_inputs_(model, lambda: model(X))
    optimizer = torch.optim.AdamW([*weights, model[0].alpha, model[2].alpha], lr=1e-3)
    with pytest.warns(UserWarning, match="did not move 0.input_alpha, 2.input_alpha"):
        steps(model, fogzo, optimizer)


def test_frozen_or_waiting_alphas_draw_no_warning():
    """Alphas without a gradient; a loop whose first steps move no weight; one that writes through .data."""
    model, weights, fogzo = network()
    for alpha in fk.learned_alphas(model):
        alpha.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steps(model, fogzo, torch.optim.AdamW(weights, lr=1e-3))
        model, weights, fogzo = network()
        for _ in range(3):
            model.zero_grad()
            fogzo.backward(lambda: model(X).square().mean())
            for p in weights:
                p.data.add_(p.grad, alpha=-1e-3)
        for _ in range(3):  # no optimizer yet
            model.zero_grad()
            fogzo.backward(lambda: model(X).square().mean())
    with pytest.warns(UserWarning, match=WARNING):
        steps(model, fogzo, torch.optim.AdamW(weights, lr=1e-3))
