"""Optimizers with the fused tail, against PyTorch's own and against the estimate step by step."""

import copy
import importlib
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import device_of
from torch import nn

import fogzo_kernels as fk

OPTIMIZERS = {
    "adamw": (fk.AdamW, torch.optim.AdamW, {"lr": 1e-2, "betas": (0.8, 0.95), "weight_decay": 0.1}),
    "sgd": (fk.SGD, torch.optim.SGD, {"lr": 0.1, "weight_decay": 0.01}),
    "momentum": (fk.SGD, torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "dampening": 0.3}),
    "nesterov": (fk.SGD, torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "nesterov": True}),
}
#: A few steps of a few roundings each, of values of about 1.
CLOSE = {"rtol": 5e-6, "atol": 5e-6}


def network(generator, backend=None, dtype=torch.float32, dropout=0.0):
    model = nn.Sequential(
        nn.Linear(16, 24), nn.LayerNorm(24), nn.ReLU(), nn.Dropout(dropout), nn.Linear(24, 5)
    ).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    scale = fk.Scale.fixed(lambda w: w.abs().mean(1, keepdim=True))
    quantizer = fk.Quantizer(fk.Grid.uniform(2), scale, fk.StraightThrough("identity"))
    fk.quantize_model(model, quantizer, backend=backend)
    return model


def batch(generator, dtype=torch.float32):
    return torch.randn(32, 16, generator=generator).to(dtype), torch.randint(5, (32,), generator=generator)


def loss_of(model, data):
    return F.cross_entropy(model(data[0]).float(), data[1])


# ---- against torch.optim


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("groups", [1, 2])
def test_same_gradients_give_the_steps_of_torch(backend, device, name, groups, generator):
    """Two param groups, a parameter that joins late, one that never gets a gradient, a scheduler."""
    ours, theirs, options = OPTIMIZERS[name]
    start = [torch.randn(s, generator=generator).to(device) for s in ((7, 5), (9,), (), (1023,), (3,))]
    found = []
    for kind in (ours, theirs):
        parameters = [t.clone().requires_grad_() for t in start]
        cut = [parameters] if groups == 1 else [parameters[:2], parameters[2:]]
        arguments = [{"params": p, "weight_decay": 0.02 * i} for i, p in enumerate(cut)]
        own = {"backend": backend} if kind is ours else {}
        optimizer = kind(arguments if groups == 2 else parameters, **options, **own)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)
        draw = torch.Generator().manual_seed(5)
        for t in range(5):
            for i, p in enumerate(parameters):
                g = torch.randn(p.shape, generator=draw).to(device)
                p.grad = None if i == 4 or (i == 1 and t < 2) else g
            optimizer.step()
            scheduler.step()
        found.append(parameters)
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)
    assert torch.equal(found[0][4], start[4])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_checkpoints_of_torch_continue_here_and_back(name, generator):
    ours, theirs, options = OPTIMIZERS[name]
    start = [torch.randn(s, generator=generator) for s in ((7, 5), (9,))]
    grads = [[torch.randn(t.shape, generator=generator) for t in start] for _ in range(6)]

    def run(kinds):
        """Two steps with each kind, handing the state over."""
        parameters, state = [t.clone().requires_grad_() for t in start], None
        for i, kind in enumerate(kinds):
            optimizer = kind(parameters, **options)
            if state is not None:
                optimizer.load_state_dict(copy.deepcopy(state))
            for g in grads[2 * i : 2 * i + 2]:
                for p, x in zip(parameters, g, strict=True):
                    p.grad = x.clone()
                optimizer.step()
            state = optimizer.state_dict()
        return parameters

    expected = run([theirs] * 3)
    for kinds in ([theirs, ours, theirs], [ours, theirs, ours]):
        for a, b in zip(run(kinds), expected, strict=True):
            torch.testing.assert_close(a, b, **CLOSE)


def test_resuming_keeps_every_bit_of_float32_state(generator):
    """PyTorch would round the state of bfloat16 parameters to bfloat16 on loading."""
    start = torch.randn(33, generator=generator).bfloat16()
    grads = [torch.randn(33, generator=generator).bfloat16() for _ in range(6)]

    def run(cut):
        p = start.clone().requires_grad_()
        optimizer = fk.AdamW([p], lr=1e-2, master_weights=True)
        for i, g in enumerate(grads):
            if i == cut:
                state = copy.deepcopy(optimizer.state_dict())
                optimizer = fk.AdamW([p], lr=1e-2, master_weights=True)
                optimizer.load_state_dict(state)
            p.grad = g.clone()
            optimizer.step()
        return p.detach(), optimizer.state[p]

    (p, state), (q, resumed) = run(None), run(3)
    assert torch.equal(p, q)
    assert {k: v.dtype for k, v in resumed.items()} == {
        "step": torch.int64,
        **dict.fromkeys(("exp_avg", "exp_avg_sq", "master"), torch.float32),
    }
    assert all(torch.equal(state[k], resumed[k]) for k in state)


