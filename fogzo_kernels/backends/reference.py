"""The contract in eager PyTorch: the specification that runs (docs/contract.md).

Readable before fast. PyTorch has no fused multiply-add, so ``fma`` forms its product in float64,
where it is exact, and rounds once to float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..spec.call import Draw, Losses, Measure, Mix, Update
from ..spec.grid import Grid
from ..spec.hadamard import factor
from ..spec.noise import DISTRIBUTIONS, MASK32, SIGN_TENSOR_ID, Layout, philox4x32
from ..spec.scale import STATISTICS
from ..spec.straight_through import VARIANTS as DERIVATIVES
from ..spec.straight_through import StraightThrough
from ..spec.update import VARIANTS, UpdateRule

Tensors = Sequence[Tensor]


def unavailable(device: torch.device) -> str | None:
    """None: runs wherever PyTorch does."""
    return None


# ---- section 2: noise


def noise_words(chunk: Tensor, draw: Draw, direction: int, tensor_id: int) -> tuple[Tensor, ...]:
    """The four words of each chunk of 8 elements."""
    seed, step = draw.seed.to(chunk.device), draw.step.to(chunk.device)
    low, high, name = chunk & MASK32, (chunk >> 32) | direction << 16, torch.full_like(chunk, tensor_id)
    key = seed & MASK32, (seed >> 32) & MASK32
    return philox4x32((low, high, step.expand_as(chunk), name), key)


def elements(numel: int, layout: Layout, device: torch.device) -> Tensor:
    """Global element index of each local element."""
    offset, inner, stride = layout
    j = torch.arange(numel, dtype=torch.int64, device=device)
    return offset + (j // inner) * stride + j % inner


def noise_m(e: Tensor, draw: Draw, direction: int, tensor_id: int) -> Tensor:
    """m of the elements ``e``, float32."""
    words = torch.stack(noise_words(e >> 3, draw, direction, tensor_id))
    word = words.gather(0, ((e >> 1) & 3).unsqueeze(0)).squeeze(0)
    low, high = word & 0xFFFF, word >> 16
    odd = (e & 1).bool()
    k = torch.where(odd, high, low)
    match draw.distribution:
        case "uniform":
            return (2 * signed16(k) + 1).float()
        case "rademacher":
            return 1.0 - 2.0 * (k >> 15).float()
        case "triangular":
            return ((k & 0xFF) + (k >> 8) - 255).float()
        case "logistic":
            return torch.log((k.double() + 0.5) / (65535.5 - k.double())).float()
        case "gaussian":
            radius = torch.sqrt(-2.0 * torch.log((low.double() + 0.5) / 65536.0))
            angle = math.pi * (2 * signed16(high) + 1).double() / 65536.0
            return (radius * torch.where(odd, torch.sin(angle), torch.cos(angle))).float()
        case unknown:
            raise ValueError(f"distribution must be one of {', '.join(DISTRIBUTIONS)}, got {unknown!r}")


def signed16(k: Tensor) -> Tensor:
    return k - ((k & 0x8000) << 1)


def sign(draw: Draw, direction: int, device: torch.device) -> Tensor:
    """s_i as a 0-dim float32 tensor."""
    chunk = torch.zeros((), dtype=torch.int64, device=device)
    word = noise_words(chunk, draw, direction, SIGN_TENSOR_ID)[0]
    return 1.0 - 2.0 * (word & 1).float()


def noise(numel: int, draw: Draw, direction: int, device: torch.device) -> Tensor:
    """u = C m, float32, shape (numel,)."""
    e = elements(numel, draw.layouts[0], device)
    return noise_m(e, draw, direction, draw.tensor_ids[0]) * DISTRIBUTIONS[draw.distribution]


# ---- section 4: arithmetic


def fma(a: Tensor, b: Tensor, c: Tensor | float) -> Tensor:
    return (a.double() * b.double() + (c.double() if isinstance(c, Tensor) else c)).float()


def cells_of(t: Tensor, alpha: Tensor) -> Tensor:
    """The elements of each alpha in a row: a tensor, a row, or a group of the last dimension."""
    return t.reshape(alpha.numel(), t.numel() // max(alpha.numel(), 1))


def delta_of(alpha: Tensor, r: int, like: Tensor) -> Tensor:
    """delta of each element, flat."""
    return (alpha.flatten() * r).repeat_interleave(cells_of(like, alpha).shape[1])


def position(x: Tensor, delta: Tensor, grid: Grid) -> Tensor:
    """z: the place of x on the grid, in steps of delta from code 0."""
    return fma(x, 1 / delta, -grid.offset)


def code_of(y: Tensor, grid: Grid) -> Tensor:
    low = torch.where(y > grid.qmin, y, torch.full_like(y, grid.qmin))  # NaN gives qmin
    return torch.round(low.clamp(max=grid.qmax))


def write(out: Tensor, code: Tensor, delta: Tensor, grid: Grid) -> None:
    """Store codes (int8) or values, with one conversion."""
    values = code if out.dtype == torch.int8 else delta * (code + grid.offset)
    out.copy_(values.view(out.shape))


def usable(norm: Tensor) -> Tensor:
    return torch.isfinite(norm) & (norm > 0)


def guide_sumsq(grads: Tensors, alphas: Tensors, r: int, root: bool, per_tensor: bool) -> Tensor:
    """Sum of the squares of delta * g, float64, or its root, float32."""
    terms = [
        (g.flatten().double() * delta_of(alpha, r, g).double()).square().sum()
        for g, alpha in zip(grads, alphas, strict=True)
    ]
    sums = torch.stack(terms)
    if per_tensor:
        return sums
    return sums.sum().sqrt().float() if root else sums.sum()


def perturb_quantize_(
    plus: Tensors,
    minus: Tensors,
    latents: Tensors,
    grads: Tensors,
    alphas: Tensors,
    draw: Draw,
    mix: Mix,
    direction: int,
    grid: Grid,
    block: int,
) -> None:
    """Write Q(w + eps v) and Q(w - eps v)."""
    device, omb = mix.norm.device, mix.one_minus_beta.to(mix.norm.device)
    guide = torch.sqrt(1 - omb).float() * sign(draw, direction, device)
    a = torch.where(usable(mix.norm), guide / mix.norm, 0.0)
    b = (torch.sqrt(omb) * DISTRIBUTIONS[draw.distribution]).float()
    eps = torch.tensor(mix.epsilon, dtype=torch.float32, device=device)
    noise_sizes = b * sizes(mix, len(latents))
    for i, (theta, g, alpha) in enumerate(zip(latents, grads, alphas, strict=True)):
        m = noise_m(elements(theta.numel(), draw.layouts[i], device), draw, direction, draw.tensor_ids[i])
        b = noise_sizes[i]
        delta = delta_of(alpha, grid.r, theta)
        gam, v, x = a * delta, b * m, theta.flatten()
        for out, signed_eps in ((plus, eps), (minus, -eps)):
            if not out:
                continue
            if block:  # the guide moves the weight, the noise moves the rotated weight
                x = rotated(fma(signed_eps * gam * delta, g.flatten(), theta.flatten()), block)
            else:
                v = fma(gam, g.flatten(), b * m)
            write(out[i], code_of(fma(signed_eps, v, position(x, delta, grid)), grid), delta, grid)


def estimate_gradient_(
    grads: Tensors, alphas: Tensors, draw: Draw, mix: Mix, losses: Losses, r: int, block: int
) -> None:
    """Replace g by G = A g + (1 / delta) sum_i B_i m_i."""
    A, B, keep = coefficients(grads, alphas, draw, mix, losses)
    t = sizes(mix, len(grads))
    for i, (g, alpha) in enumerate(zip(grads, alphas, strict=True)):
        G = estimate(g, alpha, A, B * t[i], draw, i, r, block)
        g.copy_(torch.where(keep, g, G.to(g.dtype).view(g.shape)))


def sizes(mix: Mix, count: int) -> Tensor:
    """t of each tensor."""
    return (
        torch.ones(count, dtype=torch.float32, device=mix.norm.device) if mix.factors is None else mix.factors
    )


def coefficients(
    grads: Tensors, alphas: Tensors, draw: Draw, mix: Mix, losses: Losses
) -> tuple[Tensor, Tensor, Tensor]:
    """A, the B_i, and whether the gradient stays as it is; counts what was lost."""
    n, device = losses.plus.numel(), mix.norm.device
    if losses.guided:
        c = mix.norm.double().view(1)
        finite, signs = torch.ones(1, dtype=torch.bool, device=device), torch.ones_like(c)
    else:
        eps = torch.tensor(mix.epsilon, dtype=torch.float32, device=device).double()
        c = (losses.plus.double() - losses.minus.double()) / (2 * eps)
        finite = torch.isfinite(c.float())
        c = torch.where(finite, c, 0.0) / n
        signs = torch.stack([sign(draw, i, device) for i in range(n)])
    omb = mix.one_minus_beta.to(device)
    over_norm = torch.where(usable(mix.norm), 1 / mix.norm.double(), 0.0)
    A = ((c * signs).sum() * torch.sqrt(1 - omb) * over_norm).float()
    B = (c * torch.sqrt(omb) * DISTRIBUTIONS[draw.distribution]).float()
    norm_lost = ~torch.isfinite(mix.norm)
    if losses.counters is not None:
        used = [x for x, g in zip(alphas, grads, strict=False) if g.numel()]
        bad = sum((~(torch.isfinite(x) & (x > 0))).sum() for x in used)
        lost = [(~finite).sum(), norm_lost.long(), torch.as_tensor(bad, device=device)]
        losses.counters.add_(torch.stack(lost))
    return A, B, ~finite.any() | norm_lost


def estimate(g: Tensor, alpha: Tensor, A: Tensor, B: Tensor, draw: Draw, i: int, r: int, block: int) -> Tensor:
    """G of tensor i, flat float32."""
    e = elements(g.numel(), draw.layouts[i], g.device)
    acc = torch.zeros(g.numel(), dtype=torch.float32, device=g.device)
    for direction in range(B.numel()):
        acc = fma(B[direction], noise_m(e, draw, direction, draw.tensor_ids[i]), acc)
    return fma(A, g.flatten(), rotated((1 / delta_of(alpha, r, g)) * acc, block))


# ---- section 4: the fused tail


def estimate_update_(
    latents: Tensors,
    quantized: Tensors,
    grads: Tensors,
    alphas: Tensors,
    draw: Draw,
    mix: Mix,
    losses: Losses,
    grid: Grid,
    update: Update,
    block: int,
) -> None:
    """G, the optimizer's step with it, then Q(theta)."""
    n, device, rule = losses.directions, mix.norm.device, update.rule
    keep, skip = torch.tensor(True, device=device), torch.tensor(False, device=device)
    if n:
        skip = ~torch.isfinite(mix.norm)
        A, B, keep = coefficients(grads, alphas, draw, mix, losses)
    t = sizes(mix, len(alphas))
    lr, count = update.lr.to(device), update.optimizer_step.to(device)
    for i, (latent, grad) in enumerate(zip(latents, grads, strict=True)):
        G = grad.flatten().float()
        if n and i < len(alphas):
            G = torch.where(keep, G, estimate(grad, alphas[i], A, B * t[i], draw, i, grid.r, block))
        theta = update.masters[i] if update.masters else latent
        state = [s[i] for s in update.states]
        new = updated(rule, lr, count, theta.flatten().float(), G, [s.flatten() for s in state])
        for old, value in zip((theta, *state), new, strict=True):
            old.copy_(torch.where(skip, old, value.view(old.shape).to(old.dtype)))
        if update.masters:
            latent.copy_(torch.where(skip, latent, theta.to(latent.dtype)))
    if quantized:
        quantize_(quantized, latents[: len(alphas)], alphas, grid, block)


