"""What each setting does to the small MLP on digits, one by one; STE and FOGZO, each at its own rate.

The base is a 64-10-10 MLP with 2-bit weights, the identity without clipping as straight-through estimator, Adam
at a constant rate, and FOGZO with n = 1 and kappa = 0.1. For every line each method tries
five learning rates on two seeds that are not used again, and its best by training loss runs on fresh ones.
Both see the same batches.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import fogzo_kernels as fk
from bench.data import Data, load
from bench.machine import machine

from . import pool
from .text import generator_of

ALPHA, BATCH, MICRO_BATCHES, HIDDEN = 0.25, 128, 2, 10
SEARCH_SEEDS = (1000, 1001)
RATES = {"adam": (0.0025, 0.005, 0.01, 0.02, 0.04), "sgd": (0.02, 0.05, 0.1, 0.2, 0.5)}
GRIDS: dict[str, Callable[[], fk.Grid]] = {
    "uniform, 2 bits": lambda: fk.Grid.uniform(2),
    "uniform, 3 bits": lambda: fk.Grid.uniform(3),
    "half_offset, 2 bits": lambda: fk.Grid.half_offset(2),
    "ternary": fk.Grid.ternary,
    "sign": fk.Grid.sign,
}


@dataclass(frozen=True)
class Setting:
    """Of one run, but for rate and seed. ``fogzo``: options of Fogzo as sorted pairs, None for STE."""

    kind: str = "identity"
    clip: bool | str = False
    grid: str = "uniform, 2 bits"
    decay: str = "constant"
    optimizer: str = "adam"
    fogzo: tuple[tuple[str, Any], ...] | None = None


@dataclass(frozen=True)
class Job:
    """One training run."""

    setting: Setting
    rate: float
    seed: int
    steps: int


@dataclass
class Result:
    """What a run gives back."""

    job: Job
    loss: float = math.nan  # over all training images at the end, nats
    accuracy: float = math.nan  # of test images, 0..1
    seconds: float = 0.0


@dataclass
class Line:
    """Of the table: a name, and runs on fresh seeds of STE, if it is not the base's, and of FOGZO."""

    name: str
    ste: list[Result] = field(default_factory=list)
    fogzo: list[Result] = field(default_factory=list)


BASE = Setting()
KAPPA = {"kappa": 0.1}
#: Name -> what it changes of the base, and options of Fogzo that it adds.
LINES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "base": ({}, {}),
    "identity, clipped": ({"clip": True}, {}),
    "identity, trust": ({"clip": "trust"}, {}),
    **{f"sign, {kind}": ({"kind": kind, "grid": "sign"}, {}) for kind in ("hardtanh", "tanh", "approxsign")},
    **{name: ({"grid": name}, {}) for name in ("uniform, 3 bits", "half_offset, 2 bits", "ternary")},
    "cosine rate": ({"decay": "cosine"}, {}),
    "SGD, momentum 0.9": ({"optimizer": "sgd"}, {}),
    "every 4th step": ({}, {"every": 4}),
    "last 30 % of the steps": ({}, {"start": 0.7}),
    "n = 4": ({}, {"directions": 4}),
    **{f"kappa = {kappa:g}": ({}, {"kappa": kappa}) for kappa in (1e-3, 1e-2, 1.0, 10.0)},
}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.evidence.sweep",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--lines", nargs="+", default=list(LINES), choices=list(LINES))
    add("--steps", type=int, default=1500)
    add("--seeds", type=int, default=8)
    add("--workers", type=int, default=os.cpu_count(), help="processes")
    add("--out", type=Path, default=Path("bench/out/sweep.json"))
    return parser.parse_args(argv)


@cache
def digits() -> Data:
    return load("digits")


