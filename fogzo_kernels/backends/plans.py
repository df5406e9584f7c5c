"""Plans: a table of the tensors' addresses on the device, built once and kept while they stay.

The kernels of a GPU backend work on a list of tensors in one launch. A program takes a span of consecutive
elements of one tensor: ``owner`` names its row in ``table``, and COLUMNS is what a row holds.

A plan is a pure function of its key, so it never goes stale. How long one lives:

- Built outside a capture, it is among the PLANS_KEPT used last. If a CUDA graph captured it, it stays for
  good, once for each key: nothing tells when the last graph that reads it is gone.
- Built while a graph is captured, it lies in memory of that graph, which uploads it again at every replay,
  and is not kept here. What the upload reads, pinned memory of the host, stays for good, once for each key.

So graphs that are captured again of the same tensors cost nothing more; of others, a row of 168 bytes for
each tensor and 4 bytes for each program.
"""

from __future__ import annotations

import math
import struct
from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ..spec.noise import Layout

COLUMNS = (
    "LATENT", "GRAD", "PLUS", "MINUS", "ALPHA",  # addresses
    "TENSOR_ID", "NUMEL",
    "FAST",  # elements in full chunks of 8 that are those of the noise, each under one alpha
    "ALIGNED",  # 1: its tensors begin at multiples of 16 bytes
    "FIRST",  # first program of the tensor
    "OFFSET", "INNER", "SKIP",  # layout; SKIP = stride - inner
    "SPAN",  # elements of a program
    "SCALE_LENGTH",  # elements that share an alpha
    "INNER_DIVISOR", "SCALE_DIVISOR",  # in chunks, packed by divisor()
    "STATE_1", "STATE_2",  # addresses of the optimizer's state
    "ALPHA_GRAD",  # address of the gradient of a learned alpha
    "FACTOR",  # of it: the bits of a float64
)  # fmt: skip
#: In the order of a key.
ADDRESSES = ("LATENT", "GRAD", "PLUS", "MINUS", "ALPHA", "STATE_1", "STATE_2", "ALPHA_GRAD")
BY_CHUNK = tuple(name for name in ADDRESSES if name not in ("ALPHA", "ALPHA_GRAD"))
SPAN, SHORTEST = 16384, 2048  # elements of a program: the most, and the fewest, which are one tile
ENOUGH = 1024  # programs, about 8 for each SM of the largest GPUs: then spans need not be shorter
PLANS_KEPT = 256

Tensors = Sequence[Tensor]
#: Device, addresses of each list of tensors, elements, alphas, tensor ids, layouts, factors
Key = tuple[
    torch.device | None, tuple[tuple[int, ...], ...], tuple[int, ...], tuple[int, ...], tuple[int, ...],
    tuple[Layout, ...], tuple[float, ...],
]  # fmt: skip


class Plan(NamedTuple):
    table: Tensor  # int64, (tensors, len(COLUMNS)), flat
    owner: Tensor  # int32, (programs,): the row of each program
    programs: int
    crossing: Tensor  # int32: programs in which an alpha begins that others hold too, for learned scales
    aligned: bool  # every tensor begins at a multiple of 16 bytes
    per_tensor: bool  # every alpha has one element
    scale_lengths: frozenset[int]  # numbers of elements that share an alpha
    shard: bool  # some layout skips elements


P = TypeVar("P")
_plans: OrderedDict[Any, Any] = OrderedDict()  # by key, those of plans of other tables among them
_captured: dict[Any, Any] = {}  # read by CUDA graphs, which may be replayed at any later time


def plan(
    like: Tensors,
    *,
    latents: Tensors = (),
    grads: Tensors = (),
    plus: Tensors = (),
    minus: Tensors = (),
    alphas: Tensors = (),
    states: Sequence[Tensors] = (),
    alpha_grads: Tensors = (),
    tensor_ids: Sequence[int] = (),
    layouts: Sequence[Layout] = (),
    factors: Sequence[float] = (),
) -> Plan:
    """The plan for these lists, each of one tensor for each of ``like``, or empty.

    ``like`` gives the numbers of elements and the device. ``alphas``, and with them ``plus``, ``tensor_ids``
    and ``layouts``, may end sooner; ``states`` are at most two lists.
    """
    lists = latents, grads, plus, minus, alphas, *states, *((),) * (2 - len(states)), alpha_grads
    addresses = tuple(tuple(t.data_ptr() for t in ts) for ts in lists)
    numels = tuple(t.numel() for t in like)
    scales = tuple(t.numel() for t in alphas)
    device, names = like[0].device if like else None, (tuple(tensor_ids), tuple(layouts))
    key = device, addresses, numels, scales, *names, tuple(factors)
    return kept(key, like, lambda captured: build_plan(key, captured))


