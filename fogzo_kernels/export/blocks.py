"""GGUF's blocks of a few bits, written from numbers and scales: nothing is quantized again.

A block is so many numbers of a row in memory, with one float16 scale d. Which values its bits stand for is
ggml's (``ggml-quants.c``); what each type can hold, and how, is said beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..distributed.packing import pack


class Block(NamedTuple):
    """Writes a type of block.

    Attributes:
        number: of the type, as a file says it.
        size: numbers of a block.
        low, high: of them; -high..-low will do too where ``mirrored``, with a scale below 0.
        odd: whether they are odd.
        write: makes bytes, (blocks, bytes), of numbers, int16, (blocks, size), and the bytes of d, (blocks, 2).
        file_type: of a file whose weights are of this type (llama.cpp's ``llama_ftype``).
    """

    number: int
    size: int
    low: int
    high: int
    odd: bool
    write: Callable[[Tensor, Tensor], list[Tensor]]
    file_type: int
    mirrored: bool = False

    def holds(self, low: int, high: int, odd: bool) -> bool:
        """Whether it holds all numbers of a grid, odd or not."""
        fits = self.low <= low and high <= self.high
        return (fits or (self.mirrored and self.low <= -high and -low <= self.high)) and (odd or not self.odd)

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
