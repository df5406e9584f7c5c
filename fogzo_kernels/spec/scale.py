"""Scale: where the scale alpha of a grid comes from (docs/contract.md, sections 3 and 4)."""

from __future__ import annotations

import math
import numbers
import pickle
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from .checks import as_int, check_number, hinted
from .grid import Grid

Alpha = float | Tensor | Callable[[Tensor], float | Tensor]
#: Which weights share an alpha: "tensor" all, "row" the weights of a row, an int so many neighbours in a row.
Granularity = str | int
#: What an alpha can be made of: the largest abs(x) of its elements, their mean, the root of the mean of x^2.
STATISTICS = ("absmax", "absmean", "rms")


MADE_BY = (
    "use a constructor of Scale: Scale.fixed(alpha), Scale.absmax(), Scale.absmean(), Scale.rms() or"
    " Scale.learned()"
)


class Scale:
    """The scale of a weight, ``alpha``: the unit of its grid. Use its constructors.

    Weights are seen as matrices with a row for each output of their module: what stands behind the first
    dimension of a convolution's weight is flattened.
    """

    @hinted(MADE_BY)
    def __init__(self) -> None:
        raise TypeError(f"Scale is not made itself: {MADE_BY}")

    @staticmethod
    def fixed(alpha: Alpha) -> FixedScale:
        """A scale that training leaves as it is.

        Args:
            alpha: finite and > 0: a number or a floating tensor for every weight, or a function that takes a
                weight's rows (detached) and returns one. It has one element, one per row, of shape (rows, 1)
                or (rows,), or one per group of a row, of shape (rows, groups).

        Raises:
            TypeError: ``alpha`` is neither of them.
            ValueError: it is a tensor that requires grad.
        """
        return FixedScale(alpha)

    @staticmethod
    def absmax(
        granularity: Granularity = "tensor", *, factor: float = 1.0, add: float = 0.0, least: float = 0.0
    ) -> MeasuredScale:
        """Alpha = max(factor (max abs(w) + add), least), measured in each step; see :class:`MeasuredScale`."""
        return MeasuredScale("absmax", granularity, factor, add, least)

    @staticmethod
    def absmean(
        granularity: Granularity = "tensor", *, factor: float = 1.0, add: float = 0.0, least: float = 0.0
    ) -> MeasuredScale:
        """Alpha = max(factor (mean abs(w) + add), least), measured in each step; see :class:`MeasuredScale`."""
        return MeasuredScale("absmean", granularity, factor, add, least)

    @staticmethod
    def rms(
        granularity: Granularity = "tensor", *, factor: float = 1.0, add: float = 0.0, least: float = 0.0
    ) -> MeasuredScale:
        """Alpha = max(factor (sqrt(mean w^2) + add), least), measured in each step; see
        :class:`MeasuredScale`."""
        return MeasuredScale("rms", granularity, factor, add, least)

    @staticmethod
    def learned(
        granularity: Granularity = "tensor", *, init: FixedScale | MeasuredScale | None = None
    ) -> LearnedScale:
        """A scale that is trained: alpha is a parameter of its module, with LSQ's gradient.

        Args:
            granularity: ``"tensor"``, ``"row"``, or the size of a group of a row; ``init`` brings its own.
            init: what alpha begins with; None: 2 mean abs(w) / sqrt(qmax), as LSQ does.
        """
        return LearnedScale(granularity if init is None else None, init)

    @property
    @abstractmethod
    def from_weight(self) -> bool:
        """Whether alpha is made from the weight, so that another weight has another."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Itself in strings and numbers, for JSON."""

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Scale:
        """The scale that :meth:`to_dict` gave; a tensor or a function that was not kept raises at its use."""
        if "measured" in data:
            return MeasuredScale(**data["measured"])
        if "learned" in data:
            init = Scale.from_dict(data["init"]) if data["init"] else None
            return LearnedScale(data["learned"], init)  # type: ignore[arg-type]
        kept = {"number": data["alpha"], "tensor": tensor_not_saved, "function": not_saved}
        return FixedScale(kept[data["fixed"]])


