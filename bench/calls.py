"""Calls of every op on small operands of awkward sizes, and how their results agree with the reference's.

``bench.agree`` compares them; ``bench.sanitize`` runs them for a memory checker to watch. So every operand is
an allocation of its own, of exactly its size.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import fogzo_kernels as fk
from fogzo_kernels import StraightThrough
from fogzo_kernels.spec.grid import FLOATS
from fogzo_kernels.spec.hadamard import BLOCKS
from fogzo_kernels.spec.noise import DISTRIBUTIONS
from fogzo_kernels.spec.scale import STATISTICS
from fogzo_kernels.spec.straight_through import VARIANTS

from . import cases as c
from .comparison import EQUAL, Place, Results, Rule

SIZES = [1, 7, 8, 4099, 0, 2048, 16384 + 8, 2 * 16384 + 5]
#: Every derivative, each on a grid that it belongs to.
DERIVATIVES = [
    (one, c.GRID if one.kind == "identity" else fk.Grid.sign())
    for one in map(StraightThrough.of_variant, VARIANTS)
]
IDENTITY = StraightThrough("identity")
NAMES = {"one_minus_beta": c.ONE_MINUS_BETA, "seed": c.SEED, "step": c.STEP}
LOSSES = ((1.25, 1.5), (1.0, 1.125))
TAIL = {"lr": c.LR, "optimizer_step": 1}

# ---- what the contract's section 6 allows between two backends

#: Of m, absolute; the other distributions are exact.
M_TOLERANCE = {"logistic": 1e-5, "gaussian": 1e-4}
SUM = Rule(relative=2e-6)  # both are within 1e-6 of the float64 value
TIES = Rule(share=2e-3)  # codes under noise that is not exact
ULP = {torch.float32: 2.0**-22, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
SLOPE = 4.0  # at most, of Q by alpha


def probes(distribution: str) -> Rule:
    return TIES if distribution in M_TOLERANCE else EQUAL


def estimate(dtype: torch.dtype, distribution: str = "uniform", rotated: bool = False) -> Rule:
    """Of G: roundings of its terms, which no value of the list is much smaller than the largest of."""
    added = 5e-5 if rotated else 4e-6
    return Rule(relative=ULP[dtype], of_largest=added + M_TOLERANCE.get(distribution, 0.0))


def updated(o: dict[str, Sequence[Tensor]], rule: Rule) -> Results:
    """Of a tail with losses. Adam's first step is lr times the sign of G, which may be either where G is 0."""
    weights = Rule(relative=2.0**-7, absolute=4 * c.LR)
    codes = Rule(share=max(rule.share, 2e-2))
    rules = {"latents": weights, "masters": weights, "plus": codes}
    return {name: (tensors, rules.get(name, rule)) for name, tensors in o.items() if tensors}


def sums(grads: Sequence[Tensor], alphas: Sequence[Tensor], factors: Sequence[float]) -> Rule:
    """Of alphas' gradients: twice 1e-5 of the sum of the absolute terms."""
    bounds = []
    for g, alpha, factor in zip(grads, alphas, factors, strict=True):
        cells = g.detach().cpu().double().abs().reshape(max(alpha.numel(), 1), -1).sum(1)
        bounds.append((2e-5 * SLOPE * factor * cells)[: alpha.numel()].reshape(alpha.shape) + 1e-40)
    return Rule(absolute=bounds)


# ---- the calls


@dataclass(frozen=True)
class Call:
    name: str
    run: Callable[[Place], Results]
    few: bool  # whether the subset has it

    def results(self, place: Place) -> Results:
        place.generator.manual_seed(zlib.crc32(self.name.encode()))
        return self.run(place)


def combinations() -> Iterator[c.Case]:
    """Every op with every distribution in bfloat16, and with all dtypes for the first distribution."""
    same = [len(SIZES)], [sum(SIZES)]
    found = dict.fromkeys(c.cases(c.OPS, ["bf16"], c.DISTRIBUTIONS, *same))
    return iter(found | dict.fromkeys(c.cases(c.OPS, c.DTYPES, c.DISTRIBUTIONS[:1], *same)))


