"""What the CUDA sources compile to: an object a file, and one for each distribution of some.

For setup.py, for the tests, which compile them for the CPU, and for the count of instructions.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

CSRC = Path(__file__).parent / "csrc"
#: Sources that are compiled once for each distribution; their units' names begin so.
PER_DISTRIBUTION = {"perturb_kernels": "perturb", "rotated_kernels": "rotated"}


class Unit(NamedTuple):
    """One compilation: the object's name, its source, and the macros that it defines."""

    name: str
    source: Path
    defines: tuple[str, ...]


def distributions() -> list[str]:
    """Those that csrc/names.h lists."""
    text = (CSRC / "names.h").read_text().replace("\\\n", " ")
    (line,) = re.findall(r"^#define FOGZO_DISTRIBUTIONS\(X\)(.*)$", text, re.MULTILINE)
    found: list[str] = re.findall(r"X\((\w+)", line)
    if not found:
        raise ValueError(f"names.h must list the distributions as X(name, ...), got {line!r}")
    return found


def units() -> list[Unit]:
    """Every compilation, in a fixed order."""
    found = []
    for source in sorted((CSRC / "cuda").glob("*.cu")):
        if prefix := PER_DISTRIBUTION.get(source.stem):
            found += [Unit(f"{prefix}_{d}", source, (f"-DFOGZO_DISTRIBUTION={d}",)) for d in distributions()]
        else:
            found.append(Unit(source.stem, source, ()))
    return found
