"""The kernels: one launch over a list of tensors each (docs/contract.md).

A program works on SPAN consecutive elements of one tensor. ``owner`` names its tensor, a row of
``table`` says where that lies (plans.COLUMNS). Aligned full chunks of 8 elements, up to the row's FAST,
go tile by tile; the rest, at most 7 elements of an aligned tensor, element by element.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..plans import COLUMNS
from .elements import (
    code_of,
    convert,
    derivative_of,
    direction_sign,
    element_noise,
    fma,
    is_finite,
    load_tile,
    output_of,
    per_pair,
    reciprocal,
    store_tile,
    tile_noise,
)

(
    LATENT, GRAD, PLUS, MINUS, ALPHA, TENSOR_ID, NUMEL, FAST, FIRST, OFFSET, INNER, SKIP, SCALES,
    SCALE_LENGTH, INNER_DIVISOR, SCALE_DIVISOR, STATE_1, STATE_2,
) = (tl.constexpr(i) for i in range(len(COLUMNS)))  # fmt: skip
WIDTH = tl.constexpr(len(COLUMNS))


@triton.jit
def divide(n, packed):
    """n // d, given plans.divisor(d)."""
    magic = (packed.to(tl.uint64, bitcast=True) >> 6).to(tl.uint32).to(tl.uint64)
    return (n.to(tl.uint64) * magic >> (packed & 63).to(tl.uint64)).to(tl.uint32)


# ---- where a program works and what it draws


@triton.jit
def program_row(table, owner, SPAN: tl.constexpr):
    """The program's row, its elements [begin, end) and how many of the tensor go by tiles."""
    pid = tl.program_id(0)
    row = table + tl.load(owner + pid).to(tl.int64) * WIDTH
    begin = (pid - tl.load(row + FIRST)) * SPAN
    return row, begin, tl.minimum(begin + SPAN, tl.load(row + NUMEL)), tl.load(row + FAST)


@triton.jit
def pointer(row, COLUMN: tl.constexpr, DTYPE: tl.constexpr):
    return tl.cast(tl.load(row + COLUMN), tl.pointer_type(DTYPE))


@triton.jit
def scalar(x):
    """A kernel argument that is a number or the address of one."""
    if x.dtype.is_ptr():
        return tl.load(x)
    else:
        return x


@triton.jit
def names_of(seed, step, tensor_id):
    s = scalar(seed).to(tl.int64)
    return s.to(tl.uint32), (s >> 32).to(tl.uint32), scalar(step).to(tl.uint32), tensor_id.to(tl.uint32)


@triton.jit
def mixing(one_minus_beta, sqrt_beta, noise_scale, NOISE_SCALE: tl.constexpr):
    """float32 of sqrt(beta) and of sqrt(1 - beta) C: from the host, or from a device's 1 - beta."""
    if one_minus_beta is None:
        return sqrt_beta, noise_scale
    else:
        omb = tl.load(one_minus_beta)
        scaled = tl.sqrt(omb) * NOISE_SCALE
        return tl.sqrt(1.0 - omb).to(tl.float32), scaled.to(tl.float32)


@triton.jit
def layout_of(row, SHARD: tl.constexpr):
    """What chunk_numbers needs, loaded before the loop: offset and skip in chunks, inner as a divisor."""
    offset = tl.load(row + OFFSET) >> 3
    if SHARD:
        return offset, tl.load(row + SKIP) >> 3, tl.load(row + INNER_DIVISOR)
    else:
        return offset, offset, offset


@triton.jit
def chunk_numbers(local, offset, skip, inner, SHARD: tl.constexpr):
    """Global chunk numbers of the tensor's chunks ``local``."""
    chunk = offset + local
    if SHARD:
        chunk += divide(local, inner).to(tl.int64) * skip
    return chunk


@triton.jit
def element_numbers(j, row):
    return tl.load(row + OFFSET) + j + j // tl.load(row + INNER) * tl.load(row + SKIP)


