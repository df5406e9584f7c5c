"""Call every op once on small operands of awkward sizes, for a memory checker to watch.

    compute-sanitizer --tool memcheck python -m bench.sanitize

Every operand is an allocation of its own, of exactly its size: set PYTORCH_NO_CUDA_MEMORY_CACHING=1, or
PyTorch's cache hides what lies beyond it.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch
from torch import Tensor

import fogzo_kernels as fk
from fogzo_kernels import StraightThrough
from fogzo_kernels.spec.dtypes import FLOATS
from fogzo_kernels.spec.hadamard import BLOCKS
from fogzo_kernels.spec.scale import STATISTICS
from fogzo_kernels.spec.straight_through import VARIANTS

from . import cases as c

SIZES = [1, 7, 8, 4099, 0, 2048, 16384 + 8, 2 * 16384 + 5]
#: Every derivative, each on a grid that it belongs to.
DERIVATIVES = [
    (one, c.GRID if one.kind == "identity" else fk.Grid.sign())
    for one in map(StraightThrough.of_variant, VARIANTS)
]
NAMES = {"one_minus_beta": c.ONE_MINUS_BETA, "seed": c.SEED, "step": c.STEP}


def combinations() -> Iterator[c.Case]:
    """Every op with every distribution in bfloat16, and with all dtypes for the first distribution."""
    same = [len(SIZES)], [sum(SIZES)]
    found = dict.fromkeys(c.cases(c.OPS, ["bf16"], c.DISTRIBUTIONS, *same))
    return iter(found | dict.fromkeys(c.cases(c.OPS, c.DTYPES, c.DISTRIBUTIONS[:1], *same)))


def alone(tensors: list[Tensor]) -> list[Tensor]:
    """Each in an allocation of its own."""
    return [t.clone() for t in tensors]


def lists(device: torch.device, backend: str) -> Iterator[str]:
    """The benchmark's ops, on a list of tensors."""
    for case in combinations():
        o = c.operands(case, device, sizes=SIZES)
        o = c.Operands(*(alone(x) if isinstance(x, list) else x.clone() for x in o))
        c.call(case, o, backend)()
        yield f"{case.op} {case.dtypes} {case.distribution}"


def shards(device: torch.device, backend: str) -> Iterator[str]:
    """Columns of a parameter, one alpha per row, both aligned and not; a master copy; step 0-dim."""
    straight_through = StraightThrough("identity")
    for columns, offset in ((24, 8), (13, 5)):
        theta, grad = (torch.randn(33, columns, device=device, dtype=torch.bfloat16) for _ in range(2))
        alpha = torch.full((33, 1), c.ALPHA, device=device)
        layout = {"layouts": [(offset, columns, 3 * columns)], "tensor_ids": [5]}
        common = {"grid": c.GRID, "straight_through": straight_through, "backend": backend, **NAMES, **layout}
        common["step"] = torch.tensor(c.STEP, device=device)
        norm = fk.guide_norm(grad, alpha, grid=c.GRID, backend=backend)
        plus, minus = torch.empty_like(theta), torch.empty_like(theta)
        fk.perturb_quantize_(plus, minus, theta, grad, alpha, norm, **common)
        yield f"perturb, {columns} columns"
        losses = torch.tensor([[1.25, 1.5], [1.0, 1.125]], device=device)
        counters = torch.zeros(3, dtype=torch.int64, device=device)
        fk.estimate_gradient_(grad, *losses, alpha, norm, counters=counters, **common)
        yield f"estimate, {columns} columns"
        first, second = (torch.zeros_like(theta, dtype=torch.float32) for _ in range(2))
        fk.estimate_adamw_(
            theta, grad, first, second, *losses, alpha, norm, lr=c.LR, optimizer_step=1,
            masters=theta.float(), quantized=plus, counters=counters, **common,
        )  # fmt: skip
        yield f"adamw, {columns} columns"
        for distribution in c.DISTRIBUTIONS:
            where = {"layout": layout["layouts"][0], "device": device, "backend": backend}
            fk.noise(33 * columns, distribution, seed=c.SEED, **where)
            yield f"noise {distribution}, {columns} columns"


