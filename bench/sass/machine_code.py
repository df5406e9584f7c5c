"""Machine code of a cubin: its instructions before and in the loop over tiles, and its resources."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import triton

from cuda_units import ROOT, once, run

CHUNK = 8  # elements that a thread reads or writes at once
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


class Report(NamedTuple):
    registers: int
    spill_bytes: int
    shared_bytes: int
    prologue: Counter[str]
    loop: Counter[str]  # empty without a tile loop
    barriers: int

    def weighted(self, tiles: int) -> Counter[str]:
        return self.prologue + Counter({op: tiles * n for op, n in self.loop.items()})

    def width(self, opcode: str) -> int | None:
        """Bits of the widest load, or of the narrowest store, in the loop."""
        widths = [bits_of(op) for op in self.loop if op.startswith(opcode)]
        if not widths:
            return None
        return max(widths) if opcode == "LDG" else min(widths)


def bits_of(opcode: str) -> int:
    found = re.search(r"\.(128|64|U16|S16|U8|S8)\b", opcode)
    return int(found.group(1).lstrip("US")) if found else 32


def read_cubin(cubin: bytes, directions: int = 1) -> Report:
    text, usage = dumps(cubin)
    found = usages(usage)
    if len(found) != 1:
        raise RuntimeError(f"cuobjdump must report the resources of one kernel, reported {usage}")
    return report_of(text, tuple(map(int, found[0][1:])), directions)


def dumps(cubin: bytes) -> tuple[str, str]:
    """Machine code and resources of a file's kernels, as cuobjdump writes them; kept, as it takes long."""

    def make(path: Path) -> None:
        file = path.with_suffix(".cubin")
        file.write_bytes(cubin)
        path.write_text(json.dumps([run(str(CUOBJDUMP), flag, str(file)) for flag in ("-sass", "-res-usage")]))
        file.unlink()

    name = hashlib.sha256(cubin).hexdigest()[:16]
    code, usage = json.loads(once(ROOT / f"build/sass/{name}.json", make).read_text())
    return code, usage


def usages(text: str) -> list[tuple[str, ...]]:
    """Name, registers, stack, shared and local bytes of each kernel."""
    return re.findall(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", text)


def report_of(text: str, usage: tuple[int, ...], directions: int, stages: int = 1) -> Report:
    registers, stack, shared, local = usage
    prologue, loop, code = split(text, directions, stages)
    barriers = sum(op.startswith("BAR") for _, op, _ in code)
    return Report(registers, stack + local, shared, prologue, loop, barriers)


def split(
    text: str, directions: int, stages: int = 1
) -> tuple[Counter[str], Counter[str], list[tuple[int, str, str]]]:
    """Opcodes before the tile loop and in it, and all code as (address, opcode, operands).

    A loop inside it takes ``stages`` turns where it shuffles and has no loop inside, as that over the
    stages of a transform, and else ``directions``. Where loops inside load 128 bits, those that load less
    often at a time are for what these leave: they take no turn. Of loops beside each other one that takes
    elements one by one is for memory that is not aligned, and not the tile loop.
    """
    pattern = r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);"
    code = [(int(a, 16), op, rest) for a, op, rest in re.findall(pattern, text, re.MULTILINE) if op != "NOP"]
    jumps = [
        (address, op, int(target.group(1), 16))
        for address, op, rest in code
        if op.startswith("BRA") and (target := re.search(r"0x([0-9a-f]+)", rest))
    ]
    # last comes what a warp runs only where its threads went different ways; its jumps back are no loops
    apart = min((target for _, op, target in jumps if op.startswith("BRA.DIV")), default=math.inf)
    loops = [(target, address) for address, _, target in jumps if target < address < apart]
    # the outermost loop that streams: it stores wide, or else, as a reduction does, loads wide
    inside = next(
        (
            found
            for access in ("STG.E.128", "LDG.E.128", "STG.E.64", "LDG.E.64")
            if (found := containing(loops, [a for a, op, _ in code if op.startswith(access)]))
        ),
        [],
    )
    if not inside:
        return Counter(op for _, op, _ in code), Counter(), code
    wide = [one for one in inside if not by_elements(code, one)]
    streaming = [one for one in inside if any(one[0] <= a and b <= one[1] for a, b in wide)] or inside
    start, end = max(streaming, key=lambda x: x[1] - x[0])
    shuffles = [a for a, op, _ in code if op.startswith("SHFL")]
    inner = [(first, last) for first, last in loops if start < first and last < end]
    transforms = [
        (first, last)
        for first, last in containing(inner, shuffles)
        if not any(first < a and b < last for a, b in inner)
    ]
    leftover = leftovers(inner, [(a, op) for a, op, _ in code if op.startswith("LDG")])
    loop = Counter[str]()
    for address, op, _ in code:
        if start <= address <= end:
            around = [one for one in inner if one[0] <= address <= one[1]]
            if any(one in leftover for one in around):
                continue
            turns = stages if any(one in transforms for one in around) else directions
            loop[op] += turns if around else 1
    others = [one for one in inside if one[1] < start]  # of branches that a program takes instead
    before = [(a, op) for a, op, _ in code if a < start]
    return Counter(op for a, op in before if not any(o[0] <= a <= o[1] for o in others)), loop, code


def by_elements(code: list[tuple[int, str, str]], loop: tuple[int, int]) -> bool:
    """Whether it takes a chunk's elements one by one where memory is not aligned."""
    ops = [op for address, op, _ in code if loop[0] <= address <= loop[1]]
    return any(sum(op.startswith(one) and bits_of(op) < 64 for op in ops) >= CHUNK for one in ("LDG", "STG"))


def leftovers(loops: list[tuple[int, int]], loads: list[tuple[int, str]]) -> list[tuple[int, int]]:
    """Of loops that load, those with fewer loads of 128 bits than another one."""
    counts = {
        one: sum(one[0] <= a <= one[1] for a, op in loads if bits_of(op) == 128)
        for one in containing(loops, [a for a, _ in loads])
    }
    most = max(counts.values(), default=0)
    return [one for one, count in counts.items() if count < most]


def containing(loops: list[tuple[int, int]], addresses: list[int]) -> list[tuple[int, int]]:
    return [(start, end) for start, end in loops if any(start <= a <= end for a in addresses)]
