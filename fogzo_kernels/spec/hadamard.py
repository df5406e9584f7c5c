"""The Hadamard transform: its blocks, and what makes it orthonormal (docs/contract.md, section 4)."""

from __future__ import annotations

import math

#: How many elements a block may have.
BLOCKS = (16, 32, 64, 128, 256, 512, 1024)


def factor(block: int) -> float:
    """block ** -0.5; not rounded to float32."""
    return math.sqrt(1.0 / block)


def check_block(block: int) -> None:
    """Raise unless there are blocks of that size."""
    if not isinstance(block, int) or isinstance(block, bool):
        raise TypeError(f"block must be an int, got {type(block).__name__}")
    if block not in BLOCKS:
        raise ValueError(f"block must be one of {', '.join(map(str, BLOCKS))}, got {block}")
