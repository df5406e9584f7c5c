"""Noise per tensor, and guided noise, by the ops of every backend (contract sections 1, 4 and 5)."""

import math
import re

import pytest
import torch
from conftest import device_of
from support.hadamard import matrix
from support.samples import GRID_CASES, GRID_IDS, IDENTITY, alphas_for, poisoned
from support.tails import DTYPES, QUANTIZED, RULES, Setup, shards_of, stepped
from support.tolerances import EXACT, M_TOLERANCE, coefficient, estimate_error

import fogzo_kernels as fk
import fogzo_kernels.functional as ops
from fogzo_kernels.spec.grid import FLOATS

F32, BF16, INT8, F64 = torch.float32, torch.bfloat16, torch.int8, torch.float64
NAN, INF = math.nan, math.inf
SHAPES = ((33, 20), (8, 64), (7, 4), (1, 4), (0, 4))
FACTORS = (0.75, 0.0, 2.5, 1.0, 3.0)
OMB, SEED, STEP = 1e-2, 77, 4
#: Guided noise, or so many directions; whether with factors.
NS = (("guided", False), ("guided", True), (1, True), (3, True))


def losses_of(n, generator, device):
    """What the estimate takes for losses."""
    if n == "guided":
        return None, None
    return tuple(1 + torch.rand(n, generator=generator).to(device) for _ in "+-")


def tensors(generator, dtype, kind, device):
    """Gradients and alphas."""
    grads = [(torch.randn(s, generator=generator) * 1e-2).to(dtype).to(device) for s in SHAPES]
    return grads, [alphas_for(s, kind, generator).to(device) for s in SHAPES]


