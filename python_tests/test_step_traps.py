"""Steps that look right and would silently be something else: errors, warnings, and what a step says."""

import copy
import functools
import math
import pickle
import random
import warnings
import weakref

import numpy as np
import pytest
import torch
from support.training import batch, loss_of, make, same_state, setup, state_of
from torch import nn

import fogzo_kernels as fk


def values(model):
    return [p.detach().clone() for p in model.parameters()]


def unchanged(model, before):
    return all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


# ---- plain STE at FOGZO's price


@pytest.mark.parametrize("optimizer", [fk.AdamW, fk.SGD])
def test_a_fused_step_after_a_plain_backward_is_an_error(optimizer):
    """What a stock trainer does: nothing would say that this is plain STE."""
    model, fogzo, closure = setup()
    end = optimizer(model.parameters(), lr=0.1, fogzo=fogzo)
    before = values(model)
    closure().backward()
    with pytest.raises(RuntimeError, match=r"gradient of first\.weight comes from a backward outside"):
        end.step()
    assert unchanged(model, before)
    end.zero_grad()
    end.step(closure)  # the right way
    assert not unchanged(model, before)
    end.zero_grad(set_to_none=False)
    closure().backward()
    with pytest.raises(
        RuntimeError, match="comes from a backward outside of the passes of fogzo"
    ):  # into the estimate's memory
        end.step()


def test_a_fused_step_takes_an_estimate_that_was_clipped():
    model, fogzo, closure = setup()
    end = fk.SGD(model.parameters(), lr=0.1, fogzo=fogzo)
    fogzo.backward(closure)
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    before = values(model)
    end.step()
    assert not unchanged(model, before)
    closure().backward()  # on top of it
    with pytest.raises(RuntimeError, match="comes from a backward outside of the passes of fogzo"):
        end.step()


def test_a_forgotten_estimate_is_an_error_at_the_next_step():
    model, fogzo, closure = setup()
    plain = torch.optim.SGD(model.parameters(), lr=0.1)
    fogzo.run(closure)
    plain.step()
    plain.zero_grad()
    with pytest.raises(RuntimeError, match="the last step had no estimate"):
        fogzo.run(closure)
    assert fogzo.steps == 0
    fogzo.discard()
    fogzo.backward(closure)
    assert fogzo.steps == 1


# ---- gradients that are not a step's own


def clipped(model, closure):
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)


def added(model, closure):
    closure().backward()


def second(model, closure):
    model.zero_grad()
    fk.Fogzo(model, total_steps=9, one_minus_beta=0.1, directions=1).backward(closure)


@pytest.mark.parametrize("between", [lambda model, closure: None, clipped, added, second])
def test_gradients_that_were_not_cleared_are_an_error(between):
    model, fogzo, closure = setup()
    fogzo.backward(closure)
    between(model, closure)
    with pytest.raises(RuntimeError, match=r"zero_grad.*must be called before the next step"):
        fogzo.backward(closure)
    model.zero_grad(set_to_none=False)
    fogzo.backward(closure)
    assert fogzo.steps == 2


def test_the_gradient_of_an_auxiliary_loss_is_an_error():
    model, fogzo, closure = setup()
    (model.first(torch.ones(1, 9)).sum() * 0.01).backward()
    with pytest.raises(RuntimeError, match=r"\.grad of first\.weight comes from a backward outside"):
        fogzo.backward(closure)
    model.zero_grad()
    model.out.weight.grad = torch.ones_like(model.out.weight)  # is not quantized: anybody's
    fogzo.backward(closure)


# ---- closures


def test_a_closure_that_calls_backward_is_an_error():
    model, fogzo, closure = setup()

    def stepped():
        loss = closure()
        loss.backward()
        return loss

    before = state_of(model)
    with pytest.raises(RuntimeError, match=r"backward must not be called inside a pass: return the loss"):
        fogzo.backward(stepped)
    assert same_state(before, state_of(model))
    model.zero_grad()
    fogzo.backward(closure)


@pytest.mark.parametrize("spoil", [torch.Tensor.detach, lambda loss: torch.tensor(loss.item())])
def test_a_closure_whose_loss_is_detached_is_an_error(spoil):
    _, fogzo, closure = setup()
    with pytest.raises(RuntimeError, match=r"loss must depend on the model's weights by autograd"):
        fogzo.backward(lambda: spoil(closure()))


