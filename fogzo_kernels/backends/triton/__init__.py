"""Triton on NVIDIA GPUs; on the CPU through Triton's interpreter (``TRITON_INTERPRET=1``).

Host side: a table of the tensors' addresses, built once and kept while they stay, and one launch
per op over all tensors.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...grid import Grid
from ...noise import DISTRIBUTIONS, Layout
from ...straight_through import StraightThrough
from . import kernels
from .elements import M_FACTOR

SPAN = 16384  # elements per program
TILE = 2048  # elements per loop iteration
NUM_WARPS = 4
PLANS_KEPT = 256

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


# ---- plans: which program works where


class Plan(NamedTuple):
    table: Tensor  # int64, (tensors, len(COLUMNS))
    owner: Tensor  # int32, (programs,): the row of each program
    programs: int
    per_tensor: bool  # every alpha has one element
    shard: bool  # some layout skips elements


_plans: OrderedDict[tuple[object, ...], Plan] = OrderedDict()


def plan(
    like: Tensors,
    *,
    latents: Tensors = (),
    grads: Tensors = (),
    plus: Tensors = (),
    minus: Tensors = (),
    alphas: Tensors = (),
    tensor_ids: Sequence[int] = (),
    layouts: Sequence[Layout] = (),
) -> Plan:
    """The plan for these addresses; the table is a pure function of the key, so it never goes stale."""
    addresses = tuple(tuple(t.data_ptr() for t in ts) for ts in (latents, grads, plus, minus, alphas))
    numels = tuple(t.numel() for t in like)
    scales = tuple(t.numel() for t in alphas) or (1,) * len(numels)
    key = (like[0].device if like else None, addresses, numels, scales, tuple(tensor_ids), tuple(layouts))
    found = _plans.get(key)
    if found is None:
        found = _plans[key] = build_plan(key)
        if len(_plans) > PLANS_KEPT:
            _plans.popitem(last=False)
    else:
        _plans.move_to_end(key)
    return found


def build_plan(key: tuple) -> Plan:
    device, addresses, numels, scales, tensor_ids, layouts = key
    rows: list[list[int]] = []
    owner: list[int] = []
    for i, numel in enumerate(numels):
        pointers = [column[i] if column else 0 for column in addresses]
        offset, inner, stride = layouts[i] if layouts else (0, max(numel, 1), max(numel, 1))
        inner = min(inner, max(numel, 1))
        if inner == numel:
            stride = inner
        length = max(numel // max(scales[i], 1), 1)
        aligned = (
            all(p % 16 == 0 for p in pointers[:4])
            and offset % 8 == 0
            and (inner == numel or (inner % 8 == 0 and stride % 8 == 0))
            and (scales[i] == 1 or length % 8 == 0)
        )
        rows.append([
            *pointers, tensor_ids[i] if tensor_ids else 0, numel, numel & ~7 if aligned else 0,
            len(owner), offset, inner, stride - inner, scales[i], length,
            kernels.divisor(max(inner // 8, 1)), kernels.divisor(max(length // 8, 1)),
        ])  # fmt: skip
        owner += [i] * -(-numel // SPAN)
    return Plan(
        torch.tensor(rows, dtype=torch.int64).to(device),
        torch.tensor(owner, dtype=torch.int32).to(device),
        len(owner),
        all(s == 1 for s in scales),
        any(row[kernels.COLUMNS.index("SKIP")] for row in rows),
    )


# ---- scalars


def host_or_device(t: Tensor) -> Tensor | int:
    """A device tensor is read by the kernel; a CPU one by the host, without a sync."""
    return int(t) if t.device.type == "cpu" and not triton.knobs.runtime.interpret else t


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
        with torch.cuda.device_of(torch.empty(0, device=device)):
            kernel[(programs,)](*args, **kwargs, num_warps=NUM_WARPS)


# ---- ops (docs/contract.md)


def noise(
    numel: int, distribution: str, seed: Tensor, step: Tensor, direction: int, tensor_id: int,
    layout: Layout, device: torch.device,
) -> Tensor:  # fmt: skip
    """u = C m, float32, shape (numel,)."""
    out = torch.empty(numel, device=device)
    p = plan([out], plus=[out], tensor_ids=[tensor_id], layouts=[layout])
    scale = rounded(DISTRIBUTIONS[distribution] / M_FACTOR[distribution])
    launch(
        kernels.noise_kernel, p.programs, device, p.table, p.owner, host_or_device(seed),
        host_or_device(step), direction, scale, SPAN=SPAN, TILE=TILE, DIST=distribution,
        SHARD=p.shard,
    )  # fmt: skip
    return out


def guide_sumsq(grads: Tensors, alphas: Tensors, r: int) -> Tensor:
    """Sum of the squares of delta * g, float64: two launches, no atomics."""
    device = grads[0].device
    p = plan(grads, grads=grads, alphas=alphas)
    partial = torch.empty(max(p.programs, 1), dtype=torch.float64, device=device)
    out = torch.empty((), dtype=torch.float64, device=device)
    launch(
        kernels.sumsq_kernel, p.programs, device, p.table, p.owner, partial, float(r), SPAN=SPAN,
        TILE=TILE, GRAD_T=DTYPES[grads[0].dtype], PER_TENSOR=p.per_tensor,
    )  # fmt: skip
    launch(kernels.sum_kernel, 1, device, partial, p.programs, out, BLOCK=1024)
    return out


def perturb_quantize_(
    plus: Tensors, minus: Tensors, latents: Tensors, grads: Tensors, alphas: Tensors,
    norm: Tensor, seed: Tensor, step: Tensor, one_minus_beta: Tensor, direction: int,
    tensor_ids: Sequence[int], layouts: Sequence[Layout], grid: Grid, distribution: str,
    epsilon: float,
) -> None:  # fmt: skip
    """Write Q(w + eps v) and Q(w - eps v): one launch, one pass."""
    if not latents:
        return
    p = plan(
        latents, latents=latents, grads=grads, plus=plus, minus=minus, alphas=alphas,
        tensor_ids=tensor_ids, layouts=layouts,
    )  # fmt: skip
    mix, scale = mixing(one_minus_beta, distribution)
    launch(
        kernels.perturb_kernel, p.programs, norm.device, p.table, p.owner, host_or_device(seed),
        host_or_device(step), norm=norm, direction=direction, **mix, eps=rounded(epsilon),
        offset=grid.offset, qmin=float(grid.qmin), qmax=float(grid.qmax), r=float(grid.r),
        SPAN=SPAN, TILE=TILE, DIST=distribution, NOISE_SCALE=scale,
        LATENT_T=DTYPES[latents[0].dtype], GRAD_T=DTYPES[grads[0].dtype],
        OUT_T=DTYPES[(plus or minus)[0].dtype], WRITE_PLUS=bool(plus), WRITE_MINUS=bool(minus),
        PER_TENSOR=p.per_tensor, SHARD=p.shard,
    )  # fmt: skip


def estimate_gradient_(
    grads: Tensors, counters: Tensors, losses_plus: Tensor, losses_minus: Tensor,
    alphas: Tensors, norm: Tensor, seed: Tensor, step: Tensor, one_minus_beta: Tensor,
    tensor_ids: Sequence[int], layouts: Sequence[Layout], r: int, distribution: str,
    epsilon: float,
) -> None:  # fmt: skip
    """Replace g by G: one launch for the coefficients, one for all tensors and directions."""
    device, n = norm.device, losses_plus.numel()
    p = plan(grads, grads=grads, alphas=alphas, tensor_ids=tensor_ids, layouts=layouts)
    mix, scale = mixing(one_minus_beta, distribution)
    names = host_or_device(seed), host_or_device(step)
    coef = torch.empty(2 + n, device=device)
    counter = counters[0] if counters else None
    eps = rounded(epsilon)
    launch(
        kernels.coefficients_kernel, 1, device, coef, counter, *names, norm=norm,
        losses_plus=losses_plus, losses_minus=losses_minus, n=n, **mix,
        half_inv_eps=rounded(0.5 / eps) if eps else math.inf, NOISE_SCALE=scale,
    )  # fmt: skip
    if not grads:
        return
    launch(
        kernels.estimate_kernel, p.programs, device, p.table, p.owner, counter, *names, coef, n,
        float(r), SPAN=SPAN, TILE=TILE, DIST=distribution, GRAD_T=DTYPES[grads[0].dtype],
        PER_TENSOR=p.per_tensor, SHARD=p.shard,
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
