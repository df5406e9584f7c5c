"""Quantizers with a Hadamard transform on every backend (contract section 4)."""

import functools
import math
from itertools import product

import pytest
import torch
from support.compiling import compiled
from support.hadamard import matrix
from support.tolerances import EXACT, HALF_ULP, M_TOLERANCE, SMALLEST

import fogzo_kernels as fk
from fogzo_kernels.spec.grid import FLOATS
from fogzo_kernels.spec.hadamard import BLOCKS
from fogzo_kernels.spec.noise import DISTRIBUTIONS

GRID = fk.Grid.half_offset(2)
TRUST = fk.StraightThrough("identity", clip="trust")
SIGN = fk.StraightThrough("approxsign")
ONE_MINUS_BETA = 0.125
LOSSES = [2.5, -1.0, 0.75], [2.25, -0.5, 1.0]
NAN = math.nan


class Case:
    """A list of latents, gradients and alphas: one for a tensor, for rows, for groups; one tensor is empty."""

    def __init__(self, generator, block, dtypes, device, shift=0):
        sizes = [((3, 2 * block), ()), ((5, 3 * block), (5, 1)), ((4, 2 * block), (4, 2)), ((block,), (1,)),
                 ((2, 3, block), (2,)), ((0, block), (0, 1))]  # fmt: skip
        self.block, self.device = block, device

        def tensors(dtype):
            """Each begins ``shift`` elements behind where memory does."""
            found = []
            for shape, _ in sizes:
                room = torch.randn(math.prod(shape) + shift, generator=generator).to(dtype).to(device)
                found.append(room[shift:].view(shape))
            return found

        self.latents, self.grads = map(tensors, dtypes[:2])
        self.alphas = [(0.3 + torch.rand(s, generator=generator)).to(device) for _, s in sizes]
        self.options = {
            "grid": GRID,
            "straight_through": TRUST,
            "transform": fk.Hadamard(block),
            "one_minus_beta": ONE_MINUS_BETA,
            "seed": int(torch.randint(2**62, (), generator=generator)),
            "step": 7,
            "tensor_ids": [3, 1, 4, 11, 5, 9],
        }

    def out(self, dtype):
        return [
            torch.full(t.shape, -77 if dtype == torch.int8 else NAN, dtype=dtype, device=self.device)
            for t in self.latents
        ]

    def norm(self):
        return fk.guide_norm(self.grads, self.alphas, grid=GRID, backend="reference")

    def deltas(self):
        for t, alpha in zip(self.latents, self.alphas, strict=True):
            length = t.numel() // max(alpha.numel(), 1)
            yield alpha.double().flatten().repeat_interleave(length).view(t.shape).cpu()

    def noise(self, i, direction, distribution):
        """u of tensor i, float64."""
        options = {k: self.options[k] for k in ("seed", "step")}
        names = {"tensor_id": self.options["tensor_ids"][i], "direction": direction}
        n = self.latents[i].numel()
        u = fk.noise(n, distribution=distribution, **options, **names, device="cpu", backend="reference")
        return u.double().view(self.latents[i].shape)

    def sign(self, direction):
        return float(fk.direction_sign(self.options["seed"], self.options["step"], direction))


def rotated(x, block):
    """By the matrix, in float64."""
    x = x.double().cpu()
    return (x.reshape(-1, block) @ matrix(block)).view(x.shape) if x.numel() else x


def slack(terms, block):
    """By how much float32 butterflies may differ, of a list of added terms."""
    size = sum(t.double().abs().cpu() for t in terms)
    blocks = size.reshape(-1, block).sum(1, keepdim=True).expand(-1, block).reshape(size.shape)
    return 1.01 * (math.log2(block) + 2) * 2.0**-24 * blocks / math.sqrt(block)