def test_master_weights_collect_what_bfloat16_would_lose(generator):
    for master in (False, True):
        p = torch.ones(64, dtype=torch.bfloat16, requires_grad=True)
        optimizer = fk.SGD([p], lr=1e-3, master_weights=master)
        for _ in range(100):
            p.grad = torch.ones_like(p)
            optimizer.step()
        assert bool((p == (0.8984375 if master else 1.0)).all())  # 0.9 to the nearest bfloat16


# ---- with Fogzo


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("directions", [1, 3])
def test_fused_training_is_estimate_then_optimizer(backend, name, directions, generator):
    """From plain STE steps into FOGZO steps: losses to the bit, weights as with estimate_ and torch.optim."""
    ours, theirs, options = OPTIMIZERS[name]
    model, data = network(generator, backend), batch(generator)
    twin = copy.deepcopy(model)
    fogzo, other = (
        fk.Fogzo(m, total_steps=6, kappa=1.0, directions=directions, start=0.4, backend=backend)
        for m in (model, twin)
    )
    fused, plain = ours(model.parameters(), fogzo=fogzo, **options), theirs(twin.parameters(), **options)
    for _ in range(6):
        fused.zero_grad()
        plain.zero_grad()
        loss = fused.step(partial(loss_of, model, data))
        assert loss == other.backward(partial(loss_of, twin, data))
        plain.step()
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q, **CLOSE)
            with torch.no_grad():  # or a rounding might move a code of the next step
                q.copy_(p)
    assert fogzo.state_dict()["steps"] == other.state_dict()["steps"] == 6


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_is_seven_launches(name, generator, monkeypatch):
    """One each for Q, g and probes, two each for the norm and for estimate and update."""
    backend = pytest.importorskip("fogzo_kernels.backends.triton")
    device = device_of("triton")
    if reason := backend.unavailable(device):
        pytest.skip(f"backend triton: {reason}")
    launches = []
    inner = importlib.import_module(f"{backend.__name__}.launch").launch

    def counted(kernel, *rest, **more):
        launches.append(kernel)
        inner(kernel, *rest, **more)

    for op in ("norm", "perturb", "tail", "quantize"):
        monkeypatch.setattr(importlib.import_module(f"{backend.__name__}.{op}"), "launch", counted)
    ours, _, options = OPTIMIZERS[name]
    model, data = network(generator, "triton").to(device), [t.to(device) for t in batch(generator)]
    fogzo = fk.Fogzo(model, total_steps=4, one_minus_beta=0.3, backend="triton", directions=1)
    optimizer = ours(model.parameters(), fogzo=fogzo, **options)
    for _ in range(2):
        launches.clear()
        optimizer.zero_grad()
        optimizer.step(partial(loss_of, model, data))
    names = [getattr(kernel, "__name__", None) or kernel.fn.__name__ for kernel in launches]
    assert names == [
        "quantize_kernel", "quantize_kernel", "sumsq_kernel", "sum_kernel", "perturb_kernel",
        "update_coefficients_kernel", "update_kernel",
    ]  # fmt: skip


def test_an_estimate_that_is_clipped_bounds_the_step(generator):
    model, data = network(generator), batch(generator)
    fogzo = fk.Fogzo(model, total_steps=10, kappa=1.0, directions=1)
    optimizer = fk.SGD(model.parameters(), lr=1.0, fogzo=fogzo)
    before = [p.detach().clone() for p in model.parameters()]
    fogzo.run(lambda: loss_of(model, data))
    fogzo.estimate_()
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    optimizer.step()
    moved = torch.cat([(a - b).flatten() for a, b in zip(model.parameters(), before, strict=True)])
    assert 0 < moved.norm() < 2e-3


def test_changed_gradients_are_refused(generator):
    model, data = network(generator), batch(generator)
    fogzo = fk.Fogzo(model, total_steps=10, kappa=1.0, directions=1)
    optimizer = fk.SGD(model.parameters(), lr=1.0, fogzo=fogzo)
    for finish in (optimizer.step, fogzo.estimate_):
        fogzo.run(lambda: loss_of(model, data))
        before = [p.detach().clone() for p in model.parameters()]
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        with pytest.raises(RuntimeError, match="must not change between the passes and the estimate"):
            finish()
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
        optimizer.zero_grad()


