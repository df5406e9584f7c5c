"""Learned alphas that no optimizer has: made before ``quantize_model``, it knows the weights alone."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence

from torch import Tensor, nn

from ...nn.quantized import QuantizedWeight
from ...nn.view import WeightView, local

Versions = list[tuple[Tensor, int]]


class UnmovedAlphas:
    """Looks, in the first steps, by versions whether alphas that got a gradient are written where weights are.

    An optimizer that writes through ``.data`` raises no version, of weights neither: then this says nothing.
    """

    def __init__(self) -> None:
        self._weights: Versions = []
        self._began: Versions = []  # of alphas, before the step
        self._alphas: Versions = []  # once a step is over, the alphas that got a gradient
        self._due = True

    def begin(self, model: nn.Module, modules: Iterable[nn.Module], weights: Sequence[WeightView]) -> None:
        """Before a step: warn once of alphas that the step before left where they were."""
        if not self._due:
            return
        if self._alphas and any(_moved(w, version) for w, version in self._weights):
            self._due = False
            left = {id(alpha) for alpha, version in self._alphas if not _moved(alpha, version)}
            self._weights, self._alphas = [], []
            if left:
                _warn([name for name, p in model.named_parameters() if id(p) in left])
            return
        quantized = [m for m in modules if isinstance(m, QuantizedWeight)]
        alphas = [alpha for m in quantized for alpha, _ in m.learned_alphas(("alpha", "input_alpha"))]
        self._due = bool(alphas)
        self._weights = [(w.parameter, local(w.parameter)._version) for w in weights]
        self._began = [(alpha, local(alpha)._version) for alpha in alphas]
        self._alphas = []

    def end(self) -> None:
        """After a step, whose gradients are still there."""
        if self._due:
            self._alphas = [(alpha, version) for alpha, version in self._began if alpha.grad is not None]


def _moved(tensor: Tensor, version: int) -> bool:
    return local(tensor)._version != version


def _warn(names: Sequence[str]) -> None:
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    warnings.warn(
        f"no optimizer has the learned alphas: the step that moved the weights did not move {shown}. Make the"
        " optimizer after quantize_model, with fk.parameter_groups(model, weight_decay=...) say, or call"
        ' optimizer.add_param_group({"params": list(fk.learned_alphas(model))})',
        stacklevel=4,
    )
