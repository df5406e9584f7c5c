"""Codes of few bits, several in a byte: what processes send each other of a weight."""

from __future__ import annotations

import torch
from torch import Tensor

from ..spec.grid import Grid


def width(grid: Grid) -> int:
    """Bits that a code takes: 1, 2, 4 or 8."""
    return next(bits for bits in (1, 2, 4, 8) if grid.levels <= 2**bits)


def length(count: int, grid: Grid) -> int:
    """Bytes of so many codes."""
    return -(-count * width(grid) // 8)


def pack(codes: Tensor, grid: Grid) -> Tensor:
    """Codes in bytes, the first in the lowest bits.

    Args:
        codes: int8, contiguous, in qmin..qmax of ``grid``.

    Returns:
        uint8, of shape (bytes,); bits beyond the last code are 0.
    """
    bits = width(grid)
    parts = 8 // bits
    raised = (codes.view(-1) - grid.qmin).view(torch.uint8)  # int8 wraps around, as bytes do
    if rest := -raised.numel() % parts:
        raised = torch.cat([raised, raised.new_zeros(rest)])
    packed = raised[::parts].clone()
    for i in range(1, parts):
        packed |= raised[i::parts] << (i * bits)
    return packed


def unpack(packed: Tensor, count: int, grid: Grid) -> Tensor:
    """The inverse of :func:`pack`, for each row of a tensor.

    Args:
        packed: uint8, of shape (..., bytes).
        count: codes in a row.

    Returns:
        int8, of shape (..., count).
    """
    bits = width(grid)
    raised = torch.stack([packed >> shift for shift in range(0, 8, bits)], dim=-1)
    codes: Tensor = (raised & (2**bits - 1)).view(torch.int8) + grid.qmin
    return codes.flatten(-2)[..., :count]
