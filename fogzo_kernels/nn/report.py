"""Report: what quantize_model did to a model, and what it left alone."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from ..spec.quantizer import Quantizer

#: Between the weights of one module.
WEIGHTS = "; "
NO_MODEL = (
    "quantize_model changes the model in place and returns a report of it, not the model: write"
    " `report = quantize_model(model, ...)`, and go on with model"
)


@dataclass(frozen=True)
class Row:
    """One weight, or one module that was left alone.

    Attributes:
        name: of the module.
        kind: its type before.
        shape: of its weight; of a module left alone, of all its weights, with their names where they
            are several, joined by ``WEIGHTS``.
        numel: elements; 0 where ``tied`` says that another row counts them.
        quantizer: how it is quantized, or None.
        scales: elements of alpha.
        activation: how its input is quantized, or None.
        size: bytes, of codes at ``bits`` each and scales, or of the parameters as they are.
        reason: why it was left alone.
        tied: the module whose weight this is, too.
    """

    name: str
    kind: str
    shape: str
    numel: int
    size: float
    quantizer: Quantizer | None = None
    scales: int = 0
    activation: Quantizer | None = None
    reason: str = ""
    tied: str = ""

    @property
    def bits(self) -> float:
        """Bits of a weight: log2 of the grid's levels, or of the dtype."""
        if self.quantizer is not None:
            return self.quantizer.grid.bits
        return 8 * self.size / self.numel if self.numel else 0.0


