"""Where a call runs, and how far its results may be from the reference's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rule:
    """How far results may be from the reference's; NaN equals NaN. By default they are equal."""

    relative: float = 0.0  # of the value
    of_largest: float = 0.0  # of the largest value of the list
    absolute: float | Sequence[Tensor] = 0.0
    share: float = 0.0  # of elements that may be further away: codes at a tie of rounding


EQUAL = Rule()
Results = dict[str, tuple[Sequence[Tensor], Rule]]  # by the operand's name


def difference(found: Sequence[Tensor], expected: Sequence[Tensor], rule: Rule) -> str | None:
    """The first element that is further away than the rule allows, and how many are; None if none is."""
    pairs = [
        (a.detach().cpu().double(), b.detach().cpu().double()) for a, b in zip(found, expected, strict=True)
    ]
    largest = max((b[b.isfinite()].abs().max().item() for _, b in pairs if b.isfinite().any()), default=0.0)
    wrong, first = 0, ""
    for i, (a, b) in enumerate(pairs):
        absolute = rule.absolute if isinstance(rule.absolute, float) else rule.absolute[i].cpu().double()
        allowed = rule.relative * b.abs() + rule.of_largest * largest + absolute
        bad = ~((a == b) | (a.isnan() & b.isnan()) | ((a - b).abs() <= allowed))
        if bad.any() and not first:
            at = int(bad.flatten().nonzero()[0])
            first = f"[{i}] element {at}: {a.flatten()[at]:.9g}, the reference {b.flatten()[at]:.9g}"
        wrong += int(bad.sum())
    total = sum(a.numel() for a, _ in pairs)
    if wrong <= rule.share * total + (rule.share > 0):
        return None
    return f"{first}; {wrong} of {total} differ"


def differences(found: Results, expected: Results) -> list[str]:
    """Of the results of one call, each named."""
    return [
        f"{name}{text}"
        for name, (tensors, rule) in expected.items()
        if (text := difference(found[name][0], tensors, rule)) is not None
    ]


@dataclass
class Place:
    """Where calls run. Their data comes from the CPU, the same for every place."""

    device: torch.device
    backend: str
    generator: torch.Generator = field(default_factory=torch.Generator)

    def random(self, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
        """Normal, in an allocation of its own."""
        return (torch.randn(shape, generator=self.generator) * scale).to(self.device, dtype)

    def full(self, shape: Sequence[int], value: float, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.full(tuple(shape), value, dtype=dtype, device=self.device)


REFERENCE = Place(torch.device("cpu"), "reference")
