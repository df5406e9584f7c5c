"""The fused tail: estimate, optimizer step and the next Q(theta) in one pass (docs/contract.md, 4).

A table row has the quantized weight in PLUS and the master copy in MINUS. A tensor without an alpha is
not quantized: G = g, and no Q is written.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ...spec import grid as spec
from ...spec.call import Draw, Losses, Mix, Update
from ...spec.update import VARIANTS, UpdateRule
from ..plans import bits, plan
from .elements import (
    Grid,
    convert,
    element_sum,
    fma,
    load_tile,
    output_of,
    position,
    product,
    scale_of,
    scale_per_pair,
    store_tile,
    tile_sum,
)
from .hadamard import rotated_halves
from .launch import (
    DTYPES,
    Tensors,
    bits_or_device,
    grid_of,
    host_or_device,
    launch,
    named,
    rounded,
)
from .losses import count_bad_alphas, loss_arguments, read_losses
from .tables import (
    chunk_delta,
    chunk_numbers,
    chunks_from,
    element_delta,
    element_numbers,
    entry,
    layout_of,
    left_in_tile,
    mixing,
    names_of,
    pointer,
    program_row,
    tiled_part,
)

TILE = 1024  # elements per loop iteration, which holds twice as many arrays as those of the other ops
REGISTERS = 96  # the most of a thread: ptxas, left alone, spills some to reach fewer

#: The coefficients' places: A, 1 if the directions count, 1 if the step is skipped, the optimizer's
#: scalars, then the B_i.
A_AT, NOISE_AT, SKIP_AT, SIZE_AT, DECAY_AT, ROOT_AT, B_AT = (tl.constexpr(i) for i in range(7))
STATES = tl.constexpr(dict(VARIANTS))  # whose value is part of a compiled kernel's key


class Scalars(NamedTuple):
    """Of the optimizer, float32; for SGD ``decay`` is keep."""

    size: Any
    decay: Any
    root: Any
    first_weight: Any
    second_weight: Any
    second_decay: Any
    eps: Any
    weight_decay: Any
    momentum: Any


class Arrays(NamedTuple):
    """Pointers; ``weight`` is the master copy, or else the latent."""

    latent: Any
    grad: Any
    weight: Any
    first: Any
    second: Any
    alpha: Any


class Tail(NamedTuple):
    """What is the same for all elements of a program."""

    names: Any
    coef: Any
    A: Any
    noisy: Any  # whether the directions count
    directions: Any  # 0 unless they do
    quantized: Any  # whether the tensor is
    skip: Any  # whether the step is skipped
    grid: Any
    scalars: Any


# ---- coefficients


@triton.jit
def float64_of(x):
    """An argument that is the address of a float64, or its bits: a float argument would be rounded."""
    if x.dtype.is_ptr():
        return tl.load(x)
    else:
        return x.to(tl.int64).to(tl.float64, bitcast=True)


@triton.jit
def integer_of(x):
    if x.dtype.is_ptr():
        return tl.load(x)
    else:
        return x.to(tl.int64)


@triton.jit(
    do_not_specialize=["seed", "step", "n", "lr", "count", "decay_rate", "log_beta1", "log_beta2", "keep"]
)
def update_coefficients_kernel(
    coef, counters, seed, step, one_minus_beta, norm, losses_plus, losses_minus, n, sqrt_beta,
    noise_scale, half_inv_eps, lr, count, decay_rate, log_beta1, log_beta2, keep,
    NOISE_SCALE: tl.constexpr, RULE: tl.constexpr,
):  # fmt: skip
    """One program. log_beta1, log_beta2, decay_rate (of weights) and keep = 1 - dampening: bits."""
    mixture = mixing(one_minus_beta, sqrt_beta, noise_scale, NOISE_SCALE)
    A, lost, norm_lost = read_losses(
        coef + B_AT, counters, seed, step, mixture, norm, losses_plus, losses_minus, n, half_inv_eps
    )
    tl.store(coef + A_AT, tl.where(lost, 1.0, A))
    tl.store(coef + NOISE_AT, tl.where(lost, 0.0, 1.0))
    tl.store(coef + SKIP_AT, tl.where(norm_lost, 1.0, 0.0))
    rate, t = float64_of(lr), integer_of(count)
    if RULE == "adamw":
        size = rate / (1.0 - tl.exp(t.to(tl.float64) * float64_of(log_beta1)))
        root = 1.0 / tl.sqrt(1.0 - tl.exp(t.to(tl.float64) * float64_of(log_beta2)))
        tl.store(coef + SIZE_AT, size.to(tl.float32))
        tl.store(coef + DECAY_AT, (1.0 - rate * float64_of(decay_rate)).to(tl.float32))
        tl.store(coef + ROOT_AT, root.to(tl.float32))
    elif RULE == "sgd" or RULE == "momentum" or RULE == "nesterov":
        tl.store(coef + SIZE_AT, rate.to(tl.float32))
        tl.store(coef + DECAY_AT, tl.where(t == 1, 1.0, float64_of(keep)).to(tl.float32))
    else:
        tl.static_assert(False, f"no code for rule {RULE}")


# ---- one step of an element


@triton.jit
def stepped(theta, G, first, second, u, RULE: tl.constexpr):
    """theta and its state after the step (contract section 4)."""
    if RULE == "adamw":
        first = fma(G - first, u.first_weight, first)
        second = fma(G * u.second_weight, G, second * u.second_decay)
        ratio = tl.div_rn(first, fma(tl.sqrt_rn(second), u.root, u.eps))
        return fma(ratio, -u.size, theta * u.decay), first, second
    elif RULE == "sgd":
        return fma(fma(theta, u.weight_decay, G), -u.size, theta), first, second
    elif RULE == "momentum":
        first = fma(fma(theta, u.weight_decay, G), u.decay, first * u.momentum)
        return fma(first, -u.size, theta), first, second
    elif RULE == "nesterov":
        d = fma(theta, u.weight_decay, G)
        first = fma(d, u.decay, first * u.momentum)
        return fma(fma(first, u.momentum, d), -u.size, theta), first, second
    else:
        tl.static_assert(False, f"no code for rule {RULE}")


@triton.jit
def next_latent(theta, stored, tail, LATENT_T: tl.constexpr):
    """The latent as it is stored: ``stored`` itself in a skipped step."""
    return tl.where(tail.skip, stored, convert(theta, LATENT_T).to(tl.float32))


@triton.jit
def quantized_of(latent, scale, grid, OUT_T: tl.constexpr):
    return output_of(position(latent, scale, grid), scale, grid, OUT_T)


# ---- the pass


@triton.constexpr_function
def states_of(rule):
    """How many lists of state the rule has."""
    return STATES.value[rule]


@triton.jit
def arrays_of(row, LATENT_T: tl.constexpr, GRAD_T: tl.constexpr, MASTER: tl.constexpr):
    latent = pointer(row, "LATENT", LATENT_T)
    if MASTER:
        weight = pointer(row, "MINUS", tl.float32)
    else:
        weight = latent
    first, second = pointer(row, "STATE_1", tl.float32), pointer(row, "STATE_2", tl.float32)
    alpha = pointer(row, "ALPHA", tl.float32)
    return Arrays(latent, pointer(row, "GRAD", GRAD_T), weight, first, second, alpha)


@triton.jit
def tail_of(names, coef, n, quantized, grid, rest):
    """``rest``: the optimizer's scalars that do not come from the coefficients."""
    noisy = quantized & (tl.load(coef + NOISE_AT) != 0)
    skip = tl.load(coef + SKIP_AT) != 0
    A = tl.where(noisy, tl.load(coef + A_AT), 1.0)
    size, decay, root = tl.load(coef + SIZE_AT), tl.load(coef + DECAY_AT), tl.load(coef + ROOT_AT)
    first_weight, second_weight, second_decay, eps, weight_decay, momentum = rest
    scalars = Scalars(size, decay, root, first_weight, second_weight, second_decay, eps, weight_decay, momentum)
    return Tail(names, coef, A, noisy, tl.where(noisy, n, 0), quantized, skip, grid, scalars)


