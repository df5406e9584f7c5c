"""Triton on NVIDIA GPUs; on the CPU through Triton's interpreter (``TRITON_INTERPRET=1``).

Host side: one launch per op over all tensors, which a plan (fogzo_kernels/plans.py) names to the kernels.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...spec.call import Draw, Losses, Mix, Update
from ...spec.grid import Grid
from ...spec.noise import DISTRIBUTIONS
from ...spec.straight_through import StraightThrough
from ..plans import SPAN, plan
from . import kernels, tail
from .elements import M_FACTOR

TILE = 2048  # elements per loop iteration
UPDATE_TILE = 1024  # its loop holds twice as many arrays
NUM_WARPS = 4
#: The most of a thread where ptxas, left alone, spills some to reach fewer: the tail, and int8 outputs.
UPDATE_REGISTERS, CODES_REGISTERS = 96, 72

Tensors = Sequence[Tensor]
DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.int8: tl.int8,
}


def unavailable(device: torch.device) -> str | None:
    """None on a CUDA device, or on the CPU in Triton's interpreter."""
    if triton.knobs.runtime.interpret:
        return None if device.type == "cpu" else "TRITON_INTERPRET=1 runs on the CPU only"
    if device.type != "cuda":
        return "it needs a CUDA GPU, or TRITON_INTERPRET=1 for the CPU"
    return None


# ---- scalars


def host_or_device(t: Tensor) -> Tensor | int:
    """A device tensor is read by the kernel; a CPU one by the host, without a sync."""
    return int(t) if t.device.type == "cpu" and not triton.knobs.runtime.interpret else t


def bits_or_device(t: Tensor) -> Tensor | int:
    """Likewise for a float64, which the host passes by its bits: a float argument would be rounded."""
    found = host_or_device(t.view(torch.int64))
    return found if isinstance(found, int) else t


def bits(x: float) -> int:
    """The bits of a float64, as a signed integer."""
    found: int = struct.unpack("<q", struct.pack("<d", x))[0]
    return found


def log_bits(x: float) -> int:
    return bits(math.log(x) if x else -math.inf)


def mixing(one_minus_beta: Tensor, distribution: str) -> tuple[dict[str, object], float]:
    """Kernel arguments for sqrt(beta) and sqrt(1 - beta) C, and C over the kernel's factor of m."""
    scale = DISTRIBUTIONS[distribution] / M_FACTOR[distribution]
    if one_minus_beta.device.type != "cpu":
        return {"one_minus_beta": one_minus_beta, "sqrt_beta": 0.0, "noise_scale": 0.0}, scale
    omb = float(one_minus_beta)
    return {
        "one_minus_beta": None,
        "sqrt_beta": rounded(math.sqrt(1.0 - omb)),
        "noise_scale": rounded(math.sqrt(omb) * scale),
    }, scale


def rounded(x: float) -> float:
    """The nearest float32."""
    return torch.tensor(x, dtype=torch.float32).item()


def launch(kernel, programs: int, device: torch.device, *args, **kwargs) -> None:
    """Launch on the tensors' device and its current stream; nothing for no programs."""
    if programs:
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            kernel[(programs,)](*args, **kwargs, num_warps=NUM_WARPS)


# ---- ops (docs/contract.md)


def noise(numel: int, draw: Draw, direction: int, device: torch.device) -> Tensor:
    """u = C m, float32, shape (numel,)."""
    out = torch.empty(numel, device=device)
    p = plan([out], plus=[out], tensor_ids=draw.tensor_ids, layouts=draw.layouts)
    scale = rounded(DISTRIBUTIONS[draw.distribution] / M_FACTOR[draw.distribution])
    launch(
        kernels.noise_kernel, p.programs, device, p.table, p.owner, host_or_device(draw.seed),
        host_or_device(draw.step), direction, scale, SPAN=SPAN, TILE=TILE, DIST=draw.distribution,
        SHARD=p.shard,
    )  # fmt: skip
    return out


