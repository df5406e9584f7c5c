"""What the kernel benchmark measures: ops, the bytes each must move, and the operands of one case."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fogzo_kernels as fk
from fogzo_kernels.spec import noise

GRID = fk.Grid.uniform(2)
ONE_MINUS_BETA = 1e-4
SEED, STEP = 1234, 7
ALPHA = 0.5
LR, BETAS, EPS, WEIGHT_DECAY, MOMENTUM = 1e-3, (0.9, 0.999), 1e-8, 1e-2, 0.9
OPTIMIZER_STEP = 1
FACTOR, ADD = 1.2, 1e-8  # of alphas from the root mean square
ALIGNMENT = 256  # bytes, as an allocator's

DISTRIBUTIONS = tuple(noise.DISTRIBUTIONS)
#: name -> dtypes of latents, gradients, outputs: those that the GPU backends compile code of their own for
DTYPES = {
    "bf16": (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    "mixed": (torch.float32, torch.bfloat16, torch.bfloat16),
    "fp32": (torch.float32, torch.float32, torch.float32),
    "int8": (torch.bfloat16, torch.bfloat16, torch.int8),
    "fp16": (torch.float16, torch.float16, torch.float16),
    "int8-fp32": (torch.float32, torch.float32, torch.int8),
}
MEASURED = ("bf16", "mixed", "fp32", "int8")  # unless others are asked for
LIST_LENGTH = 300  # tensors of a list of mixed sizes
SMALLEST = 64  # mean elements of a tensor below which there is no list of mixed sizes


def short(dtype: torch.dtype | str) -> str:
    """Its name in tables: bf16, fp32, ..."""
    return str(dtype).removeprefix("torch.").replace("bfloat", "bf").replace("float", "fp")


class Op(NamedTuple):
    """How many times an op reads or writes each operand, once per element."""

    latent: int = 0
    grad: int = 0
    out: int = 0
    state: int = 0  # float32
    directions: int = 1
    noise: bool = True


OPS = {
    "norm": Op(grad=1, directions=0, noise=False),
    "perturb": Op(latent=1, grad=1, out=1),
    "perturb_both": Op(latent=1, grad=1, out=2),
    "estimate": Op(grad=2),
    "estimate_n4": Op(grad=2, directions=4),
    "adamw": Op(latent=2, grad=1, out=1, state=4),
    "sgd": Op(latent=2, grad=1, out=1, state=2),
    "quantize": Op(latent=1, out=1, directions=0, noise=False),
    "measure": Op(latent=1, directions=0, noise=False),
    "learned": Op(latent=1, grad=2, directions=0, noise=False),
}
UNTRANSFORMED = ("norm", "measure")  # take no transform


@dataclass(frozen=True)
class Case:
    """One row of the benchmark."""

    op: str
    dtypes: str
    distribution: str  # or "none", for an op without noise
    tensors: int
    elements: int
    equal: bool = False  # tensors of one size
    scale_length: int = 0  # elements that share an alpha; 0: all of a tensor
    block: int = 0  # of the quantizer's Hadamard transform; 0: none

    @property
    def spec(self) -> Op:
        return OPS[self.op]

    @property
    def bytes_per_element(self) -> int:
        """The fewest: each operand read once, each output written once."""
        latent, grad, out = (dtype.itemsize for dtype in DTYPES[self.dtypes])
        op = self.spec
        return op.latent * latent + op.grad * grad + op.out * out + op.state * 4

    @property
    def bytes(self) -> int:
        return self.bytes_per_element * self.elements

    def names(self) -> dict[str, str]:
        """Each operand's dtype, or - where the op has none."""
        names = [str(dtype).removeprefix("torch.") for dtype in DTYPES[self.dtypes]]
        used = self.spec.latent, self.spec.grad, self.spec.out
        kinds = zip(("latent", "grad", "out"), names, used, strict=True)
        return {kind: name if count else "-" for kind, name, count in kinds}


