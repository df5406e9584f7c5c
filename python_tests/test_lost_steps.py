"""A step whose loss or gradient is not finite changes nothing, and the next is as if its batch had not been."""

import copy
import functools
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from support.processes import leave, needs_gloo, spawned
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fogzo_kernels as fk

PRESETS = {"fixed": fk.presets.fixed(2, 0.1), "lsq": fk.presets.lsq(2), "bitnet": fk.presets.bitnet()}


def network(preset="lsq", dtype=torch.float32):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 3)
    )
    fk.quantize_model(model, PRESETS[preset])
    return model.to(dtype)


def batch(step, dtype=torch.float32):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 6, generator=generator).to(dtype), torch.randint(3, (8,), generator=generator)


def bad_input(model, x, y):
    return F.cross_entropy(model(x * math.nan).float(), y)


def infinite_loss(model, x, y):
    """Gradients are finite."""
    return F.cross_entropy(model(x).float(), y) + math.inf


def bad_gradient(model, x, y):
    """The loss is finite: a root at 0."""
    return F.cross_entropy(model(x).float(), y) + (model[5].bias * 0).abs().sum().sqrt()


def overflow_of_the_norm(model, x, y):
    """Loss and gradients are finite."""
    far = model[3](torch.ones(1, 16, dtype=x.dtype)).float().sum()
    return F.cross_entropy(model(x).float(), y) + 3e38 * (far - far.detach())


BAD = [bad_input, infinite_loss, bad_gradient, overflow_of_the_norm]