@triton.jit
def chunks_from(begin, start, TILE: tl.constexpr):
    """Local chunk numbers of a tile; 32 bits reach 2^35 elements."""
    return (begin >> 3).to(tl.uint32) + ((start >> 3) + tl.arange(0, TILE // 8)).to(tl.uint32)


@triton.jit
def chunk_delta(alpha, local, length, r, chunks):
    """delta of each chunk; ``length``: chunks that share an alpha, as a divisor."""
    return tl.load(alpha + divide(local, length), mask=local < chunks, other=1.0) * r


@triton.jit
def element_delta(alpha, j, row, r, mask):
    return tl.load(alpha + j // tl.load(row + SCALE_LENGTH), mask=mask, other=1.0) * r


@triton.jit
def tiled_part(begin, end, fast):
    """How many of the program's elements go by tiles: 32 bits, whatever the tensor's size."""
    return tl.maximum(tl.minimum(end, fast) - begin, 0).to(tl.int32)


@triton.jit
def left_in_tile(start, tiled, TILE: tl.constexpr):
    """Elements of the tile that exist."""
    return tl.multiple_of(tl.minimum(tiled - start, TILE), 8)


# ---- noise


@triton.jit(do_not_specialize=["seed", "step", "direction"])
def noise_kernel(
    table, owner, seed, step, direction, scale, SPAN: tl.constexpr, TILE: tl.constexpr,
    DIST: tl.constexpr, SHARD: tl.constexpr,
):  # fmt: skip
    """u = C m into PLUS, float32."""
    row, begin, end, fast = program_row(table, owner, SPAN)
    names = names_of(seed, step, tl.load(row + TENSOR_ID))
    out = pointer(row, PLUS, tl.float32)
    offset, skip, inner = layout_of(row, SHARD)
    tiled = tiled_part(begin, end, fast)
    for start in tl.range(0, tiled, TILE):
        left = left_in_tile(start, tiled, TILE)
        chunk = chunk_numbers(chunks_from(begin, start, TILE), offset, skip, inner, SHARD)
        m0, m1 = tile_noise(chunk, names, direction, TILE, DIST)
        store_tile(tl.multiple_of(out + begin + start, 16), m0 * scale, m1 * scale, left, TILE)
    SUB: tl.constexpr = TILE // 8
    for start in tl.range(tl.maximum(begin, fast), end, SUB):
        j = start + tl.arange(0, SUB)
        m = element_noise(element_numbers(j, row), names, direction, DIST)
        tl.store(out + j, m * scale, mask=j < end)


# ---- guide norm


@triton.jit
def sumsq_kernel(
    table, owner, partial, r, SPAN: tl.constexpr, TILE: tl.constexpr, GRAD_T: tl.constexpr,
    PER_TENSOR: tl.constexpr,
):  # fmt: skip
    """Sum of (delta g)^2 of a program's elements: 8 squares in float32, the rest in float64."""
    row, begin, end, fast = program_row(table, owner, SPAN)
    grad = pointer(row, GRAD, GRAD_T)
    alpha = pointer(row, ALPHA, tl.float32)
    if PER_TENSOR:
        delta = tl.load(alpha) * r
    else:
        length, chunks = tl.load(row + SCALE_DIVISOR), (fast >> 3).to(tl.uint32)
    acc = tl.zeros([TILE // 8], tl.float64)
    tiled = tiled_part(begin, end, fast)
    for start in tl.range(0, tiled, TILE):
        left = left_in_tile(start, tiled, TILE)
        offs = tl.arange(0, TILE)
        g = tl.load(tl.multiple_of(grad + begin + start, 16) + offs, mask=offs < left, other=0.0)
        if not PER_TENSOR:
            delta = chunk_delta(alpha, chunks_from(begin, start, TILE), length, r, chunks)[:, None]
        h = g.to(tl.float32).reshape([TILE // 8, 8]) * delta
        acc += tl.sum(h * h, axis=1).to(tl.float64)
    SUB: tl.constexpr = TILE // 8
    tail = tl.zeros([SUB], tl.float64)
    for start in tl.range(tl.maximum(begin, fast), end, SUB):
        j = start + tl.arange(0, SUB)
        g = tl.load(grad + j, mask=j < end, other=0.0).to(tl.float32)
        h = (g * element_delta(alpha, j, row, r, j < end)).to(tl.float64)
        tail += h * h
    tl.store(partial + tl.program_id(0), tl.sum(acc, 0) + tl.sum(tail, 0))


@triton.jit(do_not_specialize=["count"])
def sum_kernel(partial, count, out, BLOCK: tl.constexpr, ROOT: tl.constexpr):
    """One program adds the partial sums in a fixed order: the same bits every run. ROOT: the norm."""
    acc = tl.zeros([BLOCK], tl.float64)
    for start in tl.range(0, count, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        acc += tl.load(partial + offs, mask=offs < count, other=0.0)
    total = tl.sum(acc, 0)
    if ROOT:
        total = tl.sqrt(total).to(tl.float32)
    tl.store(out, total)


# ---- perturb and quantize


@triton.jit
def guide_scale(norm, sqrt_beta, sign):
    """a of the contract: 0 unless N is finite and > 0."""
    n = tl.load(norm)
    usable = (n > 0) & is_finite(n)
    return tl.where(usable, tl.div_rn(sqrt_beta * sign, tl.where(usable, n, 1.0)), 0.0)


@triton.jit(do_not_specialize=["seed", "step", "direction"])
def perturb_kernel(
    table, owner, seed, step, one_minus_beta, norm, direction, sqrt_beta, noise_scale, eps, offset,
    qmin, qmax, r, SPAN: tl.constexpr, TILE: tl.constexpr, DIST: tl.constexpr,
    NOISE_SCALE: tl.constexpr, LATENT_T: tl.constexpr, GRAD_T: tl.constexpr, OUT_T: tl.constexpr,
    WRITE_PLUS: tl.constexpr, WRITE_MINUS: tl.constexpr, PER_TENSOR: tl.constexpr,
    SHARD: tl.constexpr,
):  # fmt: skip
    """Q(w + eps v) into PLUS and Q(w - eps v) into MINUS, v = fma(a delta, g, b m)."""
    CODES: tl.constexpr = tl.int8 == OUT_T
    row, begin, end, fast = program_row(table, owner, SPAN)
    names = names_of(seed, step, tl.load(row + TENSOR_ID))
    guide, b = mixing(one_minus_beta, sqrt_beta, noise_scale, NOISE_SCALE)
    a = guide_scale(norm, guide, direction_sign(names, direction))
    latent = pointer(row, LATENT, LATENT_T)
    grad = pointer(row, GRAD, GRAD_T)
    plus = pointer(row, PLUS, OUT_T)
    minus = pointer(row, MINUS, OUT_T)
    alpha = pointer(row, ALPHA, tl.float32)
    if PER_TENSOR:
        delta = tl.load(alpha) * r
        inv, gam, shift = reciprocal(delta), a * delta, delta * offset
    else:
        length, chunks = tl.load(row + SCALE_DIVISOR), (fast >> 3).to(tl.uint32)
    first, skip, inner = layout_of(row, SHARD)
    tiled = tiled_part(begin, end, fast)
    for start in tl.range(0, tiled, TILE):
        left = left_in_tile(start, tiled, TILE)
        g0, g1 = load_tile(tl.multiple_of(grad + begin + start, 16), left, TILE)
        t0, t1 = load_tile(tl.multiple_of(latent + begin + start, 16), left, TILE)
        local = chunks_from(begin, start, TILE)
        chunk = chunk_numbers(local, first, skip, inner, SHARD)
        m0, m1 = tile_noise(chunk, names, direction, TILE, DIST)
        if not PER_TENSOR:
            d = chunk_delta(alpha, local, length, r, chunks)
            inv = per_pair(reciprocal(d), TILE)
            gam = per_pair(a * d, TILE)
            delta, shift = per_pair(d, TILE), per_pair(d * offset, TILE)
        v0, v1 = fma(g0, gam, m0 * b), fma(g1, gam, m1 * b)
        z0, z1 = fma(t0, inv, -offset), fma(t1, inv, -offset)
        if WRITE_PLUS:
            q0 = output_of(code_of(fma(v0, eps, z0), qmin, qmax), delta, shift, CODES)
            q1 = output_of(code_of(fma(v1, eps, z1), qmin, qmax), delta, shift, CODES)
            store_tile(tl.multiple_of(plus + begin + start, 16), q0, q1, left, TILE)
        if WRITE_MINUS:
            q0 = output_of(code_of(fma(v0, -eps, z0), qmin, qmax), delta, shift, CODES)
            q1 = output_of(code_of(fma(v1, -eps, z1), qmin, qmax), delta, shift, CODES)
            store_tile(tl.multiple_of(minus + begin + start, 16), q0, q1, left, TILE)
    row, begin, end, fast = program_row(table, owner, SPAN)  # read again: no registers kept over the loop
    SUB: tl.constexpr = TILE // 8
    for start in tl.range(tl.maximum(begin, fast), end, SUB):
        j = start + tl.arange(0, SUB)
        mask = j < end
        d = element_delta(alpha, j, row, r, mask)
        m = element_noise(element_numbers(j, row), names, direction, DIST)
        v = fma(tl.load(grad + j, mask=mask, other=0.0).to(tl.float32), a * d, m * b)
        theta = tl.load(latent + j, mask=mask, other=0.0).to(tl.float32)
        z = fma(theta, reciprocal(d), -offset)
        if WRITE_PLUS:
            q = output_of(code_of(fma(v, eps, z), qmin, qmax), d, d * offset, CODES)
            tl.store(plus + j, convert(q, OUT_T), mask=mask)
        if WRITE_MINUS:
            q = output_of(code_of(fma(v, -eps, z), qmin, qmax), d, d * offset, CODES)
            tl.store(minus + j, convert(q, OUT_T), mask=mask)


# ---- estimate


@triton.jit
def read_losses(
    coefs, counters, seed, step, one_minus_beta, norm, losses_plus, losses_minus, n, sqrt_beta, noise_scale,
    half_inv_eps, NOISE_SCALE: tl.constexpr,
):  # fmt: skip
    """Write the B_i; A, and 1 where every direction and where the norm is lost. For one program."""
    guide, b = mixing(one_minus_beta, sqrt_beta, noise_scale, NOISE_SCALE)
    zero = tl.load(norm) * 0.0
    names = names_of(seed, step, (zero == zero).to(tl.int64))
    total = tl.zeros([], tl.float32)
    lost = tl.zeros([], tl.int32)
    for i in tl.range(0, n):
        c = (tl.load(losses_plus + i) - tl.load(losses_minus + i)) * half_inv_eps
        usable = is_finite(c)
        lost += tl.where(usable, 0, 1)
        c = tl.where(usable, c, 0.0) / n
        total += c * direction_sign(names, i)
        tl.store(coefs + i, c * b)
    norm_lost = tl.where((n > 0) & (is_finite(tl.load(norm)) == 0), 1, 0)
    if counters is not None:
        tl.store(counters, tl.load(counters) + lost)
        tl.store(counters + 1, tl.load(counters + 1) + norm_lost)
    return guide_scale(norm, total * guide, 1.0), lost == n, norm_lost == 1


@triton.jit(do_not_specialize=["seed", "step", "n"])
def coefficients_kernel(
    coef, counters, seed, step, one_minus_beta, norm, losses_plus, losses_minus, n, sqrt_beta,
    noise_scale, half_inv_eps, NOISE_SCALE: tl.constexpr,
):  # fmt: skip
    """coef = A, 1 if g must stay as it is, B_0, B_1, ...; one program."""
    A, lost, norm_lost = read_losses(
        coef + 2, counters, seed, step, one_minus_beta, norm, losses_plus, losses_minus, n, sqrt_beta,
        noise_scale, half_inv_eps, NOISE_SCALE,
    )  # fmt: skip
    tl.store(coef, A)
    tl.store(coef + 1, tl.where(lost | norm_lost, 1.0, 0.0))


@triton.jit
def count_bad_alphas(counters, alpha, scales, BLOCK: tl.constexpr):
    for start in tl.range(0, scales, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        x = tl.load(alpha + offs, mask=offs < scales, other=1.0)
        bad = ((x > 0) & is_finite(x)) == 0
        tl.atomic_add(counters + 2 + offs * 0, bad.to(tl.int64), mask=bad)


@triton.jit(do_not_specialize=["seed", "step", "n"])
def estimate_kernel(
    table, owner, counters, seed, step, coef, n, r, SPAN: tl.constexpr, TILE: tl.constexpr,
    DIST: tl.constexpr, GRAD_T: tl.constexpr, PER_TENSOR: tl.constexpr, SHARD: tl.constexpr,
    ONE: tl.constexpr,
):  # fmt: skip
    """g = fma(A, g, inv sum_i B_i m_i) in place, with a run-time loop over directions unless ONE."""
    row, begin, end, fast = program_row(table, owner, SPAN)
    names = names_of(seed, step, tl.load(row + TENSOR_ID))
    grad = pointer(row, GRAD, GRAD_T)
    alpha = pointer(row, ALPHA, tl.float32)
    if counters is not None:
        count_bad_alphas(counters, alpha, tl.where(begin == 0, tl.load(row + SCALES), 0), TILE // 8)
    A, B0 = tl.load(coef), tl.load(coef + 2)
    end = tl.where(tl.load(coef + 1) != 0, begin, end)
    if PER_TENSOR:
        inv = reciprocal(tl.load(alpha) * r)
    else:
        length, chunks = tl.load(row + SCALE_DIVISOR), (fast >> 3).to(tl.uint32)
    first, skip, inner = layout_of(row, SHARD)
    tiled = tiled_part(begin, end, fast)
    for start in tl.range(0, tiled, TILE):
        left = left_in_tile(start, tiled, TILE)
        g0, g1 = load_tile(tl.multiple_of(grad + begin + start, 16), left, TILE)
        local = chunks_from(begin, start, TILE)
        chunk = chunk_numbers(local, first, skip, inner, SHARD)
        if ONE:
            m0, m1 = tile_noise(chunk, names, 0, TILE, DIST)
            acc0, acc1 = m0 * B0, m1 * B0
        else:
            acc0, acc1 = g0 * 0.0, g1 * 0.0  # from a load, so that the loop keeps the tile's layout
            acc0, acc1 = tl.where(acc0 == 0, acc0, 0.0), tl.where(acc1 == 0, acc1, 0.0)
            for i in tl.range(0, n):
                m0, m1 = tile_noise(chunk, names, i, TILE, DIST)
                B = tl.load(coef + 2 + i)
                acc0, acc1 = fma(m0, B, acc0), fma(m1, B, acc1)
        if not PER_TENSOR:
            inv = per_pair(reciprocal(chunk_delta(alpha, local, length, r, chunks)), TILE)
        G0, G1 = fma(g0, A, acc0 * inv), fma(g1, A, acc1 * inv)
        store_tile(tl.multiple_of(grad + begin + start, 16), G0, G1, left, TILE)
    SUB: tl.constexpr = TILE // 8
    for start in tl.range(tl.maximum(begin, fast), end, SUB):
        j = start + tl.arange(0, SUB)
        mask = j < end
        e = element_numbers(j, row)
        acc = tl.zeros([SUB], tl.float32)
        for i in tl.range(0, n):
            acc = fma(element_noise(e, names, i, DIST), tl.load(coef + 2 + i), acc)
        inv_e = reciprocal(element_delta(alpha, j, row, r, mask))
        g = tl.load(grad + j, mask=mask, other=0.0).to(tl.float32)
        tl.store(grad + j, convert(fma(g, A, acc * inv_e), GRAD_T), mask=mask)


# ---- quantizer and straight-through derivative


@triton.jit
def quantize_kernel(
    table, owner, offset, qmin, qmax, r, SPAN: tl.constexpr, TILE: tl.constexpr,
    LATENT_T: tl.constexpr, GRAD_T: tl.constexpr, OUT_T: tl.constexpr, KIND: tl.constexpr,
    PER_TENSOR: tl.constexpr,
):  # fmt: skip
    """KIND None: Q(theta) into PLUS. Else g h'(theta) into PLUS, which may be GRAD."""
    CODES: tl.constexpr = tl.int8 == OUT_T
    row, begin, end, fast = program_row(table, owner, SPAN)
    latent = pointer(row, LATENT, LATENT_T)
    grad = pointer(row, GRAD, GRAD_T)
    out = pointer(row, PLUS, OUT_T)
    alpha = pointer(row, ALPHA, tl.float32)
    if PER_TENSOR:
        delta = tl.load(alpha) * r
        inv, shift = reciprocal(delta), delta * offset
    else:
        length, chunks = tl.load(row + SCALE_DIVISOR), (fast >> 3).to(tl.uint32)
    tiled = tiled_part(begin, end, fast)
    for start in tl.range(0, tiled, TILE):
        left = left_in_tile(start, tiled, TILE)
        t0, t1 = load_tile(tl.multiple_of(latent + begin + start, 16), left, TILE)
        if not PER_TENSOR:
            d = chunk_delta(alpha, chunks_from(begin, start, TILE), length, r, chunks)
            inv = per_pair(reciprocal(d), TILE)
            delta, shift = per_pair(d, TILE), per_pair(d * offset, TILE)
        if KIND is None:
            y0, y1 = fma(t0, inv, -offset), fma(t1, inv, -offset)
            q0 = output_of(code_of(y0, qmin, qmax), delta, shift, CODES)
            q1 = output_of(code_of(y1, qmin, qmax), delta, shift, CODES)
        else:
            g0, g1 = load_tile(tl.multiple_of(grad + begin + start, 16), left, TILE)
            q0 = g0 * derivative_of(t0, inv, offset, qmin, qmax, r, KIND)
            q1 = g1 * derivative_of(t1, inv, offset, qmin, qmax, r, KIND)
        store_tile(tl.multiple_of(out + begin + start, 16), q0, q1, left, TILE)
    SUB: tl.constexpr = TILE // 8
    for start in tl.range(tl.maximum(begin, fast), end, SUB):
        j = start + tl.arange(0, SUB)
        mask = j < end
        d = element_delta(alpha, j, row, r, mask)
        theta = tl.load(latent + j, mask=mask, other=0.0).to(tl.float32)
        if KIND is None:
            code = code_of(fma(theta, reciprocal(d), -offset), qmin, qmax)
            q = output_of(code, d, d * offset, CODES)
        else:
            g = tl.load(grad + j, mask=mask, other=0.0).to(tl.float32)
            q = g * derivative_of(theta, reciprocal(d), offset, qmin, qmax, r, KIND)
        tl.store(out + j, convert(q, OUT_T), mask=mask)