def alone(tensors: Sequence[Tensor], device: torch.device | None = None) -> list[Tensor]:
    """Each in an allocation of its own."""
    return [t.to(device or t.device, copy=True) for t in tensors]


def benchmarked(case: c.Case, place: Place) -> Results:
    """The benchmark's call, on a list of tensors."""
    made = c.operands(case, torch.device("cpu"), sizes=SIZES)
    o = c.Operands(*(alone(x, place.device) if isinstance(x, list) else x.to(place.device) for x in made))
    if case.op == "learned":
        factors = [c.lsq_factor(t, alpha) for t, alpha in zip(o.latents, o.alphas, strict=True)]
        rule = sums(made.grads, o.alphas, factors)
    found: Any = c.call(case, o, place.backend)()
    if case.op == "norm":
        return {"norm": ([found], SUM)}
    if case.op == "measure":
        return {"alphas": (o.alphas, SUM)}
    if case.op == "learned":
        return {"grads": (o.grads, EQUAL), "alpha_grads": (found, rule)}
    if case.op.startswith("estimate"):
        return {
            "grads": (o.grads, estimate(o.grads[0].dtype, case.distribution)),
            "counters": ([o.counters], EQUAL),
        }
    if case.op in ("adamw", "sgd"):
        lists = {name: getattr(o, name) for name in ("latents", "first", "second", "plus")}
        rule = Rule(relative=2.0**-16, of_largest=estimate(torch.float32, case.distribution).of_largest)
        return {**updated(lists, rule), "counters": ([o.counters], EQUAL)}
    rule = probes(case.distribution)
    return {name: (getattr(o, name), rule) for name in ("plus", "minus") if getattr(o, name)}


def lists() -> Iterator[Call]:
    for case in combinations():
        plain = case.distribution in ("uniform", "none") or (case.op, case.distribution) == (
            "perturb",
            "gaussian",
        )
        few = case.dtypes == "bf16" and plain
        yield Call(f"{case.op} {case.dtypes} {case.distribution}", partial(benchmarked, case), few)


def tail(op: str, dtypes: str, masters: bool, place: Place) -> Results:
    """The fused tail without losses: G is g, and all that it makes of it is equal."""
    latent, grad, out = c.DTYPES[dtypes]
    theta, g = (
        [place.random(n, dtype=dtype, scale=scale) for n in SIZES]
        for dtype, scale in ((latent, 0.5), (grad, 1e-2))
    )
    state = [[place.full(t.shape, 1e-3) for t in theta] for _ in range(2 if op == "adamw" else 1)]
    plus = [place.full(t.shape, 99, out) for t in theta]
    copies = [t.float() for t in theta] if masters else None
    alphas = [place.full((1,), c.ALPHA) for _ in theta]
    counters = torch.zeros(3, dtype=torch.int64, device=place.device)
    nothing = place.full((0,), 0.0)
    call = fk.estimate_adamw_ if op == "adamw" else partial(fk.estimate_sgd_, momentum=c.MOMENTUM)
    call(
        theta,
        g,
        *state,
        nothing,
        nothing,
        alphas,
        place.full((), 1.0),
        masters=copies,
        quantized=plus,
        counters=counters,
        grid=c.GRID,
        straight_through=IDENTITY,
        backend=place.backend,
        **TAIL,
        **NAMES,
    )
    written = {"latents": theta, "masters": copies or [], "first": state[0], "second": state[-1], "plus": plus}
    return {name: (tensors, EQUAL) for name, tensors in {**written, "counters": [counters]}.items()}


def tails() -> Iterator[Call]:
    for op in ("adamw", "sgd"):
        for dtypes, masters in (
            ("bf16", False),
            ("bf16", True),
            ("mixed", False),
            ("fp32", False),
            ("int8", False),
        ):
            name = f"{op} {dtypes}{' with masters' * masters}, no losses"
            yield Call(name, partial(tail, op, dtypes, masters), few=op == "adamw" and masters)


