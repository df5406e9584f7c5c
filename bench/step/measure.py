"""The measurement of one setting: methods in turns, then what each asks of ops and memory."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from ..lost import DeviceLostError, alive, told
from .methods import BASE, OURS, Clock, Step, method_of
from .models import Setting, task_of
from .traffic import launches_of, peak_of, traffic_of

WARM = 4  # steps before those that are timed, and turns of a group


@dataclass
class Row:
    """Of a method: times, one a turn, and what a step moves."""

    method: str
    seconds: list[float] = field(default_factory=list)
    rest: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    launches: int | None = None
    calls: float | None = None  # of this package's ops outside of passes
    bytes: float | None = None  # that they move
    bytes_in_passes: float | None = None
    parts: dict[str, float] = field(default_factory=dict)  # seconds by op

    def ratios(self, other: Row, rest: bool = False) -> list[float]:
        """For each group of turns, this time (or this rest) over the other method's whole step."""
        times = self.rest if rest else self.seconds
        turns = range(0, len(times) // WARM * WARM, WARM)
        return [sum(times[i : i + WARM]) / sum(other.seconds[i : i + WARM]) for i in turns]

    def against(self, other: Row, rest: bool = False) -> float:
        """The median of its ratios."""
        return statistics.median(self.ratios(other, rest))

    def found(self, base: Row) -> dict[str, Any]:
        """All of it, for JSON."""
        return {
            "method": self.method, f"of_{BASE}": self.against(base),
            f"rest_of_{BASE}": self.against(base, rest=True),
            "median_s": statistics.median(self.seconds), "peak_bytes": self.peak_bytes,
            "launches": self.launches, "calls": self.calls, "bytes": self.bytes,
            "bytes_in_passes": self.bytes_in_passes, "parts_s": self.parts, "seconds": self.seconds,
        }  # fmt: skip


def rounded(turns: int) -> int:
    """Whole groups of turns."""
    return -(-turns // WARM) * WARM


def measured(
    setting: Setting,
    methods: Sequence[str],
    turns: int,
    failed: dict[str, str],
    advance: Callable[[list[Row]], Any],
    traffic: bool = True,
) -> list[Row]:
    """A row for each method; the base stands first.

    Args:
        failed: reasons by method; these are not measured, and those that fail are added.
        advance: called after each turn with the rows, whose times are whole after every fourth.

    Raises:
        DeviceLostError: a method that failed has taken the device with it.
        Exception: the base failed, with which all are compared.
    """
    device, task = torch.device(setting.device), task_of(setting)
    names = [name for name in dict.fromkeys([BASE, *methods]) if name not in failed]
    rows, steps = {name: Row(name) for name in names}, dict[str, Step]()

    def each(work: Callable[[str, Row], None]) -> None:
        for name in list(rows):
            try:
                work(name, rows[name])
            except Exception as error:
                failed[name] = told(error)
                if not alive(device):
                    raise DeviceLostError from error
                if name == BASE:
                    raise
                del rows[name]
                steps.pop(name, None)

    def make(name: str, row: Row) -> None:
        if traffic:
            row.peak_bytes = peak_of(partial(method_of, name, task, setting), device)
        steps[name] = method_of(name, task, setting)

    def take(name: str, row: Row) -> None:
        clock = Clock(device)
        start = clock.now()
        steps[name](clock)
        seconds = clock.now() - start
        row.seconds.append(seconds)
        row.rest.append(seconds - clock.passes)

    def count(name: str, row: Row) -> None:
        row.launches = launches_of(steps[name], device)
        if name in OURS:
            found = traffic_of(steps[name], device, WARM)
            row.calls, row.bytes, row.bytes_in_passes = found.calls, found.bytes, found.bytes_in_passes
            row.parts = found.seconds

    each(make)
    for turn in range(WARM + rounded(turns)):
        each(take)
        if turn == WARM - 1:  # they were warm-up
            for row in rows.values():
                row.seconds, row.rest = [], []
        advance(list(rows.values()))
    if traffic:
        each(count)
    return list(rows.values())