def same_codes(found, y, off):
    """Equal to those of float64 positions, wherever no tie is nearer than ``off``: mostly."""
    clamped = y.clamp(GRID.qmin, GRID.qmax)
    near_tie = ((clamped - clamped.floor()) - 0.5).abs() <= off
    assert near_tie.sum() <= 0.05 * near_tie.numel()
    assert torch.equal(found.cpu().double()[~near_tie], clamped.round()[~near_tie])


def by(backend, op, case, **options):
    """What an op writes on a fresh copy of the case's gradients, in memory that it may not leave as it is."""
    args = {**case.options, **options, "backend": backend}
    if op == "quantize":
        out = case.out(options.get("dtype", torch.int8))
        fk.quantize_(out, case.latents, case.alphas, grid=GRID, transform=args["transform"], backend=backend)
        return out
    if op == "perturb":
        plus, minus = case.out(args.pop("dtype", torch.int8)), case.out(options.get("dtype", torch.int8))
        fk.perturb_quantize_(plus, minus, case.latents, case.grads, case.alphas, case.norm(), **args)
        return plus + minus
    grads = [g.clone() for g in case.grads]
    kept = [t.clone() for t in (*case.latents, *case.alphas)]
    if op == "estimate":
        n = args.pop("n", 3)
        losses = (torch.tensor(x[:n], device=case.device) for x in LOSSES)
        fk.estimate_gradient_(grads, *losses, case.alphas, case.norm(), **args)
    else:
        how = {k: args[k] for k in ("grid", "straight_through", "transform", "backend")}
        fk.straight_through_backward_(grads, case.latents, case.alphas, **how)
    assert all(map(torch.equal, (*case.latents, *case.alphas), kept))
    return grads


# ---- against float64


def test_q_is_that_of_the_rotated_weight(backend, device, generator):
    case = Case(generator, 32, FLOATS[:1] * 2, device)
    for q, t, delta in zip(by(backend, "quantize", case), case.latents, case.deltas(), strict=True):
        same_codes(q, rotated(t, 32) / delta - GRID.offset, 2 * slack([t], 32) / delta + 1e-6)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_probes_move_along_the_guide_and_rotated_noise(backend, device, distribution, generator):
    """y = H(theta) / delta +- eps (a delta H(g) + b u) - offset, where the noise is."""
    case = Case(generator, 64, FLOATS[:1] * 2, device)
    how = fk.StraightThrough("identity", clip="trust", noise=distribution)
    found = by(backend, "perturb", case, straight_through=how)
    eps, norm = how.epsilon(GRID), float(case.norm())
    guide, b = math.sqrt(1 - ONE_MINUS_BETA) * case.sign(0) / norm, math.sqrt(ONE_MINUS_BETA)
    off = M_TOLERANCE[backend][distribution] * DISTRIBUTIONS[distribution] * b * eps
    for s, codes in ((1, found[:6]), (-1, found[6:])):
        for i, (t, g, delta) in enumerate(zip(case.latents, case.grads, case.deltas(), strict=True)):
            v = guide * delta * rotated(g, 64) + b * case.noise(i, 0, distribution)
            y = rotated(t, 64) / delta + s * eps * v - GRID.offset
            same_codes(codes[i], y, 2 * slack([t, eps * delta**2 * guide * g.cpu()], 64) / delta + 1e-6 + off)


@pytest.mark.parametrize(("dtype", "n"), [*product(FLOATS, [1]), (torch.float32, 3)], ids=str)
def test_the_estimate_brings_noise_back(backend, device, dtype, n, generator):
    """G = A g + H(sum B_i m_i) / delta."""
    case = Case(generator, 32, (torch.float32, dtype), device)
    found = by(backend, "estimate", case, n=n)
    eps, norm = TRUST.epsilon(GRID), float(case.norm())
    c = [(p - m) / (2 * eps) / n for p, m in zip(*LOSSES, strict=True)][:n]
    A = sum(x * case.sign(i) for i, x in enumerate(c)) * math.sqrt(1 - ONE_MINUS_BETA) / norm
    for k, (G, g, delta) in enumerate(zip(found, case.grads, case.deltas(), strict=True)):
        noise = sum(math.sqrt(ONE_MINUS_BETA) * x * case.noise(k, i, "uniform") for i, x in enumerate(c))
        wanted = A * g.cpu().double() + rotated(noise / delta, 32)
        error = 4 * 2.0**-23 * wanted.abs() + 4 * slack([noise / delta], 32) + 1e-6 * abs(A) * g.cpu().abs()
        error += (HALF_ULP[dtype] * (wanted.abs() + error) + SMALLEST[dtype]) * (dtype != torch.float32)
        assert ((G.cpu().double() - wanted).abs() <= error).all()
        assert G.numel() == 0 or not torch.equal(G, g)


