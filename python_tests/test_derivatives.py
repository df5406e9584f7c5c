"""Losses with a derivative in them: PINNs, gradient penalties, forces. Each pass has the right value."""

import os

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from support.processes import as_launched, leave, needs_gloo, two_of
from support.training import QUANTIZER
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fogzo_kernels as fk

X = torch.randn(12, 16)
PRESETS = {
    "lsq": fk.presets.lsq(3),
    "row": fk.presets.lsq(2, "row"),
    "bitnet": fk.presets.bitnet(),
    "fixed": QUANTIZER,
    "rotated": fk.presets.quest(4, block=16),
}


def network(quantizer=QUANTIZER, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 1))
    fk.quantize_model(model, quantizer, **options)
    return model


def estimator(model, **options):
    return fk.Fogzo(
        model, **({"directions": 1, "total_steps": 10, "kappa": 1.0, "schedule": "constant"} | options)
    )


def pinn(u, x):
    """As of an equation du/dx = 1, and u at the border."""
    z = x.clone().requires_grad_()
    out = u(z)
    slope = torch.autograd.grad(out.sum(), z, create_graph=True)[0]
    return (slope.sum(1) - 1).square().mean() + out[0].square().mean()


def second(u, x):
    """With a second derivative, as of a heat equation."""
    z = x.clone().requires_grad_()
    slope = torch.autograd.grad(u(z).sum(), z, create_graph=True)[0]
    curve = torch.autograd.grad(slope[:, 0].sum(), z, create_graph=True)[0][:, 0]
    return (curve - slope[:, 1]).square().mean()


def penalty(u, x):
    """WGAN-GP's: the norm at points between two batches; the derivative alone depends on the weights."""
    between = torch.lerp(x, x.flip(0), 0.3).requires_grad_()
    norm = torch.autograd.grad(u(between).sum(), between, create_graph=True)[0].norm(dim=1)
    return u(x).mean() - u(x.flip(1)).mean() + 10 * (norm - 1).square().mean()


def forces(u, x):
    positions = x.clone().requires_grad_()
    energy = u(positions)
    energy.sum().backward(inputs=[positions], create_graph=True)
    return (energy - 1).square().mean() + (positions.grad + 0.1).square().mean()


LOSSES = [pinn, second, penalty, forces]


def plain(model):
    """The same function in plain PyTorch, of the weights that the modules run with now."""
    weights = [m.effective_weight().detach() for m in model if isinstance(m, nn.Linear)]
    biases = [m.bias.detach() for m in model if isinstance(m, nn.Linear)]

    def u(z):
        for i, (w, b) in enumerate(zip(weights, biases, strict=True)):
            z = F.linear(z if i == 0 else torch.tanh(z), w, b)
        return z

    return u


@pytest.mark.filterwarnings("ignore:Using backward")
@pytest.mark.parametrize("options", [{}, {"directions": 2}])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("preset", PRESETS)
def test_every_pass_has_the_loss_of_its_weights(preset, loss, options):
    model = network(PRESETS[preset])
    fogzo, runs = estimator(model, **options), []

    def closure():
        found = loss(model, X)
        with torch.enable_grad():
            runs.append((float(found.detach()), float(loss(plain(model), X).detach())))
        return found

    for _ in range(2):
        del runs[:]
        model.zero_grad()
        fogzo.backward(closure)
    passes = 1 + 2 * options.get("directions", 1)
    assert len(runs) == passes  # the second step knows what the closure does
    assert len({found for found, _ in runs}) == passes
    for found, wanted in runs:
        assert found == pytest.approx(wanted, rel=1e-4)


