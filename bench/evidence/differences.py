"""What an ablation has found: tables of losses and of differences by seed, and one plot of all of them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from scipy import stats

from ..plots import colour_of
from . import pool
from .ablation import CELLS, METHODS, SEARCH_SEEDS, Result, best_rate, pace, searched_for

CONFIDENCE = 0.95
VERDICTS = ("win", "draw", "loss")
NEAR = 0.15  # share of a time by which another may differ to be called equal
WIDEST = 60.0  # percent that the plot has room for
OTHERS = [method for method in METHODS if method != "ste"]
Row = dict[int, float]  # a loss by seed


class Difference(NamedTuple):
    """Mean of differences by seed, the half of its interval, and the other side's mean loss."""

    mean: float
    half: float
    of: float

    @property
    def verdict(self) -> str:
        """Whether the interval has 0 in it; a side that diverged loses."""
        if not math.isfinite(self.mean):
            return "loss" if math.isfinite(self.of) else "draw"
        return "win" if self.mean + self.half < 0 else "loss" if self.mean - self.half > 0 else "draw"

    @property
    def percent(self) -> tuple[float, float]:
        return 100 * self.mean / self.of, 100 * self.half / self.of

    def __str__(self) -> str:
        """Wins are bold, losses italic."""
        mean, half = self.percent
        if not math.isfinite(mean):
            return "*diverged*"
        mark = {"win": "**", "loss": "*", "draw": ""}[self.verdict]
        return f"{mark}{mean:+.1f} ± {half:.1f}{mark}"


def difference(own: Row, other: Row) -> Difference | None:
    """Of the seeds that both have; None where that is one or none. A run that diverged makes it NaN."""
    seeds = sorted(own.keys() & other.keys())
    if len(seeds) < 2:
        return None
    mean, error = pool.mean_and_error([own[s] - other[s] for s in seeds])
    factor = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(seeds) - 1))
    return Difference(mean, factor * error, statistics.mean(other[s] for s in seeds))


class Found:
    """Results of fresh seeds, by what tables ask for."""

    def __init__(self, results: Sequence[Result]) -> None:
        self.results = results
        self.fresh = [r for r in results if r.job.seed not in SEARCH_SEEDS]
        made = {r.job.cell for r in self.fresh}
        self.cells = [name for name in CELLS if name in made]

    def runs(self, cell: str, method: str) -> list[Result]:
        """On fresh seeds, at the rate that the search chose; at any rate where there is no search."""
        own = [r for r in self.fresh if (r.job.cell, r.job.method) == (cell, method)]
        search = searched_for(self.results, cell, method)
        return [r for r in own if r.job.rate == best_rate(search)] if search else own

    def losses(self, cell: str, method: str, steps: int, figure: str | None = None) -> Row:
        """By seed; of the figure that the cell is judged by, or of another one."""
        runs = [r for r in self.runs(cell, method) if r.job.steps == steps]
        return {r.job.seed: r.loss if figure is None else r.figures[figure] for r in runs}

    def equal_steps(self, cell: str, method: str, figure: str | None = None) -> Difference | None:
        steps = CELLS[cell].steps
        return difference(*(self.losses(cell, m, steps, figure) for m in (method, "ste")))

    def time(self, cell: str, method: str) -> float:
        """Of STE's, at equal steps."""
        return pace(self.results, cell, method)

    def equal_time(self, cell: str, method: str, figure: str | None = None) -> Difference | None:
        """Against STE that took the time of methods with as many probes; None where that is not known."""
        steps, time = CELLS[cell].steps, 0.0
        own = self.losses(cell, method, steps, figure)
        if own:
            time = self.time(cell, method)
        made = {r.job.steps for r in self.runs(cell, "ste")}
        near = min(made, key=lambda one: abs(one / steps - time), default=steps)
        if not own or abs(near / steps - time) > NEAR * time:
            return None
        return difference(own, self.losses(cell, "ste", near, figure))

    def rate(self, cell: str, method: str) -> str:
        """The best one, with a mark where it is the least or the greatest that was tried."""
        losses = searched_for(self.results, cell, method)
        if not losses:
            return ""
        best, tried = best_rate(losses), list(losses)
        mark = "≤ " if best == tried[0] else "≥ " if best == tried[-1] else ""
        return f"{mark}{best:g}"


# ---- tables


