"""The Hadamard transform of blocks (docs/contract.md, section 4)."""

from __future__ import annotations

import triton
import triton.language as tl

from ..gpu.plans import plan
from . import program
from .elements import fma
from .launch import Tensors, config_of, launch

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


@triton.jit
def rotated(x, config: tl.constexpr):
    """H of each block of a tile; x itself without a transform."""
    if config.block:
        x = butterflies(x, config.block, config.tile) * config.block_factor
    return x


@triton.jit
def hadamard_kernel(table, owner, config: tl.constexpr):
    """H LATENT into PLUS, which may be LATENT: each element is stored after all of its block are loaded.

    A program and its tiles begin where a block does, and all elements go by tiles.
    """
    p = program.read(program.own_span(table, owner), None, config)
    latent, out = program.pointer(p.row, "LATENT", config.latent), program.pointer(p.row, "PLUS", config.out)
    for start in tl.range(0, p.tiled, config.tile):
        turn = program.tile_at(p, start, config)
        program.store(out, turn, rotated(program.load(latent, turn, config), config), config)


def hadamard_(out: Tensors, tensors: Tensors, block: int) -> None:
    """Write the Hadamard transform of each block: one launch."""
    p = plan(tensors, latents=tensors, plus=out)
    config, device = config_of(p, tensors, out=out, block=block), tensors[0].device
    launch(hadamard_kernel, p.programs, device, p.table, p.owner, config, maxnreg=REGISTERS)
