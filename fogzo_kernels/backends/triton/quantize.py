"""Q(theta), and the straight-through derivative (docs/contract.md, sections 1 and 3)."""

from __future__ import annotations

import triton
import triton.language as tl

from ...spec import grid as spec
from ...spec.straight_through import StraightThrough
from ..plans import plan
from .elements import (
    Grid,
    convert,
    derivative_of,
    load_tile,
    output_of,
    position,
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
    element_delta,
    entry,
    left_in_tile,
    pointer,
    program_row,
    tiled_part,
)


@triton.jit
def quantize_kernel(
    table, owner, offset, qmin, qmax, r, TILE: tl.constexpr, ALIGNED: tl.constexpr,
    LATENT_T: tl.constexpr, GRAD_T: tl.constexpr, OUT_T: tl.constexpr, KIND: tl.constexpr,
    PER_TENSOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """KIND None: Q(theta) into PLUS. Else g h'(theta) into PLUS, which may be GRAD.

    With a transform, BLOCK > 0: Q(x), or H(g h'(x)), of x = H(theta).
    """
    row, begin, end, fast = program_row(table, owner, tl.program_id(0))
    grid = Grid(offset, qmin, qmax, r)
    latent, grad = pointer(row, "LATENT", LATENT_T), pointer(row, "GRAD", GRAD_T)
    out = pointer(row, "PLUS", OUT_T)
    alpha = pointer(row, "ALPHA", tl.float32)
    if PER_TENSOR:
        scale = scale_of(tl.load(alpha) * r, grid)
    else:
        length, chunks = entry(row, "SCALE_DIVISOR"), (fast >> 3).to(tl.uint32)
    tiled = tiled_part(begin, end, fast)
    for start in tl.range(0, tiled, TILE):
        left = left_in_tile(start, tiled, TILE)
        t0, t1 = load_tile(latent, begin, start, left, TILE, ALIGNED)
        t0, t1 = rotated_halves(t0, t1, BLOCK, TILE)
        if not PER_TENSOR:
            delta = chunk_delta(alpha, chunks_from(begin, start, TILE), length, r, chunks)
            scale = scale_per_pair(scale_of(delta, grid), TILE)
        if KIND is None:
            q0 = output_of(position(t0, scale, grid), scale, grid, OUT_T)
            q1 = output_of(position(t1, scale, grid), scale, grid, OUT_T)
        else:
            g0, g1 = load_tile(grad, begin, start, left, TILE, ALIGNED)
            q0 = product(g0, derivative_of(t0, scale, grid, KIND), BLOCK != 0)
            q1 = product(g1, derivative_of(t1, scale, grid, KIND), BLOCK != 0)
            q0, q1 = rotated_halves(q0, q1, BLOCK, TILE)
        store_tile(out, begin, start, q0, q1, left, TILE, ALIGNED)
    SUB: tl.constexpr = TILE // 8  # without a transform: all elements of one with it go by tiles
    for start in tl.range(tl.maximum(begin, fast), end, SUB):
        j = start + tl.arange(0, SUB)
        mask = j < end
        one = scale_of(element_delta(alpha, j, row, r, mask), grid)
        theta = tl.load(latent + j, mask=mask, other=0.0).to(tl.float32)
        if KIND is None:
            q = output_of(position(theta, one, grid), one, grid, OUT_T)
        else:
            g = tl.load(grad + j, mask=mask, other=0.0).to(tl.float32)
            q = g * derivative_of(theta, one, grid, KIND)
        tl.store(out + j, convert(q, OUT_T), mask=mask)


def quantize_(out: Tensors, latents: Tensors, alphas: Tensors, grid: spec.Grid, block: int) -> None:
    """Write Q(theta): one launch."""
    _launch(out, (), latents, alphas, grid, None, block)


def straight_through_backward_(
    out: Tensors, grads: Tensors, latents: Tensors, alphas: Tensors, grid: spec.Grid,
    straight_through: StraightThrough, block: int,
) -> None:  # fmt: skip
    """Write g * h'(theta): one launch."""
    _launch(out, grads, latents, alphas, grid, straight_through.variant, block)


def _launch(
    out: Tensors, grads: Tensors, latents: Tensors, alphas: Tensors, grid: spec.Grid, kind: str | None,
    block: int,
) -> None:  # fmt: skip
    p = plan(latents, latents=latents, grads=grads, plus=out, alphas=alphas)
    launch(
        quantize_kernel, p.programs, latents[0].device, p.table, p.owner, **grid_of(grid), TILE=TILE,
        ALIGNED=p.aligned, LATENT_T=DTYPES[latents[0].dtype], GRAD_T=DTYPES[(grads or latents)[0].dtype],
        OUT_T=DTYPES[out[0].dtype], KIND=kind, PER_TENSOR=p.per_tensor, BLOCK=block,
    )  # fmt: skip
