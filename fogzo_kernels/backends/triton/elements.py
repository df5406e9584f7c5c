"""Device functions: Philox words -> noise -> direction -> code, on tiles (docs/contract.md, 2 and 4).

A tile is TILE consecutive elements, held as their even and odd elements, [TILE / 2] each. Its
TILE / 8 chunks make one Philox call each, and joining the four words in the order
``join(join(x0, x2), join(x1, x3))`` puts word j of a chunk beside pair j of its elements in the same
thread: no shuffle, no shared memory.

One source serves the GPU and Triton's interpreter. Where they differ a function branches on
INTERPRET: the interpreter has no inline assembly, its fma rounds twice and its conversion to bfloat16
truncates.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ...spec import noise as spec

INTERPRET = tl.constexpr(triton.knobs.runtime.interpret)
M0, M1 = tl.constexpr(spec.PHILOX_M0), tl.constexpr(spec.PHILOX_M1)
W0, W1 = tl.constexpr(spec.PHILOX_W0), tl.constexpr(spec.PHILOX_W1)
ROUNDS = tl.constexpr(spec.PHILOX_ROUNDS)
SIGN_TENSOR_ID = tl.constexpr(spec.SIGN_TENSOR_ID)

#: What ``noise_pair`` returns is m times this factor, or m itself where none stands here. The caller folds
#: it into the coefficient of the noise.
M_FACTOR = {"uniform": 2.0**15, "logistic": 1.4426950408889634}  # the latter: a base-2 logarithm


class Names(NamedTuple):
    """Of noise, but for direction and element: the seed's halves, step and tensor id, uint32."""

    k0: Any
    k1: Any
    step: Any
    tensor_id: Any


class Grid(NamedTuple):
    """Of the quantizer, float32 (contract section 3)."""

    offset: Any
    qmin: Any
    qmax: Any
    r: Any


class Scale(NamedTuple):
    """float32, one number, or one for each chunk or pair of elements."""

    delta: Any
    inv: Any  # 1 / delta
    shift: Any  # delta * offset


# ---- arithmetic


@triton.jit
def fma(a, b, c):
    if INTERPRET:
        return (a.to(tl.float64) * b + c).to(tl.float32)
    else:
        return tl.fma(a, b, c)


