"""Train a low-bit MLP on images of digits with STE, guided noise, FOGZO and n-SPSA.

It is the paper's first experiment, with the derivative of LSQ and of this package's presets: 0 where a weight
is out of the grid's range. Prints a table over several seeds and what it means, and plots the training loss
against steps and against forward passes. ``make demo`` runs it as it is. Learning rates are constant unless
--decay says otherwise. ``--full`` adds n-SPSA with 1000 and 7960 directions, which takes about an hour.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fogzo_kernels as fk
from bench.data import Data, load
from bench.machine import machine
from bench.plots import colour_of

from . import pool
from .spsa import Spsa

GRIDS = {"uniform": fk.Grid.uniform, "half_offset": fk.Grid.half_offset}
#: Adam's learning rate and alpha. Each rate is the best of 0.00125, 0.0025, ... 0.04. Other data take digits'.
#: n-SPSA has rates for 1, 10, 100 and 1000 directions and more.
DEFAULTS: dict[str, tuple[dict[str, tuple[float, ...]], float]] = {
    "mnist": (
        {"ste": (0.0025,), "guided": (0.0025,), "fogzo": (0.005,), "spsa": (0.005, 0.005, 0.01, 0.02)},
        0.1,
    ),
    "digits": (
        {"ste": (0.01,), "guided": (0.01,), "fogzo": (0.01,), "spsa": (0.01, 0.02, 0.02, 0.02)},
        0.25,
    ),
}
NAMES = {"ste": "STE", "guided": "guided noise", "fogzo": "FOGZO", "spsa": "n-SPSA"}
EVALUATIONS = 30  # points of a curve
FULL = (1000, 7960)
FEWER = ((5000, 1), (1000, 2), (100, 3), (0, 2**31))  # seeds at most, of so many directions
CALIBRATION = 50  # steps of each kind of run, to say how long all will take


@dataclass(frozen=True)
class Job:
    """One training run."""

    method: str  # one of NAMES
    directions: int
    seed: int
    rate: float

    @property
    def label(self) -> str:
        name = NAMES[self.method]
        return f"{name}, n = {self.directions}" if self.directions else name


@dataclass
class Result:
    """What a run gives back."""

    job: Job
    test_accuracy: float = 0.0
    seconds: float = 0.0
    steps: list[int] = field(default_factory=list)
    passes: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.evidence.mlp",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    sources = "mnist: 5,000 images; digits: scikit-learn's; an .npz with X and y; a folder of MNIST's IDX files"
    add("--data", default="mnist", help=sources)
    add("--methods", nargs="+", default=list(NAMES), choices=list(NAMES))
    add("--bits", type=int, default=2, help="bits of the uniform and half_offset grids")
    add("--grid", default="uniform", choices=["uniform", "half_offset", "sign", "ternary"])
    add("--straight-through", default="identity", choices=list(fk.spec.straight_through.KINDS))
    add(
        "--clip",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="derivative 0 out of the grid's range",
    )
    add(
        "--alpha",
        type=float,
        help="of the grids, and deviation of the first weights; by default that of the data",
    )
    add("--kappa", type=float, default=0.1, help="(1 - beta) d at the end")
    add("--noise-per", default="tensor", choices=["model", "tensor"], help="of guided noise")
    add("--n", type=int, nargs="+", default=[1], help="directions of FOGZO")
    add("--spsa-n", type=int, nargs="+", default=[1, 10, 100], help="directions of n-SPSA")
    add("--full", action="store_true", help=f"n-SPSA also with {FULL} directions")
    add("--seeds", type=int, default=8, help="of 100 directions and more fewer: 3, 2 and 1")
    add("--steps", type=int, default=1500)
    add("--batch", type=int, default=128)
    add("--hidden", type=int, nargs="*", default=[10])
    add("--rate", type=float, help="Adam's learning rate for all methods; by default each method's best")
    add("--decay", default="constant", choices=["constant", "cosine"], help="learning rate over training")
    add("--device", default="cpu")
    add("--backend", help="by default the best available")
    add("--workers", type=int, default=os.cpu_count(), help="processes")
    add("--out", default="bench/out", help="folder for the plot and the numbers")
    add("--name", help="of both; by default that of the data")
    args = parser.parse_args(argv)
    rates, alpha = DEFAULTS.get(args.data, DEFAULTS["digits"])
    args.alpha = alpha if args.alpha is None else args.alpha
    args.rates = {method: (args.rate,) if args.rate else found for method, found in rates.items()}
    if args.full:
        args.spsa_n = [*args.spsa_n, *FULL]
    return args


def seeds_of(args: argparse.Namespace, directions: int) -> int:
    """Thousands of directions leave little to chance, and take long."""
    return min(args.seeds, next(seeds for least, seeds in FEWER if directions >= least))


def rate_of(rates: Sequence[float], directions: int) -> float:
    """More directions are less noise, and want a higher rate."""
    return rates[min(len(str(directions)), len(rates)) - 1]


def jobs_of(args: argparse.Namespace) -> list[Job]:
    counts = {"ste": [0], "guided": [0], "fogzo": args.n, "spsa": args.spsa_n}
    return [
        Job(method, n, seed, rate_of(args.rates[method], n))
        for method in args.methods
        for n in counts[method]
        for seed in range(seeds_of(args, n))
    ]


def network(sizes: Sequence[int], alpha: float) -> nn.Sequential:
    """An MLP of these sizes; its weights start normal, with alpha for deviation, its biases at 0."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(sizes):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
        nn.init.normal_(layers[-2].weight, std=alpha)
        nn.init.zeros_(layers[-2].bias)
    return nn.Sequential(*layers[:-1])


