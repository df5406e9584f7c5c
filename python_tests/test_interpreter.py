"""Triton's interpreter, which users debug kernels with, gives the known answers too."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import INTERPRETED

HERE = Path(__file__).parent
LONG = pytest.mark.everything


@pytest.mark.slow_first
@pytest.mark.skipif(INTERPRETED or torch.cuda.is_available(), reason="the tests run in it, or on a GPU")
@pytest.mark.parametrize(
    "name", ["vectors", *(pytest.param(name, marks=pytest.mark.everything) for name in ("triton", "hadamard"))]
)
def test_a_file_of_tests_passes_in_the_interpreter(name):
    pytest.importorskip("triton")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        f"test_{name}.py",
        "-k",
        "triton",
    ]
    env = {**os.environ, "FOGZO_TRITON": "interpreter"}
    done = subprocess.run(command, cwd=HERE, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout
