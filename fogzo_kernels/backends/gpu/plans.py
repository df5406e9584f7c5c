"""Plans: a table of the tensors' addresses on the device, built once and kept while they stay.

The kernels of a GPU backend work on a list of tensors in one launch. A program takes a span of consecutive
elements of one tensor: ``owner`` names the program's row in ``table``, and a row holds COLUMNS.

A plan is a pure function of its key, so it never goes stale. States of lists that native code holds stand for
a key, which takes longer to make. A plan lives as long as something may read it:

- This module keeps the plans that were used last, as many as KEPT_BYTES hold. A plan that a CUDA graph captured
  stays for good, once for each key: nothing tells when the last graph that reads it is gone.
- A plan that is built during a capture lies in memory of the graph, which uploads it again at every replay. The
  upload reads pinned memory of the host, which stays for good, once for each key: 168 bytes for each tensor and
  4 bytes for each program.
"""

from __future__ import annotations

import math
import struct
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ...spec.call import Draw
from ...spec.noise import Layout
from ..held import Held

COLUMNS = (
    "LATENT", "GRAD", "PLUS", "MINUS", "ALPHA",  # addresses
    "TENSOR_ID", "NUMEL",
    "FAST",  # elements in full chunks of 8 that are chunks of the noise too, each under one alpha
    "ALIGNED",  # 1: its tensors begin at multiples of 16 bytes
    "FIRST",  # first program of the tensor
    "OFFSET", "INNER", "SKIP",  # layout; SKIP = stride - inner
    "SPAN",  # elements of a program
    "SCALE_LENGTH",  # elements that share an alpha
    "INNER_DIVISOR", "SCALE_DIVISOR",  # in chunks, packed by divisor()
    "STATE_1", "STATE_2",  # addresses of the optimizer's state
    "ALPHA_GRAD",  # address of the gradient of a learned alpha
    "FACTOR",  # of that gradient: the bits of a float64
)  # fmt: skip
#: In the order of a key; the first six are read by chunks.
ADDRESSES = ("LATENT", "GRAD", "PLUS", "MINUS", "STATE_1", "STATE_2", "ALPHA", "ALPHA_GRAD")
SPAN, SHORTEST = 16384, 2048  # elements of a program: the most, and the fewest, which are one tile
ENOUGH = 1024  # programs, about 8 for each SM of the largest GPUs: more would gain nothing
KEPT_BYTES = 1 << 26
PLAN_BYTES = 1 << 12  # of a plan beside its tables: Python's objects, and whole blocks of the device's memory

Tensors = Sequence[Tensor]


class Key(NamedTuple):
    device: torch.device | None
    addresses: tuple[tuple[int, ...], ...]  # of each list of tensors
    numels: tuple[int, ...]
    scales: tuple[int, ...]  # numbers of alphas
    tensor_ids: tuple[int, ...]
    layouts: tuple[Layout, ...]
    factors: tuple[float, ...]


class Plan(NamedTuple):
    table: Tensor  # int64, (tensors, len(COLUMNS)), flat
    owner: Tensor  # int32, (programs,): the row of each program
    crossing: Tensor  # int32: programs in which an alpha begins that goes on in the next, for learned scales
    programs: int
    aligned: bool  # every tensor begins at a multiple of 16 bytes
    per_tensor: bool  # every alpha has one element
    empty: tuple[int, ...]  # tensors without elements
    scale_lengths: frozenset[int]  # numbers of elements that share an alpha
    shard: bool  # some layout skips elements


P = TypeVar("P")


class Recent(OrderedDict[Any, Any]):
    """Plans, or keys with their plans, in the order of their last use. Threads may share it."""

    bytes, lock = 0, threading.Lock()

    def keep(self, key: Any, value: Any, plan: Any) -> None:
        """Add an entry, and drop the oldest ones until KEPT_BYTES hold the rest."""
        size = PLAN_BYTES + sum(x.nbytes for x in plan if isinstance(x, Tensor))
        with self.lock:
            self.bytes += size - self.pop(key, (None, 0))[1]
            self[key] = value, size
            while self.bytes > KEPT_BYTES and len(self) > 1:
                self.bytes -= self.popitem(last=False)[1][1]

    def take(self, key: Any) -> Any:
        """The value of an entry, which becomes the newest, or None."""
        with self.lock:
            if key not in self:
                return None
            self.move_to_end(key)
            return self[key][0]


