"""Report: what quantize_model did to a model, and what it left alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ..spec.quantizer import Quantizer


@dataclass(frozen=True)
class Row:
    """One weight, or one module that was left alone.

    Attributes:
        name: of the module.
        kind: its type before.
        shape: of its weight; of a module left alone, the shapes of all its parameters.
        numel: elements; 0 where ``tied`` says that another row counts them.
        quantizer: how it is quantized, or None.
        scales: elements of alpha.
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

    def __str__(self) -> str:
        head = ["module", "type", "weight", "bits", "scales", "quantizer"]
        lines = table([head, *grouped(self.quantized, _of_quantized)])
        if self.left:
            lines += ["", *table([["left alone", "type", "weights", "why"], *grouped(self.left, _of_left)])]
        if self.vectors:
            share = percent(self.vector_numel, self.total)
            lines += ["", f"{self.vectors} biases and norms with {self.vector_numel:,} elements ({share}) stay"]
        left = self.total - self.quantized_numel - self.vector_numel
        done, rest = (percent(x, self.total) for x in (self.quantized_numel, left))
        lines += [
            "",
            f"{self.quantized_numel:,} of {self.total:,} parameters are quantized ({done}), {left:,} were left"
            f" alone ({rest}); {self.bits:.2f} bits each on average, {of_memory(self.size)} in all",
        ]
        return "\n".join(lines)


def _of_quantized(row: Row) -> list[str]:
    assert row.quantizer is not None
    q = row.quantizer
    how = f"tied to {row.tied}" if row.tied else f"{_grid(q)}, {q.scale}, {_straight_through(q)}"
    return [row.name, row.kind, row.shape, f"{row.bits:.3g}", str(row.scales), how]


def _of_left(row: Row) -> list[str]:
    return [row.name or "(the model)", row.kind, row.shape, row.reason]


def _grid(q: Quantizer) -> str:
    g = q.grid
    low, high = (g.r * (code + g.offset) for code in (g.qmin, g.qmax))
    return f"{g.levels} levels {low:g}..{high:g}"


def _straight_through(q: Quantizer) -> str:
    s = q.straight_through
    unclipped = ", clip=False" if s.kind == "identity" and s.clip is False else ""
    return f"{s.kind}{unclipped}{f', {s.noise} noise' if s.noise else ''}"


# ---- text


def percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "0 %"


def of_memory(size: float) -> str:
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.1f} kB"


def grouped(rows: Sequence[Row], cells: Callable[[Row], list[str]]) -> list[list[str]]:
    """Rows that differ only in the numbers of their names as one, with the numbers' range."""
    found: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        name, tied = (re.sub(r"\d+", "#", x) for x in (row.name, row.tied))
        key = (name, tied, row.kind, row.shape, row.quantizer, row.scales, row.reason)
        found.setdefault(key, []).append(row)
    return [[merged([row.name for row in alike]), *cells(alike[0])[1:]] for alike in found.values()]


def merged(names: list[str]) -> str:
    """``layers.{0..3}.q`` for ``layers.0.q`` to ``layers.3.q``."""
    if len(names) == 1:
        return names[0]
    numbers = [re.findall(r"\d+", name) for name in names]
    texts = re.split(r"\d+", names[0])
    out = texts[0]
    for text, column in zip(texts[1:], zip(*numbers, strict=True), strict=True):
        values = sorted({int(x) for x in column})
        whole = values == list(range(values[0], values[-1] + 1))
        shown = f"{values[0]}..{values[-1]}" if whole else ",".join(map(str, values))
        out += (f"{{{shown}}}" if len(values) > 1 else str(values[0])) + text
    return f"{out} ({len(names)})"


def table(rows: list[list[str]]) -> list[str]:
    """Lines with the columns aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(x.ljust(w) for x, w in zip(row, widths, strict=True)).rstrip() for row in rows]