def build(args: argparse.Namespace, features: int, classes: int) -> nn.Sequential:
    """An MLP whose weights are all quantized."""
    model = network([features, *args.hidden, classes], args.alpha)
    grid = GRIDS[args.grid](args.bits) if args.grid in GRIDS else getattr(fk.Grid, args.grid)()
    straight_through = fk.StraightThrough(args.straight_through, clip=args.clip)
    fk.quantize_model(
        model, fk.Quantizer(grid, fk.Scale.fixed(args.alpha), straight_through), backend=args.backend
    )
    return model.to(args.device)


def gradients(args: argparse.Namespace, job: Job, model: nn.Sequential) -> Callable[[Tensor, Tensor], object]:
    """What leaves a method's gradients of a batch in ``.grad``."""
    if job.method == "spsa":  # beta = 0: no guide at all
        return Spsa(model, job.directions, job.seed).step
    fogzo = fk.Fogzo(
        model,
        total_steps=args.steps,
        kappa=0.0 if job.method == "ste" else args.kappa,
        noise_per=args.noise_per if job.method == "guided" else "model",
        directions=job.directions,
        seed=job.seed,
        backend=args.backend,
    )
    return lambda x, y: fogzo.backward(lambda: F.cross_entropy(model(x), y))


def train(
    args: argparse.Namespace, data: Data, job: Job, progress: Callable[[], None], evaluations: int = EVALUATIONS
) -> Result:
    """One run; deterministic given the job."""
    torch.set_num_threads(1)  # runs are spread over processes
    torch.manual_seed(job.seed)
    train_x, train_y, test_x, test_y = (t.to(args.device) for t in data)
    model = build(args, train_x.shape[1], data.classes)
    optimizer = torch.optim.Adam(model.parameters(), lr=job.rate)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
    fill, result, start = gradients(args, job, model), Result(job), time.perf_counter()

    @torch.no_grad()
    def evaluate(step: int) -> None:
        result.steps.append(step)
        result.passes.append(step * (1 + 2 * job.directions))
        result.losses.append(F.cross_entropy(model(train_x), train_y).item())

    for step in range(args.steps):
        if step % max(args.steps // evaluations, 1) == 0:
            evaluate(step)
        rows = torch.randint(len(train_x), (args.batch,)).to(args.device)
        optimizer.zero_grad()
        fill(train_x[rows], train_y[rows])
        optimizer.step()
        if args.decay == "cosine":
            cosine.step()
        progress()
    evaluate(args.steps)
    with torch.no_grad():
        result.test_accuracy = (model(test_x).argmax(1) == test_y).float().mean().item()
    result.seconds = time.perf_counter() - start
    return result


def minutes(args: argparse.Namespace, data: Data, jobs: Sequence[Job]) -> float:
    """How long all will take, from a few steps of each kind."""
    threads, seconds = torch.get_num_threads(), dict[str, float]()
    for job in {job.label: job for job in jobs}.values():
        steps = CALIBRATION if job.directions < 100 else 2
        short = argparse.Namespace(**{**vars(args), "steps": steps})
        times = [train(short, data, job, lambda: None, evaluations=1).seconds for _ in range(2)]
        seconds[job.label] = times[1] / steps * args.steps  # the first one warms up
    torch.set_num_threads(threads)
    whole = sum(seconds[job.label] for job in jobs)
    return max(whole / min(args.workers, len(jobs)), max(seconds.values())) / 60


# ---- what is shown


def by_label(results: list[Result]) -> dict[str, list[Result]]:
    groups: dict[str, list[Result]] = {}
    for r in results:
        groups.setdefault(r.job.label, []).append(r)
    return groups


def table(results: list[Result]) -> str:
    """Markdown."""
    names = ("method", "seeds", "rate", "final training loss", "test accuracy, %", "forward passes", "seconds")
    rows = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for label, group in by_label(results).items():
        cells = (
            label, f"{len(group)}", f"{group[0].job.rate:g}", pool.plus_minus([r.losses[-1] for r in group], 4),
            pool.plus_minus([100 * r.test_accuracy for r in group], 2), f"{group[0].passes[-1]}",
            f"{statistics.mean(r.seconds for r in group):.1f}",
        )  # fmt: skip
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def mean_curve(group: list[Result]) -> list[float]:
    return [statistics.mean(losses) for losses in zip(*(r.losses for r in group), strict=True)]


def passes_until(group: list[Result], loss: float) -> float | None:
    """Forward passes until the mean curve is as low, between its points on a line; None: it never is."""
    curve, passes = mean_curve(group), group[0].passes
    for i, value in enumerate(curve):
        if value <= loss:
            if i == 0:
                return float(passes[0])
            share = (curve[i - 1] - loss) / (curve[i - 1] - value)
            return passes[i - 1] + share * (passes[i] - passes[i - 1])
    return None


def loss_at(group: list[Result], passes: float) -> float:
    """The mean curve's loss after so many forward passes, between its points on a line."""
    points = list(zip(group[0].passes, mean_curve(group), strict=True))
    for (p, before), (q, after) in pairwise(points):
        if q >= passes:
            return before + (after - before) * (passes - p) / (q - p)
    return points[-1][1]


def words(results: list[Result]) -> str:
    """What table and plot say."""
    groups = by_label(results)
    ste = groups.get(NAMES["ste"])
    ours = [g for g in groups.values() if g[0].job.method in ("guided", "fogzo")]
    fogzo = next((g for g in ours if g[0].job.method == "fogzo"), None)
    said = []
    for group in ours if ste else ():
        (a, da), (b, db) = (pool.mean_and_error([r.losses[-1] for r in g]) for g in (ste, group))
        apart = abs(a - b) / max((da * da + db * db) ** 0.5, 1e-12)
        level = f"{apart:.1f} standard errors apart" if apart == apart else "of one seed"
        side = "lower" if b < a else "higher"
        said.append(f"At equal steps {group[0].job.label} ends {side} than STE: {b:.4f} and {a:.4f}, {level}.")
        if group[0].passes[-1] > ste[0].passes[-1]:
            same = loss_at(group, ste[0].passes[-1])
            side = "lower" if same < a else "higher"
            said.append(f"After as many forward passes as all of STE's it is {side}: {same:.4f} and {a:.4f}.")
    for label, group in groups.items():
        if not label.startswith(NAMES["spsa"]):
            continue
        loss, passes = statistics.mean(r.losses[-1] for r in group), group[0].passes[-1]
        others = [
            f"{other[0].job.label} {reached(passes_until(other, loss), passes)}"
            for other in (fogzo, ste)
            if other is not None
        ]
        said.append(
            f"{label} ends at {loss:.4f} after {passes} forward passes; {', '.join(others) or 'alone'}."
        )
    return "\n".join(said)


def reached(needed: float | None, passes: int) -> str:
    """After how many passes, and how many times fewer that is."""
    if needed is None:
        return "does not get there in its steps"
    return f"is there after {needed:.0f}, {passes / max(needed, 1):.1f} times fewer"


def plot(results: list[Result], path: Path, title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained", sharey=True)
    for panel, axis in zip(panels, ("steps", "passes"), strict=True):
        for label, group in by_label(results).items():
            points = getattr(group[0], axis)[1:]  # 0 has no place on a logarithmic axis
            curves = torch.tensor([r.losses[1:] for r in group])
            named = f"{label} ({len(group)} seeds)"
            line = panel.plot(points, curves.mean(0), label=named, color=colour_of(label))[0]
            if len(group) > 1:
                low, high = curves.quantile(0.1, 0), curves.quantile(0.9, 0)
                panel.fill_between(points, low, high, alpha=0.15, color=line.get_color(), linewidth=0)
        panel.set(xlabel={"steps": "steps", "passes": "forward passes"}[axis], yscale="log")
        panel.grid(alpha=0.3, which="both")
    panels[1].set(xscale="log")
    panels[0].set(ylabel="training loss")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize="small")
    figure.suptitle(f"{title}; mean and 10th to 90th percentile", fontsize="medium")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    data, jobs, where = load(args.data), jobs_of(args), machine(torch.device(args.device))
    count = min(args.workers, len(jobs))
    print(
        f"{len(jobs)} runs of {args.steps} steps in {count} processes take about"
        f" {minutes(args, data, jobs):.1f} minutes",
        flush=True,
    )
    results = pool.run(
        functools.partial(train, args, data), jobs, args.steps, args.workers, ["bench.evidence.spsa"]
    )
    print(f"{table(results)}\nmean ± standard error over the seeds\n{words(results)}")
    name = args.name or Path(args.data).stem
    bits = f"{args.bits}-bit " if args.grid in GRIDS else ""
    plot(
        results,
        out / f"{name}.png",
        f"{Path(args.data).stem}: {bits}{args.grid} weights, {args.straight_through} STE",
    )
    rows = [{**asdict(r), "job": {**asdict(r.job), "label": r.job.label}} for r in results]
    given = {key: value for key, value in vars(args).items() if key != "out"}  # where a file lies is no result
    whole = {"machine": where, "arguments": given, "runs": rows}
    (out / f"{name}.json").write_text(json.dumps(whole, indent=1) + "\n")
    print(f"wrote {out / name}.png and {out / name}.json")


if __name__ == "__main__":
    main()
