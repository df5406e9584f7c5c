"""Values that are not finite, norms of nothing, names that nobody knows (docs/contract.md, section 5)."""

import pytest
import torch
from conftest import device_of

import fogzo_kernels as fk
from fogzo_kernels import backends
from fogzo_kernels.spec.call import Draw, Losses, Mix, Update
from fogzo_kernels.spec.update import UpdateRule

IDENTITY = fk.StraightThrough("identity", clip=False)


def special(backend, latents, norm, grads=None):
    device = device_of(backend)
    theta = torch.tensor(latents, device=device)
    g = torch.zeros_like(theta) if grads is None else torch.tensor(grads, device=device)
    out = [torch.full(theta.shape, 99, dtype=torch.int8, device=device) for _ in "+-"]
    fk.perturb_quantize_(
        *out,
        theta,
        g,
        torch.tensor(1.0, device=device),
        torch.tensor(norm, device=device),
        grid=fk.Grid.uniform(2),
        straight_through=IDENTITY,
        one_minus_beta=0.0,
        seed=1,
        backend=backend,
    )
    return [q.tolist() for q in out]


def test_latents_that_are_not_finite_clamp(backend):
    inf, nan = float("inf"), float("nan")
    for codes in special(backend, [inf, -inf, nan, 0.2], 1.0):
        assert codes == [1, -2, -2, 0]


@pytest.mark.parametrize("grid", [fk.Grid.half_offset(2), fk.Grid.uniform(8), fk.Grid.ternary()], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_identity_is_clipped_at_its_bounds(backend, device, grid, dtype):
    """Up to the outermost codes, or half a delta beyond; the bounds themselves, their neighbours, NaN, inf."""
    bounds = {True: (grid.qmin, grid.qmax), "trust": (grid.qmin - 0.5, grid.qmax + 0.5)}
    edges = torch.tensor([x + grid.offset for pair in bounds.values() for x in pair], dtype=dtype)
    around = [torch.nextafter(edges, edges + way) for way in (-1, 1)]
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0], dtype=dtype)
    theta = 0.5 * torch.cat([edges, *around, special, *[special[-1:]] * 15])  # a chunk of 8, and some alone
    z = (theta.double() / 0.5 - grid.offset).float()  # rounded as it is pinned
    expected = {True: (z > grid.qmin) & (z < grid.qmax), False: torch.ones_like(z)}
    expected["trust"] = (z >= grid.qmin - 0.5) & (z <= grid.qmax + 0.5)
    for clip, slope in expected.items():
        g = torch.full(theta.shape, -3.0, dtype=dtype, device=device)
        fk.straight_through_backward_(
            g,
            theta.to(device),
            torch.tensor(0.5, device=device),
            grid=grid,
            straight_through=fk.StraightThrough("identity", clip=clip),
            backend=backend,
        )
        assert torch.equal(g.cpu(), -3.0 * slope.to(dtype)), clip


@pytest.mark.parametrize("norm", [0.0, float("inf"), float("nan"), -1.0])
def test_unusable_norm_leaves_the_guide_out(backend, norm):
    """1 - beta = 0 and no guide: the weights are Q(theta)."""
    plus, minus = special(backend, [0.4, -0.4, 3.0], norm, grads=[9.0, -9.0, 9.0])
    assert plus == minus == [0, 0, 1]


@pytest.mark.parametrize(
    ("plus", "norm", "lost", "kept"),
    [
        ([float("nan"), float("inf")], 1.0, [2, 0, 0], True),
        ([1.0, 2.0], float("nan"), [0, 1, 0], True),
        ([1.0, 2.0], float("inf"), [0, 1, 0], True),
        ([float("nan"), 2.0], 1.0, [1, 0, 0], False),
        ([1.0, 2.0], 0.0, [0, 0, 0], False),
    ],
)
def test_lost_losses_and_norms(backend, device, plus, norm, lost, kept):
    g = torch.tensor([0.5, -0.25, 1.0], device=device)
    before, counters = g.clone(), torch.zeros(3, dtype=torch.int64, device=device)
    fk.estimate_gradient_(
        g,
        torch.tensor(plus, device=device),
        torch.tensor([1.5, 1.0], device=device),
        torch.tensor(0.5, device=device),
        torch.tensor(norm, device=device),
        grid=fk.Grid.uniform(2),
        straight_through=IDENTITY,
        one_minus_beta=0.5,
        seed=3,
        counters=counters,
        backend=backend,
    )
    assert counters.tolist() == lost
    assert torch.equal(g, before) == kept
    assert g.isfinite().all()


def test_zero_epsilon_scale_keeps_the_gradient(backend, device):
    """c = 0 / 0 in every direction: all are lost."""
    g = torch.tensor([0.5, -0.25], device=device)
    losses = torch.ones(1, device=device)
    fk.estimate_gradient_(
        g,
        losses,
        losses.clone(),
        torch.tensor(1.0, device=device),
        torch.tensor(1.0, device=device),
        grid=fk.Grid.uniform(2),
        straight_through=IDENTITY,
        one_minus_beta=0.5,
        seed=3,
        epsilon_scale=0.0,
        backend=backend,
    )
    assert g.tolist() == [0.5, -0.25]


# ---- names past the checks: an error, never the arithmetic of another name


def unknown(thing, field):
    """The frozen value with a name that is none."""
    object.__setattr__(thing, field, "unheard")
    return thing


