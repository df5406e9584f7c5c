"""What users write without this package, for each op of the benchmark.

eager     PyTorch, out of place, with torch.rand and its like; the optimizers are PyTorch's fused ones
loop      as MeZO's code does it: parameter by parameter, noise into a buffer, arithmetic in place
compile   torch.compile of the eager code, with the optimizer's arithmetic written out so that it fuses

They compute in the operands' own dtypes, which moves fewer bytes than the float32 of the contract, and
draw fresh noise in the estimate instead of seeding again: both are to their advantage.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import fogzo_kernels as fk

from .cases import (
    ADD,
    BETAS,
    DTYPES,
    EPS,
    FACTOR,
    GRID,
    LR,
    MOMENTUM,
    ONE_MINUS_BETA,
    OPTIMIZER_STEP,
    SEED,
    STEP,
    WEIGHT_DECAY,
    Case,
    Operands,
    lsq_factor,
    straight_through,
)

KINDS = ("eager", "loop", "compile")
SQRT_BETA, SQRT_OMB = math.sqrt(1 - ONE_MINUS_BETA), math.sqrt(ONE_MINUS_BETA)
SIGNS = [fk.direction_sign(SEED, STEP, i) for i in range(4)]
DECAY = 1 - LR * WEIGHT_DECAY
SIZE = LR / (1 - BETAS[0] ** OPTIMIZER_STEP)
ROOT = 1 / math.sqrt(1 - BETAS[1] ** OPTIMIZER_STEP)


# ---- noise of mean 0 and variance 1


UNIFORM, TRIANGULAR, LOGISTIC = math.sqrt(3), math.sqrt(6), math.sqrt(3) / math.pi


def machine_eps(x: Tensor) -> float:
    return torch.finfo(x.dtype).eps


#: distribution -> how it is drawn out of place, like a tensor, and into a buffer
DRAWS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "uniform": (
        lambda x: (torch.rand_like(x) * 2 - 1) * UNIFORM,
        lambda x: x.uniform_(-UNIFORM, UNIFORM),
    ),
    "rademacher": (
        lambda x: (torch.rand_like(x) < 0.5).to(x.dtype) * 2 - 1,
        lambda x: x.bernoulli_(0.5).mul_(2).sub_(1),
    ),
    "triangular": (
        lambda x: (torch.rand_like(x) - torch.rand_like(x)) * TRIANGULAR,
        lambda x: x.uniform_().sub_(torch.rand_like(x)).mul_(TRIANGULAR),
    ),
    "logistic": (
        lambda x: torch.logit(torch.rand_like(x), eps=machine_eps(x)) * LOGISTIC,
        lambda x: x.uniform_().logit_(eps=machine_eps(x)).mul_(LOGISTIC),
    ),
    "gaussian": (torch.randn_like, lambda x: x.normal_()),
}


def draw(like: Tensor, distribution: str) -> Tensor:
    """Out of place."""
    return DRAWS[distribution][0](like)


def draw_(buffer: Tensor, distribution: str) -> Tensor:
    """Into a buffer."""
    return DRAWS[distribution][1](buffer)


def scales(o: Operands) -> list[Tensor]:
    """0-dim, so that they do not change the dtype of what they multiply."""
    return [alpha.reshape(()) * GRID.r for alpha in o.alphas]


def epsilon(case: Case) -> float:
    return straight_through(case).epsilon(GRID)


# ---- eager


def rounded(z: Tensor, delta: Tensor, out: torch.dtype) -> Tensor:
    """Values, or codes, of a tensor in units of delta less the grid's offset."""
    codes = torch.clamp(torch.round(z), GRID.qmin, GRID.qmax)
    return codes.to(out) if out is torch.int8 else ((codes + GRID.offset) * delta).to(out)


def eager_norm(case: Case, o: Operands) -> Tensor:
    norms = [
        torch.linalg.vector_norm(d * g, dtype=torch.float32) for g, d in zip(o.grads, scales(o), strict=True)
    ]
    return torch.linalg.vector_norm(torch.stack(norms))


def mixed(case: Case, g: Tensor, delta: Tensor, norm: Tensor, direction: int) -> Tensor:
    """v: guide and noise."""
    return (SIGNS[direction] * SQRT_BETA * delta / norm) * g + SQRT_OMB * draw(g, case.distribution)


