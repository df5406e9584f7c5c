"""Device functions: arithmetic, Philox and noise, and the quantizer (docs/contract.md, 1 to 4).

One source serves the GPU and Triton's interpreter. Where they differ, a function branches on INTERPRET: the
interpreter has no inline assembly, its fma rounds twice, and its conversion to bfloat16 truncates.
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
    """float32, of all elements or of each."""

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
def approximate(x, FUNCTION: tl.constexpr):
    """A function by its approximate instruction in the hardware: far cheaper than the library's."""
    if not INTERPRET:
        ASM: tl.constexpr = FUNCTION + ".approx.ftz.f32 $0, $1;"
        return tl.inline_asm_elementwise(ASM, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    elif FUNCTION == "lg2":
        return tl.log2(x)
    elif FUNCTION == "rcp":
        return 1.0 / x
    elif FUNCTION == "sqrt":
        return tl.sqrt(x)
    elif FUNCTION == "cos":
        return tl.cos(x)
    else:
        tl.static_assert(FUNCTION == "sin", "no code for function " + FUNCTION)
        return tl.sin(x)


@triton.jit
def reciprocal(x):
    """1 / x, correctly rounded for 2^-100 <= x <= 2^100: one Newton step on the approximation.

    The compiler makes rcp.rn.f32 of the same instructions, though PTX only promises that an approximation is
    within one ulp, from which the step is right for all mantissas but that of all ones (test_machine_code.py).
    """
    y = approximate(x, "rcp")
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
    return approximate(numerator * approximate(65536.0 - numerator, "rcp"), "lg2")


@triton.jit
def noise_pair(word, config: tl.constexpr):
    """m, times the factor in M_FACTOR if any, of the even and the odd element of a word."""
    DIST: tl.constexpr = config.distribution
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
        log2 = approximate((low - 8388607.5) * (1.0 / 65536), "lg2")
        radius = approximate(log2 * -1.3862943611198906, "sqrt")
        angle = high_uniform(word) * 1.4629180792671596e-09
        return radius * approximate(angle, "cos"), radius * approximate(angle, "sin")
    else:
        tl.static_assert(False, f"no code for distribution {DIST}")


@triton.jit
def tile_noise(chunk, names, direction, config: tl.constexpr):
    """Noise of the tile whose chunks have the numbers ``chunk``, one Philox call each.

    This order of joins puts word j of a chunk beside pair j of its elements in the same thread: no shuffle.
    """
    x0, x1, x2, x3 = noise_words(chunk, names, direction)
    words = tl.join(tl.join(x0, x2), tl.join(x1, x3)).reshape([config.tile // 2])
    even, odd = noise_pair(words, config)
    return tl.join(even, odd).reshape([config.tile])


@triton.jit
def element_noise(e, names, direction, config: tl.constexpr):
    """Noise of any elements, one Philox call each: for tails and unaligned shards."""
    x0, x1, x2, x3 = noise_words(e >> 3, names, direction)
    high, low = tl.where((e & 2) != 0, x3, x2), tl.where((e & 2) != 0, x1, x0)
    even, odd = noise_pair(tl.where((e & 4) != 0, high, low), config)
    return tl.where((e & 1) != 0, odd, even)


# ---- quantizer


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
    """The value to store for a position: its code for int8, else delta * (code + offset), float32.

    fma(code, delta, delta * offset) has the same bits (contract section 4).
    """
    code = code_of(y, grid)
    if tl.int8 == DTYPE:
        return code
    else:
        return fma(code, scale.delta, scale.shift)


@triton.jit
def quantized(theta, scale, grid, DTYPE: tl.constexpr):
    """Q(theta), as output_of() has it."""
    return output_of(position(theta, scale, grid), scale, grid, DTYPE)


@triton.jit
def alpha_slope_of(theta, scale, grid):
    """dQ/dalpha (contract section 4, learned scales); r is 2 on the sign grid alone."""
    z = position(theta, scale, grid)
    between = (z >= grid.qmin) & (z <= grid.qmax) & (grid.r == 1.0)
    return fma(code_of(z, grid), grid.r, tl.where(between, -z, grid.r * grid.offset))  # exact, both ways


@triton.jit
def derivative_of(theta, scale, grid, config: tl.constexpr):
    """h'(theta) (contract section 1); x = theta / alpha = r theta / delta."""
    KIND: tl.constexpr = config.variant
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
