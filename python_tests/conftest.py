"""Fixtures: every backend through one suite; tests that need a missing device say so and skip."""

import os
from collections import defaultdict
from itertools import islice

import ptx
import pytest
import torch
from support.interpreted import patch_once

#: Set, it leaves out no test: every combination of Triton's variants, CUDA for every architecture, long runs.
EVERYTHING = "FOGZO_TEST_EVERYTHING"
LEFT_OUT = pytest.StashKey[int]()
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
    config.addinivalue_line("markers", "every_combination: no case of it is left out by default")
    config.addinivalue_line("markers", f"everything: left out unless {EVERYTHING} is set")


def pytest_collection_modifyitems(config, items):
    """Leaves out what takes long and has its like among the others; lets long tests begin first."""
    if EVERYTHING not in os.environ:
        left_out = [item for item in items if item.get_closest_marker("everything")]
        if not INTERPRETED and not torch.cuda.is_available():
            left_out += combinations(items)
        config.hook.pytest_deselected(items=left_out)
        config.stash[LEFT_OUT] = len(left_out)
        left_out = set(left_out)
        items[:] = [item for item in items if item not in left_out]
    long_first(items)


def long_first(items):
    """In place. A short test follows each: pytest-xdist gives every worker two neighbours to begin with."""
    slow = [item for item in items if item.get_closest_marker("slow_first")]
    others = iter([item for item in items if not item.get_closest_marker("slow_first")])
    items[:] = [item for first in slow for item in (first, *islice(others, 1))]
    items += others


def combinations(items):
    """Tests of Triton's kernels without which each value of each parameter is still tested.

    A case costs Triton's compiler a second for each kernel that no case before it needed. The other backends
    test every combination.
    """
    cases = defaultdict(list)
    for item in items:
        params = getattr(item, "callspec", None) and item.callspec.params
        if params and params.get("backend") == "triton" and not item.get_closest_marker("every_combination"):
            values = {(name, repr(value)) for name, value in params.items()}
            cases[item.path, item.originalname].append((item, values))
    left_out = []
    for found in cases.values():
        wanted = set().union(*(values for _, values in found))
        while wanted:
            best = max(found, key=lambda case: len(case[1] & wanted))
            found.remove(best)
            wanted -= best[1]
        left_out += [item for item, _ in found]
    return left_out


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):  # of one of pytest-xdist's workers, which all collect the same
        session.config.workeroutput["left_out"] = session.config.stash.get(LEFT_OUT, 0)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    node.config.stash[LEFT_OUT] = getattr(node, "workeroutput", {}).get("left_out", 0)


def pytest_terminal_summary(terminalreporter, config):
    if count := config.stash.get(LEFT_OUT, 0):
        said = f"{count} tests are left out, most of them combinations of Triton's variants: {EVERYTHING}=1"
        said += " runs them"
        terminalreporter.write_line(said)


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


@pytest.fixture(scope="module")
def triton():
    """The counts of Triton's kernels; here its compiler goes on to machine code."""
    if INTERPRETED:
        pytest.skip("Triton's interpreter makes no machine code")
    from ptx.triton_driver import to_machine_code

    with to_machine_code():
        from bench.sass import triton

        yield triton


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