@triton.jit
def hardware(x, INSTRUCTION: tl.constexpr):
    """An approximate function of the hardware: far cheaper than the library's."""
    ASM: tl.constexpr = INSTRUCTION + ".approx.ftz.f32 $0, $1;"
    return tl.inline_asm_elementwise(ASM, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def approx_log2(x):
    if INTERPRET:
        return tl.log2(x)
    else:
        return hardware(x, "lg2")


@triton.jit
def approx_rcp(x):
    if INTERPRET:
        return 1.0 / x
    else:
        return hardware(x, "rcp")


@triton.jit
def approx_sqrt(x):
    if INTERPRET:
        return tl.sqrt(x)
    else:
        return hardware(x, "sqrt")


@triton.jit
def approx_cos_sin(x):
    if INTERPRET:
        return tl.cos(x), tl.sin(x)
    else:
        return hardware(x, "cos"), hardware(x, "sin")


@triton.jit
def reciprocal(x):
    """1 / x, correctly rounded for 2^-100 <= x <= 2^100: one Newton step on the approximation.

    The compiler makes rcp.rn.f32 of the same instructions, though PTX only promises that an approximation is
    within one ulp, from which the step is right for all mantissas but that of all ones (test_machine_code.py).
    """
    y = approx_rcp(x)
    if INTERPRET:  # already the correctly rounded quotient
        return y
    else:
        return tl.fma(y, tl.fma(-x, y, 1.0), y)


@triton.jit
def product(a, b, ALONE: tl.constexpr):
    """a * b. ALONE: the compiler may not contract it with a sum that it goes into."""
    if ALONE and not INTERPRET:
        ASM: tl.constexpr = "mul.rn.f32 $0, $1, $2;"
        return tl.inline_asm_elementwise(ASM, "=f,f,f", [a, b], dtype=tl.float32, is_pure=True, pack=1)
    else:
        return a * b


@triton.jit
def is_finite(x):
    return tl.abs(x) < float("inf")


@triton.jit
def convert(x, DTYPE: tl.constexpr):
    """float32 to the output's dtype, to nearest even."""
    if INTERPRET and tl.bfloat16 == DTYPE:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where(x == x, rounded, 0x7FC0)
        return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(DTYPE)


# ---- Philox


@triton.jit
def philox4x32(c0, c1, c2, c3, k0, k1):
    for _ in tl.static_range(ROUNDS):
        p0 = c0.to(tl.uint64) * M0  # one 32 x 32 -> 64 multiply gives both halves
        p1 = c2.to(tl.uint64) * M1
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1 = p1.to(tl.uint32)
        c3 = p0.to(tl.uint32)
        k0 = (k0 + W0).to(tl.uint32)
        k1 = (k1 + W1).to(tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def noise_words(chunk, names, direction):
    """The four words of each chunk of 8 elements."""
    c0 = chunk.to(tl.uint32)
    zero = c0 * 0
    c1 = (chunk >> 32).to(tl.uint32) | ((zero + direction) << 16).to(tl.uint32)
    return philox4x32(c0, c1, zero + names.step, zero + names.tensor_id, names.k0, names.k1)


@triton.jit
def direction_sign(names, direction):
    """s_i, float32."""
    zero = names.step * 0
    c1 = ((zero + direction) << 16).to(tl.uint32)
    x0, _1, _2, _3 = philox4x32(zero, c1, names.step, zero + SIGN_TENSOR_ID, names.k0, names.k1)
    return 1.0 - 2.0 * (x0 & 1).to(tl.float32)


# ---- noise


@triton.jit
def halves_as_float(word):
    """2^23 + low half and 2^23 + high half, by setting an exponent: no conversion."""
    low = ((word & 0xFFFF) | 0x4B000000).to(tl.uint32)
    high = ((word >> 16) | 0x4B000000).to(tl.uint32)
    return low.to(tl.float32, bitcast=True), high.to(tl.float32, bitcast=True)


@triton.jit
def high_uniform(word):
    """2^15 (2 ks + 1) of the high half: one signed conversion."""
    return ((word & 0xFFFF0000) | 0x8000).to(tl.uint32).to(tl.int32, bitcast=True).to(tl.float32)


@triton.jit
def logistic_log2(k):
    """log2((k + 0.5) / (65535.5 - k)) for k given as 2^23 + k; every sum here is exact."""
    numerator = k - 8388607.5
    return approx_log2(numerator * approx_rcp(65536.0 - numerator))


@triton.jit
def noise_pair(word, DIST: tl.constexpr):
    """m, times the factor in M_FACTOR if any, of the even and the odd element of a word."""
    if DIST == "uniform":
        return high_uniform(word << 16), high_uniform(word)
    elif DIST == "rademacher":
        even = (((word << 16) & 0x80000000) | 0x3F800000).to(tl.uint32)
        odd = ((word & 0x80000000) | 0x3F800000).to(tl.uint32)
        return even.to(tl.float32, bitcast=True), odd.to(tl.float32, bitcast=True)
    elif DIST == "triangular":
        even, odd = halves_as_float((word & 0x00FF00FF) + ((word >> 8) & 0x00FF00FF))
        return even - 8388863.0, odd - 8388863.0
    elif DIST == "logistic":
        even, odd = halves_as_float(word)
        return logistic_log2(even), logistic_log2(odd)
    elif DIST == "gaussian":  # Box-Muller: -2 ln x = -2 ln 2 log2 x; the angle is pi 2^-31 high_uniform
        low, _ = halves_as_float(word)
        radius = approx_sqrt(approx_log2((low - 8388607.5) * (1.0 / 65536)) * -1.3862943611198906)
        c, s = approx_cos_sin(high_uniform(word) * 1.4629180792671596e-09)
        return radius * c, radius * s
    else:
        tl.static_assert(False, f"no code for distribution {DIST}")


@triton.jit
def tile_noise(chunk, names, direction, TILE: tl.constexpr, DIST: tl.constexpr):
    """Noise of the tile whose chunk numbers are ``chunk`` [TILE / 8]: even, odd [TILE / 2]."""
    x0, x1, x2, x3 = noise_words(chunk, names, direction)
    words = tl.join(tl.join(x0, x2), tl.join(x1, x3)).reshape([TILE // 2])
    return noise_pair(words, DIST)


@triton.jit
def element_noise(e, names, direction, DIST: tl.constexpr):
    """Noise of any elements, one Philox call each: for tails and unaligned shards."""
    x0, x1, x2, x3 = noise_words(e >> 3, names, direction)
    high, low = tl.where((e & 2) != 0, x3, x2), tl.where((e & 2) != 0, x1, x0)
    even, odd = noise_pair(tl.where((e & 4) != 0, high, low), DIST)
    return tl.where((e & 1) != 0, odd, even)


@triton.jit
def tile_sum(g0, g1, chunk, names, B, n, TILE: tl.constexpr, DIST: tl.constexpr):
    """sum_i B_i m_i over n directions: even, odd [TILE / 2]. g is any tile that was loaded."""
    acc0, acc1 = g0 * 0.0, g1 * 0.0  # from a load, so that the loop keeps the tile's layout
    acc0, acc1 = tl.where(acc0 == 0, acc0, 0.0), tl.where(acc1 == 0, acc1, 0.0)
    for i in tl.range(0, n):
        m0, m1 = tile_noise(chunk, names, i, TILE, DIST)
        b = tl.load(B + i)
        acc0, acc1 = fma(m0, b, acc0), fma(m1, b, acc1)
    return acc0, acc1


@triton.jit
def element_sum(e, names, B, n, DIST: tl.constexpr):
    """sum_i B_i m_i over n directions, of any elements."""
    acc = tl.zeros(e.shape, tl.float32)
    for i in tl.range(0, n):
        acc = fma(element_noise(e, names, i, DIST), tl.load(B + i), acc)
    return acc


# ---- tiles in memory


@triton.jit
def is_wide(ptr, ALIGNED: tl.constexpr):
    """Whether 16 bytes lie aligned there. ALIGNED: they do for each tensor of the list."""
    if ALIGNED:
        return True
    else:
        return (ptr.to(tl.int64) & 15) == 0


@triton.jit
def load_tile(ptr, begin, start, left, TILE: tl.constexpr, ALIGNED: tl.constexpr, OTHER: tl.constexpr = None):
    """Even and odd elements as float32, the first ``left`` from ``begin`` + ``start`` on.

    A thread holds 8 consecutive elements whatever the dtype. By accesses of 16 bytes, if they lie aligned: of
    four-byte elements as two halves of a chunk. Else by accesses of one element. OTHER stands for the rest.
    """
    if is_wide(ptr, ALIGNED):
        at = tl.multiple_of(ptr + begin + start, 16)
        if ptr.dtype.element_ty.primitive_bitwidth == 32:
            offs = tl.arange(0, TILE // 8)[:, None] * 8 + tl.arange(0, 4)[None, :]
            low = tl.load(at + offs, mask=offs < left, other=OTHER)
            high = tl.load(at + offs + 4, mask=offs + 4 < left, other=OTHER)
            x = tl.permute(tl.join(low, high), (0, 2, 1))
        else:
            offs = tl.arange(0, TILE)
            x = tl.load(at + offs, mask=offs < left, other=OTHER).to(tl.float32)
        even, odd = tl.split(x.reshape([TILE // 2, 2]))
    else:
        even = load_every_second(ptr + begin, start, left, 0, TILE, OTHER)
        odd = load_every_second(ptr + begin, start, left, 1, TILE, OTHER)
    return even, odd


@triton.jit
def load_every_second(ptr, start, left, ODD: tl.constexpr, TILE: tl.constexpr, OTHER: tl.constexpr):
    """The even elements of each chunk, or the odd ones, one by one."""
    offs = tl.arange(0, TILE // 8) * 8
    at, some = ptr + (start + offs + ODD), offs < left
    x0, x1 = tl.load(at, mask=some, other=OTHER), tl.load(at + 2, mask=some, other=OTHER)
    x2, x3 = tl.load(at + 4, mask=some, other=OTHER), tl.load(at + 6, mask=some, other=OTHER)
    return tl.join(tl.join(x0, x2), tl.join(x1, x3)).reshape([TILE // 2]).to(tl.float32)


@triton.jit
def store_tile(ptr, begin, start, even, odd, left, TILE: tl.constexpr, ALIGNED: tl.constexpr):
    """Store float32 values in the pointer's dtype, as load_tile reads them."""
    DTYPE: tl.constexpr = ptr.dtype.element_ty
    if is_wide(ptr, ALIGNED):
        at = tl.multiple_of(ptr + begin + start, 16)
        x = tl.join(even, odd)
        if DTYPE.primitive_bitwidth == 32:
            low, high = tl.split(tl.permute(x.reshape([TILE // 8, 2, 4]), (0, 2, 1)))
            offs = tl.arange(0, TILE // 8)[:, None] * 8 + tl.arange(0, 4)[None, :]
            tl.store(at + offs, low, mask=offs < left)
            tl.store(at + offs + 4, high, mask=offs + 4 < left)
        elif DTYPE.primitive_bitwidth == 8:  # 8 bytes a thread; wider would go through shared memory
            offs = tl.arange(0, TILE // 8)[:, None] * 8 + tl.arange(0, 8)[None, :]
            tl.store(at + offs, convert(x.reshape([TILE // 8, 8]), DTYPE), mask=offs < left)
        else:
            offs = tl.arange(0, TILE)
            tl.store(at + offs, convert(x.reshape([TILE]), DTYPE), mask=offs < left)
    else:
        store_every_second(ptr + begin, start, even, left, 0, TILE)
        store_every_second(ptr + begin, start, odd, left, 1, TILE)


@triton.jit
def store_every_second(ptr, start, x, left, ODD: tl.constexpr, TILE: tl.constexpr):
    """The even elements of each chunk, or the odd ones, one by one."""
    x02, x13 = tl.split(convert(x, ptr.dtype.element_ty).reshape([TILE // 8, 2, 2]))
    x0, x2 = tl.split(x02)
    x1, x3 = tl.split(x13)
    offs = tl.arange(0, TILE // 8) * 8
    at, some = ptr + (start + offs + ODD), offs < left
    tl.store(at, x0, mask=some)
    tl.store(at + 2, x1, mask=some)
    tl.store(at + 4, x2, mask=some)
    tl.store(at + 6, x3, mask=some)


@triton.jit
def per_pair(x, TILE: tl.constexpr):
    """One value per chunk -> one per pair of elements."""
    twice = tl.join(x, x)
    return tl.join(twice, twice).reshape([TILE // 2])


# ---- quantizer


@triton.jit
def scale_of(delta, grid):
    return Scale(delta, reciprocal(delta), delta * grid.offset)


@triton.jit
def scale_per_pair(scale, TILE: tl.constexpr):
    return Scale(per_pair(scale.delta, TILE), per_pair(scale.inv, TILE), per_pair(scale.shift, TILE))


@triton.jit
def position(theta, scale, grid):
    """z: where a latent lies, in step units, from code 0."""
    return fma(theta, scale.inv, -grid.offset)


@triton.jit
def code_of(y, grid):
    """rint(min(max(y, qmin), qmax)); NaN gives qmin. The sum rounds half to even."""
    if INTERPRET:  # numpy's maximum keeps a NaN, the GPU's drops it
        y = tl.where(y > grid.qmin, y, grid.qmin)
    else:
        y = tl.maximum(y, grid.qmin)
    return (tl.minimum(y, grid.qmax) + 12582912.0) - 12582912.0


@triton.jit
def output_of(y, scale, grid, DTYPE: tl.constexpr):
    """What is stored for a position: its code for int8, else delta * (code + offset), float32.

    fma(code, delta, delta * offset) has the same bits (contract section 4).
    """
    code = code_of(y, grid)
    if tl.int8 == DTYPE:
        return code
    else:
        return fma(code, scale.delta, scale.shift)


@triton.jit
def alpha_slope_of(theta, scale, grid):
    """dQ/dalpha (contract section 4, learned scales); r is 2 on the sign grid alone."""
    z = position(theta, scale, grid)
    between = (z >= grid.qmin) & (z <= grid.qmax) & (grid.r == 1.0)
    return fma(code_of(z, grid), grid.r, tl.where(between, -z, grid.r * grid.offset))  # exact, both ways


@triton.jit
def derivative_of(theta, scale, grid, KIND: tl.constexpr):
    """h'(theta) (contract section 1); x = theta / alpha = r theta / delta."""
    x = tl.abs(theta * scale.inv * grid.r)
    if KIND == "identity_clipped":
        z = position(theta, scale, grid)
        return ((z > grid.qmin) & (z < grid.qmax)).to(tl.float32)
    elif KIND == "identity_trust":  # where a code is at most half a delta away
        z = position(theta, scale, grid)
        return ((z >= grid.qmin - 0.5) & (z <= grid.qmax + 0.5)).to(tl.float32)
    elif KIND == "identity":
        return tl.zeros_like(theta) + 1.0
    elif KIND == "hardtanh":
        return (x < 1.0).to(tl.float32)
    elif KIND == "tanh":  # 1 - tanh(x)^2 = 4 e / (1 + e)^2, e = exp(-2 x)
        e = tl.exp(-2.0 * x)
        return 4.0 * e / ((1.0 + e) * (1.0 + e))
    elif KIND == "approxsign":
        return tl.maximum(2.0 - 2.0 * x, 0.0)
    else:
        tl.static_assert(False, f"no code for straight-through kind {KIND}")
