"""The fused tail: estimate, optimizer step and the next Q(theta) in one pass (contract section 4)."""

import pytest
import torch
from support.samples import GRID_CASES, GRID_IDS, IDENTITY
from support.tails import BF16, DTYPES, QUANTIZED, RULES, SHAPES, Setup, fused, shards_of, stepped

import fogzo_kernels as fk


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_tail_is_estimate_then_step_then_quantize(backend, rule, dtypes, generator):
    s = Setup(backend, generator, dtypes)
    for t in (1, 2, 50):
        G, thetas, grads = s.estimates(), s.thetas(), [g.clone() for g in s.grads]
        states = [[x.clone() for x in xs] for xs in s.states]
        s.run(rule, t=t)
        for i, theta in enumerate(thetas):
            new, state = stepped(rule, theta, G[i], [xs[i] for xs in states], 0.03, t)
            if s.masters:
                assert torch.equal(s.masters[i], new), i
            assert torch.equal(s.latents[i], new.to(s.latents[i].dtype)), i
            state = [*state, *(xs[i] for xs in states[len(state) :])]  # those that the rule has not stay
            for found, expected in zip(s.states, state, strict=True):
                assert torch.equal(found[i], expected), i
            assert torch.equal(s.grads[i], grads[i])
        assert s.q_is_that_of_the_latents()


@pytest.mark.parametrize("case", GRID_CASES, ids=GRID_IDS)
@pytest.mark.parametrize("kind", ["tensor", "group"])
def test_the_tail_is_its_parts_on_every_grid_and_distribution(backend, case, kind, generator):
    s = Setup(backend, generator, DTYPES[0], kind, case, SHAPES[:QUANTIZED])
    G, thetas, states = s.estimates(), s.thetas(), [[x.clone() for x in xs] for xs in s.states]
    s.run("adamw", t=3)
    for i, theta in enumerate(thetas):
        new, _ = stepped("adamw", theta, G[i], [xs[i] for xs in states], 0.03, 3)
        assert torch.equal(s.latents[i], new), i
    assert s.q_is_that_of_the_latents()


@pytest.mark.parametrize("numel", [0, 1, 7, 8, 9, 1023, 16385])
@pytest.mark.parametrize("shift", [0, 1])
def test_the_tail_takes_any_size_and_unaligned_memory(backend, device, numel, shift, generator):
    storage = torch.randn(5, numel + 3, generator=generator).to(device)
    theta, g, m, v, q = (row[shift : shift + numel] for row in storage)
    v.abs_()
    border = [row.clone() for row in storage]
    options = {
        "grid": fk.Grid.uniform(3), "straight_through": IDENTITY, "one_minus_beta": 0.3, "seed": 8,
        "layouts": [(5, max(numel, 1), max(numel, 1))], "tensor_ids": [3], "backend": backend,
    }  # fmt: skip
    losses = torch.tensor([1.5], device=device), torch.tensor([1.0], device=device)
    alpha, norm = torch.tensor(0.4, device=device), torch.tensor(2.0, device=device)
    G = g.clone()
    fk.estimate_gradient_(G, *losses, alpha, norm, **options)
    new, state = stepped("adamw", theta.clone(), G, [m.clone(), v.clone()], 0.03, 2)
    fused("adamw", theta, g, (m, v), *losses, alpha, norm, lr=0.03, optimizer_step=2, quantized=q, **options)
    for found, expected in zip((theta, m, v), (new, *state), strict=True):
        assert torch.equal(found, expected)
    for row, before in zip(storage, border, strict=True):  # nothing outside is written
        assert torch.equal(row[:shift], before[:shift])
        assert torch.equal(row[shift + numel :], before[shift + numel :])


@pytest.mark.parametrize("parts", [2, 3])
def test_tail_of_shards_equals_the_whole(backend, device, parts, generator):
    theta, g, m, v = (torch.randn(12, 24, generator=generator).to(device) for _ in range(4))
    v.abs_()
    alpha = (0.1 + torch.rand(12, 6, generator=generator)).to(device)
    losses = torch.tensor([1.0, 2.0], device=device), torch.tensor([0.5, 2.5], device=device)
    options = {
        "grid": fk.Grid.half_offset(2), "straight_through": IDENTITY, "one_minus_beta": 0.2, "seed": 1,
        "backend": backend, "lr": 0.1, "optimizer_step": 1,
    }  # fmt: skip

    def run(pieces, **shards):
        new = [[t.clone() for t in ts] for ts in pieces]
        theta, g, m, v, alpha = new
        q = [torch.full_like(t, float("nan")) for t in theta]
        norm = torch.tensor(3.0, device=device)
        fused("adamw", theta, g, (m, v), *losses, alpha, norm, quantized=q, **options, **shards)
        return theta, m, v, q

    whole = run([[t] for t in (theta, g, m, v, alpha)], tensor_ids=[9])
    for dim, cut, layouts in shards_of((theta, g, m, v, alpha), parts):
        for pieces, expected in zip(run(cut, tensor_ids=[9] * parts, layouts=layouts), whole, strict=True):
            assert torch.equal(torch.cat(pieces, dim), expected[0])


