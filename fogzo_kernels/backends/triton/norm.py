"""N of the guide: the norm of delta * g over all tensors (docs/contract.md, section 4)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..gpu.plans import plan
from . import program
from .launch import NUM_WARPS, Tensors, config_of, launch

SUM_BLOCK, SUM_WARPS = 8192, 16  # of the program that adds what the others leave
TENSOR_BLOCK = 1024  # of one that adds a tensor's
REGISTERS = 64  # the most of a thread: ptxas, left alone, computes addresses anew to take fewer


@triton.jit
def sumsq_kernel(table, owner, partial, r, config: tl.constexpr):
    """Sum of (delta g)^2 of a program's elements: 8 squares in float32, the rest in float64."""
    p = program.read(program.own_span(table, owner), r, config)
    grad = program.pointer(p.row, "GRAD", config.grad)
    CHUNKS: tl.constexpr = config.tile // 8
    acc = tl.zeros([CHUNKS], tl.float64)
    for start in tl.range(0, p.tiled, config.tile):
        turn = program.tile_at(p, start, config)
        h = program.load(grad, turn, config, 0.0) * program.delta_of(turn, p, r, config)
        h = h.reshape([CHUNKS, 8])
        acc += tl.sum(h * h, axis=1).to(tl.float64)
    rest = tl.zeros([CHUNKS], tl.float64)
    REST: tl.constexpr = program.for_elements(config)
    for start in tl.range(p.rest, p.end, CHUNKS):
        turn = program.elements_at(p, start)
        h = (program.load(grad, turn, REST) * program.delta_of(turn, p, r, REST)).to(tl.float64)
        rest += h * h
    tl.store(partial + tl.program_id(0), tl.sum(acc, 0) + tl.sum(rest, 0))


@triton.jit(do_not_specialize=["count"])
def sum_kernel(table, partial, count, out, BLOCK: tl.constexpr, ROOT: tl.constexpr):
    """A program adds the partial sums in a fixed order: the same bits every run. ROOT: the norm.

    There is one program, or with a table one for each tensor, which adds that tensor's. BLOCK sums are on their
    way at once: what a single program can fetch is bound by how long it waits.
    """
    if table is not None:
        row = table + tl.program_id(0).to(tl.int64) * program.WIDTH
        span, first = program.entry(row, "SPAN"), program.entry(row, "FIRST")
        count = ((program.entry(row, "NUMEL") + span - 1) // span).to(tl.int32)
        partial += first
        out += tl.program_id(0)
    acc = tl.zeros([BLOCK], tl.float64)
    for start in tl.range(0, count, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        acc += tl.load(partial + offs, mask=offs < count, other=0.0)
    total = tl.sum(acc, 0)
    if ROOT:
        total = tl.sqrt(total).to(tl.float32)
    tl.store(out, total)


def guide_sumsq(grads: Tensors, alphas: Tensors, r: int, root: bool, per_tensor: bool) -> Tensor:
    """Sum of the squares of delta * g, float64, or its root, float32: two launches, no atomics."""
    device = grads[0].device
    p = plan(grads, grads=grads, alphas=alphas)
    partial = torch.empty(max(p.programs, 1), dtype=torch.float64, device=device)
    dtype = torch.float32 if root else torch.float64
    out = torch.empty(len(grads) if per_tensor else (), dtype=dtype, device=device)
    args = p.table, p.owner, partial, float(r), config_of(p, grads=grads)
    launch(sumsq_kernel, p.programs, device, *args, maxnreg=REGISTERS)
    table, sums, block, warps = None, 1, SUM_BLOCK, SUM_WARPS
    if per_tensor:
        table, sums, block, warps = p.table, len(grads), TENSOR_BLOCK, NUM_WARPS
    launch(sum_kernel, sums, device, table, partial, p.programs, out, BLOCK=block, ROOT=root, num_warps=warps)
    return out
