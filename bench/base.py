"""Time two commits in turns on one machine, and list what lost speed.

``python -m bench.base BASE`` measures this checkout against the commit BASE, and ``python -m bench.base BASE
OTHER`` two commits. Each may be a folder with a built tree. Words after ``--`` are options of
``bench.kernels``, such as ``-- --ops perturb --sizes 2^24``. The exit status is 1 if a row is marked as lost.

Each round runs each side's own programs in fresh processes, first of BASE, then of the other side. A row's time
in a round is the lower quartile of its samples, or else their median, since other programs only add to it. A
row has lost if its least time says so, and the median of the rounds' ratios, too. While one has, the rounds go
on, up to three times as many.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

ROOT = Path(__file__).parents[1]
#: What the native modules are built of: where it is the same, they are not built again.
NATIVE = ("csrc", "setup.py", "build_cuda.py", "cuda_units.py", "constraints.txt")
BUILT = ROOT / "build" / "base"  # native modules of commits that were built before
#: Each side runs its own program of this name, so that the options are those that both know.
PROGRAMS: dict[str, list[str]] = {
    "bench.kernels": [
        "--quick", "--no-baselines", "--budget", "inf", "--sizes", "2^22", "2^14", "--tensors", "1",
        "--dtypes", "fp32", "bf16", "fp16", "int8", "--distributions", "uniform",
    ],
    "bench.step": ["--no-traffic", "--methods", "fogzo", "--turns", "12"],
}  # fmt: skip
Times = dict[str, float]


# ---- trees


def git(*words: str) -> str:
    found = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True)
    if found.returncode:
        raise SystemExit(f"git {' '.join(words)} failed: {found.stderr.strip()}")
    return found.stdout.strip()


def modules_of(tree: Path) -> list[Path]:
    return sorted((tree / "fogzo_kernels").glob("*.so"))


def check_built(tree: Path) -> None:
    """Leave if the native module is older than its sources: its times would be those of other code."""
    built = min((module.stat().st_mtime for module in modules_of(tree)), default=0.0)
    changed = [path for name in NATIVE for path in (tree / name, *(tree / name).rglob("*")) if path.is_file()]
    newer = [path for path in changed if path.stat().st_mtime > built]
    if newer:
        raise SystemExit(
            f"{tree} must be built, as {newer[0].relative_to(tree)} is newer: make {tree}/.venv/built"
        )


@contextmanager
def checkout(ref: str) -> Iterator[Path]:
    """A built tree of a commit, gone afterwards, or the folder that `ref` names.

    Raises:
        SystemExit: there is no such commit, or it cannot be built; the message says why.
    """
    if (Path(ref) / "fogzo_kernels").is_dir():
        tree = Path(ref).resolve()
        check_built(tree)
        yield tree
        return
    commit = git("rev-parse", "--verify", f"{ref}^{{commit}}")
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        git("worktree", "add", "--detach", str(tree), commit)
        try:
            build(tree, commit)
            yield tree
        finally:
            git("worktree", "remove", "--force", str(tree))


def build(tree: Path, commit: str) -> None:
    """Put the native modules into a tree. They are built once for all commits with the same sources."""
    cuda = "1" if torch.cuda.is_available() else "0"
    sources = [line.split()[2][:8] for line in git("ls-tree", commit, *NATIVE).splitlines()]
    kept = BUILT / "-".join([*sources, f"python3.{sys.version_info.minor}", torch.__version__, cuda])
    if not kept.exists():
        run(tree, ["setup.py", "build_ext", "--inplace"], FOGZO_BUILD_CUDA=cuda)
        part = kept.with_name(f"{kept.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        for module in modules_of(tree):
            shutil.copy(module, part)
        part.rename(kept)
    for module in kept.iterdir():
        shutil.copy(module, tree / "fogzo_kernels")


# ---- times


def run(tree: Path, words: Sequence[str], **variables: str) -> None:
    """Python in a tree, whose package it imports."""
    environment = {**os.environ, **variables, "PYTHONPATH": str(tree)}
    found = subprocess.run([sys.executable, *words], cwd=tree, env=environment, capture_output=True, text=True)
    if found.returncode:
        raise SystemExit(f"{' '.join(words)} failed in {tree}:\n{found.stdout[-2000:]}{found.stderr[-4000:]}")


def name_of(row: dict[str, Any]) -> str:
    """What a row of a program measured."""
    if "op" not in row:
        return f"step, {row['method']}"
    parts = [
        row["op"],
        row["backend"],
        row["distribution"],
        "/".join(row[k] for k in ("latent", "grad", "out")),
    ]
    parts.append(f"{row['elements']} elements")
    parts += [f"{name.replace('_', ' ')} {row[name]}" for name in ("scale_length", "block") if row[name]]
    parts += [f"{row['tensors']} {'equal ' * row['equal']}tensors"] if row["tensors"] > 1 else []
    return ", ".join(parts)


def measure(tree: Path, programs: dict[str, list[str]]) -> Times:
    """Seconds of what the programs measure, each in a process."""
    found: Times = {}
    for name, options in programs.items():
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "found.json"
            run(tree, ["-m", name, *options, "--json", str(file)])
            rows = json.loads(file.read_text())["rows"]
        found |= {name_of(row): row.get("q25", row["median_s"]) for row in rows}
    return found


def compare(base: Sequence[Times], ours: Sequence[Times], limit: float) -> tuple[str, list[str]]:
    """A table in Markdown, and the rows that take more than `limit` of the base's time."""
    lines = ["| | base, ms | this, ms | of base | in rounds | |", "|---|---|---|---|---|---|"]
    lost = []
    for what in ours[0]:
        pairs = [(a[what], b[what]) for a, b in zip(base, ours, strict=True) if what in a]
        if not pairs:
            lines.append(f"| {what} | not there | {1e3 * min(b[what] for b in ours):.3f} | | | |")
            continue
        theirs, here = map(min, zip(*pairs, strict=True))
        ratios = [b / a for a, b in pairs]
        if min(here / theirs, statistics.median(ratios)) > limit:
            lost.append(what)
        lines.append(
            f"| {what} | {1e3 * theirs:.3f} | {1e3 * here:.3f} | {here / theirs:.2f}"
            f" | {min(ratios):.2f} to {max(ratios):.2f} | {'LOST' * (what in lost)} |"
        )
    return "\n".join(lines), lost


