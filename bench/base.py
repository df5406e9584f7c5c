"""Two commits in one run: what another one takes for the same work as this checkout, in turns."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

ROOT = Path(__file__).parents[1]
#: What the native modules are built of: where it is the same, they are not built again.
NATIVE = ("csrc", "setup.py", "build_cuda.py", "cuda_units.py", "constraints.txt")
#: Each side runs its own program of this name, so that the options are those that both know.
PROGRAMS: dict[str, list[str]] = {
    "bench.kernels": [
        "--sizes", "2^22", "--tensors", "16", "--ops", "perturb", "estimate", "quantize", "adamw",
        "--dtypes", "fp32", "bf16", "--distributions", "uniform", "--no-baselines",
    ],
    "bench.step": ["--no-traffic", "--methods", "fogzo", "--turns", "12"],
}  # fmt: skip
Times = dict[str, float]


def git(*words: str) -> str:
    found = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True)
    if found.returncode:
        raise SystemExit(f"git {' '.join(words)} failed: {found.stderr.strip()}")
    return found.stdout.strip()


@contextmanager
def checkout(ref: str) -> Iterator[Path]:
    """A built tree of the commit, gone afterwards.

    Raises:
        SystemExit: there is no such commit, or it cannot be built; the message says why.
    """
    commit = git("rev-parse", "--verify", f"{ref}^{{commit}}")
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        git("worktree", "add", "--detach", str(tree), commit)
        try:
            same = subprocess.run(["git", "-C", str(ROOT), "diff", "--quiet", commit, "--", *NATIVE]).returncode
            modules = list((ROOT / "fogzo_kernels").glob("*.so"))
            if same == 0 and modules:
                for module in modules:
                    shutil.copy(module, tree / "fogzo_kernels")
            else:
                print(f"building {ref}, which takes minutes", file=sys.stderr, flush=True)
                run(tree, ["setup.py", "build_ext", "--inplace"])
            yield tree
        finally:
            git("worktree", "remove", "--force", str(tree))


def run(tree: Path, words: Sequence[str]) -> None:
    """Python in a tree, whose package it imports."""
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    found = subprocess.run([sys.executable, *words], cwd=tree, env=environment, capture_output=True, text=True)
    if found.returncode:
        raise SystemExit(f"{' '.join(words)} failed in {tree}:\n{found.stdout[-2000:]}{found.stderr[-4000:]}")


def times_of(name: str, rows: Sequence[dict[str, Any]]) -> Times:
    """Median seconds by what was measured."""
    if name == "bench.step":
        return {f"step, {row['method']}": row["median_s"] for row in rows}
    keys = ("op", "backend", "distribution", "latent", "grad", "out")
    return {", ".join(str(row[key]) for key in keys): row["median_s"] for row in rows}


def measure(tree: Path) -> Times:
    """Of all programs, once."""
    found: Times = {}
    for name, options in PROGRAMS.items():
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "found.json"
            run(tree, ["-m", name, *options, "--json", str(file)])
            found |= times_of(name, json.loads(file.read_text())["rows"])
    return found


def table(base: Sequence[Times], ours: Sequence[Times]) -> str:
    """Markdown: medians, and the ratio of turns that lie beside each other with its range."""
    lines = ["| | base, ms | this, ms | times as fast | range |", "|---|---|---|---|---|"]
    for what in ours[0]:
        pairs = [(a[what], b[what]) for a, b in zip(base, ours, strict=True) if what in a]
        if not pairs:
            lines.append(f"| {what} | not there | {1e3 * ours[0][what]:.3f} | | |")
            continue
        ratios = [a / b for a, b in pairs]
        theirs, here = (1e3 * statistics.median(side) for side in zip(*pairs, strict=True))
        span = f"{min(ratios):.2f} to {max(ratios):.2f}"
        lines.append(f"| {what} | {theirs:.3f} | {here:.3f} | {statistics.median(ratios):.2f} | {span} |")
    return "\n".join(lines)


def compare(ref: str, rounds: int) -> str:
    """The table of a commit against this checkout, each measured ``rounds`` times in turns."""
    base: list[Times] = []
    ours: list[Times] = []
    with checkout(ref) as tree, tqdm(total=2 * rounds, desc=f"{ref} and this checkout", unit="run") as bar:
        for _ in range(rounds):
            for where, found in ((tree, base), (ROOT, ours)):
                found.append(measure(where))
                bar.update()
    return table(base, ours)
