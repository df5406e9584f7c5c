"""Gradients of learned scales on every backend, against independent float64 programs (contract section 4)."""

import math
import re

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fogzo_kernels as fk
from fogzo_kernels.spec.grid import FLOATS

NAN, INF = math.nan, math.inf
IDENTITY = fk.StraightThrough("identity", clip=False)
CLIPPED = fk.StraightThrough("identity")
SIGNS = [fk.StraightThrough(kind) for kind in ("hardtanh", "tanh", "approxsign")]
CASES = [
    (fk.Grid.uniform(2), CLIPPED), (fk.Grid.uniform(8), IDENTITY), (fk.Grid.half_offset(1), CLIPPED),
    (fk.Grid.half_offset(3), IDENTITY), (fk.Grid.ternary(), CLIPPED), (fk.Grid(3, 3, 0.0, 1), CLIPPED),
    *((fk.Grid.sign(), kind) for kind in SIGNS),
]  # fmt: skip
IDS = [f"{s.variant}-{g.levels}-{g.offset}" for g, s in CASES]
#: Programs of a GPU take 2048 to 16384 elements, tasks of the CPU 32768: alphas within one, cut, over many.
SHAPES = [
    ((5, 24), (5, 1)), ((4, 64), (4, 8)), ((3, 7), (3, 1)), ((6, 6), (6, 3)), ((9,), ()), ((8,), (1,)),
    ((1,), ()), ((), ()), ((4, 5, 8), (4,)), ((4, 5, 8), (4, 5)), ((3, 8), (3, 8)), ((2, 3), (2, 3)),
    ((0, 4), (3, 5)), ((5, 0), (5, 1)), ((17, 8), ()),
]  # fmt: skip
LONG = [
    ((2, 16384), (2, 1)), ((3, 20000), (3, 1)), ((3, 11001), (3, 1)), ((70001,), ()), ((65536,), ()),
    ((4, 16392), (4, 3)), ((2, 40000), (2, 2)), ((100, 1000), (100, 1)), ((16385,), ()),
]  # fmt: skip
LSQ = 1e-5  # relative to the sum of absolute terms: contract section 6


# ---- independent: numpy, in float64 but for z, whose roundings the contract pins


def cells(alpha, length):
    return np.repeat(alpha.numpy().reshape(-1), length)


