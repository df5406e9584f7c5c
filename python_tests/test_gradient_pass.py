"""Q(theta) of a gradient pass: made once, in one call, in the memory of the probes."""

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fogzo_kernels as fk


class Quantizations(TorchDispatchMode):
    """Counts the modules' own quantizations, and the weights of each call that quantizes a list."""

    def __init__(self):
        super().__init__()
        self.calls, self.lists = 0, []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.calls += op is torch.ops.fogzo.quantize.default
        if op is torch.ops.fogzo.quantize_.default:
            self.lists.append(len(args[0]))
        return op(*args, **(kwargs or {}))


def two_layers(preset):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(128, 24), nn.ReLU(), nn.Linear(24, 128), nn.ReLU(), nn.Linear(128, 8))
    fk.quantize_model(model, preset, skip=["2"])
    return model


@pytest.mark.parametrize(
    "preset", [fk.presets.lsq(2), fk.presets.quest(2), fk.presets.bitnet(), fk.presets.fixed(2, 0.1)], ids=str
)
@pytest.mark.parametrize("fused", [True, False])
def test_a_gradient_pass_quantizes_each_weight_once(preset, fused, generator):
    """In one call, however many micro-batches there are, also where alphas have moved since the last step."""
    model, x = two_layers(preset), torch.randn(6, 128, generator=generator)
    fogzo = fk.Fogzo(model, total_steps=10, kappa=1.0)
    groups = fk.parameter_groups(model, weight_decay=0.1)
    optimizer = fk.AdamW(groups, fogzo=fogzo) if fused else torch.optim.AdamW(groups)
    for _ in range(3):
        optimizer.zero_grad()
        twin = copy.deepcopy(model)  # quantizes in each forward
        for part in x.chunk(3):
            (twin(part).square().mean() / 3).backward()
        with Quantizations() as seen:
            for probe in fogzo.probes():
                with probe:
                    for part in x.chunk(3):
                        probe.backward(model(part).square().mean() / 3)
                if probe.sign == 0:
                    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
                        assert torch.equal(p.grad, q.grad)
        assert (seen.calls, seen.lists) == (0, [2])
        if not fused:
            fogzo.estimate_()
        optimizer.step()
        with torch.no_grad(), Quantizations() as seen:  # outside a pass the model quantizes for itself
            model(x)
        assert (seen.calls, seen.lists) == (2, [])


@pytest.mark.parametrize("start", [0.0, 1.0])
@pytest.mark.parametrize("fused", [True, False])
def test_weights_that_are_written_past_autograd_are_seen(start, fused):
    """As some optimizers do, or who clamps weights by ``p.data.clamp_``: no version tells of it."""
    model, x = two_layers(fk.presets.fixed(2, 0.1)), torch.ones(3, 128)
    fogzo = fk.Fogzo(model, total_steps=10, kappa=1.0, start=start)
    optimizer = fk.SGD(model.parameters(), lr=0.1, fogzo=fogzo)
    for _ in range(3):
        model.zero_grad()
        wanted = model(x).square().mean()
        seen = []
        (optimizer if fused else fogzo).step(
            lambda seen=seen: seen.append(model(x).square().mean()) or seen[-1]
        )
        assert len(seen) == (1 if start else 3)
        assert torch.equal(seen[0], wanted)
        for p in model.parameters():
            p.data.mul_(-0.5)


@pytest.mark.parametrize("preset", [fk.presets.lsq(2), fk.presets.quest(2), fk.presets.fixed(2, 0.1)], ids=str)
def test_steps_of_a_model_compiled_for_any_shapes(preset):
    """A backward cannot take numbers that torch.compile has made symbols of."""
    found = []
    for compiled in (True, False):
        model = two_layers(preset)
        forward = torch.compile(model, dynamic=True, backend="eager") if compiled else model
        fogzo = fk.Fogzo(model, total_steps=10, kappa=1.0, seed=5)
        optimizer = fk.SGD(fk.parameter_groups(model, weight_decay=0.0), lr=0.1, fogzo=fogzo)
        for rows in (4, 4, 7):
            optimizer.zero_grad()
            optimizer.step(lambda n=rows, forward=forward: forward(torch.ones(n, 128)).square().mean())
        found.append([p.detach() for p in model.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
