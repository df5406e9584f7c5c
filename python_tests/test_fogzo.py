"""The front end: what a step leaves behind, on a model with dropout and BatchNorm."""

import copy
import weakref
from contextlib import nullcontext

import pytest
import torch
from support.training import GRID, QUANTIZER, STE, batch, loss_of, make, run_step, same_state, state_of
from torch import nn

import fogzo_kernels as fk
from fogzo_kernels.nn.view import Modules
from fogzo_kernels.spec.grid import FLOATS
from fogzo_kernels.train.run import Run

# ---- what probes see and leave


@pytest.mark.parametrize("micro", [1, 3])
@pytest.mark.parametrize("directions", [1, 2])
def test_zero_eps_gives_equal_losses_and_a_plain_step(backend, micro, directions, monkeypatch):
    """Same masks, same statistics, same weights: 1 + 2n equal losses, and a plain step's state."""
    x, y = batch()
    micro_batches = list(zip(x.chunk(micro), y.chunk(micro), strict=True))
    monkeypatch.setattr(Run, "next_noise", lambda run, of=Run.next_noise: of(run) | {"epsilon_scale": 0.0})
    model, fogzo = make(directions=directions, schedule="constant", backend=backend)
    plain = copy.deepcopy(model)
    torch.manual_seed(7)
    losses = run_step(model, fogzo, micro_batches)
    ended = state_of(model)
    torch.manual_seed(7)
    for a, b in micro_batches:
        (loss_of(plain, a, b) / micro).backward()
    assert losses.shape == (1 + 2 * directions,)
    assert torch.equal(losses, losses[:1].expand_as(losses))
    assert same_state(ended, state_of(plain))
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)  # every direction is lost: 0 / 0


def test_probes_differ_with_eps(backend):
    """The test above could pass with probes that are ignored; this one could not."""
    model, fogzo = make(schedule="constant", backend=backend)
    losses = run_step(model, fogzo, [batch()])
    assert len(losses.unique()) == 3


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_zero_learning_rate_moves_nothing(dtype):
    """100 steps at lr = 0: every latent and buffer bit for bit (in-place +eps, -2 eps, +eps drifts)."""
    model, fogzo = make(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    model.eval()  # so that BatchNorm's own running statistics stay
    before = state_of(model)
    for step in range(100):
        optimizer.zero_grad()
        run_step(model, fogzo, [batch(dtype, seed=step)])
        optimizer.step()
    assert same_state(before, state_of(model))
    assert fogzo.steps == 100


def test_zero_learning_rate_leaves_buffers_and_generator_as_plain_steps():
    """100 steps with dropout and BatchNorm: latents stay, buffers and generator as after plain steps."""
    model, fogzo = make()
    plain = copy.deepcopy(model)
    latents = [p.clone() for p in model.parameters()]
    torch.manual_seed(11)
    for step in range(100):
        model.zero_grad()
        run_step(model, fogzo, [batch(seed=step)])
    ended = state_of(model)
    torch.manual_seed(11)
    for step in range(100):
        plain(batch(seed=step)[0])
    assert same_state(ended, state_of(plain))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), latents, strict=True))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("failing", [1, 2])
def test_exception_in_a_probe_leaves_everything(dtype, failing):
    model, fogzo = make(dtype, schedule="constant")
    x, y = batch(dtype)
    flags = [m.training for m in model.modules()]
    after_gradient = None
    with pytest.raises(ZeroDivisionError):
        for i, probe in enumerate(fogzo.probes()):
            with probe:
                probe.backward(loss_of(model, x, y))
                if i == failing:
                    raise ZeroDivisionError
            if i == 0:
                after_gradient = state_of(model)
                grads = [p.grad.clone() for p in model.parameters()]
    assert same_state(after_gradient, state_of(model))
    assert [m.training for m in model.modules()] == flags
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))
    assert torch.is_grad_enabled()
    assert all(m.probe is None for m in model.modules() if isinstance(m, fk.QuantLinear))
    with pytest.raises(RuntimeError, match="after every pass"):
        fogzo.estimate_()
    model.zero_grad()
    assert run_step(model, fogzo, [(x, y)]).isfinite().all()  # and training goes on


def test_exception_in_the_gradient_pass_rewinds():
    model, fogzo = make()
    x, y = batch()
    before = state_of(model)
    with pytest.raises(ZeroDivisionError):
        for probe in fogzo.probes():
            with probe:
                loss_of(model, x, y)
                raise ZeroDivisionError
    assert same_state(before, state_of(model))


def test_reassigned_buffers_are_restored():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(9, 3)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls = self.calls + 1
            return self.linear(x)

    model = Counting()
    fk.quantize_model(model, QUANTIZER)
    fogzo = fk.Fogzo(model, total_steps=10, one_minus_beta=0.1, directions=3)
    run_step(model, fogzo, [batch()])
    assert model.calls == 1


