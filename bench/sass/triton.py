"""Triton's kernels: their variants, each compiled alone."""

from __future__ import annotations

from collections.abc import Iterator

import triton
from triton._utils import find_paths_if
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fogzo_kernels.backends.triton import (
    estimate,
    hadamard,
    launch,
    learned,
    measure,
    norm,
    perturb,
    quantize,
    tail,
)
from fogzo_kernels.backends.triton.elements import Grid
from fogzo_kernels.backends.triton.launch import NUM_WARPS
from fogzo_kernels.backends.triton.noise import noise_kernel
from fogzo_kernels.spec.grid import FLOATS, OUTPUTS
from fogzo_kernels.spec.hadamard import BLOCKS
from fogzo_kernels.spec.noise import DISTRIBUTIONS
from fogzo_kernels.spec.scale import STATISTICS
from fogzo_kernels.spec.straight_through import VARIANTS as KINDS
from fogzo_kernels.spec.update import VARIANTS as RULES

from ..cases import DTYPES as COMBINATIONS
from ..cases import short
from .machine_code import Report, read_cubin
from .report import SPAN, Row, Variant, row_of_report

DTYPES = {short(dtype): dtype for dtype in OUTPUTS}
MODULES = (norm, perturb, estimate, tail, quantize, learned, measure, hadamard)
KERNELS = {"noise_kernel": noise_kernel} | {
    name: kernel for module in MODULES for name, kernel in vars(module).items() if name.endswith("_kernel")
}
#: Types of a kernel's arguments where they are not fp32; of the step's scalars, if they lie on the device.
TYPES = {
    "table": "*i64", "owner": "*i32", "crossing": "*i32", "partial": "*fp64", "coef": "*fp32", "out": "*fp32",
    "counters": "*i64", "direction": "i32", "n": "i32", "count": "i32", "draw": ("*i64", "*i64"),
    "mix": ("*fp32", "*fp64", "fp32", "fp32"), "losses": ("*fp32", "*fp32", "i32", "fp32"),
    "optimizer": ("*fp64", "*i64", "i64", "i64", "i64", "i64"), "grid": Grid(*["fp32"] * 4),
    "numbers": ("fp32",) * 6, "rule": ("fp32",) * 3, "factors": "*fp32", "given": ("constexpr",) * 3,
}  # fmt: skip
ON_HOST = {
    "draw": ("i64", "i64"), "mix": ("*fp32", "constexpr", "fp32", "fp32"),
    "optimizer": ("i64", "*i64", "i64", "i64", "i64", "i64"),
}  # fmt: skip
#: Partial sums that a kernel's turn adds.
SUMS = {"sum_kernel": norm.SUM_BLOCK, "learned_sum_kernel": learned.SUM_BLOCK, "join_kernel": measure.JOINED}
#: Tiles of a turn of the outer loop, where there is one: of cells that are eight rows of a tile long.
INNER = {"measure_kernel": 8}
#: Chunks that share an alpha: rows of 1,024 elements, groups of 128, any; each tensor's own.
UNITS = {"tensor": 0, "row": learned.WIDE.value, "group": learned.MIDDLE.value, "any": 1, "mixed": None}


# ---- variants


def variants() -> Iterator[Variant]:
    """Every kernel, over the dtypes, distributions, signs and scales that select different code."""
    for dist in DISTRIBUTIONS:
        yield Variant("noise_kernel", out="fp32", distribution=dist)
    for grad in map(short, FLOATS):
        for scale in ("tensor", "row"):
            yield Variant("sumsq_kernel", grad=grad, scale=scale)
    yield Variant("sum_kernel")
    yield from own_variants()
    for statistic in STATISTICS:
        for data in map(short, FLOATS):
            yield Variant("measure_kernel", grad=data, kind=statistic)
        yield Variant("join_kernel", kind=statistic)
    yield from streaming_variants()
    for host in (True, False):
        yield Variant("coefficients_kernel", host=host)
        for rule in ("adamw", "momentum"):
            yield Variant("update_coefficients_kernel", kind=rule, host=host)
    for kind in (None, *KINDS):
        for latent, out in (("bf16", "bf16"), ("fp32", "fp32"), ("fp32", "int8")):
            if kind is None or out != "int8":
                scale = "tensor" if kind is None else "row"
                grad = latent if kind else None
                yield Variant("quantize_kernel", latent, grad, out, scale=scale, kind=kind)
            if kind and out != "int8":
                for scale in UNITS:
                    yield Variant("learned_kernel", latent, latent, out, scale=scale, kind=kind)
    yield Variant("learned_sum_kernel")
    yield from unaligned_variants()
    for block in BLOCKS:
        for dtype in ("bf16", "fp32"):
            yield Variant("hadamard_kernel", dtype, None, dtype, block=block)
        yield from rotated_variants(block)