def per_tensor(distribution: str, place: Place) -> Results:
    """Noise per tensor: its sums, probes, the estimate and the tail of guided noise."""
    theta, g = ([place.random(n, dtype=torch.bfloat16, scale=scale) for n in SIZES] for scale in (0.5, 1e-2))
    alphas, norm = [place.full((1,), c.ALPHA) for _ in theta], place.full((), 2.0)
    how: dict[str, Any] = {"grid": c.GRID, "backend": place.backend}
    found = fk.guide_sumsq(g, alphas, per_tensor=True, **how)
    factors = torch.arange(len(SIZES), device=place.device) * 0.25
    how |= {
        **NAMES,
        "straight_through": StraightThrough("identity", noise=distribution),
        "noise_factors": factors,
    }
    plus, minus, q = ([torch.full_like(t, float("nan")) for t in theta] for _ in range(3))
    fk.perturb_quantize_(plus, minus, theta, g, alphas, norm, **how)
    G, counters = alone(g), torch.zeros(3, dtype=torch.int64, device=place.device)
    fk.estimate_gradient_(G, None, None, alphas, norm, counters=counters, **how)
    state = [[place.full(t.shape, 1e-3) for t in theta] for _ in range(2)]
    fk.estimate_adamw_(
        theta, g, *state, None, None, alphas, norm, quantized=q, counters=counters, **TAIL, **how
    )
    rule = Rule(relative=2.0**-16, of_largest=estimate(torch.float32, distribution).of_largest)
    tail = updated({"latents": theta, "first": state[0], "second": state[1], "plus": q}, rule)
    rules = {f"{name}, tail": of for name, of in tail.items()}
    rules |= {name: (side, probes(distribution)) for name, side in (("plus", plus), ("minus", minus))}
    grads = estimate(torch.bfloat16, distribution)
    return {**rules, "sums": ([found], SUM), "grads": (G, grads), "counters": ([counters], EQUAL)}


def noises() -> Iterator[Call]:
    for distribution in c.DISTRIBUTIONS:
        name = f"noise per tensor, guided, {distribution}"
        yield Call(name, partial(per_tensor, distribution), few=distribution == "uniform")


def shard(what: str, columns: int, offset: int, place: Place) -> Results:
    """Columns of a parameter, one alpha per row, both aligned and not; a master copy; step 0-dim."""
    theta, grad = (place.random(33, columns, dtype=torch.bfloat16) for _ in range(2))
    alpha = place.full((33, 1), c.ALPHA)
    layout = {"layouts": [(offset, columns, 3 * columns)], "tensor_ids": [5]}
    common: dict[str, Any] = {"grid": c.GRID, "straight_through": IDENTITY, "backend": place.backend}
    common |= {**NAMES, **layout, "step": torch.tensor(c.STEP, device=place.device)}
    norm, losses = place.full((), 16.0), torch.tensor(LOSSES, device=place.device)
    counters = torch.zeros(3, dtype=torch.int64, device=place.device)
    if what == "perturb":
        plus, minus = (place.full(theta.shape, float("nan"), torch.bfloat16) for _ in range(2))
        fk.perturb_quantize_(plus, minus, theta, grad, alpha, norm, **common)
        return {"plus": ([plus], EQUAL), "minus": ([minus], EQUAL)}
    if what == "estimate":
        fk.estimate_gradient_(grad, *losses, alpha, norm, counters=counters, **common)
        return {"grads": ([grad], estimate(torch.bfloat16)), "counters": ([counters], EQUAL)}
    first, second = (torch.zeros_like(theta, dtype=torch.float32) for _ in range(2))
    master, out = theta.float(), torch.empty_like(theta)
    fk.estimate_adamw_(
        theta,
        grad,
        first,
        second,
        *losses,
        alpha,
        norm,
        masters=master,
        quantized=out,
        counters=counters,
        **TAIL,
        **common,
    )
    o = {"latents": [theta], "masters": [master], "first": [first], "second": [second], "plus": [out]}
    return {**updated(o, Rule(2.0**-16, 4e-6)), "counters": ([counters], EQUAL)}


