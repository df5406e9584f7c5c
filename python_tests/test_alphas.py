"""Which alphas a tensor takes, by their shape (contract section 4), and that each element gets its own."""

import math
import re
from itertools import product

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fogzo_kernels as fk
from fogzo_kernels.backends import cpu
from fogzo_kernels.ops import checks

GRID, STE = fk.Grid.uniform(2), fk.StraightThrough("identity")
OPTIONS = {"grid": GRID, "straight_through": STE, "one_minus_beta": 0.25, "seed": 1}


def shapes_that_fit(sizes, longest):
    """Those of alphas for a tensor of these sizes, listed up to a number of dimensions."""
    found = {(1,) * n for n in range(longest + 1)}
    for rows in range(len(sizes) + 1):
        found |= {sizes[:rows] + (1,) * n for n in range(longest - rows + 1)}
    if sizes:
        found |= {(*sizes[:-1], n) for n in range(1, sizes[-1] + 1) if sizes[-1] % n == 0}
    return found


def spread(alpha, sizes):
    """The alpha of each element, by the meaning of each dimension: it is repeated where alpha is shorter."""
    found = alpha.reshape((*alpha.shape, *[1] * len(sizes))[: len(sizes)])
    for dim, size in enumerate(sizes):
        found = found.repeat_interleave(size // found.shape[dim], dim)
    return found


def test_spread_repeats_alpha_along_each_dimension():
    rows = spread(torch.tensor([2.0, 3.0]), (2, 2, 2))
    assert rows.tolist() == [[[2, 2], [2, 2]], [[3, 3], [3, 3]]]
    groups = spread(torch.tensor([[2.0, 3.0], [4.0, 5.0]]), (2, 4))
    assert groups.tolist() == [[2, 2, 3, 3], [4, 4, 5, 5]]
    assert spread(torch.tensor([[[2.0]]]), (3,)).tolist() == [2, 2, 2]
    assert spread(torch.tensor([2.0]), ()).shape == ()


# ---- what fits


def refusal(call, *lists):
    """What the call says of its arguments, if it refuses them."""
    try:
        call(*lists)
    except (ValueError, RuntimeError) as error:
        return str(error)
    return None


def test_shapes_that_fit_and_no_others():
    """Every tensor of up to 3 dimensions, every alpha of up to 4; C++ judges as Python."""
    shapes = [s for n in range(4) for s in product((0, 1, 2, 4), repeat=n)]
    alphas = [torch.full(s, 0.5) for s in (*shapes, *product((1, 2), repeat=4))]
    counts = {True: 0, False: 0}
    for sizes in shapes:
        t, out, fitting = torch.ones(sizes), torch.ones(sizes), shapes_that_fit(sizes, longest=4)
        for alpha in alphas:
            fits = t.numel() == 0 or alpha.shape in fitting
            python = refusal(checks.alphas, [alpha], "tensors", [t], 0)
            native = refusal(cpu.native.quantize, [out], [t], [alpha], -2, 1, 0.0, 1, 0)
            assert (python is None) == (native is None)
            assert (python is None) == checks.fits(alpha.shape, sizes) == fits, (alpha.shape, sizes)
            counts[fits] += 1
    assert min(counts.values()) > 500


@pytest.mark.parametrize("odd", [0, 1, 999])
def test_one_alpha_of_many_that_does_not_fit_is_named(odd):
    like = [torch.ones(4, 8) for _ in range(1000)]
    alphas = [torch.ones(4, 1) for _ in like]
    checks.alphas(alphas, "tensors", like, 0)
    alphas[odd] = torch.ones(1, 8)
    with pytest.raises(ValueError, match=rf"^alphas\[{odd}\] must have one element, .*, got shape \(1, 8\)$"):
        checks.alphas(alphas, "tensors", like, 0)


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_compiled_call_judges_the_shape(dynamic, generator):
    """Sizes may be symbolic while a graph is traced."""

    def call(out, latent, alpha):
        fk.quantize_([out, out.clone()], [latent, latent], [alpha, alpha], grid=GRID, backend="reference")

    torch._dynamo.reset()
    graph = torch.compile(call, backend="eager", fullgraph=True, dynamic=dynamic)
    for rows, columns in ((4, 8), (5, 12)):
        alpha = 0.1 + torch.rand(rows, 4, generator=generator)
        out = torch.full((rows, columns), math.nan)
        graph(out, torch.full((rows, columns), 9.0), alpha)
        assert torch.equal(out, spread(alpha, out.shape))
    with pytest.raises(Exception, match=r"alphas\[0\] must have one element, one per row"):
        graph(torch.ones(6, 16), torch.ones(6, 16), torch.ones(1, 16))


# ---- each element has its own


@st.composite
def tensor_with_alpha(draw):
    sizes = tuple(draw(st.lists(st.sampled_from((1, 2, 3, 8)), max_size=4)))
    return sizes, draw(st.sampled_from(sorted(shapes_that_fit(sizes, len(sizes) + 2))))


def results(backend, latents, grads, alphas):
    """What each op over lists makes of these alphas."""

    def like(value):
        return [torch.full_like(t, value) for t in latents]

    device = latents[0].device
    losses = torch.tensor([[2.0], [0.5]], device=device)
    norm, options = torch.tensor(2.0, device=device), {**OPTIONS, "backend": backend}
    found = {name: like(math.nan) for name in ("plus", "minus", "quantized", "next")}
    found |= {"slopes": [g.clone() for g in grads], "estimates": like(0.0), "stepped": like(0.0)}
    found["norm"] = [fk.guide_norm(grads, alphas, grid=GRID, backend=backend)]
    fk.perturb_quantize_(found["plus"], found["minus"], latents, grads, alphas, norm, **options)
    fk.quantize_(found["quantized"], latents, alphas, grid=GRID, backend=backend)
    fk.straight_through_backward_(
        found["slopes"], latents, alphas, grid=GRID, straight_through=STE, backend=backend
    )
    learned = [g.clone() for g in grads], [torch.full_like(a, math.nan) for a in alphas]
    given = {"grid": GRID, "straight_through": STE, "factors": [1.0] * len(grads), "backend": backend}
    fk.learned_backward_(*learned, latents, alphas, **given)
    found["learned"] = learned[0]
    fk.estimate_gradient_(found["estimates"], *losses, alphas, norm, **options)
    fk.estimate_sgd_(
        found["stepped"],
        like(0.0),
        None,
        *losses,
        alphas,
        norm,
        lr=0.5,
        optimizer_step=1,
        quantized=found["next"],
        **options,
    )
    return found


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])  # its name, its device
@given(cases=st.lists(tensor_with_alpha(), min_size=1, max_size=5), seed=st.integers(0, 2**31))
def test_each_element_has_the_alpha_of_its_row_or_group(backend, device, cases, seed):
    """As if alphas had the tensors' shapes; a latent beyond the grid becomes its alpha (qmax is 1)."""
    generator = torch.Generator().manual_seed(seed)
    latents, grads = ([torch.randn(s, generator=generator).to(device) for s, _ in cases] for _ in "ab")
    alphas = [(0.1 + torch.rand(shape, generator=generator)).to(device) for _, shape in cases]
    wanted = [spread(alpha, sizes).contiguous() for alpha, (sizes, _) in zip(alphas, cases, strict=True)]
    out, large = ([torch.full_like(t, value) for t in latents] for value in (math.nan, 99.0))
    fk.quantize_(out, large, alphas, grid=GRID, backend=backend)
    ones = [torch.ones_like(t, dtype=torch.int8) for t in latents]
    for i, each in enumerate(wanted):
        one = fk.quantize(large[i], alphas[i], grid=GRID, straight_through=STE, backend=backend)
        back = fk.dequantize(ones[i], alphas[i], grid=GRID, dtype=torch.float32)
        assert all(torch.equal(x, each) for x in (out[i], one, back)), cases[i]
    found, expected = (results(backend, latents, grads, x) for x in (alphas, wanted))
    for name, values in found.items():
        # Other kernels, perhaps: each within 4 ulp of the estimate (contract section 6), or 1e-6 of the norm.
        rtol = 2e-6 if name in ("norm", "estimates", "stepped") else 0.0
        if name == "next":  # Q of what was stepped to, which may be an ulp away
            fk.quantize_(expected[name], found["stepped"], wanted, grid=GRID, backend=backend)
        for i, (one, other) in enumerate(zip(values, expected[name], strict=True)):
            torch.testing.assert_close(one, other, rtol=rtol, atol=0, msg=f"{name}[{i}]: {one}, not {other}")


