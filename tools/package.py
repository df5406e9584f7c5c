"""``make package``: sdist and wheel in dist/, and the tests of the wheel in an empty environment.

The wheel is built from the sdist. The environment gets what constraints.txt pins, and lies outside the
checkout, as do the tests that are run there, so that nothing of the checkout can be imported.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
DIST = ROOT / "dist"
NEEDED = ("torch", "numpy", "scipy", "triton", "pytest", "pytest-xdist", "hypothesis")
#: Tests of the source tree, not of what is installed.
OF_THE_TREE = (
    "ablation", "architecture", "bench", "bench_agree", "bench_executed", "bench_gpu", "bench_kernels",
    "bench_step", "compilers", "cuda", "frontends", "gpu", "guards", "llama_cpp", "machine_code",
    "migration", "outside_backends", "project", "ptx", "ptx_faults", "ptx_mutants", "ptx_opcodes", "readme",
    "report", "sass", "train_lm", "train_lm_parallel", "troubleshooting",
)  # fmt: skip
LEFT_OUT = (".gitignore",)  # of the sdist


def run(*command: object, cwd: Path = ROOT, **environment: str) -> str:
    """What the command prints; it must succeed."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")} | environment
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} failed:\n{done.stdout}\n{done.stderr}")
    return done.stdout


def build() -> tuple[Path, Path]:
    """The sdist and the wheel from it."""
    shutil.rmtree(DIST, ignore_errors=True)
    # --no-isolation: an isolated build would fetch a torch of its own, of another version and for CUDA
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", DIST)
    (sdist,), (wheel,) = DIST.glob("*.tar.gz"), DIST.glob("*.whl")
    print(run(sys.executable, "-m", "twine", "check", "--strict", sdist, wheel).strip())
    return sdist, wheel


def check_contents(sdist: Path, wheel: Path) -> None:
    """The sdist holds what git does; the wheel holds the package alone, native module included."""
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    tracked = run("git", "ls-files").splitlines() if (ROOT / ".git").exists() else []
    missing = [name for name in tracked if name not in (*held, *LEFT_OUT)]
    if missing:
        raise SystemExit(f"{sdist.name} must hold every file that git does, got none of {', '.join(missing)}")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    foreign = [name for name in names if not name.startswith(("fogzo_kernels/", "fogzo_kernels-"))]
    modules = [name for name in names if name.startswith("fogzo_kernels/_C.")]
    if foreign or len(modules) != 1:
        raise SystemExit(f"{wheel.name} must hold the package and one _C, got {modules} and {foreign}")
    print(f"{sdist.name}: {len(held)} entries; {wheel.name}: {len(names)} entries, {modules[0]}")


def install(wheel: Path, where: Path) -> Path:
    """The Python of a new environment that holds the wheel and what its tests need."""
    run(sys.executable, "-m", "venv", where)
    python = where / "bin/python"
    pip = (
        python,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "-c",
        ROOT / "constraints.txt",
    )
    run(*pip, *NEEDED)
    run(*pip, "--no-deps", wheel)
    run(python, "-m", "pip", "check", "--disable-pip-version-check")
    return python


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pytest", nargs="*", help="arguments for pytest, by default -n auto")
    options = parser.parse_args().pytest or ["-n", "auto"]
    sdist, wheel = build()
    check_contents(sdist, wheel)
    with tempfile.TemporaryDirectory(prefix="fogzo-package-") as name:
        folder = Path(name).resolve()
        python = install(wheel, folder / "environment")
        tests = folder / "tests"
        shutil.copytree(ROOT / "python_tests", tests, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "cuda_units.py", folder)  # which says that the CUDA sources are not there
        for part in OF_THE_TREE:
            (tests / f"test_{part}.py").unlink()
        where = run(python, "-c", "import fogzo_kernels; print(fogzo_kernels.__file__)", cwd=folder).strip()
        if not where.startswith(str(folder / "environment")):
            raise SystemExit(f"fogzo_kernels must come from {folder / 'environment'}, got {where}")
        print(run(python, "-m", "fogzo_kernels.info", cwd=folder))
        command = [str(python), "-m", "pytest", "-q", str(tests), "--rootdir", str(tests), *options]
        return subprocess.run(command, cwd=folder).returncode


if __name__ == "__main__":
    sys.exit(main())