def terms_of(theta, grad, alpha, grid):
    """dL/dQ * dQ/dalpha of each element."""
    theta, grad = (t.float().numpy().reshape(-1) for t in (theta, grad))
    delta = cells(alpha, theta.size // max(alpha.numel(), 1)) * np.float32(grid.r)
    inv = (np.float32(1) / delta).astype(np.float32)
    z = (theta.astype(np.float64) * inv - grid.offset).astype(np.float32).astype(np.float64)
    code = np.clip(np.rint(z), grid.qmin, grid.qmax)
    code[np.isnan(z)] = grid.qmin
    slope = grid.r * (code + grid.offset)
    if not grid.is_sign:
        inside = (z >= grid.qmin) & (z <= grid.qmax)
        slope[inside] = (code - z)[inside]
    return grad.astype(np.float64) * slope


def wanted(theta, grad, alpha, grid, factor):
    """The gradient of alpha, and by how much a backend may differ."""
    terms = terms_of(theta, grad, alpha, grid)
    length = terms.size // max(alpha.numel(), 1)
    each = terms.reshape(alpha.numel(), length)
    exact, size = each.sum(1) * factor, np.abs(each).sum(1) * abs(factor)
    off = LSQ * size + abs(factor) * length * 2.0**-149 + 2.0**-149
    return (torch.from_numpy(x).view(alpha.shape) for x in (exact, off))


def agree(alpha_grads, latents, grads, alphas, grid, factors):
    for i, found in enumerate(alpha_grads):
        exact, off = wanted(latents[i], grads[i], alphas[i], grid, factors[i])
        error = (found.cpu().double() - exact).abs()
        assert found.dtype == torch.float32
        assert (error <= off).all(), f"alpha_grads[{i}]: off by {(error / off).max()} of what is allowed"


def model(generator, shapes, dtypes, theta_scale=1.0):
    latents = [(torch.randn(s, generator=generator) * theta_scale).to(dtypes[0]) for s, _ in shapes]
    grads = [torch.randn(s, generator=generator).to(dtypes[1]) for s, _ in shapes]
    alphas = [0.05 + torch.rand(s, generator=generator) for _, s in shapes]
    factors = [0.25 + i for i in range(len(shapes))]
    return latents, grads, alphas, factors


def run(backend, device, latents, grads, alphas, factors, grid, straight_through):
    """g, which must be what straight_through_backward_ gives to the bit, and the alphas' gradients."""
    latents, alphas, once, g = ([t.to(device).clone() for t in x] for x in (latents, alphas, grads, grads))
    options = {"grid": grid, "straight_through": straight_through, "backend": backend}
    alpha_grads = [torch.full_like(a, NAN) for a in alphas]
    kept = [t.clone() for t in (*latents, *alphas)]
    fk.learned_backward_(g, alpha_grads, latents, alphas, factors=factors, **options)
    fk.straight_through_backward_(once, latents, alphas, **options)
    for a, b in zip((*g, *latents, *alphas), (*once, *kept), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    return g, alpha_grads


# ---- every grid, kind, dtype, granularity


@pytest.mark.parametrize(("grid", "straight_through"), CASES, ids=IDS)
@pytest.mark.parametrize("dtypes", [(a, b) for a in FLOATS for b in FLOATS], ids=str)
def test_gradients_of_alphas_are_the_float64_formula(
    backend, device, grid, straight_through, dtypes, generator
):
    given = model(generator, SHAPES, dtypes, theta_scale=0.3 * grid.levels)
    _, found = run(backend, device, *given, grid, straight_through)
    agree(found, *given[:3], grid, given[3])
    assert any(f.numel() > 1 and f.unique().numel() > 1 for f in found)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.bfloat16, torch.float16)], ids=str)
@pytest.mark.parametrize("shape", LONG, ids=str)
def test_an_alpha_over_many_programs_gets_its_whole_sum(backend, device, shape, dtypes, generator):
    """Behind a short tensor, so that programs and elements are counted from different places."""
    given = model(generator, [((3, 8), (3, 1)), shape], dtypes)
    _, found = run(backend, device, *given, fk.Grid.uniform(2), CLIPPED)
    agree(found, *given[:3], fk.Grid.uniform(2), given[3])


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16)], ids=str)
@pytest.mark.parametrize("shapes", [
    [((3, 1024), (3, 1)), ((6, 3072), (6, 1)), ((2, 5, 2048), (2,))],
    [((130, 128), (130, 1)), ((45, 384), (45, 1)), ((3, 4, 256), (3, 4)), ((0, 128), (7,))],
    [((0, 3), (3,)), ((2, 9216), (2, 1)), ((3, 8), (3, 1)), ((7, 640), (7, 5)), ((5000,), ())],
], ids=["by 1024", "by 128", "mixed"])  # fmt: skip
def test_alphas_of_many_elements_get_their_whole_sums(backend, device, shapes, dtypes, generator):
    """Long ones are added up faster; some are cut by the 16,384 elements of a program, some end in them."""
    given = model(generator, shapes, dtypes)
    _, found = run(backend, device, *given, fk.Grid.uniform(2), CLIPPED)
    agree(found, *given[:3], fk.Grid.uniform(2), given[3])


def test_one_list_of_all_shapes_is_the_float64_formula(backend, device, generator):
    shapes = [*SHAPES, ((3, 6001), (3, 1)), ((2, 20000), (2, 1))]
    given = model(generator, shapes, (torch.float32, torch.bfloat16))
    _, found = run(backend, device, *given, fk.Grid.uniform(3), IDENTITY)
    agree(found, *given[:3], fk.Grid.uniform(3), given[3])