def shard_noise(distribution: str, columns: int, offset: int, place: Place) -> Results:
    where = {"layout": (offset, columns, 3 * columns), "device": place.device, "backend": place.backend}
    u = fk.noise(33 * columns, distribution, seed=c.SEED, **where)
    tolerance = M_TOLERANCE.get(distribution, 0.0)
    rule = Rule(absolute=DISTRIBUTIONS[distribution] * (tolerance + 2e-6) + 1e-6) if tolerance else EQUAL
    return {"noise": ([u], rule)}


def shards() -> Iterator[Call]:
    for columns, offset in ((24, 8), (13, 5)):
        for what in ("perturb", "estimate", "adamw"):
            yield Call(f"{what}, {columns} columns", partial(shard, what, columns, offset), few=offset == 5)
        for distribution in c.DISTRIBUTIONS:
            run = partial(shard_noise, distribution, columns, offset)
            few = offset == 5 and distribution == "gaussian"
            yield Call(f"noise {distribution}, {columns} columns", run, few)


def derivative(one: StraightThrough, grid: fk.Grid, dtype: torch.dtype, place: Place) -> Results:
    """The straight-through derivative, alphas' gradients by tensor and by element, and codes."""
    latents, grads = ([place.random(n, dtype=dtype) for n in SIZES] for _ in range(2))
    alphas = [place.full((1,), c.ALPHA) for _ in SIZES]
    inexact = one.kind in ("tanh", "approxsign")
    rule = Rule(ULP[dtype], absolute=[4e-6 * g.cpu().double().abs() for g in grads]) if inexact else EQUAL
    how: dict[str, Any] = {"grid": grid, "straight_through": one, "backend": place.backend}
    plain = alone(grads)
    fk.straight_through_backward_(plain, latents, alphas, **how)
    found: Results = {"grads": (plain, rule)}
    factors = [1.0] * len(SIZES)
    for kind, scales in (("one", alphas), ("each", [place.full((n,), c.ALPHA) for n in SIZES])):
        learned, alpha_grads = alone(grads), [torch.empty_like(alpha) for alpha in scales]
        fk.learned_backward_(learned, alpha_grads, latents, scales, factors=factors, **how)
        found[f"grads, {kind}"] = learned, rule
        found[f"alpha_grads, {kind}"] = alpha_grads, sums(grads, scales, factors)
    return {**found, "quantized": ([fk.quantize(latents[3], alphas[3], **how)], EQUAL)}


def derivatives() -> Iterator[Call]:
    for one, grid in DERIVATIVES:
        for dtype in FLOATS:
            few = dtype is torch.bfloat16 and one is DERIVATIVES[0][0]
            yield Call(f"derivative {one.variant} {c.short(dtype)}", partial(derivative, one, grid, dtype), few)


def cell(statistic: str, dtype: torch.dtype, place: Place) -> Results:
    """Alphas of short, long and odd rows, aligned and not."""
    shapes = [(300, 5), (40, 16), (7, 301), (3, 2056), (3, 40_003), (2, 32_776)]
    tensors = [place.random(*shape, dtype=dtype) for shape in shapes]
    alphas = [place.full((rows, 1), float("nan")) for rows, _ in shapes]
    fk.measure_alphas_(alphas, tensors, statistic=statistic, backend=place.backend)
    return {"alphas": (alphas, EQUAL if statistic == "absmax" else SUM)}


def cells() -> Iterator[Call]:
    for statistic in STATISTICS:
        for dtype in FLOATS:
            few = statistic == "rms" and dtype is torch.float32
            yield Call(f"measure {statistic} {c.short(dtype)}", partial(cell, statistic, dtype), few)


