"""Measure each op against a copy and a triad of the same bytes and against what users write without it.

These streams, eager PyTorch, MeZO's loop and torch.compile are timed in the same run (bench/baselines.py says
what each is, bench/timing.py how). The most important rows come first; what the time did not suffice
for is listed at the end.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

import fogzo_kernels as fk

from . import cases as c
from . import timing
from .baselines import KINDS, baseline
from .machine import machine

OURS = "fogzo"
EXPONENTS = {"cuda": (28, 24, 20, 16, 10), "cpu": (22, 20, 16, 10)}
QUICK_EXPONENTS = {"cuda": (24, 16), "cpu": (16,)}
COMPILE_SECONDS = 30  # with less left, torch.compile is not begun
#: Of a row: its speed over that of the same op without scales of groups, and without a transform.
SHARES = ("share_of_one_scale", "share_of_no_transform")
LARGE_BYTES = 2**28  # operands that a reference cycle must not keep
SAVE_SECONDS = 15  # between writes of the file while measuring
Row = dict[str, Any]


class Unit(NamedTuple):
    """One thing to time."""

    case: c.Case
    kind: str  # OURS, or a baseline's


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.kernels", description=__doc__)
    add = parser.add_argument
    add("--ops", nargs="+", default=list(c.OPS), choices=list(c.OPS))
    add("--dtypes", nargs="+", default=list(c.MEASURED), choices=list(c.DTYPES),
        help="by default " + " ".join(c.MEASURED) + "; mixed: fp32 latents, bf16 gradients and outputs;"
        " int8: bf16, but codes as outputs; int8-fp32: fp32, but codes as outputs")  # fmt: skip
    add("--distributions", nargs="+", default=list(c.DISTRIBUTIONS), choices=c.DISTRIBUTIONS)
    add(
        "--sizes",
        nargs="+",
        type=size_of,
        help="elements in all, such as 2^24; the first is the most important",
    )
    add("--tensors", nargs="+", type=int, default=[1, c.LIST_LENGTH],
        help="1, or the length of a list of mixed sizes")  # fmt: skip
    add("--scale-length", nargs="+", type=int, default=[0], metavar="N",
        help="elements that share an alpha; 0, the default: all of a tensor; others have no"
        " baselines")  # fmt: skip
    add("--block", nargs="+", type=int, default=[0], metavar="N",
        help="of a Hadamard transform, for the ops that take one; 0, the default: none; others have no"
        " baselines")  # fmt: skip
    add("--equal", action="store_true", help="lists of tensors of one size")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--backend", help="triton, cuda, ...; by default triton on a GPU, else cpu")
    add("--no-baselines", action="store_true", help="only the ops, the copy and the triad")
    add("--baselines", nargs="*", default=list(KINDS), choices=KINDS)
    add("--quick", action="store_true", help="few repeats, small sizes, no torch.compile")
    add("--budget", type=float, default=600.0, help="seconds, by default 600; inf for everything")
    add("--json", type=Path, metavar="FILE", help="write rows and machine")
    add("--plot", type=Path, metavar="FILE", help="write a plot")
    args = parser.parse_args(argv)
    args.device = torch.device(args.device)
    if args.device.type == "cuda" and args.device.index is None:
        args.device = torch.device("cuda", torch.cuda.current_device())
    if args.sizes is None:
        exponents = (QUICK_EXPONENTS if args.quick else EXPONENTS)[args.device.type]
        args.sizes = [2**e for e in exponents]
    if args.no_baselines:
        args.baselines = []
    elif args.quick:
        args.baselines = [kind for kind in args.baselines if kind != "compile"]
    args.backend = args.backend or ("triton" if args.device.type == "cuda" else "cpu")
    return args


def size_of(text: str) -> int:
    base, _, exponent = text.partition("^")
    size = int(base) ** int(exponent or 1)
    if size < 1:
        raise argparse.ArgumentTypeError(f"size must be > 0, got {text}")
    return size


def check_backend(backend: str, device: torch.device) -> None:
    """Leave with the reason if the backend cannot be timed there."""
    if backend == "triton" and device.type == "cpu":
        raise SystemExit(
            "backend triton on the CPU is Triton's interpreter, far too slow to time:"
            " use --backend cpu or reference, or a CUDA device"
        )
    found = fk.available_backends(device)
    if backend not in found:
        raise SystemExit(f"backend must be one of {', '.join(found)}, got {backend!r}")
    if found[backend] is not None:
        raise SystemExit(f"backend {backend} is unavailable on {device}: {found[backend]}")


# ---- what to measure, and in which order


def units_of(args: argparse.Namespace) -> tuple[list[Unit], list[Row]]:
    """All units, the most important first, and what is left out from the start, with the reason."""
    units, left_out = [], []
    for case in c.cases(
        args.ops, args.dtypes, args.distributions, args.tensors, args.sizes, args.equal, args.scale_length,
        args.block,
    ):  # fmt: skip
        if case.tensors > 1 and case.elements < c.SMALLEST * case.tensors:
            left_out.append(left(Unit(case, OURS), f"too few elements for {case.tensors} tensors"))
            continue
        units.append(Unit(case, OURS))
        if case.scale_length or case.block:
            continue  # baselines know one alpha per tensor, and no transform
        for kind in args.baselines:
            if kind == "compile" and (case.tensors > 1 or case.elements != args.sizes[0]):
                left_out.append(left(Unit(case, kind), "torch.compile: one tensor of the first size only"))
            else:
                units.append(Unit(case, kind))
    kinds = (OURS, *KINDS)
    return sorted(units, key=lambda unit: (importance(unit, args), kinds.index(unit.kind))), left_out


def importance(unit: Unit, args: argparse.Namespace) -> int:
    """How far a unit is from the first of every list; the nearest are measured first.

    What differs in scales and transforms alone has one rank: such cases, which are compared, come in a row.
    """
    case = unit.case
    off = (
        2 * (case.elements != args.sizes[0]),
        2 * (case.tensors != args.tensors[0]),
        2 * (case.names() != c.Case(case.op, args.dtypes[0], "", 1, 1).names()),
        case.distribution not in (args.distributions[0], "none"),
        {OURS: 0, "eager": 1, "loop": 1, "compile": 2}[unit.kind],
    )
    return sum(off)


def left(unit: Unit, reason: str) -> Row:
    return {"kind": unit.kind, **asdict(unit.case), "reason": reason}


# ---- measuring


def measure_unit(
    unit: Unit, args: argparse.Namespace, effort: timing.Effort, streams: timing.Streams | None = None
) -> tuple[list[timing.Measurement], int | None, float | None]:
    """Time, with streams also theirs; extra memory in bytes; on a GPU the host's time in one of our calls."""
    case, device = unit.case, args.device
    kernels = 1 if unit.kind in (OURS, "compile") else 10 * case.tensors
    plan = timing.rounds(case.bytes, device, kernels, effort.sets)
    sets = [c.operands(case, device, seed) for seed in range(plan.sets)]
    if unit.kind == OURS:
        calls = [c.call(case, o, args.backend) for o in sets]
    else:
        calls = baseline(unit.kind, case, sets)
    found = (
        streams.beside((calls, plan), case.bytes) if streams else [timing.measure(calls, plan, device, effort)]
    )
    extra = timing.extra_bytes(calls[0], device)
    host = timing.host_seconds(calls[0]) if unit.kind == OURS and device.type == "cuda" else None
    return found, extra, host


