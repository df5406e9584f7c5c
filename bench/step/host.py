"""Time what a step costs the host, against the number of layers, where arithmetic is next to nothing.

The model is a chain of linear layers of 8 x 8 without bias. Each method trains a chain of its own with AdamW:
``plain`` by PyTorch's fused one, ``modules`` by the same, with quantized modules and no Fogzo, ``ste``,
``guided`` and ``fogzo`` by Fogzo and this package's AdamW (straight-through, guided noise, probes), ``torchao``
by its QAT. ``forward`` and ``evaluation`` are forwards
without autograd, of the plain and of the quantized chain. ``python -m bench.host`` times the list ops alone.

A round takes every method once. On a CPU a time is the process's own, on one thread. On a GPU it is the time to
enqueue a step, and the device is idle before. The table has the least time of the rounds, the slope over the
number of layers in microseconds a layer, and ratios at the most layers. ``--backend triton`` on a CPU takes
Triton's backend, whose launches do nothing.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from tqdm import tqdm

import fogzo_kernels as fk
from fogzo_kernels.backends import VARIABLE

from ..host import without_launches
from ..machine import machine

WIDTH, ROWS = 8, 4
WARM = 4
Call = Callable[[], Any]
#: Options of Fogzo by method.
FOGZO: dict[str, dict[str, Any]] = {
    "ste": {"directions": 0, "kappa": 0.0},
    "guided": {"directions": 0, "noise_per": "tensor"},
    "fogzo": {"directions": 1},
}


# ---- methods


def chain(layers: int, device: str) -> nn.Sequential:
    """Layers whose product neither grows nor vanishes, so that every weight gets a gradient."""
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers)])
    for layer in model:
        nn.init.orthogonal_(layer.weight)
    return model.to(device)


def quantized(layers: int, device: str, preset: fk.Quantizer) -> nn.Sequential:
    model = chain(layers, device)
    fk.quantize_model(model, preset)
    return model


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def stock(model: nn.Module, x: Tensor) -> Call:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        loss_of(model, x).backward()
        optimizer.step()

    return step


def by_fogzo(model: nn.Module, x: Tensor, **options: Any) -> Call:
    fogzo = fk.Fogzo(model, total_steps=10**6, schedule="constant", **options)
    optimizer = fk.AdamW(model.parameters(), lr=1e-5, fogzo=fogzo)
    closure = functools.partial(loss_of, model, x)

    def step() -> None:
        optimizer.zero_grad()
        optimizer.step(closure)

    return step


def forward(model: nn.Module, x: Tensor) -> Call:
    model.eval()

    def step() -> None:
        with torch.no_grad():
            model(x)

    return step


def torchaos(layers: int, device: str, x: Tensor) -> Call:
    from torchao.quantization import quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    model = chain(layers, device)
    weight = IntxFakeQuantizeConfig(torch.int4, group_size=WIDTH)
    quantize_(model, QATConfig(weight_config=weight, step="prepare"))
    return stock(model, x)


def methods(layers: int, device: str) -> dict[str, Call]:
    """A step of each method; torchao's where it is installed."""
    x, fixed, lsq = torch.randn(ROWS, WIDTH, device=device), fk.presets.fixed(8, 1 / 64), fk.presets.lsq(8)
    made = {
        "plain": stock(chain(layers, device), x),
        "forward": forward(chain(layers, device), x),
        "modules, fixed alpha": stock(quantized(layers, device, fixed), x),
        "modules, learned alpha": stock(quantized(layers, device, lsq), x),
        **{
            f"{name}, {alpha}": by_fogzo(quantized(layers, device, preset), x, **options)
            for name, options in FOGZO.items()
            for alpha, preset in (("fixed alpha", fixed), ("learned alpha", lsq))
        },
        "evaluation": forward(quantized(layers, device, lsq), x),
    }
    try:
        made["torchao"] = torchaos(layers, device, x)
    except ImportError:
        print("torchao is not installed, and not timed", file=sys.stderr)
    return made


# ---- measurement


def once(call: Call, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.process_time() if device.type == "cpu" else time.perf_counter()
    call()
    return (time.process_time() if device.type == "cpu" else time.perf_counter()) - start


def least(calls: dict[str, Call], rounds: int, device: torch.device, bar: Any) -> dict[str, float]:
    """The least seconds of each in rounds that take all of them once."""
    times: dict[str, float] = {}
    for round in range(WARM + rounds):
        for name, call in calls.items():
            seconds = once(call, device)
            if round >= WARM:
                times[name] = min(seconds, times.get(name, seconds))
        bar.update()
    return times


def slope(points: dict[int, float]) -> float:
    """Microseconds for each more layer, by least squares over all counts."""
    xs, ys = list(points), list(points.values())
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    spread = sum((x - mean_x) ** 2 for x in xs)
    both = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True))
    return 1e6 * both / spread if spread else 0.0


Times = dict[str, dict[int, float]]  # by method, then by number of layers


def table(times: Times) -> str:
    counts = list(times["plain"])
    most, plain = counts[-1], times["plain"]
    passes = {count: plain[count] + 2 * times["forward"][count] for count in counts}
    head = [
        "method",
        *[f"ms, {count} layers" for count in counts],
        "us a layer",
        "of plain",
        "of plain + 2 forwards",
    ]
    rows = [head, ["---"] * len(head)]
    for name, points in times.items():
        ratios = [f"{points[most] / whole[most]:.2f}" for whole in (plain, passes)]
        rows.append(
            [name, *[f"{1e3 * points[count]:.3g}" for count in counts], f"{slope(points):.1f}", *ratios]
        )
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def plot(times: Times, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    for name, points in times.items():
        axes.plot(list(points), [1e3 * seconds for seconds in points.values()], "o-", label=name)
    axes.set(xscale="log", yscale="log", xlabel="linear layers of 8 x 8", ylabel="host time of a step, ms")
    axes.legend(fontsize="small", frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.step.host",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--layers", nargs="+", type=int, default=[10, 30, 100, 300, 1000])
    add("--rounds", type=int, default=20)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--backend", choices=["triton"], help="without a GPU: Triton's backend up to its launches")
    add("--json", type=Path, metavar="FILE")
    add("--plot", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    if args.backend:
        os.environ["TRITON_INTERPRET"] = "1"  # which Triton reads when it is imported
        without_launches()
    torch.set_num_threads(1)
    device, times = torch.device(args.device), Times()
    with tqdm(total=len(args.layers) * (WARM + args.rounds), unit="round", disable=None) as bar:
        for count in args.layers:
            calls = methods(count, args.device)
            with mock.patch.dict(os.environ, {VARIABLE: args.backend} if args.backend else {}):
                found = least(calls, args.rounds, device, bar)
            for name, seconds in found.items():
                times.setdefault(name, {})[count] = seconds
    print(table(times))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"machine": machine(device), "seconds": times}, indent=1) + "\n")
    if args.plot:
        plot(times, args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
