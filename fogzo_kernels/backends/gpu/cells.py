"""Tables for reductions over cells, the elements that share an alpha; plans.py keeps them.

Where cells are short, a program takes PACK whole cells, as many as lie in SPAN elements. A longer cell is cut
into PIECES of SPAN elements, a program for each. A second launch joins the results of the pieces: a program
takes one such cell. Both numbers depend on a cell's size alone, so that sums have the same bits in every list.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .plans import SPAN, Tensors, kept, owners, upload

COLUMNS = (
    "DATA", "ALPHA",  # addresses
    "LENGTH", "CELLS",  # elements of a cell, and how many cells
    "ALIGNED",  # 1: chunks of 8 elements of each cell are
    "FIRST",  # first program of the tensor
    "PACK", "PIECES",  # cells of a program, programs of a cell
    "SECOND",  # first program of the second launch
    "THREADS",  # of a cell in CUDA: a power of two
    "WIDTH",  # elements of a cell in a tile of Triton
)  # fmt: skip
THREADS = 128  # of a program in CUDA
CHUNKS_OF_A_THREAD = 8  # of 8 elements: enough that the work for each cell is little beside them
SHORT_CELL = 8  # threads of a short cell, so that their accesses lie side by side
WIDTHS = (2048, 128, 16)  # Triton compiles each; the last one serves all shorter cells

#: Device, addresses of tensors and alphas, elements of each
Key = tuple[object, ...]


class CellPlan(NamedTuple):
    table: Tensor  # int64, (tensors, len(COLUMNS)), flat
    owner: Tensor  # int32: the row of each program
    second: Tensor  # int32: the row of each program of the second launch
    programs: int
    seconds: int  # programs of the second launch


def plan(tensors: Tensors, alphas: Tensors) -> CellPlan:
    """The plan for these lists; the first one is not empty."""

    def key() -> Key:
        sizes = tuple((t.data_ptr(), t.numel()) for ts in (tensors, alphas) for t in ts)
        return tensors[0].device, len(tensors), sizes

    return kept((tensors, alphas), "cells", tensors, key, lambda *at: build(tensors, alphas, *at))


def build(tensors: Tensors, alphas: Tensors, key: Key, captured: bool) -> CellPlan:
    rows: list[dict[str, int]] = []
    programs, seconds = [0], [0]
    for t, alpha in zip(tensors, alphas, strict=True):
        rows.append(row_of(t, alpha, sum(programs), sum(seconds)))
        cells, pieces = rows[-1]["CELLS"], rows[-1]["PIECES"]
        programs.append(cells * pieces if pieces > 1 else -(-cells // rows[-1]["PACK"]))
        seconds.append(cells if pieces > 1 else 0)
    table = torch.tensor([row[name] for row in rows for name in COLUMNS], dtype=torch.int64)
    words = table, owners(programs[1:]), owners(seconds[1:])
    table, owner, second = upload(key, tensors[0].device, words, captured)
    return CellPlan(table, owner, second, sum(programs), sum(seconds))


def row_of(t: Tensor, alpha: Tensor, first: int, second: int) -> dict[str, int]:
    """Row of a tensor by column; its first programs are ``first`` and ``second``."""
    cells = alpha.numel()
    length = t.numel() // max(cells, 1)
    chunks = -(-length // 8)
    wanted = max(-(-chunks // CHUNKS_OF_A_THREAD), min(chunks, SHORT_CELL), 1)
    return {
        "DATA": t.data_ptr(),
        "ALPHA": alpha.data_ptr(),
        "LENGTH": length,
        "CELLS": cells,
        "ALIGNED": int(t.data_ptr() % 16 == 0 and (cells == 1 or length % 8 == 0)),
        "FIRST": first,
        "PACK": max(SPAN // max(length, 1), 1),
        "PIECES": max(-(-length // SPAN), 1),
        "SECOND": second,
        "THREADS": min(1 << (wanted - 1).bit_length(), THREADS),
        "WIDTH": next((width for width in WIDTHS if width <= length), WIDTHS[-1]),
    }