@dataclass(frozen=True, eq=False)
class FixedScale(Scale):
    """A scale that training leaves as it is; made by :meth:`Scale.fixed`.

    A value: two are equal if their numbers are equal, or if they hold the very same tensor or function.
    """

    alpha: Alpha

    def __post_init__(self) -> None:
        if not callable(self.alpha):
            check_alpha(self.alpha, "a number, a floating tensor or a function of a weight that returns one")

    @property
    def from_weight(self) -> bool:
        return callable(self.alpha) and self.alpha is not tensor_not_saved

    @torch.no_grad()
    def of(self, rows: Tensor) -> Tensor:
        """Alpha of a weight: a new float32 tensor on its device, in the given shape."""
        value: Any = self.alpha
        if callable(value):
            value = value(rows.detach())
            check_alpha(value, "a function of a weight that returns a number or a floating tensor")
        return torch.as_tensor(value, dtype=torch.float32, device=rows.device).clone().contiguous()

    def __repr__(self) -> str:
        alpha: Any = self.alpha
        if callable(alpha):  # without its address
            shown = getattr(alpha, "__name__", type(alpha).__name__)
        else:
            shown = f"tensor of shape {tuple(alpha.shape)}" if isinstance(alpha, Tensor) else repr(alpha)
        return f"Scale.fixed({shown})"

    def to_dict(self) -> dict[str, Any]:
        """Keeps a number; of a tensor or a function only the kind."""
        if isinstance(self.alpha, int | float):
            return {"fixed": "number", "alpha": self.alpha}
        return {"fixed": "function" if self.from_weight else "tensor", "alpha": None}

    def _identity(self) -> tuple[bool, float]:
        """Tensors compare element by element and a function may have no hash, so their ids stand for them."""
        number = isinstance(self.alpha, int | float)
        return number, self.alpha if number else id(self.alpha)  # type: ignore[return-value]

    def __eq__(self, other: object) -> bool:
        return self._identity() == other._identity() if isinstance(other, FixedScale) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._identity())

    def __deepcopy__(self, memo: dict[int, Any]) -> FixedScale:
        return self  # or the scales of a copied model would not equal the model's

    def __reduce__(self) -> tuple[Any, ...]:
        """A model is saved with its alphas; a function that has no name to import does not hinder that."""
        if callable(self.alpha):
            try:
                pickle.dumps(self.alpha)
            except (pickle.PicklingError, AttributeError, TypeError):
                return FixedScale, (not_saved,)
        return FixedScale, (self.alpha,)