# ---- what is refused, by every op on every backend

REFUSED = {
    (4, 8): ("one element, one per row, shape (4, 1), or one per group of the last dimension, shape"
             " (4, groups),", ((1, 8), (8,), (16,), (32,), (2,), (3, 1), (8, 1), (2, 4), (4, 3), (4, 16),
                               (4, 0), (0,), (1, 4), (1, 4, 1), (4, 2, 1), (1, 4, 8))),
    (1, 8): ("one element, one per row, shape (1, 1), or one per group of the last dimension, shape"
             " (1, groups),", ((8,), (2,), (8, 1), (1, 3), (1, 0), (1, 1, 8))),
    (2, 1, 8): ("one element, one per row, shape (2, 1, 1), or one per group of the last dimension, shape"
                " (2, 1, groups),", ((1, 1, 8), (16,), (2, 8), (2, 4), (2, 2), (1, 2), (8, 1))),
    (8,): ("one element or one per group of the last dimension, shape (groups,),",
           ((3,), (16,), (0,), (1, 8), (4, 1), (2, 4))),
    (): ("one element", ((2,), (0,), (1, 2))),
}  # fmt: skip


def refusing_calls(sizes, alpha, backend, device):
    """Every op on a tensor of these sizes behind a good one, and all that it could write."""
    latents, grads, out, more = (
        [torch.full(s, value, device=device) for s in ((4, 8), sizes)]
        for value in (0.5, 0.25, math.nan, math.nan)
    )
    states = [[torch.ones_like(t) for t in latents] for _ in "ab"]
    alphas, losses = [torch.ones(4, 2, device=device), alpha], torch.ones(2, 1, device=device)
    norm, options = torch.ones((), device=device), {**OPTIONS, "backend": backend}
    grid, ste = {"grid": GRID, "backend": backend}, {"grid": GRID, "straight_through": STE, "backend": backend}
    last = {"lr": 0.1, "optimizer_step": 1, "quantized": out, **options}
    codes = torch.ones(sizes, dtype=torch.int8, device=device)
    return [*latents, *grads, *out, *more, *states[0], *states[1]], [
        lambda: fk.guide_norm(grads, alphas, **grid),
        lambda: fk.guide_sumsq(grads, alphas, **grid),
        lambda: fk.perturb_quantize_(out, more, latents, grads, alphas, norm, **options),
        lambda: fk.estimate_gradient_(grads, *losses, alphas, norm, **options),
        lambda: fk.estimate_adamw_(latents, grads, *states, *losses, alphas, norm, **last),
        lambda: fk.estimate_sgd_(latents, grads, None, *losses, alphas, norm, **last),
        lambda: fk.quantize_(out, latents, alphas, **grid),
        lambda: fk.straight_through_backward_(grads, latents, alphas, **ste),
        lambda: fk.learned_backward_(grads, alphas, latents, alphas, factors=[1.0, 1.0], **ste),
        lambda: fk.quantize(latents[1], alpha, **ste),
        lambda: fk.quantize(latents[1], alpha, quantized=out[1], **ste),
        lambda: fk.dequantize(codes, alpha, grid=GRID, dtype=torch.float32),
    ]


@pytest.mark.parametrize(
    ("sizes", "shape"), [(s, shape) for s, (_, shapes) in REFUSED.items() for shape in shapes], ids=str
)
def test_other_shapes_are_refused(backend, device, sizes, shape):
    """Also where the number of elements would do."""
    assert shape not in shapes_that_fit(sizes, 4)
    written, calls = refusing_calls(sizes, torch.ones(shape, device=device), backend, device)
    before = [t.clone() for t in written]
    message = re.escape(f"must have {REFUSED[sizes][0]} for a tensor of shape {sizes}, got shape {shape}")
    for call in calls:
        with pytest.raises(ValueError, match=rf"^alphas\[[01]\] {message}$"):
            call()
    for t, old in zip(written, before, strict=True):
        torch.testing.assert_close(t, old, rtol=0, atol=0, equal_nan=True)
