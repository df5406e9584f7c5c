"""Timing: medians and quartiles of device time, with operands that the cache does not hold.

A sample is a run of calls that go round over several sets of operands, larger than the cache together.
On a GPU it is the replay of one CUDA graph between two events, so that the host's time is not in it.
On a CPU, whose memory others may share, what is compared is measured in turns, a sample each.
"""

from __future__ import annotations

import math
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import cycle, islice
from operator import truediv
from pathlib import Path

import torch

Call = Callable[[], object]

MAX_SETS = 32
MAX_CALLS = 64  # of a sample
MAX_KERNELS = 3000  # of a sample, for code that launches some for every tensor
SAMPLE_SECONDS = 1e-3  # a sample lasts about as long, or is one call


@dataclass(frozen=True)
class Effort:
    """How long to measure."""

    seconds: float = 0.2
    least: int = 10  # samples
    most: int = 200
    sets: int = MAX_SETS  # of operands, at most


QUICK = Effort(seconds=0.02, least=3, most=20, sets=4)
REHEARSAL = Effort(seconds=0.0, least=2, most=2, sets=1)


@dataclass(frozen=True)
class Rounds:
    """How a sample is made."""

    sets: int  # of operands
    calls: int  # on the CPU, at most
    cache: str  # "cold", or "warm" where the sets together fit into twice the cache


@dataclass(frozen=True)
class Measurement:
    """Seconds of one call."""

    median: float
    q25: float
    q75: float
    seconds: Sequence[float]  # of each sample
    timing: str  # "graph", "events" or "host"
    cache: str

    def of(self, other: Measurement) -> float:
        """Its time over that of another one; where both were measured in turns, the median over turns."""
        if self.timing != "host":
            return self.median / other.median
        return statistics.median(map(truediv, self.seconds, other.seconds))


@lru_cache
def cache_bytes(device: torch.device) -> int:
    """Size of the last cache before memory; 32 MiB where nothing says so."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    found = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    units = {"": 1, "K": 2**10, "M": 2**20}
    sizes = [re.fullmatch(r"(\d+)([KM]?)\s*", path.read_text()) for path in found]
    return max((int(m[1]) * units[m[2]] for m in sizes if m), default=2**25)


def rounds(bytes_moved: int, device: torch.device, kernels: int = 1, most: int = MAX_SETS) -> Rounds:
    """Sets and calls of a sample, for a call that moves so many bytes with so many kernels."""
    cache = cache_bytes(device)
    sets = min(math.ceil(4 * cache / bytes_moved), most)
    rate, overhead = (3e12, 2e-6) if device.type == "cuda" else (1e10, 2e-5)
    calls = math.ceil(SAMPLE_SECONDS / (bytes_moved / rate + overhead * kernels))
    if device.type == "cuda":  # a graph: every sample goes over all sets
        calls = min(max(calls, sets), MAX_CALLS, max(MAX_KERNELS // kernels, 1))
        sets = min(sets, calls)
        calls -= calls % sets
    calls = min(max(calls, 1), MAX_CALLS)
    return Rounds(sets, calls, "cold" if sets * bytes_moved >= 2 * cache else "warm")


Timed = tuple[Sequence[Call], Rounds]


def measure(calls: Sequence[Call], plan: Rounds, device: torch.device, effort: Effort) -> Measurement:
    """Time of one call, of which there is one for every set of operands."""
    return measure_all([(calls, plan)], device, effort)[0]


def measure_all(all_timed: Sequence[Timed], device: torch.device, effort: Effort) -> list[Measurement]:
    """The same of several, on a CPU in turns."""
    with torch.no_grad():
        if device.type == "cuda":
            samples = [on_gpu(calls, plan, effort) for calls, plan in all_timed]
        else:
            samples = [(seconds, "host") for seconds in on_cpu(all_timed, effort)]
    found = []
    for (_, plan), (seconds, timing) in zip(all_timed, samples, strict=True):
        q25, median, q75 = statistics.quantiles(seconds, n=4, method="inclusive")
        found.append(Measurement(median, q25, q75, seconds, timing, plan.cache))
    return found


def on_cpu(all_timed: Sequence[Timed], effort: Effort) -> list[list[float]]:
    counts = []
    for calls, plan in all_timed:
        begin = time.perf_counter()
        for call in calls:  # so that every page is there
            call()
        each = (time.perf_counter() - begin) / len(calls)
        counts.append(min(math.ceil(SAMPLE_SECONDS / each), plan.calls))
    turns = [cycle(calls) for calls, _ in all_timed]
    found: list[list[float]] = [[] for _ in all_timed]
    begin = time.perf_counter()
    while wanted(len(found[0]), (time.perf_counter() - begin) / len(found), effort):
        for turn, count, seconds in zip(turns, counts, found, strict=True):
            chosen = list(islice(turn, count))
            start = time.perf_counter()
            for call in chosen:
                call()
            seconds.append((time.perf_counter() - start) / count)
    return found


def on_gpu(calls: Sequence[Call], plan: Rounds, effort: Effort) -> tuple[list[float], str]:
    chosen = list(islice(cycle(calls), plan.calls))
    try:
        replay, timing = capture(calls, chosen).replay, "graph"
    except RuntimeError:  # something in it cannot be captured
        torch.cuda.synchronize()

        def replay() -> None:
            for call in chosen:
                call()

        timing = "events"
    for _ in range(3):
        replay()
    torch.cuda.synchronize()
    seconds: list[float] = []
    begin = time.perf_counter()
    while wanted(len(seconds), time.perf_counter() - begin, effort):
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(effort.least)]
        for start, end in pairs:
            start.record()
            replay()
            end.record()
        torch.cuda.synchronize()
        seconds += [start.elapsed_time(end) / 1e3 / plan.calls for start, end in pairs]
    return seconds, timing


def wanted(samples: int, elapsed: float, effort: Effort) -> bool:
    return samples < effort.least or (samples < effort.most and elapsed < effort.seconds)


def capture(distinct: Sequence[Call], chosen: Sequence[Call]) -> torch.cuda.CUDAGraph:
    """A graph of the chosen calls, after one of each on another stream, as capture wants it.

    The outer stream context restores the current stream where a capture fails, which does not.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in distinct:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph):
        for call in chosen:
            call()
    return graph


