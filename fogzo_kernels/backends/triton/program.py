"""Device functions: the elements that a program of a kernel works on (backends/gpu/plans.py).

A program takes consecutive elements of one tensor. ``owner`` names the program's row of ``table``, and a row
says where the tensor lies (plans.COLUMNS). Full chunks of 8 elements, up to the row's FAST, go one tile a turn.
The rest goes element by element, most often at most 7 elements.

The values of a turn are one array of float32, in the order of memory. A thread holds 8 consecutive elements of
a tile, whatever the dtype: so noise, loads and stores meet without a shuffle.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..gpu.plans import COLUMNS
from .elements import Names, Scale, convert, element_noise, fma, is_finite, reciprocal, tile_noise

WIDTH = tl.constexpr(len(COLUMNS))
#: A constexpr, whose value is part of a compiled kernel's key: a dict's would not be.
PLACES = tl.constexpr({name: place for place, name in enumerate(COLUMNS)})


class Program(NamedTuple):
    """The elements [begin, end) of a tensor, and what the program reads of its row before a loop."""

    row: Any
    begin: Any
    end: Any
    tiled: Any  # how many elements go by tiles
    rest: Any  # the first element that does not
    alpha: Any
    delta: Any  # of all elements, if the tensor has one alpha
    has_alpha: Any
    scale_divisor: Any
    chunks: Any  # chunks that have an alpha
    offset: Any  # layout of a shard, in chunks; skip and inner_divisor count only for a shard
    skip: Any
    inner_divisor: Any


class Turn(NamedTuple):
    """``left`` elements: a tile's from ``begin`` + ``start`` on, or single ones from ``begin`` on."""

    begin: Any
    start: Any
    left: Any


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
def pointer_or(given, row, COLUMN: tl.constexpr, DTYPE: tl.constexpr):
    """``given``, or the row's where it is None."""
    if given is None:
        return pointer(row, COLUMN, DTYPE)
    else:
        return given


@triton.jit
def span_of(table, owner, number):
    """Row and elements [begin, end) of a program."""
    row = table + tl.load(owner + number).to(tl.int64) * WIDTH
    span = entry(row, "SPAN")
    begin = (number - entry(row, "FIRST")) * span
    return row, begin, tl.minimum(begin + span, entry(row, "NUMEL"))


@triton.jit
def own_span(table, owner):
    return span_of(table, owner, tl.program_id(0))


@triton.jit
def read(span, r, config: tl.constexpr, SOME_ALPHAS: tl.constexpr = False):
    """The program of a span. ``r`` is the grid's, None without alphas. SOME_ALPHAS: some tensors have none."""
    row, begin, end = span
    fast = entry(row, "FAST")
    alpha = pointer(row, "ALPHA", tl.float32)
    delta, has_alpha, chunks, divisor = 1.0, True, fast, fast
    if SOME_ALPHAS:
        has_alpha = entry(row, "ALPHA") != 0
    if r is not None and config.per_tensor:
        delta = tl.load(alpha, mask=has_alpha, other=1.0) * r
    else:
        chunks, divisor = tl.where(has_alpha, fast >> 3, 0).to(tl.uint32), entry(row, "SCALE_DIVISOR")
    offset = entry(row, "OFFSET") >> 3
    skip, inner_divisor = offset, offset
    if config.shard:
        skip, inner_divisor = entry(row, "SKIP") >> 3, entry(row, "INNER_DIVISOR")
    tiled = tl.maximum(tl.minimum(end, fast) - begin, 0).to(tl.int32)  # 32 bits, whatever the tensor's size
    rest, alphas = tl.maximum(begin, fast), (alpha, delta, has_alpha, divisor, chunks)
    return Program(row, begin, end, tiled, rest, *alphas, offset, skip, inner_divisor)


@triton.jit
def divide(n, packed):
    """n // d, given plans.divisor(d)."""
    magic = (packed.to(tl.uint64, bitcast=True) >> 6).to(tl.uint32).to(tl.uint64)
    return (n.to(tl.uint64) * magic >> (packed & 63).to(tl.uint64)).to(tl.uint32)


# ---- turns


@triton.constexpr_function
def for_elements(config):
    """The configuration for turns of single elements. A tensor with a transform has none."""
    return config.replaced(single=True, block=0, one_direction=False)


@triton.jit
def tile_at(p, start, config: tl.constexpr):
    """The turn of the tile that begins ``start`` elements after the program's first."""
    return Turn(p.begin, start, tl.multiple_of(tl.minimum(p.tiled - start, config.tile), 8))


@triton.jit
def elements_at(p, start):
    """The turn of up to tile / 8 single elements from the tensor's element ``start`` on."""
    return Turn(start, start, p.end - start)