@dataclass(frozen=True)
class Report:
    """What is quantized in a model and how, and what is not and why; ``print`` shows it.

    Attributes:
        quantized: a row for each weight that is quantized, those of earlier calls as well.
        left: a row for each other module that holds weights.
        vectors: tensors of one dimension in the whole model: biases, norms. They are never quantized.
        vector_numel, vector_size: their elements and bytes.
    """

    quantized: Sequence[Row]
    left: Sequence[Row]
    vectors: int
    vector_numel: int
    vector_size: int = field(repr=False)

    @property
    def total(self) -> int:
        """Parameters of the model, each once."""
        return self.quantized_numel + sum(row.numel for row in self.left) + self.vector_numel

    @property
    def quantized_numel(self) -> int:
        """Parameters that are quantized."""
        return sum(row.numel for row in self.quantized)

    @property
    def share(self) -> float:
        """The part of all parameters that is quantized, 0..1."""
        return self.quantized_numel / self.total

    @property
    def size(self) -> float:
        """Bytes of the whole: codes and scales of what is quantized, the rest in its own dtypes."""
        return sum(row.size for row in (*self.quantized, *self.left)) + self.vector_size

    @property
    def bits(self) -> float:
        """Average bits of a parameter, scales included."""
        return 8 * self.size / self.total

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Say what ``model = quantize_model(model, ...)`` does, to whom then calls the model."""
        raise TypeError(NO_MODEL)

    def __getattr__(self, name: str) -> NoReturn:
        """The same to whom asks for ``parameters`` or another attribute of a model."""
        raise AttributeError(f"Report has no attribute {name!r}: {NO_MODEL}")

    def __str__(self) -> str:
        letters: dict[Quantizer, str] = {}
        for row in self.quantized:
            for q in (row.quantizer, row.activation):
                if q is not None:
                    letters.setdefault(q, _letter(len(letters)))
        head = ["module", "type", "weight", "bits", "scales", "by"]
        lines = table([head, *grouped(self.quantized, lambda row: _of_quantized(row, letters))])
        lines += ["", *(f"{letter}: {_described(q)}" for q, letter in letters.items())]
        if self.left:
            lines += ["", *table(_left_table(self.left))]
        counts = [(self.quantized_numel, "quantized")]
        if self.left:
            counts.append((sum(row.numel for row in self.left), "left alone"))
        if self.vectors:
            counts.append((self.vector_numel, f"in {self.vectors} biases and norms"))
        parts = ", ".join(f"{numel:,} ({percent(numel, self.total)}) {what}" for numel, what in counts)
        lines += [
            "",
            f"{self.total:,} parameters: {parts}",
            f"{of_memory(self.size)} in all, {self.bits:.2f} bits for each parameter, scales included",
        ]
        return "\n".join(lines)


def _letter(i: int) -> str:
    """A to Z, then A1 and so on."""
    return chr(ord("A") + i % 26) + (str(i // 26) if i >= 26 else "")


def _of_quantized(row: Row, letters: Mapping[Quantizer, str]) -> list[str]:
    assert row.quantizer is not None
    by = letters[row.quantizer] + (f", tied to {row.tied}" if row.tied else "")
    if row.activation is not None:
        by += f", inputs {letters[row.activation]}"
    return [row.name or "(the model)", row.kind, row.shape, f"{row.bits:.3g}", str(row.scales), by]


def _left_table(rows: Sequence[Row]) -> list[list[str]]:
    """A line for each weight, the first of a module with the module."""
    lines = [["left alone", "type", "weights", "why"]]
    for name, kind, weights, reason in grouped(rows, _of_left):
        first, *others = weights.split(WEIGHTS)
        lines += [[name, kind, first, reason], *(["", "", other, ""] for other in others)]
    return lines


def _of_left(row: Row) -> list[str]:
    return [row.name or "(the model)", row.kind, row.shape, row.reason.removeprefix(f"{row.kind} ")]


def _described(q: Quantizer) -> str:
    g, s = q.grid, q.straight_through
    low, high = (g.r * (code + g.offset) for code in (g.qmin, g.qmax))
    clip = f", clip={s.clip!r}" if s.kind == "identity" and s.clip is not True else ""
    noise = f", {s.noise} noise" if s.noise else ""
    blocks = f", {q.transform}" if q.transform else ""
    return f"{g.levels} levels {low:g}..{high:g} times alpha, {q.scale}, {s.kind}{clip}{noise}{blocks}"


# ---- text

#: Names that differ only in their numbers: the numbers at each place, of which all combinations are there.
Block = tuple[tuple[str, ...], ...]


def percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "0 %"


def of_memory(size: float) -> str:
    if size >= 1e9:
        return f"{size / 1e9:.2f} GB"
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.1f} kB"


def grouped(rows: Sequence[Row], cells: Callable[[Row], list[str]]) -> list[list[str]]:
    """Rows that differ only in the numbers of their names as few, each with the numbers that it stands for."""
    found: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        name = re.sub(r"\d+", "#", row.name)
        key = (name, row.tied, row.kind, row.shape, row.quantizer, row.activation, row.scales, row.reason)
        found.setdefault(key, []).append(row)
    return [
        [name, *cells(alike[0])[1:]]
        for alike in found.values()
        for name in merged([cells(row)[0] for row in alike])
    ]


def merged(names: list[str]) -> list[str]:
    """``layers.{0..3}.q (4)`` for ``layers.0.q`` to ``layers.3.q``, and none that is not there."""
    texts = re.split(r"\d+", names[0])
    blocks: list[Block] = [tuple((x,) for x in re.findall(r"\d+", name)) for name in names]
    for i in reversed(range(len(texts) - 1)):  # join the blocks that differ only in their i-th numbers
        joined: dict[Block, tuple[str, ...]] = {}
        for block in blocks:
            others = block[:i] + block[i + 1 :]
            joined[others] = joined.get(others, ()) + block[i]
        blocks = [(*others[:i], numbers, *others[i:]) for others, numbers in joined.items()]
    return [_spelled(texts, block) for block in blocks]


def _spelled(texts: list[str], block: Block) -> str:
    out = texts[0] + "".join(_numbers(n) + text for n, text in zip(block, texts[1:], strict=True))
    count = math.prod(len(numbers) for numbers in block)
    return f"{out} ({count})" if count > 1 else out


def _numbers(numbers: tuple[str, ...]) -> str:
    if len(numbers) == 1:
        return numbers[0]
    first, last = int(numbers[0]), int(numbers[-1])
    whole = list(numbers) == [str(x) for x in range(first, last + 1)]
    return f"{{{first}..{last}}}" if whole else f"{{{','.join(numbers)}}}"


def table(rows: list[list[str]]) -> list[str]:
    """Lines with the columns aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(x.ljust(w) for x, w in zip(row, widths, strict=True)).rstrip() for row in rows]