@triton.jit
def update_rest(
    row, begin, end, tail, SUB: tl.constexpr, DIST: tl.constexpr, LATENT_T: tl.constexpr,
    GRAD_T: tl.constexpr, OUT_T: tl.constexpr, MASTER: tl.constexpr, RULE: tl.constexpr,
):  # fmt: skip
    """The pass, element by element, without a transform: all elements of a tensor with it go by tiles."""
    THETA_T: tl.constexpr = tl.float32 if MASTER else LATENT_T
    p = arrays_of(row, LATENT_T, GRAD_T, MASTER)
    for start in tl.range(begin, end, SUB):
        j = start + tl.arange(0, SUB)
        mask = j < end
        write = mask & (tail.skip == 0)
        g = tl.load(p.grad + j, mask=mask, other=0.0).to(tl.float32)
        theta = tl.load(p.weight + j, mask=mask, other=0.0).to(tl.float32)
        m, v = theta, theta
        if states_of(RULE) >= 1:
            m = tl.load(p.first + j, mask=mask, other=0.0)
        if states_of(RULE) == 2:
            v = tl.load(p.second + j, mask=mask, other=0.0)
        acc = element_sum(element_numbers(j, row), tail.names, tail.coef + B_AT, tail.directions, DIST)
        delta = element_delta(p.alpha, j, row, tail.grid.r, mask & tail.quantized)
        scale = scale_of(delta, tail.grid)
        G = tl.where(tail.noisy, fma(g, tail.A, acc * scale.inv), g)
        new, m, v = stepped(theta, G, m, v, tail.scalars, RULE)
        if OUT_T is not None:
            stored = theta
            if MASTER:
                stored = tl.load(p.latent + j, mask=mask & (tail.skip != 0), other=0.0).to(tl.float32)
            latent = next_latent(new, stored, tail, LATENT_T)
            q = quantized_of(latent, scale, tail.grid, OUT_T)
            tl.store(pointer(row, "PLUS", OUT_T) + j, convert(q, OUT_T), mask=mask & tail.quantized)
        tl.store(p.weight + j, convert(new, THETA_T), mask=write)
        if MASTER:
            tl.store(p.latent + j, convert(new, LATENT_T), mask=write)
        if states_of(RULE) >= 1:
            tl.store(p.first + j, m, mask=write)
        if states_of(RULE) == 2:
            tl.store(p.second + j, v, mask=write)


