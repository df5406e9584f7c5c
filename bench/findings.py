"""What the kernel benchmark has found so far, in a file that the next run can go on with."""

from __future__ import annotations

import json
import os
from collections.abc import Collection
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

from . import cases as c

OURS = "fogzo"
Row = dict[str, Any]


class Unit(NamedTuple):
    """One thing to time."""

    case: c.Case
    kind: str  # OURS, or a baseline's


def named(unit: Unit, backend: str, reason: str) -> Row:
    """A unit that has no time, and why."""
    return {"kind": unit.kind, "backend": backend, **asdict(unit.case), "reason": reason}


def case_of(row: Row) -> c.Case:
    return c.Case(**{one.name: row[one.name] for one in fields(c.Case)})


@dataclass
class Findings:
    """A row for each backend and case: its times, or why it was left out, or how it failed."""

    rows: dict[tuple[str, c.Case], Row] = field(default_factory=dict)
    left_out: list[Row] = field(default_factory=list)
    failed: list[Row] = field(default_factory=list)
    kept: int = 0  # how many were left out by earlier runs
    begun: Row | None = None  # the unit that is being measured
    machine: dict[str, Any] = field(default_factory=dict)

    def has(self, unit: Unit, backend: str) -> bool:
        """Whether it was measured, or tried."""
        row = self.rows.get((backend, unit.case))
        if row is not None and (unit.kind == OURS or f"ratio_{unit.kind}" in row):
            return True
        return any(is_of(one, unit, backend) for one in self.failed)

    def save(self, path: Path, arguments: dict[str, Any]) -> None:
        """The file is whole at any time."""
        text = {"machine": self.machine, "arguments": arguments, "rows": list(self.rows.values()),
                "left_out": self.left_out, "failed": self.failed, "begun": self.begun}  # fmt: skip
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.part")
        part.write_text(json.dumps(text, indent=1))
        os.replace(part, path)


def is_of(one: Row, unit: Unit, backend: str) -> bool:
    return (one["kind"], one["backend"], case_of(one)) == (unit.kind, backend, unit.case)


def resumed(path: Path, again: Collection[Unit], backend: str) -> Findings:
    """What a file holds. The unit that an earlier process ended with has failed.

    Args:
        again: what this run says something of, if an earlier one has left it out.
    """
    if not path.exists():
        return Findings()
    text = json.loads(path.read_text())
    found = Findings({(row["backend"], case_of(row)): row for row in text["rows"]}, failed=text["failed"])
    found.left_out = [
        one
        for one in text["left_out"]
        if one["backend"] != backend or Unit(case_of(one), one["kind"]) not in again
    ]
    found.kept = len(found.left_out)
    if text["begun"]:
        found.failed.append({**text["begun"], "reason": "the process ended while it was measured"})
    return found
