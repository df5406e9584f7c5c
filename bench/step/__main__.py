"""python -m bench.step"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
from tqdm import tqdm

import bench.step

from ..machine import machine
from .measure import WARM, measured, rounded
from .methods import METHODS, PEERS
from .models import DTYPES, SHAPES, Setting
from .report import Found, parts, plot, table

#: Options of several values, each of which is a setting of its own: types and defaults.
AXES = {
    "model": (str, "llama"), "hidden": (int, 192), "layers": (int, 3), "rows": (int, 16),
    "directions": (int, 1), "backend": (str, None),
}  # fmt: skip
HELP = {
    "hidden": "width; of llama a multiple of 64",
    "rows": "of a step",
    "backend": "of the ops; by default the best",
}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.step", description=bench.step.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    for name, (kind, default) in AXES.items():
        choices = SHAPES if name == "model" else None
        add(f"--{name}", nargs="+", type=kind, default=[default], choices=choices, help=HELP.get(name))
    add("--methods", nargs="+", default=list(METHODS), choices=METHODS, help="STE is always measured")
    add("--context", type=int, default=64, help="tokens of a row, of llama")
    add("--micro-batches", type=int, default=4)
    add("--turns", type=int, default=30, help="steps of each method")
    add("--dtype", default="fp32", choices=list(DTYPES))
    add("--activation-bits", type=int, default=0, help="of inputs; 0: they stay as they are")
    add("--compute", choices=["int8"], help="products of int8 codes; needs --activation-bits")
    add("--compiled", action="store_true", help="compile the model; without peers")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--threads", type=int, default=None, help="of PyTorch, on a CPU")
    add("--no-traffic", action="store_true", help="times alone: no memory, calls and bytes")
    add("--json", type=Path, metavar="FILE", help="write rows and machine")
    add("--plot", type=Path, metavar="FILE", help="write a plot")
    args = parser.parse_args(argv)
    peers = [name for name in args.methods if name in PEERS]
    if peers and (args.compiled or args.activation_bits):
        if args.methods != list(METHODS):
            parser.error(f"--methods must hold no peer with --compiled or --activation-bits, got {peers[0]}")
        args.methods = [name for name in args.methods if name not in PEERS]
    return args


def settings_of(args: argparse.Namespace) -> list[Setting]:
    """The product of all axes."""
    rest = {name: getattr(args, name) for name in vars(args) if name in Setting.__dataclass_fields__}
    values = itertools.product(*(getattr(args, name) for name in AXES))
    return [Setting(**{**rest, **dict(zip(AXES, one, strict=True))}) for one in values]


def write(args: argparse.Namespace, found: Found, where: dict[str, Any], path: Path) -> None:
    varying = varying_of(args)
    given = {k: v for k, v in vars(args).items() if k not in ("json", "plot")}
    rows = [
        {**{name: getattr(setting, name) for name in varying}, **row.found(rows[0])}
        for setting, rows in found
        for row in rows
    ]
    whole = {"machine": where, "arguments": given, "rows": rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(whole, indent=1) + "\n")


def varying_of(args: argparse.Namespace) -> list[str]:
    return [name for name in AXES if len(getattr(args, name)) > 1]


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if (
        args.compiled
    ):  # each method has a model of its own, and PyTorch would stop compiling them, without a word
        torch._dynamo.config.recompile_limit = 64
    if args.threads:
        torch.set_num_threads(args.threads)
    settings, found, where = settings_of(args), Found(), machine(torch.device(args.device))
    with tqdm(total=len(settings) * (WARM + rounded(args.turns)), unit="turn", disable=None) as bar:
        for setting in settings:
            rows = measured(setting, args.methods, args.turns, bar.update, traffic=not args.no_traffic)
            found.append((setting, rows))
            said = ", ".join(f"{name} {getattr(setting, name)}" for name in varying_of(args))
            bar.write("\n".join(filter(None, [said, table(rows), parts(rows)])))
            if args.json:
                write(args, found, where, args.json)  # what is measured is kept, whatever comes after
    if args.plot:
        plot(found, varying_of(args), args.plot)


if __name__ == "__main__":
    main()
