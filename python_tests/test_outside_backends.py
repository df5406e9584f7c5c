"""Backends of other packages, by entry point: a small one is installed, used, its faults shown."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fogzo_kernels.backends import FUNCTIONS, GROUP

ROOT = Path(__file__).parents[1]
PROJECT = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"

[project]
name = "outside"
version = "1.0"

[tool.setuptools]
py-modules = ["outside", "incomplete"]

[project.entry-points."{group}"]
doubled = "outside"
broken = "not_there"
incomplete = "incomplete"
cpu = "outside"
"""
#: The reference, but that its noise is twice as large: what ran shows.
MODULE = """
from fogzo_kernels.backends.reference import *
from fogzo_kernels.backends import reference


def unavailable(device):
    return None if device.type == "cpu" else "it runs on the CPU only"


def noise(numel, draw, direction, device):
    return 2 * reference.noise(numel, draw, direction, device)
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder that holds the installed package."""
    project, target = tmp_path_factory.mktemp("project"), tmp_path_factory.mktemp("installed")
    (project / "pyproject.toml").write_text(PROJECT.format(group=GROUP))
    (project / "outside.py").write_text(MODULE)
    (project / "incomplete.py").write_text("def unavailable(device):\n    return None\n")
    install = ["-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--target"]
    subprocess.run([sys.executable, *install, target, project], check=True, timeout=300)
    return target


def run(installed, *command):
    """What a fresh interpreter prints that finds the package."""
    path = os.pathsep.join([str(installed), str(ROOT)])
    environment = {k: v for k, v in os.environ.items() if k != "FOGZO_BACKEND"} | {"PYTHONPATH": path}
    result = subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_info_shows_outside_backends_and_why_one_cannot_run(installed):
    lines = [" ".join(line.split()) for line in run(installed, "-m", "fogzo_kernels.info").splitlines()]
    assert "doubled available" in lines
    broken = next(line for line in lines if line.startswith("broken"))
    expected = "broken unavailable: cannot be loaded from not_there: ModuleNotFoundError: No module named"
    assert broken.startswith(expected)
    missing = ", ".join(name for name in FUNCTIONS if name != "unavailable")
    assert f"incomplete unavailable: incomplete has no {missing}" in lines
    assert "cpu of outside is not taken: the name belongs to this package" in lines


def test_an_outside_backend_runs_only_where_it_is_named(installed):
    printed = run(
        installed,
        "-c",
        """
import sys, torch, fogzo_kernels as fk
own = fk.noise(40, "uniform", seed=1)
assert "outside" not in sys.modules
other = fk.noise(40, "uniform", seed=1, backend="doubled")
assert torch.equal(other, 2 * own)
norm = fk.guide_norm(torch.ones(4), torch.tensor(0.5), grid=fk.Grid.uniform(2), backend="doubled")
assert norm == 1.0
names = list(fk.available_backends("cpu"))
assert names[-1] == "reference" and "doubled" in names
for name in ("broken", "incomplete", "nobody"):
    try:
        fk.noise(40, "uniform", seed=1, backend=name)
    except (RuntimeError, ValueError) as error:
        print(type(error).__name__, error)
""",
    )
    broken, incomplete, nobody = printed.splitlines()
    unavailable = "is unavailable on cpu"
    assert broken.startswith(f"RuntimeError backend 'broken' {unavailable}: cannot be loaded from not_there")
    assert incomplete.startswith(f"RuntimeError backend 'incomplete' {unavailable}: incomplete has no noise")
    assert nobody.startswith("ValueError backend must be one of cpu, triton, cuda, ")
