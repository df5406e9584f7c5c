"""The kernels with other compilers and for other processors: they compile, and give the same bits; and what
no compiler may take."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import fogzo_kernels as fk
from build_cuda import find_nvcc, gencode
from fogzo_kernels.spec.noise import DISTRIBUTIONS

ROOT = Path(__file__).parents[1]
INCLUDE = Path(torch.__file__).parent / "include"
FLAGS = ["-std=c++17", "-O1", "-ffp-contract=off", "-fno-math-errno", "-Wall", "-Werror", f"-I{INCLUDE}"]
#: A compiler, and what runs its programs here.
COMPILERS = {"clang++": None, "aarch64-linux-gnu-g++": "qemu-aarch64"}
COUNT = 1003
# u of every distribution, and Q of it in float16, which the portable kernels convert by themselves
PROGRAM = r"""
#include "cpu/kernels.h"
#include <cstdio>
int main() {
  using namespace fogzo::cpu;
  constexpr int64_t count = 1003;
  static float u[count], alpha = 0.25f;
  static uint16_t q[count];
  const Kernels &run = kernels();
  for (int d = 0; d < fogzo::kCount<fogzo::Distribution>; ++d) {
    const Noise what{fogzo::Distribution(d), {uint64_t(3) << 40 | 11, 7, 5, 0}};
    Operands item;
    item.numel = item.scale_length = count;
    item.alpha = &alpha;
    item.layout = {13, 100, 140};
    item.tensor_id = 9;
    item.plus = {u, fogzo::Dtype::float32};
    run.noise(item, what, 1.0f, 0, count);
    item.latent = {u, fogzo::Dtype::float32};
    item.plus = {q, fogzo::Dtype::float16};
    run.quantize(item, {-128, 127, 0.5f}, 1.0f, 0, count);
    for (int64_t i = 0; i < count; ++i)
      std::printf("%a %d\n", u[i], int(q[i]));
  }
}
"""


@pytest.mark.slow_first
@pytest.mark.parametrize("compiler", COMPILERS)
def test_every_compiler_gives_the_same_bits(compiler, tmp_path):
    if not shutil.which(compiler):
        pytest.skip(f"there is no {compiler}")
    main, program = tmp_path / "main.cpp", tmp_path / "program"
    main.write_text(PROGRAM)
    sources = [
        p for p in sorted((ROOT / "csrc/cpu").glob("*.cpp")) if p.name != "ops.cpp"
    ]  # that one needs torch
    command = [compiler, *FLAGS, "-static", f"-I{ROOT / 'csrc'}", main, *sources, "-o", program]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    emulator = COMPILERS[compiler]
    if emulator and not shutil.which(emulator):
        pytest.skip(f"it compiles; there is no {emulator} to run it")
    command = [emulator, program] if emulator else [program]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    for d, distribution in enumerate(DISTRIBUTIONS):
        found = [line.split() for line in lines[d * COUNT : (d + 1) * COUNT]]
        u = torch.tensor([float.fromhex(x) for x, _ in found])
        expected = fk.noise(
            COUNT,
            distribution,
            seed=3 << 40 | 11,
            step=7,
            direction=5,
            tensor_id=9,
            layout=(13, 100, 140),
            device=torch.device("cpu"),
            backend="cpu",
        )
        assert torch.equal(u * DISTRIBUTIONS[distribution], expected), distribution
        q = torch.full((COUNT,), float("nan"), dtype=torch.float16)
        fk.quantize_(q, u, torch.tensor(0.25), grid=fk.Grid.half_offset(8), backend="cpu")
        bits = torch.tensor([int(x) for _, x in found], dtype=torch.int32).to(torch.int16)
        assert torch.equal(q.view(torch.int16), bits), distribution


#: A list of names.h, a name more in it, a file that must not compile with it, and what the compiler says there.
UNKNOWN = [
    ("DISTRIBUTIONS", "X(cauchy)", "cpu/portable.cpp", "noise_of_half() must know each distribution"),
    ("DISTRIBUTIONS", "X(cauchy)", "cpu/avx2.cpp", "begin_noise() must know each distribution"),
    ("DISTRIBUTIONS", "X(cauchy)", "cuda/noise.cu", "Scaled<fogzo::Distribution::cauchy>"),
    ("STRAIGHT_THROUGHS", "X(silu)", "cpu/portable.cpp", "derivative_of() must know each form"),
    ("STRAIGHT_THROUGHS", "X(silu)", "cuda/quantize.cu", "derivative_of() must know each form"),
    ("RULES", "X(lion, 1)", "cpu/portable.cpp", "updated() must know each rule"),
    ("RULES", "X(lion, 1)", "cpu/portable.cpp", "these must know each rule"),
    ("RULES", "X(lion, 1)", "cuda/tail.cu", "stepped() must know each rule"),
    ("RULES", "X(lion, 1)", "cpu/portable.cpp", "[-Werror=switch]"),
    ("BLOCKS", "X(2048)", "cpu/portable.cpp", "a tile holds whole blocks"),
    ("BLOCKS", "X(2048)", "cuda/quantize.cu", "two warps must hold a block in pairs of chunks"),
]


def compiled(source, root):
    """What g++ says of one file, or nvcc."""
    if source.startswith("cuda"):
        if (nvcc := find_nvcc()) is None:
            pytest.skip("there is no nvcc")
        command = [nvcc, "-Xcicc=-O0", "-Xcompiler=-O0,-Werror=switch", *gencode("9.0")]
    else:
        command = ["g++", "-O0", "-Werror=switch", f"-I{INCLUDE}"]
    command += ["-std=c++17", "-c", root / source, "-o", root / "object.o"]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.skipif(not shutil.which("g++"), reason="there is no g++")
@pytest.mark.parametrize(("enumeration", "name", "source", "message"), UNKNOWN)
def test_a_name_that_nothing_computes_does_not_compile(enumeration, name, source, message, tmp_path):
    shutil.copytree(ROOT / "csrc", tmp_path, dirs_exist_ok=True)
    names = tmp_path / "names.h"
    text, count = re.subn(
        rf"(#define FOGZO_{enumeration}\(X\)(?:.*\\\n)*.*)", rf"\1 {name}", names.read_text(), count=1
    )
    assert count == 1
    names.write_text(text)
    done = compiled(source, tmp_path)
    assert done.returncode != 0
    assert message in done.stderr


@pytest.mark.skipif(not shutil.which("g++"), reason="there is no g++")
@pytest.mark.parametrize("source", ["cpu/portable.cpp", "cuda/noise.cu"])
def test_the_sources_as_they_are_compile(source, tmp_path):
    """Else the cases above could fail for another reason."""
    shutil.copytree(ROOT / "csrc", tmp_path, dirs_exist_ok=True)
    assert compiled(source, tmp_path).returncode == 0
