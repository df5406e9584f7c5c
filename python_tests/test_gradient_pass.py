"""Q(theta) and g of a gradient pass: each made once, in one call, for any number of micro-batches."""

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fogzo_kernels as fk
from fogzo_kernels.spec.scale import LearnedScale

OWN = ("quantize", "straight_through_backward", "learned_backward")  # of one tensor; of a list with _


class Quantizations(TorchDispatchMode):
    """Counts the modules' own quantizations and backwards, and the weights of each call for a list."""

    def __init__(self):
        super().__init__()
        self.calls, self.lists = 0, []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name = str(op).removeprefix("fogzo.").removesuffix(".default")
        self.calls += name in OWN
        if name.removesuffix("_") in OWN and name.endswith("_"):
            self.lists.append((name, len(args[0])))
        return op(*args, **(kwargs or {}))


def two_layers(preset):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(128, 24), nn.ReLU(), nn.Linear(24, 128), nn.ReLU(), nn.Linear(128, 8))
    fk.quantize_model(model, preset, skip=["2"])
    return model


def check_gradients(model, twin, exact):
    """To the bit, but for sums of another order: those around a transform, and of learned alphas."""
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        if exact and not name.endswith("alpha"):
            assert torch.equal(p.grad, q.grad)
        else:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-6 * float(q.grad.abs().max()))


@pytest.mark.parametrize(
    "preset", [fk.presets.lsq(2), fk.presets.quest(2), fk.presets.bitnet(), fk.presets.fixed(2, 0.1)], ids=str
)
@pytest.mark.parametrize("fused", [True, False])
def test_a_gradient_pass_quantizes_each_weight_once(preset, fused, generator):
    """In one call, however many micro-batches there are, also where alphas have moved since the last step."""
    model, x = two_layers(preset), torch.randn(6, 128, generator=generator)
    fogzo = fk.Fogzo(model, total_steps=10, kappa=1.0, directions=1)
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
                    check_gradients(model, twin, exact=preset.transform is None)
        back = "learned_backward_" if isinstance(preset.scale, LearnedScale) else "straight_through_backward_"
        assert (seen.calls, seen.lists) == (0, [("quantize_", 2), (back, 2)])
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
    fogzo = fk.Fogzo(model, total_steps=10, kappa=1.0, start=start, directions=1)
    optimizer = fk.SGD(model.parameters(), lr=0.1, fogzo=fogzo)
    for _ in range(3):
        model.zero_grad()
        wanted = model(x).square().mean()
        seen = []
        step = optimizer.step if fused else fogzo.backward
        step(lambda seen=seen: seen.append(model(x).square().mean()) or seen[-1])
        assert len(seen) == (1 if start else 3)
        assert torch.equal(seen[0], wanted)
        for p in model.parameters():
            p.data.mul_(-0.5)


@pytest.mark.parametrize("preset", [fk.presets.lsq(2), fk.presets.quest(2), fk.presets.fixed(2, 0.1)], ids=str)
def test_a_model_compiled_for_any_shapes_takes_the_eager_steps(preset):
    """A backward cannot take numbers that torch.compile has made symbols of."""
    found = []
    for compiled in (True, False):
        model = two_layers(preset)
        forward = torch.compile(model, dynamic=True, backend="eager") if compiled else model
        fogzo = fk.Fogzo(model, total_steps=10, kappa=1.0, seed=5, directions=1)
        optimizer = fk.SGD(fk.parameter_groups(model, weight_decay=0.0), lr=0.1, fogzo=fogzo)
        for rows in (4, 4, 7):
            optimizer.zero_grad()
            optimizer.step(lambda n=rows, forward=forward: forward(torch.ones(n, 128)).square().mean())
        found.append([p.detach() for p in model.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


# ---- g of dL/dQ, at the end of the pass


def gradient_pass(fogzo, model, parts, fail_after=None):
    """The first pass alone, of a sum over micro-batches."""
    passes = fogzo.probes()
    first = next(passes)
    with first:
        for i, part in enumerate(parts):
            if i == fail_after:
                raise ZeroDivisionError
            first.backward(model(part).square().mean() / len(parts))


def backward(model, parts, whole=None):
    for part in parts:
        (model(part).square().mean() / (whole or len(parts))).backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("start", [0.0, 1.0])
def test_gradients_of_a_pass_are_those_of_autograd(start, dtype, generator):
    """Also of a plain step, of weights with hooks, of one alpha that is frozen and one that has a gradient."""
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(4)), nn.Conv2d(1, 3, 1), nn.Flatten())
    model[2].weight = model[1].weight
    model.insert(4, nn.Unflatten(1, (1, 4, 4)))
    fk.quantize_model(model, fk.presets.lsq(2))
    model.to(dtype)
    twin = copy.deepcopy(model)
    for one in (model, twin):
        one[0].alpha.requires_grad_(False)
        one[1].alpha.grad = torch.ones(())
    parts = torch.randn(6, 16, generator=generator).to(dtype).chunk(3)
    backward(twin, parts)
    fogzo = fk.Fogzo(model, total_steps=10, kappa=1.0, start=start, directions=1)
    gradient_pass(fogzo, model, parts)
    assert model[0].alpha.grad is None
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        if q.grad is not None:
            tolerance = 1e-5 if dtype is torch.float32 else 0.02
            torch.testing.assert_close(p.grad, q.grad, rtol=tolerance, atol=tolerance, msg=name)
    assert (model[1].alpha.grad - 1).abs() > 1e-4


