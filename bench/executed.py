"""Run the PTX of the GPU kernels on the CPU, and count what its threads do.

``python -m bench.executed`` prints a row for each op, set of dtypes and backend; ``--json FILE`` writes the
rows. It takes no times. It counts in the kernel that goes over the elements of an op, with spans as long as in
a large list.

PTX is not machine code: ptxas fuses, drops and schedules instructions, so ``python -m bench.sass`` tells better
how many there are. PTX tells what static counts cannot: which paths run and how often, how many sectors of 32
bytes a request of a warp touches, and where the threads of a warp part. An instruction whose condition holds in
no thread of a warp is not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from tqdm import tqdm

from fogzo_kernels.backends.gpu import plans

from . import cases as c
from .machine import machine

ROOT = Path(__file__).parents[1]
BACKENDS = ("triton", "cuda")
ELEMENTS, GROUP = 2**16, 128
SECTOR = 32  # bytes
#: The kernel of an op that goes over the elements.
KERNELS = {
    "norm": "sumsq_kernel", "perturb": "perturb_kernel", "perturb_both": "perturb_kernel",
    "estimate": "estimate_kernel", "estimate_n4": "estimate_kernel", "adamw": "update_kernel",
    "sgd": "update_kernel", "quantize": "quantize_kernel", "measure": "measure_kernel",
    "learned": "learned_kernel",
}  # fmt: skip
#: Pipe -> its PTX, as sm_90 has it; the first pipe that matches has the instruction. Divisions and exact roots
#: become several machine instructions, moves often none.
PIPES = {
    "shared": r"(ld|st)\.(\w+\.)*shared[.:].*|(ld|st)matrix\..*",
    "global": r"(ld|st|atom|red)\.(\w+\.)*(global|local)\..*",
    "move": r"mov\..*|cvta\..*|ld\.param\..*|st\.param\..*|cvt\.(sat\.)?[us]\d+\.[us]\d+",
    "shuffle": r"(shfl|redux|vote)\..*",
    "branch": r"(bra|ret|exit|bar)(\..*)?",
    "xu": r"(rcp|rsqrt|sqrt|ex2|lg2|sin|cos|tanh)\.approx\..*|(popc|clz|bfind|brev)\..*"
    r"|cvt\.(.*\.)?f64\..*|cvt\..*\.f64|cvt\.(.*\.)?[us]\d+\.f\d+|cvt\.r.i\.(\w+\.)*f32\.f32"
    r"|cvt\.rn\.f32\.[us](8|16|64)",
    "division": r"(div|rem|rcp|sqrt)\..*",
    "fp64": r"(add|sub|mul|fma|mad|min|max|abs|neg|setp)\.(\w+\.)*f64",
    "alu": r"(and|or|xor|not|shl|shr|shf|lop3|prmt|bfe|bfi|setp|set|selp|slct|copysign|testp)\..*"
    r"|(add|sub|neg|abs|min|max|sad)\.(sat\.)?[us]\d+|(min|max|abs|neg)\.(\w+\.)*(f16|bf16|f16x2|bf16x2|f32)"
    r"|cvt\.(\w+\.)*(bf16|f16|bf16x2|f16x2)\.f32|cvt\.f32\.bf16|cvt\.rn\.f32\.[us]32",
    "imad": r"(mul|mad|mul24|mad24|dp4a)\..*[us]\d+",
    "fma": r"(add|sub|mul|fma|mad)\.(\w+\.)*(f32|f16|bf16)(x2)?|cvt\.f32\.f16|cvt\.sat\.f32\.f32",
}  # fmt: skip
Row = dict[str, Any]


class Count(NamedTuple):
    """What an instruction did: in how many warps and threads it ran, and what its requests touched."""

    opcode: str
    line: int
    warps: int
    lanes: int
    requests: int
    sectors: int
    bytes: int


def pipe(opcode: str) -> str:
    for name, pattern in PIPES.items():
        if re.fullmatch(pattern, opcode):
            return name
    raise ValueError(f"the PTX instruction {opcode} is in no pipe: bench/executed.py, PIPES")


def accesses(counts: Iterable[Count], kind: str) -> dict[str, float] | None:
    """What requests for elements touch, of the kind ``ld`` or ``st``; None where there are none.

    Requests for one value of a warp do not count, as those for a table: by one thread, or by all threads for
    the same bytes. Those bytes are more than their sectors hold, counted once for each thread.
    """
    found = [x for x in counts if x.opcode.startswith(f"{kind}.") and x.lanes > x.warps]
    found = [x for x in found if x.requests and x.bytes <= SECTOR * x.sectors]
    if not found:
        return None
    requests, sectors = sum(x.requests for x in found), sum(x.sectors for x in found)
    return {
        "requests": requests,
        "sectors_per_request": round(sectors / requests, 2),
        "share_used": round(sum(x.bytes for x in found) / (SECTOR * sectors), 3),
    }


def shifted(o: c.Operands) -> c.Operands:
    """Operands whose tensors begin one element behind a multiple of 16 bytes."""

    def moved(t: Tensor) -> Tensor:
        return torch.empty(t.numel() + 1, dtype=t.dtype)[1:].copy_(t)

    names = ("latents", "grads", "plus", "minus", "first", "second")
    return o._replace(**{name: [moved(t) for t in getattr(o, name)] for name in names})


def kernel_counts(case: c.Case, backend: str, aligned: bool = True) -> Any:
    """The program of the case's kernel, which has counted one call."""
    from ptx.launches import launched
    from ptx.modes import ORDER

    o = c.operands(case, torch.device("cpu"))
    call = c.call(case, o if aligned else shifted(o), backend)
    for kernel in launched.values():
        kernel.program.clear()
    launched.clear()
    # Spans as of a large list, in plans that nobody else gets. Warps run one by one, so only their threads part
    with mock.patch.multiple(plans, ENOUGH=1, _plans=plans.Recent()), mock.patch.dict(os.environ, {ORDER: "1"}):
        call()
    name = KERNELS[case.op]
    found = [k.program for k in launched.values() if re.search(rf"(?<![a-z_]){name}", k.name)]
    if len(found) != 1:
        names = [k.name for k in launched.values()]
        raise RuntimeError(f"{case.op} must launch one {name}, got {names}")
    return found[0]


