"""Reads PTX text: a module's kernels, functions and variables, and the statements of a body."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

#: Bytes of a type.
SIZES = {
    "b8": 1, "u8": 1, "s8": 1, "b16": 2, "u16": 2, "s16": 2, "f16": 2, "bf16": 2, "b32": 4, "u32": 4, "s32": 4,
    "f32": 4, "b64": 8, "u64": 8, "s64": 8, "f64": 8, "pred": 1,
}  # fmt: skip
NOISE = re.compile(r"//[^\n]*|^\s*\.(?:loc|file|pragma|section)\b[^\n]*", re.MULTILINE)
TOKEN = re.compile(r"\s*(?:([$\w]+):(?!:)|([{}])|([^\s{}][^;]*);)")
INSTRUCTION = re.compile(r"(?:@(!?)([%$\w]+)\s+)?([a-z][\w.:]*)\s*(.*)", re.DOTALL)
OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^\s,{}\[\]()]+")
VARIABLE = re.compile(
    r"\.(param|shared|local|global|const)\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+"
    r"(?:\.ptr\s+(?:\.\w+\s+)?(?:\.align\s+\d+\s+)?)?([$%\w]+)(\[\d*\])?(?:\s*=\s*\{?([^;}]*))?"
)
OUTSIDE = re.compile(r"^(?:\.(?:extern|visible|weak)\s+)?\.(?:shared|global|const)\b[^;]*;", re.MULTILINE)
ENTRY = re.compile(r"\.entry\s+([$\w]+)\s*\(")
FUNCTION = re.compile(r"^\.func\s*\(([^)]*)\)\s*([$\w]+)\s*\(([^)]*)\)\s*\{", re.MULTILINE)


class Variable(NamedTuple):
    space: str
    name: str
    align: int
    bytes: int | None  # None: the launch says how many
    type: str
    values: tuple[str, ...]


class Body(NamedTuple):
    """A kernel or a function."""

    parameters: list[Variable]
    results: list[Variable]
    text: str
    line: int  # of its first character


class Label(NamedTuple):
    name: str


class Brace(NamedTuple):
    opens: bool


class Declaration(NamedTuple):
    text: str


class Instruction(NamedTuple):
    opcode: str
    operands: list[str]
    predicate: str | None
    negated: bool
    line: int


def variables(text: str) -> list[Variable]:
    """What ``.param``, ``.shared``, ``.local``, ``.global`` and ``.const`` declare."""
    found = []
    for space, align, kind, name, count, values in VARIABLE.findall(text):
        size = None if count == "[]" else SIZES[kind] * int(count[1:-1] if count else 1)
        given = tuple(v.strip() for v in values.split(",") if v.strip())
        found.append(Variable(space, name, int(align or SIZES[kind]), size, kind, given))
    return found


def closing(text: str, start: int) -> int:
    """Where the brace closes that opens before ``start``."""
    depth = 1
    for brace in re.finditer(r"[{}]", text[start:]):
        depth += 1 if brace.group() == "{" else -1
        if depth == 0:
            return start + brace.start()
    raise ValueError("PTX text must close each brace")


class Module:
    """A file of PTX. Kernels are read when they are asked for."""

    def __init__(self, text: str) -> None:
        self.text = NOISE.sub("", text)
        self._entries = {found.group(1): found for found in ENTRY.finditer(self.text)}
        self.variables = variables("\n".join(OUTSIDE.findall(self.text)))  # outside of kernels

    @property
    def kernels(self) -> list[str]:
        return list(self._entries)

    def kernel(self, name: str) -> Body:
        found = self._entries[name]
        close = self.text.index(")", found.end())
        opens = self.text.index("{", close) + 1
        body = self.text[opens : closing(self.text, opens)]
        return Body(variables(self.text[found.end() : close]), [], body, self.text.count("\n", 0, opens) + 1)

    def function(self, name: str) -> Body:
        for found in FUNCTION.finditer(self.text):
            if found.group(2) == name:
                body = self.text[found.end() : closing(self.text, found.end())]
                line = self.text.count("\n", 0, found.end()) + 1
                return Body(variables(found.group(3)), variables(found.group(1)), body, line)
        raise ValueError(f"no code for the function {name}")


def statements(body: Body) -> Iterator[Label | Brace | Declaration | Instruction]:
    """The statements of a body, in order."""
    at, line = 0, body.line
    while found := TOKEN.match(body.text, at):
        start = found.start() + len(found.group()) - len(found.group().lstrip())
        line += body.text.count("\n", at, start)
        label, brace, text = found.groups()
        if label:
            yield Label(label)
        elif brace:
            yield Brace(brace == "{")
        elif text.startswith("."):
            yield Declaration(text)
        else:
            yield instruction(text, line)
        line += body.text.count("\n", start, found.end())
        at = found.end()
    if body.text[at:].strip():
        raise ValueError(f"line {line}: no code for {body.text[at:].strip()[:60]!r}")


def instruction(text: str, line: int) -> Instruction:
    found = INSTRUCTION.fullmatch(text)
    if found is None:
        raise ValueError(f"line {line}: no code for {text!r}")
    negated, predicate, opcode, rest = found.groups()
    return Instruction(opcode, OPERAND.findall(rest), predicate, negated == "!", line)