def test_a_users_buffer_named_alpha_is_restored():
    """Only the alphas of quantized modules are left alone by the replay."""

    class Momentum(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(9, 3)
            self.register_buffer("alpha", torch.zeros(()))

        def forward(self, x):
            self.alpha.add_(1)
            return self.linear(x)

    model = Momentum()
    fk.quantize_model(model, QUANTIZER)
    fogzo = fk.Fogzo(model, total_steps=10, one_minus_beta=0.1, directions=3)
    run_step(model, fogzo, [batch()])
    assert model.alpha == 1


def test_an_error_before_a_probe_leaves_everything(monkeypatch):
    """Generators and buffers are wound back already, and modules hold their probe."""
    model, fogzo = make(schedule="constant")
    x, y = batch()
    held = []

    def failing(modules, rows):
        original(modules, rows)
        held.extend(w.modules[0].probe is not None for w in fogzo.weights)
        raise ZeroDivisionError

    original = Modules.use_probe
    monkeypatch.setattr(Modules, "use_probe", failing)
    with pytest.raises(ZeroDivisionError):
        for probe in fogzo.probes():
            with probe:
                probe.backward(loss_of(model, x, y))
            after_gradient = state_of(model)
    assert held
    assert all(held)
    assert same_state(after_gradient, state_of(model))
    assert all(m.probe is None for m in model.modules() if isinstance(m, fk.QuantLinear))
    assert not fogzo.pending
    monkeypatch.undo()
    model.zero_grad()
    assert run_step(model, fogzo, [(x, y)]).isfinite().all()


def run_until(fogzo, closure, failing, leaving):
    """The passes of a step; one fails, or the loop is left after one."""
    for i, probe in enumerate(fogzo.probes()):
        with probe:
            probe.backward(closure())
            if i == failing:
                raise ZeroDivisionError
        if i == leaving:
            break


@pytest.mark.parametrize(("failing", "leaving"), [(None, None), (0, None), (1, None), (None, 1)])
def test_nothing_of_a_step_outlives_it(failing, leaving):
    """Snapshots, losses and guides go with it: after the estimate, an error, or a loop that was left."""
    model, fogzo = make(schedule="constant")
    seen = []
    original = fogzo._begin_step

    def new_step(caller):
        made = original(caller)
        seen.append((weakref.ref(made), made.passes))
        return made

    fogzo._begin_step = new_step
    x, y = batch()
    with pytest.raises(ZeroDivisionError) if failing is not None else nullcontext():
        run_until(fogzo, lambda: loss_of(model, x, y), failing, leaving)
    assert fogzo.pending == (failing is None and leaving is None)
    if fogzo.pending:
        fogzo.estimate_()
    ((step, passes),) = seen  # passes that the caller still holds do not keep it
    assert len(passes) == 3
    assert step() is None
    assert not fogzo.pending
    with pytest.raises(RuntimeError, match="a pass must be entered once"):
        passes[2].__enter__()


def test_a_failed_pass_is_not_run_again():
    """Its step has ended, also where the caller goes on."""
    _, fogzo = make()
    probe = next(passes := fogzo.probes())
    with pytest.raises(ZeroDivisionError), probe:
        raise ZeroDivisionError
    assert fogzo._run.step is None
    with pytest.raises(RuntimeError, match="a pass must be entered once"):
        probe.__enter__()
    with pytest.raises(RuntimeError, match="every pass of probes"):
        next(passes)


def test_training_flags_of_frozen_parts_stay():
    model, fogzo = make()
    model.norm.eval()
    seen = []
    model.norm.register_forward_hook(lambda m, *_: seen.append((m.training, model.drop.training)))
    run_step(model, fogzo, [batch()])
    assert seen == [(False, True)] * 3


# ---- the estimate


def test_step_is_the_functional_ops(backend):
    """Fogzo's probe losses and gradients, rebuilt by hand from the public ops."""
    model, fogzo = make(directions=2, schedule="constant", seed=3, backend=backend)
    model.drop.p = 0.0
    x, y = batch()
    twin = copy.deepcopy(model)
    loss_of(twin, x, y).backward()
    weights = [twin.first.weight, twin.second.weight]
    alphas = [twin.first.alpha, twin.second.alpha]
    grads = [w.grad for w in weights]
    norm = fk.guide_norm(grads, alphas, grid=GRID, backend=backend)
    options = {
        "grid": GRID, "straight_through": STE, "one_minus_beta": 1e-2, "seed": 0, "step": 0,
        "backend": backend,
    }  # fmt: skip
    losses = torch.zeros(2, 2)
    for i in range(2):
        out = [[torch.empty_like(w) for w in weights] for _ in "+-"]
        fk.perturb_quantize_(*out, weights, grads, alphas, norm, direction=i, **options)
        for side, (first, second) in enumerate(out):
            twin.first.probe, twin.second.probe, twin.tied.probe = first, second, second
            with torch.no_grad():
                losses[side, i] = loss_of(twin, x, y)
    fk.estimate_gradient_(grads, losses[0].contiguous(), losses[1].contiguous(), alphas, norm, **options)
    found = run_step(model, fogzo, [(x, y)])
    assert torch.equal(found[1:], losses.t().flatten())
    assert torch.equal(model.first.weight.grad, grads[0])
    assert torch.equal(model.second.weight.grad, grads[1])
    assert torch.equal(model.out.weight.grad, twin.out.weight.grad)


def test_plain_steps_before_start():
    model, fogzo = make(start=0.5, total_steps=4)
    passes = []
    for _ in range(4):
        model.zero_grad()
        passes.append(len(run_step(model, fogzo, [batch()])))
    assert passes == [1, 1, 3, 3]


def test_step_takes_a_closure():
    (a, fogzo_a), (b, fogzo_b) = make(), make()
    x, y = batch()
    torch.manual_seed(5)
    loss = fogzo_a.backward(lambda: loss_of(a, x, y))
    torch.manual_seed(5)
    losses = run_step(b, fogzo_b, [(x, y)])
    assert torch.equal(loss, losses[0])
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def test_weights_without_gradient_take_no_part():
    model, fogzo = make()
    model.spare = nn.Linear(4, 4)
    fk.quantize_model(model, QUANTIZER, skip=["out"])
    fogzo = fk.Fogzo(model, total_steps=10, one_minus_beta=0.1, directions=1)
    run_step(model, fogzo, [batch()])
    assert model.spare.weight.grad is None
    assert model.spare.probe is None
    assert model.first.weight.grad is not None


def test_lost_losses_keep_the_straight_through_gradient():
    model, fogzo = make()
    x, y = batch()
    for i, probe in enumerate(fogzo.probes()):
        with probe:
            probe.backward(loss_of(model, x, y) * (1.0 if i == 0 else float("nan")))
        if i == 0:
            grads = [p.grad.clone() for p in model.parameters()]
    fogzo.estimate_()
    assert fogzo.diagnostics() == {"lost_directions": 1, "lost_steps": 0, "bad_alphas": 0}
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))


