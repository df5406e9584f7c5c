"""Builds the native modules. Everything else stands in pyproject.toml.

DEBUG=1 builds with assertions and without optimization; SANITIZE=address,undefined, say, with those
sanitizers of the compiler (`make sanitize`). FOGZO_BUILD_CUDA says whether the CUDA backend is built: auto
(the default: where nvcc and a PyTorch with CUDA are found), 0 or 1; TORCH_CUDA_ARCH_LIST for which compute
capabilities.
"""

import os
import sys
from glob import glob

import pybind11
from setuptools import __version__, setup
from torch.utils.cpp_extension import CppExtension

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # isolated builds do not have it there
import build_cuda

DEBUG = os.environ.get("DEBUG") == "1"
SANITIZE = os.environ.get("SANITIZE", "")
if SANITIZE:  # a report ends the process; a conversion of a float that does not fit is one, too
    SANITIZERS = [f"-fsanitize={SANITIZE},float-cast-overflow", "-fno-sanitize-recover=all"]
    # -fno-wrapv: Python's own flags define signed overflow, which would hide it
    OPTIMIZATION = ["-O1", "-g", "-UNDEBUG", "-fno-omit-frame-pointer", "-fno-wrapv", *SANITIZERS]
else:
    SANITIZERS = []
    OPTIMIZATION = ["-O0", "-g", "-UNDEBUG"] if DEBUG else ["-O3", "-fno-math-errno"]
TORCH_TARGET = "2.11"  # the oldest torch that the stable-ABI ops run on
major, minor = map(int, TORCH_TARGET.split("."))

native = CppExtension(
    "fogzo_kernels._C",
    sorted(glob("csrc/*.cpp") + glob("csrc/cpu/*.cpp")),
    include_dirs=[pybind11.get_include()],
    depends=sorted(glob("csrc/**/*.h", recursive=True)),
    define_macros=[
        ("TORCH_TARGET_VERSION", f"0x{major:02x}{minor:02x}000000000000"),
        ("FOGZO_TORCH_TARGET", f'"{TORCH_TARGET}"'),
        ("FOGZO_SANITIZERS", f'"{SANITIZE or "none"}"'),
    ],
    extra_compile_args=[
        "-std=c++17",
        "-ffp-contract=off",  # only std::fma may fuse: the contract pins every rounding
        "-fvisibility=hidden",
        "-Werror=switch",  # a switch over an enumeration knows each value
        *OPTIMIZATION,
    ],
    extra_link_args=SANITIZERS,
)

cuda = build_cuda.extension(DEBUG)

# pyproject.toml cannot state the license for every setuptools: before 77 they refuse what later ones ask for
license_keyword = "license_expression" if int(__version__.split(".")[0]) >= 77 else "license"

setup(
    **{license_keyword: "MIT"},
    ext_modules=[native, *([cuda] if cuda else [])],
    cmdclass={"build_ext": build_cuda.BuildNative},
)
