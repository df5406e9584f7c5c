"""GGUF's blocks of a few bits, written from numbers and scales: nothing is quantized again.

A block is so many numbers of a row in memory, with one float16 scale d. Which values its bits stand for is
ggml's (``ggml-quants.c``); what each type can hold, and how, is said beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Numbers = NDArray[np.int16]
Halves = NDArray[np.float16]


class Block(NamedTuple):
    """A type of block.

    Attributes:
        number: of the type, as a file says it.
        size: numbers of a block.
        low, high: of them; -high..-low will do too where ``mirrored``, with a scale below 0.
        odd: whether they are odd.
        write: of (blocks, size) numbers and (blocks, 1) scales makes (blocks, bytes).
        file_type: of a file whose weights are of this type (llama.cpp's ``llama_ftype``).
    """

    number: int
    size: int
    low: int
    high: int
    odd: bool
    write: Callable[[Numbers, Halves], Bytes]
    file_type: int
    mirrored: bool = False

    def holds(self, low: int, high: int, odd: bool) -> bool:
        """Whether it holds all numbers of a grid, odd or not."""
        fits = self.low <= low and high <= self.high
        return (fits or (self.mirrored and self.low <= -high and -low <= self.high)) and (odd or not self.odd)

    def encode(self, numbers: Numbers, scale: NDArray[np.float32]) -> Bytes:
        """Rows of numbers, with a scale for each group of a row: (rows, bytes)."""
        rows, columns = numbers.shape
        if numbers.min(initial=0) < self.low or numbers.max(initial=0) > self.high:
            numbers, scale = -numbers, -scale
        each = np.repeat(scale, columns // scale.shape[1], axis=1)[:, :: self.size]
        halves: Halves = each.astype(np.float16).reshape(-1, 1)
        return self.write(numbers.reshape(-1, self.size), halves).reshape(rows, -1)


def _bytes(halves: Halves) -> Bytes:
    return halves.view(np.uint8)


def _four(codes: Bytes, axis: int) -> Bytes:
    """Four 2-bit codes along an axis in a byte, the first lowest."""
    parts = [np.take(codes, i, axis=axis) << (2 * i) for i in range(4)]
    found: Bytes = parts[0] | parts[1] | parts[2] | parts[3]
    return found


def _apart(numbers: Bytes) -> Bytes:
    """Of 256 2-bit codes: byte j of a half holds those at j, j + 32, j + 64 and j + 96."""
    return _four(numbers.reshape(-1, 2, 4, 32), axis=2).reshape(len(numbers), -1)


def _q2_0(numbers: Numbers, d: Halves) -> Bytes:
    codes = (numbers + 1).astype(np.uint8).reshape(len(numbers), -1, 4)
    return np.concatenate([_bytes(d), _four(codes, axis=2)], axis=1)


def _tq2_0(numbers: Numbers, d: Halves) -> Bytes:
    return np.concatenate([_apart((numbers + 1).astype(np.uint8)), _bytes(d)], axis=1)


def _q1_0(numbers: Numbers, d: Halves) -> Bytes:
    return np.concatenate([_bytes(d), np.packbits(numbers > 0, axis=1, bitorder="little")], axis=1)


def _q4_0(numbers: Numbers, d: Halves) -> Bytes:
    codes = (numbers + 8).astype(np.uint8)
    return np.concatenate([_bytes(d), codes[:, :16] | codes[:, 16:] << 4], axis=1)


def _q8_0(numbers: Numbers, d: Halves) -> Bytes:
    return np.concatenate([_bytes(d), numbers.astype(np.int8).view(np.uint8)], axis=1)


def _q2_k(numbers: Numbers, d: Halves) -> Bytes:
    """d (2 q - 3): all sixteen sub-blocks have scale 2 and minimum 3, both in units of d."""
    scales = np.full((len(numbers), 16), 3 << 4 | 2, np.uint8)
    return np.concatenate([scales, _apart(((numbers + 3) // 2).astype(np.uint8)), _bytes(d), _bytes(d)], axis=1)


#: By name, the smallest first. Values are d times the numbers.
BLOCKS = {
    "Q1_0": Block(41, 128, -1, 1, True, _q1_0, 40),
    "Q2_0": Block(42, 64, -1, 2, False, _q2_0, 41, mirrored=True),
    "TQ2_0": Block(35, 256, -1, 2, False, _tq2_0, 37, mirrored=True),
    "Q2_K": Block(10, 256, -3, 3, True, _q2_k, 10),
    "Q4_0": Block(2, 32, -8, 7, False, _q4_0, 2, mirrored=True),
    "Q8_0": Block(8, 32, -128, 127, False, _q8_0, 7),
}