@triton.jit(do_not_specialize=["seed", "step", "n"])
def update_kernel(
    table, owner, counters, seed, step, coef, n, offset, qmin, qmax, r, first_weight, second_weight,
    second_decay, eps, weight_decay, momentum, TILE: tl.constexpr, ALIGNED: tl.constexpr,
    DIST: tl.constexpr, LATENT_T: tl.constexpr, GRAD_T: tl.constexpr, OUT_T: tl.constexpr,
    MASTER: tl.constexpr, RULE: tl.constexpr, PER_TENSOR: tl.constexpr, SHARD: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """G, then the optimizer's step in place, then Q(theta) into PLUS unless OUT_T is None."""
    row, begin, end, fast = program_row(table, owner, tl.program_id(0))
    names = names_of(seed, step, entry(row, "TENSOR_ID"))
    p = arrays_of(row, LATENT_T, GRAD_T, MASTER)
    quantized = entry(row, "ALPHA") != 0
    grid = Grid(offset, qmin, qmax, r)
    rest = first_weight, second_weight, second_decay, eps, weight_decay, momentum
    tail = tail_of(names, coef, n, quantized, grid, rest)
    if PER_TENSOR:
        scale = scale_of(tl.load(p.alpha, mask=quantized, other=1.0) * r, grid)
    else:
        length = entry(row, "SCALE_DIVISOR")
        chunks = tl.where(quantized, fast >> 3, 0).to(tl.uint32)
    layout = layout_of(row, SHARD)
    tiled = tiled_part(begin, end, fast)
    for start in tl.range(0, tiled, TILE):
        left = left_in_tile(start, tiled, TILE)
        written = tl.multiple_of(tl.where(tail.skip, 0, left), 8)
        g0, g1 = load_tile(p.grad, begin, start, left, TILE, ALIGNED)
        t0, t1 = load_tile(p.weight, begin, start, left, TILE, ALIGNED)
        m0, m1, v0, v1 = t0, t1, t0, t1
        if states_of(RULE) >= 1:
            m0, m1 = load_tile(p.first, begin, start, left, TILE, ALIGNED)
        if states_of(RULE) == 2:
            v0, v1 = load_tile(p.second, begin, start, left, TILE, ALIGNED)
        local = chunks_from(begin, start, TILE)
        chunk = chunk_numbers(local, layout, SHARD)
        acc0, acc1 = tile_sum(g0, g1, chunk, names, coef + B_AT, tail.directions, TILE, DIST)
        if not PER_TENSOR:
            delta = chunk_delta(p.alpha, local, length, r, chunks)
            scale = scale_per_pair(scale_of(delta, grid), TILE)
        acc0, acc1 = product(acc0, scale.inv, BLOCK != 0), product(acc1, scale.inv, BLOCK != 0)
        acc0, acc1 = rotated_halves(acc0, acc1, BLOCK, TILE)
        G0 = tl.where(tail.noisy, fma(g0, tail.A, acc0), g0)
        G1 = tl.where(tail.noisy, fma(g1, tail.A, acc1), g1)
        n0, m0, v0 = stepped(t0, G0, m0, v0, tail.scalars, RULE)
        n1, m1, v1 = stepped(t1, G1, m1, v1, tail.scalars, RULE)
        if OUT_T is not None:
            s0, s1 = t0, t1
            if MASTER:  # a skipped step leaves the latent, which may differ from its master
                s0, s1 = load_tile(p.latent, begin, start, left - written, TILE, ALIGNED)
            s0, s1 = next_latent(n0, s0, tail, LATENT_T), next_latent(n1, s1, tail, LATENT_T)
            s0, s1 = rotated_halves(s0, s1, BLOCK, TILE)
            q0 = quantized_of(s0, scale, tail.grid, OUT_T)
            q1 = quantized_of(s1, scale, tail.grid, OUT_T)
            out = pointer(row, "PLUS", OUT_T)
            store_tile(out, begin, start, q0, q1, tl.where(quantized, left, 0), TILE, ALIGNED)
        store_tile(p.weight, begin, start, n0, n1, written, TILE, ALIGNED)
        if MASTER:
            store_tile(p.latent, begin, start, n0, n1, written, TILE, ALIGNED)
        if states_of(RULE) >= 1:
            store_tile(p.first, begin, start, m0, m1, written, TILE, ALIGNED)
        if states_of(RULE) == 2:
            store_tile(p.second, begin, start, v0, v1, written, TILE, ALIGNED)
    # read again, so that no registers are kept over the loop
    row, begin, end, fast = program_row(table, owner, tl.program_id(0))
    update_rest(row, tl.maximum(begin, fast), end, tail, TILE // 8, DIST, LATENT_T, GRAD_T, OUT_T, MASTER, RULE)
    if counters is not None:
        count_bad_alphas(counters, row, begin, PER_TENSOR)


# ---- host


def registers_of(block: int) -> int:
    """The most of a thread. A tile's larger blocks of the transform need more."""
    return REGISTERS if not block else 128 if block <= 256 else 255


def log_bits(x: float) -> int:
    return bits(math.log(x) if x else -math.inf)


def coefficients_of(update: Update) -> dict[str, object]:
    """Kernel arguments for the optimizer's part of the coefficients."""
    rule = update.rule
    return {
        "lr": bits_or_device(update.lr),
        "count": host_or_device(update.optimizer_step),
        "decay_rate": bits(rule.weight_decay),
        "log_beta1": log_bits(rule.beta1),
        "log_beta2": log_bits(rule.beta2),
        "keep": bits(1.0 - rule.dampening),
        "RULE": rule.variant,
    }


def scalars_of(rule: UpdateRule) -> dict[str, float]:
    """Kernel arguments for what the pass itself needs of the rule."""
    found = {
        "first_weight": 1.0 - rule.beta1,
        "second_weight": 1.0 - rule.beta2,
        "second_decay": rule.beta2,
        "eps": rule.eps,
        "weight_decay": rule.weight_decay,
        "momentum": rule.momentum,
    }
    return {name: rounded(x) for name, x in found.items()}


def estimate_update_(
    latents: Tensors, quantized: Tensors, grads: Tensors, alphas: Tensors, draw: Draw, mix: Mix,
    losses: Losses, grid: spec.Grid, update: Update, block: int,
) -> None:  # fmt: skip
    """G, the optimizer's step and Q(theta): one launch for the coefficients, one for all tensors."""
    device, n, rule = mix.norm.device, losses.plus.numel(), update.rule
    names, counters = named(draw), losses.counters if n else None  # an op without losses does not count
    coef = torch.empty(B_AT.value + n, dtype=torch.float32, device=device)
    launch(
        update_coefficients_kernel, 1, device, coef, counters, *names, **loss_arguments(draw, mix, losses),
        **coefficients_of(update),
    )  # fmt: skip
    if not latents:
        return
    p = plan(
        latents, latents=latents, grads=grads, plus=quantized, minus=update.masters, alphas=alphas,
        states=update.states, tensor_ids=draw.tensor_ids, layouts=draw.layouts,
    )  # fmt: skip
    launch(
        update_kernel, p.programs, device, p.table, p.owner, counters, *names, coef, n, **grid_of(grid),
        **scalars_of(rule), TILE=TILE, ALIGNED=p.aligned, DIST=draw.distribution,
        LATENT_T=DTYPES[latents[0].dtype], GRAD_T=DTYPES[grads[0].dtype],
        OUT_T=DTYPES[quantized[0].dtype] if quantized else None, MASTER=bool(update.masters),
        RULE=rule.variant, PER_TENSOR=p.per_tensor,
        SHARD=p.shard, BLOCK=block, maxnreg=registers_of(block),
    )  # fmt: skip
