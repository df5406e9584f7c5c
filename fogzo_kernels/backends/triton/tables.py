"""Device functions: what a kernel reads of its plan and of the step's scalars (backends/plans.py).

A program works on a span of consecutive elements of one tensor. ``owner`` names its tensor, a row of
``table`` says where that lies (plans.COLUMNS). Full chunks of 8 elements, up to the row's FAST, go tile by
tile; the rest, most often at most 7 elements, element by element.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..plans import COLUMNS
from .elements import Names, is_finite

WIDTH = tl.constexpr(len(COLUMNS))
#: A constexpr, whose value is part of a compiled kernel's key: a dict's would not be.
PLACES = tl.constexpr({name: place for place, name in enumerate(COLUMNS)})


class Layout(NamedTuple):
    """Where a shard's chunks lie in its parameter; skip and inner count only for a shard."""

    offset: Any
    skip: Any
    inner: Any  # a divisor


# ---- rows


@triton.constexpr_function
def column(name):
    return PLACES.value[name]


@triton.jit
def entry(row, COLUMN: tl.constexpr):
    """An entry of a row, int64."""
    return tl.load(row + column(COLUMN))


@triton.jit
def pointer(row, COLUMN: tl.constexpr, DTYPE: tl.constexpr):
    return tl.cast(entry(row, COLUMN), tl.pointer_type(DTYPE))


@triton.jit
def program_row(table, owner, program):
    """The program's row, its elements [begin, end) and how many of the tensor go by tiles."""
    row = table + tl.load(owner + program).to(tl.int64) * WIDTH
    span = entry(row, "SPAN")
    begin = (program - entry(row, "FIRST")) * span
    return row, begin, tl.minimum(begin + span, entry(row, "NUMEL")), entry(row, "FAST")


@triton.jit
def tiled_part(begin, end, fast):
    """How many of the program's elements go by tiles: 32 bits, whatever the tensor's size."""
    return tl.maximum(tl.minimum(end, fast) - begin, 0).to(tl.int32)


@triton.jit
def left_in_tile(start, tiled, TILE: tl.constexpr):
    """Elements of the tile that exist."""
    return tl.multiple_of(tl.minimum(tiled - start, TILE), 8)


@triton.jit
def divide(n, packed):
    """n // d, given plans.divisor(d)."""
    magic = (packed.to(tl.uint64, bitcast=True) >> 6).to(tl.uint32).to(tl.uint64)
    return (n.to(tl.uint64) * magic >> (packed & 63).to(tl.uint64)).to(tl.uint32)


# ---- numbers of chunks and elements


@triton.jit
def layout_of(row, SHARD: tl.constexpr):
    """What chunk_numbers needs, loaded before the loop."""
    offset = entry(row, "OFFSET") >> 3
    if SHARD:
        return Layout(offset, entry(row, "SKIP") >> 3, entry(row, "INNER_DIVISOR"))
    else:
        return Layout(offset, offset, offset)


@triton.jit
def chunks_from(begin, start, TILE: tl.constexpr):
    """Local chunk numbers of a tile; 32 bits reach 2^35 elements."""
    return (begin >> 3).to(tl.uint32) + ((start >> 3) + tl.arange(0, TILE // 8)).to(tl.uint32)


@triton.jit
def chunk_numbers(local, layout, SHARD: tl.constexpr):
    """Global chunk numbers of the tensor's chunks ``local``."""
    chunk = layout.offset + local
    if SHARD:
        chunk += divide(local, layout.inner).to(tl.int64) * layout.skip
    return chunk


@triton.jit
def element_numbers(j, row):
    """Global element numbers of the tensor's elements ``j``."""
    return entry(row, "OFFSET") + j + j // entry(row, "INNER") * entry(row, "SKIP")


# ---- scales


@triton.jit
def chunk_delta(alpha, local, length, r, chunks):
    """delta of each chunk; ``length``: chunks that share an alpha, as a divisor."""
    return tl.load(alpha + divide(local, length), mask=local < chunks, other=1.0) * r


@triton.jit
def element_delta(alpha, j, row, r, mask):
    return tl.load(alpha + j // entry(row, "SCALE_LENGTH"), mask=mask, other=1.0) * r


# ---- the step's scalars


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
    high = (s >> 32).to(tl.uint32)
    return Names(s.to(tl.uint32), high, scalar(step).to(tl.uint32), tensor_id.to(tl.uint32))


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
def guide_scale(norm, sqrt_beta, sign):
    """a of the contract: 0 unless N is finite and > 0."""
    n = tl.load(norm)
    usable = (n > 0) & is_finite(n)
    return tl.where(usable, tl.div_rn(sqrt_beta * sign, tl.where(usable, n, 1.0)), 0.0)
