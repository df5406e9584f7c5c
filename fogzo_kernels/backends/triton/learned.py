"""Learned scales: g h'(theta), and the gradients of alphas (docs/contract.md, section 4)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ...spec import grid as spec
from ...spec.straight_through import StraightThrough
from ..plans import Plan, learned_plan
from .elements import (
    Grid,
    alpha_slope_of,
    convert,
    derivative_of,
    load_tile,
    product,
    scale_of,
    scale_per_pair,
    store_tile,
)
from .hadamard import rotated_halves
from .launch import DTYPES, TILE, Tensors, grid_of, launch
from .tables import (
    chunk_delta,
    chunks_from,
    divide,
    element_delta,
    entry,
    left_in_tile,
    pointer,
    program_row,
    tiled_part,
)

#: Chunks of 8 elements by which alphas are shared, that their sums take together.
WIDE, MIDDLE = tl.constexpr(128), tl.constexpr(16)
SUM_BLOCK = 2048  # programs whose sums are on their way at once


@triton.jit
def backward_of(g, theta, scale, grid, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """g h'(theta), and the term of the alpha's gradient."""
    q = product(g, derivative_of(theta, scale, grid, KIND), BLOCK != 0)
    return q, g * alpha_slope_of(theta, scale, grid)


@triton.jit
def add_within(first_a, sum_a, first_b, sum_b):
    """Sums that begin anew where an alpha does."""
    return first_a | first_b, tl.where(first_b != 0, sum_b, sum_a + sum_b)


@triton.jit
def write_alpha_grad(row, index, total, mask):
    factor = entry(row, "FACTOR").to(tl.float64, bitcast=True)
    tl.store(pointer(row, "ALPHA_GRAD", tl.float32) + index, (total * factor).to(tl.float32), mask=mask)


@triton.jit
def partial_sums(partial):
    """Where the program leaves its two."""
    return partial + 2 * tl.program_id(0).to(tl.int64)


@triton.jit
def write_sums(row, partial, begin, terms, carry, place, some, index, inside, length):
    """Adds up the terms of each alpha, writes the sums of those that end here, returns that of the one at hand.

    terms: float64, of the units or elements that exist (``some``), place 0, 1, 2, ...; each is number
    ``inside`` of the ``length`` that share alpha ``index``. carry: the sum of the alpha at hand, so far.
    """
    terms = tl.where((place == 0) & (inside != 0), terms + carry, terms)
    _, sums = tl.associative_scan(((inside == 0).to(tl.int32), terms), 0, add_within)
    per_alpha = entry(row, "SCALE_LENGTH")
    ends, before = some & (inside == length - 1), index * per_alpha < begin
    write_alpha_grad(row, index, sums, ends & (~before))
    tl.store(partial_sums(partial) + place * 0, sums, mask=ends & before)
    last = place == tl.sum(some.to(tl.int32), 0) - 1
    return tl.sum(tl.where(last & (~ends), sums, 0.0), 0)


@triton.jit
def write_rest(row, partial, begin, end, total, WRITTEN: tl.constexpr):
    """The sum of the alpha at hand when the program ends. WRITTEN: those that ended are."""
    length = entry(row, "SCALE_LENGTH")
    index = (end - 1) // length
    before, goes_on = index * length < begin, (index + 1) * length > end
    pending = goes_on if WRITTEN else True
    tl.store(partial_sums(partial), total, mask=before & pending)
    tl.store(partial_sums(partial) + 1, total, mask=(~before) & goes_on)
    if not WRITTEN:
        write_alpha_grad(row, index, total, (~before) & (~goes_on))


@triton.jit
def learned_tiles(
    row, partial, begin, end, fast, grid, r, TILE: tl.constexpr, ALIGNED: tl.constexpr,
    LATENT_T: tl.constexpr, GRAD_T: tl.constexpr, OUT_T: tl.constexpr, KIND: tl.constexpr, UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """What goes by tiles. Returns the sum of the alpha at hand."""
    latent, grad = pointer(row, "LATENT", LATENT_T), pointer(row, "GRAD", GRAD_T)
    out, alpha = pointer(row, "PLUS", OUT_T), pointer(row, "ALPHA", tl.float32)
    length, divisor = entry(row, "SCALE_LENGTH"), entry(row, "SCALE_DIVISOR")
    SUB: tl.constexpr = TILE // 8
    if UNIT == 0:
        scale = scale_of(tl.load(alpha) * r, grid)
    acc = tl.zeros([SUB], tl.float64)
    carry = tl.sum(acc, 0)
    tiled = tiled_part(begin, end, fast)
    for start in tl.range(0, tiled, TILE):
        left, chunks = left_in_tile(start, tiled, TILE), chunks_from(begin, start, TILE)
        t0, t1 = load_tile(latent, begin, start, left, TILE, ALIGNED)
        t0, t1 = rotated_halves(t0, t1, BLOCK, TILE)
        g0, g1 = load_tile(grad, begin, start, left, TILE, ALIGNED)
        if UNIT != 0:
            delta = chunk_delta(alpha, chunks, divisor, r, (fast >> 3).to(tl.uint32))
            scale = scale_per_pair(scale_of(delta, grid), TILE)
        q0, term0 = backward_of(g0, t0, scale, grid, KIND, BLOCK)
        q1, term1 = backward_of(g1, t1, scale, grid, KIND, BLOCK)
        q0, q1 = rotated_halves(q0, q1, BLOCK, TILE)
        store_tile(out, begin, start, q0, q1, left, TILE, ALIGNED)
        terms = tl.sum((term0 + term1).reshape([SUB, 4]), 1)
        terms = tl.where(tl.arange(0, SUB) < (left >> 3), terms, 0.0).to(tl.float64)
        if UNIT == 0:
            acc += terms
        else:
            unit = tl.arange(0, SUB // UNIT)
            if UNIT > 1:
                terms = tl.sum(terms.reshape([SUB // UNIT, UNIT]), 1)
            chunk = (begin >> 3).to(tl.uint32) + ((start >> 3) + unit * UNIT).to(tl.uint32)
            index = divide(chunk, divisor)
            inside = (chunk - index * (length >> 3).to(tl.uint32)) // UNIT
            # a rest of elements follows the chunks of an only alpha: none of them is the last
            count = tl.where(length % 8 == 0, length // (8 * UNIT), 0).to(tl.uint32)
            some = unit * (8 * UNIT) < left
            carry = write_sums(row, partial, begin, terms, carry, unit, some, index.to(tl.int64), inside, count)
    if UNIT == 0:
        carry = tl.sum(acc, 0)
    return carry


@triton.jit
def learned_kernel(
    table, owner, partial, offset, qmin, qmax, r, TILE: tl.constexpr, ALIGNED: tl.constexpr,
    LATENT_T: tl.constexpr, GRAD_T: tl.constexpr, OUT_T: tl.constexpr, KIND: tl.constexpr,
    UNIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """g h'(theta) into PLUS, which may be GRAD; the gradients of alphas into ALPHA_GRAD.

    UNIT: of each tensor every so many chunks share an alpha, as unit_of() says; None: each has its own.
    An alpha whose elements several programs hold is left to learned_sum_kernel, as two sums a program: that of
    the alpha which began in an earlier program, and that of the one which begins in this one and goes on.
    """
    row, begin, end, fast = program_row(table, owner, tl.program_id(0))
    grid, length = Grid(offset, qmin, qmax, r), entry(row, "SCALE_LENGTH")
    if UNIT is not None:
        carry = learned_tiles(
            row, partial, begin, end, fast, grid, r, TILE, ALIGNED, LATENT_T, GRAD_T, OUT_T, KIND, UNIT, BLOCK
        )
    elif length % (8 * WIDE) == 0:
        carry = learned_tiles(
            row, partial, begin, end, fast, grid, r, TILE, ALIGNED, LATENT_T, GRAD_T, OUT_T, KIND, WIDE, BLOCK
        )
    elif length % (8 * MIDDLE) == 0:
        carry = learned_tiles(
            row, partial, begin, end, fast, grid, r, TILE, ALIGNED, LATENT_T, GRAD_T, OUT_T, KIND, MIDDLE, BLOCK
        )
    else:
        carry = learned_tiles(
            row, partial, begin, end, fast, grid, r, TILE, ALIGNED, LATENT_T, GRAD_T, OUT_T, KIND, 1, BLOCK
        )
    latent, grad = pointer(row, "LATENT", LATENT_T), pointer(row, "GRAD", GRAD_T)
    out, alpha = pointer(row, "PLUS", OUT_T), pointer(row, "ALPHA", tl.float32)
    REST: tl.constexpr = TILE // 8  # without a transform: all elements of one with it go by tiles
    place = tl.arange(0, REST)
    for start in tl.range(tl.maximum(begin, fast), end, REST):
        j = start + place
        some = j < end
        one = scale_of(element_delta(alpha, j, row, r, some), grid)
        theta = tl.load(latent + j, mask=some, other=0.0).to(tl.float32)
        g = tl.load(grad + j, mask=some, other=0.0).to(tl.float32)
        q, term = backward_of(g, theta, one, grid, KIND, 0)
        tl.store(out + j, convert(q, OUT_T), mask=some)
        terms = tl.where(some, term, 0.0).to(tl.float64)
        if UNIT == 0:
            carry += tl.sum(terms, 0)
        else:
            index = j // length
            carry = write_sums(
                row, partial, begin, terms, carry, place, some, index, j - index * length, length
            )
    write_rest(row, partial, begin, end, carry, UNIT != 0)


@triton.jit
def learned_sum_kernel(table, owner, crossing, partial, BLOCK: tl.constexpr):
    """Adds the sums of all programs that hold the alpha which begins in one of them and goes on behind it."""
    here = tl.load(crossing + tl.program_id(0)).to(tl.int64)
    row, _begin, end, _fast = program_row(table, owner, here)
    length, span = entry(row, "SCALE_LENGTH"), entry(row, "SPAN")
    index = (end - 1) // length
    stop = entry(row, "FIRST") + ((index + 1) * length - 1) // span + 1
    acc = tl.zeros([BLOCK], tl.float64)
    for start in tl.range(here + 1, stop, BLOCK):
        i = start + tl.arange(0, BLOCK)
        acc += tl.load(partial + 2 * i, mask=i < stop, other=0.0)
    write_alpha_grad(row, index, tl.load(partial + 2 * here + 1) + tl.sum(acc, 0), True)


def registers_of(unit: int | None, kind: str, block: int) -> int | None:
    """The most of a thread where the compiler's own choice, often better, spills 8 bytes on some GPU."""
    if block >= 256:
        return 112 if block < 1024 else 168
    if unit is None:
        return 144 if kind == "tanh" else 96
    return 112 if kind == "approxsign" else None