@dataclass
class Findings:
    """What was measured, what was left out and why, what failed."""

    rows: dict[c.Case, Row] = field(default_factory=dict)
    left_out: list[Row] = field(default_factory=list)
    failed: list[Row] = field(default_factory=list)


def run(args: argparse.Namespace) -> Findings:
    saved = time.monotonic()
    deadline = saved + args.budget
    effort = timing.QUICK if args.quick else timing.Effort()
    streams = timing.Streams(args.device, effort)
    units, left_out = units_of(args)
    found = Findings(left_out=left_out)
    for unit in tqdm(units, unit="timing", disable=None):
        spare = deadline - time.monotonic()
        if spare <= (COMPILE_SECONDS if unit.kind == "compile" else 0):
            found.left_out.append(left(unit, "no time left"))
        elif unit.kind != OURS and unit.case not in found.rows:
            found.left_out.append(left(unit, "the op itself has no time to compare with"))
        else:
            attempt(unit, args, effort, streams, found)
        if args.json and time.monotonic() - saved > SAVE_SECONDS:
            save(args, found)
            saved = time.monotonic()
    add_shares(found.rows)
    return found


def attempt(
    unit: Unit, args: argparse.Namespace, effort: timing.Effort, streams: timing.Streams, found: Findings
) -> None:
    """Measure a unit; what goes wrong is recorded, and the others follow."""
    try:
        if unit.kind == OURS:
            found.rows[unit.case] = row_of(unit, args, effort, streams)
        else:
            add_baseline(found.rows[unit.case], unit, args, effort)
    except Exception as error:
        found.failed.append(left(unit, f"{type(error).__name__}: {first_line(error)}"))
    if args.device.type == "cuda":
        if unit.case.bytes >= LARGE_BYTES:
            gc.collect()
        torch.cuda.empty_cache()


