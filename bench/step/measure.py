"""The measurement of one setting: methods in turns, then what each asks of ops and memory."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from .methods import PEERS, Clock, method_of
from .models import Setting, task_of
from .traffic import launches_of, peak_of, traffic_of

WARM = 4  # steps before those that are timed; every fourth has probes in each method


@dataclass
class Row:
    """Of a method: times, one a turn, of which a group has every kind of step once; and what a step moves."""

    method: str
    seconds: list[float] = field(default_factory=list)
    rest: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    launches: int | None = None
    calls: float | None = None  # of this package's ops outside of passes
    bytes: float | None = None  # that they move
    bytes_in_passes: float | None = None
    parts: dict[str, float] = field(default_factory=dict)  # seconds by op

    def against(self, ste: Row, rest: bool = False) -> float:
        """Time, or that of the rest, over STE's whole step in the same turns."""
        times = self.rest if rest else self.seconds
        turns = range(0, len(times) // WARM * WARM, WARM)
        return statistics.median(sum(times[i : i + WARM]) / sum(ste.seconds[i : i + WARM]) for i in turns)

    def found(self, ste: Row) -> dict[str, Any]:
        """All of it, for JSON."""
        return {
            "method": self.method, "of_ste": self.against(ste), "rest_of_ste": self.against(ste, rest=True),
            "median_s": statistics.median(self.seconds), "peak_bytes": self.peak_bytes,
            "launches": self.launches, "calls": self.calls, "bytes": self.bytes,
            "bytes_in_passes": self.bytes_in_passes, "parts_s": self.parts, "seconds": self.seconds,
        }  # fmt: skip


def rounded(turns: int) -> int:
    """Whole groups of turns."""
    return -(-turns // WARM) * WARM


def measured(
    setting: Setting, methods: Sequence[str], turns: int, advance: Callable[[], Any], traffic: bool = True
) -> list[Row]:
    """A row for each method, STE's first; ``advance`` is called after each turn."""
    device, task = torch.device(setting.device), task_of(setting)
    rows = {name: Row(name) for name in ["ste", *(name for name in methods if name != "ste")]}
    for name, row in rows.items() if traffic else ():
        row.peak_bytes = peak_of(partial(method_of, name, task, setting), device)
    steps = {name: method_of(name, task, setting) for name in rows}
    for turn in range(WARM + rounded(turns)):
        for name, step in steps.items():
            clock = Clock(device)
            start = clock.now()
            step(clock)
            seconds = clock.now() - start
            if turn >= WARM:
                rows[name].seconds.append(seconds)
                rows[name].rest.append(seconds - clock.passes)
        advance()
    for name, row in rows.items() if traffic else ():
        row.launches = launches_of(steps[name], device)
        if name not in PEERS:
            found = traffic_of(steps[name], device, WARM)
            row.calls, row.bytes, row.bytes_in_passes = found.calls, found.bytes, found.bytes_in_passes
            row.parts = found.seconds
    return list(rows.values())