def host_seconds(call: Call, repeats: int = 10) -> float:
    """Median time that the host spends in a call on an idle GPU."""
    seconds = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return statistics.median(seconds)


def extra_bytes(call: Call, device: torch.device) -> int | None:
    """What the allocator's peak during a call adds to what is allocated; None on the CPU."""
    if device.type != "cuda":
        return None
    with torch.no_grad():
        call()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated(device) - before)


STREAMS = {"copy": 2, "triad": 3}  # arrays of each


class Streams:
    """Plain streams that read and write so many bytes in all.

    ``copy`` reads one float32 array and writes one; ``triad`` (STREAM's) reads two, a + s b, and writes one.
    """

    def __init__(self, device: torch.device, effort: Effort) -> None:
        self.device, self.effort = device, effort
        self.found: dict[int, list[Measurement]] = {}

    def timed(self, bytes_moved: int) -> list[Timed]:
        """A copy and a triad."""
        plan = rounds(bytes_moved, self.device, most=self.effort.sets)
        return [
            ([self.call(kind, max(bytes_moved // (4 * arrays), 1)) for _ in range(plan.sets)], plan)
            for kind, arrays in STREAMS.items()
        ]

    def beside(self, timed: Timed, bytes_moved: int) -> list[Measurement]:
        """Times of what moves so many bytes, of a copy and of a triad; those are measured once on a GPU."""
        if self.device.type != "cuda":
            return measure_all([timed, *self.timed(bytes_moved)], self.device, self.effort)
        if bytes_moved not in self.found:
            self.found[bytes_moved] = measure_all(self.timed(bytes_moved), self.device, self.effort)
        return [measure(*timed, self.device, self.effort), *self.found[bytes_moved]]

    def call(self, kind: str, numel: int) -> Call:
        out = torch.empty(numel, device=self.device)
        a, b = (torch.randn(numel, device=self.device) for _ in range(2))
        return (lambda: out.copy_(a)) if kind == "copy" else (lambda: torch.add(a, b, alpha=0.5, out=out))