# ---- against PyTorch's own optimizers


def torch_optimizer(rule, parameters, lr):
    o = RULES[rule]
    kind = torch.optim.AdamW if rule.startswith("adamw") else torch.optim.SGD
    return kind(parameters, lr=lr, **o)


def first_moment_error(rule, G, m, v, lr, t):
    """Bound of what two roundings of the first moment's update, of |G| + |m|, change in AdamW's theta."""
    if not rule.startswith("adamw"):
        return 0
    (b1, b2), eps = RULES[rule]["betas"], RULES[rule]["eps"]
    denominator = (v / (1 - b2**t)).sqrt() + eps
    return lr / (1 - b1**t) * 2**-23 * (G.float().abs() + m.abs()) / denominator


@pytest.mark.parametrize("rule", RULES)
def test_without_losses_it_is_the_optimizer_of_torch(backend, device, rule, generator):
    s = Setup(backend, generator, DTYPES[1])
    s.states = [[torch.zeros_like(t) for t in s.latents] for _ in "mv"]
    s.losses, s.norm = [torch.empty(0, device=device)] * 2, torch.tensor(float("nan"), device=device)
    theirs = [t.clone().requires_grad_() for t in s.latents]
    optimizer = torch_optimizer(rule, theirs, 0.03)
    slack = [torch.zeros_like(t) for t in s.latents]
    for t in range(1, 6):
        for p, g in zip(theirs, s.grads, strict=True):
            g.copy_(torch.randn(g.shape, generator=generator))
            p.grad = g.clone()
        first = [m.clone() for m in s.states[0]]
        optimizer.step()
        s.run(rule, t=t)
        for i, (p, ours) in enumerate(zip(theirs, s.latents, strict=True)):
            slack[i] += first_moment_error(rule, s.grads[i], first[i], s.states[1][i], 0.03, t)
            # 5 steps of a few roundings each, of values up to lr * |update| and theta
            assert ((ours - p.detach()).abs() <= 2e-6 * (1 + p.detach().abs()) + slack[i]).all()


# ---- what is lost


@pytest.mark.parametrize("master", [False, True])
def test_lost_directions_leave_the_gradient_as_it_is(backend, device, master, generator):
    s = Setup(backend, generator, (BF16, BF16, BF16, master))
    s.losses[0][0] = float("nan")
    s.losses[1][1] = float("inf")
    counters = torch.zeros(3, dtype=torch.int64, device=device)
    thetas, states = s.thetas(), [[x.clone() for x in xs] for xs in s.states]
    s.run("adamw", counters=counters)
    assert counters.tolist() == [2, 0, 0]
    for i, theta in enumerate(thetas):
        new, _ = stepped("adamw", theta, s.grads[i].float(), [xs[i] for xs in states], 0.03, 1)
        assert torch.equal(s.latents[i], new.to(BF16))


@pytest.mark.parametrize("master", [False, True])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_lost_norm_skips_the_step_but_writes_q(backend, device, master, bad, generator):
    s = Setup(backend, generator, (BF16, BF16, BF16, master))
    s.grads[0][0, 0] = bad
    s.norm = torch.tensor(bad, device=device)
    counters = torch.zeros(3, dtype=torch.int64, device=device)
    before = [t.clone() for ts in (s.latents, s.masters or [], *s.states) for t in ts]
    s.run("adamw", counters=counters)
    assert counters.tolist() == [0, 1, 0]
    after = [t for ts in (s.latents, s.masters or [], *s.states) for t in ts]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    assert s.q_is_that_of_the_latents()


def test_zero_norm_leaves_the_guide_out(backend, device, generator):
    s = Setup(backend, generator, DTYPES[1])
    for g in s.grads:
        g.zero_()
    s.norm = torch.tensor(0.0, device=device)
    s.run("adamw")
    assert all(bool(torch.isfinite(t).all()) for t in s.latents + s.quantized)


# ---- arguments


