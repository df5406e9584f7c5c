"""Scale: where the scale alpha of a grid comes from (docs/contract.md, sections 3 and 4)."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Alpha = float | Tensor | Callable[[Tensor], float | Tensor]

#: What an alpha can be made of: the largest abs(x) of its elements, their mean, the root of the mean of x^2.
STATISTICS = ("absmax", "absmean", "rms")


@dataclass(frozen=True, eq=False)
class Scale:
    """The scale of a weight, ``alpha``: the unit of its grid. Use the constructor :meth:`fixed`.

    A value: two scales are equal if their numbers are equal, or if they hold the very same tensor or
    function.
    """

    alpha: Alpha

    def __post_init__(self) -> None:
        if not callable(self.alpha):
            check_alpha(self.alpha, "a number, a floating tensor or a function of a weight that returns one")

    @classmethod
    def fixed(cls, alpha: Alpha) -> Scale:
        """A scale that training leaves as it is.

        Args:
            alpha: finite and > 0: a number or a floating tensor for every weight, or a function that takes a
                weight (detached) and returns one. The weight is a matrix, with a row for each output of the
                module: what stands behind the first dimension of a convolution's weight is flattened.
                Alpha has one element, one per row, of shape (rows, 1) or (rows,), or one per group of a
                row, of shape (rows, groups).

        Raises:
            TypeError: ``alpha`` is neither of them.
            ValueError: it is a tensor that requires grad.
        """
        return cls(alpha)

    @property
    def from_weight(self) -> bool:
        """Whether alpha is made from the weight, by a function."""
        return callable(self.alpha) and self.alpha is not tensor_not_saved

    @torch.no_grad()
    def of(self, weight: Tensor) -> Tensor:
        """Alpha of a weight: a new float32 tensor on its device, in the shape that was given.

        Raises:
            TypeError: the function returned neither a number nor a floating tensor.
            ValueError: it returned a tensor that requires grad.
        """
        value: Any = self.alpha
        if callable(value):
            value = value(weight.detach())
            check_alpha(value, "a function of a weight that returns a number or a floating tensor")
        return torch.as_tensor(value, dtype=torch.float32, device=weight.device).clone().contiguous()

    def __repr__(self) -> str:
        alpha = self.alpha
        shown = f"tensor of shape {tuple(alpha.shape)}" if isinstance(alpha, Tensor) else repr(alpha)
        if callable(alpha):  # without its address
            shown = getattr(alpha, "__name__", type(alpha).__name__)
        return f"Scale.fixed({shown})"

    def to_dict(self) -> dict[str, Any]:
        """Itself in strings and numbers; a tensor or a function is not kept, only that it was one."""
        kept = self.alpha if isinstance(self.alpha, int | float) else None
        tensor = isinstance(self.alpha, Tensor) or self.alpha is tensor_not_saved
        return {"fixed": "number" if kept is not None else "tensor" if tensor else "function", "alpha": kept}

    @classmethod
    def from_dict(cls, found: dict[str, Any]) -> Scale:
        """The scale that :meth:`to_dict` gave; one that was not kept raises when it is used."""
        return cls(
            {"number": found["alpha"], "tensor": tensor_not_saved, "function": not_saved}[found["fixed"]]
        )

    def _identity(self) -> tuple[str, float]:
        if isinstance(self.alpha, int | float):
            return "number", self.alpha
        return "object", id(self.alpha)  # tensors compare element by element; a function may have no hash

    def __eq__(self, other: object) -> bool:
        return self._identity() == other._identity() if isinstance(other, Scale) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._identity())

    def __deepcopy__(self, memo: dict[int, Any]) -> Scale:
        return self  # or the scales of a copied model would not equal those it was made with

    def __reduce__(self) -> tuple[Any, ...]:
        """A model is saved with its alphas; a function that has no name to import does not hinder that."""
        if callable(self.alpha):
            try:
                pickle.dumps(self.alpha)
            except (pickle.PicklingError, AttributeError, TypeError):
                return Scale, (not_saved,)
        return Scale, (self.alpha,)


def check_alpha(alpha: object, expected: str) -> None:
    """Raise unless ``alpha`` is a number or a floating tensor that does not require grad."""
    if isinstance(alpha, bool) or not isinstance(alpha, int | float | Tensor):
        raise TypeError(f"alpha must be {expected}, got {type(alpha).__name__}")
    if isinstance(alpha, Tensor) and not alpha.is_floating_point():
        raise TypeError(f"alpha must be {expected}, got a tensor of {str(alpha.dtype).removeprefix('torch.')}")
    if isinstance(alpha, Tensor) and alpha.requires_grad:
        raise ValueError(
            f"alpha must not require grad, as no gradient reaches it, got a {type(alpha).__name__} that does"
        )


def not_saved(weight: Tensor) -> Tensor:
    """Stands in a loaded scale for a function that could not be saved, a lambda say."""
    raise RuntimeError("alpha must be given anew: it was a function that could not be saved with its model")


def tensor_not_saved(weight: Tensor) -> Tensor:
    """Stands in a loaded scale for a tensor."""
    raise RuntimeError("alpha must be given anew: it was a tensor that was not saved with its model's config")
