"""The coefficients A and B_i of the estimate, from the losses (docs/contract.md, sections 4 and 5)."""

from __future__ import annotations

import math

import triton
import triton.language as tl

from ...spec.call import Draw, Losses, Mix
from .elements import direction_sign, is_finite
from .launch import mixed, rounded
from .tables import entry, guide_scale, names_of, pointer

ALPHAS = tl.constexpr(512)  # that a program checks at a time


@triton.jit
def read_losses(B, counters, seed, step, mixture, norm, losses_plus, losses_minus, n, half_inv_eps):
    """Write the B_i, count; A, whether every direction and whether the norm is lost. For one program."""
    guide, b = mixture
    zero = tl.load(norm) * 0.0
    names = names_of(seed, step, (zero == zero).to(tl.int64))
    total = tl.zeros([], tl.float32)
    lost = tl.zeros([], tl.int32)
    for i in tl.range(0, n):
        c = (tl.load(losses_plus + i) - tl.load(losses_minus + i)) * half_inv_eps
        usable = is_finite(c)
        lost += tl.where(usable, 0, 1)
        c = tl.div_rn(tl.where(usable, c, 0.0), tl.zeros([], tl.float32) + n)  # `/` may be 2 ulp off
        total += c * direction_sign(names, i)
        tl.store(B + i, c * b)
    norm_lost = tl.where((n > 0) & (is_finite(tl.load(norm)) == 0), 1, 0)
    if counters is not None:
        tl.atomic_add(counters, lost.to(tl.int64))  # by one thread; a load would be by all
        tl.atomic_add(counters + 1, norm_lost.to(tl.int64))
    return guide_scale(norm, total * guide, 1.0), lost == n, norm_lost == 1


@triton.jit
def count_bad_alphas(counters, row, begin, PER_TENSOR: tl.constexpr):
    """Count the alphas that are not finite and > 0, each by the program that holds its first element.

    At the end of a kernel, when its loop has read them. Only what is wrong costs an access to the counters.
    """
    alpha = pointer(row, "ALPHA", tl.float32)
    if PER_TENSOR:
        first, stop = begin * 0, (begin == 0).to(tl.int64)
    else:
        length, end = entry(row, "SCALE_LENGTH"), tl.minimum(begin + entry(row, "SPAN"), entry(row, "NUMEL"))
        first, stop = (begin + length - 1) // length, (end + length - 1) // length
    stop = tl.where(entry(row, "ALPHA") != 0, stop, first)
    place = tl.arange(0, ALPHAS)
    bad = place * 0
    for start in tl.range(first, stop, ALPHAS):
        x = tl.load(alpha + start + place, mask=start + place < stop, other=1.0)
        bad += (((x > 0) & is_finite(x)) == 0).to(tl.int32)
    tl.atomic_add(counters + 2 + place * 0, bad.to(tl.int64), mask=bad != 0)


def loss_arguments(draw: Draw, mix: Mix, losses: Losses) -> dict[str, object]:
    """Kernel arguments for read_losses and mixing."""
    eps = rounded(mix.epsilon)
    return {
        "losses_plus": losses.plus,
        "losses_minus": losses.minus,
        "n": losses.plus.numel(),
        "half_inv_eps": rounded(0.5 / eps) if eps else math.inf,
        **mixed(draw, mix),
    }