@pytest.mark.parametrize("hook", ["register_hook", "register_post_accumulate_grad_hook"])
def test_a_hook_of_a_weight_sees_g(hook, generator):
    """Such as one that clips or logs: dL/dQ would be something else, unnoticed."""
    model = two_layers(fk.presets.fixed(2, 0.02))
    parts, seen = torch.randn(4, 128, generator=generator).chunk(2), []
    twin = copy.deepcopy(model)
    backward(twin, parts)
    weight = model[0].weight
    getattr(weight, hook)(lambda given: seen.append((given if hook == "register_hook" else given.grad).clone()))
    fogzo = fk.Fogzo(model, total_steps=10, kappa=1.0, directions=1)
    gradient_pass(fogzo, model, parts)
    assert torch.equal(weight.grad, twin[0].weight.grad)
    inside = (weight / 0.02 > -2) & (weight / 0.02 < 1)
    assert not inside.all()
    assert all(not g[~inside].any() for g in seen)
    assert len(seen) == 2


def test_a_pass_that_fails_leaves_g_of_what_it_ran(generator):
    model, parts = two_layers(fk.presets.lsq(2)), torch.randn(6, 128, generator=generator).chunk(3)
    twin = copy.deepcopy(model)
    backward(twin, parts[:2], whole=3)
    with pytest.raises(ZeroDivisionError):
        gradient_pass(fk.Fogzo(model, total_steps=10, kappa=1.0, directions=1), model, parts, fail_after=2)
    check_gradients(model, twin, exact=True)


def test_alphas_of_weights_without_a_part_get_no_gradient(generator):
    """Where gradients are set to 0: Adam would move an alpha that has one."""
    model = two_layers(fk.presets.lsq(2))
    fogzo = fk.Fogzo(model, total_steps=10, kappa=1.0, directions=1)
    for layer in (model[0], model[4]):
        layer.weight.grad = torch.zeros_like(layer.weight)
    passes = fogzo.probes()
    first = next(passes)
    with first:
        first.backward(model[0](torch.randn(3, 128, generator=generator)).square().mean())
    assert model[4].alpha.grad is None
    assert model[0].alpha.grad is not None
    assert not model[4].weight.grad.any()


def test_the_alpha_of_a_weight_whose_gradient_is_0_gets_no_gradient(generator):
    """Its module ran, but what it gave made no difference to the loss."""
    model = two_layers(fk.presets.lsq(2))
    fogzo = fk.Fogzo(model, total_steps=10, kappa=1.0, directions=1)
    passes, x = fogzo.probes(), torch.randn(3, 128, generator=generator)
    with next(passes) as first:
        first.backward(model[0](x).square().mean() + 0 * model[4](x).sum())
    assert not model[4].weight.grad.any()
    assert model[4].alpha.grad is None
    assert model[0].alpha.grad is not None


def test_an_alpha_that_would_get_no_gradient_is_refused(generator):
    model = two_layers(fk.presets.fixed(2, 0.02))
    model[0].alpha.requires_grad_()
    fogzo = fk.Fogzo(model, total_steps=10, kappa=1.0, directions=1)
    with pytest.raises(ValueError, match="alpha must not require grad, as no gradient reaches it"):
        gradient_pass(fogzo, model, [torch.randn(3, 128, generator=generator)])