def first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def row_of(unit: Unit, args: argparse.Namespace, effort: timing.Effort, streams: timing.Streams) -> Row:
    case = unit.case
    (found, copy, triad), extra, host = measure_unit(unit, args, effort, streams)
    return {
        "op": case.op,
        "backend": args.backend,
        "distribution": case.distribution,
        **case.names(),
        "tensors": case.tensors,
        "equal": case.equal,
        "scale_length": case.scale_length,
        "block": case.block,
        "elements": case.elements,
        "bytes_per_element": case.bytes_per_element,
        "median_s": found.median,
        "q25": found.q25,
        "q75": found.q75,
        "samples": len(found.seconds),
        "timing": found.timing,
        "cache": found.cache,
        "elements_per_s": case.elements / found.median,
        "gb_per_s": case.bytes / found.median / 1e9,
        "copy_s": copy.median,
        "copy_timing": copy.timing,
        "copy_gb_per_s": case.bytes / copy.median / 1e9,
        "share_of_copy": copy.of(found),
        "triad_s": triad.median,
        "share_of_triad": triad.of(found),
        "extra_bytes_per_element": per_element(extra, case),
        "host_s": host,
    }


def add_shares(rows: dict[c.Case, Row]) -> None:
    """Speed over that of one alpha for the tensor, and over that without a transform, where these are there."""
    for case, row in rows.items():
        for share, without in zip(SHARES, ({"scale_length": 0}, {"block": 0}), strict=True):
            plain = replace(case, **without)
            if plain != case and plain in rows:
                row[share] = rows[plain]["median_s"] / row["median_s"]


def add_baseline(row: Row, unit: Unit, args: argparse.Namespace, effort: timing.Effort) -> None:
    (found,), extra, _ = measure_unit(unit, args, effort)
    row[f"{unit.kind}_s"] = found.median
    row[f"{unit.kind}_timing"] = f"{found.timing}, {found.cache}"
    row[f"{unit.kind}_extra_bytes_per_element"] = per_element(extra, unit.case)
    row[f"ratio_{unit.kind}"] = found.median / row["median_s"]


def per_element(extra: int | None, case: c.Case) -> float | None:
    return None if extra is None else extra / case.elements


# ---- reporting


def power(n: int) -> str:
    return f"2^{n.bit_length() - 1}" if n & (n - 1) == 0 else str(n)


COLUMNS = (
    ("op", "{:12s}"), ("noise", "{:10s}"), ("latent/grad/out", "{:15s}"), ("tensors", "{:>7s}"),
    ("size", "{:>6s}"), ("scale", "{:>5s}"), ("block", "{:>5s}"),
    ("median us", "{:>10s}"), ("G elt/s", "{:>7s}"), ("GB/s", "{:>7s}"),
    ("copy", "{:>6s}"), ("triad", "{:>6s}"), ("one", "{:>6s}"), ("none", "{:>6s}"),
    ("quartiles", "{:>11s}"), ("eager", "{:>6s}"), ("loop", "{:>6s}"),
    ("compile", "{:>7s}"), ("extra B", "{:>7s}"), ("timing", " {}"),
)  # fmt: skip


