"""What agreement means (docs/contract.md, section 6), and how to compute the answers in float64."""

from __future__ import annotations

import math

import numpy as np
import torch

from fogzo_kernels import StraightThrough
from fogzo_kernels.spec.noise import DISTRIBUTIONS

EXACT = ("uniform", "rademacher", "triangular")
INEXACT = ("logistic", "gaussian")

#: Absolute tolerance of m against its float64 value. That of the two for a GPU is for its fast
#: logarithm, sine and cosine.
M_TOLERANCE = {
    "reference": dict.fromkeys(EXACT, 0.0) | dict.fromkeys(INEXACT, 2e-6),
    "cpu": dict.fromkeys(EXACT, 0.0) | dict.fromkeys(INEXACT, 2e-6),
    "triton": dict.fromkeys(EXACT, 0.0) | {"logistic": 1e-5, "gaussian": 1e-4},
    "cuda": dict.fromkeys(EXACT, 0.0) | {"logistic": 1e-5, "gaussian": 1e-4},
}
N_TOLERANCE = 1e-6  # relative
DERIVATIVE_TOLERANCE = 2e-6  # absolute, tanh only; the others are exact

#: Half an ulp of an output dtype, at most this share of a value's magnitude; its smallest step.
HALF_ULP = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SMALLEST = {torch.float32: 2.0**-149, torch.bfloat16: 2.0**-133, torch.float16: 2.0**-24}


def m_of(distribution: str, k_low: np.ndarray, k_high: np.ndarray, odd: np.ndarray) -> np.ndarray:
    """m in float64 from the 16-bit halves of each element's word (contract section 2)."""
    k = np.where(odd, k_high, k_low).astype(np.int64)
    signed = k - ((k & 0x8000) << 1)
    if distribution == "uniform":
        return 2.0 * signed + 1
    if distribution == "rademacher":
        return np.where(k & 0x8000, -1.0, 1.0)
    if distribution == "triangular":
        return (k & 0xFF) + (k >> 8) - 255.0
    if distribution == "logistic":
        return np.log((k + 0.5) / (65535.5 - k))
    signed_high = k_high.astype(np.int64) - ((k_high.astype(np.int64) & 0x8000) << 1)
    radius = np.sqrt(-2 * np.log((k_low + 0.5) / 65536))
    angle = math.pi * (2 * signed_high + 1) / 65536
    return radius * np.where(odd, np.sin(angle), np.cos(angle))


def estimate_error(
    terms: list[torch.Tensor],
    total: torch.Tensor,
    noise_terms: torch.Tensor,
    m_tolerance: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Largest difference allowed between G and its float64 value.

    4 float32 ulp of each added term (at most 2^-23 of its magnitude each), ``noise_terms`` =
    sum_i |B_i / delta| times the tolerance of m, and half an ulp of the output's dtype.
    """
    added = sum((term.abs() for term in terms), torch.zeros_like(total))
    error = 4 * 2.0**-23 * added + noise_terms * m_tolerance
    if dtype != torch.float32:
        error = error + HALF_ULP[dtype] * (total.abs() + error) + SMALLEST[dtype]
    return error + 2.0**-149


def coefficient(straight_through: StraightThrough) -> float:
    """C: u = C m."""
    return DISTRIBUTIONS[straight_through.distribution]
