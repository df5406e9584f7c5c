"""ModuleWeight: the weight of one module, which quantizes it in each forward."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ...spec import grid as spec
from ...spec.straight_through import StraightThrough
from ..gpu.plans import plan
from ..held import Held, native
from .launch import Config, Given, config_of
from .learned import launch_learned, unit_of
from .quantize import launch_quantize


@dataclass(eq=False)
class ModuleWeight:
    """A plan of a weight and its alpha, the first of ``tensors``. Outputs and gradients come with each call.

    A call that returns False has written nothing: a tensor has changed, and needs another plan.
    """

    tensors: Held
    grid: spec.Grid
    straight_through: StraightThrough
    factor: float
    block: int

    def __post_init__(self) -> None:
        self._numbers = [self.tensors.number]
        self._generations = native().generations(self._numbers)
        weight, alpha = self.tensors[:1], self.tensors[1:2]
        self._plan = p = plan(weight, latents=weight, alphas=alpha, factors=[self.factor])
        lists, kind = (weight, weight, weight, self.block), self.straight_through.variant
        self._forward, self._backward = config_of(p, *lists), config_of(p, *lists, variant=kind)
        self._learned = config_of(p, *lists, variant=kind, unit=unit_of(p))

    def quantize(self, out: Tensor) -> bool:
        """Write Q into a tensor like the weight."""
        return self._launch(self._forward, (None, out, None))

    def backward(self, out: Tensor, grad: Tensor, alpha_grad: Tensor | None) -> bool:
        """Write the gradients of the weight and of alpha, which is None unless it learns, from dL/dQ."""
        config = self._backward if alpha_grad is None else self._learned
        return self._launch(config, (grad, out, alpha_grad))

    def _launch(self, config: Config, given: Given) -> bool:
        if native().generations(self._numbers) != self._generations:
            return False
        if any(t is not None and t.data_ptr() % 16 for t in given[:2]):
            config = config.replaced(aligned=False)
        run = launch_quantize if given[2] is None else launch_learned
        run(self._plan, self.tensors[0].device, self.grid, config, given)
        return True
