"""Time a whole training step: plain STE, FOGZO by option, and what people write for it without this package.

All methods train the same model with AdamW on the same micro-batches, in turns, one step each; a ratio is that
of times in the same four turns, and the median of such. ``rest`` is all but forwards and backwards: norm,
probes, estimate, optimizer. Every method has weights of its own.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import fogzo_kernels as fk

from .evidence import text
from .kernels import machine
from .materialized import Materialized, Mezo

#: Options of Fogzo by method; STE has none.
FOGZO: dict[str, dict[str, Any]] = {
    "fogzo": {},
    "forward": {"difference": "forward"},
    "half": {"probe_share": 0.5},
    "forward-half": {"difference": "forward", "probe_share": 0.5},
    "every-4": {"every": 4},
}
PEERS = ("eager", "compile", "mezo")
METHODS = ("ste", *FOGZO, *PEERS)
WARM = 4  # steps before those that are timed; every fourth has probes in each method
LR, STEPS = 1e-4, 10**6
SHAPES = ("mlp", "llama", "resnet")
Batches = Sequence[tuple[Tensor, Tensor]]
LossOf = Callable[[nn.Module, Tensor, Tensor], Tensor]


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.step", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="llama", choices=SHAPES)
    add("--methods", nargs="+", default=list(METHODS), choices=METHODS, help="STE is always measured")
    add("--hidden", type=int, default=192, help="width; of llama a multiple of 64")
    add("--layers", type=int, default=3)
    add("--rows", type=int, default=16, help="of a step")
    add("--context", type=int, default=64, help="tokens of a row, of llama")
    add("--micro-batches", type=int, default=4)
    add("--directions", type=int, default=1)
    add("--turns", type=int, default=30, help="steps of each method")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--backend", help="of the ops; by default the best")
    add("--threads", type=int, default=None, help="of PyTorch, on a CPU")
    add("--json", type=Path, metavar="FILE", help="write rows and machine")
    add("--plot", type=Path, metavar="FILE", help="write a plot")
    return parser.parse_args(argv)


# ---- models: plain ones; their quantized weights are all of linear layers and convolutions but the ends


def model_of(args: argparse.Namespace) -> tuple[nn.Module, LossOf, Batches, list[str]]:
    """A model, its loss, the micro-batches of a step, and names of what is not quantized."""
    torch.manual_seed(0)
    if args.model == "llama":
        tokens = torch.randint(text.BYTES, (args.rows, args.context))
        model = text.llama(args.hidden, args.layers, args.context)
        return model, of_tokens, split(tokens, tokens, args), ["model.embed_tokens", "lm_head"]
    labels = torch.randint(10, (args.rows,))
    if args.model == "mlp":
        inner = (layer for _ in range(args.layers) for layer in (nn.Linear(*[args.hidden] * 2), nn.ReLU()))
        model = nn.Sequential(nn.Linear(64, args.hidden), nn.ReLU(), *inner, nn.Linear(args.hidden, 10))
        last = str(len(model) - 1)
        return model, of_labels, split(torch.randn(args.rows, 64), labels, args), ["0", last]
    from transformers import ResNetConfig, ResNetForImageClassification

    widths = [args.hidden // 4, args.hidden // 2, args.hidden]
    config = ResNetConfig(
        embedding_size=widths[0], hidden_sizes=widths, depths=[args.layers] * 3, layer_type="basic",
        num_labels=10,
    )  # fmt: skip
    images = torch.randn(args.rows, 3, 32, 32)
    skip = ["resnet.embedder", "classifier"]
    return ResNetForImageClassification(config), of_logits, split(images, labels, args), skip


def split(x: Tensor, y: Tensor, args: argparse.Namespace) -> Batches:
    count = args.micro_batches
    if args.rows % count:
        raise SystemExit(f"--rows must be a multiple of --micro-batches {count}, got {args.rows}")
    device = torch.device(args.device)
    return list(zip(x.to(device).chunk(count), y.to(device).chunk(count), strict=True))


def of_tokens(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    loss: Tensor = model(x, labels=y).loss
    return loss


def of_labels(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x).float(), y)


def of_logits(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x).logits.float(), y)


# ---- methods: one step each, with a clock for its passes


@dataclass
class Clock:
    """Seconds in forwards and backwards of a step."""

    device: torch.device
    passes: float = 0.0

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def timed(self, call: Callable[[], Any]) -> Any:
        start = self.now()
        found = call()
        self.passes += self.now() - start
        return found


Step = Callable[[Clock], None]


def method_of(
    name: str, model: nn.Module, loss_of: LossOf, batches: Batches, skip: list[str], args: Any
) -> Step:
    """A step of a method on a copy of the model."""
    model = copy.deepcopy(model).to(args.device)
    scale = 1 / len(batches)
    if name in PEERS:
        kind = Mezo if name == "mezo" else Materialized
        peer = kind(model, skip, lr=LR, compiled=name == "compile")

        def peers_step(clock: Clock) -> None:
            peer.step(lambda m, x, y: loss_of(m, x, y) * scale, batches, clock.timed)

        return peers_step
    fk.quantize_model(model, fk.presets.lsq(2), skip=skip)
    groups = fk.parameter_groups(model, weight_decay=0.1)
    if name == "ste":
        plain = fk.AdamW(groups, lr=LR, backend=args.backend)

        def stes_step(clock: Clock) -> None:
            plain.zero_grad()
            for x, y in batches:
                clock.timed(lambda x=x, y=y: (loss_of(model, x, y) * scale).backward())
            plain.step()

        return stes_step
    fogzo = fk.Fogzo(
        model, total_steps=STEPS, kappa=0.1, schedule="constant", directions=args.directions,
        backend=args.backend, **FOGZO[name],
    )  # fmt: skip
    optimizer = fk.AdamW(groups, lr=LR, fogzo=fogzo)

    def fogzos_step(clock: Clock) -> None:
        optimizer.zero_grad()
        for probe in fogzo.probes():
            with probe:
                for x, y in probe.batches(batches):
                    clock.timed(lambda x=x, y=y, probe=probe: probe.backward(loss_of(model, x, y) * scale))
        optimizer.step()

    return fogzos_step


# ---- measuring


@dataclass
class Row:
    """Times of a method, one a turn; a group of turns has every kind of step once."""

    method: str
    seconds: list[float] = field(default_factory=list)
    rest: list[float] = field(default_factory=list)
    peak_bytes: int | None = None

    def against(self, ste: Row, rest: bool = False) -> float:
        """Time, or that of the rest, over STE's whole step in the same turns."""
        times = self.rest if rest else self.seconds
        turns = range(0, len(times) // WARM * WARM, WARM)
        return statistics.median(sum(times[i : i + WARM]) / sum(ste.seconds[i : i + WARM]) for i in turns)


def run(args: argparse.Namespace) -> list[Row]:
    device = torch.device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    model, loss_of, batches, skip = model_of(args)
    names = ["ste", *(name for name in args.methods if name != "ste")]
    steps = {name: method_of(name, model, loss_of, batches, skip, args) for name in names}
    rows = {name: Row(name) for name in names}
    turns = -(-args.turns // WARM) * WARM
    for turn in tqdm(range(WARM + turns), unit="turn", disable=None):
        for name, step in steps.items():
            clock = Clock(device)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            start = clock.now()
            step(clock)
            seconds = clock.now() - start
            if turn >= WARM:
                rows[name].seconds.append(seconds)
                rows[name].rest.append(seconds - clock.passes)
                if device.type == "cuda":
                    rows[name].peak_bytes = torch.cuda.max_memory_allocated(device)
    return list(rows.values())


def table(rows: list[Row]) -> str:
    ste = rows[0]
    lines = ["| method | ms a step | of an STE step | rest, of an STE step |", "|---|---|---|---|"]
    for row in rows:
        lines.append(
            f"| {row.method} | {1e3 * statistics.median(row.seconds):.2f} | {row.against(ste):.3f} |"
            f" {row.against(ste, rest=True):.3f} |"
        )
    return "\n".join(lines)


def plot(rows: list[Row], path: Path) -> None:
    """Bars: passes, and the rest on top of them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 3.5))
    for i, row in enumerate(rows):
        whole, rest = row.against(rows[0]), row.against(rows[0], rest=True)
        axes.bar(i, whole - rest, color="C0", label=None if i else "forwards and backward")
        axes.bar(i, rest, bottom=whole - rest, color="C1", label=None if i else "the rest")
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks(range(len(rows)), [row.method for row in rows], rotation=20)
    axes.set(ylabel="time, in STE steps")
    axes.legend(ncols=2, loc="lower right", bbox_to_anchor=(1, 1), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, bbox_inches="tight")


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    rows = run(args)
    print(table(rows))
    if args.json:
        given = {k: v for k, v in vars(args).items() if k not in ("json", "plot")}
        found = [
            {"method": row.method, "of_ste": row.against(rows[0]), "median_s": statistics.median(row.seconds),
             "rest_of_ste": row.against(rows[0], rest=True), "peak_bytes": row.peak_bytes,
             "seconds": row.seconds}
            for row in rows
        ]  # fmt: skip
        whole = {"machine": machine(torch.device(args.device)), "arguments": given, "rows": found}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(whole, indent=1) + "\n")
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
