"""Builds the native module. Everything else stands in pyproject.toml.

DEBUG=1 builds with assertions and without optimization; SANITIZE=address,undefined, say, with those
sanitizers of the compiler (`make sanitize`).
"""

import os
from glob import glob

import pybind11
from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

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
        *OPTIMIZATION,
    ],
    extra_link_args=SANITIZERS,
)

setup(ext_modules=[native], cmdclass={"build_ext": BuildExtension.with_options(use_ninja=True)})