def test_a_closure_of_another_model_is_an_error():
    _, fogzo, _ = setup()
    _, _, closure = setup()
    with pytest.raises(RuntimeError, match="the loss must depend on the model that this Fogzo was made with"):
        fogzo.backward(closure)


@pytest.mark.parametrize("factor", [1e-3, 0.25, 4.0, 65536.0])
def test_a_pass_that_is_scaled_otherwise_draws_a_warning(factor):
    """As by a gradient scaler, or by 1/K, in one place of a loop alone."""
    model, fogzo, closure = setup()
    for _ in range(2):
        for probe in fogzo.probes():
            with probe:
                probe.backward(closure() * (1 if probe.sign == 0 else factor))
        if fogzo.steps == 0:
            with pytest.warns(UserWarning, match="a probe's loss, .* times that of the gradient pass"):
                fogzo.estimate_()
        else:
            fogzo.estimate_()
        model.zero_grad()


def test_a_loss_that_is_not_finite_moves_nothing():
    model, fogzo, closure = setup()
    before = values(model)
    fused = fk.SGD(model.parameters(), lr=0.1, fogzo=fogzo)
    with pytest.warns(UserWarning, match="the loss or a gradient of a step was not finite"):
        fused.step(lambda: closure() * math.nan)
    assert unchanged(model, before)
    assert fogzo.stats()["lost_steps"] == 1


# ---- settings


@pytest.mark.parametrize("scale", [0, -1.0])
def test_an_epsilon_scale_without_effect_is_refused(scale):
    with pytest.raises(ValueError, match="epsilon_scale must be"):
        make(epsilon_scale=scale)


def test_beta_given_for_one_minus_beta_draws_a_warning():
    with pytest.warns(
        UserWarning, match=r"one_minus_beta is 1 - beta, got 0\.9999.* give one_minus_beta=0\.0001"
    ):
        make(one_minus_beta=0.9999)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(one_minus_beta=1.0)  # n-SPSA
        make(one_minus_beta=0.5)


# ---- what passes see beside the model


class Counter:
    def __init__(self):
        self.calls = 0

    def state_dict(self):
        return {"calls": self.calls}

    def load_state_dict(self, state):
        self.calls = state["calls"]


def with_random(closure):
    return lambda: closure() * (1 + 0.1 * random.random())


def with_numpy(closure):
    return lambda: closure() * (1 + 0.1 * np.random.rand())


def with_generator(closure):
    generator = torch.Generator().manual_seed(0)
    return lambda: closure() * (1 + 0.1 * torch.rand((), generator=generator))


def with_numpy_generator(closure):
    rng = np.random.default_rng(0)
    return lambda: closure() * (1 + 0.1 * rng.random())


def with_counter(closure):
    counter = Counter()

    def counted():
        counter.calls += 1
        return closure() * counter.calls

    return counted


def with_nonlocal(closure):
    calls = 0

    def counted():
        nonlocal calls
        calls += 1
        return closure() * calls

    return counted


