"""What tools for a GPU print, and what it means."""

from __future__ import annotations

import re

from .session import TIMEOUT, Ended, last_line

SECTIONS = (
    "SpeedOfLight", "MemoryWorkloadAnalysis", "MemoryWorkloadAnalysis_Tables", "SchedulerStats",
    "WarpStateStats", "Occupancy", "LaunchStats",
)  # fmt: skip
REFUSED = (
    "Device not supported",
    "ERR_NVGPUCTRPERM",
    "Failed to initialize the profiler",
    "LibraryNotLoaded",
)
#: ncu's metrics that the summary shows, as it calls them.
METRICS = (
    "Duration",
    "DRAM Throughput",
    "Compute (SM) Throughput",
    "Registers Per Thread",
    "Achieved Occupancy",
)


def verdict(status: int, text: str, seconds: float, proof: str) -> tuple[str, float, str]:
    """State, seconds and note of a tool: it passed only if the program under it came to its end."""
    lines = text.splitlines()
    refusals = [line.strip("= ") for line in lines if any(word in line for word in REFUSED)]
    summaries = [line.strip("= ") for line in lines if "SUMMARY" in line]
    if status == TIMEOUT:
        return "cut", seconds, f"not done in {seconds:.0f} s"
    if status == 0 and proof in text:
        return "passed", seconds, (summaries or [""])[-1]
    if refusals:
        return "skipped", seconds, f"refused: {refusals[0][:160]}"
    return "failed", seconds, (summaries or [last_line(text)])[-1]


def without(found: Ended, tool: str) -> tuple[str, float, str]:
    """State, seconds and note where the tool is not there, and the program has run alone."""
    if found.status == TIMEOUT:
        return "cut", found.seconds, f"{tool} is not there, and the calls without it were not done in time"
    if found.status:
        return "failed", found.seconds, last_line(found.text)
    return "skipped", found.seconds, f"{tool} is not there; the calls pass without it"


def profiles(text: str) -> list[tuple[str, dict[str, str]]]:
    """Each kernel that ncu has profiled, with the metrics of ``METRICS`` and their units."""
    found: list[tuple[str, dict[str, str]]] = []
    for line in text.splitlines():
        if head := re.match(r"\s*(\S.*) \(\d+, \d+, \d+\)x\(\d+, \d+, \d+\), Context", line):
            name = re.search(r"\w+_kernel\w*", head[1])
            found.append((name.group() if name else head[1], {}))
            continue
        row = re.match(r"\s+(\S.*?)\s{2,}(?:(\S+)\s+)?([\d.,]+)\s*$", line)
        if row and found and row[1] in METRICS:
            found[-1][1].setdefault(row[1], f"{row[3]} {row[2] or ''}".strip())
    return found
