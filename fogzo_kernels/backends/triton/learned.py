"""Learned scales: g h'(theta), and the gradients of alphas (docs/contract.md, section 4)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ...spec import grid as spec
from ...spec.straight_through import StraightThrough
from ..gpu.plans import Plan, plan
from . import program
from .elements import alpha_slope_of, derivative_of, product
from .hadamard import rotated
from .launch import IN_TABLE, Config, Given, Tensors, config_of, grid_of, launch
from .program import entry

#: Chunks that share an alpha, of which a tile's sums take so many at once.
WIDE, MIDDLE = tl.constexpr(128), tl.constexpr(16)
SUM_BLOCK = 2048  # programs whose sums are on their way at once


@triton.jit
def write_backward(arrays, turn, p, grid, config: tl.constexpr):
    """Store g h'(theta), and return each element's term of the gradient of its alpha."""
    latent, grad, out = arrays
    theta, g = program.load(latent, turn, config), program.load(grad, turn, config)
    theta = rotated(theta, config)
    scale = program.scale_of(turn, p, grid, config)
    x = product(g, derivative_of(theta, scale, grid, config), config.block)
    program.store(out, turn, rotated(x, config), config)
    return g * alpha_slope_of(theta, scale, grid)


@triton.jit
def add_within(first_a, sum_a, first_b, sum_b):
    """Add sums, which begin anew where an alpha does."""
    return first_a | first_b, tl.where(first_b != 0, sum_b, sum_a + sum_b)


@triton.jit
def write_alpha_grad(row, given, index, total, mask):
    factor = entry(row, "FACTOR").to(tl.float64, bitcast=True)
    to = program.pointer_or(given, row, "ALPHA_GRAD", tl.float32)
    tl.store(to + index, (total * factor).to(tl.float32), mask=mask)


@triton.jit
def partial_sums(places):
    """The place of the program's two sums."""
    return places[0] + 2 * tl.program_id(0).to(tl.int64)


@triton.jit
def write_sums(p, places, terms, carry, place, exists, index, inside, length):
    """Add up the terms of each alpha, write the sums of alphas that end here, return the sum of the last one.

    ``terms`` are float64, of the units or elements at ``place`` 0, 1, 2, ... that exist. Each is number
    ``inside`` of the ``length`` terms of alpha ``index``. ``carry`` is the sum of the alpha at hand so far.
    ``places``: memory for programs' sums, and the alphas' gradient or None.
    """
    terms = tl.where((place == 0) & (inside != 0), terms + carry, terms)
    _, sums = tl.associative_scan(((inside == 0).to(tl.int32), terms), 0, add_within)
    per_alpha = entry(p.row, "SCALE_LENGTH")
    ends, before = exists & (inside == length - 1), index * per_alpha < p.begin
    write_alpha_grad(p.row, places[1], index, sums, ends & (~before))
    tl.store(partial_sums(places) + place * 0, sums, mask=ends & before)
    last = place == tl.sum(exists.to(tl.int32), 0) - 1
    return tl.sum(tl.where(last & (~ends), sums, 0.0), 0)


@triton.jit
def write_rest(p, places, total, WRITTEN: tl.constexpr):
    """Write the sum of the alpha at hand when the program ends. WRITTEN: sums of ended alphas are written."""
    length = entry(p.row, "SCALE_LENGTH")
    index = (p.end - 1) // length
    before, goes_on = index * length < p.begin, (index + 1) * length > p.end
    pending = goes_on if WRITTEN else True
    tl.store(partial_sums(places), total, mask=before & pending)
    tl.store(partial_sums(places) + 1, total, mask=(~before) & goes_on)
    if not WRITTEN:
        write_alpha_grad(p.row, places[1], index, total, (~before) & (~goes_on))