def eager_perturb(case: Case, o: Operands) -> list[Tensor]:
    eps, out = epsilon(case), DTYPES[case.dtypes][2]
    found = []
    for theta, g, delta in zip(o.latents, o.grads, scales(o), strict=True):
        v = mixed(case, g, delta, o.norm, 0)
        w = theta / delta - GRID.offset
        found.append(rounded(w + eps * v, delta, out))
        if case.spec.out == 2:
            found.append(rounded(w - eps * v, delta, out))
    return found


def eager_estimate(case: Case, o: Operands) -> list[Tensor]:
    n, found = case.spec.directions, []
    c = (o.losses_plus - o.losses_minus) / (2 * epsilon(case))
    for g, delta in zip(o.grads, scales(o), strict=True):
        total = sum(c[i] * mixed(case, g, delta, o.norm, i) for i in range(n))
        found.append(total / (n * delta))
    return found


def eager_quantize(case: Case, o: Operands) -> list[Tensor]:
    out = DTYPES[case.dtypes][2]
    return [
        rounded(theta / delta - GRID.offset, delta, out)
        for theta, delta in zip(o.latents, scales(o), strict=True)
    ]


def eager_measure(case: Case, o: Operands) -> list[Tensor]:
    return [
        FACTOR * (torch.linalg.vector_norm(x, dtype=torch.float32) / math.sqrt(x.numel()) + ADD)
        for x in o.latents
    ]


def lsq_slopes(z: Tensor) -> tuple[Tensor, Tensor]:
    """The derivatives of Q, the straight-through one and that by alpha, of a tensor in units of delta."""
    codes = torch.clamp(torch.round(z), GRID.qmin, GRID.qmax)
    inside = (z >= GRID.qmin) & (z <= GRID.qmax)
    return (z > GRID.qmin) & (z < GRID.qmax), torch.where(inside, codes - z, codes + GRID.offset)


def eager_learned(case: Case, o: Operands) -> list[Tensor]:
    """LSQ's backward: g of each tensor, then the gradient of each alpha."""
    found, sums = [], []
    for theta, g, alpha, delta in zip(o.latents, o.grads, o.alphas, scales(o), strict=True):
        passes, slope = lsq_slopes(theta / delta - GRID.offset)
        found.append(g * passes)
        sums.append((g * slope).sum(dtype=torch.float32) * lsq_factor(theta, alpha))
    return [*found, *sums]


def fused_optimizer(case: Case, latents: list[Tensor]) -> torch.optim.Optimizer:
    if case.op == "sgd":
        return torch.optim.SGD(latents, lr=LR, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, fused=True)
    if case.op == "adamw":
        return torch.optim.AdamW(
            latents,
            lr=LR,
            betas=BETAS,
            eps=EPS,
            weight_decay=WEIGHT_DECAY,
            fused=True,
            capturable=latents[0].is_cuda,
        )
    raise ValueError(f"op must be sgd or adamw, got {case.op!r}")


