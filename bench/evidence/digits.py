"""Train a low-bit MLP on scikit-learn's digits with STE, FOGZO and n-SPSA, over several seeds.

Prints a table, and plots training loss against forward passes. ``make demo`` runs it as it is.
Learning rates are constant unless --decay says otherwise: without decay, the weights of STE oscillate
around their thresholds.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import statistics
import time
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import fogzo_kernels as fk
from bench.data import load

GRIDS = {"uniform": fk.Grid.uniform, "half_offset": fk.Grid.half_offset}
RATES = {"ste": 0.01, "fogzo": 0.02, "spsa": 0.01}  # each method's best of 0.005, 0.01, 0.02
EVALUATIONS = 30  # points of a curve


@dataclass(frozen=True)
class Job:
    """One training run."""

    method: str  # ste, fogzo or spsa
    directions: int
    seed: int
    rate: float

    @property
    def label(self) -> str:
        name = {"ste": "STE", "fogzo": "FOGZO", "spsa": "n-SPSA"}[self.method]
        return name if self.method == "ste" else f"{name}, n = {self.directions}"


@dataclass
class Result:
    """What a run gives back."""

    job: Job
    test_accuracy: float = 0.0
    seconds: float = 0.0
    peak_mb: float = 0.0
    passes: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.evidence.digits", description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--data", help="an .npz file with X and y, or a folder with MNIST's IDX files")
    add("--methods", nargs="+", default=["ste", "fogzo", "spsa"], choices=["ste", "fogzo", "spsa"])
    add("--bits", type=int, default=2, help="bits of the uniform and half_offset grids")
    add("--grid", default="uniform", choices=["uniform", "half_offset", "sign", "ternary"])
    add("--straight-through", default="identity", choices=list(fk.spec.straight_through.KINDS))
    add("--clip", action="store_true", help="derivative 0 outside the grid's range")
    add("--alpha", type=float, default=0.25)
    add("--kappa", type=float, help="(1 - beta) d at the end; by default 1 - beta is 1e-4")
    add("--n", type=int, nargs="+", default=[1], help="directions of FOGZO")
    add("--spsa-n", type=int, nargs="+", default=[1, 10], help="directions of n-SPSA")
    add("--seeds", type=int, default=8)
    add("--steps", type=int, default=1500)
    add("--batch", type=int, default=128)
    add("--hidden", type=int, nargs="*", default=[10])
    add("--rate", type=float, help=f"Adam's learning rate for all methods; by default {RATES}")
    add("--decay", default="constant", choices=["constant", "cosine"], help="learning rate over training")
    add("--device", default="cpu")
    add("--backend", help="by default the best available")
    add("--workers", type=int, default=os.cpu_count(), help="processes")
    add("--out", default="bench/out", help="folder for the plot and the numbers")
    return parser.parse_args(argv)


def jobs_of(args: argparse.Namespace) -> list[Job]:
    counts = {"ste": [0], "fogzo": args.n, "spsa": args.spsa_n}
    return [
        Job(method, n, seed, args.rate or RATES[method])
        for method in args.methods
        for n in counts[method]
        for seed in range(args.seeds)
    ]


def build(args: argparse.Namespace, features: int, classes: int) -> nn.Module:
    """An MLP whose weights are all quantized; they start normal, with alpha for deviation."""
    sizes = [features, *args.hidden, classes]
    layers: list[nn.Module] = []
    for i, (fan_in, fan_out) in enumerate(pairwise(sizes)):
        layers += [nn.ReLU()] if i else []
        layers.append(nn.Linear(fan_in, fan_out))
        nn.init.normal_(layers[-1].weight, std=args.alpha)
        nn.init.zeros_(layers[-1].bias)
    grid = GRIDS[args.grid](args.bits) if args.grid in GRIDS else getattr(fk.Grid, args.grid)()
    straight_through = fk.StraightThrough(args.straight_through, clip=args.clip)
    model = nn.Sequential(*layers)
    fk.quantize_model(
        model, fk.Quantizer(grid, fk.Scale.fixed(args.alpha), straight_through), backend=args.backend
    )
    return model.to(args.device)


def estimator(args: argparse.Namespace, job: Job, model: nn.Module) -> fk.Fogzo | None:
    if job.method == "ste":
        return None
    if job.method == "spsa":  # beta = 0: no guide at all
        mix = {"one_minus_beta": 1.0, "schedule": "constant"}
    else:
        mix = {"one_minus_beta": 1e-4} if args.kappa is None else {"kappa": args.kappa}
    return fk.Fogzo(
        model, total_steps=args.steps, directions=job.directions, seed=job.seed,
        backend=args.backend, **mix,
    )  # fmt: skip


def train(args: argparse.Namespace, job: Job) -> Result:
    """One run; deterministic given the job."""
    torch.set_num_threads(1)  # runs are spread over processes
    torch.manual_seed(job.seed)
    data = load(args.data)
    train_x, train_y, test_x, test_y = (t.to(args.device) for t in data)
    model = build(args, train_x.shape[1], data.classes)
    optimizer = torch.optim.Adam(model.parameters(), lr=job.rate)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
    fogzo = estimator(args, job, model)
    result, passes, start = Result(job), 0, time.perf_counter()

    @torch.no_grad()
    def evaluate() -> None:
        result.passes.append(passes)
        result.losses.append(F.cross_entropy(model(train_x), train_y).item())

    for step in range(args.steps):
        if step % max(args.steps // EVALUATIONS, 1) == 0:
            evaluate()
        rows = torch.randint(len(train_x), (args.batch,)).to(args.device)
        x, y = train_x[rows], train_y[rows]
        optimizer.zero_grad()
        if fogzo is None:
            F.cross_entropy(model(x), y).backward()
        else:
            fogzo.step(lambda x=x, y=y: F.cross_entropy(model(x), y))
        optimizer.step()
        if args.decay == "cosine":
            cosine.step()
        passes += 1 + 2 * job.directions
    evaluate()
    with torch.no_grad():
        result.test_accuracy = (model(test_x).argmax(1) == test_y).float().mean().item()
    result.seconds = time.perf_counter() - start
    result.peak_mb = peak_mb(args.device)
    return result


def peak_mb(device: str) -> float:
    """Peak memory in MB: of the GPU's allocator, or of this process."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def run(args: argparse.Namespace) -> list[Result]:
    """All jobs over processes; a process serves one job, so that peak memory is the job's own."""
    jobs = jobs_of(args)
    server = "forkserver" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if server else "spawn")
    if server:
        context.set_forkserver_preload(["bench.data", "fogzo_kernels", "sklearn.datasets", "tqdm"])
    with context.Pool(args.workers, maxtasksperchild=1) as pool:
        longest_first = pool.imap_unordered(partial(train, args), jobs[::-1])
        results = list(tqdm(longest_first, total=len(jobs), unit="run", desc="training"))
    return sorted(results, key=lambda r: jobs.index(r.job))