_plans = Recent()  # by key; plans of cells.py are among them
_of_states = Recent()  # key and plan, by the states of lists
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
    draw: Draw | None = None,
    factors: Sequence[float] = (),
) -> Plan:
    """The plan for these lists, each of one tensor for each of ``like``, or empty.

    ``like`` gives the numbers of elements and the device, ``draw`` the tensor ids and layouts. ``alphas``, and
    with them ``plus``, ids and layouts, may end sooner; ``states`` are at most two lists. No program writes the
    gradients of the alphas of a tensor without elements: they become 0 here.
    """
    lists = latents, grads, plus, minus, *states, *((),) * (2 - len(states)), alphas, alpha_grads

    def key() -> Key:
        return Key(
            like[0].device if like else None,
            tuple(tuple(t.data_ptr() for t in ts) for ts in lists),
            tuple(t.numel() for t in like),
            tuple(t.numel() for t in alphas),
            tuple(draw.tensor_ids) if draw else (),
            tuple(draw.layouts) if draw else (),
            tuple(factors),
        )

    p = kept(lists, (draw is None, *factors), like, key, build_plan)
    for i in p.empty if alpha_grads else ():
        alpha_grads[i].zero_()
    return p


def kept(
    lists: Sequence[Tensors],
    others: Any,
    like: Tensors,
    key_of: Callable[[], Any],
    build: Callable[[Any, bool], P],
) -> P:
    """The plan of these lists and ``others``, which belongs to a key; ``build`` makes it of the key."""
    held = not any(ts and not isinstance(ts, Held) for ts in lists)
    states = others, *[ts.generation if isinstance(ts, Held) else 0 for ts in lists]
    known = _of_states.take(states) if held else None
    captured = capturing(like)
    if known is None:
        key = key_of()
        known = key, of_key(key, like, build)
        if held and not captured:  # or the plan may lie in memory of the graph
            _of_states.keep(states, known, known[1])
    elif captured:
        _captured[known[0]] = known[1]
    elif like and like[0].is_cuda:
        replenish(pinned=True)
    plan: P = known[1]
    return plan


def of_key(key: Any, like: Tensors, build: Callable[[Any, bool], P]) -> P:
    """The plan of a key; ``build`` makes it, for a graph that is being captured or not."""
    plan: P | None = _plans.take(key)
    if plan is None:
        plan = _captured.get(key)
    if capturing(like):
        if plan is None:
            return build(key, True)
        _captured[key] = plan
        return plan
    if like and like[0].is_cuda:
        replenish(pinned=True)
    if plan is None:
        plan = build(key, False)
        _plans.keep(key, plan, plan)
    return plan


def capturing(tensors: Tensors) -> bool:
    """Whether ops on the tensors go into a CUDA graph."""
    return bool(tensors) and tensors[0].is_cuda and torch.cuda.is_current_stream_capturing()


# ---- the table