def grid(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Markdown."""
    lines = [f"| {' | '.join(['', *heads])} |", "|---" * (1 + len(heads)) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join('' if x is None else str(x) for x in row)} |" for row in rows)])


def losses_of(found: Found) -> str:
    """Mean and standard error, in nats."""
    rows = []
    for cell in found.cells:
        losses = [list(found.losses(cell, method, CELLS[cell].steps).values()) for method in METHODS]
        rows.append([cell, *(pool.plus_minus(some, 4) if some else None for some in losses)])
    return grid(list(METHODS), rows)


def at_equal_steps(found: Found) -> str:
    """Differences to STE, percent of its loss."""
    return grid(
        OTHERS, [[cell, *(found.equal_steps(cell, method) for method in OTHERS)] for cell in found.cells]
    )


def at_equal_time(found: Found) -> str:
    """Differences to STE with more steps, percent of its loss, and the method's time as a multiple of STE's."""
    rows = []
    for cell in found.cells:
        row: list[object] = [cell]
        for method in OTHERS:
            if not found.losses(cell, method, CELLS[cell].steps):
                row.append(None)
                continue
            apart, time = found.equal_time(cell, method), f"{found.time(cell, method):.2f}x"
            row.append(time if apart is None else f"{apart}; {time}")
        rows.append(row)
    return grid(OTHERS, rows)


def others_of(found: Found) -> str:
    """What cells are not judged by: accuracy in percent, or another loss in nats."""
    rows = []
    for cell in found.cells:
        runs = [r for r in found.fresh if r.job.cell == cell]
        for figure in list(runs[0].figures)[1:]:
            row: list[object] = [f"{cell}: {figure}"]
            for method in METHODS:
                values = list(found.losses(cell, method, CELLS[cell].steps, figure).values())
                scaled = [100 * v for v in values] if figure == "accuracy" else values
                row.append(pool.plus_minus(scaled, 1 if figure == "accuracy" else 4) if values else None)
            rows.append(row)
    return grid(list(METHODS), rows)


def rates_of(found: Found) -> str:
    """The best rate of each method, and the rates that all methods tried."""
    rows = []
    for cell in found.cells:
        tried = list(searched_for(found.results, cell, "ste"))
        span = f"{tried[0]:g} to {tried[-1]:g}, {len(tried)} rates" if tried else None
        rows.append([cell, *(found.rate(cell, method) for method in METHODS), span])
    return grid([*METHODS, "tried"], rows)


def counts_of(found: Found) -> str:
    """In how many cells each method is ahead of STE, level with it, or behind."""
    rows = []
    for method in OTHERS:
        row: list[object] = [method]
        for way in (found.equal_steps, found.equal_time):
            verdicts = [d.verdict for d in (way(cell, method) for cell in found.cells) if d is not None]
            row.append(" / ".join(str(verdicts.count(one)) for one in VERDICTS))
        rows.append(row)
    return grid([f"{way}: {' / '.join(VERDICTS)}" for way in ("equal steps", "equal time")], rows)


TABLES = {
    "Losses, nats": losses_of,
    "Against STE at equal steps, % of its loss": at_equal_steps,
    "Against STE at equal time, % of its loss; time of STE's": at_equal_time,
    "Wins, draws, losses": counts_of,
    "Beside the loss that counts": others_of,
    "Best rates": rates_of,
}


def tables(results: Sequence[Result]) -> str:
    """All of them, each under its name."""
    found = Found(results)
    return "\n\n".join(f"{name}:\n\n{table(found)}" for name, table in TABLES.items())


# ---- the plot


def plot(results: Sequence[Result], path: Path) -> None:
    """A line for each cell and method: its difference to STE at equal steps, and a hollow one at equal time."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = Found(results)
    figure, panel = plt.subplots(figsize=(9, 2 + 1.1 * max(len(found.cells), 1)), layout="constrained")
    top, ticks, labelled = 0.0, [], set()
    for cell in found.cells:
        shown = [(m, found.equal_steps(cell, m), found.equal_time(cell, m)) for m in OTHERS]
        ticks.append((top - 0.5 * (len(OTHERS) - 1), cell))
        for method, *both in shown:
            color = colour_of(method)
            for apart, marker, y in zip(both, ("o", "s"), (top + 0.15, top - 0.25), strict=True):
                if apart is None or not math.isfinite(apart.mean):
                    continue
                mean, half = apart.percent
                inside = max(min(mean, WIDEST), -WIDEST)
                sign = marker if inside == mean else ">" if mean > 0 else "<"
                label = None if method in labelled else method
                labelled.add(method)
                style = {"color": color, "markersize": 4, "linewidth": 1, "label": label}
                ends = [[inside - max(mean - half, -WIDEST)], [min(mean + half, WIDEST) - inside]]
                panel.errorbar(
                    inside, y, xerr=[[max(e[0], 0)] for e in ends], fmt=sign,
                    markerfacecolor="white" if marker == "s" else color, **style,
                )  # fmt: skip
                for end, arrow in ((mean - half, "<"), (mean + half, ">")):
                    if abs(end) > WIDEST and inside == mean:  # the interval goes on
                        panel.plot(math.copysign(WIDEST, end), y, arrow, color=color, markersize=4)
            top -= 1
        panel.axhline(top, color="lightgray", linewidth=0.8)
        top -= 1
    panel.axvline(0, color="black", linewidth=0.8)
    panel.set_yticks([y for y, _ in ticks], [name for _, name in ticks])
    panel.set(xlim=(-WIDEST - 2, WIDEST + 2), ylim=(top, 1))
    panel.set_xlabel(f"loss against STE, %, with {100 * CONFIDENCE:.0f} % intervals; hollow: at equal time")
    panel.grid(axis="x", alpha=0.3)
    if labelled:
        figure.legend(loc="outside lower center", ncols=4, fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
