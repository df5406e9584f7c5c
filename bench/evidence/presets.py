"""Train a small byte-level LLaMA on Python's own sources with each preset, by STE and by FOGZO.

Every linear layer of the blocks is quantized; embedding and head stay as they are. Each method takes the best
of the given learning rates, by its mean training loss at the end over all seeds. Prints a table, writes every
curve to a JSON file, and plots the loss against steps.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path

import torch

import fogzo_kernels as fk

from . import pool, text

#: How weights, and inputs of linear layers, are quantized; None: not at all.
PRESETS: dict[str, tuple[fk.Quantizer, fk.Quantizer | None] | None] = {
    "none": None,
    "lsq": (fk.presets.lsq(2), None),
    "quest": (fk.presets.quest(2), None),
    "quest-w2a2": (fk.presets.quest(2), fk.presets.quest(2)),
}
ESTIMATORS = ("ste", "fogzo")
TAIL = 30  # steps at the end that a training loss is the mean of
SMOOTH = 15  # steps that a point of the plot is the mean of
VALIDATION_BATCHES = 8
WARM_UP = 0.1  # share of the steps


@dataclass(frozen=True)
class Job:
    """One training run."""

    preset: str
    estimator: str  # of the weights' gradients
    rate: float
    seed: int

    @property
    def method(self) -> tuple[str, str]:
        return self.preset, self.estimator


@dataclass
class Result:
    """What a run gives back."""

    job: Job
    validation_loss: float = 0.0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)

    @property
    def final(self) -> float:
        """Mean loss of the last steps."""
        return statistics.mean(self.losses[-TAIL:])


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.evidence.presets",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--presets", nargs="+", default=list(PRESETS), choices=list(PRESETS))
    add("--rates", nargs="+", type=float, default=[3e-3, 8e-3], help="learning rates to choose from")
    add("--kappa", type=float, default=1.0, help="(1 - beta) d of FOGZO at the end")
    add("--seeds", type=int, default=3)
    add("--steps", type=int, default=300)
    add("--batch", type=int, default=16, help="rows of a step")
    add("--context", type=int, default=64, help="bytes of a row")
    add("--hidden", type=int, default=128, help="width, a multiple of QuEST's block of 128")
    add("--layers", type=int, default=2)
    add("--bytes", type=int, default=2_000_000, help="of text, at most")
    add("--weight-decay", type=float, default=0.1)
    add("--alpha-rate", type=float, default=0.1, help="share of the learning rate that learned scales take")
    add("--workers", type=int, default=os.cpu_count(), help="processes")
    add("--out", default="bench/out", help="folder for the numbers")
    add("--plot", default="bench/out/presets.png")
    return parser.parse_args(argv)


def jobs_of(args: argparse.Namespace) -> list[Job]:
    methods = [(p, e) for p, e in product(args.presets, ESTIMATORS) if e == "ste" or PRESETS[p] is not None]
    return [Job(*method, rate, seed) for method in methods for rate in args.rates for seed in range(args.seeds)]


def train(args: argparse.Namespace, job: Job, progress: Callable[[], None]) -> Result:
    """One run; deterministic given the job."""
    torch.set_num_threads(1)  # runs are spread over processes
    torch.manual_seed(job.seed)
    data = text.sources(args.bytes)
    model = text.llama(args.hidden, args.layers, args.context)
    fogzo, preset = None, PRESETS[job.preset]
    if preset is not None:
        weights, inputs = preset
        fk.quantize_model(model, weights, activation=inputs, skip=["model.embed_tokens", "lm_head"])
        if job.estimator == "fogzo":
            fogzo = fk.Fogzo(model, total_steps=args.steps, kappa=args.kappa, directions=1, seed=job.seed)
    alpha_lr = args.alpha_rate * job.rate
    groups = fk.parameter_groups(model, weight_decay=args.weight_decay, alpha_lr=alpha_lr)
    optimizer = torch.optim.AdamW(groups, lr=job.rate, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: pool.rate_at(step, args.steps, WARM_UP)
    )
    generator = torch.Generator().manual_seed(job.seed)
    result, start = Result(job), time.perf_counter()
    for _ in range(args.steps):
        rows = text.batch(data.train, args.batch, args.context, generator)
        optimizer.zero_grad()
        if fogzo is None:
            loss = model(rows, labels=rows).loss
            loss.backward()
        else:
            loss = fogzo.backward(lambda rows=rows: model(rows, labels=rows).loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        result.losses.append(float(loss))
        progress()
    result.seconds = time.perf_counter() - start
    result.validation_loss = validation(args, model, data.validation)
    return result


@torch.no_grad()
def validation(args: argparse.Namespace, model: torch.nn.Module, held_out: torch.Tensor) -> float:
    """Loss on the same rows for every run."""
    model.eval()
    generator = torch.Generator().manual_seed(0)
    batches = [text.batch(held_out, args.batch, args.context, generator) for _ in range(VALIDATION_BATCHES)]
    return statistics.mean(float(model(rows, labels=rows).loss) for rows in batches)


def best(results: list[Result]) -> dict[tuple[str, str], list[Result]]:
    """The runs of each method at its best rate."""
    found: dict[tuple[str, str], list[Result]] = {}
    for method in dict.fromkeys(r.job.method for r in results):
        own = [r for r in results if r.job.method == method]
        by_rate = [[r for r in own if r.job.rate == rate] for rate in dict.fromkeys(r.job.rate for r in own)]
        found[method] = min(by_rate, key=lambda runs: statistics.mean(r.final for r in runs))
    return found


def table(chosen: dict[tuple[str, str], list[Result]]) -> str:
    """Markdown: losses in nats a byte."""
    lines = [
        "| weights | gradients | rate | first loss | training loss | validation loss | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for (preset, estimator), runs in chosen.items():
        first = statistics.mean(r.losses[0] for r in runs)
        cells = [
            "float32" if PRESETS[preset] is None else preset,
            "exact" if PRESETS[preset] is None else estimator.upper(),
            f"{runs[0].job.rate:g}",
            f"{first:.2f}",
            pool.plus_minus([r.final for r in runs], 3),
            pool.plus_minus([r.validation_loss for r in runs], 3),
            f"{statistics.mean(r.seconds for r in runs):.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(chosen: dict[tuple[str, str], list[Result]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = [p for p in PRESETS if PRESETS[p] is not None and any(q == p for q, _ in chosen)]
    figure, axes = plt.subplots(
        1,
        max(len(panels), 1),
        figsize=(4 * max(len(panels), 1), 3.6),
        sharey=True,
        layout="constrained",
        squeeze=False,
    )
    for panel, preset in zip(axes[0], panels or [""], strict=True):
        for (p, estimator), runs in chosen.items():
            if p != preset and PRESETS[p] is not None:
                continue
            curve = torch.tensor([r.losses for r in runs]).mean(0)
            smooth = min(SMOOTH, len(curve))
            points = curve[: len(curve) // smooth * smooth].view(-1, smooth).mean(1)
            steps = [smooth * (i + 0.5) for i in range(len(points))]
            label = "float32" if PRESETS[p] is None else estimator.upper()
            panel.plot(steps, points, label=label, color={"float32": "gray"}.get(label))
        panel.set(title=f"{preset}, 2 bits", xlabel="step", yscale="log")
        panel.grid(alpha=0.3, which="both")
        panel.legend(fontsize="small")
    axes[0][0].set_ylabel("training loss, nats a byte")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    results = pool.run(
        functools.partial(train, args), jobs_of(args), args.steps, args.workers, ["bench.evidence.text"]
    )
    chosen = best(results)
    print(table(chosen))
    print(f"mean ± standard error over {args.seeds} seeds, {args.steps} steps, best of the rates {args.rates}")
    rows = [{**asdict(r), "final": r.final} for r in results]
    (out / "presets.json").write_text(json.dumps({"arguments": vars(args), "runs": rows}, indent=1))
    plot(chosen, Path(args.plot))
    print(f"wrote {out / 'presets.json'} and {args.plot}")


if __name__ == "__main__":
    main()