def measured(case: c.Case, backend: str, aligned: bool = True) -> Row:
    """A row of the table."""
    program = kernel_counts(case, backend, aligned)
    counts = [Count(*x) for x in program.counts()]
    pipes: Counter[str] = Counter()
    for x in counts:
        if x.lanes:
            pipes[pipe(x.opcode)] += x.lanes
    lanes = sum(pipes.values())
    return {
        "op": case.op, "backend": backend, **case.names(), "distribution": case.distribution,
        "scale_length": case.scale_length, "aligned": aligned, "elements": case.elements,
        "instructions_per_element": round(lanes / case.elements, 2),
        "by_pipe": {name: round(pipes[name] / case.elements, 3) for name in PIPES if pipes[name]},
        "loads": accesses(counts, "ld"),
        "stores": accesses(counts, "st"),
        "lanes_per_instruction": round(lanes / sum(x.warps for x in counts), 2),
        "segments": program.segments,
        "divergent_segments": program.divergent,
    }  # fmt: skip


# ---- tables


#: Pipes that tables show.
SHOWN = ("fma", "imad", "alu", "xu", "fp64", "division", "shuffle", "global", "shared", "branch", "move")
HEADINGS = f"{'':47}{'all':>6}" + "".join(
    f"{name:>9}" for name in (*SHOWN, "loads", "stores", "lanes", "parted")
)


def line(row: Row) -> str:
    what = [row["op"], *(row[kind] for kind in ("latent", "grad", "out") if row[kind] != "-")]
    name = " ".join(c.short(word) for word in what)
    name += f" /{row['scale_length']}" * (row["scale_length"] > 0) + " unaligned" * (not row["aligned"])
    parted = f"{row['divergent_segments']}/{row['segments']}"
    cells = [f"{row['by_pipe'].get(one, 0):.2f}" for one in SHOWN]
    cells += [share(row["loads"]), share(row["stores"]), f"{row['lanes_per_instruction']:.1f}", parted]
    total = f"{row['instructions_per_element']:6.1f}"
    return f"{row['backend']:7}{name:40}{total}" + "".join(f"{cell:>9}" for cell in cells)


def share(found: dict[str, float] | None) -> str:
    return "-" if found is None else f"{found['share_used']:.2f}"


def pipes_table(rows: list[Row]) -> str:
    """Of bfloat16 with an alpha for each tensor; what rounds to 0.0 is left out."""
    rows = [r for r in rows if dtypes_of(r) == {"bfloat16"} and r["aligned"] and not r["scale_length"]]
    shown = [name for name in SHOWN if any(r["by_pipe"].get(name, 0) >= 0.05 for r in rows)]
    lines = [
        f"| PTX instructions of a thread, an element | all | {' | '.join(shown)} | active threads |",
        "|---" * (len(shown) + 3) + "|",
    ]
    for r in rows:
        cells = [f"{r['by_pipe'][name]:.1f}" if r["by_pipe"].get(name, 0) >= 0.05 else "" for name in shown]
        cells = [f"{r['op']}, {r['backend']}", f"{r['instructions_per_element']:.1f}", *cells]
        lines.append(f"| {' | '.join(cells)} | {r['lanes_per_instruction']:.1f} |")
    return "\n".join(lines)


