"""u = C m of one tensor (docs/contract.md, section 2)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...spec.call import Draw
from ..plans import plan
from .elements import element_noise, store_tile, tile_noise
from .launch import TILE, launch, named, noise_scale, rounded
from .tables import (
    chunk_numbers,
    chunks_from,
    element_numbers,
    entry,
    layout_of,
    left_in_tile,
    names_of,
    pointer,
    program_row,
    tiled_part,
)


@triton.jit(do_not_specialize=["seed", "step", "direction"])
def noise_kernel(
    table, owner, seed, step, direction, scale, TILE: tl.constexpr, ALIGNED: tl.constexpr,
    DIST: tl.constexpr, SHARD: tl.constexpr,
):  # fmt: skip
    """u = C m into PLUS, float32."""
    row, begin, end, fast = program_row(table, owner, tl.program_id(0))
    names = names_of(seed, step, entry(row, "TENSOR_ID"))
    out = pointer(row, "PLUS", tl.float32)
    layout = layout_of(row, SHARD)
    tiled = tiled_part(begin, end, fast)
    for start in tl.range(0, tiled, TILE):
        left = left_in_tile(start, tiled, TILE)
        chunk = chunk_numbers(chunks_from(begin, start, TILE), layout, SHARD)
        m0, m1 = tile_noise(chunk, names, direction, TILE, DIST)
        store_tile(out, begin, start, m0 * scale, m1 * scale, left, TILE, ALIGNED)
    SUB: tl.constexpr = TILE // 8
    for start in tl.range(tl.maximum(begin, fast), end, SUB):
        j = start + tl.arange(0, SUB)
        m = element_noise(element_numbers(j, row), names, direction, DIST)
        tl.store(out + j, m * scale, mask=j < end)


def noise(numel: int, draw: Draw, direction: int, device: torch.device) -> Tensor:
    """u = C m, float32, shape (numel,)."""
    out = torch.empty(numel, dtype=torch.float32, device=device)
    p = plan([out], plus=[out], tensor_ids=draw.tensor_ids, layouts=draw.layouts)
    launch(
        noise_kernel, p.programs, device, p.table, p.owner, *named(draw), direction, rounded(noise_scale(draw)),
        TILE=TILE, ALIGNED=p.aligned, DIST=draw.distribution, SHARD=p.shard,
    )  # fmt: skip
    return out