def cases(
    ops: Iterable[str],
    dtypes: Iterable[str],
    distributions: Iterable[str],
    tensors: Iterable[int],
    sizes: Iterable[int],
    equal: bool = False,
    scale_lengths: Iterable[int] = (0,),
    blocks: Iterable[int] = (0,),
) -> Iterator[Case]:
    """Every combination, once: what an op does not know of noise, dtypes or transforms does not count."""
    seen = set()
    for op, dtype, distribution, count, size, scale_length, block in product(
        ops, dtypes, distributions, tensors, sizes, scale_lengths, blocks
    ):
        noise = distribution if OPS[op].noise else "none"
        block = 0 if op in UNTRANSFORMED else block
        case = Case(op, dtype, noise, count, size, equal, scale_length, block)
        key = op, *case.names().values(), case.distribution, count, size, scale_length, block
        if key not in seen:
            seen.add(key)
            yield case


def mixed_sizes(total: int, count: int = LIST_LENGTH) -> list[int]:
    """Sizes of a list of tensors as a model has them: few large, many small, from a fixed generator.

    Log-uniform over four decades, multiples of 8 but for a few odd ones; they sum to ``total``.
    """
    if count == 1:
        return [total]
    if total < SMALLEST * count:
        raise ValueError(f"{count} tensors must have at least {SMALLEST * count} elements, got {total}")
    generator = torch.Generator().manual_seed(0)
    weights = (torch.rand(count, generator=generator, dtype=torch.float64) * math.log(1e4)).exp()
    chunks = total // 8 - count  # each has one chunk of 8 at least
    sizes = [8 + 8 * int(x) for x in (weights / weights.sum() * chunks).floor()]
    sizes[sizes.index(max(sizes))] += total - sum(sizes)
    for i in range(0, min(count - 1, 12), 2):  # odd ones
        sizes[i], sizes[i + 1] = sizes[i] + 3, sizes[i + 1] - 3
    return sizes


