"""What a step of each method does: its slope, the codes that it flips, its angle to the guide."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

import fogzo_kernels as fk
from fogzo_kernels.nn.module import QuantizedModule

from . import pool
from .ablation import CELLS, Explained, Job, Result, best_rate, searched, train
from .tasks import Figures

EXPLAINED = ("digits, clipped", "mnist, clipped", "llama, 600 steps")  # 740, 7,940 and 82,000 weights
EXPLAINED_METHODS = ("ste", "guided/tensor", "fogzo/model")
SEEDS = (2000, 2001, 2002)
WINDOW = 0.1  # share of the steps that a part has
PARTS = {"start": 0.0, "middle": 0.5 - WINDOW / 2, "end": 1 - WINDOW}  # where each begins


def codes_of(model: nn.Module) -> Tensor:
    return torch.cat([m.codes().flatten() for m in model.modules() if isinstance(m, QuantizedModule)])


def epsilon_of(model: nn.Module) -> float:
    """Of a probe, in units of delta; all weights of a model have the same."""
    return next(m.quantizer.epsilon for m in model.modules() if isinstance(m, QuantizedModule))


class Watch:
    """Measures the steps of some parts of a run. Steps between parts cost nothing."""

    def __init__(self, steps: int) -> None:
        length = max(round(WINDOW * steps), 2)
        starts = {part: max(min(round(at * steps), steps - length), 0) for part, at in PARTS.items()}
        self.spans = {part: range(first, first + length) for part, first in starts.items()}
        self.seen: dict[str, list[Figures]] = {part: [] for part in PARTS}
        self.codes: Tensor | None = None

    def __call__(self, step: int, model: nn.Module, fogzo: fk.Fogzo) -> None:
        parts = [part for part, span in self.spans.items() if step in span]
        if not parts:
            self.codes = None
            return
        before, self.codes, found = self.codes, codes_of(model), fogzo.stats()
        figures = {"flips along the probe": found["code_changes"], "cosine": found["cosine"]}
        if before is not None:
            figures["flips in the step"] = float((before != self.codes).float().mean())
        if fogzo.directions == 1:  # the cosine has the sign of s c
            size = found["difference"] / (2 * epsilon_of(model) * found["guide_norm"])
            figures["slope"] = math.copysign(size, found["cosine"])
        for part in parts:
            self.seen[part].append(figures)

    def parts(self) -> dict[str, Figures]:
        """Means over the steps that have a figure, and more of the slope."""
        return {part: summary(seen) for part, seen in self.seen.items()}


def summary(seen: Sequence[Figures]) -> Figures:
    names = dict.fromkeys(name for figures in seen for name in figures)
    found = {}
    for name in names:
        values = [f[name] for f in seen if name in f and math.isfinite(f[name])]
        if not values:
            continue
        found[name] = statistics.mean(values)
        if name == "slope":
            found["deviation of the slope"] = statistics.pstdev(values)
            found["negative slopes"] = sum(v < 0 for v in values) / len(values)
    return {name: float(f"{value:.4g}") for name, value in found.items()}


def watched(job: Job, progress: Callable[[], None]) -> list[Explained]:
    """One run again, watched."""
    watch = Watch(job.steps)
    train(job, progress, watch)
    return [Explained(job, part, figures) for part, figures in watch.parts().items()]


def jobs_of(results: Sequence[Result], cell: str) -> list[Job]:
    """Each method at its best rate."""
    rates = {m: searched(results, cell, m) for m in EXPLAINED_METHODS}
    return [
        Job(cell, m, best_rate(losses), seed, CELLS[cell].steps)
        for m, losses in rates.items()
        if losses
        for seed in SEEDS
    ]


SHOWN = {
    "slope": "c / N", "deviation of the slope": "its deviation", "negative slopes": "share below 0",
    "flips along the probe": "codes that flip along the probe, %",
    "flips in the step": "codes that flip in a step, %",
    "cosine": "cosine to the guide",
}  # fmt: skip


def table(explained: Sequence[Explained]) -> str:
    """Markdown: means over seeds at start, middle and end."""
    rows: dict[tuple[str, str], list[Explained]] = {}
    for one in explained:
        rows.setdefault((one.job.cell, one.job.method), []).append(one)
    lines = [f"| {' | '.join(['start, middle, end', *SHOWN.values()])} |", "|---" * (1 + len(SHOWN)) + "|"]
    for (cell, method), some in rows.items():
        cells = [f"{cell}: {method}"]
        for name, head in SHOWN.items():
            by_part = [[e.figures[name] for e in some if e.part == p and name in e.figures] for p in PARTS]
            factor = 100 if head.endswith("%") else 1
            cells.append(", ".join(f"{factor * statistics.mean(v):.3g}" for v in by_part if v))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def run(
    results: Sequence[Result], cells: Sequence[str], workers: int | None, preload: Sequence[str]
) -> list[Explained]:
    """Of the cells that have a search."""
    found: list[Explained] = []
    for cell in (cell for cell in EXPLAINED if cell in cells):
        jobs = jobs_of(results, cell)
        for parts in pool.run(watched, jobs, CELLS[cell].steps, workers, preload) if jobs else ():
            found += parts
    return found