class Sign(torch.optim.Optimizer):
    """One of somebody's own."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.state[p]["count"] = self.state[p].get("count", 0) + 1
                    p.sub_(p.grad.sign(), alpha=group["lr"])


FUSED = {
    "AdamW": functools.partial(fk.AdamW, lr=1e-2),
    "SGD": functools.partial(fk.SGD, lr=1e-2, momentum=0.9, nesterov=True),
}
OTHERS = {
    "AdamW": functools.partial(torch.optim.AdamW, lr=1e-2, foreach=True),
    "fused": functools.partial(torch.optim.AdamW, lr=1e-2, fused=True),
    "SGD": functools.partial(torch.optim.SGD, lr=1e-2, momentum=0.9),
    "Sign": functools.partial(Sign, lr=1e-3),
}


class Run:
    def __init__(self, optimizer, fused, groups=False, preset="lsq", dtype=torch.float32, **options):
        self.model, self.dtype, self.fused = network(preset, dtype), dtype, fused
        self.fogzo = fk.Fogzo(
            self.model,
            **{"directions": 1, "total_steps": 10, "one_minus_beta": 0.2, "schedule": "linear"} | options,
        )
        params = (
            fk.parameter_groups(self.model, weight_decay=0.1, alpha_lr=1e-3)
            if groups
            else self.model.parameters()
        )
        self.optimizer = optimizer(params, **({"fogzo": self.fogzo} if fused else {}))

    def step(self, number, loss=None):
        x, y = batch(number, self.dtype)
        self.optimizer.zero_grad()
        loss = loss or (lambda model, x, y: F.cross_entropy(model(x).float(), y))
        self.fogzo.run(lambda: loss(self.model, x, y))
        if not self.fused:
            self.fogzo.estimate_()
        self.optimizer.step()

    def state(self):
        for module in self.model.modules():
            if isinstance(module, fk.QuantLinear):
                module.codes()  # a measured alpha becomes that of the weight as it is
        own = {name: value for name, value in self.fogzo.state_dict().items() if name != "counters"}
        return copy.deepcopy([self.model.state_dict(), self.optimizer.state_dict(), own])


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    return a == b or str(a) == str(b)


def check(make, bad, first):
    """``first``: whether the bad batch comes first of all."""
    run, other = make(), make()
    if not first:
        run.step(0)
        other.step(0)
    before = run.state()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        run.step(1, bad)
        run.step(2, bad)
    assert len([w for w in said if "the step is lost" in str(w.message)]) == 1
    assert same(run.state(), before)
    assert run.fogzo.diagnostics() == {"lost_directions": 0, "lost_steps": 2, "bad_alphas": 0}
    assert run.fogzo.found_inf == 1
    for number in (3, 4):
        run.step(number)
        other.step(number)
    assert same(run.state(), other.state())
    assert not same(run.state(), before)
    assert run.fogzo.found_inf == 0


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("kind", FUSED)
def test_a_lost_fused_step_changes_nothing(kind, preset, bad):
    for groups in (False, True):
        check(lambda g=groups: Run(FUSED[kind], True, g, preset), bad, first=groups)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("kind", OTHERS)
def test_a_lost_step_of_pytorchs_optimizers_changes_nothing(kind, bad):
    check(lambda: Run(OTHERS[kind], False), bad, first=kind == "SGD")


@pytest.mark.parametrize("master", [False, True])
@pytest.mark.parametrize("kind", FUSED)
def test_a_lost_step_in_bfloat16_changes_nothing(kind, master):
    optimizer = functools.partial(FUSED[kind], master_weights=master)
    check(lambda: Run(optimizer, True, dtype=torch.bfloat16), bad_input, first=False)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(
    "options",
    [{"directions": 3}, {"start": 1.0}, {"every": 2}],
    ids=str,
)
def test_a_lost_step_of_any_kind_changes_nothing(options, fused):
    bad = bad_input if "start" in options else overflow_of_the_norm
    if options.get("every"):
        bad = bad_gradient
    check(lambda: Run((FUSED if fused else OTHERS)["AdamW"], fused, **options), bad, first=False)


def test_a_lost_step_that_was_estimated_and_clipped_changes_nothing():
    """``fogzo.backward`` and then a fused optimizer; clipped between."""
    runs = [Run(FUSED["AdamW"], False) for _ in "ab"]
    for run, numbers in zip(runs, ([0, 9, 1], [0, 1]), strict=True):
        for number in numbers:
            x, y = batch(number)
            bad = math.nan if number == 9 else 1.0
            run.optimizer.zero_grad(set_to_none=False)
            run.fogzo.backward(lambda run=run, x=x, y=y, bad=bad: F.cross_entropy(run.model(x * bad), y))
            nn.utils.clip_grad_norm_(run.model.parameters(), 0.1)
            run.optimizer.step()
    assert same(runs[0].state(), runs[1].state())


def test_all_optimizers_of_a_model_lose_the_step():
    """One of PyTorch before the fused one has heard of the step, and one after."""

    def go(numbers):
        model = network()
        fogzo = fk.Fogzo(model, total_steps=10, kappa=1.0, directions=1)
        plain = [model[1].parameters(), model[4].parameters()]
        rest = [p for layer in (model[0], model[3], model[5]) for p in layer.parameters()]
        before, after = (torch.optim.AdamW(params, lr=1e-2) for params in plain)
        fused = fk.AdamW(rest, lr=1e-2, fogzo=fogzo)
        for number in numbers:
            x, y = batch(number)
            model.zero_grad()
            loss = {9: bad_gradient, 10: infinite_loss}.get(number, lambda m, x, y: F.cross_entropy(m(x), y))
            fogzo.run(lambda loss=loss, x=x, y=y: loss(model, x, y))
            for optimizer in (before, fused, after):
                optimizer.step()
        return [model.state_dict(), *(o.state_dict() for o in (before, fused, after))]

    assert same(go([0, 9, 1, 10, 2]), go([0, 1, 2]))


def test_a_parameter_beside_the_model_loses_the_step_too():
    """A temperature, say, that the optimizer has and the model has not."""
    model = network()
    fogzo, scale = fk.Fogzo(model, total_steps=10, kappa=1.0, directions=1), torch.ones((), requires_grad=True)
    optimizer = fk.AdamW([*model.parameters(), scale], lr=1e-2, fogzo=fogzo)
    x, y = batch(0)

    def step(bad):
        optimizer.zero_grad()
        fogzo.run(lambda: F.cross_entropy(model(x) * scale, y) + bad * (scale * 0).sqrt())
        optimizer.step()

    before = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
    step(1.0)
    assert same([model.state_dict(), optimizer.state_dict()], before)
    assert (scale, fogzo.steps) == (1, 0)


def test_gradients_made_after_a_lost_step_are_anybodys():
    run = Run(OTHERS["SGD"], False)
    x, y = batch(0)
    for none in (True, False):
        run.fogzo.backward(lambda: bad_input(run.model, x, y))
        run.optimizer.zero_grad(set_to_none=none)
        F.cross_entropy(run.model(x), y).backward()
        before = run.state()
        run.optimizer.step()
        assert not same(run.state(), before)
        run.optimizer.zero_grad()


def test_a_probe_that_is_not_finite_loses_its_direction_alone():
    run = Run(FUSED["SGD"], True)
    x, y = batch(0)
    before = run.state()
    for probe in run.fogzo.probes():
        with probe:
            probe.backward(F.cross_entropy(run.model(x), y) * (1.0 if probe.sign == 0 else math.nan))
    run.optimizer.step()
    assert run.fogzo.diagnostics() == {"lost_directions": 1, "lost_steps": 0, "bad_alphas": 0}
    assert not same(run.state(), before)


def test_a_lost_step_has_no_probes_and_rewinds_no_generator():
    """A closure that draws its batch would draw the same one for ever."""
    run, drawn = Run(FUSED["SGD"], True), []
    torch.manual_seed(0)
    for _ in range(2):
        run.fogzo.discard()
        run.optimizer.zero_grad()

        def loss(model, x, y):
            drawn.append(float(torch.rand(())))
            return bad_input(model, x, y)

        run.step(0, loss)
    assert len(set(drawn)) == len(drawn) == 2


# ---- as a CUDA graph captures it: nothing is known on the host


@pytest.fixture
def captured(monkeypatch):
    for module in ("train.step", "train.guards.gradients", "optim.fused"):
        monkeypatch.setattr(f"fogzo_kernels.{module}.capturing", lambda: True)


@pytest.mark.usefixtures("captured")
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("groups", [False, True])
@pytest.mark.parametrize("kind", [*FUSED, "torch"])
def test_a_captured_lost_step_changes_nothing(kind, groups, bad):
    rate = torch.tensor(1e-2, dtype=torch.float64)

    def make():
        if kind == "torch":
            run = Run(OTHERS["fused"], False, groups, capturable=True)
            run.optimizer.found_inf = run.fogzo.found_inf
            return run
        return Run(functools.partial(FUSED[kind], lr=rate, capturable=True), True, groups, capturable=True)

    run, other = make(), make()
    run.step(0)
    other.step(0)
    before = run.state()
    run.step(1, bad)
    assert same(run.state(), before)
    assert run.fogzo.diagnostics()["lost_steps"] == 1
    for number in (3, 4):
        run.step(number)
        other.step(number)
    assert same(run.state(), other.state())
    with pytest.warns(UserWarning, match="the step is lost"):
        run.fogzo.stats()


# ---- many processes


def losing(rank):
    """Steps of which one has a loss that is not finite on one process alone, with buffers of their own."""
    found = []
    for steps in ([0, 9, 1], [0, 1]):
        model = DistributedDataParallel(network())
        fogzo = fk.Fogzo(model, total_steps=10, kappa=1.0, directions=1)
        optimizer = fk.AdamW(model.parameters(), lr=1e-2, fogzo=fogzo)
        for number in steps:
            x, y = batch(2 * number + rank)
            optimizer.zero_grad()
            bad = math.inf if number == 9 and rank == 1 else 0.0
            optimizer.step(lambda m=model, x=x, y=y, bad=bad: F.cross_entropy(m(x), y) + bad)
        found.append([model.state_dict(), optimizer.state_dict(), fogzo.steps])
    leave()
    return found, fogzo.diagnostics()


@needs_gloo
@pytest.mark.parametrize("count", [2, 3])
def test_processes_lose_a_step_together(tmp_path, count):
    for (with_bad, without), _ in spawned(losing, tmp_path, count):
        assert same(with_bad, without)
