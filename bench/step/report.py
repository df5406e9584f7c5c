"""Tables and plots of steps."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from .measure import Row
from .models import Setting

Found = list[tuple[Setting, list[Row]]]
HEAD = ("method", "ms a step", "of an STE step", "rest, of an STE step", "peak MB", "launches", "calls",
        "MB by ops", "MB in passes")  # fmt: skip


def table(rows: list[Row]) -> str:
    ste = rows[0]
    lines = [list(HEAD)]
    for row in rows:
        lines.append([
            row.method, f"{1e3 * statistics.median(row.seconds):.2f}", f"{row.against(ste):.3f}",
            f"{row.against(ste, rest=True):.3f}", megabytes(row.peak_bytes), shown(row.launches),
            shown(row.calls), megabytes(row.bytes), megabytes(row.bytes_in_passes),
        ])  # fmt: skip
    kept = [i for i in range(len(HEAD)) if any(line[i] for line in lines[1:])]
    text = ["| " + " | ".join(line[i] for i in kept) + " |" for line in lines]
    return "\n".join([text[0], "|---" * len(kept) + "|", *text[1:]])


def shown(value: float | None) -> str:
    return "" if value is None else f"{value:g}"


def megabytes(value: float | None) -> str:
    return "" if value is None else f"{value / 1e6:.1f}"


def parts(rows: list[Row]) -> str:
    """Time by op, in percent of an STE step."""
    step = statistics.median(rows[0].seconds)
    found = []
    for row in rows:
        by_size = sorted(row.parts.items(), key=lambda part: -part[1])
        said = ", ".join(f"{name} {100 * seconds / step:.2f}" for name, seconds in by_size)
        found += [f"{row.method}: {said}"] * bool(said)
    return "ops, % of an STE step\n  " + "\n  ".join(found) if found else ""


def plot(found: Found, axes_names: list[str], path: Path) -> None:
    """Of one setting bars: passes, and the rest on top of them; of several a line for each method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 3.5))
    if len(found) == 1:
        bars(axes, found[0][1])
    else:
        labels = [", ".join(f"{n} {getattr(setting, n)}" for n in axes_names) for setting, _ in found]
        for i, row in enumerate(found[0][1]):
            axes.plot(labels, [rows[i].against(rows[0]) for _, rows in found], "o-", label=row.method)
        axes.tick_params(axis="x", rotation=20)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set(ylabel="time, in STE steps", ylim=(0, None))
    axes.legend(ncols=4, loc="lower right", bbox_to_anchor=(1, 1), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    pyplot.close(figure)


def bars(axes: Any, rows: list[Row]) -> None:
    for i, row in enumerate(rows):
        whole, rest = row.against(rows[0]), row.against(rows[0], rest=True)
        axes.bar(i, whole - rest, color="C0", label=None if i else "forwards and backward")
        axes.bar(i, rest, bottom=whole - rest, color="C1", label=None if i else "the rest")
    axes.set_xticks(range(len(rows)), [row.method for row in rows], rotation=20)
