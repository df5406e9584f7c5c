"""Compile the GPU kernels for GPUs that need not be there, and count their machine code.

``python -m bench.sass`` prints a row per variant of Triton's kernels and, where nvcc is found, of those in
CUDA (bench/sass_cuda.py); ``--json FILE`` writes the rows. Nothing is run: a
count says what the compiler made, and the margin is a model's, not a measurement.

Instructions per element: a program runs its prologue once and its tile loop once per tile. Counted
are (prologue + tiles * loop) / elements that a thread handles, for a program with all its tiles. The
loop is found by its backward branch around the wide accesses; the loop over directions inside it counts
n times. Rarely taken branches in its range count too. Left out are NOPs, what comes after the loop (the
element-by-element rest of a tensor) and subroutines that only special values call.

Margin: time that an H200 at its copy bandwidth takes for the bytes, over the time of the busiest
execution pipe; above 1 the kernel should be limited by memory.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import triton
import triton.language as tl
from tqdm import tqdm
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fogzo_kernels.backends.triton import (
    CODES_REGISTERS,
    NUM_WARPS,
    SPAN,
    TILE,
    UPDATE_REGISTERS,
    UPDATE_TILE,
    kernels,
    tail,
)
from fogzo_kernels.spec.noise import DISTRIBUTIONS

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
ARCHS = (80, 90, 100)
DTYPES = {"fp32": tl.float32, "bf16": tl.bfloat16, "fp16": tl.float16, "int8": tl.int8}
SIZES = {"fp32": 4, "bf16": 2, "fp16": 2, "int8": 1, None: 0}
BACKENDS = ("triton", "cuda")
STREAMING = ("noise_kernel", "perturb_kernel", "estimate_kernel", "quantize_kernel", "update_kernel")

#: The model: H200, and lanes per clock of an SM for each pipe (CUDA C++ Programming Guide, throughput of
#: native arithmetic instructions, compute capability 9.0).
SMS, CLOCK, COPY_BANDWIDTH = 132, 1.98e9, 4.3e12
PIPES = {
    "issue": (128, r"."),
    "alu": (64, r"LOP3|SHF|PRMT|IADD3|VIADD|LEA|FMNMX|FSEL|SEL|ISETP|FSETP|I2FP|F2FP|V?IMNMX|PLOP3|MOV|SGXT"),
    "imad": (64, r"IMAD|IDP"),
    "fma": (128, r"FFMA|FADD|FMUL|HFMA2|IMAD|IDP"),
    "xu": (16, r"MUFU|I2F(\.|$)|F2I|F2F(\.|$)|FRND|POPC"),
    "fp64": (64, r"DFMA|DADD|DMUL"),
}

TYPES = {
    "table": "*i64", "owner": "*i32", "partial": "*fp64", "norm": "*fp32", "coef": "*fp32",
    "losses_plus": "*fp32", "losses_minus": "*fp32", "counters": "*i64", "one_minus_beta": "*fp64",
    "seed": "*i64", "step": "*i64", "direction": "i32", "n": "i32", "count": "i32", "out": "*fp64",
    "lr": "*fp64", "weight_decay": "i64", "log_beta1": "i64", "log_beta2": "i64", "keep": "i64",
}  # fmt: skip
HOST_SCALARS = {"seed": "i64", "step": "i64", "lr": "i64"}


class Variant(NamedTuple):
    kernel: str
    latent: str | None = None
    grad: str | None = None
    out: str | None = None
    distribution: str | None = None
    signs: str | None = None
    scale: str | None = None
    shard: bool = False
    host: bool = True  # the step's scalars are kernel arguments, not in device memory
    kind: str | None = None  # of straight-through derivative, or of optimizer
    directions: int | None = None  # of an estimate; in the fused tail None is 1
    master: bool = False

    def __str__(self) -> str:
        fields = (self.latent, self.grad, self.out, self.distribution, self.signs, self.scale, self.kind)
        words = [self.kernel, *(f for f in fields if f is not None)]
        flags = {
            f"n={self.directions}": self.directions is not None, "shard": self.shard,
            "master": self.master, "device": not self.host,
        }  # fmt: skip
        return " ".join([*words, *(name for name, on in flags.items() if on)])

    @property
    def tile(self) -> int:
        return UPDATE_TILE if self.kernel == "update_kernel" else TILE

    @property
    def bytes_per_element(self) -> int:
        """The least that the op can move; 0 where the dtypes are only known when it runs."""
        if "any" in (self.latent, self.grad, self.out):
            return 0
        latent, grad, out = SIZES[self.latent], SIZES[self.grad], SIZES[self.out]
        if self.kernel == "estimate_kernel":
            return 2 * grad
        if self.kernel == "update_kernel":
            states = {"adamw": 2, "sgd": 0}.get(self.kind or "", 1)
            return 2 * latent + grad + 8 * states + out + 4 * self.master
        return latent + grad + out * (2 if self.signs == "both" else 1)

    def constants(self) -> dict[str, object]:
        """Constexpr arguments of the kernel."""
        found: dict[str, object] = {
            "SPAN": SPAN, "TILE": self.tile, "DIST": self.distribution, "SHARD": self.shard,
            "PER_TENSOR": self.scale == "tensor", "WRITE_PLUS": True, "WRITE_MINUS": self.signs == "both",
            "KIND": self.kind, "RULE": self.kind, "MASTER": self.master, "NOISE_SCALE": 0.5, "BLOCK": 1024,
            "ROOT": True, "ONE": self.directions == 1, "LATENT_T": DTYPES.get(self.latent or ""),
            "GRAD_T": DTYPES.get(self.grad or ""), "OUT_T": DTYPES.get(self.out or ""),
        }  # fmt: skip
        if self.kernel == "quantize_kernel" and self.kind is None:
            found["GRAD_T"] = found["LATENT_T"]
        if self.host:
            found["one_minus_beta"] = None
        names = kernel_of(self).arg_names
        return {name: value for name, value in found.items() if name in names}


class Report(NamedTuple):
    registers: int
    spill_bytes: int
    shared_bytes: int
    prologue: Counter[str]
    loop: Counter[str]  # empty without a tile loop
    barriers: int

    def weighted(self, tiles: int) -> Counter[str]:
        return self.prologue + Counter({op: tiles * n for op, n in self.loop.items()})

    def width(self, opcode: str) -> int | None:
        """Bits of the widest load, or of the narrowest store, in the loop."""
        widths = [bits_of(op) for op in self.loop if op.startswith(opcode)]
        if not widths:
            return None
        return max(widths) if opcode == "LDG" else min(widths)


def bits_of(opcode: str) -> int:
    found = re.search(r"\.(128|64|U16|S16|U8|S8)\b", opcode)
    return int(found.group(1).lstrip("US")) if found else 32


def kernel_of(variant: Variant) -> object:
    return getattr(tail if variant.kernel.startswith("update") else kernels, variant.kernel)


# ---- variants


def variants() -> Iterator[Variant]:
    """Every kernel, over the dtypes, distributions, signs and scales that select different code."""
    for dist in DISTRIBUTIONS:
        yield Variant("noise_kernel", out="fp32", distribution=dist)
    for grad in ("bf16", "fp16", "fp32"):
        for scale in ("tensor", "row"):
            yield Variant("sumsq_kernel", grad=grad, scale=scale)
    yield Variant("sum_kernel")
    yield from streaming_variants()
    for host in (True, False):
        yield Variant("coefficients_kernel", host=host)
        for rule in ("adamw", "momentum"):
            yield Variant("update_coefficients_kernel", kind=rule, host=host)
    for kind in (None, "identity_clipped", "identity", "hardtanh", "tanh", "approxsign"):
        for latent, out in (("bf16", "bf16"), ("fp32", "fp32"), ("fp32", "int8")):
            if kind is None or out != "int8":
                scale = "tensor" if kind is None else "row"
                grad = latent if kind else None
                yield Variant("quantize_kernel", latent, grad, out, scale=scale, kind=kind)


def streaming_variants() -> Iterator[Variant]:
    same = [(x, x, x) for x in ("bf16", "fp16", "fp32")]
    types = [*same, ("fp32", "bf16", "bf16"), ("bf16", "bf16", "int8"), ("fp32", "fp32", "int8")]
    for latent, grad, out in types:
        for dist in DISTRIBUTIONS:
            for signs in ("one", "both"):
                for scale, shard in (("tensor", False), ("row", True)):
                    yield Variant("perturb_kernel", latent, grad, out, dist, signs, scale, shard)
    for grad in ("bf16", "fp16", "fp32"):
        for dist in DISTRIBUTIONS:
            for scale, shard in (("tensor", False), ("row", True)):
                yield Variant("estimate_kernel", None, grad, None, dist, None, scale, shard, directions=1)
            yield Variant("estimate_kernel", None, grad, None, dist, None, "tensor", directions=4)
    device = {"distribution": "uniform", "scale": "tensor", "host": False}
    yield Variant("perturb_kernel", *same[0], signs="one", **device)
    yield Variant("estimate_kernel", grad="bf16", directions=1, **device)
    for dist in DISTRIBUTIONS:
        yield Variant("update_kernel", "fp32", "bf16", "bf16", dist, scale="tensor", kind="adamw", directions=4)
    for *dtypes, master in (
        ("fp32", "bf16", "bf16", False), ("fp32", "fp32", "fp32", False),
        ("bf16", "bf16", "bf16", True), ("bf16", "bf16", "int8", False),
    ):  # fmt: skip
        for dist in DISTRIBUTIONS:
            for rule in ("adamw", "sgd", "momentum", "nesterov"):
                yield Variant("update_kernel", *dtypes, dist, scale="tensor", kind=rule, master=master)
        yield Variant("update_kernel", *dtypes, "uniform", scale="row", shard=True, kind="adamw", master=master)


# ---- compile and count


def compile_variant(variant: Variant, arch: int = 90) -> Report:
    """Compile for compute capability ``arch`` / 10 and read the machine code."""
    fn, given = kernel_of(variant), variant.constants()
    signature, constants, attributes = {}, {}, {}
    types = {**TYPES, **HOST_SCALARS} if variant.host else TYPES
    for i, name in enumerate(fn.arg_names):
        if name in given:
            signature[name], constants[(i,)] = "constexpr", given[name]
        else:
            signature[name] = types.get(name, "fp32")
            if name == "out" and variant.kernel == "sum_kernel":
                signature[name] = "*fp32"
            if signature[name].startswith("*"):
                attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=fn, signature=signature, constexprs=constants, attrs=attributes)
    target = GPUTarget("cuda", arch, 32)
    options = {"num_warps": NUM_WARPS}
    if variant.kernel == "update_kernel":
        options["maxnreg"] = UPDATE_REGISTERS
    elif variant.kernel == "perturb_kernel" and variant.out == "int8":
        options["maxnreg"] = CODES_REGISTERS
    binary = triton.compile(source, target=target, options=options)
    return read_cubin(binary.asm["cubin"], variant.directions or 1)


def read_cubin(cubin: bytes, directions: int = 1) -> Report:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text, usage = dumps(Path(file.name))
    found = usages(usage)
    if len(found) != 1:
        raise RuntimeError(f"cuobjdump must report the resources of one kernel, reported {usage}")
    return report_of(text, tuple(map(int, found[0][1:])), directions)


def dumps(cubin: Path) -> tuple[str, str]:
    """Machine code and resources of a file's kernels, as cuobjdump writes them."""
    code, usage = (
        subprocess.run([CUOBJDUMP, flag, cubin], capture_output=True, text=True, check=True)
        for flag in ("-sass", "-res-usage")
    )
    return code.stdout, usage.stdout + usage.stderr