def estimate(g, alpha, t, norm, losses, straight_through, grid, tensor_id, backend, layout=None):
    """G of a tensor by the formula in float64, flat, and by how much a backend may differ."""
    g, alpha, C = g.cpu(), alpha.cpu(), coefficient(straight_through)
    N, c, signs = float(norm), [float(norm)], [1.0]
    if losses[0] is not None:
        plus, minus = (x.double().cpu() for x in losses)
        c = ((plus - minus) / (2 * straight_through.epsilon(grid)) / len(plus)).tolist()
        signs = [fk.direction_sign(SEED, STEP, i) for i in range(len(c))]
    delta = (alpha.double() * grid.r).flatten().repeat_interleave(g.numel() // max(alpha.numel(), 1))
    names = {"seed": SEED, "step": STEP, "tensor_id": tensor_id, "layout": layout, "backend": "reference"}
    terms, sizes = [], [abs(x) * OMB**0.5 * C * t / delta for x in c]
    for i, (x, sign) in enumerate(zip(c, signs, strict=True)):
        m = fk.noise(g.numel(), straight_through.distribution, direction=i, **names).double() / C
        terms += [x * (1 - OMB) ** 0.5 * sign / N * g.double().flatten(), math.copysign(1, x) * sizes[i] * m]
    total = sum(terms)
    off = sum(M_TOLERANCE[b][straight_through.distribution] for b in (backend, "reference"))
    return total, estimate_error(terms, total, sum(sizes), off, g.dtype)


# ---- sums of squares, and factors


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("kind", ["tensor", "row"])
def test_a_sum_for_each_tensor(backend, device, dtype, kind, generator):
    """In the dtype's precision; of several programs, of none; the same bits in every run."""
    shapes = [*SHAPES, (3, 7000), (0, 4), (1, 9)]
    grads = [torch.randn(s, generator=generator).to(dtype).to(device) for s in shapes]
    alphas = [alphas_for(s, kind, generator).to(device) for s in shapes]
    for grid in (fk.Grid.uniform(2), fk.Grid.sign()):
        found = [fk.guide_sumsq(grads, alphas, grid=grid, per_tensor=True, backend=backend) for _ in "ab"]
        assert torch.equal(*found)
        assert (found[0].dtype, found[0].shape, found[0].device) == (F64, (len(shapes),), grads[0].device)
        for sum_of_one, g, alpha in zip(found[0].tolist(), grads, alphas, strict=True):
            delta = (alpha.double() * grid.r).flatten().repeat_interleave(g.numel() // max(alpha.numel(), 1))
            exact = (g.double().flatten() * delta).square().sum().item()
            assert abs(sum_of_one - exact) <= 2e-6 * exact
        whole = fk.guide_sumsq(grads, alphas, grid=grid, backend=backend)
        torch.testing.assert_close(found[0].sum(), whole, rtol=1e-12, atol=0)


def test_sums_of_no_tensors_and_of_empty_ones(backend, device):
    options = {"grid": fk.Grid.uniform(2), "per_tensor": True, "backend": backend}
    assert fk.guide_sumsq([], [], **options).shape == (0,)
    empty = [torch.empty(0, 4, device=device)] * 2
    assert fk.guide_sumsq(empty, [torch.ones((), device=device)] * 2, **options).tolist() == [0.0, 0.0]


def test_factors_keep_the_energy_of_the_noise(generator):
    numels, place = [1, 10, 12345, 7, 1000], device_of("cuda")
    sumsqs = torch.rand(5, generator=generator, dtype=F64).to(place) * 1e-9
    sumsqs[3] = 0
    d = torch.tensor(numels, device=place)
    t = ops.noise_factors(sumsqs, numels)
    assert (t.dtype, t.shape, t.device) == (F32, (5,), sumsqs.device)
    assert torch.equal(t, ops.noise_factors(sumsqs, d))
    assert t[3] == 0
    taking_part = d[sumsqs > 0].sum().double()
    torch.testing.assert_close((d * t.double() ** 2).sum(), taking_part, rtol=1e-6, atol=0)
    torch.testing.assert_close(t.double() ** 2 * d, sumsqs / sumsqs.sum() * taking_part, rtol=1e-6, atol=0)


@pytest.mark.parametrize("bad", [[0.0, 0.0], [NAN, 1.0], [INF, 1.0]], ids=str)
def test_without_a_usable_norm_all_factors_are_0(bad):
    assert ops.noise_factors(torch.tensor(bad, dtype=F64), [3, 4]).tolist() == [0.0, 0.0]


def test_factors_of_no_tensors_and_of_empty_ones():
    assert ops.noise_factors(torch.empty(0, dtype=F64), []).shape == (0,)
    assert ops.noise_factors(torch.tensor([0.0, 4.0], dtype=F64), [0, 3]).tolist() == [0.0, 1.0]


ONE, SHAPED = torch.ones(1, dtype=F64), "numels must be an int64 tensor of shape (1,), got "
FLAT = "sumsqs must be a contiguous float64 tensor of shape (n,), got "


@pytest.mark.parametrize(
    ("sumsqs", "numels", "error", "message"),
    [
        ([1.0], [1], TypeError, "sumsqs must be a Tensor, got list"),
        (torch.ones(2), [1, 2], TypeError, FLAT + "float32 (2,)"),
        (ONE[0], [1], TypeError, FLAT + "float64 ()"),
        (ONE, [1, 2], TypeError, SHAPED + "int64 (2,)"),
        (ONE, torch.ones(1), TypeError, SHAPED + "float32 (1,)"),
        (ONE, [0.5], TypeError, "numels[0] must be an int, got float"),
        (ONE, ONE.long().to("meta"), ValueError, "numels must be on cpu, got meta"),
    ],
)
def test_bad_arguments_of_the_factors_are_named(sumsqs, numels, error, message):
    with pytest.raises(error, match=re.escape(message)):
        ops.noise_factors(sumsqs, numels)


# ---- probes


@pytest.mark.parametrize(("grid", "straight_through"), GRID_CASES, ids=GRID_IDS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("kind", ["tensor", "group"])
def test_probes_have_noise_per_tensor(backend, device, grid, straight_through, dtype, kind, generator):
    """Codes of exact noise are the reference's bit for bit, and all are those of the formula away from ties."""
    grads, alphas = tensors(generator, dtype, kind, device)
    latents = [torch.randn(s, generator=generator).to(dtype).to(device) for s in SHAPES]
    norm, factors = fk.guide_norm(grads, alphas, grid=grid, backend="reference"), torch.tensor(FACTORS)
    options = {
        "grid": grid, "straight_through": straight_through, "one_minus_beta": 0.3, "seed": SEED, "step": STEP,
        "direction": 1, "noise_factors": factors.to(device),
    }  # fmt: skip

    def codes(by, signs=2):
        out = [[poisoned(t, INT8) for t in latents] if k < signs else None for k in range(2)]
        fk.perturb_quantize_(*out, latents, grads, alphas, norm, backend=by, **options)
        return out

    found = codes(backend)
    eps, C, N = straight_through.epsilon(grid), coefficient(straight_through), float(norm)
    sign = fk.direction_sign(SEED, STEP, 1)
    for i, (theta, g, alpha) in enumerate(zip(latents, grads, alphas, strict=True)):
        delta = (
            (alpha.double() * grid.r).flatten().repeat_interleave(theta.numel() // max(alpha.numel(), 1)).cpu()
        )
        names = {"seed": SEED, "step": STEP, "direction": 1, "tensor_id": i, "backend": "reference"}
        u = fk.noise(theta.numel(), straight_through.distribution, **names).double()
        v = sign * 0.7**0.5 / N * delta * g.double().cpu().flatten() + 0.3**0.5 * FACTORS[i] * u
        for codes_of_sign, move in zip(found, (eps, -eps), strict=True):
            y = (theta.double().cpu().flatten() / delta - grid.offset + move * v).clamp(grid.qmin, grid.qmax)
            clear = ((y - y.floor()) - 0.5).abs() > 1e-3 * (C * max(FACTORS))
            assert clear.sum() >= 0.95 * clear.numel() - 2
            assert torch.equal(codes_of_sign[i].cpu().flatten()[clear].double(), y.round()[clear])
    if straight_through.distribution in EXACT:
        for side, wanted in zip(found, codes("reference"), strict=True):
            assert all(map(torch.equal, side, wanted))
    assert all(map(torch.equal, codes(backend, 1)[0], found[0]))


# ---- the estimate


@pytest.mark.parametrize(("grid", "straight_through"), GRID_CASES, ids=GRID_IDS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("kind", ["tensor", "group"])
@pytest.mark.parametrize(("n", "per_tensor"), NS)
def test_the_estimate_is_the_formula(
    backend, device, grid, straight_through, dtype, kind, n, per_tensor, generator
):
    grads, alphas = tensors(generator, dtype, kind, device)
    norm = fk.guide_norm(grads, alphas, grid=grid, backend="reference")
    losses, found = losses_of(n, generator, device), [g.clone() for g in grads]
    counters = torch.zeros(3, dtype=torch.int64, device=device)
    factors = torch.tensor(FACTORS, device=device) if per_tensor else None
    fk.estimate_gradient_(
        found, *losses, alphas, norm, grid=grid, straight_through=straight_through, one_minus_beta=OMB,
        seed=SEED, step=STEP, counters=counters, noise_factors=factors, backend=backend,
    )  # fmt: skip
    assert counters.tolist() == [0, 0, 0]
    for i, (g, alpha, G) in enumerate(zip(grads, alphas, found, strict=True)):
        t = FACTORS[i] if per_tensor else 1.0
        total, allowed = estimate(g, alpha, t, norm, losses, straight_through, grid, i, backend)
        error = (G.cpu().double().flatten() - total).abs()
        assert (error <= allowed).all(), (i, (error / allowed).max())


@pytest.mark.parametrize("numel", [0, 1, 7, 9, 1023, 16385])
@pytest.mark.parametrize("offset", [0, 3, 2**34 + 5])
@pytest.mark.parametrize("n", ["guided", 2])
def test_the_estimate_takes_any_size_offset_and_alignment(backend, device, numel, offset, n, generator):
    grid, layout = fk.Grid.uniform(3), (offset, max(numel, 1), max(numel, 1))
    alpha, norm = torch.tensor(0.4, device=device), torch.tensor(2.5, device=device)
    losses, factors = losses_of(n, generator, device), torch.tensor([1.75], device=device)
    for shift in (0, 1):
        memory = torch.randn(numel + 3, generator=generator).to(device)
        before, g = memory.clone(), memory[shift : shift + numel]
        fk.estimate_gradient_(
            g, *losses, alpha, norm, grid=grid, straight_through=IDENTITY, one_minus_beta=OMB, seed=SEED,
            step=STEP, layouts=[layout], tensor_ids=[3], noise_factors=factors, backend=backend,
        )  # fmt: skip
        old = before[shift : shift + numel]
        total, allowed = estimate(old, alpha, 1.75, norm, losses, IDENTITY, grid, 3, backend, layout)
        assert ((g.cpu().double() - total).abs() <= allowed).all()
        assert torch.equal(memory[:shift], before[:shift])
        assert torch.equal(memory[shift + numel :], before[shift + numel :])


@pytest.mark.parametrize("n", ["guided", 2])
@pytest.mark.parametrize("parts", [1, 3])
def test_shards_equal_the_whole(backend, device, n, parts, generator):
    """The tail too; a factor belongs to the whole parameter, so each shard has its own copy."""
    theta, g, m, v = torch.randn(4, 12, 24, generator=generator).to(device)
    alpha, norm = (0.1 + torch.rand(12, 6, generator=generator)).to(device), torch.tensor(3.0, device=device)
    losses = losses_of(n, generator, device)
    options = {
        "grid": fk.Grid.half_offset(2), "straight_through": IDENTITY, "one_minus_beta": 0.2, "seed": 1,
        "backend": backend,
    }  # fmt: skip

    def run(pieces, **shards):
        theta, g, m, v, alpha = ([t.clone() for t in ts] for ts in pieces)
        factors = torch.full((len(theta),), 1.5, device=device)
        q, probe = ([poisoned(t, F32) for t in theta] for _ in "qp")
        G = [t.clone() for t in g]
        options_here = {**options, **shards, "noise_factors": factors}
        fk.perturb_quantize_(probe, None, theta, g, alpha, norm, **options_here)
        fk.estimate_gradient_(G, *losses, alpha, norm, **options_here)
        states = m, [t.abs() for t in v]
        fk.estimate_adamw_(
            theta, g, *states, *losses, alpha, norm, lr=0.1, optimizer_step=1, quantized=q, **options_here
        )
        return probe, G, theta, q, *states

    whole = run([[t] for t in (theta, g, m, v, alpha)], tensor_ids=[9])
    for dim, cut, layouts in shards_of((theta, g, m, v, alpha), parts):
        for pieces, expected in zip(run(cut, tensor_ids=[9] * parts, layouts=layouts), whole, strict=True):
            assert torch.equal(torch.cat(pieces, dim), expected[0])


@pytest.mark.parametrize("block", [16, 128, 1024])
@pytest.mark.parametrize("shift", [0, 1])
def test_noise_around_a_transform_is_rotated_and_scaled(backend, device, block, shift, generator):
    """G = A g + H(t B m / delta), guided, by the matrix in float64."""
    memory = torch.randn(2, 3 * block + shift, generator=generator).to(device)
    grads, t = [row[shift:] for row in memory], (0.5, 2.0)
    alpha, norm = torch.tensor(0.4, device=device), torch.tensor(2.5, device=device)
    grid = fk.Grid.half_offset(2)
    options = {"grid": grid, "straight_through": IDENTITY, "one_minus_beta": OMB, "seed": SEED, "step": STEP}
    before = [g.clone() for g in grads]
    fk.estimate_gradient_(
        grads, None, None, [alpha] * 2, norm, transform=fk.Hadamard(block), backend=backend,
        noise_factors=torch.tensor(t, device=device), **options,
    )  # fmt: skip
    for i, (old, G) in enumerate(zip(before, grads, strict=True)):
        u = fk.noise(3 * block, "uniform", seed=SEED, step=STEP, tensor_id=i, backend="reference").double()
        noise = 2.5 * OMB**0.5 * t[i] * u / 0.4
        total = (1 - OMB) ** 0.5 * old.double().cpu() + (noise.view(-1, block) @ matrix(block)).flatten()
        size = noise.view(-1, block).abs().sum(1).repeat_interleave(block) / block**0.5
        allowed = (math.log2(block) + 6) * 2.0**-24 * size + 2.0**-22 * total.abs()
        assert ((G.double().cpu() - total).abs() <= allowed).all()


# ---- limits


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("per_tensor", [False, True])
@pytest.mark.parametrize("block", [0, 64])
def test_without_noise_g_stays_bit_for_bit(backend, device, dtype, per_tensor, block, generator):
    shapes, factors = ((8, 64), (0, 64), (5, 128)), torch.tensor([0.5, 1.0, 2.0], device=device)
    grads = [(torch.randn(s, generator=generator) * 1e-4).to(dtype).to(device) for s in shapes]
    alphas, before = [torch.full((), 0.3, device=device)] * 3, [g.clone() for g in grads]
    norm = fk.guide_norm(grads, alphas, grid=fk.Grid.uniform(4), backend=backend)
    fk.estimate_gradient_(
        grads, None, None, alphas, norm, grid=fk.Grid.uniform(4), one_minus_beta=0.0, backend=backend, seed=1,
        straight_through=IDENTITY, transform=fk.Hadamard(block) if block else None,
        noise_factors=factors if per_tensor else None,
    )  # fmt: skip
    assert all(map(torch.equal, grads, before))


def test_a_factor_of_0_leaves_the_guide_alone(backend, device, generator):
    grads, alphas = tensors(generator, F32, "row", device)
    before, norm = [g.clone() for g in grads], torch.tensor(1.5, device=device)
    factors = torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0], device=device)
    options = {"grid": fk.Grid.uniform(4), "straight_through": IDENTITY, "one_minus_beta": 0.75, "seed": 1}
    fk.estimate_gradient_(grads, None, None, alphas, norm, noise_factors=factors, backend=backend, **options)
    for t, g, old in zip(factors.tolist(), grads, before, strict=True):
        assert torch.equal(g, old * 0.5) == (t == 0.0)  # sqrt(beta) = 1/2


def everything(backend, generator, n, factors, transform=None, **options):
    """All that probes, estimate and tail write."""
    shapes = ((32, 64), (8, 64), (3, 192), (1, 64), (0, 64), (5,))
    s = Setup(backend, generator, DTYPES[1], "row", shapes=shapes)
    s.losses = list(losses_of(n, generator, device_of(backend)))
    s.options |= {"noise_factors": factors, "transform": transform, **options}
    probes = [[poisoned(t, INT8) for t in s.latents[:QUANTIZED]] for _ in "+-"]
    fk.perturb_quantize_(*probes, s.latents[:QUANTIZED], s.grads[:QUANTIZED], s.alphas, s.norm, **s.options)
    G = s.estimates()
    s.run("adamw", t=2)
    return [*probes[0], *probes[1], *G, *s.latents, *s.quantized, *s.states[0], *s.states[1]]


@pytest.mark.parametrize("n", ["guided", 2])
@pytest.mark.parametrize("transform", [None, fk.Hadamard(64)], ids=str)
def test_factors_of_1_and_scalars_on_the_device_change_nothing(backend, device, n, transform, generator):
    """Bit for bit: other kernels, or other code, may serve them."""
    seed, found = generator.initial_seed(), []
    at = {"seed": torch.tensor(77, device=device), "step": torch.tensor(4, device=device)}
    at["one_minus_beta"] = torch.tensor(1e-2, dtype=F64, device=device)
    for factors, options in ((None, {}), (torch.ones(QUANTIZED, device=device), {}), (None, at)):
        found.append(everything(backend, torch.Generator().manual_seed(seed), n, factors, transform, **options))
    assert all(map(torch.equal, found[0], found[1]))
    assert all(map(torch.equal, found[0], found[2]))


# ---- the fused tail


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("n", ["guided", 2])
def test_the_tail_is_estimate_then_step_then_quantize(backend, device, rule, dtypes, n, generator):
    s = Setup(backend, generator, dtypes)
    s.losses = list(losses_of(n, generator, device))
    s.options["noise_factors"] = torch.tensor(FACTORS, device=device)
    for t in (1, 50):
        G, thetas, grads = s.estimates(), s.thetas(), [g.clone() for g in s.grads]
        assert not torch.equal(G[0], s.grads[0].float())
        states = [[x.clone() for x in xs] for xs in s.states]
        s.run(rule, t=t)
        for i, theta in enumerate(thetas):
            new, state = stepped(rule, theta, G[i], [xs[i] for xs in states], 0.03, t)
            if s.masters:
                assert torch.equal(s.masters[i], new), i
            assert torch.equal(s.latents[i], new.to(s.latents[i].dtype)), i
            state = [*state, *(xs[i] for xs in states[len(state) :])]
            assert all(torch.equal(found[i], x) for found, x in zip(s.states, state, strict=True))
            assert torch.equal(s.grads[i], grads[i])
        assert s.q_is_that_of_the_latents()


@pytest.mark.parametrize("case", GRID_CASES, ids=GRID_IDS)
@pytest.mark.parametrize("kind", ["tensor", "group"])
@pytest.mark.parametrize("per_tensor", [False, True])
def test_the_guided_tail_is_its_parts_on_every_grid(backend, device, case, kind, per_tensor, generator):
    s = Setup(backend, generator, DTYPES[0], kind, case, SHAPES)
    s.losses = [None, None]
    s.options["noise_factors"] = torch.tensor(FACTORS, device=device) if per_tensor else None
    G, thetas, states = s.estimates(), s.thetas(), [[x.clone() for x in xs] for xs in s.states]
    s.run("adamw", t=3)
    for i, theta in enumerate(thetas):
        new, _ = stepped("adamw", theta, G[i], [xs[i] for xs in states], 0.03, 3)
        assert torch.equal(s.latents[i], new), i
    assert s.q_is_that_of_the_latents()


# ---- what is lost


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("master", [False, True])
def test_a_lost_norm_leaves_the_gradient_and_skips_the_step(backend, device, bad, master, generator):
    s = Setup(backend, generator, (BF16, BF16, BF16, master))
    s.losses, s.norm = [None, None], torch.tensor(bad, device=device)
    counters = torch.zeros(3, dtype=torch.int64, device=device)
    G = [g.clone() for g in s.grads[:QUANTIZED]]
    fk.estimate_gradient_(G, None, None, s.alphas, s.norm, counters=counters, **s.options)
    assert all(map(torch.equal, G, s.grads))
    assert counters.tolist() == [0, 1, 0]
    before = [t.clone() for ts in (s.latents, s.masters or [], *s.states) for t in ts]
    s.run("adamw", counters=counters)
    assert counters.tolist() == [0, 2, 0]
    assert all(map(torch.equal, (t for ts in (s.latents, s.masters or [], *s.states) for t in ts), before))
    assert s.q_is_that_of_the_latents()


def test_a_norm_of_0_makes_no_noise(backend, device, generator):
    s = Setup(backend, generator, DTYPES[1])
    s.losses, s.norm = [None, None], torch.tensor(0.0, device=device)
    counters = torch.zeros(3, dtype=torch.int64, device=device)
    for g in s.grads:
        g.zero_()
    assert not any(G.any() for G in s.estimates())
    s.run("momentum", counters=counters)
    assert counters.tolist() == [0, 0, 0]
    assert all(bool(torch.isfinite(t).all()) for t in s.latents + s.quantized)


# ---- arguments


@pytest.mark.parametrize("change", ["plus", "minus"])
def test_one_of_the_losses_alone_is_refused(backend, device, change, generator):
    s = Setup(backend, generator, DTYPES[1])
    s.losses[change == "minus"] = None
    before = [t.clone() for t in s.latents]
    with pytest.raises(
        TypeError, match=f"losses_{change} must be a Tensor where the other losses are one, got None"
    ):
        s.run("adamw")
    assert all(map(torch.equal, s.latents, before))


def test_factors_of_the_tail_belong_to_alphas(backend, device, generator):
    s = Setup(backend, generator, DTYPES[1])
    s.options["noise_factors"] = torch.ones(len(s.latents), device=device)
    message = re.escape("noise_factors must be a contiguous float32 tensor of shape (5,), got float32 (8,)")
    for prepared in (False, True):
        if prepared:
            s.prepare()
        with pytest.raises(TypeError, match=message):
            s.run("adamw")


def test_prepared_lists_give_the_same(backend, device, generator):
    seed, found = generator.initial_seed(), []
    for prepared in (False, True):
        s = Setup(backend, torch.Generator().manual_seed(seed), DTYPES[1])
        s.losses, s.options["noise_factors"] = [None, None], torch.tensor(FACTORS, device=device)
        if prepared:
            s.prepare()
        for t in (1, 2):
            s.run("adamw", t=t)
        found.append([*s.latents, *s.quantized])
    assert all(map(torch.equal, *found))
