"""Makes one fma of a product and a sum, where PTX lets the assembler do so.

PTX leaves ``mul.f32`` and ``add.f32`` without ``.rn`` to ptxas. A kernel that must round twice says ``.rn``.
Any other kernel must be right either way.
"""

from __future__ import annotations

from .text import Instruction, Label

FLOATS = ("f32", "f64")


def fuse(code: list[Instruction | Label], mode: int) -> int:
    """Fuse in place; returns how many. Mode 0: none; 1: the first product of a sum; 2: the second one."""
    if not mode:
        return 0
    products: dict[str, tuple[str, str]] = {}  # by result, those of the run of instructions at hand
    found: list[Instruction | Label] = []
    count = 0
    for one in code:
        if isinstance(one, Label):
            products.clear()
            found.append(one)
            continue
        operation, _, kind = one.opcode.partition(".")
        fused = sums(one, products, mode) if operation in ("add", "sub") and kind in FLOATS else None
        found += fused or [one]
        count += fused is not None
        forget(one, products)
        if (
            operation == "mul"
            and kind in FLOATS
            and one.predicate is None
            and one.operands[0] not in one.operands[1:]
        ):
            products[one.operands[0]] = one.operands[1], one.operands[2]
    code[:] = found
    return count


def sums(one: Instruction, products: dict[str, tuple[str, str]], mode: int) -> list[Instruction] | None:
    """The fma in place of a sum or difference, after a change of sign where it needs one."""
    operation, kind = one.opcode.split(".")
    for place in (1, 2) if mode == 1 else (2, 1):
        if one.operands[place] not in products:
            continue
        a, b = products[one.operands[place]]
        other, negative = one.operands[3 - place], f"%negative{one.line}"
        before = []
        if operation == "sub":  # a b - c, or c - a b
            changed = other if place == 1 else a
            before = [Instruction(f"neg.{kind}", [negative, changed], None, False, one.line)]
            other, a = (negative, a) if place == 1 else (other, negative)
        return [*before, one._replace(opcode=f"fma.rn.{kind}", operands=[one.operands[0], a, b, other])]
    return None


def forget(one: Instruction, products: dict[str, tuple[str, str]]) -> None:
    """Products whose result or operands the instruction overwrites."""
    if not one.operands:
        return
    written = {name.strip(" {}") for name in one.operands[0].replace("|", ",").split(",")}
    for result, operands in list(products.items()):
        if written & {result, *operands}:
            del products[result]