def calls(device, **changed):
    """Each op that looks at a name, as the backends take it; ``changed`` are the nouns to spoil."""
    i64, f64 = (lambda x, d=d: torch.tensor(x, dtype=d) for d in (torch.int64, torch.float64))
    draw = Draw(changed.get("distribution", "uniform"), i64(1), i64(2), [0], [(0, 8, 8)])
    mix = Mix(torch.tensor(1.0, device=device), f64(0.5), 0.3, None)
    losses = Losses(torch.ones(1, device=device), torch.zeros(1, device=device), None, False)
    latents, grads, out, first, second = ([torch.ones(8, device=device)] for _ in range(5))
    alphas, groups, grid = [torch.tensor(0.5, device=device)], torch.ones(4, device=device), fk.Grid.sign()
    rule, kind = changed.get("rule", UpdateRule("adamw")), changed.get("kind", fk.StraightThrough("tanh"))
    update = Update(rule, f64(0.1), i64(1), [], [first, second])
    return {
        "noise": (8, draw, 0, device),
        "perturb_quantize_": (out, [], latents, grads, alphas, draw, mix, 0, grid, 0),
        "estimate_gradient_": (grads, alphas, draw, mix, losses, 2, 0),
        "estimate_update_": (latents, [], grads, alphas, draw, mix, losses, grid, update, 0),
        "straight_through_backward_": (out, grads, latents, alphas, grid, kind, 0),
        "learned_backward_": (out, [torch.ones_like(groups)], grads, latents, [groups], grid, kind, [1.0], 0),
    }


TAIL, BACKWARD = ("estimate_update_",), ("straight_through_backward_", "learned_backward_")


@pytest.mark.parametrize(
    ("ops", "name", "make"),
    [
        (("noise", "perturb_quantize_", "estimate_gradient_", *TAIL), "distribution", lambda: "unheard"),
        (TAIL, "rule", lambda: unknown(UpdateRule("adamw"), "kind")),
        (BACKWARD, "kind", lambda: unknown(fk.StraightThrough("tanh"), "kind")),
    ],
)
def test_a_name_that_nobody_knows_is_refused(backend, device, ops, name, make):
    chosen = backends.load(backend)
    for op in ops:
        getattr(chosen, op)(*calls(device)[op])  # it is the name that is refused
        with pytest.raises(Exception) as caught:  # noqa: PT011 - a compiler wraps the one that names it
            getattr(chosen, op)(*calls(device, **{name: make()})[op])
        error = caught.value
        while error.__cause__ is not None:
            error = error.__cause__
        assert "unheard" in str(error)


# ---- alphas that are no scales: counted once each, whoever reads them

#: Tensors and their alphas: of several programs of a GPU, of lengths that 8 does not divide, of two programs.
LAYOUTS = [
    ((3000,), ()), ((3, 1024), (3, 1)), ((2, 2500), (2, 1)), ((5, 10), (5, 1)), ((2, 4096), (2, 32)),
    ((3, 16), (3, 2)), ((2, 2058), (2, 3)), ((9,), (9,)), ((4101,), (1,)), ((), ()), ((2500, 4), (2500, 4)),
]  # fmt: skip
ROTATED = [((3, 1024), (3, 1)), ((2, 4096), (2, 32)), ((5008,), ()), ((5, 16), (5, 1))]
EMPTY = ((0, 16), (0, 1)), ((0, 16), ())


@pytest.mark.parametrize("kept", [False, True, "guided"])
@pytest.mark.parametrize("block", [0, 16])
@pytest.mark.parametrize("backend", ["reference", "triton", "cuda"])  # cpu refuses them
def test_bad_alphas_are_counted_once(backend, block, kept, generator):
    device, bad = device_of(backend), torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, -1.0])
    if (reason := fk.available_backends(device)[backend]) is not None:
        pytest.skip(f"backend {backend}: {reason}")
    chosen, grid = backends.load(backend), fk.Grid.uniform(2)
    layouts, alphas, expected = [*(ROTATED if block else LAYOUTS), *EMPTY], [], 0
    for shape, scales in layouts:
        alpha = torch.rand(scales, generator=generator) + 0.1
        flat, count = alpha.view(-1), int(torch.randint(0, 4, (), generator=generator))
        for i in torch.randperm(alpha.numel(), generator=generator)[:count].tolist():
            flat[i] = bad[int(torch.randint(0, len(bad), (), generator=generator))]
        flat[-1:] = bad[0]
        expected += int((~((alpha > 0) & alpha.isfinite())).sum()) if 0 not in shape else 0
        alphas.append(alpha.to(device))
    i64, f64 = (lambda x, d=d: torch.tensor(x, dtype=d) for d in (torch.int64, torch.float64))
    numels = [torch.Size(shape).numel() for shape, _ in layouts]
    draw = Draw("uniform", i64(1), i64(2), [*range(len(layouts))], [(0, max(n, 1), max(n, 1)) for n in numels])
    mix = Mix(torch.tensor(1.0, device=device), f64(0.5), 0.3, None)
    counters = torch.tensor([5, 6, 7], device=device)
    guided, kept = kept == "guided", kept is True
    plus = torch.full((0 if guided else 1,), float("nan") if kept else 1.0, device=device)
    losses = Losses(plus, torch.zeros_like(plus), counters, guided)
    grads = [torch.ones(shape, device=device) for shape, _ in layouts]
    chosen.estimate_gradient_(grads, alphas, draw, mix, losses, 1, block)
    assert counters.tolist() == [5 + kept, 6, 7 + expected]
    latents, first, second = (
        [torch.ones(s, device=device) for s, _ in [*layouts, ((7,), ())]] for _ in range(3)
    )
    grads = [torch.ones_like(t) for t in latents]  # the last one has no alpha
    update = Update(UpdateRule("adamw"), f64(0.1), i64(1), [], [first, second])
    chosen.estimate_update_(latents, [], grads, alphas, draw, mix, losses, grid, update, block)
    assert counters.tolist() == [5 + 2 * kept, 6, 7 + 2 * expected]
