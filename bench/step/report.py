"""Tables and plots of steps."""

from __future__ import annotations

import statistics
from pathlib import Path

import torch

from ..plots import colour_of
from .measure import Row
from .methods import BASE
from .models import Setting

Found = list[tuple[Setting, list[Row]]]
HEAD = ("method", "ms a step", f"of {BASE}", "quartiles", f"rest, of {BASE}", "peak MB", "launches", "calls",
        "MB by ops", "MB in passes")  # fmt: skip
#: Pairs of methods whose ratio a table has too: they have like quantizers, or differ by noise or probes.
PAIRS = (
    ("ste", "torchao"), ("guided", "torchao"), ("ste-int4", "torchao"), ("ste-int4", "torchao-compiled"),
    ("ste-w4a8", "torchao-w4a8"), ("ste", "lsq"), ("ste", "modules"), ("guided", "ste"), ("fogzo", "ste"),
    ("fogzo", "eager"),
)  # fmt: skip


def table(rows: list[Row]) -> str:
    base = rows[0]
    lines = [list(HEAD)]
    for row in rows:
        low, high = quartiles(row.ratios(base))
        lines.append([
            row.method, f"{1e3 * statistics.median(row.seconds):.2f}", f"{row.against(base):.3f}",
            f"{low:.3f} to {high:.3f}", f"{row.against(base, rest=True):.3f}", megabytes(row.peak_bytes),
            shown(row.launches), shown(row.calls), megabytes(row.bytes), megabytes(row.bytes_in_passes),
        ])  # fmt: skip
    kept = [i for i in range(len(HEAD)) if any(line[i] for line in lines[1:])]
    text = ["| " + " | ".join(line[i] for i in kept) + " |" for line in lines]
    return "\n".join([text[0], "|---" * len(kept) + "|", *text[1:]])


def quartiles(values: list[float]) -> tuple[float, float]:
    low, high = torch.tensor(values).quantile(torch.tensor([0.25, 0.75])).tolist()
    return low, high


def shown(value: float | None) -> str:
    return "" if value is None else f"{value:g}"


def megabytes(value: float | None) -> str:
    return "" if value is None else f"{value / 1e6:.1f}"


def title(setting: Setting, names: list[str]) -> str:
    """The values of these axes."""
    return ", ".join(f"{name.replace('_', '-')} {getattr(setting, name)}" for name in names)


def pairs(rows: list[Row]) -> str:
    """Ratios to other methods than the base."""
    by_method = {row.method: row for row in rows}
    found = [
        f"{one} of {other}: {by_method[one].against(by_method[other]):.3f}"
        for one, other in PAIRS
        if {one, other} <= set(by_method)
    ]
    return "\n".join(found)


def parts(rows: list[Row]) -> str:
    """Time by op, in percent of a step of the base."""
    step = statistics.median(rows[0].seconds)
    found = []
    for row in rows:
        by_size = sorted(row.parts.items(), key=lambda part: -part[1])
        said = ", ".join(f"{name} {100 * seconds / step:.2f}" for name, seconds in by_size)
        found += [f"{row.method}: {said}"] * bool(said)
    return f"ops, % of a {BASE} step\n  " + "\n  ".join(found) if found else ""


def plot(found: Found, names: list[str], path: Path) -> None:
    """A group of bars for each setting, a colour for each method; the rest is hatched, on top of passes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    methods = list(dict.fromkeys(row.method for _, rows in found for row in rows))
    width = 0.8 / len(methods)
    figure, axes = pyplot.subplots(figsize=(max(8, 3 * len(found)), 4))
    for i, (_, rows) in enumerate(found):
        for row in rows:
            j = methods.index(row.method)
            whole, rest = row.against(rows[0]), row.against(rows[0], rest=True)
            place = {"x": i - 0.4 + (j + 0.5) * width, "width": width, "color": colour_of(row.method)}
            axes.bar(height=whole - rest, **place)
            axes.bar(height=rest, bottom=whole - rest, hatch="////", edgecolor="white", linewidth=0, **place)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set(ylabel=f"time of a step, of {BASE}; hatched: not in passes", ylim=(0, None))
    axes.set_xticks(range(len(found)), [title(setting, names) for setting, _ in found])
    legend = [pyplot.Rectangle((0, 0), 1, 1, color=colour_of(method)) for method in methods]
    axes.legend(legend, methods, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    pyplot.close(figure)
