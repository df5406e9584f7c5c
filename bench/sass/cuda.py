"""The CUDA kernels: compiled by nvcc, all of an architecture at once.

Cubins lie beside the PTX that they are made of, with a log of what ptxas said of them.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from build_cuda import find_nvcc
from cuda_units import Unit, compiled, once, parallel, run, units
from fogzo_kernels.spec import noise, scale, straight_through
from fogzo_kernels.spec.grid import OUTPUTS

from ..cases import short
from .machine_code import Report, dumps, report_of, usages
from .report import SPAN, Row, Variant, row_of_report

#: In the order of the C++ enumerations, by whose numbers a mangled name tells its template arguments.
DISTRIBUTIONS = tuple(noise.DISTRIBUTIONS)
DTYPES = (*map(short, OUTPUTS), "any")
KINDS = straight_through.VARIANTS
STATISTICS = scale.STATISTICS
THREADS = 128  # of a block
#: Elements of a thread in one turn of its loop.
TURN = {"perturb_kernel": 16, "estimate_kernel": 16, "quantize_kernel": 16, "sumsq_kernel": 32,
        "hadamard_kernel": 16, "rotated_perturb_kernel": 16, "rotated_estimate_kernel": 16,
        "rotated_update_kernel": 16, "rotated_quantize_kernel": 16, "rotated_backward_kernel": 16,
        "rotated_learned_kernel": 16, "learned_kernel": 128, "measure_kernel": 64}  # fmt: skip
#: How often a turn runs the loop inside it that streams, of rows of 1024: the turn's elements over that loop's.
INNER = {
    "learned_kernel": {"bf16": 16, "fp32": 16, "any": 16},
    "measure_kernel": {"bf16": 2, "fp16": 2, "fp32": 4},
}
TURN_OF_OTHERS = 8
#: Kernels around a transform are told its block when they run. The count takes the stages between threads of
#: blocks of 128, in pairs of chunks.
BLOCK, STAGES = "128", 3


def unavailable() -> str | None:
    """None, or why nothing can be compiled or read."""
    if find_nvcc() is None:
        return "nvcc was not found: install nvidia-cuda-nvcc, or set CUDA_HOME"
    return None if shutil.which("c++filt") else "c++filt is not on the path"


def compile_all(arch: int) -> Path:
    """A folder with PTX, a cubin and ptxas's report, a .log, for each source."""
    folder, nvcc = compiled(arch), find_nvcc()
    assert nvcc is not None
    ptxas = str(Path(nvcc).with_name("ptxas"))

    def assemble(unit: Unit) -> None:
        ptx, cubin = folder / f"{unit.name}.ptx", folder / f"{unit.name}.cubin"
        command = (ptxas, "-v", f"-arch=sm_{arch}", str(ptx), "-o", str(cubin))
        once(folder / f"{unit.name}.log", lambda path: path.write_text(run(*command)))

    parallel([partial(assemble, unit) for unit in units()])
    return folder


def spills(folder: Path) -> dict[str, int]:
    """Bytes that each kernel spills, both ways, as ptxas reports them; and its stack."""
    found = {}
    for log in sorted(folder.glob("*.log")):
        pattern = (
            r"Function properties for (\w+)\n\s+(\d+) bytes stack frame, (\d+) bytes spill stores,"
            r" (\d+) bytes spill loads"
        )
        for name, *numbers in re.findall(pattern, log.read_text()):
            found[name] = sum(map(int, numbers))
    return found


# ---- rows


