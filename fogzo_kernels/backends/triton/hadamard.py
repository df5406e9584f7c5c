"""The Hadamard transform of blocks (docs/contract.md, section 4)."""

from __future__ import annotations

import triton
import triton.language as tl

from ...spec import hadamard as spec
from ..plans import plan
from .elements import fma, load_tile, store_tile
from .launch import DTYPES, TILE, Tensors, launch, rounded
from .tables import left_in_tile, pointer, program_row, tiled_part

#: By block, float32. A constexpr, whose value is part of a compiled kernel's key.
FACTORS = tl.constexpr({block: rounded(spec.factor(block)) for block in spec.BLOCKS})
REGISTERS = 128  # the most of a thread: ptxas, left alone, spills some to reach fewer
#: Consecutive elements of a tile that a warp holds: a chunk in each lane.
WARP = tl.constexpr(8 * 32)


@triton.jit
def butterflies(x, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """Each block of a tile [TILE]: a + b and a - b of elements that are h apart, h = 1, 2, 4, .., BLOCK / 2.

    A warp holds WARP consecutive elements. There each takes its partner as the sum of both, as integers, less
    itself: of two lanes' elements the compiler makes one shuffle, of two registers' nothing.
    """
    e = tl.arange(0, TILE)
    for k in tl.static_range(10):
        if 1 << k < BLOCK:
            if 1 << k < WARP:
                own = x.to(tl.int32, bitcast=True).reshape([TILE >> (k + 1), 2, 1 << k])
                both = tl.sum(own, 1, keep_dims=True)
                partner = (both - own).reshape([TILE]).to(tl.float32, bitcast=True)
                x = fma(x, tl.where(((e >> k) & 1) != 0, -1.0, 1.0), partner)
            else:
                a, b = tl.split(tl.permute(x.reshape([TILE >> (k + 1), 2, 1 << k]), (0, 2, 1)))
                x = tl.permute(tl.join(a + b, a - b), (0, 2, 1)).reshape([TILE])
    return x


@triton.constexpr_function
def factor_of(block):
    """What makes the transform of that block orthonormal."""
    return FACTORS.value[block]


@triton.jit
def rotated(x, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """H of each block of a tile [TILE]; x itself without a transform, BLOCK = 0."""
    if BLOCK:
        x = butterflies(x, BLOCK, TILE) * factor_of(BLOCK)
    return x


@triton.jit
def rotated_halves(even, odd, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """The same of a tile's even and odd elements."""
    if BLOCK:
        x = rotated(tl.join(even, odd).reshape([TILE]), BLOCK, TILE)
        even, odd = tl.split(x.reshape([TILE // 2, 2]))
    return even, odd


@triton.jit
def hadamard_kernel(
    table, owner, TILE: tl.constexpr, ALIGNED: tl.constexpr, LATENT_T: tl.constexpr, OUT_T: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """H LATENT into PLUS, which may be LATENT: each element is stored after all of its block are loaded.

    A program and its tiles begin where a block does, and all elements go by tiles.
    """
    row, begin, end, fast = program_row(table, owner, tl.program_id(0))
    latent, out = pointer(row, "LATENT", LATENT_T), pointer(row, "PLUS", OUT_T)
    tiled = tiled_part(begin, end, fast)
    for start in tl.range(0, tiled, TILE):
        left = left_in_tile(start, tiled, TILE)
        even, odd = load_tile(latent, begin, start, left, TILE, ALIGNED)
        even, odd = rotated_halves(even, odd, BLOCK, TILE)
        store_tile(out, begin, start, even, odd, left, TILE, ALIGNED)


def hadamard_(out: Tensors, tensors: Tensors, block: int) -> None:
    """Write the Hadamard transform of each block: one launch."""
    p = plan(tensors, latents=tensors, plus=out)
    launch(
        hadamard_kernel, p.programs, tensors[0].device, p.table, p.owner, TILE=TILE, ALIGNED=p.aligned,
        LATENT_T=DTYPES[tensors[0].dtype], OUT_T=DTYPES[out[0].dtype], BLOCK=block, maxnreg=REGISTERS,
    )  # fmt: skip
