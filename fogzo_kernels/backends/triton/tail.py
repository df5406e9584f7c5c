"""The fused tail: estimate, optimizer step and the next Q(theta) in one pass (docs/contract.md, 4).

A table row has the quantized weight in PLUS and the master copy in MINUS. A tensor without an alpha is
not quantized: G = g, and no Q is written.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ...spec import grid as spec
from ...spec.call import Draw, Losses, Mix, Update
from ...spec.update import UpdateRule
from ..gpu.plans import bits, plan
from . import program
from .elements import convert, fma, product, quantized
from .hadamard import rotated
from .launch import (
    Config,
    Tensors,
    bits_or_device,
    config_of,
    draw_of,
    grid_of,
    host_or_device,
    launch,
    mix_of,
    noise_fields,
    rounded,
)
from .losses import (
    A_AT,
    B_AT,
    DECAY_AT,
    LOST_AT,
    ROOT_AT,
    SIZE_AT,
    SKIP_AT,
    count_bad_alphas,
    losses_of,
    write_coefficients,
)

TILE = 1024  # elements per loop iteration, which holds twice as many arrays as those of the other ops
REGISTERS = 96  # the most of a thread: ptxas, left alone, spills some to reach fewer


class Pass(NamedTuple):
    """What a program needs beside its elements."""

    latent: Any  # pointers
    grad: Any
    weight: Any  # the master copy, or else the latent
    first: Any  # the optimizer's state
    second: Any
    out: Any
    names: Any
    B: Any
    t: Any
    A: Any
    noisy: Any  # whether the directions count
    directions: Any  # 0 unless they do
    skip: Any  # whether the step is skipped
    size: Any  # float32; for SGD ``decay`` is keep
    decay: Any
    root: Any
    numbers: Any  # of the optimizer's rule, as numbers_of() gives them
    grid: Any


# ---- coefficients


@triton.jit
def float64_of(x):
    """An argument that is the address of a float64, or its bits: a float argument would be rounded."""
    if x.dtype.is_ptr():
        return tl.load(x)
    else:
        return x.to(tl.int64).to(tl.float64, bitcast=True)


@triton.jit(do_not_specialize=["draw", "losses", "optimizer"])
def update_coefficients_kernel(coef, counters, draw, mix, losses, optimizer, config: tl.constexpr):
    """One program."""
    write_coefficients(coef, counters, draw, mix, losses, config)
    lr, count, decay_rate, log_beta1, log_beta2, keep = optimizer
    RULE: tl.constexpr = config.variant
    rate, t = float64_of(lr), program.scalar(count).to(tl.int64)
    if RULE == "adamw":
        size = rate / (1.0 - tl.exp(t.to(tl.float64) * float64_of(log_beta1)))
        root = 1.0 / tl.sqrt(1.0 - tl.exp(t.to(tl.float64) * float64_of(log_beta2)))
        tl.store(coef + SIZE_AT, size.to(tl.float32))
        tl.store(coef + DECAY_AT, (1.0 - rate * float64_of(decay_rate)).to(tl.float32))
        tl.store(coef + ROOT_AT, root.to(tl.float32))
    elif RULE == "sgd" or RULE == "momentum" or RULE == "nesterov":
        tl.store(coef + SIZE_AT, rate.to(tl.float32))
        tl.store(coef + DECAY_AT, tl.where(t == 1, 1.0, float64_of(keep)).to(tl.float32))
    else:
        tl.static_assert(False, f"no code for rule {RULE}")


# ---- the pass


@triton.jit
def stepped(theta, G, first, second, s, config: tl.constexpr):
    """theta and its state after the step (contract section 4)."""
    RULE: tl.constexpr = config.variant
    first_weight, second_weight, second_decay, eps, weight_decay, momentum = s.numbers
    if RULE == "adamw":
        first = fma(G - first, first_weight, first)
        second = fma(G * second_weight, G, second * second_decay)
        ratio = tl.div_rn(first, fma(tl.sqrt_rn(second), s.root, eps))
        return fma(ratio, -s.size, theta * s.decay), first, second
    elif RULE == "sgd":
        return fma(fma(theta, weight_decay, G), -s.size, theta), first, second
    elif RULE == "momentum":
        first = fma(fma(theta, weight_decay, G), s.decay, first * momentum)
        return fma(first, -s.size, theta), first, second
    elif RULE == "nesterov":
        d = fma(theta, weight_decay, G)
        first = fma(d, s.decay, first * momentum)
        return fma(fma(first, momentum, d), -s.size, theta), first, second
    else:
        tl.static_assert(False, f"no code for rule {RULE}")


@triton.jit
def update(turn, p, s, config: tl.constexpr):
    """G, then the optimizer's step in place, then Q(theta)."""
    written = program.turn_if(s.skip == 0, turn, config)
    g, theta = program.load(s.grad, turn, config), program.load(s.weight, turn, config)
    m, v = theta, theta
    if config.states >= 1:
        m = program.load(s.first, turn, config)
    if config.states == 2:
        v = program.load(s.second, turn, config)
    total = program.noise_sum(g, turn, p, s.names, s.B, s.t, s.directions, config)
    scale = program.scale_of(turn, p, s.grid, config)
    total = product(total, scale.inv, config.block)
    total = rotated(total, config)
    G = tl.where(s.noisy, fma(g, s.A, total), g)
    new, m, v = stepped(theta, G, m, v, s, config)
    if config.out is not None:
        stored = theta
        if config.master:  # a skipped step leaves the latent, which may differ from its master
            stored = program.load(s.latent, program.turn_if(s.skip, turn, config), config)
        latent = tl.where(s.skip, stored, convert(new, config.latent).to(tl.float32))
        latent = rotated(latent, config)
        q = quantized(latent, scale, s.grid, config.out)
        program.store(s.out, program.turn_if(p.has_alpha, turn, config), q, config)
    program.store(s.weight, written, new, config)
    if config.master:
        program.store(s.latent, written, new, config)
    if config.states >= 1:
        program.store(s.first, written, m, config)
    if config.states == 2:
        program.store(s.second, written, v, config)