@triton.jit
def turn_if(condition, turn, config: tl.constexpr):
    """The turn, without elements unless the condition holds."""
    left = tl.where(condition, turn.left, 0)
    if not config.single:
        left = tl.multiple_of(left, 8)
    return Turn(turn.begin, turn.start, left)


@triton.jit
def single(turn, config: tl.constexpr):
    """Numbers of single elements in their tensor, and which of them exist."""
    place = tl.arange(0, config.tile // 8)
    return turn.begin + place, place < turn.left


@triton.jit
def chunks_of(turn, config: tl.constexpr):
    """Numbers of a tile's chunks in their tensor; 32 bits reach 2^35 elements."""
    return (turn.begin >> 3).to(tl.uint32) + ((turn.start >> 3) + tl.arange(0, config.tile // 8)).to(tl.uint32)


# ---- noise of a turn


@triton.jit
def places_of(turn, p, config: tl.constexpr):
    """Places in the whole parameter: of a tile's chunks, or of single elements."""
    if config.single:
        j, _ = single(turn, config)
        place = entry(p.row, "OFFSET") + j + j // entry(p.row, "INNER") * entry(p.row, "SKIP")
    else:
        local = chunks_of(turn, config)
        place = p.offset + local
        if config.shard:
            place += divide(local, p.inner_divisor).to(tl.int64) * p.skip
    return place


@triton.jit
def noise_of(place, names, direction, config: tl.constexpr):
    """Noise of the places of a turn: m times its factor in elements.M_FACTOR."""
    if config.single:
        return element_noise(place, names, direction, config)
    else:
        return tile_noise(place, names, direction, config)


@triton.jit
def factor_of(factors, owner, exists):
    """t of the program's tensor: how large its noise is. Only a tensor that ``exists`` in the list has one."""
    if factors is None:
        return 1.0
    else:
        return tl.load(factors + tl.load(owner + tl.program_id(0)), mask=exists, other=1.0)


@triton.jit
def noise_sum(like, turn, p, names, B, t, n, config: tl.constexpr):
    """sum_i B_i t m_i over n directions. ``like``: any values of the turn that were loaded."""
    place = places_of(turn, p, config)
    if not config.single:
        acc = like * 0.0  # from a load, so that the loop keeps the tile's layout
        acc = tl.where(acc == 0, acc, 0.0)
    else:
        acc = tl.zeros(place.shape, tl.float32)
    for i in tl.range(0, n):
        acc = fma(noise_of(place, names, i, config), tl.load(B + i) * t, acc)
    return acc


# ---- scales of a turn


@triton.jit
def delta_of(turn, p, r, config: tl.constexpr):
    """delta of each element of the turn, or of all of them."""
    if config.per_tensor:
        return p.delta
    elif not config.single:
        local = chunks_of(turn, config)
        x = tl.load(p.alpha + divide(local, p.scale_divisor), mask=local < p.chunks, other=1.0) * r
        x = tl.join(x, x)
        x = tl.join(x, x)
        return tl.join(x, x).reshape([config.tile])
    else:
        j, exists = single(turn, config)
        return tl.load(p.alpha + j // entry(p.row, "SCALE_LENGTH"), mask=exists & p.has_alpha, other=1.0) * r


@triton.jit
def scale_of(turn, p, grid, config: tl.constexpr):
    delta = delta_of(turn, p, grid.r, config)
    return Scale(delta, reciprocal(delta), delta * grid.offset)


# ---- memory of a turn


@triton.jit
def is_wide(ptr, config: tl.constexpr):
    """Whether 16 bytes lie aligned there."""
    if config.aligned:
        return True
    else:
        return (ptr.to(tl.int64) & 15) == 0


@triton.jit
def load(ptr, turn, config: tl.constexpr, OTHER: tl.constexpr = None):
    """The turn's elements as float32. OTHER stands for those that do not exist.

    A tile that lies aligned is read by accesses of 16 bytes: four-byte elements as two halves of a chunk. Other
    tiles are read element by element.
    """
    if config.single:
        j, exists = single(turn, config)
        x = tl.load(ptr + j, mask=exists, other=0.0).to(tl.float32)
    elif is_wide(ptr, config):
        at = tl.multiple_of(ptr + turn.begin + turn.start, 16)
        if ptr.dtype.element_ty.primitive_bitwidth == 32:
            offs = tl.arange(0, config.tile // 8)[:, None] * 8 + tl.arange(0, 4)[None, :]
            low = tl.load(at + offs, mask=offs < turn.left, other=OTHER)
            high = tl.load(at + offs + 4, mask=offs + 4 < turn.left, other=OTHER)
            x = tl.permute(tl.join(low, high), (0, 2, 1)).reshape([config.tile])
        else:
            offs = tl.arange(0, config.tile)
            x = tl.load(at + offs, mask=offs < turn.left, other=OTHER).to(tl.float32)
    else:
        even, odd = load_alternate(ptr, turn, 0, config, OTHER), load_alternate(ptr, turn, 1, config, OTHER)
        x = tl.join(even, odd).reshape([config.tile])
    return x


@triton.jit
def alternate(ptr, turn, ODD: tl.constexpr, config: tl.constexpr):
    """Address of each chunk's first even or odd element, and whether the chunk exists."""
    offs = tl.arange(0, config.tile // 8) * 8
    return ptr + turn.begin + (turn.start + offs + ODD), offs < turn.left


@triton.jit
def load_alternate(ptr, turn, ODD: tl.constexpr, config: tl.constexpr, OTHER: tl.constexpr):
    """The even elements of each chunk, or the odd ones, one by one."""
    at, exists = alternate(ptr, turn, ODD, config)
    x0, x1 = tl.load(at, mask=exists, other=OTHER), tl.load(at + 2, mask=exists, other=OTHER)
    x2, x3 = tl.load(at + 4, mask=exists, other=OTHER), tl.load(at + 6, mask=exists, other=OTHER)
    return tl.join(tl.join(x0, x2), tl.join(x1, x3)).reshape([config.tile // 2]).to(tl.float32)


@triton.jit
def store(ptr, turn, x, config: tl.constexpr):
    """Store float32 values in the pointer's dtype, as load() reads them."""
    DTYPE: tl.constexpr = ptr.dtype.element_ty
    if config.single:
        j, exists = single(turn, config)
        tl.store(ptr + j, convert(x, DTYPE), mask=exists)
    elif is_wide(ptr, config):
        at = tl.multiple_of(ptr + turn.begin + turn.start, 16)
        if DTYPE.primitive_bitwidth == 32:
            low, high = tl.split(tl.permute(x.reshape([config.tile // 8, 2, 4]), (0, 2, 1)))
            offs = tl.arange(0, config.tile // 8)[:, None] * 8 + tl.arange(0, 4)[None, :]
            tl.store(at + offs, low, mask=offs < turn.left)
            tl.store(at + offs + 4, high, mask=offs + 4 < turn.left)
        elif DTYPE.primitive_bitwidth == 8:  # 8 bytes a thread; wider would go through shared memory
            offs = tl.arange(0, config.tile // 8)[:, None] * 8 + tl.arange(0, 8)[None, :]
            tl.store(at + offs, convert(x.reshape([config.tile // 8, 8]), DTYPE), mask=offs < turn.left)
        else:
            offs = tl.arange(0, config.tile)
            tl.store(at + offs, convert(x, DTYPE), mask=offs < turn.left)
    else:
        even, odd = tl.split(x.reshape([config.tile // 2, 2]))
        store_alternate(ptr, turn, even, 0, config)
        store_alternate(ptr, turn, odd, 1, config)


@triton.jit
def store_alternate(ptr, turn, x, ODD: tl.constexpr, config: tl.constexpr):
    """The even elements of each chunk, or the odd ones, one by one."""
    x02, x13 = tl.split(convert(x, ptr.dtype.element_ty).reshape([config.tile // 8, 2, 2]))
    x0, x2 = tl.split(x02)
    x1, x3 = tl.split(x13)
    at, exists = alternate(ptr, turn, ODD, config)
    tl.store(at, x0, mask=exists)
    tl.store(at + 2, x1, mask=exists)
    tl.store(at + 4, x2, mask=exists)
    tl.store(at + 6, x3, mask=exists)


# ---- the step's scalars


@triton.jit
def scalar(x):
    """A kernel argument that is a number or the address of one."""
    if x.dtype.is_ptr():
        return tl.load(x)
    else:
        return x


@triton.jit
def names_of(draw, tensor_id):
    """Names of a tensor's noise; ``draw``: seed and step."""
    seed, step = draw
    s = scalar(seed).to(tl.int64)
    return Names(s.to(tl.uint32), (s >> 32).to(tl.uint32), scalar(step).to(tl.uint32), tensor_id.to(tl.uint32))


@triton.jit
def guide_scale(norm, sqrt_beta, sign):
    """a of the contract: 0 unless N is finite and > 0."""
    n = tl.load(norm)
    usable = (n > 0) & is_finite(n)
    return tl.where(usable, tl.div_rn(sqrt_beta * sign, tl.where(usable, n, 1.0)), 0.0)


@triton.jit
def mixing(mix, config: tl.constexpr):
    """float32 of sqrt(beta) and of sqrt(1 - beta) C: from the host, or from a device's 1 - beta."""
    _norm, one_minus_beta, sqrt_beta, noise_scale = mix
    if one_minus_beta is None:
        return sqrt_beta, noise_scale
    else:
        omb = tl.load(one_minus_beta)
        scaled = tl.sqrt(omb) * config.noise_scale
        return tl.sqrt(1.0 - omb).to(tl.float32), scaled.to(tl.float32)
