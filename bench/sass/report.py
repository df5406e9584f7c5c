"""Variants of kernels, and the rows and lines that tell of their machine code."""

from __future__ import annotations

import re
from collections import Counter
from typing import NamedTuple

from fogzo_kernels.backends.gpu.plans import SPAN
from fogzo_kernels.spec.grid import OUTPUTS
from fogzo_kernels.spec.update import VARIANTS as RULES

from ..cases import short
from .machine_code import Report

Row = dict[str, object]
SIZES: dict[str | None, int] = {short(dtype): dtype.itemsize for dtype in OUTPUTS} | {None: 0}

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
    "shuffle": (32, r"SHFL"),
}


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
    kind: str | None = None  # of derivative or optimizer; the statistic
    directions: int | None = None  # of an estimate; in the fused tail None is 1
    master: bool = False
    block: int = 0  # elements of one of the Hadamard transform
    aligned: bool = True  # each tensor begins at a multiple of 16 bytes
    own: bool = False  # each tensor has a factor of its noise, or a sum of its own

    def __str__(self) -> str:
        fields = (self.latent, self.grad, self.out, self.distribution, self.signs, self.scale, self.kind)
        words = [self.kernel, *(f for f in fields if f is not None)]
        flags = {
            f"n={self.directions}": self.directions is not None, "shard": self.shard,
            "master": self.master, "device": not self.host, f"block={self.block}": self.block > 0,
            "unaligned": not self.aligned, "own": self.own,
        }  # fmt: skip
        return " ".join([*words, *(name for name, on in flags.items() if on)])

    @property
    def bytes_per_element(self) -> int:
        """The least that the op can move; 0 where the dtypes are only known when it runs."""
        if "any" in (self.latent, self.grad, self.out):
            return 0
        latent, grad, out = SIZES[self.latent], SIZES[self.grad], SIZES[self.out]
        if self.kernel.endswith("estimate_kernel"):
            return 2 * grad
        if self.kernel.endswith("update_kernel"):
            return 2 * latent + grad + 8 * RULES[self.kind or ""] + out + 4 * self.master
        return latent + grad + out * (2 if self.signs == "both" else 1)


def margin(counts: Counter[str], bytes_per_thread: float) -> float:
    """Memory time over the time of the busiest pipe."""
    clocks = max(
        sum(n for op, n in counts.items() if re.match(pattern, op)) / lanes for lanes, pattern in PIPES.values()
    )
    return bytes_per_thread * SMS * CLOCK / COPY_BANDWIDTH / clocks


def row_of_report(variant: Variant, arch: int, report: Report, tiles: int, threads: int, backend: str) -> Row:
    """A kernel in the table; ``tiles``: turns of its loop."""
    counts = report.weighted(tiles)
    streams = bool(report.loop)
    elements, loop = SPAN // threads, tiles * sum(report.loop.values())
    return {
        **{name: getattr(variant, name) for name in ("kernel", "latent", "grad", "out")},
        "backend": backend,
        "arch": arch,
        **{name: getattr(variant, name) for name in ("distribution", "signs", "scale", "shard")},
        **{name: getattr(variant, name) for name in ("kind", "directions", "master", "block")},
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
    }


#: Heading of each column of a line -> the row's field.
SHOWN = {
    "instr/el": "instructions_per_element",
    "margin": "margin",
    "regs": "registers",
    "spill B": "spill_bytes",
    "shared B": "shared_bytes",
    "barriers": "barriers",
    "load": "load_bits",
    "store": "store_bits",
}
HEADINGS = " " * 7 + "".join(f"{heading:>9}" for heading in SHOWN)


def line(variant: Variant, found: Row) -> str:
    cells = ["-" if found[name] is None else str(found[name]) for name in SHOWN.values()]
    return (
        f"sm_{found['arch']:<4}" + "".join(f"{cell:>9}" for cell in cells) + f"  {found['backend']} {variant}"
    )