def unit_of(p: Plan) -> int | None:
    """Chunks that the kernel takes together: 0 where all of a tensor share an alpha, None if tensors differ."""
    if p.per_tensor:
        return 0
    widths = (WIDE.value, MIDDLE.value)
    units = {next((u for u in widths if length % (8 * u) == 0), 1) for length in p.scale_lengths}
    return units.pop() if len(units) == 1 else None


def learned_backward_(
    out: Tensors, alpha_grads: Tensors, grads: Tensors, latents: Tensors, alphas: Tensors, grid: spec.Grid,
    straight_through: StraightThrough, factors: Sequence[float],
    block: int,
) -> None:  # fmt: skip
    """Write g * h'(theta), and the gradients of the alphas: a launch, and one for those of several programs."""
    p = learned_plan(out, alpha_grads, grads, latents, alphas, factors)
    device = latents[0].device
    partial = torch.empty(2 * p.programs, dtype=torch.float64, device=device)
    unit, kind = unit_of(p), straight_through.variant
    launch(
        learned_kernel, p.programs, device, p.table, p.owner, partial, **grid_of(grid), TILE=TILE,
        ALIGNED=p.aligned, LATENT_T=DTYPES[latents[0].dtype], GRAD_T=DTYPES[grads[0].dtype],
        OUT_T=DTYPES[out[0].dtype], KIND=kind, UNIT=unit, BLOCK=block, maxnreg=registers_of(unit, kind, block),
    )  # fmt: skip
    launch(
        learned_sum_kernel, p.crossing.numel(), device, p.table, p.owner, p.crossing, partial, BLOCK=SUM_BLOCK
    )
