"""``make sanitize``: the CPU part of the suite, with the native module under the compiler's sanitizers.

The module is built a second time, with a copy of the package, into build/sanitize; pytest and the
processes that tests start find that copy first. Any report of AddressSanitizer or
UndefinedBehaviorSanitizer ends the process, and so fails. Arguments go to pytest.
"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
BUILT = ROOT / "build/sanitize"
SANITIZERS = "address,undefined"
TESTS = (
    "native", "tensor_list", "vectors", "agreement", "ops", "update", "validation", "measure", "learned",
    "learned_native", "hadamard", "transform", "direct", "native_objects",
    "native_looks",
)  # fmt: skip
CHECK = "from fogzo_kernels import _C; print(_C.__file__, _C.build_info()['sanitizers'], *_C.cpu_isas())"


def runtime(name: str) -> str:
    """The compiler's own copy of a shared library."""
    compiler = os.environ.get("CXX", "c++")
    found = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    path = found.stdout.strip()
    if not os.path.isabs(path):
        raise SystemExit(f"{compiler} must bring {name}, which it does not")
    return os.path.realpath(path)


def environment() -> dict[str, str]:
    """What makes a Python use the built copy under the sanitizers."""
    return {
        **os.environ,
        "PYTHONPATH": str(BUILT),
        # before anything else is loaded: Python itself is not built with it. libstdc++ beside it, since the
        # runtime looks for the functions that throw exceptions when it starts.
        "LD_PRELOAD": f"{runtime('libasan.so')} {runtime('libstdc++.so.6')}",
        # Python and PyTorch keep memory until the process ends, which the leak check takes for leaks
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        # blocks of their own from malloc, so that the ends of PyTorch's and Python's objects are seen
        "PYTHONMALLOC": "malloc",
    }


def build() -> None:
    folders = ["--build-base", "build/sanitize-objects", "--build-lib", str(BUILT)]
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build", *folders],
        cwd=ROOT, env={**os.environ, "SANITIZE": SANITIZERS, "FOGZO_BUILD_CUDA": "0"}, check=True,
        stdout=subprocess.DEVNULL,  # ninja's progress
    )  # fmt: skip


def main() -> int:
    build()
    env = environment()
    told = subprocess.run([sys.executable, "-c", CHECK], cwd=BUILT, env=env, capture_output=True, text=True)
    if not told.stdout.startswith(str(BUILT)) or SANITIZERS not in told.stdout:
        raise SystemExit(f"the module under test must be the sanitized one, got {told.stdout}{told.stderr}")
    isas = told.stdout.split()[2:]
    # --capture=sys: a report goes to the file descriptor, which pytest would keep from a dying process
    options = ["-q", "-n", "auto", "--capture=sys", "-o", f"pythonpath={BUILT}"]
    pytest = [sys.executable, "-m", "pytest", *options, *sys.argv[1:]]
    # these two go through all sets by themselves
    runs: list[tuple[str | None, list[str]]] = [(None, ["cpu", "fuzz"]), *((isa, [*TESTS]) for isa in isas)]
    failed = []
    for isa, names in runs:
        chosen = {} if isa is None else {"FOGZO_CPU_ISA": isa}
        files = [f"python_tests/test_{name}.py" for name in names]
        done = subprocess.run(
            [*pytest, *files, "-k", "cpu or native or fuzz or direct"], cwd=ROOT, env={**env, **chosen}
        )
        if done.returncode:
            failed.append(f"{isa or 'all sets'}: exit status {done.returncode}")
    print("\n".join(failed) or f"no report from {SANITIZERS} on {', '.join(isas)}")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
