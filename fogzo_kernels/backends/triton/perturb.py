"""Q(w + eps v) and Q(w - eps v): the probes' weights (docs/contract.md, section 4)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...spec import grid as spec
from ...spec.call import Draw, Mix
from ..plans import plan
from .elements import (
    Grid,
    convert,
    direction_sign,
    element_noise,
    fma,
    load_tile,
    output_of,
    per_pair,
    position,
    scale_of,
    scale_per_pair,
    store_tile,
    tile_noise,
)
from .hadamard import rotated_halves
from .launch import DTYPES, TILE, Tensors, grid_of, launch, mixed, named, rounded
from .tables import (
    chunk_delta,
    chunk_numbers,
    chunks_from,
    element_delta,
    element_numbers,
    entry,
    guide_scale,
    layout_of,
    left_in_tile,
    mixing,
    names_of,
    pointer,
    program_row,
    tiled_part,
)

#: The most of a thread, by the outputs' dtype: ptxas, left alone, spills some to reach fewer.
REGISTERS = {torch.int8: 80}


def registers_of(out: torch.dtype, block: int) -> int | None:
    """The most of a thread. A tile's larger blocks of the transform need more."""
    return (128 if block <= 256 else 200) if block else REGISTERS.get(out)


@triton.jit(do_not_specialize=["seed", "step", "direction"])
def perturb_kernel(
    table, owner, seed, step, one_minus_beta, norm, direction, sqrt_beta, noise_scale, eps, offset,
    qmin, qmax, r, TILE: tl.constexpr, ALIGNED: tl.constexpr, DIST: tl.constexpr,
    NOISE_SCALE: tl.constexpr, LATENT_T: tl.constexpr, GRAD_T: tl.constexpr, OUT_T: tl.constexpr,
    WRITE_PLUS: tl.constexpr, WRITE_MINUS: tl.constexpr, PER_TENSOR: tl.constexpr,
    SHARD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Q(w + eps v) into PLUS and Q(w - eps v) into MINUS, v = fma(a delta, g, b m).

    With a transform, BLOCK > 0: v = b m, and theta moves along g by +-eps a delta^2 before it is rotated.
    """
    row, begin, end, fast = program_row(table, owner, tl.program_id(0))
    grid = Grid(offset, qmin, qmax, r)
    names = names_of(seed, step, entry(row, "TENSOR_ID"))
    guide, b = mixing(one_minus_beta, sqrt_beta, noise_scale, NOISE_SCALE)
    a = guide_scale(norm, guide, direction_sign(names, direction))
    latent, grad = pointer(row, "LATENT", LATENT_T), pointer(row, "GRAD", GRAD_T)
    plus, minus = pointer(row, "PLUS", OUT_T), pointer(row, "MINUS", OUT_T)
    alpha = pointer(row, "ALPHA", tl.float32)
    if PER_TENSOR:
        delta = tl.load(alpha) * r
        scale, gam = scale_of(delta, grid), a * delta
    else:
        length, chunks = entry(row, "SCALE_DIVISOR"), (fast >> 3).to(tl.uint32)
    layout = layout_of(row, SHARD)
    tiled = tiled_part(begin, end, fast)
    for start in tl.range(0, tiled, TILE):
        left = left_in_tile(start, tiled, TILE)
        g0, g1 = load_tile(grad, begin, start, left, TILE, ALIGNED)
        t0, t1 = load_tile(latent, begin, start, left, TILE, ALIGNED)
        local = chunks_from(begin, start, TILE)
        m0, m1 = tile_noise(chunk_numbers(local, layout, SHARD), names, direction, TILE, DIST)
        if not PER_TENSOR:
            delta = chunk_delta(alpha, local, length, r, chunks)
            scale, gam = scale_per_pair(scale_of(delta, grid), TILE), per_pair(a * delta, TILE)
        if BLOCK:
            v0, v1 = m0 * b, m1 * b
        else:
            v0, v1 = fma(g0, gam, m0 * b), fma(g1, gam, m1 * b)
            z0, z1 = position(t0, scale, grid), position(t1, scale, grid)
        if WRITE_PLUS:
            if BLOCK:
                along = eps * gam * scale.delta
                z0, z1 = rotated_halves(fma(g0, along, t0), fma(g1, along, t1), BLOCK, TILE)
                z0, z1 = position(z0, scale, grid), position(z1, scale, grid)
            q0 = output_of(fma(v0, eps, z0), scale, grid, OUT_T)
            q1 = output_of(fma(v1, eps, z1), scale, grid, OUT_T)
            store_tile(plus, begin, start, q0, q1, left, TILE, ALIGNED)
        if WRITE_MINUS:
            if BLOCK:
                along = -eps * gam * scale.delta
                z0, z1 = rotated_halves(fma(g0, along, t0), fma(g1, along, t1), BLOCK, TILE)
                z0, z1 = position(z0, scale, grid), position(z1, scale, grid)
            q0 = output_of(fma(v0, -eps, z0), scale, grid, OUT_T)
            q1 = output_of(fma(v1, -eps, z1), scale, grid, OUT_T)
            store_tile(minus, begin, start, q0, q1, left, TILE, ALIGNED)
    # read again, so that no registers are kept over the loop
    row, begin, end, fast = program_row(table, owner, tl.program_id(0))
    SUB: tl.constexpr = TILE // 8  # without a transform: all elements of one with it go by tiles
    for start in tl.range(tl.maximum(begin, fast), end, SUB):
        j = start + tl.arange(0, SUB)
        mask = j < end
        d = element_delta(alpha, j, row, r, mask)
        m = element_noise(element_numbers(j, row), names, direction, DIST)
        g = tl.load(grad + j, mask=mask, other=0.0).to(tl.float32)
        theta = tl.load(latent + j, mask=mask, other=0.0).to(tl.float32)
        one = scale_of(d, grid)
        v, z = fma(g, a * d, m * b), position(theta, one, grid)
        if WRITE_PLUS:
            q = output_of(fma(v, eps, z), one, grid, OUT_T)
            tl.store(plus + j, convert(q, OUT_T), mask=mask)
        if WRITE_MINUS:
            q = output_of(fma(v, -eps, z), one, grid, OUT_T)
            tl.store(minus + j, convert(q, OUT_T), mask=mask)


def perturb_quantize_(
    plus: Tensors, minus: Tensors, latents: Tensors, grads: Tensors, alphas: Tensors, draw: Draw, mix: Mix,
    direction: int, grid: spec.Grid, block: int,
) -> None:  # fmt: skip
    """Write Q(w + eps v) and Q(w - eps v): one launch, one pass."""
    if not latents:
        return
    p = plan(
        latents, latents=latents, grads=grads, plus=plus, minus=minus, alphas=alphas,
        tensor_ids=draw.tensor_ids, layouts=draw.layouts,
    )  # fmt: skip
    out = (plus or minus)[0].dtype
    launch(
        perturb_kernel, p.programs, mix.norm.device, p.table, p.owner, *named(draw), direction=direction,
        **mixed(draw, mix), eps=rounded(mix.epsilon), **grid_of(grid), TILE=TILE, ALIGNED=p.aligned,
        DIST=draw.distribution, LATENT_T=DTYPES[latents[0].dtype], GRAD_T=DTYPES[grads[0].dtype],
        OUT_T=DTYPES[out], WRITE_PLUS=bool(plus), WRITE_MINUS=bool(minus), PER_TENSOR=p.per_tensor,
        SHARD=p.shard, BLOCK=block, maxnreg=registers_of(out, block),
    )  # fmt: skip
