"""Alphas from data: a statistic of each cell, the elements that share an alpha (docs/contract.md, 4)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...spec.call import Measure
from ..gpu import cells
from ..gpu.plans import SPAN
from .launch import Config, Tensors, dtype_of, launch, rounded

COLUMNS = tl.constexpr(len(cells.COLUMNS))
PLACES = tl.constexpr({name: place for place, name in enumerate(cells.COLUMNS)})
PIECE = tl.constexpr(SPAN)  # elements
WIDE, MIDDLE, NARROW = map(tl.constexpr, cells.WIDTHS)
JOINED = 1024  # pieces whose sums are on their way at once


@triton.constexpr_function
def place_of(name):
    return PLACES.value[name]


@triton.jit
def entry(row, COLUMN: tl.constexpr):
    return tl.load(row + place_of(COLUMN))


# ---- what elements come to: a float64 sum, or the largest bits of abs(x)


@triton.jit
def parts(x, STATISTIC: tl.constexpr, EXACT: tl.constexpr):
    """Of the last dimension. Sums are float32, or with EXACT float64: no square overflows or underflows."""
    x = x.to(tl.float32)
    if STATISTIC == "absmax":
        bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF  # in the order of abs(x), and NaN above all
        return tl.max(bits, axis=len(x.shape) - 1)
    else:
        tl.static_assert(STATISTIC == "rms" or STATISTIC == "absmean", "no code for statistic " + STATISTIC)
        if EXACT:
            x = x.to(tl.float64)
        return tl.sum(x * x if STATISTIC == "rms" else tl.abs(x), axis=len(x.shape) - 1).to(tl.float64)


@triton.jit
def sound(total, STATISTIC: tl.constexpr):
    """Whether a sum of float32 parts lost nothing: no overflow, and of squares at most 2^-149 each in 2^-80."""
    if STATISTIC == "absmax":
        return total >= 0
    elif STATISTIC == "rms":
        return (total >= 2.0**-80) & (total < float("inf"))
    else:
        return total < float("inf")


@triton.jit
def joined(a, b, STATISTIC: tl.constexpr):
    if STATISTIC == "absmax":
        return tl.maximum(a, b)
    else:
        return a + b


@triton.jit
def joined_along(x, STATISTIC: tl.constexpr):
    """The last dimension."""
    if STATISTIC == "absmax":
        return tl.max(x, axis=len(x.shape) - 1)
    else:
        return tl.sum(x, axis=len(x.shape) - 1)


@triton.jit
def write_alphas(alpha, mask, total, length, rule, STATISTIC: tl.constexpr):
    """max(factor * (statistic + add), least); NaN stays."""
    mean = total / tl.maximum(length, 1).to(tl.float64)
    if STATISTIC == "absmax":
        statistic = total.to(tl.int32).to(tl.float32, bitcast=True)
    elif STATISTIC == "absmean":
        statistic = mean.to(tl.float32)
    else:
        tl.static_assert(STATISTIC == "rms", "no code for statistic " + STATISTIC)
        statistic = tl.sqrt(mean).to(tl.float32)
    factor, add, least = rule
    scaled = factor * (statistic + add)
    tl.store(alpha, tl.where(scaled < least, least, scaled), mask=mask)


# ---- tiles


@triton.jit
def tile_totals(
    data, first, valid, begin, end, ROWS: tl.constexpr, WIDTH: tl.constexpr, ALIGNED: tl.constexpr,
    STATISTIC: tl.constexpr,
):  # fmt: skip
    """What the elements ``begin`` to ``end`` from each of ``first`` on come to, [ROWS].

    By tiles of [ROWS, WIDTH]. ALIGNED: eight of them in float32, which may not be sound(); else all in float64.
    """
    acc = tl.zeros([ROWS, WIDTH // 8], tl.int32 if STATISTIC == "absmax" else tl.float64)
    at = data + first
    if ALIGNED:
        at = tl.multiple_of(at, 16)
    for start in tl.range(begin, end, WIDTH):
        left = end - start
        if ALIGNED:
            start, left = tl.multiple_of(start, 8), tl.multiple_of(left, 8)
        offs = tl.arange(0, WIDTH)
        mask = valid[:, None] & (offs < left)[None, :]
        x = tl.load(at[:, None] + (start + offs)[None, :], mask=mask, other=0.0)
        acc = joined(acc, parts(x.reshape([ROWS, WIDTH // 8, 8]), STATISTIC, not ALIGNED), STATISTIC)
    return joined_along(acc, STATISTIC).to(tl.float64)


@triton.jit
def totals(
    data, first, valid, count, aligned, ROWS: tl.constexpr, WIDTH: tl.constexpr, STATISTIC: tl.constexpr
):  # fmt: skip
    total = tl.zeros([ROWS], tl.float64)
    done = 0
    if aligned:
        fast = count & -8
        total = tile_totals(data, first, valid, 0, fast, ROWS, WIDTH, True, STATISTIC)
        if tl.min((sound(total, STATISTIC) | (~valid)).to(tl.int32), 0) != 0:
            done = fast
        else:
            total = tl.zeros([ROWS], tl.float64)
    if done < count:
        rest = tile_totals(data, first, valid, done, count, ROWS, WIDTH, False, STATISTIC)
        total = joined(total, rest, STATISTIC)
    return total


@triton.jit
def measure_cells(row, number, data, aligned, rule, WIDTH: tl.constexpr, config: tl.constexpr):
    """Alphas of the cells of a program, tile / WIDTH at a time."""
    ROWS: tl.constexpr = config.tile // WIDTH
    STATISTIC: tl.constexpr = config.variant
    alpha = tl.cast(entry(row, "ALPHA"), tl.pointer_type(tl.float32))
    length, pack = entry(row, "LENGTH"), entry(row, "PACK")
    last = tl.minimum((number + 1) * pack, entry(row, "CELLS"))
    for begin in tl.range(number * pack, last, ROWS):
        cell = begin + tl.arange(0, ROWS)
        valid = cell < last
        total = totals(data, cell * length, valid, length.to(tl.int32), aligned, ROWS, WIDTH, STATISTIC)
        write_alphas(alpha + cell, valid, total, length, rule, STATISTIC)


# ---- kernels


@triton.jit
def row_of(table, owner, program):
    return table + tl.load(owner + program).to(tl.int64) * COLUMNS


@triton.jit
def measure_kernel(table, owner, partial, rule, config: tl.constexpr):
    """max(factor * (statistic + add), least) of whole cells; what a piece of a long one comes to."""
    pid = tl.program_id(0)
    row = row_of(table, owner, pid)
    number, pieces, aligned = pid - entry(row, "FIRST"), entry(row, "PIECES"), entry(row, "ALIGNED") != 0
    data = tl.cast(entry(row, "DATA"), tl.pointer_type(config.latent))
    STATISTIC: tl.constexpr = config.variant
    width = entry(row, "WIDTH")
    if pieces > 1:
        length, cell = entry(row, "LENGTH"), number // pieces
        begin = (number - cell * pieces) * PIECE
        one = tl.arange(0, 1)
        count = tl.minimum(length - begin, PIECE).to(tl.int32)
        total = totals(data, cell * length + begin + one, one == 0, count, aligned, 1, WIDE, STATISTIC)
        tl.store(partial + pid + one, total)
    elif width == WIDE:
        measure_cells(row, number, data, aligned, rule, WIDE, config)
    elif width == MIDDLE:
        measure_cells(row, number, data, aligned, rule, MIDDLE, config)
    else:
        measure_cells(row, number, data, aligned, rule, NARROW, config)


@triton.jit
def join_kernel(table, owner, partial, rule, BLOCK: tl.constexpr, STATISTIC: tl.constexpr):
    """The alpha of a cell in pieces, joined in a fixed order."""
    pid = tl.program_id(0)
    row = row_of(table, owner, pid)
    pieces, cell = entry(row, "PIECES"), pid - entry(row, "SECOND")
    acc = tl.zeros([BLOCK], tl.float64)
    for start in tl.range(0, pieces, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        at = partial + entry(row, "FIRST") + cell * pieces + offs
        acc = joined(acc, tl.load(at, mask=offs < pieces, other=0.0), STATISTIC)
    alpha = tl.cast(entry(row, "ALPHA"), tl.pointer_type(tl.float32)) + cell
    total = joined_along(acc, STATISTIC)
    write_alphas(alpha, True, total, entry(row, "LENGTH"), rule, STATISTIC)


def measure_alphas_(alphas: Tensors, tensors: Tensors, measure: Measure) -> None:
    """Write max(factor * (statistic + add), least) of each cell: one launch, and one for cells in pieces."""
    device, p = tensors[0].device, cells.plan(tensors, alphas)
    partial = torch.empty(max(p.programs if p.seconds else 0, 1), dtype=torch.float64, device=device)
    statistic, *numbers = measure
    rule, config = tuple(map(rounded, numbers)), Config(latent=dtype_of(tensors), variant=statistic)
    launch(measure_kernel, p.programs, device, p.table, p.owner, partial, rule, config)
    launch(join_kernel, p.seconds, device, p.table, p.second, partial, rule, BLOCK=JOINED, STATISTIC=statistic)