def by_label(results: list[Result]) -> dict[str, list[Result]]:
    groups: dict[str, list[Result]] = {}
    for r in results:
        groups.setdefault(r.job.label, []).append(r)
    return groups


def mean_and_deviation(values: list[float]) -> tuple[float, float]:
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def table(results: list[Result]) -> str:
    columns = "{:16s} {:>6s} {:>21s} {:>18s} {:>8s} {:>8s} {:>8s}"
    names = "method", "rate", "final training loss", "test accuracy, %", "passes", "seconds", "peak MB"
    rows = [columns.format(*names)]
    rows.append("-" * len(rows[0]))
    for label, group in by_label(results).items():
        cells = (
            f"{group[0].job.rate:g}",
            "{:.4f} +- {:.4f}".format(*mean_and_deviation([r.losses[-1] for r in group])),
            "{:.2f} +- {:.2f}".format(*mean_and_deviation([100 * r.test_accuracy for r in group])),
            f"{group[0].passes[-1]}",
            f"{statistics.mean(r.seconds for r in group):.1f}",
            f"{max(r.peak_mb for r in group):.0f}",
        )
        rows.append(columns.format(label, *cells))
    rows.append(f"mean +- standard deviation over {len(group)} seeds")
    return "\n".join(rows)


def plot(results: list[Result], path: Path, title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for label, group in by_label(results).items():
        passes = group[0].passes[1:]  # no pass has no place on a logarithmic axis
        curves = torch.tensor([r.losses[1:] for r in group])
        line = axes.plot(passes, curves.mean(0), label=label)[0]
        if len(group) > 1:
            low, high = curves.quantile(0.1, 0), curves.quantile(0.9, 0)
            color = line.get_color()
            axes.fill_between(passes, low, high, alpha=0.15, color=color, linewidth=0)
    axes.set(xlabel="forward passes", ylabel="training loss", title=title, xscale="log", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend(title="mean and 10th to 90th percentile", fontsize="small", title_fontsize="small")
    figure.savefig(path, dpi=150)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    load(args.data)  # complain before starting processes
    results = run(args)
    print(table(results))
    name = Path(args.data).stem if args.data else "digits"
    bits = f"{args.bits}-bit " if args.grid in GRIDS else ""
    plot(results, out / f"{name}.png", f"{name}: {bits}{args.grid} weights, {args.straight_through} STE")
    rows = [{**vars(r), "job": {**vars(r.job), "label": r.job.label}} for r in results]
    (out / f"{name}.json").write_text(json.dumps({"arguments": vars(args), "runs": rows}, indent=1))
    print(f"wrote {out / name}.png and {out / name}.json")


if __name__ == "__main__":
    main()