def kept(key: Any, like: Tensors, build: Callable[[bool], P]) -> P:
    """The plan of a key; ``build`` makes it, for a graph that is being captured or not."""
    found: P | None = _plans.get(key)
    if found is not None:
        _plans.move_to_end(key)
    else:
        found = _captured.get(key)
    if capturing(like):
        if found is None:
            return build(True)
        _captured[key] = found
        return found
    if like and like[0].is_cuda:
        replenish(pinned=True)
    if found is None:
        found = _plans[key] = build(False)
        if len(_plans) > PLANS_KEPT:
            _plans.popitem(last=False)
    return found


def learned_plan(
    out: Tensors, alpha_grads: Tensors, grads: Tensors, latents: Tensors, alphas: Tensors,
    factors: Sequence[float],
) -> Plan:  # fmt: skip
    """The plan for learned scales. Alphas of tensors without elements have no program: their gradient is 0."""
    for latent, alpha_grad in zip(latents, alpha_grads, strict=True):
        if not latent.numel():
            alpha_grad.zero_()
    return plan(
        latents, latents=latents, grads=grads, plus=out, alphas=alphas, alpha_grads=alpha_grads, factors=factors
    )


def capturing(tensors: Tensors) -> bool:
    """Whether ops on them go into a CUDA graph."""
    return bool(tensors) and tensors[0].is_cuda and torch.cuda.is_current_stream_capturing()


# ---- the table


