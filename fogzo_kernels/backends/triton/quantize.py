"""Q(theta), and the straight-through derivative (docs/contract.md, sections 1 and 3)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...spec import grid as spec
from ...spec.straight_through import StraightThrough
from ..gpu.plans import Plan, plan
from . import program
from .elements import derivative_of, product, quantized
from .hadamard import rotated
from .launch import IN_TABLE, Config, Given, Tensors, config_of, grid_of, launch


@triton.jit
def write_quantized(latent, grad, out, turn, p, grid, config: tl.constexpr):
    """Q(theta), or g h'(theta). With a transform Q(x), or H(g h'(x)), of x = H(theta)."""
    theta = program.load(latent, turn, config)
    theta = rotated(theta, config)
    scale = program.scale_of(turn, p, grid, config)
    if config.variant is None:
        x = quantized(theta, scale, grid, config.out)
    else:
        g = program.load(grad, turn, config)
        x = product(g, derivative_of(theta, scale, grid, config), config.block)
        x = rotated(x, config)
    program.store(out, turn, x, config)


@triton.jit(do_not_specialize=["given"])
def quantize_kernel(table, owner, given, grid, config: tl.constexpr):
    """Without a variant Q(theta) into PLUS; else g h'(theta) into PLUS, which may be GRAD.

    ``given``: see :data:`launch.Given`.
    """
    p = program.read(program.own_span(table, owner), grid.r, config)
    latent = program.pointer(p.row, "LATENT", config.latent)
    grad = program.pointer_or(given[0], p.row, "GRAD", config.grad)
    out = program.pointer_or(given[1], p.row, "PLUS", config.out)
    for start in tl.range(0, p.tiled, config.tile):
        write_quantized(latent, grad, out, program.tile_at(p, start, config), p, grid, config)
    REST: tl.constexpr = program.for_elements(config)
    for start in tl.range(p.rest, p.end, config.tile // 8):
        write_quantized(latent, grad, out, program.elements_at(p, start), p, grid, REST)


def launch_quantize(
    p: Plan, device: torch.device, grid: spec.Grid, config: Config, given: Given = IN_TABLE
) -> None:
    """Launch the kernel of a plan."""
    launch(quantize_kernel, p.programs, device, p.table, p.owner, given, grid_of(grid), config)


def quantize_(out: Tensors, latents: Tensors, alphas: Tensors, grid: spec.Grid, block: int) -> None:
    """Write Q(theta): one launch."""
    p = plan(latents, latents=latents, plus=out, alphas=alphas)
    launch_quantize(p, latents[0].device, grid, config_of(p, latents, latents, out, block))


def straight_through_backward_(
    out: Tensors, grads: Tensors, latents: Tensors, alphas: Tensors, grid: spec.Grid,
    straight_through: StraightThrough, block: int,
) -> None:  # fmt: skip
    """Write g * h'(theta): one launch."""
    p = plan(latents, latents=latents, grads=grads, plus=out, alphas=alphas)
    config = config_of(p, latents, grads, out, block, variant=straight_through.variant)
    launch_quantize(p, latents[0].device, grid, config)
