"""torch.func over quantized models: grad, per-sample gradients, vmap, jacrev, as torch.autograd has them."""

import pytest
import torch
import torch.nn.functional as F
from support.layers import INPUTS
from torch import nn
from torch.func import functional_call, grad, jacrev, vmap

import fogzo_kernels as fk

PRESETS = {
    "lsq": fk.presets.lsq(2, "row"),
    "seq": fk.presets.seq(2),
    "bitnet": fk.presets.bitnet(),
    "quest": fk.presets.quest(3, block=16),
    "fixed": fk.presets.fixed(3, 0.1),
}


def made(preset="lsq", inputs="none", compute=None):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 5))
    x, y = torch.randn(6, 32), torch.randint(5, (6,))
    fk.quantize_model(model, PRESETS[preset], activation=INPUTS[inputs])
    if inputs == "learned":
        fk.calibrate_inputs_(model, lambda: model(x))
    fk.set_compute_(model, compute)
    return model, x, y


def per_autograd(model, x, y):
    return torch.autograd.grad(F.cross_entropy(model(x), y), [*model.parameters()])


def loss_of(model):
    return lambda p, x, y: F.cross_entropy(functional_call(model, p, (x,)), y)


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.filterwarnings("error:There is a performance drop")
def test_torch_func_gives_gradients_of_batches_and_samples(preset, inputs):
    model, x, y = made(preset, inputs)
    p, of = dict(model.named_parameters()), loss_of(model)
    found = grad(of)(p, x, y)
    assert [k for k, g in zip(p, per_autograd(model, x, y), strict=True) if not torch.equal(found[k], g)] == []
    found = vmap(grad(lambda p, x, y: of(p, x[None], y[None])), in_dims=(None, 0, 0))(p, x, y)
    for i in range(len(x)):
        for k, g in zip(p, per_autograd(model, x[i : i + 1], y[i : i + 1]), strict=True):
            torch.testing.assert_close(found[k][i], g)


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("preset", ["lsq", "bitnet", "quest"])
def test_vmap_and_jacrev_give_those_of_autograd(preset, inputs):
    model, x, _ = made(preset, inputs)
    torch.testing.assert_close(vmap(model)(x), model(x))
    expected = torch.autograd.functional.jacobian(model, x[:1])[0, :, 0]
    torch.testing.assert_close(jacrev(lambda one: model(one[None])[0])(x[0]), expected)


def test_torch_func_differentiates_int8_products():
    model, x, y = made(inputs="dynamic", compute="int8")
    found = grad(loss_of(model))(dict(model.named_parameters()), x, y)
    for one, g in zip(found.values(), per_autograd(model, x, y), strict=True):
        torch.testing.assert_close(one, g, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize("preset", PRESETS)
def test_a_closure_may_differentiate_its_model(preset, watched):
    """A loss with the gradient in the inputs, by torch.func, in a step, as by torch.autograd."""
    found = []
    for by_func in (True, False):
        model, x, _ = made(preset)
        if watched:  # g, not dL/dQ, comes to the weights
            model[0].weight.register_hook(lambda g: g)

        def closure(model=model, by_func=by_func, x=x):
            if by_func:
                slope = vmap(grad(lambda one: model(one[None]).sum()))(x)
            else:
                with torch.enable_grad():
                    inputs = x.clone().requires_grad_()
                    (slope,) = torch.autograd.grad(model(inputs).sum(), inputs, create_graph=True)
            return (slope.square().sum(1) + model(x).square().sum(1)).mean()

        torch.manual_seed(0)
        loss = fk.Fogzo(model, total_steps=4, kappa=1.0, directions=1).backward(closure)
        found.append([loss, *(p.grad for p in model.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-3, atol=1e-4)


def test_what_cannot_be_names_functional_call():
    model, x, _ = made()
    stacked = {k: torch.stack([p, p]).detach() for k, p in model.named_parameters()}
    with pytest.raises(RuntimeError, match=r"0.weight must not be batched by vmap, as functional_call"):
        vmap(lambda p: functional_call(model, p, (x,)))(stacked)
    p = dict(model.named_parameters())
    twice = grad(lambda p: sum(g.sum() for g in grad(loss_of(model))(p, x, torch.zeros(6).long()).values()))
    with pytest.raises(RuntimeError, match="must not be differentiated again"):
        twice(p)
