"""``python -m bench.sass``: see bench/sass/__init__.py."""

from __future__ import annotations

import argparse
import json
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from tqdm import tqdm

import bench.sass

from . import cuda, triton
from .report import HEADINGS, Row, Variant, line

ARCHS = (80, 90, 100)
BACKENDS = ("triton", "cuda")


def row_of(job: tuple[Variant, int]) -> Row:
    return triton.row(*job)


def triton_rows(args: argparse.Namespace) -> list[Row]:
    jobs = [(v, arch) for arch in args.arch for v in triton.variants() if wanted(v, args)]
    rows = []
    with ProcessPoolExecutor(args.workers) as pool, tqdm(total=len(jobs), unit="kernel") as progress:
        for (variant, _), found in zip(jobs, pool.map(row_of, jobs), strict=True):
            progress.write(line(variant, found))
            progress.update()
            rows.append(found)
    return rows


def cuda_rows(args: argparse.Namespace) -> list[Row]:
    if reason := cuda.unavailable():
        print(f"the CUDA kernels are left out: {reason}")
        return []
    rows = []
    for arch in args.arch:
        for variant, found in cuda.rows(arch):
            if wanted(variant, args):
                print(line(variant, found))
                rows.append(found)
    return rows


def wanted(variant: Variant, args: argparse.Namespace) -> bool:
    return set(args.only) <= set(str(variant).split())


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.sass",
        description=bench.sass.__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHS, help="compute capabilities times ten")
    parser.add_argument("--backend", nargs="+", default=BACKENDS, choices=BACKENDS, help="whose kernels")
    parser.add_argument("--only", nargs="+", default=(), help="words of a variant's name, all of them")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--workers", type=int, default=2, help="processes that compile")
    args = parser.parse_args(argv)
    print(HEADINGS)
    rows = triton_rows(args) if "triton" in args.backend else []
    if "cuda" in args.backend:
        rows += cuda_rows(args)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