def usages(text: str) -> list[tuple[str, ...]]:
    """Name, registers, stack, shared and local bytes of each kernel."""
    return re.findall(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", text)


def report_of(text: str, usage: tuple[int, ...], directions: int) -> Report:
    registers, stack, shared, local = usage
    prologue, loop, code = split(text, directions)
    barriers = sum(op.startswith("BAR") for _, op, _ in code)
    return Report(registers, stack + local, shared, prologue, loop, barriers)


def split(text: str, directions: int) -> tuple[Counter[str], Counter[str], list[tuple[int, str, str]]]:
    """Opcodes before the tile loop and in it, and all code as (address, opcode, operands)."""
    pattern = r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);"
    code = [(int(a, 16), op, rest) for a, op, rest in re.findall(pattern, text, re.MULTILINE) if op != "NOP"]
    stores, loads = (
        [a for a, op, _ in code if re.match(rf"{kind}\.E\.(128|64)", op)] for kind in ("STG", "LDG")
    )
    loops = []
    for address, op, rest in code:
        target = re.search(r"0x([0-9a-f]+)", rest) if op.startswith("BRA") else None
        if target and int(target.group(1), 16) < address:
            loops.append((int(target.group(1), 16), address))
    # the outermost loop that streams: it stores wide, or else, in a reduction, loads wide
    inside = containing(loops, stores) or containing(loops, loads)
    if not inside:
        return Counter(op for _, op, _ in code), Counter(), code
    start, end = max(inside, key=lambda x: x[1] - x[0])
    inner = [(first, last) for first, last in loops if start < first and last < end]
    loop = Counter[str]()
    for address, op, _ in code:
        if start <= address <= end:
            loop[op] += directions if any(first <= address <= last for first, last in inner) else 1
    return Counter(op for a, op, _ in code if a < start), loop, code


