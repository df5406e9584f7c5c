"""Fused optimizers make the calls of the last step again where nothing has changed, and see what has."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

import fogzo_kernels as fk

KINDS = {
    "adamw": lambda parameters, **options: fk.AdamW(parameters, lr=1e-2, **options),
    "sgd": lambda parameters, **options: fk.SGD(parameters, lr=1e-2, momentum=0.9, **options),
}


def made(generator, preset=None):
    model = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 3))
    fk.quantize_model(model, preset or fk.presets.lsq(3), skip=["4"])
    return model, torch.randn(16, 8, generator=generator)


def loss_of(model, x):
    return model(x).square().mean()


def plain_step(model, optimizer, x):
    optimizer.zero_grad()
    loss_of(model, x).backward()
    optimizer.step()


def all_equal(model, other):
    return all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("start", [0.0, 1.0])
def test_a_step_holds_no_gradient_that_was_cleared(kind, start, generator):
    """Else the next step would need the memory of two."""
    model, x = made(generator)
    fogzo = fk.Fogzo(model, total_steps=4, kappa=0.5, start=start, directions=1)
    optimizer = KINDS[kind](model.parameters(), fogzo=fogzo)
    for _ in range(3):
        optimizer.step(lambda: loss_of(model, x))
        grads = [weakref.ref(p.grad) for p in model.parameters()]
        optimizer.zero_grad()
        gc.collect()
        assert all(grad() is None for grad in grads)


def flag(model, optimizer):
    """Who captures a graph later sets this then. The device has the number of steps from there on."""
    optimizer.param_groups[0]["capturable"] = True


def rate(model, optimizer):
    optimizer.param_groups[0]["lr"] = 0.05


def freeze(model, optimizer):
    model[0].bias.grad = None


def widen(model, optimizer):
    model[2].weight.grad = model[2].weight.grad.t().contiguous().t()


def move(model, optimizer):
    model[2].weight.data = model[2].weight.data.clone()


def restart(model, optimizer):
    optimizer.state.clear()


def replace(model, optimizer):
    state = optimizer.state[model[4].weight]
    for name, value in state.items():
        state[name] = value * 2 if name != "step" else value.clone()


def load(model, optimizer):
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


@pytest.mark.parametrize("change", [flag, rate, freeze, widen, move, restart, replace, load])
@pytest.mark.parametrize("kind", KINDS)
def test_a_change_between_steps_is_seen(kind, change, generator):
    """An optimizer that keeps no calls, a copy made anew before each step, takes the same steps."""
    model, x = made(generator)
    optimizer = KINDS[kind](model.parameters())
    for _ in range(2):
        plain_step(model, optimizer, x)
    assert optimizer._kept is not None
    other = copy.deepcopy(model)
    fresh = KINDS[kind](other.parameters())
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for step in range(3):
        for m, o in ((model, optimizer), (other, fresh)):
            o.zero_grad()
            loss_of(m, x).backward()
            if step == 1:
                change(m, o)
        fresh._kept = None
        optimizer.step()
        fresh.step()
        assert all_equal(model, other)
    if change is flag:
        assert not any(call.number for call in optimizer._kept.calls)


def test_steps_with_probes_after_steps_without_them_see_the_estimate(generator):
    """Weights move from the calls of a plain step to those of an estimate."""
    model, x = made(generator)
    other = copy.deepcopy(model)
    options = {"total_steps": 8, "kappa": 2.0, "start": 0.5, "schedule": "constant"}
    fogzos = [fk.Fogzo(m, **{"directions": 1} | options) for m in (model, other)]
    kept, fresh = (
        fk.AdamW(m.parameters(), lr=1e-2, fogzo=f) for m, f in zip((model, other), fogzos, strict=True)
    )
    for _ in range(8):
        fresh._kept = None
        for m, o in ((model, kept), (other, fresh)):
            o.zero_grad()
            o.step(lambda m=m: loss_of(m, x))
        assert all_equal(model, other)