@pytest.mark.filterwarnings("ignore:Using backward")
@pytest.mark.parametrize("loss", LOSSES)
def test_the_gradient_pass_has_the_second_derivatives(loss):
    """Against finite differences in float64, of the quantized weights as of biases."""
    model = network()
    estimator(model, start=1.0).backward(lambda: loss(model, X))
    wide = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 1)).double()
    for m, q in zip(wide, model, strict=True):
        if isinstance(m, nn.Linear):
            m.weight.data, m.bias.data = q.effective_weight().detach().double(), q.bias.detach().double()
    for p, q in zip(wide.parameters(), model.parameters(), strict=True):
        if q.grad is None:  # of a bias that falls out
            continue
        values, step = p.data.view(-1), 1e-5
        for i in range(0, len(values), 1 + len(values) // 7):
            ends, start = [], values[i].item()
            for sign in (1, -1):
                values[i] = start + sign * step
                ends.append(float(loss(wide, X.double()).detach()))
            values[i] = start
            wanted = (ends[0] - ends[1]) / (2 * step)
            assert float(q.grad.view(-1)[i]) == pytest.approx(wanted, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("loss", [pinn, second, penalty])
@pytest.mark.parametrize("preset", ["lsq", "fixed", "row"])  # measured scales take one forward for a backward
def test_gradients_in_a_pass_are_those_of_a_backward_outside(preset, loss):
    """Masks of the straight-through gradient, and learned alphas: another way to the same."""
    model = network(PRESETS[preset])
    estimator(model, start=1.0).backward(lambda: loss(model, X))
    inside = [p.grad for p in model.parameters()]
    model.zero_grad()
    loss(model, X).backward()
    for found, p in zip(inside, model.parameters(), strict=True):
        assert (found is None) == (p.grad is None)
        if found is not None:
            torch.testing.assert_close(found, p.grad, rtol=1e-4, atol=1e-6)


# ---- quantized inputs


def test_inputs_with_a_flat_gradient_have_their_second_derivatives():
    """Against plain PyTorch's straight-through: x + (Q(x) - x).detach(), with the same scale."""
    model = network(activation=fk.presets.dynamic(8))
    estimator(model, start=1.0).backward(lambda: pinn(model, X))
    found = [m.weight.grad.clone() for m in model if isinstance(m, nn.Linear)]
    weights = [m.effective_weight().detach().requires_grad_() for m in model if isinstance(m, nn.Linear)]

    def u(z):
        for i, m in enumerate(m for m in model if isinstance(m, nn.Linear)):
            z = z if i == 0 else torch.tanh(z)
            z = F.linear(z + (m.effective_input(z) - z).detach(), weights[i], m.bias)
        return z

    pinn(u, X).backward()
    for one, w in zip(found, weights, strict=True):
        torch.testing.assert_close(one, w.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("activation", "compute"),
    [
        (fk.presets.lsq(4), None), (fk.presets.quest(4, block=16), None),
        (fk.presets.dynamic(8), "int8"), (fk.presets.lsq(4), "int8"),
    ],
)  # fmt: skip
def test_other_inputs_say_that_they_have_none(activation, compute):
    model = network(activation=activation)
    fk.calibrate_inputs_(model, lambda: model(X)) if activation == fk.presets.lsq(4) else None
    fk.set_compute_(model, compute)
    fogzo = estimator(model)
    with pytest.raises(RuntimeError, match="a loss that differentiates must not do so through"):
        fogzo.backward(lambda: pinn(model, X))
    model.zero_grad()
    fogzo.backward(lambda: model(X).square().mean())


# ---- without autograd where it is not asked for, and loops by hand


def test_other_closures_have_no_autograd_in_probes():
    model = network()
    fogzo, modes = estimator(model), []

    def closure():
        modes.append(torch.is_grad_enabled())
        return model(X).square().mean()

    for _ in range(2):
        model.zero_grad()
        fogzo.backward(closure)
    assert modes.count(True) == 2
    assert modes[-3:] == [True, False, False]


def test_an_error_of_the_closure_is_its_own():
    model = network()
    fogzo = estimator(model)

    def closure():
        if not torch.is_grad_enabled():
            raise RuntimeError("mine")
        return model(X).square().mean()

    with pytest.raises(RuntimeError, match=r"^mine$"):
        fogzo.backward(closure)


def test_a_loop_by_hand_is_told_what_to_write_and_has_the_same_estimate():
    found = []
    for by_hand in (False, True):
        model = network()
        fogzo = estimator(model)
        if not by_hand:
            fogzo.backward(lambda model=model: pinn(model, X))
            found.append([p.grad for p in model.parameters()])
            continue
        for enabled in (False, True):
            model.zero_grad()
            for probe in fogzo.probes():
                if not enabled and probe.sign:
                    with pytest.raises(RuntimeError, match=r"with torch\.enable_grad\(\):"), probe:
                        probe.backward(pinn(model, X))
                    break
                with probe, torch.set_grad_enabled(enabled or probe.sign == 0):
                    probe.backward(pinn(model, X))
        fogzo.estimate_()
        found.append([p.grad for p in model.parameters()])
    assert all(map(torch.equal, *found))


def test_check_takes_a_closure_that_differentiates():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Dropout(0.5), nn.Linear(32, 1))
    fk.quantize_model(model, QUANTIZER)
    fogzo = estimator(model)
    assert fogzo.check(lambda: pinn(model, X)) == []
    assert all(p.grad is None for p in model.parameters())
    fogzo.backward(lambda: pinn(model, X))


@pytest.mark.parametrize(
    "preset", [p for p in PRESETS if p != "rotated"]
)  # the transform is an op that torch.func refuses
def test_torch_func_differentiates_too(preset):
    """By its transforms, inside a pass: the same estimate."""

    def slope(model):
        z = X.clone().requires_grad_()
        return torch.autograd.grad(model(z).sum(), z, create_graph=True)[0]

    ways = [
        slope,
        lambda model: torch.func.grad(lambda z: model(z).sum())(X),
        lambda model: torch.func.vmap(torch.func.grad(lambda z: model(z).sum()))(X),
    ]
    found = []
    for way in ways:
        model = network(PRESETS[preset])
        estimator(model).backward(lambda model=model, way=way: (way(model).sum(1) - 1).square().mean())
        found.append([m.weight.grad for m in model if isinstance(m, nn.Linear)])
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4)


# ---- two processes


def worker(rank, folder, port):
    """With a list of losses that one process keeps: both look whether it matters, as one cannot alone."""
    as_launched(rank, port)
    dist.init_process_group("gloo")
    model = DistributedDataParallel(network())
    fogzo, kept = estimator(model), []
    x = torch.linspace(-1, 1, 12 * 16).view(12, 16)[rank::2]

    def closure():
        loss = pinn(model, x)
        if rank == 0:
            kept.append(loss.item())
        return loss

    for _ in range(2):
        model.zero_grad()
        loss = fogzo.backward(closure)
    assert not rank or not kept
    torch.save((loss, [p.grad for p in model.parameters()]), os.path.join(folder, f"{rank}.pt"))
    leave()


@needs_gloo
def test_two_processes_differentiate(tmp_path):
    (loss, grads), (same, others) = two_of(worker, tmp_path)
    assert loss == same
    assert all(map(torch.equal, grads, others))
    model = network()
    x = torch.linspace(-1, 1, 12 * 16).view(12, 16)
    fogzo = estimator(model)
    for _ in range(2):
        model.zero_grad()
        one = fogzo.backward(lambda: (pinn(model, x[::2]) + pinn(model, x[1::2])) / 2)
    assert float(one) == pytest.approx(float(loss), rel=1e-5)
    for p, grad in zip(model.parameters(), grads, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=1e-3, atol=1e-4 * float(grad.abs().max()))
