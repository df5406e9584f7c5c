"""Machine code beside the tables of test_sass.py: lists that are not aligned, and a reciprocal's rounding."""

import shutil
import subprocess

import pytest
from support.triton_code import triton_rows

from bench.sass import cuda, machine_code
from build_cuda import find_nvcc


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_lists_that_are_not_aligned_stay_in_registers(triton, dtype):
    """Those of their tensors that are aligned have the same accesses."""
    names = [
        f"perturb_kernel {dtype} {dtype} {dtype} uniform both row",
        f"estimate_kernel {dtype} uniform row n=1",
        f"update_kernel fp32 {dtype} {dtype} uniform row adamw",
        f"quantize_kernel {dtype} {dtype} {dtype} row identity_trust",
    ]
    names = [f"{name} unaligned" for name in names]
    for name in names:
        row = triton_rows(90)(name)
        assert (row["spill_bytes"], row["shared_bytes"], row["barriers"]) == (0, 0, 0), name
        assert row["load_bits"] == 128, name
        assert row["margin"] > 1, name


def test_the_loop_for_what_is_not_aligned_is_not_counted():
    """Though it is longer, and has the same wide accesses for those tensors that are aligned."""
    wide = ["LDG.E.128 R4, [R8]", "FFMA R5, R5, R5", "STG.E.128 [R8], R4", "@P1 BRA 0x10"]
    single = ["LDG.E.128 R4, [R8]", *["LDG.E.U16 R4, [R8]"] * 8, "FADD R5, R5, R5", "STG.E.128 [R8], R4"]
    lines = ["MOV R1, R2", *wide, *single, "@P1 BRA 0x50", "EXIT"]
    text = "\n".join(f"        /*{16 * i:04x}*/                   {line} ;" for i, line in enumerate(lines))
    prologue, loop, _ = machine_code.split(text, 1)
    assert prologue == {"MOV": 1}
    assert loop == {"LDG.E.128": 1, "FFMA": 1, "STG.E.128": 1, "BRA": 1}


RECIPROCAL = r"""
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <initializer_list>
int main() { // y: the floats within an ulp of 1 / x
  for (uint32_t m = 0; m < 1u << 23; ++m) {
    const uint32_t bits = 0x3F800000u | m;
    float x;
    std::memcpy(&x, &bits, 4);
    const float right = 1.0f / x;
    for (float y : {std::nextafter(right, 0.0f), right, std::nextafter(right, 2.0f)})
      if (std::fabs(y - 1.0L / x) <= (m ? 0x1p-24L : 0x1p-23L) &&
          std::fma(y, std::fma(-x, y, 1.0f), y) != right)
        std::printf("%x ", bits);
  }
}
"""


def test_one_newton_step_makes_a_reciprocal_of_an_approximation(tmp_path):
    """Of any within an ulp, which is what PTX promises; but for one mantissa, which the next test is about."""
    if (compiler := shutil.which("g++")) is None:
        pytest.skip("g++ is not on the path")
    source, program = tmp_path / "reciprocal.cpp", tmp_path / "reciprocal"
    source.write_text(RECIPROCAL)
    subprocess.run([compiler, "-O2", "-ffp-contract=off", str(source), "-o", str(program)], check=True)
    found = subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout
    assert found.split() == ["3fffffff"]


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_the_compiler_rounds_a_reciprocal_correctly_by_the_same_step(tmp_path, arch):
    """So the hardware's approximation is one from which the step is right for every mantissa."""
    if (reason := cuda.unavailable()) is not None:
        pytest.skip(f"nothing can be compiled for a GPU: {reason}")
    source, cubin = tmp_path / "reciprocal.cu", tmp_path / "reciprocal.cubin"
    source.write_text('extern "C" __global__ void f(float *x) { *x = __frcp_rn(*x); }')
    subprocess.run([find_nvcc(), f"-arch=sm_{arch}", "-cubin", str(source), "-o", str(cubin)], check=True)
    code = machine_code.split(machine_code.dumps(cubin.read_bytes())[0], 1)[2]
    start = next(i for i, (_, op, _) in enumerate(code) if op == "MUFU.RCP")  # of numbers that are not extreme
    (_, x), *rest = [(op, operands.strip()) for _, op, operands in code[start : start + 4]]
    y, x = (register.strip() for register in x.split(","))
    assert [op for op, _ in rest] == ["FFMA", "FADD.FTZ", "FFMA"]
    (left, e), (negated, minus), (out, step) = (operands.split(", ", 1) for _, operands in rest)
    assert (e, minus) == (f"{x}, {y}, -1", f"-{left}, -RZ")
    assert step == f"{y}, {negated}, {y}", out