def updated(
    rule: UpdateRule, lr: Tensor, count: Tensor, theta: Tensor, G: Tensor, state: list[Tensor]
) -> tuple[Tensor, ...]:
    """theta and its state after the step, float32; scalars are formed in float64 and rounded once."""
    t = count.double()

    def rounded(x: float | Tensor) -> Tensor:
        return torch.as_tensor(x, dtype=torch.float32, device=theta.device)

    match rule.variant:
        case "adamw":
            decay, size = rounded(1 - lr * rule.weight_decay), rounded(lr / (1 - rule.beta1**t))
            root = rounded((1 - rule.beta2**t).rsqrt())
            m, v = state
            m = fma(rounded(1 - rule.beta1), G - m, m)
            v = fma(rounded(1 - rule.beta2) * G, G, rounded(rule.beta2) * v)
            v_root = v.double().sqrt().float()  # PyTorch's float32 root on a CPU is not correctly rounded
            return fma(-size, m / fma(v_root, root, rounded(rule.eps)), decay * theta), m, v
        case "sgd":
            return (fma(-rounded(lr), fma(rounded(rule.weight_decay), theta, G), theta),)
        case "momentum" | "nesterov":
            keep = rounded(torch.where(t == 1, torch.ones_like(t), 1 - rule.dampening))
            d = fma(rounded(rule.weight_decay), theta, G)
            b = fma(keep, d, rounded(rule.momentum) * state[0])
            d = fma(rounded(rule.momentum), b, d) if rule.variant == "nesterov" else b
            return fma(-rounded(lr), d, theta), b
        case unknown:
            raise ValueError(f"rule must be one of {', '.join(VARIANTS)}, got {unknown!r}")


