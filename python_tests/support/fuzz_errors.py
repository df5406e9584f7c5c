"""By how much a result of a native op may differ from the reference's (fuzzing.py)."""

import torch

from fogzo_kernels.backends import reference

from .tolerances import EXACT, HALF_ULP, SMALLEST


def one_code(alpha, out, grid, distribution):
    """A code of inexact noise may move by one where y lies at a tie; two values are rounded."""
    if distribution in EXACT:
        return torch.zeros(out.shape)
    delta = (alpha * grid.r).max().item() if alpha.numel() else 0.0
    size = 1.0 if out.dtype == torch.int8 else 1.01 * delta + 2 * HALF_ULP[out.dtype] * 129 * delta
    return torch.full(out.shape, size)


def slope_error(out, g):
    """2e-6 of the derivative, and one rounding to the dtype of the output."""
    size = g.float().abs()
    return size * 2.1e-6 + 2 * HALF_ULP[out.dtype] * size + SMALLEST[out.dtype]


def over_blocks(terms, block):
    """What a transform makes of absolute terms at most."""
    if not block or not terms.numel():
        return terms
    return terms.view(-1, block).sum(1, keepdim=True).expand(-1, block).reshape(-1) / block**0.5


def estimate_errors(a, mix, losses, draw, grid, m_off, block):
    """Twice what tolerances.estimate_error allows one backend: two of them are compared."""
    A, B, _ = reference.coefficients(a["grads"], a["alphas"], draw, mix, losses._replace(counters=None))
    errors, t = [], reference.sizes(mix, len(a["grads"]))
    for i, g in enumerate(a["grads"]):
        e = reference.elements(g.numel(), draw.layouts[i], g.device)
        guide = (A.abs() * g.flatten().float().abs()).double()
        added, noise = torch.zeros_like(guide), torch.zeros_like(guide)
        inv = 1 / reference.delta_of(a["alphas"][i], grid.r, g).double()
        for direction, b in enumerate(B * t[i]):
            m = reference.noise_m(e, draw, direction, draw.tensor_ids[i])
            added += inv * b.abs() * m.abs()
            noise += inv * b.abs()
        added, noise = guide + over_blocks(added, block), over_blocks(noise, block)
        rounding = 0.0 if g.dtype == torch.float32 else 2 * HALF_ULP[g.dtype] * added + 2 * SMALLEST[g.dtype]
        errors.append((32 if block else 8) * 2.0**-23 * added + noise * m_off + rounding)
    return errors


def alpha_errors(grads, latents, alphas, factors, grid, block):
    """Of gradients of alphas: 1e-5 of the sum of absolute terms for each of the two backends."""
    errors = []
    for g, theta, alpha, factor in zip(grads, latents, alphas, factors, strict=True):
        x = reference.rotated(theta.flatten().float(), block)
        slope = reference.alpha_slope(x, reference.delta_of(alpha, grid.r, theta), grid)
        terms = (g.flatten().float() * slope).abs().double()
        size = reference.sum_of(terms.view(alpha.numel(), terms.numel() // max(alpha.numel(), 1)))
        errors.append(2e-5 * abs(factor) * size + 2.0**-140)
    return errors
