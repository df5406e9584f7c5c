"""u = C m of one tensor (docs/contract.md, section 2)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...spec.call import Draw
from ..gpu.plans import plan
from . import program
from .launch import config_of, draw_of, launch, noise_scale, rounded


@triton.jit
def write_noise(out, turn, p, names, direction, scale, config: tl.constexpr):
    m = program.noise_of(program.places_of(turn, p, config), names, direction, config)
    program.store(out, turn, m * scale, config)


@triton.jit(do_not_specialize=["draw", "direction"])
def noise_kernel(table, owner, draw, direction, scale, config: tl.constexpr):
    """u = C m into PLUS, float32."""
    p = program.read(program.own_span(table, owner), None, config)
    names = program.names_of(draw, program.entry(p.row, "TENSOR_ID"))
    out = program.pointer(p.row, "PLUS", tl.float32)
    for start in tl.range(0, p.tiled, config.tile):
        write_noise(out, program.tile_at(p, start, config), p, names, direction, scale, config)
    REST: tl.constexpr = program.for_elements(config)
    for start in tl.range(p.rest, p.end, config.tile // 8):
        write_noise(out, program.elements_at(p, start), p, names, direction, scale, REST)


def noise(numel: int, draw: Draw, direction: int, device: torch.device) -> Tensor:
    """u = C m, float32, shape (numel,)."""
    out = torch.empty(numel, dtype=torch.float32, device=device)
    p = plan([out], plus=[out], draw=draw)
    config = config_of(p, distribution=draw.distribution)
    scale = rounded(noise_scale(draw.distribution))
    launch(noise_kernel, p.programs, device, p.table, p.owner, draw_of(draw), direction, scale, config)
    return out
