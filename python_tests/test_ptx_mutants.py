"""Real kernels with one instruction changed: the executor's checks, or the numbers, find each of them."""

import re

import pytest
import torch
from conftest import INTERPRETED, MISSING
from ptx import launches
from ptx.decode import Kernel
from ptx.text import Module

import fogzo_kernels as fk
from fogzo_kernels.backends import load

pytestmark = [
    pytest.mark.every_combination,
    pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run on the GPU, which takes no changed PTX"),
    pytest.mark.skipif(INTERPRETED, reason="Triton's interpreter runs no PTX"),
]
GRID = fk.Grid.uniform(4)


def integers(most, *shape):
    """Up to ``most``, so that eight of them, or of their squares, have an exact sum in float32.

    Further sums then fill both halves of a float64.
    """
    generator = torch.Generator().manual_seed(torch.seed() % 2**32)
    return torch.randint(-most, most, shape, generator=generator).float()


def norm(backend):
    """Of (delta g)^2 in float64; exact. The second tensor goes element by element."""
    grads = [integers(1400, 5, 1024), integers(2**19, 3, 341)]
    alphas = [2.0 ** torch.arange(len(g)).unsqueeze(1) for g in grads]
    found = fk.guide_sumsq(grads, alphas, grid=GRID, backend=backend)
    scaled = [g.double() * a * GRID.r for g, a in zip(grads, alphas, strict=True)]
    return found.item() == sum(x.square().sum().item() for x in scaled)


def many(backend):
    """The sum of as many partial sums as the last kernel takes at once."""
    grads = list(integers(2**19, 8192, 1).unbind())
    found = fk.guide_sumsq(grads, [torch.ones(1)] * len(grads), grid=GRID, backend=backend)
    return found.item() == (torch.cat(grads).double() * GRID.r).square().sum().item()


def transformed(backend):
    """A transform that goes between threads and warps; exact on integers."""
    x = torch.randint(-64, 64, (4, 1024)).float()
    out = torch.full_like(x, float("nan"))
    fk.hadamard_(out, x, block=1024, backend=backend)
    expected = torch.full_like(x, float("nan"))
    fk.hadamard_(expected, x, block=1024, backend="reference")
    return torch.equal(out, expected)


def perturbed(backend):
    """A span with a rest of elements, bit for bit."""
    generator = torch.Generator().manual_seed(torch.seed() % 2**32)
    latent, grad = (torch.randn(2048 + 21, generator=generator).bfloat16() for _ in range(2))
    found = []
    for name in (backend, "reference"):
        out = torch.full_like(latent, float("nan"))
        fk.perturb_quantize_(
            out,
            None,
            latent,
            grad,
            torch.tensor(0.3),
            torch.tensor(2.0),
            grid=GRID,
            seed=5,
            step=7,
            straight_through=fk.StraightThrough("identity"),
            one_minus_beta=0.3,
            backend=name,
        )
        found.append(out)
    return torch.equal(*found)


#: What is changed: a pattern, and what comes in its place.
BARRIER = r"bar\.sync\s+0;", ""
PREDICATE = r"@%p\d+ ((?:ld|st)\.global\.v)", r"\1"
ADDRESS = r"((?:ld|st)\.global\.[\w.]+\s+(?:\{[^}]*\}, )?\[\s*%rd\d+)(?:\s*\+\s*0)?\s*\]", r"\1+4]"
DISTANCE = r"(shfl\.sync\.bfly\.b32\s+[^,]+,\s*%r\d+,\s*)(\d+)", lambda m: f"{m[1]}{int(m[2]) // 2 or 2}"
NO_DISTANCE = r"(shfl\.sync\.bfly\.b32\s+[^,]+,\s*%r\d+,\s*)(%r\d+|\d+)", r"\g<1>0"
ONE_LESS = r"(shfl\.sync\.bfly\.b32\s+[^,]+,\s*%r\d+,\s*\d+,\s*31,\s*)(?:-1|0xffffffff)", r"\g<1>0x7fffffff"


