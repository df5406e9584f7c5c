"""Plot of the kernel benchmark: share of copy speed per op and distribution, and speed against size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

Row = dict[str, Any]


#: One colour for one method in all plots, by how its label begins; the first that fits.
COLOURS = {
    "float": "black", "torchao-compiled": "#fc9272", "torchao-w4a8": "#fcbba1", "torchao": "#cb181d",
    "lsq": "#8c564b", "eager": "#c49c94", "mezo": "#e377c2", "modules": "#17becf", "ste-int4": "#bdbdbd",
    "ste-w4a8": "#d9d9d9", "ste": "#7f7f7f", "guided/model": "#98df8a", "guided/tensor, kappa 1": "#00441b",
    "guided": "#2ca02c", "slope": "#9467bd", "fogzo/tensor": "#6baed6", "fogzo/model, n = 4": "#08306b",
    "fogzo": "#1f77b4", "n-spsa, n = 1000": "#a63603", "n-spsa, n = 100": "#d94801",
    "n-spsa, n = 10": "#fd8d3c", "n-spsa, n = 7960": "#7f2704", "n-spsa": "#fdae6b",
}  # fmt: skip


def colour_of(method: str) -> str | None:
    """The colour of a method; None leaves the choice to matplotlib."""
    label = method.lower()
    return next((colour for begins, colour in COLOURS.items() if label.startswith(begins)), None)


def main_rows(rows: list[Row]) -> list[Row]:
    """Of the first row's dtypes and size and one tensor: as the benchmark orders them, the most important."""
    if not rows:
        return []
    by_op: dict[str, Row] = {}
    for row in rows:
        by_op.setdefault(row["op"], row)
    keys = ("latent", "grad", "out", "tensors", "elements")
    return [row for row in rows if all(row[k] == by_op[row["op"]][k] for k in keys)]


def bars(axes, rows: list[Row]) -> None:
    """Groups of bars: an op each, a distribution a bar."""
    ops = list(dict.fromkeys(row["op"] for row in rows))
    distributions = list(dict.fromkeys(row["distribution"] for row in rows))
    labelled = set()
    for i, op in enumerate(ops):
        found = sorted(
            (row for row in rows if row["op"] == op), key=lambda row: distributions.index(row["distribution"])
        )
        width = 0.8 / len(found)
        for j, row in enumerate(found):
            name = row["distribution"]
            label = None if name in labelled else "no noise" if name == "none" else name
            labelled.add(name)
            low, high = (row["copy_s"] / row[q] - row["share_of_copy"] for q in ("q75", "q25"))
            axes.bar(
                i - 0.4 + (j + 0.5) * width,
                100 * row["share_of_copy"],
                width,
                label=label,
                color=f"C{distributions.index(name)}",
                yerr=[[-100 * min(low, 0)], [100 * max(high, 0)]],
            )
    axes.axhline(100, color="black", linewidth=0.8)
    axes.axhline(90, color="black", linewidth=0.8, linestyle=":")
    axes.set_xticks(range(len(ops)), ops, rotation=20)
    axes.set(ylabel="speed, % of a copy of the same bytes")
    axes.legend(fontsize="small", ncols=6, loc="upper center", bbox_to_anchor=(0.5, -0.16))


def lines(axes, rows: list[Row], chosen: list[Row]) -> None:
    """Elements per second against size, for the first distribution of each op, one tensor and a list."""
    first: dict[str, Row] = {}
    for row in chosen:
        first.setdefault(row["op"], row)
    keys = ("latent", "grad", "out", "distribution")
    for i, (op, like) in enumerate(first.items()):
        same = [row for row in rows if row["op"] == op and all(row[k] == like[k] for k in keys)]
        for tensors in dict.fromkeys(row["tensors"] for row in same):
            points = sorted((r["elements"], r["elements_per_s"]) for r in same if r["tensors"] == tensors)
            style = "o-" if tensors == 1 else "x:"
            label = op if tensors == 1 else f"{op}, {tensors} tensors"
            axes.plot(*zip(*points, strict=True), style, color=f"C{i}", label=label)
    axes.set(xlabel="elements", ylabel="elements/s", yscale="log")
    axes.set_xscale("log", base=2)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="x-small", ncols=2)


def plot(rows: list[Row], path: Path, title: str) -> None:
    """Write the two plots, or a page that says that nothing was measured."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(15, 5.5), layout="constrained")
    chosen = main_rows(rows)
    if chosen:
        bars(left, chosen)
        lines(right, rows, chosen)
        like = chosen[0]
        tensors = "one tensor" if like["tensors"] == 1 else f"{like['tensors']} tensors"
        left.set_title(f"{like['elements']:,} elements, {tensors}")
    else:
        left.set_title("nothing was measured")
    figure.suptitle(title)
    figure.savefig(path, dpi=130)
    plt.close(figure)
