"""Time that the host spends in a call over many tensors of 8 x 8, with plain and with prepared lists.

On the CPU the kernels' own work is in it, which is small. For Triton without a GPU, launches do nothing.
"""

from __future__ import annotations

import argparse
import importlib
import os
import pkgutil
import time
from collections.abc import Callable

ELEMENTS = 64  # of a tensor


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.host", description=__doc__)
    parser.add_argument("--tensors", nargs="+", type=int, default=[10, 100, 300, 1000])
    parser.add_argument("--backend", choices=["cpu", "triton"], default="cpu")
    args = parser.parse_args(argv)
    if args.backend == "triton":
        os.environ["TRITON_INTERPRET"] = "1"

    import torch  # Triton reads the environment when it is imported

    import fogzo_kernels as fk

    from . import cases

    torch.set_num_threads(1)
    if args.backend == "triton":
        without_launches()
    print(f"{'op':12} {'tensors':>7} {'plain':>9} {'prepared':>9}  microseconds")
    for op in cases.OPS:
        for count in args.tensors:
            case = cases.Case(op, "fp32", "uniform", count, count * ELEMENTS, equal=True)
            plain = cases.operands(case, torch.device("cpu"))
            lists = {n: fk.TensorList(v) for n, v in plain._asdict().items() if isinstance(v, list) and v}
            calls = [cases.call(case, o, args.backend) for o in (plain, plain._replace(**lists))]
            print(f"{op:12} {count:7} {microseconds(calls[0]):9.1f} {microseconds(calls[1]):9.1f}", flush=True)


def without_launches() -> None:
    """Triton's backend up to its launches."""
    from fogzo_kernels.backends import triton
    from fogzo_kernels.ops import memory

    for info in pkgutil.iter_modules(triton.__path__):
        module = importlib.import_module(f"{triton.__name__}.{info.name}")
        if hasattr(module, "launch"):
            module.launch = lambda *args, **options: None
    memory.alphas = lambda *args: None  # on a GPU the kernels look at them


def microseconds(call: Callable[[], object], repeats: int = 7, least: float = 0.02) -> float:
    """The least of some means: whatever else runs only adds to it."""
    call()
    start = time.perf_counter()
    call()
    count = max(1, int(least / (time.perf_counter() - start)))
    means = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(count):
            call()
        means.append((time.perf_counter() - start) / count)
    return 1e6 * min(means)


if __name__ == "__main__":
    main()
