"""G in place of g (docs/contract.md, section 4)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...spec.call import Draw, Losses, Mix
from ..gpu.plans import plan
from . import program
from .elements import fma, product, reciprocal
from .hadamard import rotated
from .launch import Config, Tensors, config_of, draw_of, launch, mix_of, noise_fields
from .losses import A_AT, B_AT, LOST_AT, count_bad_alphas, losses_of, write_coefficients


@triton.jit(do_not_specialize=["draw", "losses"])
def coefficients_kernel(coef, counters, draw, mix, losses, config: tl.constexpr):
    """One program."""
    write_coefficients(coef, counters, draw, mix, losses, config)


@triton.jit
def write_estimate(grad, turn, p, names, coefficients, n, r, config: tl.constexpr):
    """g = fma(A, g, inv sum_i B_i t m_i), with a run-time loop over directions unless there is one.

    A transform brings the sum back from where the noise is.
    """
    A, B0, B, t = coefficients
    g = program.load(grad, turn, config)
    if config.one_direction:
        total = program.noise_of(program.places_of(turn, p, config), names, 0, config) * B0
    else:
        total = program.noise_sum(g, turn, p, names, B, t, n, config)
    total = product(total, reciprocal(program.delta_of(turn, p, r, config)), config.block)
    total = rotated(total, config)
    program.store(grad, turn, fma(g, A, total), config)


@triton.jit(do_not_specialize=["draw", "n"])
def estimate_kernel(table, owner, factors, counters, draw, coef, n, r, config: tl.constexpr):
    """G in place of g."""
    p = program.read(program.own_span(table, owner), r, config)
    names = program.names_of(draw, program.entry(p.row, "TENSOR_ID"))
    grad = program.pointer(p.row, "GRAD", config.grad)
    t = program.factor_of(factors, owner, True)
    coefficients = tl.load(coef + A_AT), tl.load(coef + B_AT) * t, coef + B_AT, t
    keep = tl.load(coef + LOST_AT) != 0
    for start in tl.range(0, tl.where(keep, 0, p.tiled), config.tile):
        write_estimate(grad, program.tile_at(p, start, config), p, names, coefficients, n, r, config)
    REST: tl.constexpr = program.for_elements(config)
    for start in tl.range(p.rest, tl.where(keep, p.begin, p.end), config.tile // 8):
        write_estimate(grad, program.elements_at(p, start), p, names, coefficients, n, r, REST)
    if counters is not None:
        count_bad_alphas(counters, p, config)


def estimate_gradient_(
    grads: Tensors, alphas: Tensors, draw: Draw, mix: Mix, losses: Losses, r: int, block: int
) -> None:
    """Replace g by G: one launch for the coefficients, one for all tensors and directions."""
    device, n, counters = mix.norm.device, losses.directions, losses.counters
    noise, drawn = noise_fields(draw), draw_of(draw)
    coef = torch.empty(B_AT.value + n, dtype=torch.float32, device=device)
    scalars = drawn, mix_of(draw, mix), losses_of(losses, mix)
    launch(coefficients_kernel, 1, device, coef, counters, *scalars, Config(guided=losses.guided, **noise))
    if not grads:
        return
    p = plan(grads, grads=grads, alphas=alphas, draw=draw)
    config = config_of(p, grads=grads, block=block, one_direction=n == 1, **noise)
    args = mix.factors, counters, drawn, coef, n, float(r), config
    launch(estimate_kernel, p.programs, device, p.table, p.owner, *args)
