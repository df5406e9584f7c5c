"""What a step asks of a device beside its kernels: calls whose number does not grow with the weights."""

from collections import Counter

import pytest
import torch
from support.processes import needs_gloo, spawned
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fogzo_kernels as fk


class Counts(TorchDispatchMode):
    """Counts calls of PyTorch's ops by name."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def network(layers):
    quantizer = fk.Quantizer(fk.Grid.uniform(2), fk.Scale.fixed(0.2), fk.StraightThrough("identity"))
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(layers)))
    fk.quantize_model(model, quantizer)
    return model


@pytest.mark.parametrize("layers", [2, 7])
def test_gradients_of_0_are_looked_at_in_one_read(layers):
    model = network(layers)
    fogzo = fk.Fogzo(model, total_steps=4, kappa=0.1, directions=1)
    fogzo.backward(lambda: model(torch.ones(3, 4)).sum())
    model.zero_grad(set_to_none=False)
    with Counts() as seen:
        fogzo._run.gradients.check_fresh([w.name for w in fogzo.weights])
    assert seen.calls["_local_scalar_dense"] == 1
    assert seen.calls["any"] == 1


LEAST = {torch.float32: 2.0**-149, torch.bfloat16: 2.0**-133, torch.float16: 2.0**-24}


@pytest.mark.parametrize("value", ["least", "-least", "nan", "-inf", "max"])
@pytest.mark.parametrize("dtype", LEAST)
@pytest.mark.parametrize("at", [0, 3])
def test_no_gradient_is_too_small_or_too_large_to_be_seen(dtype, value, at):
    model = network(4).to(dtype)
    model[1].weight.requires_grad_(False)  # and one that has none
    fogzo = fk.Fogzo(model, total_steps=4, kappa=0.1, directions=1)
    values = {"least": LEAST[dtype], "-least": -LEAST[dtype], "max": torch.finfo(dtype).max}
    value = values[value] if value in values else float(value)
    for w in fogzo.weights[:-1]:
        w.parameter.grad = torch.zeros_like(w.parameter)
    model[at].weight.grad = torch.zeros(4, 4, dtype=dtype)
    model[at].weight.grad[2, 1] = value
    with pytest.raises(RuntimeError, match=rf"\.grad of {at}\.weight comes from a backward outside"):
        fogzo.backward(lambda: model(torch.ones(3, 4, dtype=dtype)).sum())


@pytest.mark.parametrize("ours", [fk.AdamW, fk.SGD])
def test_capturable_counts_steps_in_one_call(ours):
    parameters = [torch.ones(3).requires_grad_() for _ in range(7)]
    optimizer = ours(parameters, lr=torch.tensor(0.1, dtype=torch.float64), capturable=True)
    for count in (1, 2):
        for p in parameters:
            p.grad = torch.ones(3)
        with Counts() as seen:
            optimizer.step()
        assert seen.calls["_foreach_add_"] == 1
        assert seen.calls["add_"] == 0
        assert [int(optimizer.state[p]["step"]) for p in parameters] == [count] * 7


def test_capturable_counts_no_step_that_is_refused():
    good, bad = (torch.ones(3).requires_grad_() for _ in range(2))
    optimizer = fk.SGD([good, bad], lr=torch.tensor(0.1, dtype=torch.float64), capturable=True)
    good.grad, bad.grad = torch.ones(3), torch.ones(3).to_sparse()
    with pytest.raises(ValueError, match="params must have dense gradients"):
        optimizer.step()
    assert int(optimizer.state[good]["step"]) == 0
    assert torch.equal(good, torch.ones(3))


def copies_of_each_step(rank):
    """How often a step that only reports copies numbers from the host to the weights' device."""
    model = network(2)
    fogzo = fk.Fogzo(
        model, total_steps=500, kappa=0.1, process_group=torch.distributed.group.WORLD, directions=1
    )
    found = []
    for step in (0, 1, 2, 100):
        with Counts() as seen:
            fogzo._run.peers.check(fogzo.seed, fogzo._run.settings, step, fogzo.weights)
        found.append([seen.calls[name] for name in ("lift_fresh", "_to_copy", "_local_scalar_dense")])
    return found


@needs_gloo
def test_processes_are_compared_without_a_copy_between_looks(tmp_path):
    """Each step takes part, the first one and every hundredth looks."""
    (found,) = spawned(copies_of_each_step, tmp_path, 1)
    assert found[0][0] == found[3][0] > 0
    assert found[1] == found[2] == [0, 0, 0]