@st.composite
def tensor_with_alpha(draw):
    sizes = tuple(draw(st.lists(st.integers(0, 9), max_size=3)))
    scales = [(), (1,) * (len(sizes) + 1), *(sizes[:i] for i in range(1, len(sizes) + 1))]
    if sizes and draw(st.booleans()):
        groups = [g for g in range(1, sizes[-1] + 1) if sizes[-1] % g == 0] or [1]
        return sizes, (*sizes[:-1], draw(st.sampled_from(groups)))
    return sizes, draw(st.sampled_from(scales))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_shape_at_any_place_is_the_float64_formula(backend, device, data):
    """Odd sizes, in memory that begins between two chunks; nothing beside the outputs is written."""
    shapes = data.draw(st.lists(tensor_with_alpha(), min_size=1, max_size=4))
    grid, straight_through = data.draw(st.sampled_from(CASES))
    dtypes = data.draw(st.tuples(st.sampled_from(FLOATS), st.sampled_from(FLOATS)))
    shift = data.draw(st.integers(0, 9))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    latents, grads, alphas, factors = model(generator, shapes, dtypes)

    def moved(t):
        memory = torch.full((t.numel() + shift + 5,), 77.0, dtype=t.dtype, device=device)
        found = memory[shift : shift + t.numel()].view(t.shape)
        return memory, found.copy_(t)

    g = [moved(t) for t in grads]
    alpha_grads = [moved(torch.full_like(a, NAN)) for a in alphas]
    fk.learned_backward_(
        [t for _, t in g],
        [t for _, t in alpha_grads],
        [moved(t)[1] for t in latents],
        [moved(a)[1] for a in alphas],
        grid=grid,
        straight_through=straight_through,
        factors=factors,
        backend=backend,
    )
    agree([t for _, t in alpha_grads], latents, grads, alphas, grid, factors)
    for memory, t in (*g, *alpha_grads):
        beside = torch.cat([memory[:shift], memory[shift + t.numel() :]])
        assert (beside == 77.0).all()


# ---- values that are special


def one_alpha(backend, device, theta, grad, alpha, grid, straight_through=CLIPPED, factor=1.0):
    """The alpha's gradient, whose float64 value it has."""
    given = [torch.tensor(theta)], [torch.tensor(grad)], [torch.tensor(alpha)], [factor]
    _, found = run(backend, device, *given, grid, straight_through)
    agree(found, *given[:3], grid, given[3])
    return found[0].tolist()


@pytest.mark.parametrize(
    ("theta", "slope"),
    [
        (0.5, -0.5), (1.5, 0.5), (-0.5, 0.5), (-1.5, -0.5), (0.0, 0.0), (-0.0, 0.0), (2.5, -0.5),
        (3.0, 0.0), (-4.0, 0.0), (3.25, 3.0), (-4.25, -4.0), (2.75, 0.25), (-3.75, -0.25),
        (3.0000002, 3.0), (-4.0000005, -4.0), (1e30, 3.0), (-1e30, -4.0), (INF, 3.0), (-INF, -4.0), (NAN, -4.0),
        (1e-40, -1e-40),
    ],
)  # fmt: skip
def test_the_slope_of_one_weight_is_the_papers(backend, device, theta, slope):
    """As the paper has it: round(w) - w within the grid and at its ends, ties to even; the end beyond."""
    assert one_alpha(backend, device, [theta], [1.0], 1.0, fk.Grid.uniform(3)) == pytest.approx(slope)


@pytest.mark.parametrize(("theta", "slope"), [(0.5, 1.0), (-0.5, -1.0), (0.0, 1.0), (-9.0, -1.0), (NAN, -1.0)])
@pytest.mark.parametrize("kind", SIGNS, ids=str)
def test_the_slope_on_the_sign_grid_is_exact(backend, device, theta, slope, kind):
    assert one_alpha(backend, device, [theta], [1.0], 2.0, fk.Grid.sign(), kind) == slope


