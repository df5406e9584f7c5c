"""The estimator's value: closed forms of the contract (section 1) for beta = 1, 0 and between."""

import numpy as np
import pytest
import torch
from conftest import device_of

import fogzo_kernels as fk

GRID, STE = fk.Grid.uniform(8), fk.StraightThrough("identity", clip=False)
D = 24


def quadratic(generator):
    """Loss theta^T H theta / 2 + b theta, its latent and gradient; the guide is another vector."""
    root = torch.randn(D, D, generator=generator, dtype=torch.float64)
    H = root @ root.T / D
    b = torch.randn(D, generator=generator, dtype=torch.float64)
    theta = torch.randn(D, generator=generator, dtype=torch.float64)
    guide = torch.randn(D, generator=generator)
    return (lambda x: x @ H @ x / 2 + b @ x), theta, H @ theta + b, guide


def directions(guide, alpha, norm, one_minus_beta, seed, step, n, distribution):
    """v_i in units of delta, from the public noise and signs, in float64."""
    g_w = alpha * guide.double()
    signs = [fk.direction_sign(seed, step, i) for i in range(n)]
    u = [
        fk.noise(len(guide), distribution, seed=seed, step=step, direction=i, backend="reference")
        for i in range(n)
    ]
    return [
        (1 - one_minus_beta) ** 0.5 * s * g_w / norm + one_minus_beta**0.5 * x.double()
        for s, x in zip(signs, u, strict=True)
    ]


def estimate(backend, loss, theta, guide, alpha, one_minus_beta, n, seed, step=0, ste=STE):
    """G of the unquantized loss: what the probes would see if Q were smooth.

    An offset that is the same in both losses does not matter, so it keeps float32 losses accurate.
    """
    norm = fk.guide_norm(guide, alpha, grid=GRID, backend="reference")
    eps = ste.epsilon(GRID)
    a = alpha.double()
    v = directions(guide, a, norm.double(), one_minus_beta, seed, step, n, ste.distribution)
    losses = torch.stack(
        [torch.stack([loss(theta + sign * eps * a * x) - loss(theta) for x in v]) for sign in (1, -1)]
    )
    G = guide.clone().to(device_of(backend))
    plus, minus, alpha, norm = (
        x.float().contiguous().to(device_of(backend)) for x in (losses[0], losses[1], alpha, norm)
    )
    fk.estimate_gradient_(
        G,
        plus,
        minus,
        alpha,
        norm,
        grid=GRID,
        straight_through=ste,
        one_minus_beta=one_minus_beta,
        seed=seed,
        step=step,
        backend=backend,
    )
    return G.cpu().double(), norm.double(), v


