"""The Hadamard transform of blocks (docs/contract.md, section 4)."""

from __future__ import annotations

import triton
import triton.language as tl

from ...spec import hadamard as spec
from ..plans import SPAN, plan
from .elements import convert, load_tile, store_tile
from .launch import DTYPES, TILE, Tensors, launch, rounded
from .tables import left_in_tile, pointer, program_row, tile_at, tiled_part


@triton.jit
def butterflies(x, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """Each block of a tile [TILE]: a + b and a - b of elements that are h apart, h = 1, 2, 4, .., BLOCK / 2."""
    for k in tl.static_range(10):
        if 1 << k < BLOCK:
            pairs = tl.permute(x.reshape([TILE >> (k + 1), 2, 1 << k]), (0, 2, 1))
            a, b = tl.split(pairs)
            x = tl.permute(tl.join(a + b, a - b), (0, 2, 1)).reshape([TILE])
    return x


@triton.jit
def hadamard_kernel(
    table, owner, factor, SPAN: tl.constexpr, TILE: tl.constexpr, LATENT_T: tl.constexpr,
    OUT_T: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """H LATENT into PLUS, which may be LATENT: each element is stored after all of its block are loaded.

    A program and its tiles begin where a block does. A tensor is aligned, and goes by tiles, or it is not, and
    goes the same way by accesses of one element.
    """
    row, begin, end, fast = program_row(table, owner, SPAN)
    latent, out = pointer(row, "LATENT", LATENT_T), pointer(row, "PLUS", OUT_T)
    tiled = tiled_part(begin, end, fast)
    for start in tl.range(0, tiled, TILE):
        left = left_in_tile(start, tiled, TILE)
        even, odd = load_tile(tile_at(latent, begin, start), left, TILE)
        x = butterflies(tl.join(even, odd).reshape([TILE]), BLOCK, TILE) * factor
        even, odd = tl.split(x.reshape([TILE // 2, 2]))
        store_tile(tile_at(out, begin, start), even, odd, left, TILE)
    for start in tl.range(tl.maximum(begin, fast), end, TILE):
        j = start + tl.arange(0, TILE)
        x = tl.load(latent + j, mask=j < end, other=0.0).to(tl.float32)
        x = butterflies(x, BLOCK, TILE) * factor
        tl.store(out + j, convert(x, OUT_T), mask=j < end)


def hadamard_(out: Tensors, tensors: Tensors, block: int) -> None:
    """Write the Hadamard transform of each block: one launch."""
    p = plan(tensors, latents=tensors, plus=out)
    launch(
        hadamard_kernel, p.programs, tensors[0].device, p.table, p.owner, rounded(spec.factor(block)),
        SPAN=SPAN, TILE=TILE, LATENT_T=DTYPES[tensors[0].dtype], OUT_T=DTYPES[out[0].dtype], BLOCK=block,
    )  # fmt: skip