@pytest.mark.parametrize("alpha", [2.0**-99, 2.0**-60, 1.0, 2.0**60, 2.0**99])
def test_tiny_and_huge_scales_keep_the_slopes(backend, device, alpha):
    """The slopes are those of theta / alpha; half an ulp at the ends changes the side."""
    theta = [x * alpha for x in (-9.0, -2.0, -1.5, -0.25, 0.0, 0.5, 1.0, 1.5, 1e4)]
    for grid in (fk.Grid.uniform(2), fk.Grid.half_offset(2), fk.Grid.ternary()):
        one_alpha(backend, device, theta, [1.0, -2.0, 3.0, 0.5, -7.0, 1e-3, 0.25, 5.0, 2.0], alpha, grid)


@pytest.mark.parametrize("grad", [1e-45, 1e-38, 1e30])
def test_tiny_and_huge_gradients_keep_their_sums(backend, device, grad):
    one_alpha(backend, device, [0.3] * 40 + [9.0] * 9, [grad] * 49, 1.0, fk.Grid.uniform(2))


@pytest.mark.parametrize("value", [0.0, 0.25, 1.0, -2.0, 7.0])
def test_constant_rows_have_exact_sums(backend, device, value):
    """The sums are multiples of one term: exact."""
    theta, grad = torch.full((4, 4096), value), torch.full((4, 4096), 0.5)
    alphas = [torch.full((4, 1), 1.0)]
    _, found = run(backend, device, [theta], [grad], alphas, [1 / 64], fk.Grid.uniform(2), CLIPPED)
    code = min(max(round(value), -2), 1)
    slope = code - value if -2 <= value <= 1 else code
    assert found[0].flatten().tolist() == [4096 * 0.5 * slope / 64] * 4


@pytest.mark.filterwarnings("ignore:.*invalid value:RuntimeWarning")  # the interpreter, on inf - inf
@pytest.mark.parametrize("shape", [((6, 16), (6, 2)), ((6, 15), (6, 3)), ((6, 9000), (6, 1))], ids=str)
@pytest.mark.parametrize("bad", [[INF], [-INF], [NAN], [INF, -INF]], ids=str)
def test_what_is_not_finite_reaches_its_own_alpha_alone(backend, device, shape, bad, generator):
    """Also from where it counts nothing, in the slope of a weight on a value of the grid: 0 times infinity."""
    latents, grads, alphas, factors = model(generator, [shape], (torch.float32, torch.float32))
    length = latents[0].numel() // alphas[0].numel()
    grads[0].view(-1)[4 * length : 4 * length + len(bad)] = torch.tensor(bad)
    latents[0].view(-1)[4 * length : 4 * length + len(bad)] = 9.0
    _, (found,) = run(backend, device, latents, grads, alphas, factors, fk.Grid.uniform(2), IDENTITY)
    exact, off = wanted(latents[0], grads[0], alphas[0], fk.Grid.uniform(2), factors[0])
    found, exact, off = (t.flatten().cpu() for t in (found, exact, off))
    torch.testing.assert_close(found[4].double(), exact[4], equal_nan=True)
    assert not found[4].isfinite()
    others = torch.arange(len(found)) != 4
    assert ((found.double() - exact).abs() <= off)[others].all()


# ---- the same bits


