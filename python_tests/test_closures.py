"""Closures: what they change that passes see, zero_grad in them, derivatives."""

import importlib
import itertools
import random
import types
import warnings

import numpy as np
import pytest
import torch
from support.training import QUANTIZER, batch, loss_of, setup
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fogzo_kernels as fk

WARNING = "a pass of a step changes"


# ---- what passes see otherwise: found through functions, iterators and modules

FACTORS = (1.0, 2.0, 3.0, 5.0, 8.0, 13.0, 21.0, 34.0)
STATE = types.SimpleNamespace(it=None, calls=0)


def of_loader():
    return float(next(STATE.it)[0])


def two_levels():
    return of_loader()


def of_iterator():
    found = next(STATE.it)
    return float(found[-1] if isinstance(found, tuple) else found)


def of_counter():
    STATE.calls += 1
    return float(STATE.calls)


def wrapped(function):
    def inner():
        return torch.no_grad()(function)()

    return inner


def loader(**options):
    return iter(DataLoader(TensorDataset(torch.tensor(FACTORS)), shuffle=True, **options))


HELPERS = {
    "a loader": (of_loader, loader), "a loader's helper": (two_levels, loader),
    "zip": (of_iterator, lambda: zip(FACTORS, FACTORS, strict=True)),
    "enumerate": (of_iterator, lambda: enumerate(FACTORS)),
    "cycle": (of_iterator, lambda: itertools.cycle(FACTORS)), "map": (of_iterator, lambda: map(abs, FACTORS)),
    "a count": (of_counter, lambda: None), "decorated": (wrapped(of_counter), lambda: None),
}  # fmt: skip


@pytest.mark.parametrize("name", HELPERS)
def test_the_first_step_looks_into_functions_that_the_closure_calls(name):
    helper, begin = HELPERS[name]
    _, fogzo, closure = setup()
    STATE.it, STATE.calls = begin(), 0
    with pytest.warns(UserWarning, match=f"{WARNING} .*STATE"):
        fogzo.backward(lambda: closure() * helper())


def test_a_closure_may_call_a_function_of_a_module_of_the_program(tmp_path, monkeypatch):
    (tmp_path / "helpers_of_a_program.py").write_text("def doubled(loss):\n    return 2 * loss\n")
    monkeypatch.syspath_prepend(tmp_path)
    helpers_of_a_program = importlib.import_module("helpers_of_a_program")
    _, fogzo, closure = setup()
    assert fogzo.backward(lambda: helpers_of_a_program.doubled(closure())).isfinite()


class Module(nn.Module):
    """Whose forward draws a mask, or changes an attribute of its own."""

    def __init__(self, kind):
        super().__init__()
        self.calls, self.seen = 0, []
        self.rng = {
            "torch": lambda: torch.Generator().manual_seed(0),
            "random": lambda: random.Random(0),
            "numpy": lambda: np.random.default_rng(0),
            "old numpy": lambda: np.random.RandomState(0),
            "count": lambda: None,
        }[kind]()
        self.kind = kind

    def forward(self, x):
        if self.kind == "count":
            self.calls += 1
            return x * self.calls
        if self.kind == "torch":
            factor = torch.rand((), generator=self.rng).item()
        else:
            factor = self.rng.random() if hasattr(self.rng, "random") else self.rng.rand()
        self.seen.append(factor)
        return x * factor


@pytest.mark.parametrize("kind", ["torch", "random", "numpy", "old numpy"])
def test_generators_of_modules_are_replayed(kind):
    model = nn.Sequential(nn.Linear(9, 8), Module(kind), nn.Linear(8, 3))
    fk.quantize_model(model, QUANTIZER)
    fogzo = fk.Fogzo(model, total_steps=9, one_minus_beta=0.1, directions=1)
    closure = lambda: loss_of(model, *batch())  # noqa: E731
    assert fogzo.check(closure) == []
    del model[1].seen[:]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fogzo.backward(closure)
    model.zero_grad()
    assert len(set(model[1].seen)) == 1
    fogzo.backward(closure)
    assert len(set(model[1].seen)) == 2  # and each step draws anew