@pytest.mark.parametrize("how", [TRUST, fk.StraightThrough("identity"), SIGN], ids=lambda s: s.variant)
def test_gradients_are_rotated_back(backend, device, how, generator):
    """g = H(h'(H theta) dL/dQ), float64 by the matrix."""
    case = Case(generator, 16, FLOATS[:1] * 2, device)
    grid = fk.Grid.sign() if how is SIGN else GRID
    found = by(backend, "backward", case, straight_through=how, grid=grid)
    for q, t, g, delta in zip(found, case.latents, case.grads, case.deltas(), strict=True):
        x = rotated(t, 16) / delta
        if how is SIGN:
            slope, edge = (2 - 2 * x.abs()).clamp(min=0), torch.tensor(NAN)
        elif how is TRUST:
            slope, edge = ((x >= -2) & (x <= 2)).double(), (x.abs() - 2).abs()
        else:
            slope, edge = ((x > -1.5) & (x < 1.5)).double(), (x.abs() - 1.5).abs()
        whole = (edge < 1e-5).any()  # an element whose h' may go either way
        wanted = rotated(slope * g.cpu(), 16)
        assert whole or ((q.cpu() - wanted).abs() <= 1e-5 * (1 + wanted.abs())).all()


# ---- each op is the one without a transform, around the transform: to the bit


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_quantize_and_its_backward_are_their_parts(backend, device, block, dtype, generator):
    case = Case(generator, block, (dtype, dtype), device, shift=block % 3)
    x = [torch.empty_like(t, dtype=torch.float32) for t in case.latents]
    fk.hadamard_(x, case.latents, block=block, backend=backend)
    out = case.out(dtype)
    fk.quantize_(out, x, case.alphas, grid=GRID, backend=backend)
    assert all(map(torch.equal, by(backend, "quantize", case, dtype=dtype), out))
    grads = [g.float() for g in case.grads]
    fk.straight_through_backward_(grads, x, case.alphas, grid=GRID, straight_through=TRUST, backend=backend)
    fk.hadamard_(back := case.out(dtype), grads, block=block, backend=backend)
    assert all(map(torch.equal, by(backend, "backward", case), back))


