"""Each instruction that the executor knows, against the PTX manual in exact numbers (ptx_models.py)."""

import numpy as np
import pytest
from ptx.build import executor
from support.ptx_models import edges, model, operands, width
from support.ptx_programs import apply

OPCODES = dict(executor().opcodes())
EXACT = [name for name in OPCODES if model(name) is not None]
#: The function of each approximate instruction, and the error that PTX allows it.
BOUNDS = {
    "rcp": (lambda a: 1 / a, "ulp", 1), "sqrt": (np.sqrt, "relative", 2.0**-23),
    "rsqrt": (lambda a: 1 / np.sqrt(a), "relative", 2.0**-22), "lg2": (np.log2, "either", 2.0**-22),
    "ex2": (np.exp2, "relative", 2.0**-22), "sin": (np.sin, "absolute", 2.0**-20.5),
    "cos": (np.cos, "absolute", 2.0**-20.5), "div": (lambda a, b: a / b, "ulp", 2),
}  # fmt: skip


@pytest.mark.parametrize("opcode", EXACT)
def test_an_instruction_gives_the_exact_result_of_its_model(opcode, generator):
    one = model(opcode)
    assert len(one.operands) == OPCODES[opcode]
    columns = operands(one.operands, np.random.default_rng(generator.initial_seed()))
    found = apply(opcode, *columns)
    low = (1 << width(one.result)) - 1
    for row, bits in zip(zip(*(c.tolist() for c in columns), strict=True), found.tolist(), strict=True):
        assert bits & low == one(*row), (opcode, [hex(x) for x in row], hex(bits), hex(one(*row)))


@pytest.mark.parametrize("mode", [0, 1, -1, 2])
@pytest.mark.parametrize("opcode", [name for name in OPCODES if name not in EXACT and not name.endswith("f64")])
def test_an_approximation_stays_within_its_bound(opcode, mode, generator):
    """Within its bound, and in the modes 1 and -1 near the bound."""
    parts = opcode.split(".")
    f, how, bound = BOUNDS[parts[0]]
    low, high = {"sin": (-3.1, 3.1), "cos": (-3.1, 3.1), "ex2": (-100, 100)}.get(parts[0], (1e-6, 1e6))
    rng = np.random.default_rng(generator.initial_seed())
    given = [rng.uniform(low, high, 4096).astype(np.float32) for _ in range(OPCODES[opcode])]
    executor().approximate(mode)
    try:
        bits = apply(opcode, *(x.view(np.uint32) for x in given))
        special = apply(opcode, *(np.array(edges("f32"), np.uint64) for _ in given))
    finally:
        executor().approximate(0)
    found = bits.astype(np.uint32).view(np.float32).astype(np.float64)
    expected = f(*(x.astype(np.float64) for x in given))
    scale = {
        "absolute": 1,
        "relative": np.abs(expected),
        "ulp": np.spacing(np.abs(expected.astype(np.float32))),
    }
    absolute = (given[0] > 0.5) & (given[0] < 2)
    scale["either"] = np.where(absolute, 1, np.abs(expected))
    error = np.abs(found - expected) / scale[how]
    rounding = np.spacing(np.abs(expected).astype(np.float32)) / scale[how]  # the result is a float32
    assert (error <= bound + rounding).all()
    if mode:
        assert error.max() > 0.5 * bound
    assert not ((special >> 32) != 0).any()


@pytest.mark.parametrize("name", ["rcp.approx.ftz.f64", "rsqrt.approx.ftz.f64"])
def test_approximation_of_doubles_keeps_the_upper_half(name):
    x = np.linspace(0.1, 9, 64)
    found = apply(name, x.view(np.uint64)).view(np.float64)
    expected = 1 / x if name.startswith("rcp") else 1 / np.sqrt(x)
    assert (np.abs(found / expected - 1) < 2.0**-19).all()
    assert not (found.view(np.uint64) & np.uint64(0xFFFFFFFF)).any()


def test_approximations_of_special_values_are_exact():
    f32 = lambda *x: np.array(x, np.float32).view(np.uint32)  # noqa: E731
    cases = {
        "rcp.approx.ftz.f32": ([0.0, -0.0, np.inf, 1e-40, np.nan], [np.inf, -np.inf, 0, np.inf, np.nan]),
        "sqrt.approx.ftz.f32": ([0.0, -0.0, np.inf, -1, np.nan], [0, -0.0, np.inf, np.nan, np.nan]),
        "lg2.approx.ftz.f32": ([0.0, 1, np.inf, -1, 1e-40], [-np.inf, 0, np.inf, np.nan, -np.inf]),
        "ex2.approx.ftz.f32": ([0.0, -np.inf, np.inf, -300, 300], [1, 0, np.inf, 0, np.inf]),
    }
    for opcode, (given, expected) in cases.items():
        found = apply(opcode, f32(*given)).astype(np.uint32).view(np.float32)
        np.testing.assert_array_equal(found, np.array(expected, np.float32), opcode)
