"""The coefficients A and B_i of the estimate, from the losses (docs/contract.md, sections 4 and 5)."""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from ...spec.call import Losses, Mix
from . import program
from .elements import direction_sign, is_finite
from .launch import rounded

#: Places of the coefficients: A, 1 if directions or norm are lost, 1 if the norm is, the optimizer's scalars,
#: then the B_i.
A_AT, LOST_AT, SKIP_AT, SIZE_AT, DECAY_AT, ROOT_AT, B_AT = (tl.constexpr(i) for i in range(7))
ALPHAS = tl.constexpr(512)  # that a program checks at a time


@triton.jit
def write_coefficients(coef, counters, draw, mix, losses, config: tl.constexpr):
    """Write A, the B_i and what is lost, and count it. For one program. Guided noise has c = N and s = 1."""
    losses_plus, losses_minus, n, half_inv_eps = losses
    norm = mix[0]
    guide, b = program.mixing(mix, config)
    zero = tl.load(norm) * 0.0
    names = program.names_of(draw, (zero == zero).to(tl.int64))
    total = tl.zeros([], tl.float32)
    lost = tl.zeros([], tl.int32)
    if config.guided:
        N = tl.load(norm)
        tl.store(coef + B_AT, N * b)
        A = tl.where((N > 0) & is_finite(N), guide, 0.0)
    else:
        for i in tl.range(0, n):
            c = (tl.load(losses_plus + i) - tl.load(losses_minus + i)) * half_inv_eps
            usable = is_finite(c)
            lost += tl.where(usable, 0, 1)
            c = tl.div_rn(tl.where(usable, c, 0.0), tl.zeros([], tl.float32) + n)  # `/` may be 2 ulp off
            total += c * direction_sign(names, i)
            tl.store(coef + B_AT + i, c * b)
        A = program.guide_scale(norm, total * guide, 1.0)
    norm_lost = tl.where((n > 0) & (is_finite(tl.load(norm)) == 0), 1, 0)
    if counters is not None:
        tl.atomic_add(counters, lost.to(tl.int64))  # by one thread; a load would be by all
        tl.atomic_add(counters + 1, norm_lost.to(tl.int64))
    tl.store(coef + A_AT, A)
    tl.store(coef + LOST_AT, ((lost == n) | (norm_lost == 1)).to(tl.float32))
    tl.store(coef + SKIP_AT, norm_lost.to(tl.float32))


@triton.jit
def count_bad_alphas(counters, p, config: tl.constexpr):
    """Count the alphas that are not finite and > 0, each by the program that holds its first element.

    At the end of a kernel, when its loop has read them. Only a bad one costs an access to the counters.
    """
    if config.per_tensor:
        first, stop = p.begin * 0, (p.begin == 0).to(tl.int64)
    else:
        length = program.entry(p.row, "SCALE_LENGTH")
        first, stop = (p.begin + length - 1) // length, (p.end + length - 1) // length
    stop = tl.where(program.entry(p.row, "ALPHA") != 0, stop, first)
    place = tl.arange(0, ALPHAS)
    bad = place * 0
    for start in tl.range(first, stop, ALPHAS):
        x = tl.load(p.alpha + start + place, mask=start + place < stop, other=1.0)
        bad += (((x > 0) & is_finite(x)) == 0).to(tl.int32)
    tl.atomic_add(counters + 2 + place * 0, bad.to(tl.int64), mask=bad != 0)


def losses_of(losses: Losses, mix: Mix) -> tuple[Tensor, Tensor, int, float]:
    """Losses, the number of directions, and 1 / (2 eps)."""
    eps = rounded(mix.epsilon)
    return losses.plus, losses.minus, losses.directions, rounded(0.5 / eps) if eps else math.inf