def divisor(d: int) -> int:
    """``magic << 6 | shift`` such that n // d == n * magic >> shift for 0 <= n < 2^31."""
    shift = 31 + (d - 1).bit_length()
    return ((1 << shift) // d + 1) << 6 | shift


def span_of(numels: Sequence[int]) -> int:
    """Elements of a program: fewer for a small list, so that all of a GPU has work."""
    span = SPAN
    while span > SHORTEST and sum(-(-numel // span) for numel in numels) < ENOUGH:
        span //= 2
    return span


def build_plan(key: Key, captured: bool = False) -> Plan:
    """Table and owners of a key, on its device."""
    span = span_of(key.numels)
    counts = [-(-numel // span) for numel in key.numels]
    firsts = [*accumulate(counts, initial=0)]
    rows = [row_of(key, i, span, firsts[i]) for i in range(len(counts))]
    learned = bool(key.factors)
    cross = torch.cat([crossing(row) for row in rows]) if learned else torch.empty(0, dtype=torch.int32)
    entries = torch.tensor([row[name] for row in rows for name in COLUMNS], dtype=torch.int64)
    table, owner, cross = upload(key, key.device, (entries, owners(counts), cross), captured)
    return Plan(
        table,
        owner,
        cross,
        programs=firsts[-1],
        aligned=all(row["ALIGNED"] for row in rows),
        per_tensor=all(s == 1 for s in key.scales),
        empty=tuple(i for i, numel in enumerate(key.numels) if not numel),
        scale_lengths=frozenset(row["SCALE_LENGTH"] for row in rows if row["NUMEL"]),
        shard=any(row["SKIP"] for row in rows),
    )


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
    period = length // math.gcd(length, span)  # an alpha ends where so many programs do
    meetings = torch.arange(1, max(-(-numel // span), 1) if period > 1 else 1, dtype=torch.int32)
    return first - 1 + meetings[meetings % period != 0]


def row_of(key: Key, i: int, span: int, first: int) -> dict[str, int]:
    """Row of tensor i, whose first program is ``first``, by column."""
    numel, longest = key.numels[i], max(key.numels[i], 1)
    count = key.scales[i] if i < len(key.scales) else 1
    offset, inner, stride = key.layouts[i] if i < len(key.layouts) else (0, longest, longest)
    inner = min(inner, longest)
    if inner == numel:
        stride = inner
    length = max(numel // max(count, 1), 1)
    whole = (
        offset % 8 == 0
        and (inner == numel or (inner % 8 == 0 and stride % 8 == 0))
        and (count == 1 or length % 8 == 0)
    )
    pointers = [ts[i] if i < len(ts) else 0 for ts in key.addresses]
    return {
        **dict(zip(ADDRESSES, pointers, strict=True)),
        "TENSOR_ID": key.tensor_ids[i] if i < len(key.tensor_ids) else 0,
        "NUMEL": numel,
        "FAST": numel & ~7 if whole else 0,
        "ALIGNED": int(all(pointer % 16 == 0 for pointer in pointers[:6])),
        "FIRST": first,
        "OFFSET": offset,
        "INNER": inner,
        "SKIP": stride - inner,
        "SPAN": span,
        "SCALE_LENGTH": length,
        "INNER_DIVISOR": divisor(max(inner // 8, 1)),
        "SCALE_DIVISOR": divisor(max(length // 8, 1)),
        "FACTOR": bits(key.factors[i]) if i < len(key.factors) else 0,
    }


def bits(x: float) -> int:
    """The bits of a float64, as a signed integer."""
    return int.from_bytes(struct.pack("<d", x), "little", signed=True)


# ---- uploading a plan without waiting for the device

ARENA_WORDS = 1 << 18  # 2 MiB: about 13,000 tensors
_arena: list[Tensor] = []  # the rest of the pinned host memory for uploads by graphs
_uploads: dict[Any, Tensor] = {}  # host memory that graphs read again at every replay


def upload(key: Any, device: torch.device | None, lists: Sequence[Tensor], captured: bool) -> list[Tensor]:
    """The lists on the device, by one copy that the host does not wait for."""
    words = [-(-x.numel() * x.itemsize // 16) * 2 for x in lists]  # each begins at a multiple of 16 bytes
    on_gpu = device is not None and device.type == "cuda"
    host = _uploads.get(key) if captured else None
    if host is None:
        total = sum(words)
        host = from_arena(total) if captured else torch.empty(total, dtype=torch.int64, pin_memory=on_gpu)
        for part, x in zip(host.split(words), lists, strict=True):
            part.view(x.dtype)[: x.numel()] = x
        if captured:
            _uploads[key] = host
    parts = (host.to(device, non_blocking=True) if on_gpu else host).split(words)
    return [part.view(x.dtype)[: x.numel()] for part, x in zip(parts, lists, strict=True)]


def replenish(pinned: bool) -> None:
    """See that half an arena is there for the next capture, which may not allocate one itself."""
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
    taken, _arena[0] = _arena[0][:words], _arena[0][words:]
    return taken