@pytest.fixture
def changed(monkeypatch):
    """Lets every launch of a kernel run another text of it."""
    run, made = launches.run, {}

    def begin(name, change):
        made.clear()

        def other(kernel, *rest):
            if name in kernel.name:
                key = id(kernel)
                if key not in made:
                    made[key] = Kernel(Module(change(kernel.module.text)), kernel.name)
                return run(made[key], *rest)
            return run(kernel, *rest)

        monkeypatch.setattr(launches, "run", other)
        return made

    return begin


def places(kernel, pattern):
    """Starts of the matches in instructions that the last launches executed."""
    rows = kernel.program.counts()
    everybody = max(row[3] for row in rows)
    lines = {
        row[1] for row in rows if row[3] and (row[3] < everybody or "@" not in pattern)
    }  # a predicate that is used
    body = kernel.module.text
    entry = body.index(f".entry {kernel.name}")
    end = body.find(".entry", entry + 1)
    for found in re.finditer(pattern, body[: end if end > 0 else len(body)]):
        if found.start() > entry and body.count("\n", 0, found.start()) + 1 in lines:
            yield found.start()


#: Op, kernel, change, and by backend how many mutants are no faults: a sum over threads, or a stage of a
#: transform, begins with a barrier that waits for readers of the one before, and the first has none before it.
CASES = [
    (norm, "sumsq_kernel", BARRIER, {"triton": 0, "cuda": 1}),
    (norm, "sumsq_kernel", DISTANCE, {"triton": 0}),
    (norm, "sumsq_kernel", NO_DISTANCE, {"cuda": 0}),
    (norm, "sumsq_kernel", ADDRESS, {"triton": 0, "cuda": 0}),
    (norm, "sumsq_kernel", ONE_LESS, {"triton": 0}),
    (many, "sum_kernel", BARRIER, {"triton": 0, "cuda": 1}),
    (many, "sum_kernel", DISTANCE, {"triton": 0}),
    (many, "sum_kernel", NO_DISTANCE, {"cuda": 0}),
    (transformed, "hadamard_kernel", BARRIER, {"triton": 1, "cuda": 1}),
    (transformed, "hadamard_kernel", DISTANCE, {"triton": 0}),
    (transformed, "hadamard_kernel", NO_DISTANCE, {"cuda": 0}),
    (transformed, "hadamard_kernel", ADDRESS, {"triton": 0, "cuda": 0}),
    (perturbed, "perturb_kernel", PREDICATE, {"triton": 0}),
    (perturbed, "perturb_kernel", ADDRESS, {"triton": 0, "cuda": 0}),
]


@pytest.mark.parametrize(
    ("backend", "op", "kernel", "change", "harmless"),
    [
        pytest.param(backend, op, *rest, some[backend], marks=[pytest.mark.everything] * (op is many))
        for op, *rest, some in CASES
        for backend in some
    ],
    ids=lambda x: getattr(x, "__name__", None),
)
def test_every_mutant_is_found(backend, op, kernel, change, harmless, changed):
    if reason := MISSING.get(backend):
        pytest.skip(f"backend {backend}: {reason}")
    load(backend)
    launches.launched.clear()
    assert op(backend)
    real = [k for k in launches.launched.values() if kernel in k.name]
    assert real
    pattern, replacement = change
    survivors, count = [], 0
    for one in real:
        for place in places(one, pattern):
            count += 1
            made = changed(
                one.name, lambda text, at=place: text[:at] + re.sub(pattern, replacement, text[at:], count=1)
            )
            try:
                if op(backend):
                    line = one.module.text.count("\n", 0, place) + 1
                    survivors.append((one.name, line, one.module.text.splitlines()[line - 1]))
            except (RuntimeError, ValueError):
                pass
            assert made
    assert count > harmless
    assert len(survivors) == harmless, f"{len(survivors)} of {count}: {survivors[:5]}"
