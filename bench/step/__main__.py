"""python -m bench.step"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
from tqdm import tqdm

import bench.step

from ..lost import LOST, DeviceLostError
from ..machine import machine
from .measure import WARM, Row, measured, rounded
from .methods import BASE, FLEXIBLE, METHODS
from .models import DTYPES, SHAPES, Setting
from .report import Found, pairs, parts, plot, table, title

#: Options of several values, each of which is a setting of its own: types and defaults.
AXES = {
    "model": (str, "llama"), "hidden": (int, 192), "layers": (int, 3), "rows": (int, 16),
    "micro_batches": (int, 4), "directions": (int, 1), "backend": (str, None),
}  # fmt: skip
HELP = {
    "hidden": "width; of llama a multiple of 64",
    "rows": "of a step",
    "directions": "of fogzo",
    "backend": "of the ops; by default the best",
}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.step",
        description=bench.step.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    for name, (kind, default) in AXES.items():
        choices = SHAPES if name == "model" else None
        add(
            f"--{name.replace('_', '-')}",
            nargs="+",
            type=kind,
            default=[default],
            choices=choices,
            help=HELP.get(name),
        )
    add("--methods", nargs="+", default=list(METHODS), choices=METHODS, help=f"{BASE} is always measured")
    add("--context", type=int, default=64, help="tokens of a row, of llama")
    add("--turns", type=int, default=30, help="steps of each method")
    add("--dtype", default="fp32", choices=list(DTYPES))
    add("--activation-bits", type=int, default=0, help="of inputs; 0: they stay as they are")
    add("--compute", choices=["int8"], help="products of int8 codes; needs --activation-bits")
    add("--compiled", action="store_true", help="compile the model; some methods cannot")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--threads", type=int, default=None, help="of PyTorch, on a CPU")
    add("--no-traffic", action="store_true", help="times alone: no memory, calls and bytes")
    add("--json", type=Path, metavar="FILE", help="write rows and machine")
    add("--resume", action="store_true", help="leave out the methods that failed, as the file of --json says")
    add("--plot", type=Path, metavar="FILE", help="write a plot")
    args = parser.parse_args(argv)
    if args.resume and args.json is None:
        parser.error("--resume must come with --json, which it goes on with")
    if args.compiled or args.activation_bits:
        odd = [name for name in args.methods if name not in FLEXIBLE]
        if odd and args.methods != list(METHODS):
            known = ", ".join(FLEXIBLE)
            parser.error(f"--methods with --compiled or --activation-bits must be of {known}, got {odd[0]}")
        args.methods = [name for name in args.methods if name in FLEXIBLE]
    return args


def settings_of(args: argparse.Namespace) -> list[Setting]:
    """The product of all axes."""
    rest = {name: getattr(args, name) for name in vars(args) if name in Setting.__dataclass_fields__}
    values = itertools.product(*(getattr(args, name) for name in AXES))
    return [Setting(**{**rest, **dict(zip(AXES, one, strict=True))}) for one in values]


Failed = dict[Setting, dict[str, str]]  # reasons by method


def write(args: argparse.Namespace, found: Found, failed: Failed, where: dict[str, Any]) -> None:
    if args.json is None:
        return
    varying = varying_of(args)
    given = {k: v for k, v in vars(args).items() if k not in ("json", "plot")}
    rows = [
        {**{name: getattr(setting, name) for name in varying}, **row.found(rows[0])}
        for setting, rows in found
        for row in rows
    ]
    reasons = [
        {**{name: getattr(setting, name) for name in AXES}, "method": method, "reason": reason}
        for setting, methods in failed.items()
        for method, reason in methods.items()
    ]
    whole = {"machine": where, "arguments": given, "rows": rows, "failed": reasons}
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(whole, indent=1) + "\n")


def failed_before(args: argparse.Namespace, settings: list[Setting]) -> Failed:
    """What the file says."""
    reasons = json.loads(args.json.read_text())["failed"] if args.resume and args.json.exists() else []
    return {
        setting: {
            one["method"]: one["reason"]
            for one in reasons
            if all(getattr(setting, name) == one[name] for name in AXES)
        }
        for setting in settings
    }


def varying_of(args: argparse.Namespace) -> list[str]:
    return [name for name in AXES if len(getattr(args, name)) > 1]


def main(argv: list[str] | None = None) -> int:
    """0, 1 where a method failed, or 3 where the device was lost and --resume can go on."""
    args = parse(argv)
    # Each method compiles modules of its own, and PyTorch would stop compiling them without a word.
    torch._dynamo.config.recompile_limit = 1024
    if args.threads:
        torch.set_num_threads(args.threads)
    settings, found, where = settings_of(args), Found(), machine(torch.device(args.device))
    failed = failed_before(args, settings)
    with tqdm(total=len(settings) * (WARM + rounded(args.turns)), unit="turn", disable=None) as bar:
        for setting in settings:

            def advance(rows: list[Row], setting: Setting = setting) -> None:
                bar.update()
                if rows[0].seconds and len(rows[0].seconds) % WARM == 0:
                    write(args, [*found, (setting, rows)], failed, where)

            try:
                rows = measured(
                    setting, args.methods, args.turns, failed[setting], advance, traffic=not args.no_traffic
                )
            except DeviceLostError as error:
                write(args, found, failed, where)
                print(f"the device was lost: {error.__cause__}", flush=True)
                return LOST
            found.append((setting, rows))
            said = title(setting, varying_of(args))
            lost = "\n".join(f"failed: {name}: {reason}" for name, reason in failed[setting].items())
            bar.write("\n".join(filter(None, [said, table(rows), pairs(rows), parts(rows), lost])))
            write(args, found, failed, where)  # what is measured is kept, whatever comes after
    if args.plot:
        plot(found, varying_of(args), args.plot)
    return int(any(failed.values()))


if __name__ == "__main__":
    sys.exit(main())