def test_scalars_may_be_tensors_on_the_device(backend, device, generator):
    seed = generator.initial_seed()
    found = []
    for where in ("host", "device"):
        s = Setup(backend, torch.Generator().manual_seed(seed), DTYPES[1])
        lr, t = 0.03, 7
        if where == "device":
            lr = torch.tensor(lr, dtype=torch.float64, device=device)
            t = torch.tensor(t, device=device)
            s.options["seed"] = torch.tensor(77, device=device)
            s.options["step"] = torch.tensor(4, device=device)
            s.options["one_minus_beta"] = torch.tensor(1e-2, dtype=torch.float64, device=device)
        s.run("adamw", lr=lr, t=t)
        found.append(s.latents)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_quantized_and_counters_are_optional(backend, generator):
    seed = generator.initial_seed()
    first, second = (Setup(backend, torch.Generator().manual_seed(seed), DTYPES[0]) for _ in "ab")
    first.run("momentum")
    second.quantized = None
    second.run("momentum")
    assert all(torch.equal(a, b) for a, b in zip(first.latents, second.latents, strict=True))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda s: s.states[0].pop(), ValueError, r"exp_avgs must have 8 tensors, got 7"),
        (lambda s: s.states.__setitem__(1, [t.bfloat16() for t in s.states[1]]), TypeError,
         r"exp_avg_sqs\[0\] must be float32, got bfloat16"),
        (lambda s: setattr(s, "masters", [t.clone() for t in s.latents]), TypeError,
         r"latents must be bfloat16 or float16 where masters are given, got float32"),
        (lambda s: s.quantized.pop(), ValueError, r"quantized must have 5 tensors, got 4"),
        (lambda s: s.alphas.extend([s.alphas[0]] * 4), ValueError,
         r"alphas must have at most 8 tensors, got 9"),
        (lambda s: s.options.update(tensor_ids=[1, 2]), ValueError, r"tensor_ids must have 5 entries, got 2"),
        (lambda s: setattr(s, "losses", [s.losses[0], s.losses[1][:1]]), ValueError,
         r"losses_minus must have shape \(2,\), got \(1,\)"),
        (lambda s: s.quantized.__setitem__(0, s.latents[0].view(33, 20)), ValueError,
         r"must not share memory with"),
        (lambda s: s.grads.__setitem__(1, s.grads[1].t()), ValueError, r"grads\[1\] must have shape"),
    ],
)  # fmt: skip
def test_bad_lists_are_named_before_anything_is_written(backend, change, error, message, generator):
    s = Setup(backend, generator, DTYPES[1])
    change(s)
    before = [t.clone() for ts in (s.latents, *s.states) for t in ts]
    with pytest.raises(error, match=message):
        s.run("adamw")
    after = [t for ts in (s.latents, *s.states) for t in ts]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lr": -1.0}, ValueError, r"lr must be finite and >= 0, got -1"),
        ({"lr": float("nan")}, ValueError, r"lr must be finite"),
        ({"lr": torch.tensor(0.1)}, TypeError, r"lr must be a 0-dim float64 tensor, got float32"),
        ({"t": 0}, ValueError, r"optimizer_step must be >= 1, got 0"),
        ({"t": 1.5}, TypeError, r"optimizer_step must be an int"),
        ({"counters": torch.zeros(2, dtype=torch.int64)}, TypeError, r"counters must be an int64 tensor"),
    ],
)
def test_bad_scalars_are_named(options, error, message, generator):
    s = Setup("reference", generator, DTYPES[1])
    with pytest.raises(error, match=message):
        s.run("adamw", **options)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        ({"betas": (1.0, 0.9)}, ValueError, r"beta1 must be >= 0 and < 1, got 1.0"),
        ({"betas": (0.9, -0.1)}, ValueError, r"beta2 must be >= 0"),
        ({"eps": -1.0}, ValueError, r"eps must be finite and >= 0, got -1.0"),
        ({"weight_decay": float("inf")}, ValueError, r"weight_decay must be finite"),
        ({"weight_decay": "a"}, TypeError, r"weight_decay must be a number, got str"),
    ],
)
def test_bad_hyperparameters_are_named(call, error, message, generator):
    s = Setup("reference", generator, DTYPES[1])
    with pytest.raises(error, match=message):
        fk.estimate_adamw_(
            s.latents,
            s.grads,
            *s.states,
            *s.losses,
            s.alphas,
            s.norm,
            lr=0.1,
            optimizer_step=1,
            **call,
            **s.options,
        )


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        ({"momentum": 0.0, "nesterov": True}, ValueError, r"nesterov must have momentum > 0 and dampening 0"),
        ({"momentum": 0.0}, ValueError, r"momentum_buffers must be None without momentum, got 8 tensors"),
        ({"momentum": -1.0}, ValueError, r"momentum must be finite and >= 0"),
        ({"momentum": 0.9, "nesterov": 1}, TypeError, r"nesterov must be a bool, got int"),
    ],
)
def test_bad_sgd_hyperparameters_are_named(call, error, message, generator):
    s = Setup("reference", generator, DTYPES[1])
    with pytest.raises(error, match=message):
        fk.estimate_sgd_(
            s.latents,
            s.grads,
            s.states[0],
            *s.losses,
            s.alphas,
            s.norm,
            lr=0.1,
            optimizer_step=1,
            **call,
            **s.options,
        )


def test_the_tail_compiles_once_with_the_eager_bits(generator):
    """One graph, new scalars without recompiling; the mutated lists come back right."""
    s, eager = (Setup("reference", torch.Generator().manual_seed(3), DTYPES[1]) for _ in "ab")
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    for t in (1, 2, 3):
        for one, call in ((s, compiled), (eager, fused)):
            one.options["step"] = torch.tensor(t)
            one.options["one_minus_beta"] = torch.tensor(0.1 / t, dtype=torch.float64)
            one.options["seed"] = torch.tensor(5)
            call(
                "adamw",
                one.latents,
                one.grads,
                one.states,
                *one.losses,
                one.alphas,
                one.norm,
                lr=torch.tensor(0.1, dtype=torch.float64),
                optimizer_step=torch.tensor(t),
                quantized=one.quantized,
                **one.options,
            )
    for ours, expected in ((s.latents, eager.latents), (s.quantized, eager.quantized)):
        assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