def test_beta_one_projects_on_the_guide(backend, generator):
    """G = g_hat (g_hat . grad), exact for a quadratic: the finite difference is central."""
    loss, theta, grad, guide = quadratic(generator)
    alpha = torch.tensor(0.1)
    G, _, _ = estimate(backend, loss, theta, guide, alpha, 0.0, n=1, seed=5)
    unit = guide.double() / guide.double().norm()
    torch.testing.assert_close(G, unit * (unit @ grad), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("one_minus_beta", [1.0, 0.4, 1e-9])
def test_value_is_the_directional_derivatives(backend, generator, one_minus_beta):
    """G = mean_i (v_i . grad) v_i with one alpha; beta = 0 is n-SPSA."""
    loss, theta, grad, guide = quadratic(generator)
    alpha = torch.tensor(0.1)
    G, _, v = estimate(backend, loss, theta, guide, alpha, one_minus_beta, n=4, seed=6)
    expected = sum((x @ grad) * x for x in v) / 4
    torch.testing.assert_close(G, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("distribution", ["uniform", "rademacher", "gaussian"])
@pytest.mark.parametrize("one_minus_beta", [1.0, 0.5])
def test_the_mean_over_directions_is_the_stated_expectation(distribution, one_minus_beta, generator):
    """E[G] = beta g_hat g_hat^T grad + (1 - beta) grad; random signs remove the cross term."""
    loss, theta, grad, guide = quadratic(generator)
    ste = fk.StraightThrough("identity", clip=False, noise=distribution)
    n, draws = 64, 40
    found = torch.stack(
        [
            estimate("cpu", loss, theta, guide, torch.tensor(0.1), one_minus_beta, n, 7, step, ste)[0]
            for step in range(draws)
        ]
    )
    unit = guide.double() / guide.double().norm()
    expected = (1 - one_minus_beta) * unit * (unit @ grad) + one_minus_beta * grad
    error = (found.mean(0) - expected) / (found.std(0) / draws**0.5)
    assert error.abs().max() < 5.5, error
    assert error.square().mean().sqrt() < 1.8


def test_several_alphas_give_g_where_the_guide_is_right(backend, generator):
    """Step units: G == g for any mix of steps when the STE gradient is the true one (beta = 1)."""
    loss, theta, grad, _ = quadratic(generator)
    alpha = torch.logspace(-2, 0, D)
    G, _, _ = estimate(backend, loss, theta, grad.float(), alpha, 0.0, n=1, seed=8)
    torch.testing.assert_close(G, grad, rtol=2e-5, atol=1e-6)


def test_number_of_directions_is_divided_out(backend, generator):
    loss, theta, grad, _ = quadratic(generator)
    for n in (1, 2, 5):
        G, _, _ = estimate(backend, loss, theta, grad.float(), torch.tensor(0.1), 0.0, n=n, seed=9)
        torch.testing.assert_close(G, grad, rtol=2e-5, atol=1e-6)


def test_estimate_is_equivariant(backend, generator):
    """Scaling gradient and losses by a loss scaler's S scales G by S."""
    loss, theta, _, guide = quadratic(generator)
    alpha, scale = torch.tensor(0.1), 1024.0
    G, _, _ = estimate(backend, loss, theta, guide, alpha, 0.3, n=2, seed=10)
    scaled, _, _ = estimate(backend, lambda x: scale * loss(x), theta, scale * guide, alpha, 0.3, n=2, seed=10)
    torch.testing.assert_close(scaled, scale * G, rtol=1e-5, atol=1e-5)


def test_noise_survives_beta_close_to_one(backend):
    """1 - beta = 1e-9 is below float32's spacing at 1, and still moves the weights."""
    theta = torch.zeros(4096, device=device_of(backend))
    out = torch.full_like(theta, float("nan"))
    fk.perturb_quantize_(
        out,
        None,
        theta,
        torch.zeros_like(theta),
        torch.tensor(1e-5, device=theta.device),
        torch.tensor(0.0, device=theta.device),
        grid=fk.Grid.half_offset(8),
        straight_through=STE,
        one_minus_beta=1e-9,
        seed=1,
        epsilon_scale=1e5,
        backend=backend,
    )
    assert len(out.unique()) > 2
    draws = [fk.noise(8, "uniform", seed=1, step=s, backend=backend, device=theta.device).cpu() for s in (0, 1)]
    assert not np.array_equal(*draws)


SMOOTH = {
    "identity": lambda x: x.clamp(-2, 1),
    "hardtanh": lambda x: x.clamp(-1, 1),
    "tanh": torch.tanh,
    "approxsign": lambda x: torch.where(x.abs() < 1, 2 * x - x * x.abs(), x.sign()),
}


@pytest.mark.parametrize("kind", sorted(SMOOTH))
def test_noise_smooths_the_quantizer_as_the_derivative_says(kind):
    """E[Q(x + eps_bar u)] is the function whose derivative the estimator uses (contract section 1)."""
    straight_through = fk.StraightThrough(kind)
    grid = fk.Grid.uniform(2) if kind == "identity" else fk.Grid.sign()
    u = fk.noise(2**20, straight_through.distribution, seed=31)
    alpha = torch.ones(())
    # u takes discrete values: the sign jumps by 2 over an atom, of 1/256 at most for triangular
    atom = 2 / 256 if straight_through.distribution == "triangular" else 1e-4
    x = torch.linspace(-1.4, 1.4, 15)
    if kind == "identity":  # a smoothed clamp rounds its corners: stay half a step inside
        x = torch.cat([x[(x > -1.5) & (x < 0.5)], torch.tensor([-3.0, 2.0])])
    for point in x:
        q = torch.empty_like(u)
        fk.quantize_(q, point + straight_through.eps_bar * u, alpha, grid=grid)
        error = 5 * q.double().std() / 2**10 + atom
        assert abs(q.double().mean() - SMOOTH[kind](point.double())) < error, point
    inside = torch.linspace(-0.9, 0.4, 14).requires_grad_()
    fk.quantize(inside, alpha, grid=grid, straight_through=straight_through).sum().backward()
    smooth = inside.detach().clone().requires_grad_()
    SMOOTH[kind](smooth).sum().backward()
    torch.testing.assert_close(inside.grad, smooth.grad, rtol=0, atol=2e-6)