def build(setting: Setting, features: int, classes: int) -> nn.Sequential:
    """The MLP; its weights start normal, with alpha for deviation."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise((features, HIDDEN, classes)):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
        nn.init.normal_(layers[-2].weight, std=ALPHA)
        nn.init.zeros_(layers[-2].bias)
    model = nn.Sequential(*layers[:-1])
    straight_through = fk.StraightThrough(setting.kind, clip=setting.clip)
    fk.quantize_model(model, fk.Quantizer(GRIDS[setting.grid](), fk.Scale.fixed(ALPHA), straight_through))
    return model


def train(job: Job, progress: Callable[[], None]) -> Result:
    """One run; deterministic given the job, but for its time."""
    torch.set_num_threads(1)  # runs are spread over processes
    torch.manual_seed(job.seed)
    data, setting = digits(), job.setting
    model = build(setting, data.train_x.shape[1], data.classes)
    options = None if setting.fogzo is None else dict(setting.fogzo)
    kind = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[setting.optimizer]
    optimizer = kind(
        model.parameters(), lr=job.rate, **({"momentum": 0.9} if setting.optimizer == "sgd" else {})
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: pool.rate_at(step, job.steps, 0.0, setting.decay)
    )
    fogzo = options and fk.Fogzo(model, total_steps=job.steps, seed=job.seed, **options)

    def loss_of(rows: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(model(data.train_x[rows]), data.train_y[rows]) / MICRO_BATCHES

    result, start = Result(job), time.perf_counter()
    for step in range(job.steps):
        rows = torch.randint(len(data.train_x), (BATCH,), generator=generator_of(job.seed, step))
        parts = rows.chunk(MICRO_BATCHES)
        optimizer.zero_grad()
        if fogzo:
            for probe in fogzo.probes():
                with probe:
                    for part in parts:
                        probe.backward(loss_of(part))
            fogzo.estimate_()
        else:
            for part in parts:
                loss_of(part).backward()
        optimizer.step()
        schedule.step()
        progress()
    result.seconds = time.perf_counter() - start
    with torch.no_grad():
        result.loss = float(F.cross_entropy(model(data.train_x), data.train_y))
        result.accuracy = float((model(data.test_x).argmax(1) == data.test_y).float().mean())
    return result


def settings_of(name: str) -> list[Setting]:
    """STE's, where it differs from the base's, and FOGZO's."""
    changes, options = LINES[name]
    plain = replace(BASE, **changes)
    ours = replace(plain, fogzo=tuple(sorted((KAPPA | options).items())))
    return [plain, ours] if changes or name == "base" else [ours]


def best_of(results: Sequence[Result]) -> float:
    """The rate with the least mean loss."""
    return pool.best_of((r.job.rate, r.loss) for r in results)


def cell(result: Sequence[Result]) -> str:
    return f"{pool.plus_minus([r.loss for r in result], 4)} at {result[0].job.rate:g}"


def table(lines: Sequence[Line]) -> str:
    """Markdown; differences are those of the same seeds, with their standard error."""
    rows = [
        "| | STE, training loss at rate | FOGZO, training loss at rate | FOGZO - STE | test accuracy, % |",
        "|---|---|---|---|---|",
    ]
    base = next((line.ste for line in lines if line.name == "base"), [])
    for line in lines:
        other = line.ste or base
        losses = {r.job.seed: r.loss for r in other}
        apart = [r.loss - losses[r.job.seed] for r in line.fogzo if r.job.seed in losses]
        both = [pool.plus_minus([100 * r.accuracy for r in runs], 1) for runs in (other, line.fogzo) if runs]
        cells = [
            line.name,
            cell(line.ste) if line.ste else "base",
            cell(line.fogzo),
            pool.plus_minus(apart, 4) if apart else "",
            "; ".join(both),
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def lines_of(found: dict[str, Any]) -> list[Line]:
    """Of a file of results."""

    def results(runs: list[dict[str, Any]]) -> list[Result]:
        jobs = [(run, dict(run["job"])) for run in runs]
        return [
            Result(**{**run, "job": Job(**{**job, "setting": Setting(**job["setting"])})}) for run, job in jobs
        ]

    return [Line(row["name"], results(row["ste"]), results(row["fogzo"])) for row in found["rows"]]


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    where = machine(torch.device("cpu"))
    settings = [(name, setting) for name in args.lines for setting in settings_of(name)]

    def run(jobs: list[Job]) -> list[Result]:
        return pool.run(train, jobs, args.steps, args.workers, ["sklearn.datasets"])

    searched = run(
        [
            Job(setting, rate, seed, args.steps)
            for _, setting in settings
            for rate in RATES[setting.optimizer]
            for seed in SEARCH_SEEDS
        ]
    )
    rates = [best_of([r for r in searched if r.job.setting == setting]) for _, setting in settings]
    judged = run(
        [
            Job(setting, rate, seed, args.steps)
            for (_, setting), rate in zip(settings, rates, strict=True)
            for seed in range(args.seeds)
        ]
    )
    lines = [Line(name) for name in args.lines]
    by_name = {line.name: line for line in lines}
    for k, (name, setting) in enumerate(settings):
        side = by_name[name].ste if setting.fogzo is None else by_name[name].fogzo
        side += judged[k * args.seeds : (k + 1) * args.seeds]
    given = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    whole = {"machine": where, "arguments": given, "rows": [asdict(line) for line in lines]}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(whole, indent=1) + "\n")
    print(f"{table(lines)}\nmean ± standard error over {args.seeds} seeds; wrote {args.out}")


if __name__ == "__main__":
    main()