def test_stale_gradients_are_refused_after_a_fused_step(generator):
    model, data = network(generator), batch(generator)
    fogzo = fk.Fogzo(model, total_steps=10, kappa=1.0, directions=1)
    optimizer = fk.SGD(model.parameters(), lr=0.1, fogzo=fogzo)
    optimizer.step(lambda: loss_of(model, data))
    with pytest.raises(RuntimeError, match="zero_grad"):
        optimizer.step(lambda: loss_of(model, data))


def test_lost_norm_is_counted_and_skips_the_step(generator):
    model, data = network(generator), batch(generator)
    fogzo = fk.Fogzo(model, total_steps=10, one_minus_beta=0.1, directions=1)
    optimizer = fk.AdamW(model.parameters(), lr=0.1, fogzo=fogzo)
    before = [w.parameter.detach().clone() for w in fogzo.weights]
    optimizer.step(lambda: loss_of(model, data) * float("nan"))
    assert fogzo.diagnostics() == {"lost_directions": 0, "lost_steps": 1, "bad_alphas": 0}
    assert all(torch.equal(w.parameter, b) for w, b in zip(fogzo.weights, before, strict=True))


def test_one_optimizer_takes_several_dtypes_and_names_a_bad_one(generator):
    model = network(generator)
    model[4].to(torch.float64)  # not supported: named before anything moves
    optimizer = fk.SGD(model.parameters(), lr=0.1)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(TypeError, match=r"latents\[0\] must be float32 or bfloat16 or float16, got float64"):
        optimizer.step()
    model = network(generator, dtype=torch.bfloat16)
    model[1].float()
    optimizer = fk.SGD(model.parameters(), lr=0.5)
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    for p, b in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, (b.float() - 0.5).to(b.dtype))


def test_a_weight_of_another_optimizer_is_noticed(generator):
    model, data = network(generator), batch(generator)
    fogzo = fk.Fogzo(model, total_steps=10, kappa=1.0, directions=1)
    optimizer = fk.SGD(model[0].parameters(), lr=0.1, fogzo=fogzo)
    fogzo.run(lambda: loss_of(model, data))
    with pytest.raises(RuntimeError, match="params must hold every quantized weight of fogzo, got all but 1"):
        optimizer.step()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lr": -1.0}, ValueError, "lr must be >= 0, got -1.0"),
        ({"betas": (0.9, 1.0)}, ValueError, "beta2 must be >= 0 and < 1"),
        ({"betas": (0.9,)}, ValueError, r"betas must be two numbers, got \(0\.9,\)"),
        ({"fogzo": "x"}, TypeError, "fogzo must be a Fogzo or None, got str"),
    ],
)
def test_bad_options_are_named(options, error, message):
    with pytest.raises(error, match=message):
        fk.AdamW([torch.zeros(3, requires_grad=True)], **options)


@pytest.mark.parametrize(("kind", "option"), [("adamw", "amsgrad"), ("adamw", "maximize"), ("sgd", "maximize")])
def test_state_of_an_update_that_is_not_offered_is_refused(kind, option):
    ours, theirs, options = OPTIMIZERS[kind]
    p = torch.zeros(3, requires_grad=True)
    state = theirs([p], **options, **{option: True}).state_dict()
    optimizer = ours([p], **options)
    before = optimizer.state_dict()
    with pytest.raises(ValueError, match=rf"param_groups'\]\[0\] must not have {option}, got True"):
        optimizer.load_state_dict(state)
    assert optimizer.state_dict() == before


def test_copies_train_alike(generator):
    model, data = network(generator), batch(generator)
    fogzo = fk.Fogzo(model, total_steps=10, kappa=1.0, schedule="constant", directions=1)
    run = model, fogzo, fk.AdamW(model.parameters(), lr=1e-2, fogzo=fogzo)

    def go(model, _, optimizer, steps):
        losses = []
        for _ in range(steps):
            optimizer.zero_grad()
            losses.append(optimizer.step(partial(loss_of, model, data)).item())
        return losses

    go(*run, 2)
    twin = copy.deepcopy(run)
    assert go(*twin, 3) == go(*run, 3)
    assert fogzo.steps == twin[1].steps == 5
    for p, q in zip(model.parameters(), twin[0].parameters(), strict=True):
        assert p is not q
        assert torch.equal(p, q)


# ---- scalars on the device


