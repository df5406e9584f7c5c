"""Compare estimators by what they train: at equal steps and at equal time, each with settings of its own.

Each method of a task and a preset first tries the same number of settings, on two seeds that are not used
again: STE six learning rates, FOGZO three and two kappas, which of ``small`` are smaller ones. The best by mean
validation loss is then run on fresh seeds. ``ste, as long`` is STE with so many more steps that it takes
FOGZO's time, its schedule stretched. Results are means and standard errors. A cell where nearly all codes
start at 0 is marked: STE cannot move there, and any noise looks good. Batches are the same for all methods of
a seed. What was measured is kept after each set of runs, and not run again: with ``--first-seed`` the same
settings are judged anew.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fogzo_kernels as fk
from bench.machine import machine

from . import pool
from .tasks import TASKS

UNCLIPPED = fk.StraightThrough("identity", clip=False)
PRESETS: dict[str, tuple[fk.Quantizer, fk.Quantizer | None]] = {
    "fixed": (fk.presets.fixed(2, lambda w: 2 * w.abs().mean() / math.sqrt(1)), None),
    "lsq": (fk.presets.lsq(2), None),
    "quest": (fk.presets.quest(2, block=64), None),
    "quest-w2a2": (fk.presets.quest(2, block=64), fk.presets.quest(2, block=64)),
}
#: Options of Fogzo by method; None without it.
METHODS: dict[str, dict[str, Any] | None] = {
    "ste": None,
    "fogzo": {},
    "late": {"start": 0.7},
    "small": {},
}
Trial = tuple[float, float | None]  # rate, kappa
#: Of a method that has others than the arguments: with hardly any noise STE's rates do.
OWN_TRIALS: dict[str, list[Trial]] = {
    "small": [(rate, kappa) for rate in (3e-3, 1.2e-2, 4.8e-2) for kappa in (1e-3, 1e-2)],
}
LONGER = "ste, as long"
SEARCH_SEEDS = (1000, 1001)
DEAD = 0.02  # share of codes that are not 0, below which a cell is marked
POINTS = 50  # of a curve
WARM_UP, CLIP, DECAY = 0.1, 1.0, 0.1


@dataclass(frozen=True)
class Job:
    """One training run."""

    task: str
    preset: str
    method: str
    rate: float
    kappa: float | None
    seed: int
    steps: int


@dataclass
class Result:
    """What a run gives back."""

    job: Job
    loss: float = math.nan  # of validation, nats
    accuracy: float | None = None
    seconds: float = 0.0  # of the steps, on one core; what else the machine does is not in it
    alive: float = 0.0  # share of codes that are not 0 at the start
    losses: list[float] = field(default_factory=list)  # of training, means of equal parts
    stats: dict[str, float] = field(default_factory=dict)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.evidence.quality",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--tasks", nargs="+", default=["llama", "deit", "resnet"], choices=list(TASKS))
    add("--presets", nargs="+", default=["fixed", "lsq", "quest"], choices=list(PRESETS))
    add("--methods", nargs="+", default=["ste", "fogzo", "late"], choices=list(METHODS))
    add("--steps", type=int, default=1000)
    add("--search-steps", type=int, help="of the search; by default as many")
    add("--seeds", type=int, default=5)
    add("--first-seed", type=int, default=0)
    add("--rates", nargs=6, type=float, default=[1.5e-3, 3e-3, 6e-3, 1.2e-2, 2.4e-2, 4.8e-2], help="of STE")
    add("--fogzo-rates", nargs=3, type=float, default=[1.5e-3, 4e-3, 1e-2])
    add("--kappas", nargs=2, type=float, default=[0.1, 1.0])
    add("--workers", type=int, default=os.cpu_count(), help="processes")
    add(
        "--out", type=Path, default=Path("bench/out/quality.json"), help="rows that are there are not run again"
    )
    add("--plot", type=Path, default=Path("bench/out/quality.png"))
    return parser.parse_args(argv)


def train(job: Job, progress: Callable[[], None]) -> Result:
    """One run; deterministic given the job, but for its time."""
    torch.set_num_threads(1)  # runs are spread over processes
    torch.manual_seed(job.seed)
    task, (weights, inputs) = TASKS[job.task], PRESETS[job.preset]
    model = task.make()
    fk.quantize_model(model, weights, activation=inputs, skip=list(task.skip))
    result, fogzo, options = Result(job, alive=alive(model)), None, METHODS[job.method]
    if options is not None:
        fogzo = fk.Fogzo(model, total_steps=job.steps, kappa=job.kappa, seed=job.seed, **options)
    groups = fk.parameter_groups(model, weight_decay=DECAY, alpha_lr=0.1 * job.rate)
    optimizer = fk.AdamW(groups, lr=job.rate, betas=(0.9, 0.95), fogzo=fogzo)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: pool.rate_at(step, job.steps, WARM_UP))
    losses, start = [], time.process_time()
    for step in range(job.steps):
        optimizer.zero_grad()
        if fogzo is None:
            loss = task.loss(model, job.seed, step)
            loss.backward()
        else:
            loss = fogzo.backward(lambda step=step: task.loss(model, job.seed, step))
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
        progress()
    result.seconds = time.process_time() - start
    model.eval()
    result.loss, result.accuracy = task.judge(model)
    part = max(job.steps // POINTS, 1)
    result.losses = [statistics.mean(losses[i : i + part]) for i in range(0, len(losses), part)]
    result.stats = {} if fogzo is None else fogzo.stats()
    return result


def alive(model: nn.Module) -> float:
    """The share of codes that are not 0; on a grid without 0 all of them."""
    codes = [m.codes() for m in model.modules() if isinstance(m, fk.nn.module.QuantizedModule)]
    half = any(m.quantizer.grid.offset for m in model.modules() if hasattr(m, "quantizer"))
    return 1.0 if half else sum(int(c.count_nonzero()) for c in codes) / sum(c.numel() for c in codes)


# ---- which runs


def trials_of(args: argparse.Namespace, method: str) -> list[Trial]:
    """As many for each method."""
    if method in OWN_TRIALS:
        return OWN_TRIALS[method]
    if METHODS[method] is None:
        return [(rate, None) for rate in args.rates]
    return [(rate, kappa) for rate in args.fogzo_rates for kappa in args.kappas]


def best_of(results: Sequence[Result]) -> Job:
    """A job of the settings with the least mean validation loss; one that has diverged is the worst."""
    jobs = {(r.job.rate, r.job.kappa): r.job for r in reversed(results)}  # the first of each
    return jobs[pool.best_of(((r.job.rate, r.job.kappa), r.loss) for r in results)]


def cell(
    args: argparse.Namespace, task: str, preset: str, run: Callable[[list[Job]], list[Result]]
) -> list[Result]:
    """All methods of a task and a preset: the search, then fresh seeds, then STE for the time of the others."""
    jobs = [
        Job(task, preset, method, rate, kappa, seed, args.search_steps or args.steps)
        for method in args.methods
        for rate, kappa in trials_of(args, method)
        for seed in SEARCH_SEEDS
    ]
    found = run(jobs)
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    chosen = [best_of([r for r in found if r.job.method == method]) for method in args.methods]
    fresh = run([Job(**{**asdict(job), "seed": seed, "steps": args.steps}) for job in chosen for seed in seeds])
    found += fresh
    seconds = {m: statistics.median(r.seconds for r in fresh if r.job.method == m) for m in args.methods}
    if "ste" in seconds:
        job = chosen[args.methods.index("ste")]
        for method in args.methods:
            if METHODS[method] is not None:
                steps = round(args.steps * seconds[method] / seconds["ste"])
                longer = [Job(**{**asdict(job), "seed": seed, "steps": steps}) for seed in seeds]
                found += run(longer)
    return found


# ---- what is shown


def name_of(result: Result, steps: int) -> str:
    return result.job.method if result.job.steps == steps else f"{LONGER} ({result.job.steps} steps)"


def rows_of(results: Sequence[Result], steps: int) -> dict[tuple[str, str, str], list[Result]]:
    """Runs on fresh seeds, by task, preset and method."""
    rows: dict[tuple[str, str, str], list[Result]] = {}
    for r in results:
        if r.job.seed not in SEARCH_SEEDS:
            rows.setdefault((r.job.task, r.job.preset, name_of(r, steps)), []).append(r)
    return rows


def table(results: Sequence[Result], steps: int) -> str:
    """Markdown."""
    lines = [
        "| task | weights | method | rate | kappa | validation loss | accuracy, % | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (task, preset, name), runs in rows_of(results, steps).items():
        job, mark = runs[0].job, " (codes start at 0)" * (runs[0].alive < DEAD)
        accuracies = [100 * r.accuracy for r in runs if r.accuracy is not None]
        cells = [
            task, preset + mark, name, f"{job.rate:g}",
            "" if job.kappa is None else f"{job.kappa:g}",
            pool.plus_minus([r.loss for r in runs], 4), pool.plus_minus(accuracies, 2) if accuracies else "",
            f"{statistics.mean(r.seconds for r in runs):.0f}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def verdict(runs: Sequence[Result], others: Sequence[Result]) -> str:
    """A method against another: apart by more than two standard errors of the difference, or a draw."""
    (a, da), (b, db) = (pool.mean_and_error([r.loss for r in group]) for group in (runs, others))
    apart = (b - a) / max(math.hypot(da, db), 1e-12)
    word = "win" if apart > 2 else "loss" if apart < -2 else "draw"
    return f"{word} ({a - b:+.4f} nats, {abs(apart):.1f} standard errors)"


def verdicts(results: Sequence[Result], steps: int) -> str:
    """FOGZO against STE, a line each: at equal steps, and at equal time."""
    rows, lines = rows_of(results, steps), list[str]()
    for (task, preset, name), runs in rows.items():
        if runs[0].job.method == "ste" or runs[0].alive < DEAD:
            continue
        said = []
        if (task, preset, "ste") in rows:
            said.append(f"at equal steps {verdict(runs, rows[task, preset, 'ste'])}")
        pace = statistics.median(r.seconds for r in runs)
        longer = [g for (t, p, n), g in rows.items() if (t, p) == (task, preset) and n.startswith(LONGER)]
        if longer:
            nearest = min(longer, key=lambda g: abs(statistics.median(r.seconds for r in g) - pace))
            said.append(f"at equal time {verdict(runs, nearest)}")
        lines.append(f"{task}, {preset}, {name}: {', '.join(said)}")
    return "\n".join(lines)


def plot(results: Sequence[Result], steps: int, path: Path) -> None:
    """A panel for each task and preset: training loss against steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = rows_of(results, steps)
    cells = list(dict.fromkeys(key[:2] for key in rows))
    columns = min(len(cells), 3)
    shape = -(-len(cells) // columns), columns
    figure, axes = plt.subplots(
        *shape, figsize=(4.2 * shape[1], 3.2 * shape[0]), layout="constrained", squeeze=False
    )
    for panel, (task, preset) in zip(axes.flat, cells, strict=False):
        for (t, p, name), runs in rows.items():
            if (t, p) == (task, preset):
                curve = torch.tensor([r.losses for r in runs]).mean(0)
                part = max(runs[0].job.steps // POINTS, 1)
                panel.plot([part * (i + 0.5) for i in range(len(curve))], curve, label=name, linewidth=1)
        panel.set(title=f"{task}, {preset}", xlabel="step", yscale="log")
        panel.grid(alpha=0.3, which="both")
        panel.legend(fontsize="x-small")
    for panel in axes.flat[len(cells) :]:
        panel.set_axis_off()
    axes[0][0].set_ylabel("training loss, nats")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def kept(path: Path) -> list[Result]:
    """Of an earlier call."""
    if not path.exists():
        return []
    return results_of(json.loads(path.read_text()))


def results_of(found: dict[str, Any]) -> list[Result]:
    """Of a file."""
    return [Result(**{**one, "job": Job(**one["job"])}) for one in found["runs"]]


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    results, where = kept(args.out), machine(torch.device("cpu"))

    def run(jobs: list[Job]) -> list[Result]:
        known = {r.job: r for r in results}
        missing = [job for job in jobs if job not in known]
        by_steps: dict[int, list[Job]] = {}
        for job in missing:
            by_steps.setdefault(job.steps, []).append(job)
        for steps, some in by_steps.items():
            results.extend(pool.run(train, some, steps, args.workers, ["bench.evidence.tasks"]))
        given = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
        whole = {
            "machine": where,
            "arguments": given,
            "runs": [asdict(r) for r in results],
        }
        part = args.out.with_suffix(".part")
        part.write_text(json.dumps(whole, indent=1) + "\n")
        part.replace(args.out)
        known = {r.job: r for r in results}
        return [known[job] for job in jobs]

    found: list[Result] = []
    for task in args.tasks:
        for preset in args.presets:
            if task == "resnet" and preset.startswith("quest"):
                continue  # its convolutions have rows that no block divides
            found += cell(args, task, preset, run)
            print(f"{table(found, args.steps)}\n{verdicts(found, args.steps)}\n", flush=True)
    plot(found, args.steps, args.plot)
    print(f"mean ± standard error over {args.seeds} seeds; wrote {args.out} and {args.plot}")


if __name__ == "__main__":
    main()