def test_an_attribute_of_a_module_that_matters_is_found():
    model = nn.Sequential(nn.Linear(9, 8), Module("count"), nn.Linear(8, 3))
    fk.quantize_model(model, QUANTIZER)
    fogzo = fk.Fogzo(model, total_steps=9, one_minus_beta=0.1, directions=1)
    with pytest.warns(UserWarning, match=f"{WARNING} the attribute 'calls' of module '1'"):
        fogzo.backward(lambda: loss_of(model, *batch()))


# ---- no false alarms


def with_sum(closure, model):
    total = 0.0

    def summed():
        nonlocal total
        loss = closure()
        total += loss.item()
        return loss

    return summed


def with_attributes(closure, model):
    log = types.SimpleNamespace(sum=torch.zeros(()), losses=[], count=0, last=None)

    def logged():
        log.last = closure()
        log.sum += log.last.detach()
        log.losses.append(log.last.item())
        log.count += 1
        return log.last

    return logged


def with_scaler(closure, model):
    scaler = torch.amp.GradScaler("cpu")
    return lambda: scaler.scale(closure())


def with_cache(closure, model):
    cache = {}
    return lambda: closure() * cache.setdefault("factor", len(cache) + 1)


def with_wrapped_model(closure, model):
    optimizer = torch.optim.AdamW(model.parameters())
    return lambda: closure() + 0 * len(optimizer.param_groups)


@pytest.mark.parametrize("change", [with_sum, with_attributes, with_scaler, with_cache, with_wrapped_model])
def test_what_the_loss_does_not_depend_on_draws_no_warning(change):
    """And to find that out leaves the step as it would have been."""
    found = []
    for wrap in (lambda closure, model: closure, change):
        model, fogzo, closure = setup()
        model.drop.p = 0.5
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            fogzo.backward(wrap(closure, model))
        scale = 65536.0 if wrap is with_scaler else 1.0
        buffers = [b.clone() for b in model.buffers()]
        found.append([*(p.grad / scale for p in model.parameters()), *buffers, torch.get_rng_state()])
    assert all(map(torch.equal, *found))


def test_a_state_that_matters_is_found_beside_one_that_does_not():
    _, fogzo, closure = setup()
    factors, summed = iter(FACTORS), with_sum(closure, None)
    with pytest.warns(UserWarning, match=f"{WARNING} .*'factors'"):
        fogzo.backward(lambda: summed() * next(factors))


# ---- zero_grad in the closure


def by_optimizer(model, others):
    return torch.optim.SGD([*model.parameters(), *others], lr=0.1).zero_grad


def by_model(model, others):
    return model.zero_grad


def of_biases(model, others):
    return torch.optim.SGD([p for n, p in model.named_parameters() if "bias" in n], lr=0.1).zero_grad


def of_others(model, others):
    return torch.optim.SGD(others, lr=0.1).zero_grad


@pytest.mark.parametrize("to_none", [True, False])
@pytest.mark.parametrize("zeros", [by_optimizer, by_model, of_biases, of_others])
@pytest.mark.parametrize("options", [{}, {"directions": 2}])
def test_zero_grad_in_the_closure_is_named(zeros, to_none, options):
    """Also where it clears what no weight of the model is: a temperature that the loss learns."""
    model, fogzo, closure = setup(**options)
    model.drop.p = 0
    others = [nn.Parameter(torch.ones(()))]
    zero_grad = zeros(model, others)

    def zeroed():
        zero_grad(set_to_none=to_none)
        return closure() * others[0]

    with pytest.raises(RuntimeError, match="zero_grad must be called before a step, not in the closure"):
        fogzo.backward(zeroed)
    assert fogzo.steps == 0
    assert not any(m.pass_weight is not None for m in model.modules() if hasattr(m, "pass_weight"))
    model.zero_grad()
    fogzo.backward(closure)
    twin, again, same = setup(**options)
    twin.drop.p = 0
    again.backward(same)
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


def test_zero_grad_in_the_closure_of_plain_steps():
    """Which the first step does not mind: the second says where it belongs."""
    model, fogzo, closure = setup(start=1.0)

    def zeroed():
        model.zero_grad()
        return closure()

    fogzo.backward(zeroed)
    with pytest.raises(RuntimeError, match=r"must be called before the next step: .*zero_grad in the closure"):
        fogzo.backward(zeroed)
