"""Compile the Triton kernels for a GPU that need not be there, and count their machine code.

``python -m bench.sass`` prints a line per variant. A count says what the compiler made, not how
fast it runs.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fogzo_kernels.backends.triton import NUM_WARPS, SPAN, TILE, kernels

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
ELEMENTS_PER_THREAD = TILE // (32 * NUM_WARPS)

TYPES = {
    "table": "*i64", "owner": "*i32", "partial": "*fp64", "norm": "*fp32", "coef": "*fp32",
    "losses_plus": "*fp32", "losses_minus": "*fp32", "counters": "*i64", "one_minus_beta": "*fp64",
    "seed": "*i64", "step": "*i64", "direction": "i32", "n": "i32", "count": "i32", "out": "*fp64",
}  # fmt: skip


class Variant(NamedTuple):
    kernel: str
    constants: dict[str, object]

    def __str__(self) -> str:
        shown = {k: v for k, v in self.constants.items() if k not in ("SPAN", "TILE", "NOISE_SCALE")}
        return self.kernel + " " + " ".join(f"{k.lower()}={v}" for k, v in shown.items())


class Report(NamedTuple):
    registers: int
    stack_bytes: int
    shared_bytes: int
    opcodes: Counter[str]

    @property
    def per_element(self) -> float:
        """Instructions of the whole kernel over the elements a thread handles in one tile."""
        return sum(self.opcodes.values()) / ELEMENTS_PER_THREAD

    def count(self, prefix: str) -> int:
        return sum(n for op, n in self.opcodes.items() if op.startswith(prefix))


def variants() -> Iterator[Variant]:
    """Every kernel, over dtypes, distributions, signs and scales that select different code.

    The step's scalars are in device memory, but in the variants with ``one_minus_beta=None``.
    """
    tl = triton.language
    span = {"SPAN": SPAN, "TILE": TILE}
    dists = ("uniform", "rademacher", "triangular", "logistic", "gaussian")
    for dist in dists:
        yield Variant("noise_kernel", {**span, "DIST": dist, "SHARD": False})
    for grad in (tl.bfloat16, tl.float32, tl.float16):
        for per_tensor in (True, False):
            yield Variant("sumsq_kernel", {**span, "GRAD_T": grad, "PER_TENSOR": per_tensor})
    for types in (
        (tl.bfloat16, tl.bfloat16, tl.bfloat16),
        (tl.float32, tl.float32, tl.float32),
        (tl.float32, tl.bfloat16, tl.bfloat16),
        (tl.float16, tl.float16, tl.float16),
        (tl.bfloat16, tl.bfloat16, tl.int8),
    ):
        latent, grad, out = types
        for dist in dists if out is not tl.float16 else dists[:1]:
            for plus, minus in ((True, False), (True, True)):
                for per_tensor, shard in ((True, False), (False, True)):
                    yield Variant("perturb_kernel", {
                        **span, "DIST": dist, "NOISE_SCALE": 0.5, "LATENT_T": latent,
                        "GRAD_T": grad, "OUT_T": out, "WRITE_PLUS": plus, "WRITE_MINUS": minus,
                        "PER_TENSOR": per_tensor, "SHARD": shard,
                    })  # fmt: skip
    yield Variant("coefficients_kernel", {"NOISE_SCALE": 0.5})
    yield Variant("coefficients_kernel", {"NOISE_SCALE": 0.5, "one_minus_beta": None, "counters": None})
    yield Variant("perturb_kernel", {
        **span, "DIST": "uniform", "NOISE_SCALE": 0.5, "LATENT_T": tl.bfloat16, "GRAD_T": tl.bfloat16,
        "OUT_T": tl.bfloat16, "WRITE_PLUS": False, "WRITE_MINUS": True, "PER_TENSOR": True, "SHARD": False,
        "one_minus_beta": None,
    })  # fmt: skip
    for dist in dists:
        for grad in (tl.bfloat16, tl.float32):
            for per_tensor, shard in ((True, False), (False, True)):
                yield Variant("estimate_kernel", {
                    **span, "DIST": dist, "GRAD_T": grad, "PER_TENSOR": per_tensor, "SHARD": shard,
                })  # fmt: skip
    for kind in (None, "identity_clipped", "identity", "hardtanh", "tanh", "approxsign"):
        same = (tl.bfloat16, tl.bfloat16), (tl.float32, tl.float32)
        for dtype, out in (*same, (tl.float32, tl.int8)):
            if kind is None or out is not tl.int8:
                yield Variant("quantize_kernel", {
                    **span, "LATENT_T": dtype, "GRAD_T": dtype, "OUT_T": out, "KIND": kind,
                    "PER_TENSOR": kind is None,
                })  # fmt: skip
    yield Variant("sum_kernel", {"BLOCK": 1024})


def compile_variant(variant: Variant, arch: int = 90) -> Report:
    """Compile for compute capability ``arch`` / 10 and read the machine code."""
    fn = getattr(kernels, variant.kernel)
    signature, constants, attributes = {}, {}, {}
    on_host = "one_minus_beta" in variant.constants  # None: the step's scalars are kernel arguments
    types = {**TYPES, "seed": "i64", "step": "i64"} if on_host else TYPES
    for i, name in enumerate(fn.arg_names):
        if name in variant.constants:
            signature[name], constants[(i,)] = "constexpr", variant.constants[name]
        else:
            signature[name] = types.get(name, "fp32")
            if signature[name].startswith("*"):
                attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=fn, signature=signature, constexprs=constants, attrs=attributes)
    target = GPUTarget("cuda", arch, 32)
    binary = triton.compile(source, target=target, options={"num_warps": NUM_WARPS})
    return read_cubin(binary.asm["cubin"])


def read_cubin(cubin: bytes) -> Report:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        dump = [
            subprocess.run([CUOBJDUMP, flag, file.name], capture_output=True, text=True, check=True)
            for flag in ("-sass", "-res-usage")
        ]
    usage = dump[1].stdout + dump[1].stderr
    numbers = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", usage)
    if numbers is None:
        raise RuntimeError(f"cuobjdump reported no resource usage: {usage}")
    opcodes = re.findall(
        r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", dump[0].stdout, re.MULTILINE
    )
    registers, stack, shared = map(int, numbers.groups())
    return Report(registers, stack, shared, Counter(op for op in opcodes if op != "NOP"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", type=int, default=90, help="compute capability times ten")
    parser.add_argument("--only", default="", help="part of a variant's name")
    args = parser.parse_args()
    for variant in variants():
        if args.only in str(variant):
            report = compile_variant(variant, args.arch)
            print(
                f"{report.registers:4d} registers {report.stack_bytes:4d} stack"
                f" {report.shared_bytes:5d} shared {sum(report.opcodes.values()):5d} instructions"
                f" {report.count('LDG.E.128'):2d} LDG.128 {report.count('BAR'):2d} BAR  {variant}",
                flush=True,
            )


if __name__ == "__main__":
    main()