def own_variants() -> Iterator[Variant]:
    """Of lists in which each tensor has a factor of its noise, or a sum of its own."""
    yield Variant("sum_kernel", own=True)
    drawn = {"distribution": "uniform", "scale": "tensor", "own": True}
    for n in (1, 4):
        yield Variant("estimate_kernel", grad="bf16", directions=n, **drawn)
    for signs in ("one", "both"):
        yield Variant("perturb_kernel", "bf16", "bf16", "bf16", signs=signs, **drawn)
    for kind in RULES:
        yield Variant("update_kernel", "fp32", "bf16", "bf16", kind=kind, **drawn)


def unaligned_variants() -> Iterator[Variant]:
    """Of lists in which some tensor does not begin at a multiple of 16 bytes."""
    for dtype in ("bf16", "fp32"):
        yield Variant("sumsq_kernel", grad=dtype, scale="row", aligned=False)
        yield Variant("perturb_kernel", dtype, dtype, dtype, "uniform", "both", "row", aligned=False)
        yield Variant(
            "estimate_kernel", grad=dtype, distribution="uniform", scale="row", directions=1, aligned=False
        )
        yield Variant(
            "update_kernel", "fp32", dtype, dtype, "uniform", scale="row", kind="adamw", aligned=False
        )
        yield Variant("quantize_kernel", dtype, dtype, dtype, scale="row", kind="identity_trust", aligned=False)
        yield Variant(
            "learned_kernel", dtype, dtype, dtype, scale="row", kind="identity_clipped", aligned=False
        )


def rotated_variants(block: int) -> Iterator[Variant]:
    """Of quantizers with a transform."""
    for types in COMBINATIONS.values():
        latent, grad, out = map(short, types)
        for signs in ("one", "both"):
            yield Variant("perturb_kernel", latent, grad, out, "uniform", signs, "row", block=block)
        yield Variant("quantize_kernel", latent, None, out, scale="row", block=block)
    for dist in DISTRIBUTIONS:
        yield Variant("perturb_kernel", "bf16", "bf16", "bf16", dist, "one", "row", block=block)
    for grad in map(short, FLOATS):
        for n in (1, 4):
            yield Variant(
                "estimate_kernel", None, grad, None, "uniform", None, "row", directions=n, block=block
            )
        for kernel in ("quantize_kernel", "learned_kernel"):
            yield Variant(kernel, grad, grad, grad, scale="row", kind="identity_trust", block=block)
    for rule in RULES:
        for *dtypes, master in (("fp32", "bf16", "bf16", False), ("bf16", "bf16", "int8", True)):
            yield Variant(
                "update_kernel", *dtypes, "uniform", scale="row", kind=rule, master=master, block=block
            )


def streaming_variants() -> Iterator[Variant]:
    for types in COMBINATIONS.values():
        latent, grad, out = map(short, types)
        for dist in DISTRIBUTIONS:
            for signs in ("one", "both"):
                for scale, shard in (("tensor", False), ("row", True)):
                    yield Variant("perturb_kernel", latent, grad, out, dist, signs, scale, shard)
    for grad in map(short, FLOATS):
        for dist in DISTRIBUTIONS:
            for scale, shard in (("tensor", False), ("row", True)):
                yield Variant("estimate_kernel", None, grad, None, dist, None, scale, shard, directions=1)
            yield Variant("estimate_kernel", None, grad, None, dist, None, "tensor", directions=4)
    device = {"distribution": "uniform", "scale": "tensor", "host": False}
    yield Variant("perturb_kernel", "bf16", "bf16", "bf16", signs="one", **device)
    yield Variant("estimate_kernel", grad="bf16", directions=1, **device)
    for dist in DISTRIBUTIONS:
        yield Variant("update_kernel", "fp32", "bf16", "bf16", dist, scale="tensor", kind="adamw", directions=4)
    for *dtypes, master in (
        ("fp32", "bf16", "bf16", False),
        ("fp32", "fp32", "fp32", False),
        ("bf16", "bf16", "bf16", True),
        ("bf16", "bf16", "int8", False),
    ):
        for dist in DISTRIBUTIONS:
            for rule in RULES:
                yield Variant("update_kernel", *dtypes, dist, scale="tensor", kind=rule, master=master)
        yield Variant("update_kernel", *dtypes, "uniform", scale="row", shard=True, kind="adamw", master=master)


