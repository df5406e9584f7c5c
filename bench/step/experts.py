"""Time what a step of a stack of experts costs beside its passes, against one dense matrix of the same size.

``stack`` is one parameter of many experts, each a weight with its own scale and noise; ``matrix`` is one weight
of as many elements. Both are multiplied with a constant, and half of the experts may be ``idle``. A round takes
each step once, in turns. The table has the least time of the rounds, of all but forward and backward.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import fogzo_kernels as fk

from ..machine import machine
from .host import FOGZO


class Stack(nn.Module):
    """A parameter of experts, or of one matrix, whose loss is its product with a constant."""

    def __init__(self, experts: int, rows: int, columns: int, used: int) -> None:
        super().__init__()
        shape = (experts, rows, columns) if experts > 1 else (rows, columns)
        self.stack = nn.Parameter(torch.randn(shape) / 10)
        self.register_buffer("with_", torch.randn(shape) / 1000)
        if experts > 1:
            self.with_[used:] = 0

    def forward(self) -> Tensor:
        return (self.stack * self.with_).sum()


class Matrix(Stack):
    """One weight of the same size."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__(1, rows, columns, 1)


fk.declare_weights(Stack, stack="eoi")
fk.declare_weights(Matrix, stack="oi")


def step_of(model: Stack, method: str) -> Callable[[], float]:
    """A step that returns the seconds that its forwards and its backward do not take."""
    fk.quantize_model(model, fk.presets.lsq(2))
    fogzo = fk.Fogzo(model, total_steps=10**6, schedule="constant", **FOGZO[method])
    optimizer = fk.AdamW(model.parameters(), lr=1e-5, fogzo=fogzo)

    def step() -> float:
        optimizer.zero_grad()
        begin = time.perf_counter()
        passes = 0.0
        for probe in fogzo.probes():
            with probe:
                inside = time.perf_counter()
                probe.backward(model())
                passes += time.perf_counter() - inside
        optimizer.step()
        return time.perf_counter() - begin - passes

    return step


def measure(experts: int, rows: int, columns: int, rounds: int) -> list[dict[str, Any]]:
    found = []
    for method in FOGZO:
        models = {
            "matrix": Matrix(experts * rows, columns),
            "stack": Stack(experts, rows, columns, experts),
            "stack, half of it idle": Stack(experts, rows, columns, experts // 2),
        }
        steps = {name: step_of(model, method) for name, model in models.items()}
        times: dict[str, list[float]] = {name: [] for name in steps}
        for _ in tqdm(range(rounds + 3), desc=f"{method}, {experts} x ({rows}, {columns})"):
            for name, step in steps.items():
                times[name].append(step())
        least = {name: min(own[3:]) for name, own in times.items()}
        for name, seconds in least.items():
            found.append(
                {
                    "method": method, "experts": experts, "rows": rows, "columns": columns, "weights": name,
                    "seconds": seconds, "ratio": seconds / least["matrix"],
                }
            )  # fmt: skip
    return found


def table(found: list[dict[str, Any]]) -> str:
    lines = ["| step | experts | weights | ms beside passes | of one matrix |", "|---|---|---|---|---|"]
    for row in found:
        shape = f"{row['experts']} x ({row['rows']}, {row['columns']})"
        took = f"{1e3 * row['seconds']:.2f} | {row['ratio']:.3f}"
        lines.append(f"| {row['method']} | {shape} | {row['weights']} | {took} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.step.experts", description=__doc__)
    parser.add_argument(
        "--sizes", nargs="+", default=["128x256x128", "128x512x256"], help="EXPERTSxROWSxCOLUMNS"
    )
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    found = []
    for size in args.sizes:
        experts, rows, columns = map(int, size.split("x"))
        found += measure(experts, rows, columns, args.rounds)
    print(table(found))
    if args.json is not None:
        where = machine(torch.device("cpu")) | {"threads": torch.get_num_threads()}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"machine": where, "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
