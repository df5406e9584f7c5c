"""Pack integers of few bits into bytes, for what processes send each other and for what files hold."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..spec.grid import Grid


def pack(numbers: Tensor, bits: int, apart: int = 1) -> Tensor:
    """Writes each row as a stream of bits, the lowest bits first, filled up with 0 to whole bytes.

    Args:
        numbers: uint8, (..., count), of which the ``bits`` lowest bits are written, 1..8.
        apart: how far numbers that share a byte lie from each other, where ``bits`` divide 8.

    Returns:
        uint8, (..., bytes).
    """
    if 8 % bits:
        numbers, bits = (numbers.unsqueeze(-1) >> _places(bits, numbers) & 1).flatten(-2), 1
    count = 8 // bits
    if rest := -numbers.shape[-1] % (count * apart):
        numbers = F.pad(numbers, (0, rest))
    first, *others = numbers.unflatten(-1, (-1, count, apart)).unbind(-2)
    packed: Tensor = first.clone()
    for i, part in enumerate(others, 1):
        packed |= part << (i * bits)
    return packed.flatten(-2)


def unpack(packed: Tensor, count: int, bits: int) -> Tensor:
    """Inverts :func:`pack` where ``apart`` is 1; returns uint8, (..., count)."""
    if 8 % bits:
        ones: Tensor = unpack(packed, count * bits, 1).unflatten(-1, (count, bits))
        return (ones << _places(bits, packed)).sum(-1, dtype=torch.uint8)
    numbers: Tensor = torch.stack([packed >> place for place in range(0, 8, bits)], dim=-1) & (2**bits - 1)
    return numbers.flatten(-2)[..., :count]


def _places(bits: int, like: Tensor) -> Tensor:
    return torch.arange(bits, dtype=torch.uint8, device=like.device)


def code_bits(grid: Grid) -> int:
    """Returns the bits that code - qmin takes."""
    return max((grid.levels - 1).bit_length(), 1)


def pack_codes(codes: Tensor, grid: Grid, bits: int) -> Tensor:
    """Packs code - qmin of int8 codes."""
    return pack((codes - grid.qmin).view(torch.uint8), bits)  # int8 wraps around, as bytes do


def unpack_codes(packed: Tensor, count: int, grid: Grid, bits: int) -> Tensor:
    """Inverts :func:`pack_codes`; returns int8, (..., count)."""
    return unpack(packed, count, bits).view(torch.int8) + grid.qmin
