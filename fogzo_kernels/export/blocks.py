"""GGUF's blocks of a few bits, written from numbers and scales: nothing is quantized again.

A block has some numbers of a row and one float16 scale d. ``ggml-quants.c`` of ggml defines the bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..distributed.packing import pack
from ..spec.grid import Grid
from .integers import range_of


class Block(NamedTuple):
    """Writes a type of block: ``size`` numbers of ``low..high``."""

    number: int  # of the type in a file
    size: int
    low: int
    high: int
    odd: bool  # whether it holds odd numbers only
    #: Makes bytes, (blocks, bytes), of numbers, int16, (blocks, size), and the bytes of d, (blocks, 2).
    write: Callable[[Tensor, Tensor], list[Tensor]]
    file_type: int  # of a file whose weights all have this type (llama.cpp's ``llama_ftype``)
    mirrored: bool = False  # whether a scale below 0 may stand for -high..-low

    def holds(self, grid: Grid) -> bool:
        """Whether it holds all numbers of a grid."""
        low, high = range_of(grid)
        fits = self.low <= low and high <= self.high
        mirrored = self.mirrored and self.low <= -high and -low <= self.high
        return (fits or mirrored) and (bool(grid.offset) or not self.odd)

    def encode(self, numbers: Tensor, scale: Tensor) -> Tensor:
        """Makes bytes, (rows, bytes), of int16 numbers, (rows, columns), and a float32 scale for each group."""
        rows, columns = numbers.shape
        if numbers.numel() and (numbers.min() < self.low or numbers.max() > self.high):
            numbers, scale = -numbers, -scale
        each = scale.repeat_interleave(columns // scale.shape[1], dim=1)[:, :: self.size]
        d = each.to(torch.float16).reshape(-1, 1).view(torch.uint8)
        return torch.cat(self.write(numbers.reshape(-1, self.size), d), dim=1).view(rows, -1)


def _bytes(numbers: Tensor) -> Tensor:
    return numbers.to(torch.uint8)


def _q2_k(numbers: Tensor, d: Tensor) -> list[Tensor]:
    """Values are d (2 q - 3): all sixteen sub-blocks have scale 2 and minimum 3, both in units of d."""
    scales = torch.full((len(numbers), 16), 3 << 4 | 2, dtype=torch.uint8)
    return [scales, pack(_bytes((numbers + 3) // 2), 2, apart=32), d, d]


#: By name, the smallest first. Values are d times the numbers.
BLOCKS = {
    "Q1_0": Block(41, 128, -1, 1, True, lambda n, d: [d, pack(_bytes(n > 0), 1)], 40),
    "Q2_0": Block(42, 64, -1, 2, False, lambda n, d: [d, pack(_bytes(n + 1), 2)], 41, mirrored=True),
    "TQ2_0": Block(35, 256, -1, 2, False, lambda n, d: [pack(_bytes(n + 1), 2, 32), d], 37, mirrored=True),
    "Q2_K": Block(10, 256, -3, 3, True, _q2_k, 10),
    "Q4_0": Block(2, 32, -8, 7, False, lambda n, d: [d, pack(_bytes(n + 8), 4, 16)], 2, mirrored=True),
    "Q8_0": Block(8, 32, -128, 127, False, lambda n, d: [d, n.to(torch.int8).view(torch.uint8)], 7),
}