def table(rows: list[Row]) -> str:
    layout = " ".join(width for _, width in COLUMNS)
    lines = [layout.format(*(name for name, _ in COLUMNS))]
    lines.append("-" * len(lines[0]))
    lines += [layout.format(*cells(row)) for row in rows]
    lines.append(
        "copy, triad: speed over that of a device copy, and of a + s b, of the same bytes. eager, loop,"
    )
    lines.append(
        "compile: their time over ours. extra B: bytes per weight at the allocator's peak. warm: the operands"
    )
    lines.append(
        "stay in the cache. one, none: speed over that with one scale a tensor, and without a transform."
    )
    return "\n".join(lines)


def cells(row: Row) -> list[str]:
    low, high = (100 * (row[q] / row["median_s"] - 1) for q in ("q25", "q75"))
    extra = row["extra_bytes_per_element"]
    return [
        row["op"],
        row["distribution"],
        "/".join(c.short(row[k]) for k in ("latent", "grad", "out")),
        str(row["tensors"]) + (" eq" if row["equal"] and row["tensors"] > 1 else ""),
        power(row["elements"]),
        *(str(row[name] or "") for name in ("scale_length", "block")),
        f"{1e6 * row['median_s']:.1f}",
        f"{row['elements_per_s'] / 1e9:.3g}",
        f"{row['gb_per_s']:.4g}",
        f"{100 * row['share_of_copy']:.1f}%",
        f"{100 * row['share_of_triad']:.1f}%",
        *(f"{100 * row[name]:.1f}%" if name in row else "" for name in SHARES),
        f"{low:+.0f}% {high:+.0f}%",
        *(f"{row[f'ratio_{kind}']:.1f}x" if f"ratio_{kind}" in row else "" for kind in KINDS),
        "" if extra is None else f"{extra:.3g}",
        f"{row['timing']}, {row['cache']}",
    ]


def account(rows: list[Row], left_out: list[Row], failed: list[Row]) -> str:
    """What was measured and what was not, in words."""
    lines = [f"measured {len(rows)} rows; left out {len(left_out)} timings; {len(failed)} failed"]
    groups = Counter((row["reason"], row["kind"], row["op"]) for row in left_out)
    per_reason: dict[tuple[str, str], list[str]] = {}
    for (reason, kind, op), count in groups.items():
        per_reason.setdefault((reason, kind), []).append(f"{op} {count}")
    lines += [f"left out, {reason}: {kind}: {', '.join(ops)}" for (reason, kind), ops in per_reason.items()]
    lines += [
        f"failed: {row['kind']} {row['op']} {row['dtypes']} {row['distribution']} {row['tensors']} tensors"
        f" {power(row['elements'])}: {row['reason']}"
        for row in failed
    ]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """0, or 1 where an op of this package failed."""
    args = parse(argv)
    check_backend(args.backend, args.device)
    if not math.isinf(args.budget):
        print(f"at most about {args.budget:.0f} s; --budget inf measures everything", flush=True)
    found = run(args)
    rows = list(found.rows.values())
    print(table(rows))
    print(account(rows, found.left_out, found.failed))
    if args.json:
        save(args, found)
    if args.plot:
        from .plots import plot

        args.plot.parent.mkdir(parents=True, exist_ok=True)
        plot(rows, args.plot, machine(args.device)["device"])
    return int(any(row["kind"] == OURS for row in found.failed))


def save(args: argparse.Namespace, found: Findings) -> None:
    """Write what there is; while measuring too, so that a stop loses little."""
    arguments = {k: v for k, v in vars(args).items() if k not in ("json", "plot")}
    arguments |= {"device": args.device.type, "budget": str(args.budget)}
    text = {"machine": machine(args.device), "arguments": arguments, "rows": list(found.rows.values()),
            "left_out": found.left_out, "failed": found.failed}  # fmt: skip
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(text, indent=1))


if __name__ == "__main__":
    sys.exit(main())