def transform(block: int, dtype: torch.dtype, place: Place) -> Results:
    """Aligned and not, into other memory and in place."""
    tensors = [place.random(n, dtype=dtype) for n in (block, 0, 16384 + block, 3 * block)]
    tensors.append(place.random(block + 1, dtype=dtype)[1:])
    out = [torch.full_like(t, float("nan")) for t in tensors]
    fk.hadamard_(out, tensors, block=block, backend=place.backend)
    fk.hadamard_(tensors, tensors, block=block, backend=place.backend)
    return {"other": (out, EQUAL), "in place": (tensors, EQUAL)}


def rotated(what: str, block: int, dtype: torch.dtype, place: Place) -> Results:
    """An op of a quantizer with a transform, aligned and not."""
    shapes = [(1, block), (0, block), (3, 3 * block), (17, 1024)]
    latents, grads = ([place.random(*s, dtype=dtype) for s in shapes] for _ in range(2))
    for some in (latents, grads):
        some.append(place.random(2 * block + 1, dtype=dtype)[1:])
    alphas = [place.full((), c.ALPHA) for _ in latents]
    alphas[2], alphas[3] = (place.full((n, 1), c.ALPHA) for n in (3, 17))
    how: dict[str, Any] = {"grid": c.GRID, "straight_through": IDENTITY, "backend": place.backend}
    how["transform"] = fk.Hadamard(block)
    norm, losses = place.full((), 64.0), torch.tensor(LOSSES, device=place.device)
    counters = torch.zeros(3, dtype=torch.int64, device=place.device)
    if what == "perturb":
        plus, minus, second = ([torch.full_like(t, float("nan")) for t in latents] for _ in range(3))
        fk.perturb_quantize_(plus, minus, latents, grads, alphas, norm, **how, **NAMES)
        fk.perturb_quantize_(None, second, latents, grads, alphas, norm, **how, **NAMES)
        return {"plus": (plus, EQUAL), "minus": (minus, EQUAL), "minus alone": (second, EQUAL)}
    if what == "estimate":
        fk.estimate_gradient_(grads, *losses, alphas, norm, counters=counters, **how, **NAMES)
        return {"grads": (grads, estimate(dtype, rotated=True)), "counters": ([counters], EQUAL)}
    if what == "adamw":
        first, second = ([torch.zeros_like(t, dtype=torch.float32) for t in latents] for _ in range(2))
        out = [torch.full_like(t, float("nan")) for t in latents]
        fk.estimate_adamw_(
            latents,
            grads,
            first,
            second,
            *losses,
            alphas,
            norm,
            quantized=out,
            counters=counters,
            **TAIL,
            **how,
            **NAMES,
        )
        o = {"latents": latents, "first": first, "second": second, "plus": out}
        return {**updated(o, Rule(2.0**-14, 5e-5)), "counters": ([counters], EQUAL)}
    out, plain, alpha_grads = alone(latents), alone(grads), [torch.empty_like(alpha) for alpha in alphas]
    fk.quantize_(out, latents, alphas, grid=c.GRID, transform=how["transform"], backend=place.backend)
    fk.straight_through_backward_(plain, latents, alphas, **how)
    factors = [1.0] * len(latents)
    rule = sums(grads, alphas, factors)
    fk.learned_backward_(grads, alpha_grads, latents, alphas, factors=factors, **how)
    return {"plus": (out, EQUAL), "grads": (plain, EQUAL), "grads, learned": (grads, EQUAL),
            "alpha_grads": (alpha_grads, rule)}  # fmt: skip


def transforms() -> Iterator[Call]:
    for block in BLOCKS:
        for dtype in FLOATS:
            of, few = f"Hadamard {block} {c.short(dtype)}", block == 128 and dtype is torch.bfloat16
            yield Call(of, partial(transform, block, dtype), few)
            for what in ("perturb", "estimate", "adamw", "quantize and back"):
                yield Call(f"{what}, {of}", partial(rotated, what, block, dtype), few)


def calls(subset: bool = False) -> Iterator[Call]:
    """All of them, or some 30 kernels: at least one of each op."""
    for part in (lists, tails, noises, shards, derivatives, cells, transforms):
        yield from (call for call in part() if call.few or not subset)
