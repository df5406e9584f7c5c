"""Measure each op against a copy and a triad of the same bytes and against what users write without it.

These streams, eager PyTorch, MeZO's loop and torch.compile are timed in the same run (bench/baselines.py says
what each is, bench/timing.py how). The most important rows come first; what the time did not suffice
for is listed at the end. The file of ``--json`` is written after every row. ``--resume`` goes on with it: in it
are the rows of several runs and backends, and what ended an earlier process is not tried again.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import math
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

import fogzo_kernels as fk

from . import cases as c
from . import timing
from .baselines import KINDS, baseline
from .findings import OURS, Findings, Row, Unit, case_of, named, resumed
from .lost import LOST, DeviceLostError, alive, told
from .machine import machine

EXPONENTS = {"cuda": (28, 24, 20, 16, 10), "cpu": (22, 20, 16, 10)}
QUICK_EXPONENTS = {"cuda": (24, 16), "cpu": (16,)}
COMPILE_SECONDS = 30  # with less left, torch.compile is not begun
#: Of a row: its speed over that of the same op without scales of groups, and without a transform.
SHARES = ("share_of_one_scale", "share_of_no_transform")
LARGE_BYTES = 2**28  # operands that a reference cycle must not keep
PATIENCE = 40  # seconds on a GPU for a unit before it counts as one that hangs, beside those to compile it


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.kernels", description=__doc__)
    add = parser.add_argument
    add("--ops", nargs="+", default=list(c.OPS), choices=list(c.OPS))
    add(
        "--dtypes",
        nargs="+",
        default=list(c.MEASURED),
        choices=list(c.DTYPES),
        help="by default " + " ".join(c.MEASURED) + "; mixed: fp32 latents, bf16 gradients and outputs;"
        " int8: bf16, but codes as outputs; int8-fp32: fp32, but codes as outputs",
    )
    add("--distributions", nargs="+", default=list(c.DISTRIBUTIONS), choices=c.DISTRIBUTIONS)
    add(
        "--sizes",
        nargs="+",
        type=size_of,
        help="elements in all, such as 2^24; the first is the most important",
    )
    add(
        "--tensors",
        nargs="+",
        type=int,
        default=[1, c.LIST_LENGTH],
        help="1, or the length of a list of mixed sizes",
    )
    add(
        "--scale-length",
        nargs="+",
        type=int,
        default=[0],
        metavar="N",
        help="elements that share an alpha; 0, the default: all of a tensor; others have no baselines",
    )
    add(
        "--block",
        nargs="+",
        type=int,
        default=[0],
        metavar="N",
        help="of a Hadamard transform, for the ops that take one; 0, the default: none; others have no"
        " baselines",
    )
    add("--equal", action="store_true", help="lists of tensors of one size")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--backend", help="triton, cuda, ...; by default triton on a GPU, else cpu")
    add("--no-baselines", action="store_true", help="only the ops, the copy and the triad")
    add("--baselines", nargs="*", default=list(KINDS), choices=KINDS)
    add("--quick", action="store_true", help="few repeats, small sizes, no torch.compile")
    add("--budget", type=float, default=600.0, help="seconds, by default 600; inf for everything")
    add("--until", type=float, default=math.inf, metavar="TIME", help="stop then, in seconds since 1970")
    add("--json", type=Path, metavar="FILE", help="write rows and machine")
    add("--resume", action="store_true", help="go on with the file of --json, if it is there")
    add(
        "--rehearse",
        action="store_true",
        help="two samples of each, which say nothing: for make gpu's dry run, where backends for a GPU run on"
        " the CPU",
    )
    add("--plot", type=Path, metavar="FILE", help="write a plot")
    args = parser.parse_args(argv)
    args.device = torch.device(args.device)
    if args.device.type == "cuda" and args.device.index is None:
        args.device = torch.device("cuda", torch.cuda.current_device())
    if args.sizes is None:
        exponents = (QUICK_EXPONENTS if args.quick else EXPONENTS)[args.device.type]
        args.sizes = [2**e for e in exponents]
    if args.resume and args.json is None:
        parser.error("--resume must come with --json, which it goes on with")
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


def check_backend(backend: str, device: torch.device, rehearse: bool) -> None:
    """Leave with the reason if the backend cannot be timed there."""
    if backend in ("triton", "cuda") and device.type == "cpu" and not rehearse:
        raise SystemExit(
            f"backend {backend} must have a CUDA device: its times on the CPU, where tests run it, say nothing;"
            " use --backend cpu or reference"
        )
    found = fk.available_backends(device)
    if backend not in found:
        raise SystemExit(f"backend must be one of {', '.join(found)}, got {backend!r}")
    if found[backend] is not None:
        raise SystemExit(f"backend {backend} is unavailable on {device}: {found[backend]}")


# ---- what to measure, and in which order


def units_of(args: argparse.Namespace) -> tuple[list[Unit], list[Row]]:
    """All units, the most important first, and what is left out from the start, with the reason."""

    def left(unit: Unit, reason: str) -> Row:
        return named(unit, args.backend, reason)

    units, left_out = [], []
    for case in c.cases(
        args.ops,
        args.dtypes,
        args.distributions,
        args.tensors,
        args.sizes,
        args.equal,
        args.scale_length,
        args.block,
    ):
        if case.tensors > 1 and case.elements < c.SMALLEST * case.tensors:
            left_out.append(left(Unit(case, OURS), f"too few elements for {case.tensors} tensors"))
            continue
        if not cut_by(case, max(case.scale_length, 1)) or not cut_by(case, max(case.block, 1)):
            left_out.append(
                left(Unit(case, OURS), "the tensors' sizes are no multiples of scale length and block")
            )
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


def cut_by(case: c.Case, length: int) -> bool:
    return length == 1 or all(size % length == 0 for size in c.sizes_of(case))


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


def effort_of(args: argparse.Namespace) -> timing.Effort:
    return timing.REHEARSAL if args.rehearse else timing.QUICK if args.quick else timing.Effort()


def run(args: argparse.Namespace) -> tuple[Findings, list[Unit]]:
    """Returns the findings, and every unit of the arguments.

    Raises:
        DeviceLostError: a kernel has ended what the device held of this process; the file has all until then.
    """
    start = time.monotonic()
    effort = effort_of(args)
    streams = timing.Streams(args.device, effort)
    units, left_out = units_of(args)
    again = {*units, *(Unit(case_of(row), row["kind"]) for row in left_out)}
    found = resumed(args.json, again, args.backend) if args.resume else Findings()
    found.left_out += left_out
    found.machine = machine(args.device) | ({"rehearsal": True} if args.rehearse else {})
    for unit in tqdm(units, unit="timing", disable=None):
        if found.has(unit, args.backend):
            continue
        spare = min(start + args.budget - time.monotonic(), args.until - time.time())
        if spare <= (COMPILE_SECONDS if unit.kind == "compile" else 0):
            found.left_out.append(named(unit, args.backend, "no time left"))
        elif unit.kind != OURS and (args.backend, unit.case) not in found.rows:
            found.left_out.append(named(unit, args.backend, "the op itself has no time to compare with"))
        else:
            found.begun = named(unit, args.backend, "begun")
            save(args, found)
            try:
                attempt(unit, args, effort, streams, found)
            finally:
                found.begun = None
                save(args, found)
    add_shares(found.rows)
    return found, units


def attempt(
    unit: Unit, args: argparse.Namespace, effort: timing.Effort, streams: timing.Streams, found: Findings
) -> None:
    """Measure a unit; what goes wrong is recorded, and the others follow."""
    on_gpu = args.device.type == "cuda"
    if on_gpu:
        compiling = 4 * COMPILE_SECONDS if unit.kind == "compile" else 0
        faulthandler.dump_traceback_later(PATIENCE + compiling, exit=True)
    try:
        if unit.kind == OURS:
            found.rows[args.backend, unit.case] = row_of(unit, args, effort, streams)
        else:
            add_baseline(found.rows[args.backend, unit.case], unit, args, effort)
    except Exception as error:
        found.failed.append(named(unit, args.backend, told(error)))
        if not alive(args.device):
            raise DeviceLostError from error
    finally:
        faulthandler.cancel_dump_traceback_later()
    if on_gpu:
        if unit.case.bytes >= LARGE_BYTES:
            gc.collect()
        torch.cuda.empty_cache()


def row_of(unit: Unit, args: argparse.Namespace, effort: timing.Effort, streams: timing.Streams) -> Row:
    case = unit.case
    (found, copy, triad), extra, host = measure_unit(unit, args, effort, streams)
    return {
        "op": case.op,
        "backend": args.backend,
        "distribution": case.distribution,
        "dtypes": case.dtypes,
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


def add_shares(rows: dict[tuple[str, c.Case], Row]) -> None:
    """Speed over that of one alpha for the tensor, and over that without a transform, where these are there."""
    for (backend, case), row in rows.items():
        for share, without in zip(SHARES, ({"scale_length": 0}, {"block": 0}), strict=True):
            plain = replace(case, **without)
            if plain != case and (backend, plain) in rows:
                row[share] = rows[backend, plain]["median_s"] / row["median_s"]


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
    """0, 1 where an op of this package failed, or 3 where the device was lost and --resume can go on."""
    args = parse(argv)
    check_backend(args.backend, args.device, args.rehearse)
    if not math.isinf(args.budget):
        print(f"at most about {args.budget:.0f} s; --budget inf measures everything", flush=True)
    try:
        found, units = run(args)
    except DeviceLostError as error:
        print(f"the device was lost: {told(error.__cause__ or error)}", flush=True)
        return LOST
    asked = {unit.case for unit in units}
    rows = [row for (backend, case), row in found.rows.items() if backend == args.backend and case in asked]
    failed = [row for row in found.failed if row["backend"] == args.backend and case_of(row) in asked]
    print(table(rows))
    print(account(rows, found.left_out[found.kept :], failed))
    save(args, found)
    if args.plot:
        from .plots import plot

        args.plot.parent.mkdir(parents=True, exist_ok=True)
        plot(rows, args.plot, found.machine["device"])
    return int(any(row["kind"] == OURS for row in failed))


def save(args: argparse.Namespace, found: Findings) -> None:
    if args.json:
        arguments = {k: v for k, v in vars(args).items() if k not in ("json", "plot")}
        arguments |= {"device": args.device.type, "budget": str(args.budget), "until": str(args.until)}
        found.save(args.json, arguments)


if __name__ == "__main__":
    sys.exit(main())