def variant_of(name: str) -> Variant | None:
    """Returns the variant of a demangled name; None if the name belongs to no kernel."""
    found = re.match(r"(?:void )?fogzo::cuda::(\w+)(?:<(.*)>)?\(", name)
    if found is None:
        return None
    kernel, template = found.groups()
    arguments = defaultdict[str, list[str]](list)  # by enumeration, "" for numbers and flags
    for enumeration, value in re.findall(r"(?:::(\w+)\))?\b(\d+|true|false)\b", template or ""):
        arguments[enumeration].append(value)

    def value_of(enumeration: str, names: tuple[str, ...]) -> str | None:
        return names[int(arguments[enumeration][0])] if arguments[enumeration] else None

    numbers, op = arguments[""], kernel.removeprefix("rotated_")
    rotated = op != kernel
    plain = numbers[-1:] == ["true"] and not rotated  # others take rows, groups, shards, scalars on the device
    scale = "tensor" if plain else "row"
    latent, grad, out = (DTYPES[int(n)] for n in arguments["Dtype"] or ["-1"] * 3)
    distribution = value_of("Distribution", DISTRIBUTIONS)
    drawn = {"distribution": distribution, "scale": scale, "shard": not plain}
    kind = value_of("StraightThrough", KINDS) or value_of("Statistic", STATISTICS)
    kind = BLOCK if rotated and kind is None else kind
    if op == "noise_kernel":
        return Variant(kernel, out="fp32", distribution=distribution)
    if op == "sumsq_kernel":
        return Variant(kernel, grad=grad, scale=scale)
    if op == "perturb_kernel":
        return Variant(
            kernel, latent, grad, out, signs="both" if numbers[0] == "true" else "one", kind=kind, **drawn
        )
    if op == "estimate_kernel":
        return Variant(kernel, grad=grad, directions=1, kind=kind, **drawn)
    if op == "update_kernel":  # momentum stands for rules with one state
        own, kind = not rotated and numbers[1] == "true", "adamw" if numbers[0] == "true" else "momentum"
        return Variant(kernel, latent, grad, out, kind=kind, own=own, **drawn)
    if op == "quantize_kernel":
        return Variant(kernel, latent, None, out, scale="row", kind=kind)
    if op in ("backward_kernel", "learned_kernel"):
        return Variant(kernel, latent, grad, out, scale="row", kind=kind)
    if op == "measure_kernel":
        return Variant(kernel, grad=grad, kind=kind)
    if op == "hadamard_kernel":
        return Variant(kernel, latent, None, out, block=int(numbers[0]))
    return Variant(kernel, kind=kind)


def functions(cubin: Path) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Mangled name, machine code, and registers, stack, shared and local bytes of each kernel."""
    text, usage = dumps(cubin.read_bytes())
    numbers = {name: tuple(map(int, rest)) for name, *rest in usages(usage)}
    parts = re.split(r"^\s+Function : (\w+)$", text, flags=re.MULTILINE)
    for name, code in zip(parts[1::2], parts[2::2], strict=True):
        yield name, code, numbers[name]


def demangled(names: list[str]) -> list[str]:
    text = "\n".join(names)
    return subprocess.run(
        ["c++filt"], input=text, capture_output=True, text=True, check=True
    ).stdout.splitlines()


def inner_turns(variant: Variant) -> int:
    return INNER.get(variant.kernel, {}).get(variant.grad or "", 1)


def kernels(arch: int) -> Iterator[tuple[Variant, Report]]:
    """Every kernel's variant and report; an estimate, and AdamW's tail, also for four directions."""
    for cubin in sorted(compile_all(arch).glob("*.cubin")):
        found = list(functions(cubin))
        for (_, code, numbers), name in zip(found, demangled([f[0] for f in found]), strict=True):
            variant = variant_of(name)
            if variant is None:
                continue
            yield variant, report_of(code, numbers, inner_turns(variant), STAGES)
            if variant.kernel.endswith("estimate_kernel") or variant.kind == "adamw":
                yield variant._replace(directions=4), report_of(code, numbers, 4, STAGES)


def rows(arch: int) -> Iterator[tuple[Variant, Row]]:
    for variant, report in kernels(arch):
        turns = SPAN // (THREADS * TURN.get(variant.kernel, TURN_OF_OTHERS))
        yield variant, row_of_report(variant, arch, report, turns, THREADS, "cuda")
