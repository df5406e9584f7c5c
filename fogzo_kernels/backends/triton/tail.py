"""The fused tail: estimate, optimizer step and the next Q(theta) in one pass (docs/contract.md, 4).

A table row is that of kernels.py, with the quantized weight in PLUS and the master copy in MINUS. A
tensor without an alpha is not quantized: G = g, and no Q is written.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .elements import (
    code_of,
    convert,
    element_noise,
    fma,
    load_tile,
    output_of,
    per_pair,
    reciprocal,
    store_tile,
    tile_noise,
)
from .kernels import (
    ALPHA,
    GRAD,
    LATENT,
    MINUS,
    PLUS,
    SCALE_DIVISOR,
    SCALES,
    STATE_1,
    STATE_2,
    TENSOR_ID,
    chunk_delta,
    chunk_numbers,
    chunks_from,
    count_bad_alphas,
    element_delta,
    element_numbers,
    layout_of,
    left_in_tile,
    names_of,
    pointer,
    program_row,
    read_losses,
    tiled_part,
)

#: The coefficients' places: A, 1 if the directions count, 1 if the step is skipped, the optimizer's
#: scalars, then the B_i.
A_AT, NOISE_AT, SKIP_AT, SIZE_AT, DECAY_AT, ROOT_AT, B_AT = (tl.constexpr(i) for i in range(7))


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
    do_not_specialize=["seed", "step", "n", "lr", "count", "weight_decay", "log_beta1", "log_beta2", "keep"]
)
def update_coefficients_kernel(
    coef, counters, seed, step, one_minus_beta, norm, losses_plus, losses_minus, n, sqrt_beta,
    noise_scale, half_inv_eps, lr, count, weight_decay, log_beta1, log_beta2, keep,
    NOISE_SCALE: tl.constexpr, RULE: tl.constexpr,
):  # fmt: skip
    """One program. log_beta1, log_beta2, weight_decay and keep = 1 - dampening come as bits."""
    A, lost, norm_lost = read_losses(
        coef + B_AT, counters, seed, step, one_minus_beta, norm, losses_plus, losses_minus, n, sqrt_beta,
        noise_scale, half_inv_eps, NOISE_SCALE,
    )  # fmt: skip
    tl.store(coef + A_AT, tl.where(lost, 1.0, A))
    tl.store(coef + NOISE_AT, tl.where(lost, 0.0, 1.0))
    tl.store(coef + SKIP_AT, tl.where(norm_lost, 1.0, 0.0))
    rate, t = float64_of(lr), integer_of(count)
    if RULE == "adamw":
        size = rate / (1.0 - tl.exp(t.to(tl.float64) * float64_of(log_beta1)))
        root = 1.0 / tl.sqrt(1.0 - tl.exp(t.to(tl.float64) * float64_of(log_beta2)))
        tl.store(coef + SIZE_AT, size.to(tl.float32))
        tl.store(coef + DECAY_AT, (1.0 - rate * float64_of(weight_decay)).to(tl.float32))
        tl.store(coef + ROOT_AT, root.to(tl.float32))
    else:
        tl.store(coef + SIZE_AT, rate.to(tl.float32))
        tl.store(coef + DECAY_AT, tl.where(t == 1, 1.0, float64_of(keep)).to(tl.float32))


# ---- one step of an element


@triton.jit
def stepped(
    theta, G, first, second, size, decay, root, first_weight, second_weight, second_decay, eps, weight_decay,
    momentum, RULE: tl.constexpr,
):  # fmt: skip
    """theta and its state after the step (contract section 4). For SGD ``decay`` is keep."""
    if RULE == "adamw":
        first = fma(G - first, first_weight, first)
        second = fma(G * second_weight, G, second * second_decay)
        ratio = tl.div_rn(first, fma(tl.sqrt_rn(second), root, eps))
        return fma(ratio, -size, theta * decay), first, second
    else:
        d = fma(theta, weight_decay, G)
        if RULE != "sgd":
            first = fma(d, decay, first * momentum)
            d = fma(first, momentum, d) if RULE == "nesterov" else first
        return fma(d, -size, theta), first, second


@triton.jit
def next_code(theta, stored, skip, inv, offset, qmin, qmax, LATENT_T: tl.constexpr):
    """Code of the latent as it is stored: ``stored`` itself in a skipped step."""
    latent = tl.where(skip, stored, convert(theta, LATENT_T).to(tl.float32))
    return code_of(fma(latent, inv, -offset), qmin, qmax)


# ---- the pass


@triton.jit
def update_rest(
    row, first_element, end, names, coef, A, noisy, quantized, skip, directions, offset, qmin, qmax, r,
    size, decay, root, first_weight, second_weight, second_decay, eps, weight_decay, momentum,
    SUB: tl.constexpr, DIST: tl.constexpr, LATENT_T: tl.constexpr, GRAD_T: tl.constexpr,
    OUT_T: tl.constexpr, MASTER: tl.constexpr, RULE: tl.constexpr,
):  # fmt: skip
    """The same, element by element: the last ones of a tensor, and unaligned tensors."""
    CODES: tl.constexpr = tl.int8 == OUT_T
    THETA_T: tl.constexpr = tl.float32 if MASTER else LATENT_T
    STATES: tl.constexpr = 2 if RULE == "adamw" else (0 if RULE == "sgd" else 1)
    latent, grad = pointer(row, LATENT, LATENT_T), pointer(row, GRAD, GRAD_T)
    weight = pointer(row, MINUS if MASTER else LATENT, THETA_T)
    state1, state2 = pointer(row, STATE_1, tl.float32), pointer(row, STATE_2, tl.float32)
    alpha = pointer(row, ALPHA, tl.float32)
    for start in tl.range(first_element, end, SUB):
        j = start + tl.arange(0, SUB)
        mask = j < end
        write = mask & (skip == 0)
        g = tl.load(grad + j, mask=mask, other=0.0).to(tl.float32)
        theta = tl.load(weight + j, mask=mask, other=0.0).to(tl.float32)
        m, v = theta, theta
        if STATES >= 1:
            m = tl.load(state1 + j, mask=mask, other=0.0)
        if STATES == 2:
            v = tl.load(state2 + j, mask=mask, other=0.0)
        e = element_numbers(j, row)
        acc = tl.zeros([SUB], tl.float32)
        for i in tl.range(0, directions):
            acc = fma(element_noise(e, names, i, DIST), tl.load(coef + B_AT + i), acc)
        d = element_delta(alpha, j, row, r, mask & quantized)
        G = tl.where(noisy, fma(g, A, acc * reciprocal(d)), g)
        new, m, v = stepped(
            theta, G, m, v, size, decay, root, first_weight, second_weight, second_decay, eps,
            weight_decay, momentum, RULE,
        )  # fmt: skip
        if OUT_T is not None:
            stored = theta
            if MASTER:
                stored = tl.load(latent + j, mask=mask & (skip != 0), other=0.0).to(tl.float32)
            code = next_code(new, stored, skip, reciprocal(d), offset, qmin, qmax, LATENT_T)
            out = pointer(row, PLUS, OUT_T)
            tl.store(out + j, convert(output_of(code, d, d * offset, CODES), OUT_T), mask=mask & quantized)
        tl.store(weight + j, convert(new, THETA_T), mask=write)
        if MASTER:
            tl.store(latent + j, convert(new, LATENT_T), mask=write)
        if STATES >= 1:
            tl.store(state1 + j, m, mask=write)
        if STATES == 2:
            tl.store(state2 + j, v, mask=write)


@triton.jit(do_not_specialize=["seed", "step", "n"])
def update_kernel(
    table, owner, counters, seed, step, coef, n, offset, qmin, qmax, r, first_weight, second_weight,
    second_decay, eps, weight_decay, momentum, SPAN: tl.constexpr, TILE: tl.constexpr,
    DIST: tl.constexpr, LATENT_T: tl.constexpr, GRAD_T: tl.constexpr, OUT_T: tl.constexpr,
    MASTER: tl.constexpr, RULE: tl.constexpr, PER_TENSOR: tl.constexpr, SHARD: tl.constexpr,
):  # fmt: skip
    """G, then the optimizer's step in place, then Q(theta) into PLUS unless OUT_T is None."""
    CODES: tl.constexpr = tl.int8 == OUT_T
    THETA_T: tl.constexpr = tl.float32 if MASTER else LATENT_T
    STATES: tl.constexpr = 2 if RULE == "adamw" else (0 if RULE == "sgd" else 1)
    row, begin, end, fast = program_row(table, owner, SPAN)
    names = names_of(seed, step, tl.load(row + TENSOR_ID))
    latent, grad = pointer(row, LATENT, LATENT_T), pointer(row, GRAD, GRAD_T)
    weight = pointer(row, MINUS if MASTER else LATENT, THETA_T)
    state1, state2 = pointer(row, STATE_1, tl.float32), pointer(row, STATE_2, tl.float32)
    alpha = pointer(row, ALPHA, tl.float32)
    quantized = tl.load(row + ALPHA) != 0
    if counters is not None:
        scales = tl.where(quantized & (begin == 0), tl.load(row + SCALES), 0)
        count_bad_alphas(counters, alpha, scales, TILE // 8)
    noisy = quantized & (tl.load(coef + NOISE_AT) != 0)
    skip = tl.load(coef + SKIP_AT) != 0
    A = tl.where(noisy, tl.load(coef + A_AT), 1.0)
    directions = tl.where(noisy, n, 0)
    size, decay, root = tl.load(coef + SIZE_AT), tl.load(coef + DECAY_AT), tl.load(coef + ROOT_AT)
    if PER_TENSOR:
        delta = tl.load(alpha, mask=quantized, other=1.0) * r
        inv, shift = reciprocal(delta), delta * offset
    else:
        length = tl.load(row + SCALE_DIVISOR)
        chunks = tl.where(quantized, fast >> 3, 0).to(tl.uint32)
    origin, stride, inner = layout_of(row, SHARD)
    tiled = tiled_part(begin, end, fast)
    for start in tl.range(0, tiled, TILE):
        left = left_in_tile(start, tiled, TILE)
        written = tl.multiple_of(tl.where(skip, 0, left), 8)
        g0, g1 = load_tile(tl.multiple_of(grad + begin + start, 16), left, TILE)
        t0, t1 = load_tile(tl.multiple_of(weight + begin + start, 16), left, TILE)
        m0, m1, v0, v1 = t0, t1, t0, t1
        if STATES >= 1:
            m0, m1 = load_tile(tl.multiple_of(state1 + begin + start, 16), left, TILE)
        if STATES == 2:
            v0, v1 = load_tile(tl.multiple_of(state2 + begin + start, 16), left, TILE)
        local = chunks_from(begin, start, TILE)
        chunk = chunk_numbers(local, origin, stride, inner, SHARD)
        acc0, acc1 = g0 * 0.0, g1 * 0.0  # from a load, so that the loop keeps the tile's layout
        acc0, acc1 = tl.where(acc0 == 0, acc0, 0.0), tl.where(acc1 == 0, acc1, 0.0)
        for i in tl.range(0, directions):
            noise0, noise1 = tile_noise(chunk, names, i, TILE, DIST)
            B = tl.load(coef + B_AT + i)
            acc0, acc1 = fma(noise0, B, acc0), fma(noise1, B, acc1)
        if not PER_TENSOR:
            d = chunk_delta(alpha, local, length, r, chunks)
            inv = per_pair(reciprocal(d), TILE)
            delta, shift = per_pair(d, TILE), per_pair(d * offset, TILE)
        G0 = tl.where(noisy, fma(g0, A, acc0 * inv), g0)
        G1 = tl.where(noisy, fma(g1, A, acc1 * inv), g1)
        n0, m0, v0 = stepped(
            t0, G0, m0, v0, size, decay, root, first_weight, second_weight, second_decay, eps,
            weight_decay, momentum, RULE,
        )  # fmt: skip
        n1, m1, v1 = stepped(
            t1, G1, m1, v1, size, decay, root, first_weight, second_weight, second_decay, eps,
            weight_decay, momentum, RULE,
        )  # fmt: skip
        if OUT_T is not None:
            s0, s1 = t0, t1
            if MASTER:  # a skipped step leaves the latent, which may differ from its master
                s0, s1 = load_tile(tl.multiple_of(latent + begin + start, 16), left - written, TILE)
            q0 = output_of(next_code(n0, s0, skip, inv, offset, qmin, qmax, LATENT_T), delta, shift, CODES)
            q1 = output_of(next_code(n1, s1, skip, inv, offset, qmin, qmax, LATENT_T), delta, shift, CODES)
            out = pointer(row, PLUS, OUT_T)
            store_tile(tl.multiple_of(out + begin + start, 16), q0, q1, tl.where(quantized, left, 0), TILE)
        store_tile(tl.multiple_of(weight + begin + start, 16), n0, n1, written, TILE)
        if MASTER:
            store_tile(tl.multiple_of(latent + begin + start, 16), n0, n1, written, TILE)
        if STATES >= 1:
            store_tile(tl.multiple_of(state1 + begin + start, 16), m0, m1, written, TILE)
        if STATES == 2:
            store_tile(tl.multiple_of(state2 + begin + start, 16), v0, v1, written, TILE)
    row, begin, end, fast = program_row(table, owner, SPAN)  # read again: no registers kept over the loop
    update_rest(
        row, tl.maximum(begin, fast), end, names, coef, A, noisy, quantized, skip, directions, offset, qmin,
        qmax, r, size, decay, root, first_weight, second_weight, second_decay, eps, weight_decay, momentum,
        TILE // 8, DIST, LATENT_T, GRAD_T, OUT_T, MASTER, RULE,
    )  # fmt: skip