def backward(device: torch.device, backend: str) -> Iterator[str]:
    """The straight-through derivatives, and codes."""
    for straight_through, grid in DERIVATIVES:
        for dtype in (torch.float32, torch.bfloat16):
            latents, grads = ([torch.randn(n, device=device, dtype=dtype) for n in SIZES] for _ in range(2))
            alphas = [torch.full((1,), c.ALPHA, device=device) for _ in SIZES]
            fk.straight_through_backward_(
                grads, latents, alphas, grid=grid, straight_through=straight_through, backend=backend
            )
            yield f"backward {straight_through.variant} {dtype}"
            each = [torch.full((n,), c.ALPHA, device=device) for n in SIZES]
            for scales in (alphas, each):
                alpha_grads = [torch.empty_like(alpha) for alpha in scales]
                fk.learned_backward_(
                    grads, alpha_grads, latents, scales, grid=grid, straight_through=straight_through,
                    factors=[1.0] * len(SIZES), backend=backend,
                )  # fmt: skip
            yield f"learned {straight_through.variant} {dtype}"
            fk.quantize(latents[3], alphas[3], grid=grid, straight_through=straight_through, backend=backend)
            yield f"quantize {dtype}"


def cells(device: torch.device, backend: str) -> Iterator[str]:
    """Alphas of short, long and odd rows, aligned and not."""
    shapes = [(300, 5), (40, 16), (7, 301), (3, 2056), (3, 40_003), (2, 32_776)]
    for statistic in STATISTICS:
        for dtype in FLOATS:
            tensors = [torch.randn(shape, device=device).to(dtype) for shape in shapes]
            alphas = [torch.empty(rows, 1, device=device) for rows, _ in shapes]
            fk.measure_alphas_(alphas, tensors, statistic=statistic, backend=backend)
            yield f"{statistic} {dtype}"


def transforms(device: torch.device, backend: str) -> Iterator[str]:
    """Hadamard transforms of each block, aligned and not, into other memory and in place."""
    for block in BLOCKS:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            sizes = [block, 0, 16384 + block, 3 * block]
            tensors = [torch.randn(n, device=device, dtype=dtype) for n in sizes]
            tensors.append(torch.randn(block + 1, device=device, dtype=dtype)[1:])
            fk.hadamard_(alone(tensors), tensors, block=block, backend=backend)
            fk.hadamard_(tensors, tensors, block=block, backend=backend)
            yield f"hadamard {block} {dtype}"


def rotated(device: torch.device, backend: str) -> Iterator[str]:
    """Every op of a quantizer with a transform, of each block, aligned and not."""
    losses = torch.tensor([[1.25, 1.5], [1.0, 1.125]], device=device)
    for block in BLOCKS:
        for dtype in FLOATS:
            shapes = [(1, block), (0, block), (3, 3 * block), (17, 1024)]
            latents, grads = ([torch.randn(s, device=device).to(dtype) for s in shapes] for _ in range(2))
            for some in (latents, grads):
                some.append(torch.randn(2 * block + 1, device=device).to(dtype)[1:])
            alphas = [torch.full((), c.ALPHA, device=device) for _ in latents]
            alphas[2], alphas[3] = (torch.full((n, 1), c.ALPHA, device=device) for n in (3, 17))
            how = {"grid": c.GRID, "straight_through": StraightThrough("identity"), "backend": backend}
            how["transform"] = fk.Hadamard(block)
            norm = fk.guide_norm(grads, alphas, grid=c.GRID, backend=backend)
            plus, minus = alone(latents), alone(latents)
            fk.perturb_quantize_(plus, minus, latents, grads, alphas, norm, **how, **NAMES)
            fk.perturb_quantize_(None, minus, latents, grads, alphas, norm, **how, **NAMES)
            yield f"perturb, Hadamard {block} {dtype}"
            fk.estimate_gradient_(grads, *losses, alphas, norm, **how, **NAMES)
            yield f"estimate, Hadamard {block} {dtype}"
            states = [[torch.zeros_like(t, dtype=torch.float32) for t in latents] for _ in range(2)]
            fk.estimate_adamw_(
                alone(latents), grads, *states, *losses, alphas, norm, lr=c.LR, optimizer_step=1,
                quantized=plus, **how, **NAMES,
            )  # fmt: skip
            yield f"adamw, Hadamard {block} {dtype}"
            fk.quantize_(plus, latents, alphas, grid=c.GRID, transform=how["transform"], backend=backend)
            fk.straight_through_backward_(alone(grads), latents, alphas, **how)
            alpha_grads = [torch.empty_like(alpha) for alpha in alphas]
            fk.learned_backward_(grads, alpha_grads, latents, alphas, factors=[1.0] * len(latents), **how)
            yield f"quantize and back, Hadamard {block} {dtype}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.sanitize", description=__doc__)
    parser.add_argument("--backend", default="triton")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    device, count = torch.device(args.device), 0
    for part in (lists, shards, backward, cells, transforms, rotated):
        for name in part(device, args.backend):
            if device.type == "cuda":
                torch.cuda.synchronize()  # an error shows at its op
            count += 1
            print(name, flush=True)
    print(f"{count} calls finished")


if __name__ == "__main__":
    main()
