"""Runs that go on: with more steps, or with other weights, as in progressive unfreezing; integers of NumPy."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.training import batch, loss_of, make
from torch import nn

import fogzo_kernels as fk

PRESETS = {"lsq": fk.presets.lsq(2), "bitnet": fk.presets.bitnet(), "fixed": fk.presets.fixed(3, 0.1)}
OPTIMIZERS = {
    "AdamW": lambda params, fogzo: torch.optim.AdamW(params, lr=1e-2),
    "fused AdamW": lambda params, fogzo: fk.AdamW(params, lr=1e-2, fogzo=fogzo),
    "fused SGD": lambda params, fogzo: fk.SGD(params, lr=1e-1, momentum=0.9, fogzo=fogzo),
}


def stepped(model, fogzo, optimizer, closure):
    """One step, with an optimizer of either kind; what the weights then are."""
    optimizer.zero_grad()
    if isinstance(optimizer, (fk.AdamW, fk.SGD)):
        optimizer.step(closure)
    else:
        fogzo.backward(closure)
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


# ---- more steps


def test_a_run_with_other_settings_is_refused_and_says_how_to_go_on():
    model, fogzo = make(total_steps=4)
    fogzo.backward(lambda: loss_of(model, *batch()))
    _, longer = make(total_steps=8, directions=2)
    with pytest.raises(
        ValueError, match=r"\['total_steps'\] must be 8, got 4 and .* got 1.* may_differ=\['total_"
    ) as e:
        longer.load_state_dict(fogzo.state_dict())
    assert "may_differ=['total_steps', 'directions']" in str(e.value)
    with pytest.raises(ValueError, match=r"\['directions'\] must be 2"):
        longer.load_state_dict(fogzo.state_dict(), may_differ=["total_steps"])
    for bad in ("total_steps", ["steps"], ["kappa"]):
        with pytest.raises(
            ValueError, match="may_differ must be a list of some of total_steps, one_minus_beta"
        ):
            longer.load_state_dict(fogzo.state_dict(), may_differ=bad)
    assert longer.steps == 0


@pytest.mark.parametrize("schedule", ["linear", "constant"])
def test_more_steps_go_on_where_the_run_was(schedule):
    """Steps and counters are the state's, the settings those of the object that loads."""
    model, fogzo = make(total_steps=4, schedule=schedule)
    for _ in range(4):
        model.zero_grad()
        fogzo.backward(lambda: loss_of(model, *batch()))
    fogzo._run.counters[0] = 7
    longer = fk.Fogzo(model, total_steps=8, schedule=schedule, one_minus_beta=0.02, directions=1)
    longer.load_state_dict(fogzo.state_dict(), may_differ=["total_steps", "one_minus_beta"])
    assert longer.steps == 4
    assert longer.diagnostics()["lost_directions"] == 7
    assert longer.one_minus_beta == (0.01 if schedule == "linear" else 0.02)
    whole = fk.Fogzo(model, total_steps=8, schedule=schedule, one_minus_beta=0.02, directions=1)
    whole._run.steps = 4  # as if it had run from the first step on
    found = []
    for one in (longer, whole):
        model.zero_grad()
        torch.manual_seed(5)
        one.backward(lambda: loss_of(model, *batch()))
        found.append([p.grad.clone() for p in model.parameters()])
    assert all(map(torch.equal, *found))


# ---- other weights


@pytest.mark.parametrize("optimizer_of", OPTIMIZERS)
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("later", [False, True], ids=["in the optimizer", "added to it"])
def test_a_layer_is_unfrozen_in_the_middle_of_a_run(preset, optimizer_of, later):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, 3))
    fk.quantize_model(model, PRESETS[preset])
    closure, options = lambda: F.cross_entropy(model(batch()[0]), batch()[1]), {"total_steps": 6, "kappa": 1.0}
    model[0].requires_grad_(False)
    fogzo = fk.Fogzo(model, **{"directions": 1} | options)
    params = [p for p in model.parameters() if p.requires_grad or not later]
    optimizer = OPTIMIZERS[optimizer_of](params, fogzo)
    for _ in range(3):
        stepped(model, fogzo, optimizer, closure)

    model[0].requires_grad_()
    optimizer.zero_grad()
    with pytest.raises(
        RuntimeError, match=r"old.state_dict\(\), may_differ=\['one_minus_beta'\]\).*optimizer.fogzo"
    ):
        fogzo.backward(closure)
    new = fk.Fogzo(model, **{"directions": 1} | options)
    new.load_state_dict(fogzo.state_dict(), may_differ=["one_minus_beta"])
    optimizer.fogzo = new
    if later:
        optimizer.add_param_group({"params": model[0].parameters()})
    assert new.steps == 3
    assert new.one_minus_beta == 0.5 / new.total_weights
    before = [p.detach().clone() for p in model.parameters()]
    after = stepped(model, new, optimizer, closure)
    assert not any(map(torch.equal, before, after))
    model[0].requires_grad_(False)  # and back
    old = fk.Fogzo(model, **{"directions": 1} | options)
    old.load_state_dict(new.state_dict(), may_differ=["one_minus_beta"])
    optimizer.fogzo = old
    last = stepped(model, old, optimizer, closure)
    assert [torch.equal(p, q) for p, q in zip(after, last, strict=True)] == [
        not p.requires_grad for p in model.parameters()
    ]
    assert old.steps == 5


# ---- integers


@pytest.mark.parametrize("kind", [np.int64, np.int32, np.uint8])
def test_integers_of_numpy_are_settings(kind):
    model, fogzo = make(total_steps=kind(9), directions=kind(2), seed=kind(3), every=kind(1))
    fogzo.backward(lambda: loss_of(model, *batch()))
    state = fogzo.state_dict()
    assert {type(state[name]) for name in ("total_steps", "directions", "seed", "every")} == {int}
    _, plain = make(total_steps=9, directions=2, seed=3)
    plain.load_state_dict(state)
    for bits in (1, 2, 8):
        assert fk.presets.lsq(kind(bits), kind(4)) == fk.presets.lsq(bits, 4)
        assert fk.presets.quest(kind(bits), kind(32)) == fk.presets.quest(bits, 32)
    assert type(fk.presets.quest(kind(8), kind(32)).transform.block) is int
    with pytest.raises(ValueError, match="total_steps must be an int >= 1, got True"):
        make(total_steps=np.bool_(True))


def test_numbers_of_numpy_are_settings():
    _, fogzo = make(one_minus_beta=np.float32(0.25), epsilon_scale=np.int64(2))
    assert (fogzo.state_dict()["one_minus_beta"], fogzo.epsilon_scale) == (0.25, 2.0)
