"""Every backend against the float64 formulas and the reference, on fresh random input."""

import numpy as np
import pytest
import torch
from conftest import BACKENDS, device_of
from hypothesis import given
from hypothesis import strategies as st
from support.samples import GRID_CASES, GRID_IDS, IDENTITY, alphas_for, poisoned
from support.tolerances import (
    DERIVATIVE_TOLERANCE,
    EXACT,
    INEXACT,
    M_TOLERANCE,
    N_TOLERANCE,
    SMALLEST,
    coefficient,
    estimate_error,
    m_of,
)

import fogzo_kernels as fk
from fogzo_kernels.spec.grid import FLOATS
from fogzo_kernels.spec.noise import DISTRIBUTIONS, philox4x32

SIZES = (0, 1, 7, 8, 9, 1023, 65537)
OFFSETS = (0, 3, 8, 2**34 + 5)
TRUST = fk.StraightThrough("identity", clip="trust")
DERIVATIVES = [*GRID_CASES, (fk.Grid.half_offset(2), TRUST), (fk.Grid.uniform(3), TRUST)]


def model(generator, dtype, kind="row", shapes=((33, 20), (8, 64), (7, 4), (1, 4), (0, 4))):
    latents = [torch.randn(s, generator=generator).to(dtype) for s in shapes]
    grads = [(torch.randn(s, generator=generator) * 1e-3).to(dtype) for s in shapes]
    return latents, grads, [alphas_for(s, kind, generator) for s in shapes]


def to(device, *lists):
    return [[t.to(device) for t in tensors] for tensors in lists]


# ---- noise


@pytest.mark.parametrize("distribution", EXACT + INEXACT)
@pytest.mark.parametrize("numel", SIZES)
def test_noise_is_the_formula(backend, distribution, numel, generator):
    seed, step = (torch.randint(2**31, (2,), generator=generator)).tolist()
    for offset in OFFSETS:
        u = fk.noise(
            numel,
            distribution,
            seed=seed,
            step=step,
            direction=3,
            tensor_id=17,
            layout=(offset, max(numel, 1), max(numel, 1)),
            device=device_of(backend),
            backend=backend,
        )
        assert u.shape == (numel,)
        assert u.dtype == torch.float32
        picked = sorted({j for j in (0, 1, 2, 6, 7, 8, 63, 1022, 16384, numel - 1) if 0 <= j < numel})
        for j in picked:
            e = offset + j
            chunk = e >> 3
            counter = (chunk & 0xFFFFFFFF, (chunk >> 32) | 3 << 16, step, 17)
            word = philox4x32(counter, (seed, 0))[(e >> 1) & 3]
            halves = np.array([word & 0xFFFF]), np.array([word >> 16])
            m = m_of(distribution, *halves, np.array([e & 1], dtype=bool))[0]
            C = DISTRIBUTIONS[distribution]
            tolerance = C * M_TOLERANCE[backend][distribution] + 2.0**-23 * abs(C * m)
            assert abs(u[j].item() - C * m) <= tolerance, (offset, j)


@pytest.mark.parametrize("distribution", INEXACT)
def test_inexact_noise_over_every_half(backend, distribution):
    """2^20 elements see every k many times; the reference is within 2e-6 by its own test above."""
    u, expected = (
        fk.noise(2**20, distribution, seed=99, device=device_of(b), backend=b).cpu().double()
        for b in (backend, "reference")
    )
    allowed = M_TOLERANCE[backend][distribution] + M_TOLERANCE["reference"][distribution]
    assert (u - expected).abs().max() <= DISTRIBUTIONS[distribution] * allowed + 1e-6


@pytest.mark.parametrize("distribution", EXACT)
@pytest.mark.parametrize("numel", SIZES)
def test_exact_noise_is_equal_bit_for_bit(backend, distribution, numel):
    for layout in ((5, max(numel, 1), max(numel, 1)), (2**34 + 8, 16, 48), (1, 5, 9)):
        u, expected = (
            fk.noise(
                numel,
                distribution,
                seed=2**63 + 9,
                step=2**32 - 1,
                direction=2**16 - 1,
                tensor_id=2**32 - 2,
                layout=layout,
                device=device_of(b),
                backend=b,
            ).cpu()
            for b in (backend, "reference")
        )
        assert torch.equal(u, expected), layout