@triton.jit
def pass_of(p, t, draw, coef, n, numbers, grid, config: tl.constexpr):
    names = program.names_of(draw, program.entry(p.row, "TENSOR_ID"))
    latent, grad = program.pointer(p.row, "LATENT", config.latent), program.pointer(p.row, "GRAD", config.grad)
    first, second = program.pointer(p.row, "STATE_1", tl.float32), program.pointer(p.row, "STATE_2", tl.float32)
    weight, out = latent, latent
    if config.master:
        weight = program.pointer(p.row, "MINUS", tl.float32)
    if config.out is not None:
        out = program.pointer(p.row, "PLUS", config.out)
    noisy, skip = p.has_alpha & (tl.load(coef + LOST_AT) == 0), tl.load(coef + SKIP_AT) != 0
    A, directions = tl.where(noisy, tl.load(coef + A_AT), 1.0), tl.where(noisy, n, 0)
    size, decay, root = tl.load(coef + SIZE_AT), tl.load(coef + DECAY_AT), tl.load(coef + ROOT_AT)
    arrays = latent, grad, weight, first, second, out
    coefficients = coef + B_AT, t, A, noisy, directions, skip, size, decay, root
    return Pass(*arrays, names, *coefficients, numbers, grid)


@triton.jit(do_not_specialize=["draw", "n"])
def update_kernel(table, owner, factors, counters, draw, coef, n, grid, numbers, config: tl.constexpr):
    """G, then the optimizer's step in place, then Q(theta) into PLUS unless it has no dtype."""
    p = program.read(program.own_span(table, owner), grid.r, config, True)
    s = pass_of(p, program.factor_of(factors, owner, p.has_alpha), draw, coef, n, numbers, grid, config)
    for start in tl.range(0, p.tiled, config.tile):
        update(program.tile_at(p, start, config), p, s, config)
    # read again, so that no registers are kept over the loop
    p = program.read(program.own_span(table, owner), grid.r, config, True)
    s = pass_of(p, program.factor_of(factors, owner, p.has_alpha), draw, coef, n, numbers, grid, config)
    REST: tl.constexpr = program.for_elements(config)
    for start in tl.range(p.rest, p.end, config.tile // 8):
        update(program.elements_at(p, start), p, s, REST)
    if counters is not None:
        count_bad_alphas(counters, p, config)


# ---- host


def registers_of(block: int, aligned: bool) -> int:
    """Register limit per thread. Larger blocks of the transform and unaligned tensors need more."""
    if block:
        return 128 if block <= 256 else 255
    return REGISTERS if aligned else REGISTERS + 16


def optimizer_of(update: Update) -> tuple[Any, ...]:
    """The optimizer's part of the coefficients; all but the step count by bits, or on the device."""
    rule, count = update.rule, host_or_device(update.optimizer_step)
    logs = [bits(math.log(beta) if beta else -math.inf) for beta in (rule.beta1, rule.beta2)]
    return bits_or_device(update.lr), count, bits(rule.weight_decay), *logs, bits(1.0 - rule.dampening)


def numbers_of(rule: UpdateRule) -> tuple[float, ...]:
    """The numbers of the rule that a step of an element needs, float32."""
    weights = 1.0 - rule.beta1, 1.0 - rule.beta2, rule.beta2
    return tuple(map(rounded, (*weights, rule.eps, rule.weight_decay, rule.momentum)))


def estimate_update_(
    latents: Tensors, quantized: Tensors, grads: Tensors, alphas: Tensors, draw: Draw, mix: Mix,
    losses: Losses, grid: spec.Grid, update: Update, block: int,
) -> None:  # fmt: skip
    """G, the optimizer's step and Q(theta): one launch for the coefficients, one for all tensors."""
    device, n, masters = mix.norm.device, losses.directions, update.masters
    counters = losses.counters if n else None  # an op without directions does not count
    fields, drawn = noise_fields(draw), draw_of(draw)
    fields |= {"variant": update.rule.variant, "states": len(update.states)}
    coef = torch.empty(B_AT.value + n, dtype=torch.float32, device=device)
    scalars = drawn, mix_of(draw, mix), losses_of(losses, mix), optimizer_of(update)
    chosen = Config(guided=losses.guided, **fields)
    launch(update_coefficients_kernel, 1, device, coef, counters, *scalars, chosen)
    if not latents:
        return
    p = plan(
        latents, latents=latents, grads=grads, plus=quantized, minus=masters, alphas=alphas,
        states=update.states, draw=draw,
    )  # fmt: skip
    config = config_of(p, latents, grads, quantized, block, tile=TILE, master=bool(masters), **fields)
    args = mix.factors, counters, drawn, coef, n, grid_of(grid), numbers_of(update.rule), config
    launch(update_kernel, p.programs, device, p.table, p.owner, *args, maxnreg=registers_of(block, p.aligned))
