"""A few launches of large operands for a profiler that starts at cudaProfilerStart.

ncu --profile-from-start off --clock-control none python -m bench.profiled
"""

from __future__ import annotations

import argparse

import torch

from . import cases as c

OPS = ("perturb", "estimate", "adamw", "norm")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.profiled", description=__doc__)
    parser.add_argument("--elements", type=int, default=2**26)
    parser.add_argument("--ops", nargs="+", default=list(OPS), choices=list(c.OPS))
    parser.add_argument("--dtypes", default="bf16", choices=list(c.DTYPES))
    parser.add_argument("--distribution", default="uniform", choices=c.DISTRIBUTIONS)
    parser.add_argument("--backend", default="triton")
    parser.add_argument("--device", default="cuda", help="cpu: the calls alone, without a profiler")
    args = parser.parse_args(argv)
    on_gpu = args.device != "cpu"
    for op in args.ops:
        case = c.Case(op, args.dtypes, args.distribution, 1, args.elements)
        call = c.call(case, c.operands(case, torch.device(args.device)), args.backend)
        call()  # compiles
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.profiler.start()
        call()
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()


if __name__ == "__main__":
    main()