@dataclass(frozen=True)
class MeasuredScale(Scale):
    """A scale measured from the weight as it is in each step, the same for all passes of the step.

    alpha = max(factor (statistic + add), least), a constant for autograd.

    Args:
        statistic: ``"absmax"``, ``"absmean"`` or ``"rms"``.
        granularity: ``"tensor"``, ``"row"``, or the number of neighbouring weights of a row that share one
            alpha, which must divide the row.
        factor: > 0.
        add: >= 0.
        least: >= 0; some such bound keeps alpha > 0 where weights are all 0.

    Raises:
        TypeError, ValueError: an argument is wrong.
    """

    statistic: str
    granularity: Granularity
    factor: float
    add: float
    least: float

    from_weight = True

    @property
    def options(self) -> dict[str, Any]:
        """The arguments of ``measure_alphas_``."""
        return {name: getattr(self, name) for name in ("statistic", "factor", "add", "least")}

    def __post_init__(self) -> None:
        if self.statistic not in STATISTICS:
            raise ValueError(f"statistic must be one of {', '.join(STATISTICS)}, got {self.statistic!r}")
        object.__setattr__(self, "granularity", checked_granularity(self.granularity))
        for name, low in (("factor", ">"), ("add", ">="), ("least", ">=")):
            value = getattr(self, name)
            check_number(name, value)
            if not 0 <= value < math.inf or (value == 0 and low == ">"):
                raise ValueError(f"{name} must be finite and {low} 0, got {value}")
            object.__setattr__(self, name, float(value))

    def shape_for(self, rows: int, length: int) -> tuple[int, ...]:
        """The shape of alpha for a weight of ``rows`` rows of ``length`` elements."""
        if self.granularity == "tensor":
            return ()
        if self.granularity == "row":
            return (rows, 1)
        assert isinstance(self.granularity, int)
        if length % self.granularity:
            raise ValueError(
                f"granularity must divide the rows of the weight, of {length} elements, got {self.granularity}"
            )
        return (rows, length // self.granularity)

    def __repr__(self) -> str:
        shown = [] if self.granularity == "tensor" else [repr(self.granularity)]
        if self.factor != 1:
            shown.append(f"factor={self.factor:.6g}")
        shown += [f"{name}={getattr(self, name):g}" for name in ("add", "least") if getattr(self, name)]
        return f"Scale.{self.statistic}({', '.join(shown)})"

    def to_dict(self) -> dict[str, Any]:
        return {"measured": asdict(self)}


@dataclass(frozen=True)
class LearnedScale(Scale):
    """A scale that is trained, with LSQ's gradient (Esser et al. 2020, arXiv 1902.08153); made by
    :meth:`Scale.learned`.

    Args:
        granularity: of the default initial value; None where ``init`` is given.
        init: what alpha begins with, or None.
    """

    granularity: Granularity | None
    init: FixedScale | MeasuredScale | None

    from_weight = True

    def __post_init__(self) -> None:
        if self.init is None:
            object.__setattr__(self, "granularity", checked_granularity(self.granularity))
        elif not isinstance(self.init, FixedScale | MeasuredScale):
            raise TypeError(f"init must be a fixed or measured Scale, got {type(self.init).__name__}")

    def first(self, grid: Grid) -> FixedScale | MeasuredScale:
        """The scale that gives alpha its first value."""
        if self.init is not None:
            return self.init
        assert self.granularity is not None
        return MeasuredScale("absmean", self.granularity, 2 / math.sqrt(max(grid.qmax, 1)), 0.0, 0.0)

    def gradient_factor(self, grid: Grid, shared: int) -> float:
        """LSQ's factor of alpha's gradient, 1 / sqrt(n qmax) for n weights; grids of one bit have no qmax."""
        return 1 / math.sqrt(max(shared, 1) * max(grid.qmax, 1))

    def __repr__(self) -> str:
        shown = repr(self.granularity) if self.init is None else f"init={self.init!r}"
        return "Scale.learned()" if shown == "'tensor'" else f"Scale.learned({shown})"

    def to_dict(self) -> dict[str, Any]:
        return {"learned": self.granularity, "init": self.init and self.init.to_dict()}


def checked_granularity(granularity: Any) -> Granularity:
    if isinstance(granularity, str) and granularity in ("tensor", "row"):
        return granularity
    if isinstance(granularity, bool) or not isinstance(granularity, numbers.Integral) or granularity < 2:
        raise ValueError(
            "granularity must be 'tensor', 'row' (an alpha for each output channel) or an int >= 2 (the size of"
            f" a group), got {granularity!r}"
        )
    return as_int("granularity", granularity)


def check_alpha(alpha: object, expected: str) -> None:
    """Raise unless ``alpha`` is a number or a floating tensor that does not require grad."""
    got, fits = type(alpha).__name__, isinstance(alpha, int | float) and not isinstance(alpha, bool)
    if isinstance(alpha, Tensor):
        got, fits = f"a tensor of {str(alpha.dtype).removeprefix('torch.')}", alpha.is_floating_point()
    if not fits:
        raise TypeError(f"alpha must be {expected}, got {got}")
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