def with_iterator(closure):
    factors = iter([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    return lambda: closure() * next(factors)


def with_generator_function(closure):
    factors = (float(i) for i in range(1, 9))
    return lambda: closure() * next(factors)


def with_batch_norm(closure):
    outside = nn.BatchNorm1d(3)
    return lambda: closure() + 0 * outside(torch.randn(4, 3)).sum()


def with_metric(closure):
    history = []

    def logged():
        history.append(closure().item())
        return closure()

    return logged


def with_partial(closure):
    return functools.partial(lambda counter, c: c() * (counter.append(1) or len(counter)), [], closure)


OUTSIDE = {
    with_random: "random", with_numpy: "numpy.random", with_generator: "'generator'",
    with_numpy_generator: "'rng'", with_counter: "'counter'", with_nonlocal: "'calls'",
    with_iterator: "'factors'", with_generator_function: "'factors'", with_batch_norm: "'outside'",
    with_metric: "'history'", with_partial: "argument 0",
}  # fmt: skip
DIFFER = set(OUTSIDE) - {with_batch_norm, with_metric}  # whose losses differ


@pytest.mark.parametrize("trap", [t for t in OUTSIDE if t is not with_metric])
def test_the_first_step_warns_of_what_it_cannot_replay(trap):
    model, fogzo, closure = setup()
    with pytest.warns(UserWarning, match=f"a pass of a step changes .*{OUTSIDE[trap]}"):
        fogzo.backward(trap(closure))
    model.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fogzo.backward(trap(closure))  # once


def test_a_late_start_looks_in_its_first_step_with_probes():
    model, fogzo, closure = setup(start=0.02, total_steps=100)
    random_loss = with_random(closure)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):  # plain STE, to which it does no harm
            fogzo.backward(random_loss)
            model.zero_grad()
    with pytest.warns(UserWarning, match="a pass of a step changes random"):
        fogzo.backward(random_loss)


@pytest.mark.parametrize("trap", OUTSIDE)
def test_check_names_what_differs_and_changes_nothing(trap):
    model, fogzo, closure = setup()
    model.drop.p = 0.5
    before, weights = state_of(model), values(model)
    assert fogzo.check(closure) == []
    found = fogzo.check(trap(closure))
    assert any(OUTSIDE[trap] in one for one in found), found
    assert any("gave the losses" in one for one in found) == (trap in DIFFER)
    assert same_state(before, state_of(model))
    assert unchanged(model, weights)
    assert all(p.grad is None for p in model.parameters())
    assert not any(m.pass_weight is not None for m in model.modules() if hasattr(m, "pass_weight"))
    assert fogzo.steps == 0


def test_a_wrapper_of_the_model_may_change():
    """As a compiled one does in its first forward; a function that is compiled is what it was before."""
    model, fogzo, _ = setup()
    x, y = batch()

    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.calls = model, 0

        def forward(self, x):
            self.calls += 1
            return self.inner(x)

    wrapper, compiled = Wrapper(), torch.compile(model, backend="eager")
    scale = torch.compile(lambda loss: 2 * loss, backend="eager")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="a pass of a step changes")
        for forward in (wrapper, compiled):
            fogzo = fk.Fogzo(model, total_steps=9, one_minus_beta=0.1, directions=1)
            fogzo.backward(lambda forward=forward: scale(loss_of(forward, x, y)))
            model.zero_grad()
    assert fogzo.check(lambda: scale(loss_of(wrapper, x, y))) == []


def test_check_that_fails_leaves_all_as_it_was():
    model, fogzo, closure = setup()
    before = state_of(model)
    calls = []

    def fails():
        loss = closure()
        calls.append(1)
        if len(calls) == 2:
            raise KeyError("mine")
        return loss

    with pytest.raises(KeyError, match="mine"):
        fogzo.check(fails)
    assert same_state(before, state_of(model))
    fogzo.backward(closure)


@pytest.mark.parametrize("seed", [0, 1])
def test_what_is_given_is_replayed(seed):
    """Every pass sees the same, and the next step goes on where a plain one would have."""
    model, _, closure = setup()
    generator, rng, counter = torch.Generator().manual_seed(seed), np.random.default_rng(seed), Counter()
    random.seed(seed)
    np.random.seed(seed)
    fogzo = fk.Fogzo(
        model,
        total_steps=9,
        one_minus_beta=0.1,
        replay=[generator, rng, counter, random, np.random, local := random.Random(3)],
        directions=1,
    )
    seen = []

    def draws():
        counter.calls += 1
        seen.append((counter.calls, torch.rand((), generator=generator).item(), rng.random(), random.random(),
                     np.random.rand(), local.random()))  # fmt: skip
        return closure()

    with warnings.catch_warnings():
        warnings.filterwarnings(
            "error", message="a pass of a step changes .*(rng|counter|generator|random|local)"
        )
        fogzo.backward(draws)
    assert len(seen) == 5  # with two runs that tell whether what it changes matters
    assert len(set(seen)) == 1
    model.zero_grad()
    fogzo.backward(draws)
    assert len(set(seen)) == 2
    assert counter.calls == 2


def test_a_replay_without_state_is_refused():
    model, _, _ = setup()
    with pytest.raises(TypeError, match=r"replay\[1\] must have one of get_state and set_state, .* got object"):
        fk.Fogzo(model, total_steps=9, one_minus_beta=0.1, replay=[random, object()], directions=1)


# ---- the watch itself


def test_copies_watch_their_own_weights():
    model, fogzo, closure = setup()
    for copied in (copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))):
        twin, other = copied((model, fogzo))
        again = functools.partial(loss_of, twin, *batch())
        again().backward()
        with pytest.raises(RuntimeError, match="backward outside of the passes"):
            other.backward(again)
    fogzo.backward(closure)


def test_an_estimator_that_is_gone_watches_no_more():
    model, fogzo, closure = setup()
    fogzo.backward(closure)
    weight = model.first.weight
    gone = weakref.ref(fogzo)
    del fogzo
    assert gone() is None
    assert not weight._post_accumulate_grad_hooks
