"""Known answers made by an independent program: the same file for every backend."""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import device_of
from support.tolerances import EXACT, INEXACT, M_TOLERANCE, coefficient, estimate_error

import fogzo_kernels as fk
from fogzo_kernels.spec.noise import DISTRIBUTIONS, philox4x32

FILE = Path(__file__).parent / "vectors/contract_v1.json"
#: A changed answer is another version of the contract, and another file.
SHA256 = "3f21e7bcddb071bd2d8f19414dca790828bcdadcb10e6e33251814bf158329e1"
VECTORS = json.loads(FILE.read_text())


def tensor(values, device, dtype=torch.float32):
    return torch.tensor(values, dtype=dtype, device=device)


def grid_of(case):
    return (
        fk.Grid.uniform(case["bits"])
        if case["grid"] == "uniform"
        else (
            fk.Grid.half_offset(case["bits"])
            if case["grid"] == "half_offset"
            else getattr(fk.Grid, case["grid"])()
        )
    )


def common(case):
    return {
        "grid": grid_of(case),
        "straight_through": fk.StraightThrough(case["ste"]),
        "one_minus_beta": case["one_minus_beta"],
        "seed": int(case["seed"]),
        "step": case["step"],
        "tensor_ids": [case["tensor_id"]],
    }


def test_file_is_that_of_version_1():
    assert hashlib.sha256(FILE.read_bytes()).hexdigest() == SHA256


def test_file_is_what_its_program_made():
    """Where FOGZO_VECTORS names the output of the program that makes the answers."""
    if not (made := os.environ.get("FOGZO_VECTORS")):
        pytest.skip("FOGZO_VECTORS names no file to compare with")
    assert FILE.read_bytes() == Path(made).read_bytes()


def test_file_covers_the_contract():
    assert VECTORS["contract"] == 1
    assert {c["ste"] for c in VECTORS["perturb_quantize"]} == {
        "identity",
        "hardtanh",
        "tanh",
        "approxsign",
    }
    assert len(VECTORS["perturb_quantize"]) == len(VECTORS["estimate"]) == 14


@pytest.mark.parametrize("case", VECTORS["philox4x32_10"], ids=lambda c: str(c["key"][0]))
def test_philox_gives_the_known_words(case):
    from fogzo_kernels import _C

    assert list(philox4x32(tuple(case["counter"]), tuple(case["key"]))) == case["words"]
    assert list(_C.philox4x32_10(case["counter"], case["key"])) == case["words"]


@pytest.mark.parametrize("case", VECTORS["direction_sign"], ids=lambda c: c["seed"])
def test_direction_sign_gives_the_known_signs(case):
    signs = [fk.direction_sign(int(case["seed"]), case["step"], i) for i in range(16)]
    assert signs == case["signs"]


@pytest.mark.parametrize("distribution", EXACT + INEXACT)
@pytest.mark.parametrize("case", VECTORS["noise"], ids=lambda c: f"{c['seed']}-{c['offset']}")
def test_noise_gives_the_known_values(backend, case, distribution):
    m = np.array(case[f"m_{distribution}"], dtype=np.float64)
    u = (
        fk.noise(
            len(m),
            distribution,
            seed=int(case["seed"]),
            step=case["step"],
            direction=case["direction"],
            tensor_id=case["tensor_id"],
            layout=(case["offset"], len(m), len(m)),
            device=device_of(backend),
            backend=backend,
        )
        .cpu()
        .double()
        .numpy()
    )
    C = DISTRIBUTIONS[distribution]
    if distribution in EXACT:
        np.testing.assert_array_equal(u, np.float32(C) * m.astype(np.float32))
    else:  # u = C m and its rounding: 2^-24 of at most 6.5
        np.testing.assert_allclose(u, C * m, rtol=0, atol=C * M_TOLERANCE[backend][distribution] + 4e-7)


@pytest.mark.parametrize("index", range(len(VECTORS["perturb_quantize"])))
def test_perturb_quantize_gives_the_known_codes(backend, index):
    case = VECTORS["perturb_quantize"][index]
    device = device_of(backend)
    distribution = fk.StraightThrough(case["ste"]).distribution
    inputs = [tensor(case[name], device) for name in ("theta", "g", "alpha")]
    norm = tensor(case["guide_norm"], device)
    for dtype in (torch.int8, torch.float32):
        out = {
            sign: torch.full((48,), float("nan") if dtype.is_floating_point else 99, device=device).to(dtype)
            for sign in ("plus", "minus")
        }
        fk.perturb_quantize_(
            out["plus"],
            out["minus"],
            *inputs,
            norm,
            direction=case["direction"],
            backend=backend,
            **common(case),
        )
        for sign, result in out.items():
            expected = case[sign]
            key = "code" if dtype == torch.int8 else "value"
            different = result.cpu() != torch.tensor(expected[key], dtype=dtype)
            if distribution in INEXACT:  # a tolerance of m of 1e-5 moves y by eps C sqrt(1 - beta) 1e-5
                different &= torch.tensor(expected["distance_to_tie"]) > 1e-4
            assert not different.any(), (sign, dtype, different.nonzero())


@pytest.mark.parametrize("index", range(len(VECTORS["estimate"])))
def test_estimate_gives_the_known_gradients(backend, index):
    case = VECTORS["estimate"][index]
    device = device_of(backend)
    grads = tensor(case["g"], device)
    arguments = common(case)
    fk.estimate_gradient_(
        grads,
        tensor(case["losses_plus"], device),
        tensor(case["losses_minus"], device),
        tensor(case["alpha"], device),
        tensor(case["guide_norm"], device),
        backend=backend,
        **arguments,
    )
    expected = torch.tensor(case["G"], dtype=torch.float64)
    st, grid = arguments["straight_through"], arguments["grid"]
    delta, eps = case["alpha"] * grid.r, st.epsilon(grid)
    c = [(p - m) / (2 * eps) for p, m in zip(case["losses_plus"], case["losses_minus"], strict=True)]
    g = torch.tensor(case["g"], dtype=torch.float64)
    guide = (
        sum(c_i * fk.direction_sign(int(case["seed"]), case["step"], i) for i, c_i in enumerate(c))
        * (1 - case["one_minus_beta"]) ** 0.5
        / case["guide_norm"]
        / len(c)
        * g
    )
    C = coefficient(st)
    B = [c_i * case["one_minus_beta"] ** 0.5 * C / len(c) for c_i in c]
    noise = [
        b
        / delta
        * fk.noise(
            48,
            st.distribution,
            seed=int(case["seed"]),
            step=case["step"],
            direction=i,
            tensor_id=case["tensor_id"],
            backend="reference",
        ).double()
        / C
        for i, b in enumerate(B)
    ]
    noise_sum = torch.full_like(g, sum(abs(b) for b in B) / delta)
    allowed = estimate_error(
        [guide, *noise], expected, noise_sum, M_TOLERANCE[backend][st.distribution], torch.float32
    )
    # the file holds 10 digits
    error = (grads.cpu().double() - expected).abs() - 1e-9 * expected.abs()
    assert (error <= allowed).all(), (error / allowed).max()


def test_vectors_can_fail():
    """The comparison sees a wrong tensor id."""
    case = VECTORS["noise"][0]
    u = fk.noise(40, "uniform", seed=int(case["seed"]), tensor_id=1, backend="reference")
    assert not os.environ.get("FOGZO_BACKEND")
    assert (u != torch.tensor(case["m_uniform"]) * (DISTRIBUTIONS["uniform"])).any()
