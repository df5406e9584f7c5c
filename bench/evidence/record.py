"""What a training run leaves in its folder: a checkpoint that no kill can spoil, and a log beside it."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

CHECKPOINT, LOG, EVENTS = "checkpoint.pt", "log.csv", "tensorboard"


def save(folder: Path, state: Mapping[str, Any]) -> None:
    """Write the checkpoint under another name, then rename it: there is the old one or the new one, whole."""
    temporary = folder / f"{CHECKPOINT}.{os.getpid()}"
    with temporary.open("wb") as file:
        torch.save(dict(state), file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(folder / CHECKPOINT)


def load(folder: Path, device: torch.device) -> dict[str, Any] | None:
    """The last checkpoint, or None; what a kill left of others is removed."""
    for part in folder.glob(f"{CHECKPOINT}.*"):
        part.unlink(missing_ok=True)
    path = folder / CHECKPOINT
    if not path.exists():
        return None
    found: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    return found


class Log:
    """One row a line in log.csv, and the same numbers for TensorBoard where that is installed.

    Args:
        folder: of the run.
        columns: of the rows; the first is ``step``.
        after: the step of the checkpoint that the run goes on from; later rows, of a run that was killed, are
            dropped.
    """

    def __init__(self, folder: Path, columns: list[str], after: int) -> None:
        self.path, self.columns = folder / LOG, columns
        rows = self._kept(after)
        temporary = self.path.with_suffix(".tmp")
        with temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)
        temporary.replace(self.path)
        self.events = events(folder / EVENTS, after)

    def _kept(self, after: int) -> list[dict[str, str]]:
        if not after or not self.path.exists():
            return []
        with self.path.open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if None not in row.values()]  # the last may be cut
        return [row for row in rows if int(row["step"]) <= after]

    def write(self, row: Mapping[str, float]) -> None:
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self.columns).writerow(row)
        for name, value in row.items() if self.events is not None else ():
            if name != "step":
                self.events.add_scalar(name, value, row["step"])

    def close(self) -> None:
        if self.events is not None:
            self.events.close()


def events(folder: Path, after: int) -> Any:
    """TensorBoard's writer, or None where it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=after + 1)