def cancelling(generator, shapes):
    """Sums that are what their order makes of them: terms over 40 binades, each there with both signs."""
    latents, grads, alphas, factors = model(generator, shapes, (torch.float32, torch.float32))
    for latent, grad in zip(latents, grads, strict=True):
        latent.fill_(99.0)  # one slope for all
        half = grad.view(-1)[: grad.numel() // 2]
        half.mul_(torch.exp2(torch.randint(40, half.shape, generator=generator)))
        both = torch.cat([half, -half])
        grad.view(-1)[: both.numel()] = both[torch.randperm(both.numel(), generator=generator)]
    return latents, grads, alphas, factors


def test_same_bits_in_every_run(backend, device, generator):
    shapes = [*SHAPES, *(LONG[:2] if backend == "triton" else LONG)]  # its interpreter is slow
    given = cancelling(generator, shapes)
    first, second = (run(backend, device, *given, fk.Grid.uniform(2), CLIPPED)[1] for _ in "ab")
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_same_bits_for_any_number_of_threads(name, generator):
    given = cancelling(generator, [*LONG, ((3, 100001), (3, 1)), ((600001,), ())])
    results = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        results.append(run(name, torch.device("cpu"), *given, fk.Grid.uniform(2), CLIPPED)[1])
    assert all(all(map(torch.equal, results[0], other)) for other in results[1:])


def test_same_bits_alone_and_in_a_list(backend, device, generator):
    shapes = [*SHAPES, *LONG[:2]]
    if backend == "triton":  # it has another kernel for lists whose alphas all have one element
        shapes = [(sizes, scales) for sizes, scales in shapes if math.prod(scales) > 1]
    latents, grads, alphas, factors = model(generator, shapes, (torch.float32, torch.float32))
    _, together = run(backend, device, latents, grads, alphas, factors, fk.Grid.uniform(2), CLIPPED)
    for i, one in enumerate(together):
        each = [x[i : i + 1] for x in (latents, grads, alphas, factors)]
        assert torch.equal(run(backend, device, *each, fk.Grid.uniform(2), CLIPPED)[1][0], one)


# ---- the derivative of what

ROUNDING = [fk.Grid.uniform(2), fk.Grid.uniform(3), fk.Grid.half_offset(2), fk.Grid.ternary()]


def slopes(theta, grid, alpha=1.0):
    """dQ/dalpha of each weight: every one has an alpha of its own."""
    found, alphas = torch.full_like(theta, NAN), torch.full_like(theta, alpha)
    straight_through = SIGNS[0] if grid.is_sign else CLIPPED
    g = torch.ones_like(theta)
    fk.learned_backward_(g, found, theta, alphas, grid=grid, straight_through=straight_through, factors=1.0)
    return found.double()


def quantized(theta, grid, alpha):
    found = torch.full_like(theta, NAN)
    fk.quantize_(found, theta, torch.tensor(alpha), grid=grid)
    return found.double()


@pytest.mark.parametrize("grid", [*ROUNDING, fk.Grid.sign()], ids=str)
def test_between_thresholds_it_is_the_difference_of_q(grid, generator):
    """Where no code changes. LSQ takes d rint(w)/dw for 1, which adds alpha dw/dalpha = -w within the grid."""
    theta, alpha, step = torch.randn(300, generator=generator), 0.5, 2.0**-12
    if not grid.is_sign:
        z = theta / alpha - grid.offset
        theta = theta[(z - torch.floor(z) - 0.5).abs() > 0.02]
    difference = (quantized(theta, grid, alpha + step) - quantized(theta, grid, alpha - step)) / (2 * step)
    z = theta.double() / alpha - grid.offset
    inside = (z >= grid.qmin) & (z <= grid.qmax) & (not grid.is_sign)
    expected = torch.where(inside, difference - theta.double() / alpha, difference)
    assert inside.any() or grid.is_sign
    torch.testing.assert_close(slopes(theta, grid, alpha), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("grid", ROUNDING, ids=str)
def test_its_mean_under_noise_is_the_derivative_of_the_smoothed_q(grid):
    """E[alpha h(theta / alpha + u)], u uniform in +-1/2, is theta within the grid and alpha's end beyond it:
    independent of alpha, or the end times alpha. Away from the ends, where the noise crosses them."""
    n = 1000
    u = (torch.arange(n) + 0.5) / n - 0.5
    low, high = grid.qmin + grid.offset, grid.qmax + grid.offset
    for w, expected in ((0.3 + low + 0.5, 0.0), (high - 0.6, 0.0), (high + 0.6, high), (low - 0.9, low)):
        mean = slopes((w + u).float(), grid).mean()
        assert mean == pytest.approx(expected, abs=2e-3)


# ---- what is refused


def call():
    """A valid call of two tensors."""
    return {
        "grads": [torch.ones(3), torch.ones(4, 8)],
        "alpha_grads": [torch.full((), NAN), torch.full((4, 1), NAN)],
        "latents": [torch.ones(3), torch.ones(4, 8)], "alphas": [torch.tensor(0.5), torch.full((4, 1), 0.25)],
        "factors": [1.0, 2.0],
    }  # fmt: skip


def second(change):
    return lambda value: [value[0], change(value[1])]


REFUSED = [
    ("alpha_grads", second(lambda t: t.double()), TypeError, "alpha_grads[1] must be float32, got float64"),
    ("alpha_grads", lambda ts: [t.half() for t in ts], TypeError, "alpha_grads[0] must be float32"),
    ("alpha_grads", second(lambda t: t.view(4)), ValueError, "alpha_grads[1] must have shape (4, 1), got (4,)"),
    ("alpha_grads", second(lambda t: t[:3]), ValueError, "alpha_grads[1] must have shape (4, 1), got (3, 1)"),
    ("alpha_grads", second(lambda t: t.repeat(1, 2)[:, :1]), ValueError, "alpha_grads[1] must be contiguous"),
    ("alpha_grads", second(lambda t: t.to("meta")), ValueError, "alpha_grads[1] must be on cpu, got meta"),
    ("alpha_grads", lambda ts: ts[:1], ValueError, "alpha_grads must have 2 tensors, got 1"),
    ("alpha_grads", lambda ts: 0.5, TypeError, "alpha_grads must be a tensor or a list"),
    ("factors", lambda f: f[:1], ValueError, "factors must have 2 entries, got 1"),
    ("factors", lambda f: [*f, 1.0], ValueError, "factors must have 2 entries, got 3"),
    ("factors", lambda f: [], ValueError, "factors must have 2 entries, got 0"),
    *(("factors", second(lambda _, x=x: x), ValueError, f"factors[1] must be finite, got {x}")
      for x in (NAN, INF, -INF)),
    *(("factors", second(lambda _, x=x: x), TypeError, f"factors[1] must be a number, got {type(x).__name__}")
      for x in ("1", None, True)),
    ("factors", lambda f: "12", TypeError, "factors must be a number or a list of numbers, got str"),
    ("factors", lambda f: None, TypeError, "factors must be a number or a list of numbers, got NoneType"),
]  # fmt: skip


def refused(args, error, message, name):
    lists = [args[key] for key in ("grads", "alpha_grads", "latents") if isinstance(args[key], list)]
    tensors = [t for one in lists for t in one]
    before = [t.clone() for t in tensors]
    with pytest.raises(error, match=re.escape(message)):
        fk.learned_backward_(**args, grid=fk.Grid.uniform(2), straight_through=CLIPPED, backend=name)
    for t, old in zip(tensors, before, strict=True):
        if not t.is_meta:
            torch.testing.assert_close(t, old, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", ["cpu", "reference"])
@pytest.mark.parametrize(("argument", "change", "error", "message"), REFUSED)
def test_bad_input_is_named_and_nothing_is_written(argument, change, error, message, name):
    args = call()
    refused({**args, argument: change(args[argument])}, error, message, name)


@pytest.mark.parametrize("name", ["cpu", "reference"])
@pytest.mark.parametrize("other", ["grads", "latents", "alphas", "alpha_grads"])
def test_alpha_grads_share_no_memory(other, name):
    args, memory = call(), torch.ones(4, 8)
    args["alpha_grads"][1] = memory.view(-1)[:4].view(4, 1)
    if other == "alphas":
        args["alphas"][1] = memory.view(-1)[3:7].view(4, 1)
    elif other == "alpha_grads":
        args["alpha_grads"][0] = memory.view(-1)[3]
    else:
        args[other][1] = memory
    refused(args, ValueError, "must not share memory with", name)


def test_one_tensor_and_its_factor_may_be_bare(backend, device):
    latent, alpha = torch.linspace(-2, 2, 32, device=device), torch.tensor(0.5, device=device)
    results = []
    for wrap in (lambda x: x, lambda x: [x]):
        g, found = torch.ones_like(latent), torch.full_like(alpha, NAN)
        fk.learned_backward_(
            *map(wrap, (g, found, latent, alpha)),
            factors=wrap(2),
            grid=fk.Grid.uniform(2),
            straight_through=CLIPPED,
            backend=backend,
        )
        results.append((g, found))
    assert all(map(torch.equal, *results))
