"""The quantized weights of a step by the calls of ops that they go into, and what those take and write."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from ..distributed.fsdp import measure_sharded_
from ..distributed.group import sum_of_parts
from ..functional import learned_backward_, quantize_, straight_through_backward_
from ..nn.view import WeightView
from ..nn.weight import hold_alphas, measure_
from ..spec.grid import Grid
from ..spec.hadamard import Hadamard
from ..spec.scale import MeasuredScale
from ..spec.straight_through import StraightThrough

T = TypeVar("T")


class Kind(NamedTuple):
    """What the weights of one call have in common.

    Not their scales: alphas are an argument of the call, each weight its own.
    """

    grid: Grid
    straight_through: StraightThrough
    transform: Hadamard | None
    dtype: torch.dtype


class Together:
    """Weights that go into one call of an op, and the lists that it takes: made once a step, not for each call.

    Alphas are as they are when this is made. Latents are asked for anew, as ``parameter.data`` may be replaced.
    """

    def __init__(self, kind: Kind, weights: list[WeightView], backend: str | None) -> None:
        self.kind, self.weights, self.backend = kind, weights, backend
        self.alphas = [w.alpha for w in weights]
        self.tensor_ids = [w.tensor_id for w in weights]
        layouts = [layout for w in weights if (layout := w.layout) is not None]
        self.layouts = layouts or None  # of shards, which all are or none
        self.grads: list[Tensor] = []  # rows of ``.grad``, once :meth:`guided` has found them
        self.memory = [w.memory() for w in weights]  # for what a pass runs with

    @property
    def latents(self) -> list[Tensor]:
        """Rows of the parameters."""
        return [w.latent for w in self.weights]

    def split(self, by: Callable[[WeightView], T]) -> list[tuple[T, Together]]:
        """Those for which ``by`` is the same."""
        answers = list(map(by, self.weights))
        kinds = dict.fromkeys(answers)
        if len(kinds) == 1:
            return [(answers[0], self)]
        return [(one, self.part([i for i, answer in enumerate(answers) if answer == one])) for one in kinds]

    def part(self, places: Sequence[int]) -> Together:
        """The weights at these places: this itself for all of them in their order."""
        if list(places) == list(range(len(self.weights))):
            return self
        found = Together(self.kind, [self.weights[i] for i in places], self.backend)
        found.grads = [self.grads[i] for i in places] if self.grads else []
        return found

    def guided(self) -> list[Together]:
        """Those that have a gradient, by its dtype; the others took no part in the forward."""
        found = []
        for dtype, alike in self.split(lambda w: None if w.parameter.grad is None else w.parameter.grad.dtype):
            if dtype is not None:
                alike.grads = [grad for w in alike.weights if (grad := w.guide()) is not None]
                found.append(alike)
        return found

    # ---- the gradient pass

    def quantize(self) -> None:
        """Q(parameter) into the weights' memory.

        For one pass: what a weight becomes then may show in no version, as where ``parameter.data`` is written.
        """
        quantize_(
            self.memory, self.latents, self.alphas, grid=self.kind.grid, transform=self.kind.transform,
            backend=self.backend,
        )  # fmt: skip

    def finish_gradients(self) -> list[tuple[WeightView, Tensor]]:
        """Make g of dL/dQ in ``.grad``, and the gradients of learned alphas.

        Both are linear in dL/dQ, so once for all micro-batches does.

        Returns:
            Weights whose alphas learn, and the gradients of these.
        """
        alphas: list[tuple[WeightView, Tensor]] = []
        for learned, alike in self.split(lambda w: w.modules[0].alpha.requires_grad):
            how, backend = alike.kind, alike.backend
            if not learned:
                straight_through_backward_(
                    alike.grads, alike.latents, alike.alphas, grid=how.grid,
                    straight_through=how.straight_through, transform=how.transform, backend=backend,
                )  # fmt: skip
                continue
            modules = [w.modules[0] for w in alike.weights]
            found = [torch.empty_like(alpha) for alpha in alike.alphas]
            learned_backward_(
                alike.grads, found, alike.latents, alike.alphas, factors=[m.alpha_factor for m in modules],
                grid=how.grid, straight_through=how.straight_through, transform=how.transform, backend=backend,
            )  # fmt: skip
            alphas += zip(alike.weights, sum_of_parts(alike.weights, found), strict=True)
        return alphas


def add_to_gradients(found: Iterable[tuple[Tensor, Tensor]]) -> None:
    """As a backward does, to each tensor its gradient."""
    there, added = [], []
    for t, grad in found:
        if t.grad is None:
            t.grad = grad
        else:
            there.append(t.grad)
            added.append(grad)
    if there:
        torch._foreach_add_(there, added)


def together(weights: Iterable[WeightView], backend: str | None) -> list[Together]:
    """The weights by kind."""
    found: dict[Kind, list[WeightView]] = {}
    for w in weights:
        q = w.quantizer
        found.setdefault(Kind(q.grid, q.straight_through, q.transform, w.parameter.dtype), []).append(w)
    return [Together(kind, alike, backend) for kind, alike in found.items()]


def set_alphas(weights: list[WeightView], backend: str | None) -> Tensor | None:
    """Make alphas that move those of the step: measure them, those of one scale in one call; hold learned ones.

    Returns:
        How many learned ones were out of range, 0-dim int64, or None as :func:`hold_alphas`.
    """
    calls: dict[tuple[MeasuredScale, Hadamard | None, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
    measure_sharded_([m for w in weights if not w.placement.is_whole for m in w.modules], backend)
    for w in weights:
        scale = w.quantizer.scale
        if isinstance(scale, MeasuredScale) and w.placement.is_whole:
            key = scale, w.quantizer.transform, w.parameter.dtype
            alphas, rows = calls.setdefault(key, ([], []))
            alphas += [m.alpha for m in w.modules]
            rows += [w.latent] * len(w.modules)
    for (scale, transform, _), (alphas, rows) in calls.items():
        measure_(alphas, rows, scale, transform, backend)
    return hold_alphas([m for w in weights for m in w.modules])


def hold_quantized(weights: list[WeightView], backend: str | None) -> None:
    """Modules run with Q(parameter), as a probe at eps = 0 would have it, until they are released."""
    for one in together(weights, backend):
        one.quantize()
    for w in weights:
        w.use(w.memory(), probe=True)
