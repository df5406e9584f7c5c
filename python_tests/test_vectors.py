"""Known answers made by an independent program: the same file for every backend."""

import hashlib
import json
import os
from operator import mul
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import device_of
from support.tolerances import EXACT, INEXACT, M_TOLERANCE, coefficient, estimate_error

import fogzo_kernels as fk
import fogzo_kernels.functional as ops
from fogzo_kernels.spec.noise import DISTRIBUTIONS, philox4x32

FILE = Path(__file__).parent / "vectors/contract_v1.json"
#: A changed answer is another version of the contract, and another file; added ones are not.
SHA256 = "0bea383565b02430a315c61806ee806f6cc0ed2dcaa34e81d41e0f5b040802d0"
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
        "tensor_ids": [t["tensor_id"] for t in case.get("tensors", [case])],
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
    assert {c["ste"] for c in VECTORS["guided"]} == {"identity", "hardtanh", "tanh", "approxsign"}
    assert {c["one_minus_beta"] for c in VECTORS["guided"]} >= {0.0, 1e-9, 1.0}
    assert {c["ste"] for c in VECTORS["noise_per_tensor"]} == {"identity", "tanh", "approxsign"}


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
    is_known(grads, case["G"], case, case, backend, losses_of(case))


def losses_of(case):
    return list(zip(case["losses_plus"], case["losses_minus"], strict=True))


def reference_noise(numel, straight_through, **names):
    return fk.noise(numel, straight_through.distribution, backend="reference", **names).double()


def is_known(found, known, case, tensor_of_case, backend, losses=(), t=1.0):
    """Whether G of a tensor is the known one, to section 6's tolerance; without losses, of guided noise."""
    arguments, expected = common(case), torch.tensor(known, dtype=torch.float64)
    st, grid, seed = arguments["straight_through"], arguments["grid"], arguments["seed"]
    delta, eps, N = tensor_of_case["alpha"] * grid.r, st.epsilon(grid), case["guide_norm"]
    c = [(p - m) / (2 * eps) for p, m in losses] or [N]
    signs = [fk.direction_sign(seed, case["step"], i) for i in range(len(losses))] or [1]
    g = torch.tensor(tensor_of_case["g"], dtype=torch.float64)
    guide = sum(map(mul, c, signs)) * (1 - case["one_minus_beta"]) ** 0.5 / N / len(c) * g
    C = coefficient(st)
    B = [c_i * case["one_minus_beta"] ** 0.5 * C * t / len(c) for c_i in c]
    names = {"seed": seed, "step": case["step"], "tensor_id": tensor_of_case["tensor_id"]}
    noise = [b / delta / C * reference_noise(len(g), st, direction=i, **names) for i, b in enumerate(B)]
    noise_sum = torch.full_like(g, sum(abs(b) for b in B) / delta)
    allowed = estimate_error(
        [guide, *noise], expected, noise_sum, M_TOLERANCE[backend][st.distribution], torch.float32
    )
    # the file holds 10 digits
    error = (found.cpu().double() - expected).abs() - 1e-9 * expected.abs()
    assert (error <= allowed).all(), (error / allowed).max()


# ---- guided noise, and noise per tensor


@pytest.mark.parametrize("index", range(len(VECTORS["guided"])))
def test_guided_noise_gives_the_known_gradients(backend, index):
    case = VECTORS["guided"][index]
    device = device_of(backend)
    g, alpha, norm = (tensor(case[name], device) for name in ("g", "alpha", "guide_norm"))
    fk.estimate_gradient_(g, None, None, alpha, norm, backend=backend, **common(case))
    is_known(g, case["G"], case, case, backend)
    if case["one_minus_beta"] == 0.0:
        assert torch.equal(g, tensor(case["g"], device))


@pytest.mark.parametrize("index", range(len(VECTORS["noise_per_tensor"])))
def test_noise_per_tensor_gives_the_known_answers(backend, index):
    """Sums, factors, codes and values of probes, G of two directions and of guided noise."""
    case = VECTORS["noise_per_tensor"][index]
    tensors, device, norm = case["tensors"], device_of(backend), tensor(case["guide_norm"], device_of(backend))
    theta, g, alphas = ([tensor(t[name], device) for t in tensors] for name in ("theta", "g", "alpha"))
    sumsqs = fk.guide_sumsq(g, alphas, grid=grid_of(case), per_tensor=True, backend=backend)
    np.testing.assert_allclose(sumsqs.cpu().numpy(), [t["sumsq"] for t in tensors], rtol=2e-6)
    factors = tensor([t["factor"] for t in tensors], device)
    made = ops.noise_factors(sumsqs, [len(t["g"]) for t in tensors])
    np.testing.assert_allclose(made.cpu().numpy(), factors.cpu().numpy(), rtol=3e-6)
    options = {**common(case), "noise_factors": factors, "backend": backend}
    for dtype, key in ((torch.int8, "code"), (torch.float32, "value")):
        out = [[torch.full(t.shape, 99.0, device=device).to(dtype) for t in theta] for _ in "+-"]
        fk.perturb_quantize_(*out, theta, g, alphas, norm, direction=case["direction"], **options)
        for side, results in zip(("plus", "minus"), out, strict=True):  # no y lies within 1e-4 of a tie
            assert [x.tolist() for x in results] == [t[side][key] for t in tensors]
    losses = losses_of(case)
    sides = [tensor(case[name], device) for name in ("losses_plus", "losses_minus")]
    for key, given, of in (("G", sides, losses), ("G_guided", (None, None), ())):
        G = [x.clone() for x in g]
        fk.estimate_gradient_(G, *given, alphas, norm, **options)
        for found, t in zip(G, tensors, strict=True):
            is_known(found, t[key], case, t, backend, of, t["factor"])


def test_vectors_can_fail():
    """The comparison sees a wrong tensor id."""
    case = VECTORS["noise"][0]
    u = fk.noise(40, "uniform", seed=int(case["seed"]), tensor_id=1, backend="reference")
    assert not os.environ.get("FOGZO_BACKEND")
    assert (u != torch.tensor(case["m_uniform"]) * (DISTRIBUTIONS["uniform"])).any()
