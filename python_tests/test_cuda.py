"""The cuda backend beside the suite that every backend runs: its module, its build, what it runs on."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import device_of

import cuda_units
import fogzo_kernels as fk
from fogzo_kernels.backends.gpu import cells, plans
from fogzo_kernels.spec.noise import DISTRIBUTIONS
from fogzo_kernels.spec.straight_through import VARIANTS
from fogzo_kernels.spec.update import UpdateRule

ROOT = Path(__file__).parents[1]
cuda = pytest.importorskip("fogzo_kernels.backends.cuda")
native = cuda._cuda
WHERE, PLAN, DTYPES, GRID = (0, 0), (0, 0, 0, True, False), ("float32",) * 3, (0, 1, 0, 1)
CALL = WHERE, PLAN, DTYPES
DRAW, MIX = ("uniform", 1.0, (0, 1), (0, 2), 0), (0, (0, 0.5), 1.0, 0)
LOSSES, SUMS = (0, 0, 0, 0, False), (0, 0, 0)
HYPERPARAMETERS = UpdateRule("sgd").hyperparameters
CELLS, MEASURE = (0, 0, 0, 0, 0, "float32"), ("rms", 1, 0, 0)


def update(rule, hyperparameters, block=0):
    optimizer = rule, hyperparameters, (0, 0.1), (0, 1), False
    native.estimate_update(CALL, DRAW, MIX, LOSSES, GRID, block, optimizer, 0, False)


def test_each_op_with_a_transform_names_a_wrong_block():
    calls = [
        lambda block: native.quantize(CALL, GRID, block),
        lambda block: native.perturb_quantize(CALL, DRAW, MIX, GRID, block, True, False),
        lambda block: native.estimate_gradient(CALL, DRAW, MIX, LOSSES, 1, block, 0),
        lambda block: update("sgd", HYPERPARAMETERS, block),
        lambda block: native.straight_through_backward(CALL, GRID, "identity", block),
        lambda block: native.learned_backward(CALL, GRID, "identity", block, SUMS),
    ]
    for call in calls:
        for block in (-16, 1, 100, 2048):
            message = f"block must be one of 16, 32, 64, 128, 256, 512, 1024, got {block}"
            with pytest.raises(ValueError, match=f"^{message}$"):
                call(block)


def test_columns_and_span_are_those_of_the_plans():
    assert tuple(native.COLUMNS) == plans.COLUMNS
    assert native.SPAN == plans.SPAN
    assert tuple(native.CELL_COLUMNS) == cells.COLUMNS
    assert native.THREADS == cells.THREADS


def test_build_info_names_compiler_and_architectures():
    assert set(native.build_info()) == {"nvcc", "architectures"}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: native.quantize((WHERE, (0, 0, -1, True, False), DTYPES), GRID, 0),
         "plan's blocks must be in 0..2147483647, got -1"),
        (lambda: native.quantize((WHERE, PLAN, ("int8", "float32", "int8")), GRID, 0),
         "latent's dtype must be float32, bfloat16 or float16, got int8"),
        (lambda: native.quantize((WHERE, PLAN, ("float32", "float32", "float64")), GRID, 0),
         "output's dtype must be one of float32, bfloat16, float16, int8, got float64"),
        (lambda: native.noise(CALL, ("poisson", *DRAW[1:])),
         "distribution must be one of uniform, rademacher, triangular, logistic, gaussian, got poisson"),
        (lambda: native.noise(CALL, (*DRAW[:4], 65536)), "direction must be in 0..65535, got 65536"),
        (lambda: native.straight_through_backward(CALL, GRID, "sine", 0),
         f"straight_through must be one of {', '.join(VARIANTS)}, got sine"),
        (lambda: native.learned_backward(CALL, GRID, "sine", 0, SUMS),
         f"straight_through must be one of {', '.join(VARIANTS)}, got sine"),
        (lambda: native.learned_backward(CALL, GRID, "identity", 0, (0, 0, -1)),
         "number of crossing alphas must be in 0..2147483647, got -1"),
        (lambda: native.estimate_gradient(CALL, DRAW, MIX, (0, 0, -1, 0, False), 1, 0, 0),
         "number of losses must be in 0..65536, got -1"),
        (lambda: native.measure_alphas(WHERE, CELLS, ("median", 1, 0, 0), 0),
         "statistic must be one of absmax, absmean, rms, got median"),
        (lambda: native.measure_alphas(WHERE, (*CELLS[:5], "int8"), MEASURE, 0),
         "data's dtype must be float32, bfloat16 or float16, got int8"),
        (lambda: native.measure_alphas(WHERE, (*CELLS[:3], -1, *CELLS[4:]), MEASURE, 0),
         "plan's blocks must be in 0..2147483647, got -1"),
        (lambda: native.measure_alphas(WHERE, (*CELLS[:4], 2**31, "float32"), MEASURE, 0),
         "plan's second blocks must be in 0..2147483647, got 2147483648"),
        (lambda: native.hadamard(CALL, 100),
         "block must be one of 16, 32, 64, 128, 256, 512, 1024, got 100"),
        (lambda: native.hadamard((WHERE, PLAN, ("float32", "float32", "int8")), 128),
         "output's dtype must be float32, bfloat16 or float16, got int8"),
        (lambda: update("lion", HYPERPARAMETERS),
         "rule must be one of adamw, sgd, momentum, nesterov, got lion"),
        (lambda: update("sgd", {**HYPERPARAMETERS, "decay": 0.1}),
         "hyperparameters must be one of weight_decay, beta1, beta2, eps, momentum, dampening, got decay"),
        (lambda: update("sgd", {k: v for k, v in HYPERPARAMETERS.items() if k != "momentum"}),
         "hyperparameters must name momentum, got none of that name"),
    ],
)  # fmt: skip
def test_wrong_arguments_of_a_native_op_are_named(call, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        call()


@pytest.mark.parametrize(
    ("architectures", "capability", "expected"),
    [
        ("8.0 9.0 10.0+PTX", (9, 0), True),
        ("8.0 9.0 10.0+PTX", (8, 9), True),  # machine code runs on a later minor version
        ("8.0 9.0 10.0+PTX", (7, 5), False),
        ("8.0 9.0 10.0+PTX", (12, 0), True),  # PTX is compiled for what comes later
        ("8.6 9.0", (8, 0), False),
        ("8.0 9.0", (10, 0), False),
        ("8.0+PTX", (9, 0), True),
    ],
)
def test_a_build_runs_on_its_architectures_and_on_newer_ones_by_ptx(architectures, capability, expected):
    assert cuda.runs_on(architectures, *capability) is expected


class Driver:
    """In the place of torch.cuda: two GPUs, the second one older than the build."""

    def __init__(self, monkeypatch):
        self.asked, self.current = [], 0
        monkeypatch.setattr(cuda._cuda, "build_info", lambda: {"nvcc": "13.0", "architectures": "8.0 9.0"})
        for name in ("is_available", "get_device_capability", "current_device"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        cuda.unavailable_on.cache_clear()

    def is_available(self):
        self.asked.append("is_available")
        return self.current is not None

    def get_device_capability(self, device):
        self.asked.append(device)
        return (9, 0) if torch.device(device).index == 0 else (7, 5)

    def current_device(self):
        return self.current


@pytest.fixture
def driver(monkeypatch):
    yield Driver(monkeypatch)
    cuda.unavailable_on.cache_clear()  # what it said of these devices


def test_unavailable_says_why(driver):
    plain = getattr(cuda.unavailable, "__wrapped__", cuda.unavailable)  # without a GPU it is ptx's
    assert plain(torch.device("cpu")) == "it needs a CUDA device"
    assert cuda.unavailable(torch.device("cuda", 0)) is None
    reason = cuda.unavailable(torch.device("cuda", 1))
    assert "built for 8.0 9.0" in reason
    assert "TORCH_CUDA_ARCH_LIST=7.5" in reason


def test_the_driver_is_asked_once_for_each_device(driver):
    for _ in range(3):
        for device in (torch.device("cuda", 0), torch.device("cuda", 1)):
            cuda.unavailable(device)
    assert driver.asked.count(torch.device("cuda", 0)) == driver.asked.count(torch.device("cuda", 1)) == 1
    assert len(driver.asked) == 4


def test_a_device_without_a_number_is_the_current_one(driver):
    device = torch.device("cuda")
    assert cuda.unavailable(device) is None
    driver.current = 1
    assert "TORCH_CUDA_ARCH_LIST=7.5" in cuda.unavailable(device)
    driver.current = None
    assert cuda.unavailable(device) == "PyTorch finds no CUDA device"


def test_a_gpu_takes_triton_and_then_cuda():
    names = fk.backends.names()
    assert names.index("triton") < names.index("cuda") < names.index("reference")


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("dtypes", [
    (torch.float32,) * 3, (torch.bfloat16,) * 3, (torch.float16,) * 3,
    (torch.float32, torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.bfloat16, torch.int8),
    (torch.float32, torch.float32, torch.int8), (torch.float16, torch.float32, torch.bfloat16),
], ids=str)  # fmt: skip
def test_scalars_in_tensors_and_rows_take_other_kernels_with_the_same_bits(dtypes, distribution, generator):
    """Per tensor and on the host goes by the fast kernels; rows of one alpha by the general ones."""
    device = device_of("cuda")
    latent_t, grad_t, out_t = dtypes
    shape = (5, 8 * 521)
    theta = torch.randn(shape, generator=generator).to(device, latent_t)
    g = torch.randn(shape, generator=generator).to(device, grad_t)
    losses = torch.rand(2, 3, generator=generator).to(device)
    options = {
        "grid": fk.Grid.half_offset(4), "straight_through": fk.StraightThrough("identity", noise=distribution),
        "one_minus_beta": 0.3, "seed": 2**63 + 3, "step": 5, "backend": "cuda",
    }  # fmt: skip
    found = []
    for scales in (1, 5):
        alpha = torch.full((scales, 1), 0.3, device=device)
        norm = fk.guide_norm(g, alpha, grid=options["grid"], backend="cuda")
        plus, minus, one = (torch.full_like(theta, 99, dtype=out_t) for _ in range(3))
        fk.perturb_quantize_(plus, minus, theta, g, alpha, norm, **options)
        fk.perturb_quantize_(None, one, theta, g, alpha, norm, **options)
        G, w, q = g.clone(), theta.clone(), torch.full_like(theta, 99, dtype=out_t)
        fk.estimate_gradient_(G, *losses, alpha, norm, **options)
        states = [torch.full(shape, 1e-3, device=device) for _ in range(2)]
        fk.estimate_adamw_(
            w, g, *states, *losses, alpha, norm, lr=0.1, optimizer_step=2, quantized=q, **options
        )
        assert torch.equal(minus, one)
        found.append((norm, plus, minus, G, w, q, *states))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


# ---- setup.py


def setup(**environment):
    env = {k: v for k, v in os.environ.items() if k not in ("FOGZO_BUILD_CUDA", "TORCH_CUDA_ARCH_LIST")}
    command = [sys.executable, "-c", "import build_cuda as b; print(b.left_out(), *b.architectures(), sep='|')"]
    return subprocess.run(command, cwd=ROOT, env={**env, **environment}, capture_output=True, text=True)


def test_setup_says_what_is_left_out_and_why():
    assert setup(FOGZO_BUILD_CUDA="0").stdout.startswith("FOGZO_BUILD_CUDA=0|")
    found = setup(FOGZO_BUILD_CUDA="yes")
    assert found.returncode != 0
    assert "FOGZO_BUILD_CUDA must be auto, 0 or 1, got 'yes'" in found.stderr
    if torch.version.cuda is None:
        assert setup().stdout.startswith(("this PyTorch has no CUDA", "nvcc was not found"))


def test_every_distribution_has_its_units():
    found = {unit.name: unit for unit in cuda_units.units()}
    assert {f"{name}_{d}" for d in DISTRIBUTIONS for name in ("perturb", "estimate", "tail")} < set(found)
    assert {unit.source for unit in found.values()} == set((ROOT / "csrc/cuda").glob("*.cu"))
    assert found["perturb_gaussian"].defines == ("-DFOGZO_DISTRIBUTION=gaussian",)
    assert found["norm"].defines == ()


def test_setup_takes_architectures():
    assert setup(FOGZO_BUILD_CUDA="0").stdout.strip().split("|")[1:] == ["8.0", "9.0", "10.0+PTX"]
    found = setup(FOGZO_BUILD_CUDA="0", TORCH_CUDA_ARCH_LIST="8.6 9.0a+PTX").stdout
    assert found.strip().split("|")[1:] == ["8.6", "9.0a+PTX"]
    found = setup(FOGZO_BUILD_CUDA="0", TORCH_CUDA_ARCH_LIST="9.0;Hopper")
    assert found.returncode != 0
    assert "TORCH_CUDA_ARCH_LIST must be compute capabilities such as" in found.stderr
    assert "got 'Hopper'" in found.stderr
