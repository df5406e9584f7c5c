"""Names of noise and what they mean: distributions, Philox constants, limits, direction signs.

Noise is a pure function of ``(seed, step, direction, tensor_id, element)`` (docs/contract.md, section 2).
This module holds the constants that every backend shares, and the host's Philox.
"""

from __future__ import annotations

import math
from typing import Any

from .checks import check_range

MASK32 = 0xFFFFFFFF
PHILOX_M0 = 0xD2511F53
PHILOX_M1 = 0xCD9E8D57
PHILOX_W0 = 0x9E3779B9
PHILOX_W1 = 0xBB67AE85
PHILOX_ROUNDS = 10

#: u = C * m has variance 1 (docs/contract.md, section 2).
DISTRIBUTIONS: dict[str, float] = {
    "uniform": math.sqrt(3.0) / 65536.0,
    "rademacher": 1.0,
    "triangular": math.sqrt(6.0) / 256.0,
    "logistic": math.sqrt(3.0) / math.pi,
    "gaussian": 1.0,
}

MAX_SEED = 2**64  # every limit is exclusive
MAX_STEP = 2**32
MAX_DIRECTION = 2**16
MAX_TENSOR_ID = 2**32 - 1
MAX_ELEMENT = 2**51
SIGN_TENSOR_ID = 2**32 - 1  # reserved: names the sign of a direction

#: Where a shard lies in its parameter: e(j) = offset + (j // inner) * stride + j % inner.
Layout = tuple[int, int, int]


def signed64(seed: int) -> int:
    """The signed 64-bit integer with the bits of an unsigned one."""
    return seed - 2**64 if seed >= 2**63 else seed


def philox4x32(counter: tuple[Any, Any, Any, Any], key: tuple[Any, Any]) -> tuple[Any, ...]:
    """Philox4x32 with 10 rounds (Salmon et al., SC 2011; Random123). Words are ints, or int64 tensors."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(PHILOX_ROUNDS):
        p0, p1 = c0 * PHILOX_M0, c2 * PHILOX_M1  # tensors wrap modulo 2^64, and >> keeps the sign
        c0, c1 = ((p1 >> 32) & MASK32) ^ c1 ^ k0, p1 & MASK32
        c2, c3 = ((p0 >> 32) & MASK32) ^ c3 ^ k1, p0 & MASK32
        k0, k1 = (k0 + PHILOX_W0) & MASK32, (k1 + PHILOX_W1) & MASK32
    return c0, c1, c2, c3


def direction_sign(seed: int, step: int, direction: int) -> int:
    """Return the random sign s of a direction, -1 or +1 (contract, section 2).

    Args:
        seed: seed of the noise, 0..2^64 - 1.
        step: number of the training step, 0..2^32 - 1.
        direction: number of the direction, 0..2^16 - 1.

    Returns:
        The sign, an int.

    Raises:
        TypeError, ValueError: an argument has a wrong type or is out of range.

    Example:
        >>> [fk.functional.direction_sign(seed=0, step=step, direction=0) for step in range(4)]
        [1, -1, -1, 1]
    """
    check_range("seed", seed, MAX_SEED)
    check_range("step", step, MAX_STEP)
    check_range("direction", direction, MAX_DIRECTION)
    word = philox4x32((0, direction << 16, step, SIGN_TENSOR_ID), (seed & MASK32, seed >> 32))[0]
    return -1 if word & 1 else 1