def guide_sumsq(grads: Tensors, alphas: Tensors, r: int, root: bool) -> Tensor:
    """Sum of the squares of delta * g, float64, or its root, float32: two launches, no atomics."""
    device = grads[0].device
    p = plan(grads, grads=grads, alphas=alphas)
    partial = torch.empty(max(p.programs, 1), dtype=torch.float64, device=device)
    out = torch.empty((), dtype=torch.float32 if root else torch.float64, device=device)
    launch(
        kernels.sumsq_kernel, p.programs, device, p.table, p.owner, partial, float(r), SPAN=SPAN,
        TILE=TILE, GRAD_T=DTYPES[grads[0].dtype], PER_TENSOR=p.per_tensor,
    )  # fmt: skip
    launch(kernels.sum_kernel, 1, device, partial, p.programs, out, BLOCK=1024, ROOT=root)
    return out


def perturb_quantize_(
    plus: Tensors, minus: Tensors, latents: Tensors, grads: Tensors, alphas: Tensors, draw: Draw, mix: Mix,
    direction: int, grid: Grid,
) -> None:  # fmt: skip
    """Write Q(w + eps v) and Q(w - eps v): one launch, one pass."""
    if not latents:
        return
    p = plan(
        latents, latents=latents, grads=grads, plus=plus, minus=minus, alphas=alphas,
        tensor_ids=draw.tensor_ids, layouts=draw.layouts,
    )  # fmt: skip
    mixed, scale = mixing(mix.one_minus_beta, draw.distribution)
    out = (plus or minus)[0].dtype
    launch(
        kernels.perturb_kernel, p.programs, mix.norm.device, p.table, p.owner, host_or_device(draw.seed),
        host_or_device(draw.step), norm=mix.norm, direction=direction, **mixed, eps=rounded(mix.epsilon),
        offset=grid.offset, qmin=float(grid.qmin), qmax=float(grid.qmax), r=float(grid.r),
        SPAN=SPAN, TILE=TILE, DIST=draw.distribution, NOISE_SCALE=scale,
        LATENT_T=DTYPES[latents[0].dtype], GRAD_T=DTYPES[grads[0].dtype],
        OUT_T=DTYPES[out], WRITE_PLUS=bool(plus), WRITE_MINUS=bool(minus), PER_TENSOR=p.per_tensor,
        SHARD=p.shard, maxnreg=CODES_REGISTERS if out == torch.int8 else None,
    )  # fmt: skip


def estimate_gradient_(grads: Tensors, alphas: Tensors, draw: Draw, mix: Mix, losses: Losses, r: int) -> None:
    """Replace g by G: one launch for the coefficients, one for all tensors and directions."""
    device, n = mix.norm.device, losses.plus.numel()
    p = plan(grads, grads=grads, alphas=alphas, tensor_ids=draw.tensor_ids, layouts=draw.layouts)
    mixed, scale = mixing(mix.one_minus_beta, draw.distribution)
    names = host_or_device(draw.seed), host_or_device(draw.step)
    coef = torch.empty(2 + n, device=device)
    counter = losses.counters
    eps = rounded(mix.epsilon)
    launch(
        kernels.coefficients_kernel, 1, device, coef, counter, *names, norm=mix.norm,
        losses_plus=losses.plus, losses_minus=losses.minus, n=n, **mixed,
        half_inv_eps=rounded(0.5 / eps) if eps else math.inf, NOISE_SCALE=scale,
    )  # fmt: skip
    if not grads:
        return
    launch(
        kernels.estimate_kernel, p.programs, device, p.table, p.owner, counter, *names, coef, n,
        float(r), SPAN=SPAN, TILE=TILE, DIST=draw.distribution, GRAD_T=DTYPES[grads[0].dtype],
        PER_TENSOR=p.per_tensor, SHARD=p.shard, ONE=n == 1,
    )  # fmt: skip


