"""Report: what quantize_model did to a model, and what it left alone."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NoReturn

from torch import Tensor

from ..spec.quantizer import Quantizer
from .registry import kind_of
from .rules import Choice

#: Between the weights of a module.
WEIGHTS = "; "
NO_MODEL = (
    "quantize_model changes the model in place and returns a report of it, not the model: write"
    " `report = quantize_model(model, ...)`, and go on with model"
)


@dataclass(frozen=True)
class Row:
    """A quantized weight, or a module that was left alone; :class:`Report` describes the attributes."""

    name: str  # of the module, or of the parameter where a module may have several
    kind: str
    shape: str  # of a module left alone the shapes of all its weights, with their names, joined by WEIGHTS
    numel: int  # 0 where ``tied`` says that another row counts them
    size: float  # of codes and scales, or of the parameters as they are
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
    """What :func:`quantize_model` did to each weight of a model, and why it left others alone; print it.

    Rows have the attributes ``name``, ``kind`` (the class of the module before), ``shape``, ``numel``, ``size``
    (bytes), ``bits`` (per weight), ``quantizer``, ``scales`` (number of alphas), ``activation``, ``reason``
    (why the module, or its input, was left alone) and ``tied`` (another module with the same weight).

    Attributes:
        quantized: a row for each quantized weight, also of earlier calls.
        left: a row for each other module that holds weights.
        vectors: number of tensors with one dimension, such as biases and norms. They are never quantized.
        vector_numel: number of their elements.
        vector_size: number of their bytes.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 16), torch.nn.Linear(16, 10))
        >>> report = fk.quantize_model(model, fk.presets.lsq(2), rules=[("1", None)])
        >>> report.quantized[0].name, report.left[0].reason, f"{report.share:.2f}, {report.bits:.1f} bits"
        ('0', "rules[0], '1'", '0.85, 6.6 bits')
    """

    # ops.checks.instance adds it where a report is taken for a model
    MISTAKEN: ClassVar[str] = NO_MODEL

    quantized: Sequence[Row]
    left: Sequence[Row]
    vectors: int
    vector_numel: int
    vector_size: int = field(repr=False)

    @property
    def total(self) -> int:
        """Number of parameters of the model, each counted once."""
        return self.quantized_numel + sum(row.numel for row in self.left) + self.vector_numel

    @property
    def quantized_numel(self) -> int:
        """Number of parameters that are quantized."""
        return sum(row.numel for row in self.quantized)

    @property
    def share(self) -> float:
        """Share of the parameters that is quantized, 0..1."""
        return self.quantized_numel / self.total

    @property
    def size(self) -> float:
        """Bytes of the model if codes and scales are stored packed, and all else in its own dtype."""
        return sum(row.size for row in (*self.quantized, *self.left)) + self.vector_size

    @property
    def bits(self) -> float:
        """Average number of bits per parameter, scales included."""
        return 8 * self.size / self.total

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raise: a caller of ``model = quantize_model(model, ...)`` takes the report for the model."""
        raise TypeError(NO_MODEL)

    def __getattr__(self, name: str) -> NoReturn:
        """Raise, for ``parameters`` and other attributes of a model."""
        raise AttributeError(f"Report has no attribute {name!r}: {NO_MODEL}")

    def __str__(self) -> str:
        letters: dict[Quantizer, str] = {}
        for row in self.quantized:
            for q in filter(None, (row.quantizer, row.activation)):
                i = len(letters)  # A to Z, then A1 and so on
                letters.setdefault(q, chr(ord("A") + i % 26) + (str(i // 26) if i >= 26 else ""))
        cells = [["module", "type", "weight", "bits", "scales", "by"]]
        for name, row in grouped(self.quantized):
            assert row.quantizer is not None
            by = letters[row.quantizer] + (f", tied to {row.tied}" if row.tied else "")
            by += f", inputs {letters[row.activation]}" if row.activation else ""
            by += f", inputs stay: {row.reason}" if row.reason else ""
            cells.append([name, row.kind, row.shape, f"{row.bits:.3g}", str(row.scales), by])
        lines = [*table(cells), "", *(f"{letter}: {described(q)}" for q, letter in letters.items())]
        counts = [(self.quantized_numel, "quantized")]
        if self.left:
            cells = [["left alone", "type", "weights", "why"]]
            for name, row in grouped(self.left):
                first, *others = row.shape.split(WEIGHTS)
                cells.append([name, row.kind, first, row.reason.removeprefix(f"{row.kind} ")])
                cells += [["", "", other, ""] for other in others]
            lines += ["", *table(cells)]
            counts.append((sum(row.numel for row in self.left), "left alone"))
        if self.vectors:
            counts.append((self.vector_numel, f"in {self.vectors} biases and norms"))
        parts = (f"{numel:,} ({100 * numel / self.total:.1f} %) {what}" for numel, what in counts)
        unit, name = next(((x, n) for x, n in ((1e9, "GB"), (1e6, "MB")) if self.size >= x), (1e3, "kB"))
        size = f"{self.size / unit:.{2 if name == 'GB' else 1}f} {name}"
        lines += [
            "",
            f"{self.total:,} parameters: {', '.join(parts)}",
            f"{size} in all, {self.bits:.2f} bits for each parameter, scales included",
        ]
        return "\n".join(lines)


def report_of(choices: Sequence[Choice]) -> Report:
    """Describes a model that was quantized as chosen."""
    quantized, left = [], []
    vectors: dict[Tensor, None] = {}
    seen: dict[Tensor, str] = {}
    for c in choices:
        name, module, held = c.unit.name, c.unit.module, c.unit.quantized
        own = c.unit.matrices
        vectors |= {p: None for p in c.unit.weights.values() if p.ndim <= 1}
        new = [p for p in own.values() if p not in seen]
        numel = sum(p.numel() for p in new)
        shapes = WEIGHTS.join(f"{name} {tuple(p.shape)}" for name, p in own.items())
        if list(own) == ["weight"] or c.unit.dims is not None:
            shapes = shapes.partition(" ")[2]
        if held is not None:
            if held.expert_count is not None:
                shapes = f"{held.expert_count} x {tuple(held.latent.shape[1:])}"
            tied, q, scales = seen.get(held.latent, ""), held.quantizer, held.alpha.numel()
            size = 0.0 if tied else numel * q.grid.bits / 8 + 4 * scales
            kind, inputs = kind_of(module), held.activation
            quantized.append(Row(name, kind, shapes, numel, size, q, scales, inputs, c.inputs or "", tied))
        elif own:
            size, kind = float(sum(p.nbytes for p in new)), kind_of(module)
            left.append(Row(name, kind, shapes, numel, size, reason=c.reason or ""))
        seen |= dict.fromkeys(own.values(), name)
    numel, total = sum(p.numel() for p in vectors), sum(p.nbytes for p in vectors)
    return Report(quantized, left, len(vectors), numel, total)


def described(q: Quantizer) -> str:
    g, s = q.grid, q.straight_through
    low, high = (g.r * (code + g.offset) for code in (g.qmin, g.qmax))
    clip = f", clip={s.clip!r}" if s.kind == "identity" and s.clip is not True else ""
    noise = f", {s.noise} noise" if s.noise else ""
    blocks = f", {q.transform}" if q.transform else ""
    return f"{g.levels} levels {low:g}..{high:g} times alpha, {q.scale}, {s.kind}{clip}{noise}{blocks}"


#: Names that differ only in their numbers: the numbers at each place; all combinations are there.
Block = tuple[tuple[str, ...], ...]


def grouped(rows: Sequence[Row]) -> Iterator[tuple[str, Row]]:
    """Yields a name and a row for all rows that differ only in the numbers of their names."""
    groups: dict[Row, list[Row]] = {}
    for row in rows:
        key = replace(row, name=re.sub(r"\d+", "#", row.name), numel=0, size=0)
        groups.setdefault(key, []).append(row)
    for alike in groups.values():
        for name in merged([row.name or "(the model)" for row in alike]):
            yield name, alike[0]


def merged(names: list[str]) -> list[str]:
    """Returns ``layers.{0..3}.q (4)`` for ``layers.0.q`` to ``layers.3.q``."""
    texts = re.split(r"\d+", names[0])
    blocks: list[Block] = [tuple((x,) for x in re.findall(r"\d+", name)) for name in names]
    for i in reversed(range(len(texts) - 1)):  # join the blocks that differ only in their i-th numbers
        joined: dict[Block, tuple[str, ...]] = {}
        for block in blocks:
            others = block[:i] + block[i + 1 :]
            joined[others] = joined.get(others, ()) + block[i]
        blocks = [(*others[:i], numbers, *others[i:]) for others, numbers in joined.items()]
    spelled = []
    for block in blocks:
        out = texts[0] + "".join(_spelled(n) + text for n, text in zip(block, texts[1:], strict=True))
        count = math.prod(map(len, block))
        spelled.append(f"{out} ({count})" if count > 1 else out)
    return spelled


def _spelled(numbers: tuple[str, ...]) -> str:
    first, last = numbers[0], numbers[-1]
    if len(numbers) == 1:
        return first
    whole = list(numbers) == [str(x) for x in range(int(first), int(last) + 1)]
    return f"{{{first}..{last}}}" if whole else f"{{{','.join(numbers)}}}"


def table(rows: list[list[str]]) -> list[str]:
    """Aligns columns; returns lines."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(x.ljust(w) for x, w in zip(row, widths, strict=True)).rstrip() for row in rows]
