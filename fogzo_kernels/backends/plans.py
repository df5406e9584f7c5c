"""Plans: a table of the tensors' addresses on the device, built once and kept while they stay.

The kernels of a GPU backend work on a list of tensors in one launch. A program takes SPAN consecutive
elements of one tensor: ``owner`` names its row in ``table``, and COLUMNS is what a row holds.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..spec.noise import Layout

COLUMNS = (
    "LATENT", "GRAD", "PLUS", "MINUS", "ALPHA",  # addresses
    "TENSOR_ID", "NUMEL",
    "FAST",  # elements in aligned full chunks of 8
    "FIRST",  # first program of the tensor
    "OFFSET", "INNER", "SKIP",  # layout; SKIP = stride - inner
    "SCALES", "SCALE_LENGTH",  # alphas, and elements that share one
    "INNER_DIVISOR", "SCALE_DIVISOR",  # in chunks, packed by divisor()
    "STATE_1", "STATE_2",  # addresses of the optimizer's state
)  # fmt: skip
SPAN = 16384  # elements per program
PLANS_KEPT = 256

Tensors = Sequence[Tensor]


def divisor(d: int) -> int:
    """``magic << 6 | shift`` such that n // d == n * magic >> shift for 0 <= n < 2^31."""
    shift = 31 + (d - 1).bit_length()
    return ((1 << shift) // d + 1) << 6 | shift


class Plan(NamedTuple):
    table: Tensor  # int64, (tensors, len(COLUMNS))
    owner: Tensor  # int32, (programs,): the row of each program
    programs: int
    per_tensor: bool  # every alpha has one element
    shard: bool  # some layout skips elements


_plans: OrderedDict[tuple[object, ...], Plan] = OrderedDict()
_captured: list[Plan] = []  # read by CUDA graphs, which may be replayed at any later time


def plan(
    like: Tensors,
    *,
    latents: Tensors = (),
    grads: Tensors = (),
    plus: Tensors = (),
    minus: Tensors = (),
    alphas: Tensors = (),
    first: Tensors = (),
    second: Tensors = (),
    tensor_ids: Sequence[int] = (),
    layouts: Sequence[Layout] = (),
) -> Plan:
    """The plan for these addresses; the table is a pure function of the key, so it never goes stale."""
    lists = latents, grads, plus, minus, alphas, first, second
    addresses = tuple(tuple(t.data_ptr() for t in ts) for ts in lists)
    numels = tuple(t.numel() for t in like)
    scales = tuple(t.numel() for t in alphas)
    key = (like[0].device if like else None, addresses, numels, scales, tuple(tensor_ids), tuple(layouts))
    found = _plans.get(key)
    capturing = bool(like) and like[0].is_cuda and torch.cuda.is_current_stream_capturing()
    if found is None:
        found = build_plan(key, capturing)
        if not capturing:  # what a capture uploads is there only while its graph replays
            _plans[key] = found
            if len(_plans) > PLANS_KEPT:
                _plans.popitem(last=False)
    else:
        _plans.move_to_end(key)
    if capturing:
        _captured.append(found)
    return found


def build_plan(key: tuple, capturing: bool = False) -> Plan:
    device, addresses, numels, scales, tensor_ids, layouts = key
    rows: list[list[int]] = []
    owner: list[int] = []
    for i, numel in enumerate(numels):
        pointers = [column[i] if i < len(column) else 0 for column in addresses]
        count = scales[i] if i < len(scales) else 1
        offset, inner, stride = layouts[i] if i < len(layouts) else (0, max(numel, 1), max(numel, 1))
        inner = min(inner, max(numel, 1))
        if inner == numel:
            stride = inner
        length = max(numel // max(count, 1), 1)
        aligned = (
            all(p % 16 == 0 for column, p in enumerate(pointers) if column != COLUMNS.index("ALPHA"))
            and offset % 8 == 0
            and (inner == numel or (inner % 8 == 0 and stride % 8 == 0))
            and (count == 1 or length % 8 == 0)
        )
        rows.append([
            *pointers[:5], tensor_ids[i] if i < len(tensor_ids) else 0, numel, numel & ~7 if aligned else 0,
            len(owner), offset, inner, stride - inner, count, length,
            divisor(max(inner // 8, 1)), divisor(max(length // 8, 1)), *pointers[5:],
        ])  # fmt: skip
        owner += [i] * -(-numel // SPAN)
    table, owners = upload(rows, owner, device, capturing)
    skip = COLUMNS.index("SKIP")
    return Plan(table, owners, len(owner), all(s == 1 for s in scales), any(row[skip] for row in rows))


# ---- uploading a plan without waiting for the device

ARENA_WORDS = 1 << 18  # 2 MiB: about 14,000 tensors over all captures of a process
_arena: list[Tensor] = []  # pinned host memory that captured copies read again at every replay
_arena_used = 0


def upload(
    rows: list[list[int]], owner: list[int], device: torch.device, capturing: bool
) -> tuple[Tensor, Tensor]:
    """Table and owners on the device, by one copy that the host does not wait for."""
    entries, words = len(rows) * len(COLUMNS), (len(owner) + 1) // 2
    on_gpu = device is not None and device.type == "cuda"
    if on_gpu and not _arena and not capturing:
        _arena.append(torch.empty(ARENA_WORDS, dtype=torch.int64, pin_memory=True))
    host = from_arena(entries + words) if capturing else torch.empty(
        entries + words, dtype=torch.int64, pin_memory=on_gpu
    )  # fmt: skip
    host[:entries] = torch.tensor(rows, dtype=torch.int64).flatten()
    host[entries:].view(torch.int32)[: len(owner)] = torch.tensor(owner, dtype=torch.int32)
    there = host.to(device, non_blocking=True) if on_gpu else host
    return there[:entries], there[entries:].view(torch.int32)


def from_arena(words: int) -> Tensor:
    """Pinned memory that is never used for anything else: a graph's copy reads it at any later time."""
    global _arena_used
    if not _arena or _arena_used + words > ARENA_WORDS:
        raise RuntimeError(
            "tensors must have been used once before their ops are captured in a CUDA graph: run the step"
            " before the capture, as a warm-up (or fewer graphs were to be captured by one process)"
        )
    _arena_used += words
    return _arena[0][_arena_used - words : _arena_used]
