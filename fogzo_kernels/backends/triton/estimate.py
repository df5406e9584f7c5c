"""G in place of g (docs/contract.md, section 4)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...spec.call import Draw, Losses, Mix
from ..plans import plan
from .elements import (
    convert,
    element_sum,
    fma,
    load_tile,
    per_pair,
    product,
    reciprocal,
    store_tile,
    tile_noise,
    tile_sum,
)
from .hadamard import rotated_halves
from .launch import DTYPES, TILE, Tensors, launch, named
from .losses import count_bad_alphas, loss_arguments, read_losses
from .tables import (
    chunk_delta,
    chunk_numbers,
    chunks_from,
    element_delta,
    element_numbers,
    entry,
    layout_of,
    left_in_tile,
    mixing,
    names_of,
    pointer,
    program_row,
    tiled_part,
)

#: The coefficients' places: A, 1 if g must stay as it is, then the B_i.
A_AT, KEEP_AT, B_AT = (tl.constexpr(i) for i in range(3))


@triton.jit(do_not_specialize=["seed", "step", "n"])
def coefficients_kernel(
    coef, counters, seed, step, one_minus_beta, norm, losses_plus, losses_minus, n, sqrt_beta,
    noise_scale, half_inv_eps, NOISE_SCALE: tl.constexpr,
):  # fmt: skip
    """One program."""
    mixture = mixing(one_minus_beta, sqrt_beta, noise_scale, NOISE_SCALE)
    A, lost, norm_lost = read_losses(
        coef + B_AT, counters, seed, step, mixture, norm, losses_plus, losses_minus, n, half_inv_eps
    )
    tl.store(coef + A_AT, A)
    tl.store(coef + KEEP_AT, tl.where(lost | norm_lost, 1.0, 0.0))


@triton.jit(do_not_specialize=["seed", "step", "n"])
def estimate_kernel(
    table, owner, counters, seed, step, coef, n, r, TILE: tl.constexpr, ALIGNED: tl.constexpr,
    DIST: tl.constexpr, GRAD_T: tl.constexpr, PER_TENSOR: tl.constexpr, SHARD: tl.constexpr,
    ONE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """g = fma(A, g, inv sum_i B_i m_i) in place, with a run-time loop over directions unless ONE.

    BLOCK: of the transform that brings the sum back from where the noise is, or 0.
    """
    row, begin, end, fast = program_row(table, owner, tl.program_id(0))
    names = names_of(seed, step, entry(row, "TENSOR_ID"))
    grad = pointer(row, "GRAD", GRAD_T)
    alpha = pointer(row, "ALPHA", tl.float32)
    A, B0 = tl.load(coef + A_AT), tl.load(coef + B_AT)
    end = tl.where(tl.load(coef + KEEP_AT) != 0, begin, end)
    if PER_TENSOR:
        inv = reciprocal(tl.load(alpha) * r)
    else:
        length, chunks = entry(row, "SCALE_DIVISOR"), (fast >> 3).to(tl.uint32)
    layout = layout_of(row, SHARD)
    tiled = tiled_part(begin, end, fast)
    for start in tl.range(0, tiled, TILE):
        left = left_in_tile(start, tiled, TILE)
        g0, g1 = load_tile(grad, begin, start, left, TILE, ALIGNED)
        local = chunks_from(begin, start, TILE)
        chunk = chunk_numbers(local, layout, SHARD)
        if ONE:
            m0, m1 = tile_noise(chunk, names, 0, TILE, DIST)
            acc0, acc1 = m0 * B0, m1 * B0
        else:
            acc0, acc1 = tile_sum(g0, g1, chunk, names, coef + B_AT, n, TILE, DIST)
        if not PER_TENSOR:
            inv = per_pair(reciprocal(chunk_delta(alpha, local, length, r, chunks)), TILE)
        acc0, acc1 = product(acc0, inv, BLOCK != 0), product(acc1, inv, BLOCK != 0)
        acc0, acc1 = rotated_halves(acc0, acc1, BLOCK, TILE)
        store_tile(grad, begin, start, fma(g0, A, acc0), fma(g1, A, acc1), left, TILE, ALIGNED)
    SUB: tl.constexpr = TILE // 8  # without a transform: all elements of one with it go by tiles
    for start in tl.range(tl.maximum(begin, fast), end, SUB):
        j = start + tl.arange(0, SUB)
        mask = j < end
        acc = element_sum(element_numbers(j, row), names, coef + B_AT, n, DIST)
        inv_e = reciprocal(element_delta(alpha, j, row, r, mask))
        g = tl.load(grad + j, mask=mask, other=0.0).to(tl.float32)
        tl.store(grad + j, convert(fma(g, A, acc * inv_e), GRAD_T), mask=mask)
    if counters is not None:
        count_bad_alphas(counters, row, begin, PER_TENSOR)


def estimate_gradient_(
    grads: Tensors, alphas: Tensors, draw: Draw, mix: Mix, losses: Losses, r: int, block: int
) -> None:
    """Replace g by G: one launch for the coefficients, one for all tensors and directions."""
    device, n, counters = mix.norm.device, losses.plus.numel(), losses.counters
    names = named(draw)
    coef = torch.empty(B_AT.value + n, dtype=torch.float32, device=device)
    launch(coefficients_kernel, 1, device, coef, counters, *names, **loss_arguments(draw, mix, losses))
    if not grads:
        return
    p = plan(grads, grads=grads, alphas=alphas, tensor_ids=draw.tensor_ids, layouts=draw.layouts)
    launch(
        estimate_kernel, p.programs, device, p.table, p.owner, counters, *names, coef, n, float(r),
        TILE=TILE, ALIGNED=p.aligned, DIST=draw.distribution, GRAD_T=DTYPES[grads[0].dtype],
        PER_TENSOR=p.per_tensor, SHARD=p.shard, ONE=n == 1, BLOCK=block,
    )  # fmt: skip