@triton.jit
def learned_tiles(arrays, places, p, grid, UNIT: tl.constexpr, config: tl.constexpr):
    """Do the program's tiles, and return the sum of the alpha at hand."""
    length, divisor = entry(p.row, "SCALE_LENGTH"), entry(p.row, "SCALE_DIVISOR")
    CHUNKS: tl.constexpr = config.tile // 8
    acc = tl.zeros([CHUNKS], tl.float64)
    carry = tl.sum(acc, 0)
    for start in tl.range(0, p.tiled, config.tile):
        turn = program.tile_at(p, start, config)
        terms = write_backward(arrays, turn, p, grid, config)
        terms = tl.sum(tl.sum(terms.reshape([CHUNKS, 4, 2]), 2), 1)
        terms = tl.where(tl.arange(0, CHUNKS) < (turn.left >> 3), terms, 0.0).to(tl.float64)
        if UNIT == 0:
            acc += terms
        else:
            unit = tl.arange(0, CHUNKS // UNIT)
            if UNIT > 1:
                terms = tl.sum(terms.reshape([CHUNKS // UNIT, UNIT]), 1)
            chunk = (p.begin >> 3).to(tl.uint32) + ((start >> 3) + unit * UNIT).to(tl.uint32)
            index = program.divide(chunk, divisor)
            inside = (chunk - index * (length >> 3).to(tl.uint32)) // UNIT
            # a rest of elements follows the chunks of an only alpha: none of them is the last
            count = tl.where(length % 8 == 0, length // (8 * UNIT), 0).to(tl.uint32)
            exists = unit * (8 * UNIT) < turn.left
            carry = write_sums(p, places, terms, carry, unit, exists, index.to(tl.int64), inside, count)
    if UNIT == 0:
        carry = tl.sum(acc, 0)
    return carry


@triton.jit(do_not_specialize=["given"])
def learned_kernel(table, owner, given, partial, grid, config: tl.constexpr):
    """g h'(theta) into PLUS, which may be GRAD; the gradients of alphas into ALPHA_GRAD.

    In each tensor every ``config.unit`` chunks share an alpha, as unit_of() says; without a unit each has its
    own number. ``given``: see :data:`launch.Given`.
    An alpha whose elements several programs hold is left to learned_sum_kernel, as two sums a program: one of
    the alpha which began in an earlier program, one of the alpha which begins in this one and goes on.
    """
    p = program.read(program.own_span(table, owner), grid.r, config)
    length = entry(p.row, "SCALE_LENGTH")
    latent = program.pointer(p.row, "LATENT", config.latent)
    grad = program.pointer_or(given[0], p.row, "GRAD", config.grad)
    arrays = latent, grad, program.pointer_or(given[1], p.row, "PLUS", config.out)
    places = partial, given[2]
    if config.unit is not None:
        carry = learned_tiles(arrays, places, p, grid, config.unit, config)
    elif length % (8 * WIDE) == 0:
        carry = learned_tiles(arrays, places, p, grid, WIDE, config)
    elif length % (8 * MIDDLE) == 0:
        carry = learned_tiles(arrays, places, p, grid, MIDDLE, config)
    else:
        carry = learned_tiles(arrays, places, p, grid, 1, config)
    place = tl.arange(0, config.tile // 8)
    REST: tl.constexpr = program.for_elements(config)
    for start in tl.range(p.rest, p.end, config.tile // 8):
        turn = program.elements_at(p, start)
        exists = place < turn.left
        terms = write_backward(arrays, turn, p, grid, REST)
        terms = tl.where(exists, terms, 0.0).to(tl.float64)
        if config.unit == 0:
            carry += tl.sum(terms, 0)
        else:
            j = start + place
            index = j // length
            carry = write_sums(p, places, terms, carry, place, exists, index, j - index * length, length)
    write_rest(p, places, carry, config.unit != 0)


@triton.jit(do_not_specialize=["given"])
def learned_sum_kernel(table, owner, crossing, given, partial, BLOCK: tl.constexpr):
    """Adds the sums of all programs that hold the alpha which begins in one of them and goes on behind it.

    ``given``: the alphas' gradient, or None where the row says where it lies.
    """
    here = tl.load(crossing + tl.program_id(0)).to(tl.int64)
    row, _begin, end = program.span_of(table, owner, here)
    length, span = entry(row, "SCALE_LENGTH"), entry(row, "SPAN")
    index = (end - 1) // length
    stop = entry(row, "FIRST") + ((index + 1) * length - 1) // span + 1
    acc = tl.zeros([BLOCK], tl.float64)
    for start in tl.range(here + 1, stop, BLOCK):
        i = start + tl.arange(0, BLOCK)
        acc += tl.load(partial + 2 * i, mask=i < stop, other=0.0)
    write_alpha_grad(row, given, index, tl.load(partial + 2 * here + 1) + tl.sum(acc, 0), True)


def registers_of(unit: int | None, kind: str | None, block: int) -> int | None:
    """Register limit per thread, where the compiler's own choice, often better, spills on some GPU."""
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
    straight_through: StraightThrough, factors: Sequence[float], block: int,
) -> None:  # fmt: skip
    """Write g * h'(theta), and the gradients of the alphas: a launch, and one for those of several programs."""
    p = plan(
        latents, latents=latents, grads=grads, plus=out, alphas=alphas, alpha_grads=alpha_grads, factors=factors
    )
    device = latents[0].device
    config = config_of(p, latents, grads, out, block, variant=straight_through.variant, unit=unit_of(p))
    launch_learned(p, device, grid, config)


def launch_learned(
    p: Plan, device: torch.device, grid: spec.Grid, config: Config, given: Given = IN_TABLE
) -> None:
    """Launch the kernels of a plan."""
    partial = torch.empty(2 * p.programs, dtype=torch.float64, device=device)
    registers = registers_of(config.unit, config.variant, config.block)
    args = p.table, p.owner, given, partial, grid_of(grid), config
    launch(learned_kernel, p.programs, device, *args, maxnreg=registers)
    rest = p.table, p.owner, p.crossing, given[2], partial
    launch(learned_sum_kernel, p.crossing.numel(), device, *rest, BLOCK=SUM_BLOCK)