def test_kappa_is_one_minus_beta_times_weights():
    model, _ = make()
    fogzo = fk.Fogzo(model, total_steps=10, kappa=1.36, schedule="constant", directions=1)
    assert fogzo.total_weights == 9 * 8 + 8 * 8
    assert fogzo.one_minus_beta == pytest.approx(0.01)


def test_several_grids_share_a_step():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, 3))
    fk.quantize_model(model, QUANTIZER, skip=["2"])
    fk.quantize_model(model, fk.Quantizer(fk.Grid.uniform(4), fk.Scale.fixed(0.1), STE))
    fogzo = fk.Fogzo(model, total_steps=10, one_minus_beta=0.1, schedule="constant", directions=1)
    assert len(run_step(model, fogzo, [batch()]).unique()) == 3
    assert fogzo.diagnostics() == {"lost_directions": 0, "lost_steps": 0, "bad_alphas": 0}
    model.append(nn.Linear(3, 3))
    tanh = fk.StraightThrough("tanh")
    fk.quantize_model(model, fk.Quantizer(fk.Grid.sign(), fk.Scale.fixed(0.1), tanh))
    with pytest.raises(ValueError, match="one eps"):
        fk.Fogzo(model, total_steps=10, one_minus_beta=0.1, directions=1)


# ---- misuse


def test_stale_gradients_are_refused():
    model, fogzo = make()
    run_step(model, fogzo, [batch()])
    with pytest.raises(RuntimeError, match="zero_grad"):
        run_step(model, fogzo, [batch()])
    model.zero_grad(set_to_none=False)
    run_step(model, fogzo, [batch()])


def test_misused_passes_say_what_to_write():
    model, fogzo = make()
    x, y = batch()
    with pytest.raises(RuntimeError, match="with probe"):
        for probe in fogzo.probes():
            probe.backward(loss_of(model, x, y))
    with pytest.raises(RuntimeError, match="inside `with"):
        for _ in fogzo.probes():
            pass
    with pytest.raises(RuntimeError, match=r"must call probe\.backward"):
        for probe in fogzo.probes():
            with probe:
                if probe.sign == 0:
                    probe.backward(loss_of(model, x, y))
        fogzo.estimate_()
    model.zero_grad()
    with pytest.raises(ValueError, match="one element"):
        fogzo.backward(lambda: model(x))
    with pytest.raises(RuntimeError, match="no quantized weight got a gradient in the gradient pass"):
        fogzo.backward(lambda: model.out(torch.ones(1, 8)).sum())