def containing(loops: list[tuple[int, int]], addresses: list[int]) -> list[tuple[int, int]]:
    return [(start, end) for start, end in loops if any(start <= a <= end for a in addresses)]


def margin(counts: Counter[str], bytes_per_thread: float) -> float:
    """Memory time over the time of the busiest pipe."""
    clocks = max(
        sum(n for op, n in counts.items() if re.match(pattern, op)) / lanes for lanes, pattern in PIPES.values()
    )
    return bytes_per_thread * SMS * CLOCK / COPY_BANDWIDTH / clocks


def row(variant: Variant, arch: int) -> dict[str, object]:
    report = compile_variant(variant, arch)
    return row_of_report(variant, arch, report, SPAN // variant.tile, 32 * NUM_WARPS, "triton")


def row_of_report(
    variant: Variant, arch: int, report: Report, tiles: int, threads: int, backend: str
) -> dict[str, object]:
    """A kernel in the table; ``tiles``: turns of its loop."""
    counts = report.weighted(tiles)
    streams = bool(report.loop)
    elements, loop = SPAN // threads, tiles * sum(report.loop.values())
    return {
        **{name: getattr(variant, name) for name in ("kernel", "latent", "grad", "out")},
        "backend": backend,
        "arch": arch,
        **{name: getattr(variant, name) for name in ("distribution", "signs", "scale", "shard")},
        **{name: getattr(variant, name) for name in ("kind", "directions", "master")},
        "scalars": "host" if variant.host else "device",
        "instructions_per_element": round(sum(counts.values()) / elements, 2) if streams else None,
        "loop_instructions_per_element": round(loop / elements, 2) if streams else None,
        "registers": report.registers,
        "spill_bytes": report.spill_bytes,
        "shared_bytes": report.shared_bytes,
        "barriers": report.barriers,
        "load_bits": report.width("LDG"),
        "store_bits": report.width("STG"),
        "margin": round(margin(counts, variant.bytes_per_element * elements), 2)
        if streams and variant.bytes_per_element
        else None,
    }  # fmt: skip


def row_of(job: tuple[Variant, int]) -> dict[str, object]:
    return row(*job)


def line(variant: Variant, found: dict[str, object]) -> str:
    names = ("instructions_per_element", "margin", "registers", "spill_bytes", "shared_bytes", "barriers",
             "load_bits", "store_bits")  # fmt: skip
    cells = ["-" if found[name] is None else str(found[name]) for name in names]
    return (
        f"sm_{found['arch']:<4}" + "".join(f"{cell:>9}" for cell in cells) + f"  {found['backend']} {variant}"
    )


def triton_rows(args: argparse.Namespace) -> list[dict[str, object]]:
    jobs = [(v, arch) for arch in args.arch for v in variants() if wanted(v, args)]
    rows = []
    with ProcessPoolExecutor(args.workers) as pool, tqdm(total=len(jobs), unit="kernel") as progress:
        for (variant, _), found in zip(jobs, pool.map(row_of, jobs), strict=True):
            progress.write(line(variant, found))
            progress.update()
            rows.append(found)
    return rows


def cuda_rows(args: argparse.Namespace) -> list[dict[str, object]]:
    from . import sass_cuda

    if reason := sass_cuda.unavailable():
        print(f"the CUDA kernels are left out: {reason}")
        return []
    rows = []
    for arch in args.arch:
        for variant, found in sass_cuda.rows(arch):
            if wanted(variant, args):
                print(line(variant, found))
                rows.append(found)
    return rows


def wanted(variant: Variant, args: argparse.Namespace) -> bool:
    return set(args.only) <= set(str(variant).split())


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHS, help="compute capabilities times ten")
    parser.add_argument("--backend", nargs="+", default=BACKENDS, choices=BACKENDS, help="whose kernels")
    parser.add_argument("--only", nargs="+", default=(), help="words of a variant's name, all of them")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--workers", type=int, default=2, help="processes that compile")
    args = parser.parse_args(argv)
    print(f"{'':7}" + "".join(f"{h:>9}" for h in (
        "instr/el", "margin", "regs", "spill B", "shared B", "barriers", "load", "store"
    )))  # fmt: skip
    rows = triton_rows(args) if "triton" in args.backend else []
    if "cuda" in args.backend:
        rows += cuda_rows(args)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