# ---- sections 1 and 3: quantizer and straight-through derivative


def quantize_(out: Tensors, latents: Tensors, alphas: Tensors, grid: Grid, block: int) -> None:
    """Write Q(theta)."""
    for q, theta, alpha in zip(out, latents, alphas, strict=True):
        delta = delta_of(alpha, grid.r, theta)
        x = rotated(theta.flatten(), block)
        write(q, code_of(position(x, delta, grid), grid), delta, grid)


def derivative(theta: Tensor, delta: Tensor, grid: Grid, straight_through: StraightThrough) -> Tensor:
    """h'(theta); x = theta / alpha."""
    x, z = theta * (1 / delta) * grid.r, position(theta, delta, grid)
    match straight_through.variant:
        case "identity_clipped":
            return ((z > grid.qmin) & (z < grid.qmax)).float()
        case "identity_trust":
            return ((z >= grid.qmin - 0.5) & (z <= grid.qmax + 0.5)).float()
        case "identity":
            return torch.ones_like(theta)
        case "hardtanh":
            return (x.abs() < 1).float()
        case "tanh":
            return (1 - torch.tanh(x.double()).square()).float()
        case "approxsign":
            return (2 - 2 * x.abs()).clamp(min=0)
        case unknown:
            raise ValueError(f"straight_through must be one of {', '.join(DERIVATIVES)}, got {unknown!r}")