@pytest.mark.parametrize("schedule", ["linear", "constant"])
def test_a_capturable_optimizer_takes_the_same_steps(backend, schedule, generator):
    """Seed, step, 1 - beta, learning rate and the optimizer's count as tensors: the same bits."""
    seed = generator.initial_seed()
    found = []
    for capturable in (True, False):
        draw = torch.Generator().manual_seed(seed)
        model, data = network(draw, backend), batch(draw)
        fogzo = fk.Fogzo(
            model,
            total_steps=4,
            one_minus_beta=0.3,
            seed=2**63 + 7,
            schedule=schedule,
            capturable=capturable,
            backend=backend,
            directions=1,
        )
        lr = torch.tensor(1e-2, dtype=torch.float64) if capturable else 1e-2
        optimizer = fk.AdamW(model.parameters(), lr=lr, fogzo=fogzo, capturable=capturable)
        losses = []
        for _ in range(6):  # beyond total_steps
            optimizer.zero_grad()
            losses.append(optimizer.step(partial(loss_of, model, data)).item())
        assert fogzo.one_minus_beta == 0.3
        found.append((losses, [p.detach() for p in model.parameters()], fogzo.state_dict()["steps"]))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))
    assert found[0][2] == found[1][2] == 6


def test_a_capturable_run_resumes_at_its_step(generator):
    model = network(generator)
    state = fk.Fogzo(model, total_steps=4, one_minus_beta=0.3, directions=1).state_dict() | {"steps": 3}
    fogzo = fk.Fogzo(model, total_steps=4, one_minus_beta=0.3, capturable=True, directions=1)
    fogzo.load_state_dict(state)
    assert fogzo.steps == 3
    assert fogzo.one_minus_beta == pytest.approx(0.225)
    assert fogzo._run.next_noise()["one_minus_beta"].item() == pytest.approx(0.225)


def test_capturable_needs_probes_in_every_step(generator):
    with pytest.raises(ValueError, match=r"start must be 0 if capturable, got 0\.5"):
        fk.Fogzo(network(generator), total_steps=4, kappa=1.0, start=0.5, capturable=True, directions=1)


def test_capture_is_refused_where_a_replay_would_be_wrong(generator, monkeypatch):
    """Before a first step nothing is known; after it, a model that drew random numbers is refused."""
    from fogzo_kernels.train import replay

    model = network(generator)
    state = replay.ReplayState(model)
    monkeypatch.setattr(replay, "capturing", lambda: True)
    with pytest.raises(RuntimeError, match="a step must be run before one is captured"):
        state.save()
    state.draws = True
    with pytest.raises(RuntimeError, match="must not draw random numbers on the GPU in a captured step"):
        state.save()
    state.draws = False
    assert state.save().cuda == {}


# ---- which parameters go into one call


@pytest.mark.parametrize("capturable", [False, True])
def test_parameters_that_join_late_have_steps_of_their_own(capturable, generator):
    """In a group and in one that is added, and after a load: as PyTorch's own, parameter by parameter."""
    start = [torch.randn(5, generator=generator) for _ in range(3)]
    found = []
    for kind in ("ours", "theirs"):
        first, late, added = (t.clone().requires_grad_() for t in start)
        options = {"lr": 0.1, "weight_decay": 0.01}
        if kind == "ours":
            optimizer = fk.AdamW([first, late], **options, capturable=capturable)
        else:
            optimizer = torch.optim.AdamW([first, late], **options)
        grads = torch.Generator().manual_seed(1)
        for step in range(9):
            if step == 5:
                optimizer.add_param_group({"params": [added]})
            if step == 7 and kind == "ours":
                state = copy.deepcopy(optimizer.state_dict())
                optimizer = fk.AdamW([first, late], **options, capturable=capturable)
                optimizer.add_param_group({"params": [added]})
                optimizer.load_state_dict(state)
            for i, p in enumerate((first, late, added)):
                g = torch.randn(5, generator=grads)
                p.grad = g if step >= (0, 3, 5)[i] else None
            optimizer.step()
        found.append((first, late, added))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)


def test_groups_with_and_without_master_copies_stay_apart(generator):
    """With the same numbers otherwise; betas may be a list."""
    start = [torch.randn(6, generator=generator).bfloat16() for _ in range(3)]
    parameters = [t.clone().requires_grad_() for t in start]
    groups = [{"params": [p], "master_weights": i == 1} for i, p in enumerate(parameters)]
    optimizer = fk.AdamW(groups, lr=1e-3, betas=[0.9, 0.99])
    alone = [t.clone().requires_grad_() for t in start]
    others = [fk.AdamW([p], lr=1e-3, betas=(0.9, 0.99), master_weights=i == 1) for i, p in enumerate(alone)]
    for _ in range(3):
        for p, q in zip(parameters, alone, strict=True):
            p.grad = torch.randn(6, generator=generator).bfloat16()
            q.grad = p.grad.clone()
        optimizer.step()
        for other in others:
            other.step()
    for p, q in zip(parameters, alone, strict=True):
        assert torch.equal(p, q)
    assert [("master" in optimizer.state[p]) for p in parameters] == [False, True, False]