@pytest.mark.parametrize(
    ("latent", "grad", "out"),
    [
        *product(FLOATS, FLOATS, [torch.int8]),
        (torch.float32, torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    ],
    ids=str,
)
def test_probes_are_the_references(backend, device, latent, grad, out, generator):
    for block, shift, distribution in ((128, 0, "uniform"), (16, 1, "triangular"), (512, 0, "rademacher")):
        case = Case(generator, block, (latent, grad), device, shift)
        how = fk.StraightThrough("identity", noise=distribution)
        run = functools.partial(by, op="perturb", case=case, straight_through=how, dtype=out)
        found, wanted = run(backend), run("reference")
        assert distribution in EXACT
        assert all(map(torch.equal, found, wanted))


ODD = {
    "zeros": lambda t: t * 0,
    "constant rows": lambda t: t * 0 + 0.5,
    "one element": lambda t: t * 0 + (torch.arange(t.numel(), device=t.device).view(t.shape) == 3),
    "ties": lambda t: (t * 2).round() / 2,
    "tiny": lambda t: t * 1e-30,
    "huge": lambda t: t * 1e30,
    "not finite": lambda t: t.masked_fill(t > 2, math.inf),
}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter, on what is not finite
@pytest.mark.parametrize("kind", ODD)
def test_what_is_odd_gives_the_references_codes(backend, device, kind, generator):
    case = Case(generator, 64, FLOATS[:1] * 2, device)
    case.latents = [ODD[kind](t).contiguous() for t in case.latents]
    if kind == "ties":
        case.alphas = [torch.full_like(a, 0.125) for a in case.alphas]
    for op in ("quantize", "perturb"):
        assert all(map(torch.equal, by(backend, op, case), by("reference", op, case)))


@pytest.mark.parametrize("block", BLOCKS)
def test_probes_at_eps_0_are_q(backend, device, block, generator):
    case = Case(generator, block, FLOATS[:1] * 2, device)
    found = by(backend, "perturb", case, epsilon_scale=0.0)
    assert all(map(torch.equal, found, by(backend, "quantize", case) * 2))


@pytest.mark.parametrize("sign", ["plus", "minus"])
def test_one_sign_alone_has_the_bits_of_both(backend, device, sign, generator):
    case = Case(generator, 256, (torch.bfloat16, torch.bfloat16), device)
    both = by(backend, "perturb", case)
    out = case.out(torch.int8)
    given = (out, None) if sign == "plus" else (None, out)
    args = {**case.options, "backend": backend}
    fk.perturb_quantize_(*given, case.latents, case.grads, case.alphas, case.norm(), **args)
    assert all(map(torch.equal, out, both[:6] if sign == "plus" else both[6:]))


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.bfloat16, torch.float16)], ids=str)
def test_learned_scales_get_the_sums_of_the_rotated_weight(backend, device, dtypes, generator):
    """g as above; the terms are those of the rotated weight."""
    case = Case(generator, 32, dtypes, device)
    x = [torch.empty_like(t, dtype=torch.float32) for t in case.latents]
    fk.hadamard_(x, case.latents, block=32, backend=backend)
    how = {"grid": GRID, "straight_through": TRUST, "backend": backend, "factors": [0.5 + i for i in range(6)]}
    totals, wanted = ([torch.full_like(a, NAN) for a in case.alphas] for _ in range(2))
    g = [t.clone() for t in case.grads]
    fk.learned_backward_(g, totals, case.latents, case.alphas, transform=fk.Hadamard(32), **how)
    fk.learned_backward_([t.float() for t in case.grads], wanted, x, case.alphas, **how)
    assert all(map(torch.equal, g, by(backend, "backward", case)))
    for a, b in zip(totals, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("block", [16, 512, 1024])
@pytest.mark.parametrize("scales", [(3, 1), (3, 20), (1,)], ids=["rows", "groups", "tensor"])
def test_learned_scales_of_long_rows_get_joined_sums(backend, device, block, scales, generator):
    """More elements than a part of the work has: sums are joined."""
    t, g = (torch.randn(3, 20 * 1024, generator=generator).to(device) for _ in range(2))
    alpha = 0.3 + torch.rand(scales, generator=generator).to(device)
    fk.hadamard_(x := torch.empty_like(t), t, block=block, backend=backend)
    how = {"grid": GRID, "straight_through": TRUST, "backend": backend, "factors": 0.5}
    total, wanted = torch.full_like(alpha, NAN), torch.full_like(alpha, NAN)
    fk.learned_backward_(given := g.clone(), total, t, alpha, transform=fk.Hadamard(block), **how)
    fk.learned_backward_(back := g.clone(), wanted, x, alpha, **how)
    torch.testing.assert_close(total, wanted, rtol=1e-4, atol=1e-2)
    fk.hadamard_(back, back, block=block, backend=backend)
    assert torch.equal(given, back)


# ---- the fused tail


@pytest.mark.parametrize("rule", ["adamw", "sgd"])
@pytest.mark.parametrize("master", [False, True], ids=["latents", "masters"])
@pytest.mark.parametrize("block", [16, 1024])
def test_the_fused_tail_is_estimate_step_and_q(backend, device, rule, master, block, generator):
    """Given G, the same bits; a tensor without an alpha is not transformed, whatever its shape."""
    dtype = torch.bfloat16 if master else torch.float32
    case = Case(generator, block, (dtype, torch.float32), device)
    other = [torch.randn(7, generator=generator).to(device).to(dtype)]
    other_grad = [torch.randn(7, generator=generator).to(device)]

    def tail(grads, losses):
        latents = [t.clone() for t in case.latents + other]
        masters = [t.float() + 1e-3 for t in latents] if master else None
        states = [[torch.zeros_like(t, dtype=torch.float32) for t in latents] for _ in range(2)]
        q = case.out(torch.int8)
        common = {**case.options, "masters": masters, "quantized": q, "backend": backend, "optimizer_step": 1}
        if rule == "adamw":
            fk.estimate_adamw_(latents, grads, *states, *losses, case.alphas, case.norm(), lr=0.1, **common)
        else:
            fk.estimate_sgd_(
                latents, grads, states[0], *losses, case.alphas, case.norm(), lr=0.1, momentum=0.9, **common
            )
        return [*latents, *(masters or []), *states[0], *states[1], *q], latents, q

    losses = [torch.tensor(x, device=device) for x in LOSSES]
    none = [torch.empty(0, device=device)] * 2
    found, latents, q = tail(case.grads + other_grad, losses)
    wanted, _, _ = tail(by(backend, "estimate", case) + other_grad, none)
    assert all(map(torch.equal, found, wanted))
    again = case.out(torch.int8)
    fk.quantize_(again, latents[:6], case.alphas, grid=GRID, transform=fk.Hadamard(block), backend=backend)
    assert all(map(torch.equal, q, again))
    assert not torch.equal(latents[0], case.latents[0])


# ---- shards


@pytest.mark.parametrize("op", ["perturb", "estimate"])
def test_shards_are_parts_of_the_whole(backend, device, op, generator):
    whole = Case(generator, 16, FLOATS[:1] * 2, device)
    theta, g = (torch.randn(6, 64, generator=generator).to(device) for _ in range(2))
    alpha = 0.3 + torch.rand(6, 1, generator=generator).to(device)

    def run(t, grad, a, layout):
        case = Case(generator, 16, FLOATS[:1] * 2, device)
        case.latents, case.grads, case.alphas = [t.contiguous()], [grad.contiguous()], [a.contiguous()]
        case.options = {**whole.options, "tensor_ids": [3], "layouts": layout}
        norm = fk.guide_norm(g, alpha, grid=GRID, backend="reference")
        case.norm = lambda: norm
        return by(backend, op, case)[0]

    found = run(theta, g, alpha, None)
    rows = run(theta[2:5], g[2:5], alpha[2:5], [(128, 192, 192)])
    columns = run(theta[:, 32:], g[:, 32:], alpha, [(32, 32, 64)])
    assert torch.equal(rows, found[2:5])
    assert torch.equal(columns, found[:, 32:])


# ---- one tensor, differentiable


def test_autograd_is_that_of_the_parts(backend, device, generator):
    t = torch.randn(4, 64, generator=generator).to(device).requires_grad_()
    alpha = (0.3 + torch.rand(4, 1, generator=generator)).to(device).requires_grad_()
    upstream = torch.randn(4, 64, generator=generator).to(device)
    how = {"grid": GRID, "straight_through": TRUST, "backend": backend, "alpha_factor": 0.5}
    fused = fk.quantize(t, alpha, transform=fk.Hadamard(64), **how)
    parts = fk.quantize(fk.hadamard(t, block=64, backend=backend), alpha, **how)
    known = fk.quantize(t, alpha, transform=fk.Hadamard(64), quantized=fused.detach().clone(), **how)
    assert torch.equal(fused, parts)
    assert torch.equal(known, parts)
    (g, a), *others = (torch.autograd.grad(q, (t, alpha), upstream) for q in (parts, fused, known))
    for found_g, found_a in others:
        assert torch.equal(found_g, g)
        torch.testing.assert_close(found_a, a, rtol=1e-4, atol=1e-5)


# ---- bad input


WITHOUT_LAYOUTS = ("quantize_", "straight_through_backward_", "learned_backward_")
OPS = (*WITHOUT_LAYOUTS, "perturb_quantize_", "estimate_gradient_", "estimate_sgd_")


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    ("shape", "scales", "layouts", "message"),
    [
        ((3, 40), (3, 1), None, r"\[0\] must have a last dimension that block 16 divides, got shape \(3, 40\)"),
        ((), (), None, r"\[0\] must have a last dimension that block 16 divides, got shape \(\)"),
        ((2, 32), (2, 4), None, r"alphas\[0\] must be one for whole blocks of 16, .* got one for each 8 elem"),
        ((2, 32), (2, 1), [(8, 64, 64)], r"layouts\[0\] must be multiples of block 16, .* got \(8, 64, 64\)"),
    ],
    ids=["columns", "no-dimension", "groups", "shard"],
)
def test_what_does_not_fit_is_refused(backend, device, op, shape, scales, layouts, message):
    if layouts and op in WITHOUT_LAYOUTS:
        pytest.skip("it has no layouts")
    t, g, q = (torch.full(shape, 0.5, device=device) for _ in range(3))
    alpha, total = (torch.ones(scales, device=device) for _ in range(2))
    norm = torch.ones((), device=device)
    how = {"grid": GRID, "straight_through": TRUST, "transform": fk.Hadamard(16), "backend": backend}
    losses = torch.ones(1, device=device), torch.zeros(1, device=device)
    drawn = {**how, "one_minus_beta": 0.5, "seed": 1, "layouts": layouts}
    calls = {
        "quantize_": lambda: fk.quantize_(q, t, alpha, grid=GRID, transform=fk.Hadamard(16), backend=backend),
        "perturb_quantize_": lambda: fk.perturb_quantize_(q, None, t, g, alpha, norm, **drawn),
        "estimate_gradient_": lambda: fk.estimate_gradient_(g, *losses, alpha, norm, **drawn),
        "straight_through_backward_": lambda: fk.straight_through_backward_(g, t, alpha, **how),
        "learned_backward_": lambda: fk.learned_backward_(g, total, t, alpha, factors=1.0, **how),
        "estimate_sgd_": lambda: fk.estimate_sgd_(
            t, g, None, *losses, alpha, norm, lr=0.1, optimizer_step=1, quantized=q, **drawn
        ),
    }
    with pytest.raises(ValueError, match=message):
        calls[op]()
    assert all((x == 0.5).all() for x in (t, g, q))


@pytest.mark.parametrize(("given", "error"), [("hadamard", TypeError), (128, TypeError)], ids=str)
def test_a_transform_is_a_hadamard(given, error):
    t = torch.zeros(2, 128)
    with pytest.raises(error, match="transform must be a Hadamard or None, got"):
        fk.quantize_(t.clone(), t, torch.ones(()), grid=GRID, transform=given)
    with pytest.raises(ValueError, match=r"block must be one of 16, 32, .*, got 100"):
        fk.Hadamard(100)


def test_a_compiled_quantize_has_the_eager_gradient():
    t, alpha = torch.randn(4, 64, requires_grad=True), torch.ones(4, 1)

    def f(x):
        how = {"grid": GRID, "straight_through": TRUST, "transform": fk.Hadamard(32)}
        return fk.quantize(x, alpha, **how).square().sum()

    (wanted,), (found,) = (torch.autograd.grad(fn(t), t) for fn in (f, compiled(f)[0]))
    torch.testing.assert_close(found, wanted)