# ---- compile and count


def constants_of(variant: Variant) -> dict[str, object]:
    """Constexpr arguments of the kernel."""
    names = variant.latent, variant.grad, variant.out
    latent, grad, out = (launch.DTYPES.get(DTYPES.get(name or "")) for name in names)
    if variant.kernel == "quantize_kernel" and variant.kind is None:
        grad = latent
    if variant.kernel == "measure_kernel":
        latent = grad
    flags = {"aligned": variant.aligned, "per_tensor": variant.scale == "tensor", "shard": variant.shard}
    config = launch.Config(
        tile_of(variant),
        **flags,
        latent=latent,
        grad=grad,
        out=out,
        distribution=variant.distribution,
        noise_scale=0.5,
        block=variant.block,
        block_factor=launch.block_factor(variant.block),
        minus=variant.signs == "both",
        variant=variant.kind,
        states=RULES.get(variant.kind or "", 0),
        master=variant.master,
        one_direction=variant.directions == 1,
        unit=UNITS.get(variant.scale or ""),
    )
    given = {"config": config, "ROOT": True, "STATISTIC": variant.kind, "BLOCK": SUMS.get(variant.kernel)}
    if variant.kernel == "sum_kernel":
        given |= {"ROOT": False, "BLOCK": norm.TENSOR_BLOCK} if variant.own else {"table": None}
    if not variant.own:
        given["factors"] = None
    if variant.kernel == "learned_sum_kernel":
        given["given"] = None
    return {name: value for name, value in given.items() if name in KERNELS[variant.kernel].arg_names}


def tile_of(variant: Variant) -> int:
    return tail.TILE if variant.kernel == "update_kernel" else launch.TILE


def options_of(variant: Variant) -> dict[str, int]:
    unit, kind = UNITS.get(variant.scale or ""), variant.kind or ""
    registers = {
        "sumsq_kernel": norm.REGISTERS,
        "update_kernel": tail.registers_of(variant.block, variant.aligned),
        "hadamard_kernel": hadamard.REGISTERS,
        "learned_kernel": learned.registers_of(unit, kind, variant.block),
        "perturb_kernel": perturb.registers_of(DTYPES[variant.out or "fp32"], variant.block),
    }.get(variant.kernel)
    warps = norm.SUM_WARPS if variant.kernel == "sum_kernel" and not variant.own else NUM_WARPS
    return {"num_warps": warps} | ({"maxnreg": registers} if registers else {})


def compile_variant(variant: Variant, arch: int = 90) -> Report:
    """Compile for compute capability ``arch`` / 10 and read the machine code."""
    kernel, given = KERNELS[variant.kernel], constants_of(variant)
    types = {**TYPES, **ON_HOST} if variant.host else TYPES
    signature = {name: "constexpr" if name in given else types.get(name, "fp32") for name in kernel.arg_names}
    values = list(signature.values())
    constants = dict.fromkeys(find_paths_if(values, lambda _, t: t == "constexpr"))
    constants |= {(kernel.arg_names.index(name),): value for name, value in given.items()}
    pointers = find_paths_if(values, lambda _, t: t.startswith("*"))
    attributes = {path: [["tt.divisibility", 16]] for path in pointers}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    binary = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options_of(variant))
    return read_cubin(binary.asm["cubin"], variant.directions or INNER.get(variant.kernel, 1))


def row(variant: Variant, arch: int) -> Row:
    report = compile_variant(variant, arch)
    turns = SPAN // tile_of(variant) // INNER.get(variant.kernel, 1)
    return row_of_report(variant, arch, report, turns, 32 * NUM_WARPS, "triton")
