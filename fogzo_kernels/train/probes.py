"""Probes: both probes of a direction, written at once, and what modules run them with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..functional import perturb_quantize_
from ..nn.view import Modules, WeightView, each
from .calls import WeightGroup
from .memory import ProbeMemory
from .replay import capturing


class Probes:
    """Both probes of a direction. The second has memory only until it was run: no activations are kept now."""

    def __init__(self) -> None:
        self._sides: dict[int, list[tuple[Modules, Sequence[Tensor]]]] = {1: [], -1: []}
        self._second: list[ProbeMemory] = []

    def leave(self, weights: Sequence[WeightView]) -> None:
        """Let weights run with Q(w), which their memory has."""
        own = Modules(weights), [w.memory() for w in weights]
        for side in self._sides.values():
            side.append(own)

    def write(
        self, group: WeightGroup, codes: bool, norm: Tensor, direction: int, options: dict[str, Any]
    ) -> None:
        """Write both probes of a group, as codes or values. The op takes ``options``."""
        out = each(group.weights, WeightView.code_memory) if codes else group.memory
        other: Sequence[Tensor]
        of_stacks: dict[WeightView, Tensor] = {}
        if group.modules is None:
            other, of_stacks = group.second_memory(out)
        elif group.second is None or codes or capturing():
            other = [*map(torch.empty_like, out)]
        else:
            other = group.second.take()
            self._second.append(group.second)
        still = [*map(torch.clone, out)] if group.by_rows else []  # Q, also after other directions
        rows = group.latents, group.grads, group.alphas
        perturb_quantize_(out, other, *rows, norm, direction=direction, **options)
        for q, reached, *both in zip(still, group.reached, out, other, strict=True) if still else ():
            for side in both:
                side.copy_(torch.where(reached, side, q))
        modules = group.modules
        if modules is None:
            modules, other = Modules(of_stacks), [*of_stacks.values()]
            out = [w.code_memory() if codes else w.memory() for w in of_stacks]
        self._sides[1].append((modules, out))
        self._sides[-1].append((modules, other))

    def use(self, sign: int) -> None:
        """Let modules run with the probe of this sign."""
        for modules, rows in self._sides[sign]:
            modules.use_probe(rows)
        for memory in self._second:
            memory.begin()

    def free(self) -> None:
        """Free the memory of the second probe."""
        self._sides.clear()
        for memory in self._second:
            memory.free()
