"""Noise has the distributions it claims and no correlation, on 2^22 elements.

One backend draws it: that the others draw the same is what test_agreement.py holds.
"""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from support.tolerances import EXACT, INEXACT

import fogzo_kernels as fk

N = 2**22
#: A statistic that is normal stays within this many deviations but once in 2 million draws.
SIGMAS = 5.0

#: Continuous limit of each distribution, mean 0 and variance 1, and its excess kurtosis.
LIMITS = {
    "uniform": (stats.uniform(-math.sqrt(3), 2 * math.sqrt(3)), -1.2),
    "triangular": (stats.triang(0.5, -math.sqrt(6), 2 * math.sqrt(6)), -0.6),
    "logistic": (stats.logistic(0, math.sqrt(3) / math.pi), 1.2),
    "gaussian": (stats.norm(), 0.0),
}


def draw(distribution, **names):
    names = {"seed": 2024, **names}
    return fk.noise(N, distribution, backend="cpu", **names).double().numpy()


@pytest.mark.parametrize("distribution", EXACT + INEXACT)
def test_noise_has_mean_0_and_variance_1(distribution):
    u = draw(distribution)
    kurtosis = LIMITS[distribution][1] if distribution in LIMITS else -2.0
    assert abs(u.mean()) < SIGMAS / math.sqrt(N)
    # A discrete grid of 2^16 (uniform) or 511 (triangular) values has variance 1 - O(2^-16); 16-bit
    # halves cut the tails of logistic at 11.8, which costs 2e-3 of its variance at most.
    bias = {"triangular": 2e-5, "logistic": 2e-3, "gaussian": 2e-4}.get(distribution, 1e-8)
    assert abs(np.square(u).mean() - 1) < bias + SIGMAS * math.sqrt((kurtosis + 2) / N) + 1e-7


@pytest.mark.parametrize("distribution", sorted(LIMITS))
def test_noise_has_its_distribution(distribution):
    """A spread within the spacing of the discrete values turns them into the continuous limit."""
    u = draw(distribution)
    spread = np.random.default_rng(7).uniform(-0.5, 0.5, N)
    if distribution == "uniform":
        u = u + spread * 2 * math.sqrt(3) / 65536
    if distribution == "triangular":  # the sum of two bytes, each spread to a uniform
        other = np.random.default_rng(8).uniform(-0.5, 0.5, N)
        u = u + (spread + other) * math.sqrt(6) / 256
    statistic = stats.kstest(u, LIMITS[distribution][0].cdf).statistic
    # asymptotic critical value at 1e-6, and 2^-17 for halves that step by 2^-16 (logistic, gaussian)
    discrete = 2.0**-17 if distribution in INEXACT else 0.0
    assert statistic < math.sqrt(-math.log(1e-6 / 2) / 2 / N) + discrete


def test_rademacher_is_a_fair_coin():
    u = draw("rademacher")
    assert set(np.unique(u)) == {-1.0, 1.0}
    assert stats.binomtest(int((u > 0).sum()), N).pvalue > 1e-6


@pytest.mark.parametrize("distribution", EXACT + INEXACT)
def test_noise_is_not_correlated(distribution):
    """Between neighbours, directions, steps, tensors and seeds; also of the magnitudes."""
    u = draw(distribution)
    others = {f"neighbour {k}": (u[:-k], u[k:]) for k in (1, 2, 3, 4, 7, 8, 16, 1024)}
    for name, value in (
        ("direction", 1),
        ("step", 1),
        ("tensor_id", 1),
        ("seed", 2025),
        ("seed", 2024 + 2**32),
    ):
        others[f"{name} {value}"] = (u, draw(distribution, **{name: value}))
    for name, (a, b) in others.items():
        pairs = [(a, b)] if distribution == "rademacher" else [(a, b), (np.abs(a), np.abs(b))]
        for x, y in pairs:
            r = np.corrcoef(x, y)[0, 1]
            assert abs(r) < SIGMAS / math.sqrt(len(x)), name


def test_signs_of_directions_are_fair_and_independent_of_noise():
    signs = np.array([fk.direction_sign(3, step, i) for step in range(512) for i in range(32)])
    assert abs(signs.mean()) < SIGMAS / math.sqrt(len(signs))
    assert abs(np.corrcoef(signs[:-1], signs[1:])[0, 1]) < SIGMAS / math.sqrt(len(signs))


def test_layers_do_not_share_noise():
    """Reseeding per tensor gives all layers one noise; here only the tensor id differs."""
    layers = torch.stack([fk.noise(4096, "gaussian", seed=1, tensor_id=i) for i in range(4)])
    correlation = torch.corrcoef(layers) - torch.eye(4)
    assert correlation.abs().max() < SIGMAS / math.sqrt(4096)
