"""The CUDA kernels: compiled by nvcc, all of an architecture at once.

Cubins lie beside the PTX that they are made of, with a log of what ptxas said of them.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from build_cuda import find_nvcc
from cuda_units import Unit, compiled, once, parallel, run, units
from fogzo_kernels.spec import noise, scale, straight_through
from fogzo_kernels.spec.dtypes import OUTPUTS

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
#: Kernels around a transform know its block when they run: counted are the stages that go between threads for
#: blocks of 128, of pairs of chunks.
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
    """Of a demangled name; None for what is no kernel."""
    found = re.match(r"(?:void )?fogzo::cuda::(\w+)(?:<(.*)>)?\(", name)
    if found is None:
        return None
    kernel = found.group(1)
    arguments = [a.rsplit(")", 1)[-1].strip() for a in (found.group(2) or "").split(",")]
    if kernel == "noise_kernel":
        return Variant(kernel, out="fp32", distribution=DISTRIBUTIONS[int(arguments[0])])
    if kernel == "sumsq_kernel":
        return Variant(kernel, grad=DTYPES[int(arguments[0])], scale=scale_of(arguments[1]))
    if kernel == "perturb_kernel":
        dist, *types, both, plain = arguments
        signs = "both" if both == "true" else "one"
        return Variant(kernel, *dtypes(*types), signs=signs, **drawn(dist, plain))
    if kernel == "estimate_kernel":
        dist, grad, plain = arguments
        return Variant(kernel, grad=DTYPES[int(grad)], directions=1, **drawn(dist, plain))
    if kernel == "update_kernel":
        dist, adamw, plain, *types = arguments
        rule = "adamw" if adamw == "true" else "momentum"  # with one state, as momentum and nesterov have
        return Variant(kernel, *dtypes(*types), kind=rule, **drawn(dist, plain))
    if kernel.startswith("rotated"):
        return rotated_variant(kernel, arguments)
    if kernel == "quantize_kernel":
        latent, out = dtypes(*arguments)
        return Variant(kernel, latent, None, out, scale="row")
    if kernel in ("backward_kernel", "learned_kernel"):
        dtype = DTYPES[int(arguments[1])]
        return Variant(kernel, dtype, dtype, dtype, scale="row", kind=KINDS[int(arguments[0])])
    if kernel == "measure_kernel":
        return Variant(kernel, grad=DTYPES[int(arguments[1])], kind=STATISTICS[int(arguments[0])])
    if kernel == "join_kernel":
        return Variant(kernel, kind=STATISTICS[int(arguments[0])])
    if kernel == "hadamard_kernel":
        latent, out = dtypes(*arguments[1:])
        return Variant(kernel, latent, None, out, block=int(arguments[0]))
    return Variant(kernel)


def rotated_variant(kernel: str, arguments: list[str]) -> Variant:
    """Of a kernel around a transform. Rows, groups and shards go by the same kernel."""
    if kernel == "rotated_perturb_kernel":
        dist, *types, both, _ = arguments
        signs = "both" if both == "true" else "one"
        return Variant(kernel, *dtypes(*types), signs=signs, kind=BLOCK, **drawn(dist, "false"))
    if kernel == "rotated_estimate_kernel":
        dist, grad, _ = arguments
        return Variant(kernel, grad=DTYPES[int(grad)], kind=BLOCK, directions=1, **drawn(dist, "false"))
    if kernel == "rotated_update_kernel":
        dist, adamw = arguments
        rule = "adamw" if adamw == "true" else "momentum"
        return Variant(kernel, "any", "any", "any", kind=rule, **drawn(dist, "false"))
    if kernel == "rotated_quantize_kernel":
        latent, out = dtypes(*arguments[:2])
        return Variant(kernel, latent, None, out, scale="row", kind=BLOCK)
    if kernel in ("rotated_backward_kernel", "rotated_learned_kernel"):
        dtype = DTYPES[int(arguments[1])]
        return Variant(kernel, dtype, dtype, dtype, scale="row", kind=KINDS[int(arguments[0])])
    return Variant(kernel)


def drawn(dist: str, plain: str) -> dict[str, Any]:
    """Fields of a variant that draws noise."""
    return {
        "distribution": DISTRIBUTIONS[int(dist)],
        "scale": scale_of(plain),
        "shard": plain == "false",
    }


def scale_of(plain: str) -> str:
    """The kernels that are not plain take rows, groups, shards and scalars in device memory."""
    return "tensor" if plain == "true" else "row"


def dtypes(*numbers: str) -> tuple[str, ...]:
    return tuple(DTYPES[int(n)] for n in numbers)


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