def sectors_table(rows: list[Row]) -> str:
    """Of aligned tensors of one dtype: sectors that a request touches, and how much of them it uses."""
    columns = [(backend, dtype) for backend in BACKENDS for dtype in ("bfloat16", "float32")]
    heads = " | ".join(f"{backend}, {dtype}" for backend, dtype in columns)
    lines = [
        f"| sectors of a request (share used): loads; stores | {heads} |",
        "|---" * (len(columns) + 1) + "|",
    ]
    found: dict[str, dict[tuple[str, str], str]] = {}
    for row in rows:
        if len(dtypes_of(row)) == 1 and row["aligned"] and not row["scale_length"]:
            kinds = [row[kind] for kind in ("loads", "stores") if row[kind]]
            cell = "; ".join(f"{x['sectors_per_request']:.0f} ({x['share_used']:.2f})" for x in kinds)
            found.setdefault(row["op"], {})[row["backend"], *dtypes_of(row)] = cell
    return "\n".join(
        [*lines, *(f"| {op} | {' | '.join(of.get(x, '') for x in columns)} |" for op, of in found.items())]
    )


def dtypes_of(row: Row) -> set[str]:
    return {row[kind] for kind in ("latent", "grad", "out")} - {"-"}


# ---- the program


def jobs(
    backends: Iterable[str], distributions: Iterable[str], elements: int
) -> Iterator[tuple[c.Case, str, bool]]:
    """Each op, by tensors and by groups, and by tensors that are not aligned."""
    found = [*c.cases(c.OPS, c.DTYPES, distributions, [1], [elements], scale_lengths=[0, GROUP])]
    for backend in backends:
        for case in found:
            yield case, backend, True
            if not case.scale_length:
                yield case, backend, False


def install() -> dict[str, str]:
    """Let both backends run on the CPU. Returns those that cannot, each with the reason."""
    folder = str(ROOT / "python_tests")
    if folder not in sys.path:
        sys.path.append(folder)
    import ptx

    return ptx.install()


def compilers() -> str:
    from ptx.modes import ARCH, mode

    from build_cuda import find_nvcc, nvcc_version

    nvcc = find_nvcc()
    cuda = f" and nvcc {nvcc_version(nvcc)}" if nvcc else ""
    return f"PTX for sm_{mode(ARCH)} by Triton {metadata.version('triton')}{cuda}"


def origin() -> dict[str, Any]:
    """Where the rows come from. The processor is left out, because it changes no count."""
    found = machine(torch.device("cpu"))
    facts = {name: found[name] for name in ("python", "torch", "triton", "commit", "sources", "date")}
    return {"device": compilers(), **facts}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.executed", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--backend", nargs="+", default=BACKENDS, choices=BACKENDS, help="whose kernels")
    parser.add_argument(
        "--only",
        nargs="+",
        default=(),
        help="words, all of them: op, dtypes (bf16, mixed, ...), noise, /128, unaligned",
    )
    parser.add_argument("--distributions", nargs="+", default=c.DISTRIBUTIONS[:1], choices=c.DISTRIBUTIONS)
    parser.add_argument("--elements", type=int, default=ELEMENTS, help="of the tensor, a multiple of 128")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    args = parser.parse_args(argv)
    missing = install()
    for backend in set(args.backend) & set(missing):
        print(f"{backend} is left out: {missing[backend]}")
    backends = [backend for backend in args.backend if backend not in missing]
    rows: list[Row] = []
    wanted = [job for job in jobs(backends, args.distributions, args.elements) if set(args.only) <= words(*job)]
    if not wanted:
        raise SystemExit(f"no row is named {' '.join(args.only)}, or its backend does not run here")
    print(HEADINGS)
    with tqdm(wanted, unit="kernel") as progress:
        for case, backend, aligned in progress:
            rows.append(measured(case, backend, aligned))
            progress.write(line(rows[-1]))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        text = ",\n".join(json.dumps(row) for row in rows)
        args.json.write_text(f'{{"machine": {json.dumps(origin())},\n"rows": [\n{text}\n]}}\n')


def words(case: c.Case, backend: str, aligned: bool) -> set[str]:
    alignment = "aligned" if aligned else "unaligned"
    return {case.op, case.dtypes, case.distribution, f"/{case.scale_length}", backend, alignment}


if __name__ == "__main__":
    main()
