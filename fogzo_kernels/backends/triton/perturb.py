"""Q(w + eps v) and Q(w - eps v): the probes' weights (docs/contract.md, section 4)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ...spec import grid as spec
from ...spec.call import Draw, Mix
from ..gpu.plans import plan
from . import program
from .elements import direction_sign, fma, output_of, position
from .hadamard import rotated
from .launch import Tensors, config_of, draw_of, grid_of, launch, mix_of, noise_fields, rounded

#: Register limit per thread, by the outputs' dtype. Without it ptxas aims lower and spills.
REGISTERS = {torch.int8: 96}


class Pass(NamedTuple):
    """What a program needs beside its elements."""

    latent: Any  # pointers
    grad: Any
    plus: Any
    minus: Any
    names: Any
    direction: Any
    a: Any  # v = fma(a delta, g, b m)
    b: Any
    eps: Any
    grid: Any


@triton.jit
def probe(theta, g, m, eps, s, scale, config: tl.constexpr):
    """Q(w + eps v), v = fma(a delta, g, b m).

    With a transform v = b m, and theta moves along g by eps a delta^2 before it is rotated.
    """
    gam = s.a * scale.delta
    if config.block:
        theta = rotated(fma(g, eps * gam * scale.delta, theta), config)
        v = m * s.b
    else:
        v = fma(g, gam, m * s.b)
    return output_of(fma(v, eps, position(theta, scale, s.grid)), scale, s.grid, config.out)


@triton.jit
def write_probes(turn, p, s, config: tl.constexpr):
    """Q(w + eps v) into PLUS and Q(w - eps v) into MINUS."""
    g, theta = program.load(s.grad, turn, config), program.load(s.latent, turn, config)
    m = program.noise_of(program.places_of(turn, p, config), s.names, s.direction, config)
    scale = program.scale_of(turn, p, s.grid, config)
    if config.plus:
        program.store(s.plus, turn, probe(theta, g, m, s.eps, s, scale, config), config)
    if config.minus:
        program.store(s.minus, turn, probe(theta, g, m, -s.eps, s, scale, config), config)


@triton.jit(do_not_specialize=["draw", "direction"])
def perturb_kernel(table, owner, factors, draw, mix, direction, eps, grid, config: tl.constexpr):
    """Both probes, or one of them."""
    row, begin, end = program.own_span(table, owner)
    names = program.names_of(draw, program.entry(row, "TENSOR_ID"))
    sqrt_beta, noise_scale = program.mixing(mix, config)
    b = noise_scale * program.factor_of(factors, owner, True)
    a = program.guide_scale(mix[0], sqrt_beta, direction_sign(names, direction))
    latent, grad = program.pointer(row, "LATENT", config.latent), program.pointer(row, "GRAD", config.grad)
    plus, minus = program.pointer(row, "PLUS", config.out), program.pointer(row, "MINUS", config.out)
    p = program.read((row, begin, end), grid.r, config)
    s = Pass(latent, grad, plus, minus, names, direction, a, b, eps, grid)
    for start in tl.range(0, p.tiled, config.tile):
        write_probes(program.tile_at(p, start, config), p, s, config)
    # read again, so that no registers are kept over the loop
    p = program.read(program.own_span(table, owner), grid.r, config)
    REST: tl.constexpr = program.for_elements(config)
    for start in tl.range(p.rest, p.end, config.tile // 8):
        write_probes(program.elements_at(p, start), p, s, REST)


def registers_of(out: torch.dtype, block: int) -> int | None:
    """Register limit per thread. Larger blocks of the transform need more."""
    return (128 if block <= 256 else 200) if block else REGISTERS.get(out)


def perturb_quantize_(
    plus: Tensors, minus: Tensors, latents: Tensors, grads: Tensors, alphas: Tensors, draw: Draw, mix: Mix,
    direction: int, grid: spec.Grid, block: int,
) -> None:  # fmt: skip
    """Write Q(w + eps v) and Q(w - eps v): one launch, one pass."""
    if not latents:
        return
    p = plan(latents, latents=latents, grads=grads, plus=plus, minus=minus, alphas=alphas, draw=draw)
    out = plus or minus
    probes = {"plus": bool(plus), "minus": bool(minus)}
    config = config_of(p, latents, grads, out, block, **probes, **noise_fields(draw))
    scalars = draw_of(draw), mix_of(draw, mix), direction, rounded(mix.epsilon), grid_of(grid)
    registers = registers_of(out[0].dtype, block)
    args = p.table, p.owner, mix.factors, *scalars, config
    launch(perturb_kernel, p.programs, mix.norm.device, *args, maxnreg=registers)
