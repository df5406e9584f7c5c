"""Tables for reductions over cells, the elements that share an alpha; kept as those of plans.py.

Where cells are short, a program takes PACK whole ones, as many as lie in SPAN elements. One that is longer is
cut into PIECES of SPAN elements, a program for each; what these come to is joined in a second launch, which has
a program for each such cell. Both depend on the sizes of a cell alone, so that sums have the same bits in every
list: SPAN is not shorter for a short list, as it is in plans.py.
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
CHUNKS_OF_A_THREAD = 8  # of 8 elements: what a cell's threads do once is then little
TOGETHER = 8  # threads of a short cell, so that their accesses lie side by side
WIDTHS = (2048, 128, 16)  # Triton compiles each; the last one serves all that is shorter

#: Device, addresses of tensors and alphas, elements of each
Key = tuple[object, ...]


class CellPlan(NamedTuple):
    table: Tensor  # int64, (tensors, len(COLUMNS)), flat
    owner: Tensor  # int32: the row of each program
    programs: int
    second: Tensor  # the same of the second launch
    seconds: int  # its programs


def plan(tensors: Tensors, alphas: Tensors) -> CellPlan:
    """The plan for these lists; the first one is not empty."""
    device = tensors[0].device
    addresses = tuple(tuple(t.data_ptr() for t in ts) for ts in (tensors, alphas))
    numels, scales = (tuple(t.numel() for t in ts) for ts in (tensors, alphas))
    key = (device, addresses, numels, scales)
    return kept(key, tensors, lambda captured: build(key, tensors, alphas, captured))


def build(key: Key, tensors: Tensors, alphas: Tensors, captured: bool) -> CellPlan:
    entries: list[int] = []
    programs, seconds = [0], [0]
    for t, alpha in zip(tensors, alphas, strict=True):
        row = row_of(t, alpha, sum(programs), sum(seconds))
        entries += [row[name] for name in COLUMNS]
        cells, pieces = row["CELLS"], row["PIECES"]
        programs.append(cells * pieces if pieces > 1 else -(-cells // row["PACK"]))
        seconds.append(cells if pieces > 1 else 0)
    first, second = owners(programs[1:]), owners(seconds[1:])
    words = torch.tensor(entries, dtype=torch.int64)
    table, owner, joining = upload(key, tensors[0].device, words, first, second, captured)
    return CellPlan(table, owner, first.numel(), joining, second.numel())


def row_of(t: Tensor, alpha: Tensor, first: int, second: int) -> dict[str, int]:
    """Row of a tensor by column; its first programs are ``first`` and ``second``."""
    cells = alpha.numel()
    length = t.numel() // max(cells, 1)
    chunks = -(-length // 8)
    wanted = max(-(-chunks // CHUNKS_OF_A_THREAD), min(chunks, TOGETHER), 1)
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
