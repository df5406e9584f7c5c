"""Fixtures: every backend through one suite; tests that need a missing device say so and skip."""

import os
from itertools import islice

import ptx
import pytest
import torch
from interpreted import patch_once

INTERPRETED = os.environ.get("FOGZO_TRITON") == "interpreter"
#: Why a GPU backend cannot be tested here.
MISSING: dict[str, str] = {}
os.environ.pop("FOGZO_BACKEND", None)
if not torch.cuda.is_available():  # before anything imports Triton or CUDA: their kernels run on the CPU
    if INTERPRETED:
        os.environ["TRITON_INTERPRET"] = "1"
        patch_once()
    MISSING = ptx.install(triton=not INTERPRETED)

from hypothesis import settings  # noqa: E402

import fogzo_kernels as fk  # noqa: E402

torch.set_num_threads(1)  # small tensors; tests run over processes

settings.register_profile("default", max_examples=30, deadline=None)
settings.load_profile("default")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow_first: a test of a minute or so, started before the others")


def pytest_collection_modifyitems(items):
    """Long tests first, so that none of them is left for the end, when the other workers have nothing to do.

    Each is followed by a short one: pytest-xdist gives every worker two neighbours to begin with.
    """
    slow = [item for item in items if item.get_closest_marker("slow_first")]
    others = iter([item for item in items if not item.get_closest_marker("slow_first")])
    items[:] = [item for first in slow for item in (first, *islice(others, 1))]
    items += others


BACKENDS = ("reference", "cpu", "triton", "cuda")
GPU_BACKENDS = ("triton", "cuda")


def device_of(backend: str) -> torch.device:
    """Where a backend is tested: those for a GPU on one, where it is there."""
    return torch.device("cuda" if backend in GPU_BACKENDS and torch.cuda.is_available() else "cpu")


@pytest.fixture(params=BACKENDS)
def backend(request):
    """The name of a backend that runs here."""
    reason = MISSING.get(request.param) or fk.available_backends(device_of(request.param))[request.param]
    if reason is not None:
        pytest.skip(f"backend {request.param}: {reason}")
    return request.param


@pytest.fixture
def device(backend):
    return device_of(backend)


@pytest.fixture
def generator():
    """Fresh random data in every run; a failure prints the seed, which FOGZO_TEST_SEED repeats."""
    seed = int(os.environ.get("FOGZO_TEST_SEED", torch.seed() % 2**32))
    print(f"FOGZO_TEST_SEED={seed}")
    return torch.Generator().manual_seed(seed)


def selecting() -> list[str | None]:
    return [os.environ.get(name) for name in ("TRITON_INTERPRET", "FOGZO_BACKEND", "FOGZO_CPU_ISA")]


@pytest.fixture(autouse=True)
def _global_state_stays():
    """No test leaves PyTorch's generator, its thread count or what selects a backend changed."""
    state, threads, selection = torch.get_rng_state(), torch.get_num_threads(), selecting()
    yield
    assert selecting() == selection
    torch.set_rng_state(state)
    torch.set_num_threads(threads)