def eager_tail(case: Case, o: Operands, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    for theta, estimate in zip(o.latents, eager_estimate(case, o), strict=True):
        theta.grad = estimate.to(theta.dtype)
    optimizer.step()
    return eager_quantize(case, o)


# ---- the optimizers written out


def update_(case: Case, theta: Tensor, G: Tensor, first: Tensor, second: Tensor | None) -> None:
    if second is None:  # SGD with momentum
        first.mul_(MOMENTUM).add_(G).add_(theta, alpha=WEIGHT_DECAY)
        theta.sub_(first * LR)
        return
    first.mul_(BETAS[0]).add_(G, alpha=1 - BETAS[0])
    second.mul_(BETAS[1]).add_(G * G, alpha=1 - BETAS[1])
    theta.mul_(DECAY).sub_(SIZE * first / (second.sqrt() * ROOT + EPS))


def states(o: Operands) -> list[tuple[Tensor, Tensor | None]]:
    return list(zip(o.first, o.second or [None] * len(o.first), strict=True))


def written_out_tail(case: Case, o: Operands) -> list[Tensor]:
    """For torch.compile, which makes one kernel of it."""
    estimates = eager_estimate(case, o)
    for theta, G, (first, second) in zip(o.latents, estimates, states(o), strict=True):
        update_(case, theta, G, first, second)
    return eager_quantize(case, o)


# ---- the loop


def rounded_(out: Tensor, z: Tensor, delta: Tensor) -> None:
    z.round_().clamp_(GRID.qmin, GRID.qmax)
    if out.dtype is not torch.int8:
        z.add_(GRID.offset).mul_(delta)
    out.copy_(z)


def loop_norm(case: Case, o: Operands, buffer: Tensor) -> Tensor:
    total = torch.zeros_like(o.norm)
    for g, delta in zip(o.grads, scales(o), strict=True):
        u = buffer[: g.numel()].copy_(g).mul_(delta)
        total += torch.linalg.vector_norm(u, dtype=torch.float32) ** 2
    return total.sqrt_()


def loop_perturb(case: Case, o: Operands, buffer: Tensor) -> None:
    for out, sign in ((o.plus, 1), (o.minus, -1))[: case.spec.out]:
        eps = sign * epsilon(case)
        for theta, g, delta, q in zip(o.latents, o.grads, scales(o), out, strict=True):
            z = draw_(buffer[: g.numel()], case.distribution).mul_(eps * SQRT_OMB)
            z.addcmul_(g, (SIGNS[0] * SQRT_BETA * eps * delta / o.norm).to(g.dtype))
            z.add_(theta / delta).sub_(GRID.offset)
            rounded_(q, z, delta)


def loop_estimate(case: Case, o: Operands, buffer: Tensor) -> None:
    n = case.spec.directions
    c = (o.losses_plus - o.losses_minus) / (2 * n * epsilon(case))
    for g, delta in zip(o.grads, scales(o), strict=True):
        guide = sum(SIGNS[i] * c[i] for i in range(n)) * (SQRT_BETA / o.norm)
        g.mul_(guide)
        for i in range(n):
            u = draw_(buffer[: g.numel()], case.distribution)
            g.add_(u.mul_(SQRT_OMB * c[i] / delta))


def loop_tail(case: Case, o: Operands, buffer: Tensor) -> None:
    loop_estimate(case, o, buffer)
    for theta, g, (first, second) in zip(o.latents, o.grads, states(o), strict=True):
        update_(case, theta, g, first, second)
    loop_quantize(case, o, buffer)


def loop_quantize(case: Case, o: Operands, buffer: Tensor) -> None:
    for theta, delta, q in zip(o.latents, scales(o), o.plus, strict=True):
        z = buffer[: theta.numel()].copy_(theta).div_(delta).sub_(GRID.offset)
        rounded_(q, z, delta)


def loop_measure(case: Case, o: Operands, buffer: Tensor) -> None:
    for x, alpha in zip(o.latents, o.alphas, strict=True):
        squares = torch.mul(x, x, out=buffer[: x.numel()])
        alpha.copy_(squares.mean(dtype=torch.float32).sqrt_().add_(ADD).mul_(FACTOR))


def loop_learned(case: Case, o: Operands, buffer: Tensor) -> list[Tensor]:
    sums = []
    for theta, g, alpha, delta in zip(o.latents, o.grads, o.alphas, scales(o), strict=True):
        z = buffer[: theta.numel()].copy_(theta).div_(delta).sub_(GRID.offset)
        passes, slope = lsq_slopes(z)
        sums.append(slope.mul_(g).sum(dtype=torch.float32) * lsq_factor(theta, alpha))
        g.mul_(passes)
    return sums


# ---- by name

EAGER = {
    "norm": eager_norm, "perturb": eager_perturb, "perturb_both": eager_perturb,
    "estimate": eager_estimate, "estimate_n4": eager_estimate, "quantize": eager_quantize,
    "measure": eager_measure,
    "learned": eager_learned,
}  # fmt: skip
LOOP = {
    "norm": loop_norm, "perturb": loop_perturb, "perturb_both": loop_perturb,
    "estimate": loop_estimate, "estimate_n4": loop_estimate, "adamw": loop_tail, "sgd": loop_tail,
    "quantize": loop_quantize, "measure": loop_measure, "learned": loop_learned,
}  # fmt: skip


def baseline(kind: str, case: Case, sets: list[Operands]) -> list[Callable[[], object]]:
    """The code of that kind on each set of operands, ready to be called again and again."""
    if kind == "loop":
        like = sets[0].latents or sets[0].grads
        buffer = torch.empty(max(t.numel() for t in like), dtype=like[0].dtype, device=like[0].device)
        return [partial(LOOP[case.op], case, o, buffer) for o in sets]
    if kind == "eager":
        if case.op in EAGER:
            return [partial(EAGER[case.op], case, o) for o in sets]
        return [partial(eager_tail, case, o, fused_optimizer(case, o.latents)) for o in sets]
    torch.compiler.reset()  # each case is compiled alone, below the limit of recompilations
    compiled = torch.compile(partial(EAGER.get(case.op, written_out_tail), case), dynamic=False)
    return [partial(compiled, o) for o in sets]