def straight_through_backward_(
    out: Tensors,
    grads: Tensors,
    latents: Tensors,
    alphas: Tensors,
    grid: Grid,
    straight_through: StraightThrough,
    block: int,
) -> None:
    """Write g * h'(theta)."""
    for q, g, theta, alpha in zip(out, grads, latents, alphas, strict=True):
        x = rotated(theta.flatten().float(), block)
        slope = derivative(x, delta_of(alpha, grid.r, theta), grid, straight_through)
        q.copy_(rotated(g.flatten().float() * slope, block).view(q.shape))


# ---- section 4: alphas from data


def measure_alphas_(alphas: Tensors, tensors: Tensors, measure: Measure) -> None:
    """Write max(factor * (statistic + add), least) of each cell."""
    for alpha, t in zip(alphas, tensors, strict=True):
        if alpha.numel():
            cells = cells_of(t, alpha)
            factor, add, least = alpha.new_tensor(measure[1:]).unbind()
            scaled = factor * (statistic_of(cells.double().abs(), measure.statistic).float() + add)
            alpha.copy_(torch.where(scaled < least, least, scaled).view(alpha.shape))  # NaN stays


def statistic_of(cells: Tensor, statistic: str) -> Tensor:
    """Of each row of absolute values, float64; 0 of no elements."""
    count = max(cells.shape[1], 1)
    match statistic:
        case "absmax":
            return cells.amax(1) if cells.shape[1] else cells.sum(1)
        case "absmean":
            return sum_of(cells) / count
        case "rms":
            return (sum_of(cells.square()) / count).sqrt()
        case unknown:
            raise ValueError(f"statistic must be one of {', '.join(STATISTICS)}, got {unknown!r}")


def sum_of(rows: Tensor, piece: int = 4096) -> Tensor:
    """The sum of each row, in pieces of a fixed size: PyTorch cuts a long sum by its number of threads."""
    while rows.shape[1] > piece:
        rows = torch.nn.functional.pad(rows, (0, -rows.shape[1] % piece))
        rows = rows.view(rows.shape[0], -1, piece).sum(2)
    return rows.sum(1)


# ---- section 4: learned scales


def learned_backward_(
    out: Tensors,
    alpha_grads: Tensors,
    grads: Tensors,
    latents: Tensors,
    alphas: Tensors,
    grid: Grid,
    straight_through: StraightThrough,
    factors: Sequence[float],
    block: int,
) -> None:
    """Write g * h'(theta), and the gradients of the alphas."""
    for i, (total, g, theta, alpha) in enumerate(zip(alpha_grads, grads, latents, alphas, strict=True)):
        x = rotated(theta.flatten().float(), block)
        slope = alpha_slope(x, delta_of(alpha, grid.r, theta), grid)
        terms = cells_of((g.flatten().float() * slope).double(), alpha)
        total.copy_((factors[i] * sum_of(terms)).view(total.shape))
    straight_through_backward_(out, grads, latents, alphas, grid, straight_through, block)


def alpha_slope(theta: Tensor, delta: Tensor, grid: Grid) -> Tensor:
    """dQ/dalpha."""
    z = position(theta, delta, grid)
    code = code_of(z, grid)
    between = (z >= grid.qmin) & (z <= grid.qmax) & (not grid.is_sign)
    return torch.where(between, code - z, grid.r * (code + grid.offset))


# ---- section 4: the Hadamard transform


def hadamard_(out: Tensors, tensors: Tensors, block: int) -> None:
    """Write the transform of each block of the last dimension: stages h = 1, 2, 4, .., then one product."""
    for y, t in zip(out, tensors, strict=True):
        y.copy_(rotated(t.float(), block).view(y.shape))


def rotated(x: Tensor, block: int) -> Tensor:
    """H of each block of float32 values; x itself without a transform."""
    shape, h = x.shape, 1
    if not block:
        return x
    x = x.float()
    while h < block:
        a, b = x.reshape(-1, 2, h).unbind(1)
        x = torch.stack((a + b, a - b), 1)
        h *= 2
    return (x * torch.tensor(factor(block), dtype=torch.float32)).view(shape)
