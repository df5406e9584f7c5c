"""N of the guide: the norm of delta * g over all tensors (docs/contract.md, section 4)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..plans import plan
from .elements import load_tile
from .launch import DTYPES, TILE, Tensors, launch
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

SUM_BLOCK, SUM_WARPS = 8192, 16  # of the program that adds what the others leave


@triton.jit
def sumsq_kernel(
    table, owner, partial, r, TILE: tl.constexpr, ALIGNED: tl.constexpr, GRAD_T: tl.constexpr,
    PER_TENSOR: tl.constexpr,
):  # fmt: skip
    """Sum of (delta g)^2 of a program's elements: 8 squares in float32, the rest in float64."""
    row, begin, end, fast = program_row(table, owner, tl.program_id(0))
    grad = pointer(row, "GRAD", GRAD_T)
    alpha = pointer(row, "ALPHA", tl.float32)
    if PER_TENSOR:
        delta = tl.load(alpha) * r
    else:
        length, chunks = entry(row, "SCALE_DIVISOR"), (fast >> 3).to(tl.uint32)
    acc = tl.zeros([TILE // 8], tl.float64)
    tiled = tiled_part(begin, end, fast)
    for start in tl.range(0, tiled, TILE):
        left = left_in_tile(start, tiled, TILE)
        g0, g1 = load_tile(grad, begin, start, left, TILE, ALIGNED, 0.0)
        if not PER_TENSOR:
            delta = chunk_delta(alpha, chunks_from(begin, start, TILE), length, r, chunks)[:, None]
        h = tl.join(g0, g1).reshape([TILE // 8, 8]) * delta
        acc += tl.sum(h * h, axis=1).to(tl.float64)
    SUB: tl.constexpr = TILE // 8
    tail = tl.zeros([SUB], tl.float64)
    for start in tl.range(tl.maximum(begin, fast), end, SUB):
        j = start + tl.arange(0, SUB)
        g = tl.load(grad + j, mask=j < end, other=0.0).to(tl.float32)
        h = (g * element_delta(alpha, j, row, r, j < end)).to(tl.float64)
        tail += h * h
    tl.store(partial + tl.program_id(0), tl.sum(acc, 0) + tl.sum(tail, 0))


@triton.jit(do_not_specialize=["count"])
def sum_kernel(partial, count, out, BLOCK: tl.constexpr, ROOT: tl.constexpr):
    """One program adds the partial sums in a fixed order: the same bits every run. ROOT: the norm.

    BLOCK of them are on their way at once: what a single program can fetch is bound by how long it waits.
    """
    acc = tl.zeros([BLOCK], tl.float64)
    for start in tl.range(0, count, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        acc += tl.load(partial + offs, mask=offs < count, other=0.0)
    total = tl.sum(acc, 0)
    if ROOT:
        total = tl.sqrt(total).to(tl.float32)
    tl.store(out, total)


def guide_sumsq(grads: Tensors, alphas: Tensors, r: int, root: bool) -> Tensor:
    """Sum of the squares of delta * g, float64, or its root, float32: two launches, no atomics."""
    device = grads[0].device
    p = plan(grads, grads=grads, alphas=alphas)
    partial = torch.empty(max(p.programs, 1), dtype=torch.float64, device=device)
    out = torch.empty((), dtype=torch.float32 if root else torch.float64, device=device)
    launch(
        sumsq_kernel, p.programs, device, p.table, p.owner, partial, float(r), TILE=TILE, ALIGNED=p.aligned,
        GRAD_T=DTYPES[grads[0].dtype], PER_TENSOR=p.per_tensor,
    )  # fmt: skip
    launch(sum_kernel, 1, device, partial, p.programs, out, BLOCK=SUM_BLOCK, ROOT=root, num_warps=SUM_WARPS)
    return out