@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize("distribution", EXACT + INEXACT)
def test_shards_equal_the_whole(backend, distribution, parts):
    """A (30, 24) parameter cut by rows, by columns, and both ways."""
    rows, columns = 30, 24
    names = {"seed": 5, "step": 2, "tensor_id": 4, "backend": backend, "device": device_of(backend)}
    whole = fk.noise(rows * columns, distribution, **names).view(rows, columns)
    for row_parts, column_parts in ((parts, 1), (1, parts), (parts, parts)):
        h, w = rows // row_parts, columns // column_parts
        for i in range(row_parts):
            for j in range(column_parts):
                layout = (i * h * columns + j * w, w, columns)
                shard = fk.noise(h * w, distribution, layout=layout, **names).view(h, w)
                assert torch.equal(shard, whole[i * h : (i + 1) * h, j * w : (j + 1) * w])


# ---- guide norm


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("kind", ["tensor", "row", "group"])
def test_guide_norm_is_the_float64_norm(backend, device, dtype, kind, generator):
    _, grads, alphas = model(generator, dtype, kind)
    for grid in (fk.Grid.uniform(2), fk.Grid.sign()):
        exact = sum(
            (
                g.double()
                * (a.double() * grid.r)
                .reshape(-1, 1)
                .expand(-1, g.numel() // max(a.numel(), 1))
                .reshape(g.shape)
            )
            .square()
            .sum()
            for g, a in zip(grads, alphas, strict=True)
        ).sqrt()
        found = [fk.guide_norm(*to(device, grads, alphas), grid=grid, backend=backend) for _ in "ab"]
        assert found[0].dtype == torch.float32
        assert found[0].shape == ()
        assert torch.equal(found[0], found[1])
        assert abs(found[0].item() - exact.item()) <= N_TOLERANCE * exact.item()


def test_norm_does_not_depend_on_threads(generator):
    grads, alpha = torch.randn(300_000, generator=generator), torch.tensor(0.3)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(fk.guide_sumsq(grads, alpha, grid=fk.Grid.uniform(2), backend="cpu"))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


# ---- perturb and quantize


def perturbed(backend, latents, grads, alphas, norm, out_dtype, **kwargs):
    device = device_of(backend)
    latents, grads, alphas = to(device, latents, grads, alphas)
    before = [t.clone() for t in latents + grads]
    out = [[poisoned(t, out_dtype) for t in latents] for _ in "+-"]
    fk.perturb_quantize_(*out, latents, grads, alphas, norm.to(device), backend=backend, **kwargs)
    assert all(torch.equal(a, b) for a, b in zip(before, latents + grads, strict=True))
    return [[t.cpu() for t in side] for side in out]


def agrees(distribution, found, expected, codes, alphas, r):
    """Exact distributions: equal. Others: a code may move by one where y lies at a tie."""
    for x, y, alpha in zip(found, expected, alphas, strict=True):
        if distribution in EXACT:
            assert torch.equal(x, y)
        elif x.numel():
            unit = 1.0 if codes else (alpha * r).max().item()
            different = (x.float() - y.float()).abs()
            assert different.max() <= 1.01 * unit
            # y moves by at most eps C 1e-4 < 1e-4, so about 2e-4 of all codes may differ
            assert (different > 0).sum() <= 1 + 2e-3 * x.numel()


@pytest.mark.parametrize(("grid", "straight_through"), GRID_CASES, ids=GRID_IDS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("kind", ["tensor", "row", "group"])
def test_perturb_agrees_with_the_reference(backend, grid, straight_through, dtype, kind, generator):
    latents, grads, alphas = model(generator, dtype, kind)
    options = {
        "grid": grid, "straight_through": straight_through, "one_minus_beta": 1e-3,
        "seed": 12345678901, "step": 6, "direction": 1,
    }  # fmt: skip
    norm = fk.guide_norm(grads, alphas, grid=grid, backend="reference")
    for out_dtype in (dtype, torch.int8):
        inputs = (latents, grads, alphas, norm, out_dtype)
        found = perturbed(backend, *inputs, **options)
        expected = perturbed("reference", *inputs, **options)
        for x, y in zip(found, expected, strict=True):
            codes = out_dtype == torch.int8
            agrees(straight_through.distribution, x, y, codes, alphas, grid.r)
    one_sided = [poisoned(t, dtype).to(device_of(backend)) for t in latents]
    lists = to(device_of(backend), latents, grads, alphas)
    norm_there = norm.to(device_of(backend))
    fk.perturb_quantize_(None, one_sided, *lists, norm_there, backend=backend, **options)
    both = perturbed(backend, latents, grads, alphas, norm, dtype, **options)[1]
    assert all(torch.equal(a.cpu(), b) for a, b in zip(one_sided, both, strict=True))


@pytest.mark.parametrize("numel", SIZES)
@pytest.mark.parametrize("offset", OFFSETS)
def test_perturb_agrees_at_any_size_offset_and_alignment(backend, numel, offset, generator):
    """Odd sizes, element offsets that no chunk starts at, and memory off 16-byte boundaries."""
    storage = torch.randn(2, numel + 3, generator=generator).to(device_of(backend))
    for shift in (0, 1):
        theta, g = (row[shift : shift + numel] for row in storage)
        alpha = torch.tensor(0.4)
        options = {
            "grid": fk.Grid.uniform(3), "straight_through": IDENTITY, "one_minus_beta": 0.3,
            "seed": 8, "layouts": [(offset, max(numel, 1), max(numel, 1))], "tensor_ids": [3],
        }  # fmt: skip
        inputs = ([theta], [g], [alpha], torch.tensor(2.5), torch.float32)
        for x, y in zip(
            perturbed(backend, *inputs, **options),
            perturbed("reference", *inputs, **options),
            strict=True,
        ):
            assert torch.equal(x[0], y[0])


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_perturb_and_estimate_of_shards_equal_the_whole(backend, device, parts, generator):
    """Rows and columns of a (12, 24) parameter; a group of alpha lies within one shard."""
    theta, g = torch.randn(2, 12, 24, generator=generator).to(device)
    alpha = (0.1 + torch.rand(12, 6, generator=generator)).to(device)
    norm = torch.tensor(3.0, device=device)
    options = {
        "grid": fk.Grid.half_offset(2),
        "straight_through": IDENTITY,
        "one_minus_beta": 0.2,
        "seed": 1,
        "backend": backend,
    }
    losses = torch.tensor([1.0, 2.0], device=device), torch.tensor([0.5, 2.5], device=device)

    def run(theta, g, alpha, **shards):
        q, G = [poisoned(t, t.dtype) for t in theta], [t.clone() for t in g]
        fk.perturb_quantize_(q, None, theta, g, alpha, norm, **options, **shards)
        fk.estimate_gradient_(G, *losses, alpha, norm, **options, **shards)
        return q, G

    whole = run([theta], [g], [alpha], tensor_ids=[9])
    for dim in (0, 1):
        cut = [t.chunk(parts, dim) for t in (theta, g, alpha)]
        cut = [[t.contiguous() for t in pieces] for pieces in cut]
        size = theta.shape[dim] // parts
        layouts = [
            (i * size * 24, size * 24, size * 24) if dim == 0 else (i * size, size, 24) for i in range(parts)
        ]
        found = run(*cut, tensor_ids=[9] * parts, layouts=layouts)
        for pieces, expected in zip(found, whole, strict=True):
            assert torch.equal(torch.cat(pieces, dim), expected[0])


# ---- estimate


@pytest.mark.parametrize(("grid", "straight_through"), GRID_CASES, ids=GRID_IDS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("kind", ["tensor", "row", "group"])
@pytest.mark.parametrize("n", [1, 3])
def test_estimate_is_the_float64_formula(backend, device, grid, straight_through, dtype, kind, n, generator):
    _, grads, alphas = model(generator, dtype, kind)
    norm = fk.guide_norm(grads, alphas, grid=grid, backend="reference")
    plus, minus = 1 + torch.rand(2, n, generator=generator)
    omb, seed, step = 1e-2, 77, 4
    found = [g.to(device, copy=True) for g in grads]
    counters = torch.zeros(3, dtype=torch.int64, device=device)
    fk.estimate_gradient_(
        found,
        plus.to(device),
        minus.to(device),
        [a.to(device) for a in alphas],
        norm.to(device),
        grid=grid,
        straight_through=straight_through,
        one_minus_beta=omb,
        seed=seed,
        step=step,
        counters=counters,
        backend=backend,
    )
    assert counters.tolist() == [0, 0, 0]
    C = coefficient(straight_through)
    c = (plus.double() - minus.double()) / (2 * straight_through.epsilon(grid)) / n
    for i, (g, alpha, G) in enumerate(zip(grads, alphas, found, strict=True)):
        if not g.numel():
            continue
        delta = (alpha.double() * grid.r).flatten().repeat_interleave(g.numel() // alpha.numel())
        terms = [
            c[j] * (1 - omb) ** 0.5 * fk.direction_sign(seed, step, j) / norm.double() * g.double().flatten()
            for j in range(n)
        ]
        for j in range(n):
            u = fk.noise(
                g.numel(),
                straight_through.distribution,
                seed=seed,
                step=step,
                direction=j,
                tensor_id=i,
                backend="reference",
            )
            terms.append(c[j] * omb**0.5 * C / delta * (u.double() / C))
        total = sum(terms)
        noise = sum(abs(c[j]) for j in range(n)) * omb**0.5 * C / delta
        tolerance = M_TOLERANCE[backend][straight_through.distribution]
        tolerance += M_TOLERANCE["reference"][straight_through.distribution]
        allowed = estimate_error(terms, total, noise, tolerance, dtype)
        error = (G.cpu().double().flatten() - total).abs()
        assert (error <= allowed).all(), (error / allowed).max()


# ---- quantizer and straight-through derivative


@pytest.mark.parametrize(("grid", "straight_through"), DERIVATIVES, ids=[*GRID_IDS, "trust-4", "trust-8"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("kind", ["tensor", "row", "group"])
def test_quantize_and_its_derivative_are_the_float64_formulas(
    backend, device, grid, straight_through, dtype, kind, generator
):
    latents, grads, alphas = model(generator, dtype, kind)
    expected, slopes = [], []
    for t, alpha in zip(latents, alphas, strict=True):
        delta = (alpha * grid.r).flatten().repeat_interleave(t.numel() // max(alpha.numel(), 1))
        inv = 1 / delta
        w = (t.flatten().double() * inv.double() - grid.offset).float().view(t.shape)
        code = torch.round(w.clamp(grid.qmin, grid.qmax))
        expected.append((code, (delta * (code.flatten() + grid.offset)).view(t.shape).to(dtype)))
        x = (t.flatten().float() * inv * grid.r).view(t.shape).double()
        slopes.append({
            "identity_clipped": (w > grid.qmin) & (w < grid.qmax),
            "identity_trust": (code - w).abs() <= 0.5,
            "identity": x == x,
            "hardtanh": x.abs() < 1,
            "tanh": 1 - torch.tanh(x) ** 2,
            "approxsign": (2 - 2 * x.abs()).clamp(min=0),
        }[straight_through.variant].double())  # fmt: skip
    lists = to(device, latents, alphas)
    for out_dtype in (torch.int8, dtype):
        out = [poisoned(t, out_dtype) for t in lists[0]]
        fk.quantize_(out, *lists, grid=grid, backend=backend)
        for q, (code, value), alpha in zip(out, expected, alphas, strict=True):
            assert torch.equal(q.cpu().to(dtype), (code if out_dtype == torch.int8 else value).to(dtype))
            if out_dtype == torch.int8:
                assert torch.equal(fk.dequantize(q.cpu(), alpha, grid=grid, dtype=dtype), value)
    g = [x.to(device, copy=True) for x in grads]
    options = {"grid": grid, "straight_through": straight_through, "backend": backend}
    fk.straight_through_backward_(g, *lists, **options)
    for found, grad, slope in zip(g, grads, slopes, strict=True):
        exact = (grad.double() * slope).to(dtype).double()
        # The slope's own error, and an ulp of the dtype for the product and its conversion; a slope
        # of 0 or 1 makes both exact.
        tolerance = {"tanh": DERIVATIVE_TOLERANCE, "approxsign": 2.0**-23}.get(straight_through.kind, 0.0)
        ulp = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}[dtype]
        allowed = grad.double().abs() * tolerance
        if tolerance:
            allowed += exact.abs() * ulp + SMALLEST[dtype]
        assert ((found.cpu().double() - exact).abs() <= allowed).all()


@pytest.mark.parametrize("bits", range(1, 9))
def test_a_grid_of_b_bits_has_two_to_the_b_values(backend, device, bits):
    """A grid of b bits has 2^b values (not one more or less)."""
    theta = torch.linspace(-300, 300, 60_001, device=device)
    grids = [fk.Grid.half_offset(bits)] + ([fk.Grid.uniform(bits)] if bits > 1 else [])
    for grid in grids:
        out = poisoned(theta, theta.dtype)
        fk.quantize_(out, theta, torch.ones((), device=device), grid=grid, backend=backend)
        assert len(out.unique()) == grid.levels == 2**bits
    for grid, levels in ((fk.Grid.ternary(), 3), (fk.Grid.sign(), 2)):
        out = poisoned(theta, theta.dtype)
        fk.quantize_(out, theta, torch.ones((), device=device), grid=grid, backend=backend)
        assert len(out.unique()) == grid.levels == levels
    zero, one = torch.zeros(1, device=device), torch.ones((), device=device)
    sign_of_zero = poisoned(zero, zero.dtype)
    fk.quantize_(sign_of_zero, zero, one, grid=fk.Grid.sign(), backend=backend)
    assert sign_of_zero.item() == 1.0


# ---- properties


@given(data=st.data())
def test_backends_agree_on_any_shard(data):
    """Any size, layout, dtype, grid and name: the codes of the exact distributions are equal."""
    numel = data.draw(st.integers(0, 300), "numel")
    inner = data.draw(st.integers(1, 64), "inner")
    layout = (data.draw(st.integers(0, 2**40), "offset"), inner, inner + data.draw(st.integers(0, 50)))
    seed, step = data.draw(st.integers(0, 2**64 - 1)), data.draw(st.integers(0, 2**32 - 1))
    dtype = data.draw(st.sampled_from(FLOATS))
    distribution = data.draw(st.sampled_from(EXACT))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    theta, g = torch.randn(2, numel, generator=generator).to(dtype)
    options = {
        "grid": data.draw(st.sampled_from([fk.Grid.uniform(3), fk.Grid.half_offset(2)])),
        "straight_through": fk.StraightThrough("identity", noise=distribution),
        "one_minus_beta": data.draw(st.floats(0, 1)), "seed": seed, "step": step,
        "direction": data.draw(st.integers(0, 2**16 - 1)), "layouts": [layout],
        "tensor_ids": [data.draw(st.integers(0, 2**32 - 2))],
    }  # fmt: skip
    inputs = ([theta], [g], [torch.tensor(0.7)], torch.tensor(4.0), torch.int8)
    here = [b for b in BACKENDS if fk.available_backends(device_of(b))[b] is None]
    results = [perturbed(b, *inputs, **options) for b in here]
    for plus, minus in results[1:]:
        assert torch.equal(plus[0], results[0][0][0])
        assert torch.equal(minus[0], results[0][1][0])