def main(argv: list[str] | None = None) -> int:
    """1 if a row has lost speed."""
    words = sys.argv[1:] if argv is None else argv
    split = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(
        prog="python -m bench.base", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("base", help="a commit, or a folder with a built tree")
    parser.add_argument("other", nargs="?", default=str(ROOT), help="by default this checkout")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--limit", type=float, default=5.0, help="percent of the time that a row may lose")
    parser.add_argument("--programs", nargs="+", default=list(PROGRAMS), choices=list(PROGRAMS))
    args = parser.parse_args(words[:split])
    programs = {name: PROGRAMS[name] for name in args.programs}
    if words[split + 1 :]:
        programs = {"bench.kernels": [*PROGRAMS["bench.kernels"], *words[split + 1 :]]}
    refs, limit = [args.base, args.other], 1 + args.limit / 100
    found: list[list[Times]] = [[] for _ in refs]
    with ExitStack() as stack, tqdm(total=len(refs) * (1 + args.rounds), unit="run") as bar:
        trees = []
        for ref in refs:
            bar.set_description(f"building {ref}, minutes for a commit that was not built before")
            trees.append(stack.enter_context(checkout(ref)))
            bar.update()
        for turn in range(3 * args.rounds):
            if turn >= args.rounds:
                if not compare(*found, limit)[1]:
                    break
                bar.total += len(refs)
            for ref, tree, times in zip(refs, trees, found, strict=True):
                bar.set_description(f"timing {ref}")
                times.append(measure(tree, programs))
                bar.update()
    table, lost = compare(*found, limit)
    print(table)
    print(
        f"{len(lost)} of {len(found[1][0])} rows lost more than {args.limit:g} %: {'; '.join(lost) or 'none'}"
    )
    return int(bool(lost))


if __name__ == "__main__":
    sys.exit(main())