def divisor(d: int) -> int:
    """``magic << 6 | shift`` such that n // d == n * magic >> shift for 0 <= n < 2^31."""
    shift = 31 + (d - 1).bit_length()
    return ((1 << shift) // d + 1) << 6 | shift


def span_of(numels: Sequence[int]) -> int:
    """Elements of a program: of a small list so few that all of a GPU has work."""
    span = SPAN
    while span > SHORTEST and sum(-(-numel // span) for numel in numels) < ENOUGH:
        span //= 2
    return span


def build_plan(key: Key, captured: bool = False) -> Plan:
    """Table and owners of a key, on its device."""
    addresses, numels, scales = key[1:4]
    span = span_of(numels)
    counts = [-(-numel // span) for numel in numels]
    firsts = [*accumulate(counts, initial=0)]
    rows = [row_of(key, i, span, firsts[i]) for i in range(len(numels))]
    learned = addresses[ADDRESSES.index("ALPHA_GRAD")]
    cross = torch.cat([crossing(row) for row in rows]) if learned else torch.empty(0, dtype=torch.int32)
    entries = torch.tensor([row[name] for row in rows for name in COLUMNS], dtype=torch.int64)
    table, owner, cross = upload(key, key[0], entries, owners(counts), cross, captured)
    aligned = all(row["ALIGNED"] for row in rows)
    per_tensor, shard = all(s == 1 for s in scales), any(row["SKIP"] for row in rows)
    lengths = frozenset(row["SCALE_LENGTH"] for row in rows if row["NUMEL"])
    return Plan(table, owner, firsts[-1], cross, aligned, per_tensor, lengths, shard)


def owners(counts: Sequence[int]) -> Tensor:
    """The row of each program, where row i has ``counts[i]`` programs."""
    return torch.arange(len(counts), dtype=torch.int32).repeat_interleave(
        torch.tensor(counts, dtype=torch.int64)
    )


def crossing(row: dict[str, int]) -> Tensor:
    """The programs of a row in which an alpha begins that goes on in the next program."""
    numel, length, span, first = (row[name] for name in ("NUMEL", "SCALE_LENGTH", "SPAN", "FIRST"))
    if length > span:
        return (first + torch.arange(0, numel, length) // span).int()
    period = length // math.gcd(length, span)  # where each so many programs meet the next one, an alpha ends
    meetings = torch.arange(1, max(-(-numel // span), 1) if period > 1 else 1, dtype=torch.int32)
    return first - 1 + meetings[meetings % period != 0]


def row_of(key: Key, i: int, span: int, first: int) -> dict[str, int]:
    """Row of tensor i, whose first program is ``first``, by column."""
    _, addresses, numels, scales, tensor_ids, layouts, factors = key
    numel = numels[i]
    count = scales[i] if i < len(scales) else 1
    offset, inner, stride = layouts[i] if i < len(layouts) else (0, max(numel, 1), max(numel, 1))
    inner = min(inner, max(numel, 1))
    if inner == numel:
        stride = inner
    length = max(numel // max(count, 1), 1)
    whole = (
        offset % 8 == 0
        and (inner == numel or (inner % 8 == 0 and stride % 8 == 0))
        and (count == 1 or length % 8 == 0)
    )
    pointers = {name: ts[i] if i < len(ts) else 0 for name, ts in zip(ADDRESSES, addresses, strict=True)}
    return {
        **pointers,
        "TENSOR_ID": tensor_ids[i] if i < len(tensor_ids) else 0,
        "NUMEL": numel,
        "FAST": numel & ~7 if whole else 0,
        "ALIGNED": int(all(pointers[name] % 16 == 0 for name in BY_CHUNK)),
        "FIRST": first,
        "OFFSET": offset,
        "INNER": inner,
        "SKIP": stride - inner,
        "SPAN": span,
        "SCALE_LENGTH": length,
        "INNER_DIVISOR": divisor(max(inner // 8, 1)),
        "SCALE_DIVISOR": divisor(max(length // 8, 1)),
        "FACTOR": bits(factors[i]) if i < len(factors) else 0,
    }


def bits(x: float) -> int:
    """The bits of a float64, as a signed integer."""
    found: int = struct.unpack("<q", struct.pack("<d", x))[0]
    return found


# ---- uploading a plan without waiting for the device

ARENA_WORDS = 1 << 18  # 2 MiB: about 13,000 tensors
_arena: list[Tensor] = []  # what is left of the pinned host memory for uploads by graphs
_uploads: dict[Any, Tensor] = {}  # what graphs read again at every replay


def upload(
    key: Any, device: torch.device | None, entries: Tensor, first: Tensor, second: Tensor, captured: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The int64 entries and two lists of int32 on the device, by one copy that the host does not wait for."""
    sizes = entries.numel(), -(-first.numel() // 2), -(-second.numel() // 2)
    words = [size + size % 2 for size in sizes]  # each begins at a multiple of 16 bytes
    on_gpu = device is not None and device.type == "cuda"
    if captured and key in _uploads:
        host = _uploads[key]
    else:
        total = sum(words)
        host = from_arena(total) if captured else torch.empty(total, dtype=torch.int64, pin_memory=on_gpu)
        for part, given in zip(host.split(words), (entries, first, second), strict=True):
            part.view(given.dtype)[: given.numel()] = given
        if captured:
            _uploads[key] = host
    there = host.to(device, non_blocking=True) if on_gpu else host
    table, *lists = there.split(words)
    owner, other = (part.view(torch.int32) for part in lists)
    return table[: sizes[0]], owner[: first.numel()], other[: second.numel()]


def replenish(pinned: bool) -> None:
    """Outside a capture, which may not allocate it: see that half an arena is there for the next one."""
    if not _arena or _arena[0].numel() < ARENA_WORDS // 2:
        _arena[:] = [torch.empty(ARENA_WORDS, dtype=torch.int64, pin_memory=pinned)]


def from_arena(words: int) -> Tensor:
    """Pinned memory that is never used for anything else: a graph's copy reads it at any later time."""
    if not _arena:
        raise RuntimeError(
            "tensors must have been used once before their ops are captured in a CUDA graph: run the step"
            " before the capture, as a warm-up"
        )
    left = _arena[0].numel()
    if words > left:
        raise RuntimeError(
            f"the tables of ops that are captured in CUDA graphs must have at most {left} words until the next"
            f" op outside a capture, got {words}"
        )
    found, _arena[0] = _arena[0][:words], _arena[0][words:]
    return found