def estimate_update_(
    latents: Tensors, quantized: Tensors, grads: Tensors, alphas: Tensors, draw: Draw, mix: Mix,
    losses: Losses, grid: Grid, update: Update,
) -> None:  # fmt: skip
    """G, the optimizer's step and Q(theta): one launch for the coefficients, one for all tensors."""
    device, n, rule = mix.norm.device, losses.plus.numel(), update.rule
    mixed, scale = mixing(mix.one_minus_beta, draw.distribution)
    names = host_or_device(draw.seed), host_or_device(draw.step)
    coef = torch.empty(tail.B_AT.value + n, device=device)
    counter = losses.counters
    eps = rounded(mix.epsilon)
    launch(
        tail.update_coefficients_kernel, 1, device, coef, counter if n else None, *names, norm=mix.norm,
        losses_plus=losses.plus, losses_minus=losses.minus, n=n, **mixed,
        half_inv_eps=rounded(0.5 / eps) if eps else math.inf, lr=bits_or_device(update.lr),
        count=host_or_device(update.optimizer_step), weight_decay=bits(rule.weight_decay),
        log_beta1=log_bits(rule.beta1), log_beta2=log_bits(rule.beta2), keep=bits(1.0 - rule.dampening),
        NOISE_SCALE=scale, RULE=rule.variant,
    )  # fmt: skip
    if not latents:
        return
    first, second = (*update.states, [], [])[:2]
    p = plan(
        latents, latents=latents, grads=grads, plus=quantized, minus=update.masters, alphas=alphas,
        first=first, second=second, tensor_ids=draw.tensor_ids, layouts=draw.layouts,
    )  # fmt: skip
    launch(
        tail.update_kernel, p.programs, device, p.table, p.owner, counter if n else None, *names, coef,
        n, grid.offset, float(grid.qmin), float(grid.qmax), float(grid.r), rounded(1.0 - rule.beta1),
        rounded(1.0 - rule.beta2), rounded(rule.beta2), rounded(rule.eps), rounded(rule.weight_decay),
        rounded(rule.momentum), SPAN=SPAN, TILE=UPDATE_TILE, DIST=draw.distribution,
        LATENT_T=DTYPES[latents[0].dtype], GRAD_T=DTYPES[grads[0].dtype],
        OUT_T=DTYPES[quantized[0].dtype] if quantized else None, MASTER=bool(update.masters), RULE=rule.variant,
        PER_TENSOR=p.per_tensor, SHARD=p.shard, maxnreg=UPDATE_REGISTERS,
    )  # fmt: skip


def quantize_(out: Tensors, latents: Tensors, alphas: Tensors, grid: Grid) -> None:
    """Write Q(theta): one launch."""
    _quantize(out, (), latents, alphas, grid, None)


def straight_through_backward_(
    out: Tensors, grads: Tensors, latents: Tensors, alphas: Tensors, grid: Grid,
    straight_through: StraightThrough,
) -> None:  # fmt: skip
    """Write g * h'(theta): one launch."""
    clipped = straight_through.kind == "identity" and straight_through.clip
    kind = "identity_clipped" if clipped else straight_through.kind
    _quantize(out, grads, latents, alphas, grid, kind)


def _quantize(
    out: Tensors, grads: Tensors, latents: Tensors, alphas: Tensors, grid: Grid, kind: str | None
) -> None:
    p = plan(latents, latents=latents, grads=grads, plus=out, alphas=alphas)
    launch(
        kernels.quantize_kernel, p.programs, latents[0].device, p.table, p.owner, grid.offset,
        float(grid.qmin), float(grid.qmax), float(grid.r), SPAN=SPAN, TILE=TILE,
        LATENT_T=DTYPES[latents[0].dtype], GRAD_T=DTYPES[(grads or latents)[0].dtype],
        OUT_T=DTYPES[out[0].dtype], KIND=kind, PER_TENSOR=p.per_tensor,
    )  # fmt: skip