def sizes_of(case: Case) -> list[int]:
    if not case.equal:
        return mixed_sizes(case.elements, case.tensors)
    if case.elements % case.tensors:
        raise ValueError(f"elements must be a multiple of {case.tensors} tensors, got {case.elements}")
    return [case.elements // case.tensors] * case.tensors


class Operands(NamedTuple):
    """One set of operands. An op uses those that it needs; the others are empty lists."""

    latents: list[Tensor]
    grads: list[Tensor]
    plus: list[Tensor]
    minus: list[Tensor]
    first: list[Tensor]
    second: list[Tensor]
    alphas: list[Tensor]  # float32
    norm: Tensor
    losses_plus: Tensor
    losses_minus: Tensor
    counters: Tensor  # as training passes them


def flat_list(sizes: list[int], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, list[Tensor]]:
    """Aligned tensors in one allocation, and that allocation."""
    unit = ALIGNMENT // dtype.itemsize
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + -(-size // unit) * unit)
    flat = torch.zeros(starts[-1], dtype=dtype, device=device)
    return flat, [flat[start : start + size] for start, size in zip(starts[:-1], sizes, strict=True)]


def operands(case: Case, device: torch.device, seed: int = 0, sizes: list[int] | None = None) -> Operands:
    """Random data, the same for the same seed."""
    latent, grad, out = DTYPES[case.dtypes]
    op, sizes = case.spec, sizes or sizes_of(case)
    generator = torch.Generator(device).manual_seed(seed)

    def filled(wanted: bool, dtype: torch.dtype, scale: float) -> list[Tensor]:
        if not wanted:
            return []
        flat, tensors = flat_list(sizes, dtype, device)
        if scale:
            flat.normal_(0, scale, generator=generator)
        return tensors

    n = op.directions
    length = case.scale_length
    if length and any(size % length for size in sizes):
        raise ValueError(f"elements must be multiples of the scale length {length}, got {sizes}")
    if case.block and any(size % case.block for size in sizes):
        raise ValueError(f"elements must be multiples of the block {case.block}, got {sizes}")
    alphas = [torch.full((size // length if length else 1,), ALPHA, device=device) for size in sizes]
    return Operands(
        latents=filled(bool(op.latent), latent, 0.5),
        grads=filled(bool(op.grad), grad, 1e-3),
        plus=filled(op.out > 0, out, 0),
        minus=filled(op.out > 1, out, 0),
        first=filled(op.state > 0, torch.float32, 0),
        second=filled(op.state > 2, torch.float32, 0),
        alphas=alphas,
        norm=torch.tensor(1e-3 * ALPHA * math.sqrt(case.elements), device=device),
        losses_plus=1.25 + 0.01 * torch.arange(n, device=device, dtype=torch.float32),
        losses_minus=1.24 - 0.01 * torch.arange(n, device=device, dtype=torch.float32),
        counters=torch.zeros(3, dtype=torch.int64, device=device),
    )


def straight_through(case: Case) -> fk.StraightThrough:
    noise = case.distribution if case.spec.noise else None
    return fk.StraightThrough("identity", noise=noise)


def lsq_factor(latent: Tensor, alpha: Tensor) -> float:
    """Of alpha's gradient: LSQ, section 2.2."""
    return 1 / math.sqrt(max(latent.numel(), 1) / alpha.numel() * GRID.qmax)


def call(case: Case, o: Operands, backend: str | None) -> Callable[[], object]:
    """The op of this package, ready to be called again and again."""
    names = {"one_minus_beta": ONE_MINUS_BETA, "seed": SEED, "step": STEP}
    how: dict[str, Any] = {"grid": GRID, "backend": backend}
    if case.block:
        how["transform"] = fk.Hadamard(case.block)
    common = {"straight_through": straight_through(case), **how, **names}
    losses = o.losses_plus, o.losses_minus
    tail = {
        "lr": LR,
        "weight_decay": WEIGHT_DECAY,
        "optimizer_step": OPTIMIZER_STEP,
        "quantized": o.plus,
        "counters": o.counters,
    }
    if case.op == "norm":
        return lambda: fk.guide_norm(o.grads, o.alphas, grid=GRID, backend=backend)
    if case.op in ("perturb", "perturb_both"):
        minus = o.minus or None
        return lambda: fk.perturb_quantize_(o.plus, minus, o.latents, o.grads, o.alphas, o.norm, **common)
    if case.op in ("estimate", "estimate_n4"):
        return lambda: fk.estimate_gradient_(o.grads, *losses, o.alphas, o.norm, counters=o.counters, **common)
    if case.op == "adamw":
        return lambda: fk.estimate_adamw_(
            o.latents,
            o.grads,
            o.first,
            o.second,
            *losses,
            o.alphas,
            o.norm,
            betas=BETAS,
            eps=EPS,
            **tail,
            **common,
        )
    if case.op == "sgd":
        return lambda: fk.estimate_sgd_(
            o.latents, o.grads, o.first, *losses, o.alphas, o.norm, momentum=MOMENTUM, **tail, **common
        )
    if case.op == "quantize":
        return lambda: fk.quantize_(o.plus, o.latents, o.alphas, **how)
    if case.op == "measure":
        rms = {"statistic": "rms", "factor": FACTOR, "add": ADD}
        return lambda: fk.measure_alphas_(o.alphas, o.latents, **rms, backend=backend)
    if case.op == "learned":
        alpha_grads = type(o.alphas)([torch.empty_like(alpha) for alpha in o.alphas])
        factors = [lsq_factor(t, alpha) for t, alpha in zip(o.latents, o.alphas, strict=True)]
        shared = {"straight_through": straight_through(case), **how}

        def backward() -> list[Tensor]:
            fk.learned_backward_(o.grads, alpha_grads, o.latents, o.alphas, factors=factors, **shared)
            return alpha_grads

        return backward
    raise ValueError(f"op must be one of {', '.join(OPS)}, got {case.op!r}")
