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
    """Where the scale alpha of a weight comes from; use its constructors.

    Alpha is the unit of the grid's values. The constructors see a weight as a matrix with one row per output of
    its module: they flatten all other dimensions of a convolution.

    Example:
        >>> fk.Scale.fixed(0.5), fk.Scale.absmax("row"), fk.Scale.learned(32)
        (Scale.fixed(0.5), Scale.absmax('row'), Scale.learned(32))
    """

    @hinted(MADE_BY)
    def __init__(self) -> None:
        raise TypeError(f"Scale is not made itself: {MADE_BY}")

    @staticmethod
    def fixed(alpha: Alpha) -> Scale:
        """Return a scale that training does not change.

        Args:
            alpha: finite and > 0: a number, a floating tensor, or a function that takes the rows of a weight
                (detached) and returns one of the two. A tensor has one element, one per row with shape (rows,
                1) or (rows,), or one per group of a row with shape (rows, groups).

        Raises:
            TypeError: ``alpha`` is none of these.
            ValueError: ``alpha`` is a tensor that requires grad.

        Example:
            >>> fk.Scale.fixed(lambda rows: rows.abs().amax(1, keepdim=True) / 2).from_weight
            True
        """
        return FixedScale(alpha)

    @staticmethod
    def absmax(
        granularity: Granularity = "tensor", *, factor: float = 1.0, add: float = 0.0, least: float = 0.0
    ) -> Scale:
        """Return a scale that each step measures: alpha = max(factor (max abs(w) + add), least).

        Alpha is a constant for autograd, and the same in all passes of a step.

        Args:
            granularity: which weights share an alpha: ``"tensor"``, ``"row"``, or the size of a group of a row,
                an int that divides the row.
            factor: finite, > 0.
            add, least: finite, >= 0. A ``least`` > 0 keeps alpha > 0 where all weights are 0.

        Raises:
            TypeError, ValueError: an argument has a wrong type or is out of range.

        Example:
            >>> fk.Scale.absmax("row", factor=1 / 7)
            Scale.absmax('row', factor=0.142857)
        """
        return MeasuredScale("absmax", granularity, factor, add, least)

    @staticmethod
    def absmean(
        granularity: Granularity = "tensor", *, factor: float = 1.0, add: float = 0.0, least: float = 0.0
    ) -> Scale:
        """Return a scale that each step measures: alpha = max(factor (mean abs(w) + add), least).

        BitNet b1.58 takes it with ``least=1e-5`` (arXiv 2402.17764). Alpha is a constant for autograd, and the
        same in all passes of a step.

        Args:
            granularity: which weights share an alpha: ``"tensor"``, ``"row"``, or the size of a group of a row,
                an int that divides the row.
            factor: finite, > 0.
            add, least: finite, >= 0. A ``least`` > 0 keeps alpha > 0 where all weights are 0.

        Raises:
            TypeError, ValueError: an argument has a wrong type or is out of range.

        Example:
            >>> fk.presets.bitnet().scale == fk.Scale.absmean(least=1e-5)
            True
        """
        return MeasuredScale("absmean", granularity, factor, add, least)

    @staticmethod
    def rms(
        granularity: Granularity = "tensor", *, factor: float = 1.0, add: float = 0.0, least: float = 0.0
    ) -> Scale:
        """Return a scale that each step measures: alpha = max(factor (sqrt(mean w^2) + add), least).

        QuEST takes it with ``add=1e-8`` (arXiv 2502.05003). Alpha is a constant for autograd, and the same in
        all passes of a step.

        Args:
            granularity: which weights share an alpha: ``"tensor"``, ``"row"``, or the size of a group of a row,
                an int that divides the row.
            factor: finite, > 0.
            add, least: finite, >= 0. A ``least`` > 0 keeps alpha > 0 where all weights are 0.

        Raises:
            TypeError, ValueError: an argument has a wrong type or is out of range.

        Example:
            >>> fk.Scale.rms(32, add=1e-8)
            Scale.rms(32, add=1e-08)
        """
        return MeasuredScale("rms", granularity, factor, add, least)

    @staticmethod
    def learned(granularity: Granularity = "tensor", *, init: Scale | None = None) -> Scale:
        """Return a scale that is trained: alpha is a parameter of its module, with LSQ's gradient.

        The gradient and the first value come from arXiv 1902.08153, sections 2.1 and 2.2.

        Args:
            granularity: which weights share an alpha: ``"tensor"``, ``"row"``, or the size of a group of a row,
                an int that divides the row. ``init``, if given, replaces it.
            init: the scale that gives alpha its first value, fixed or measured. None: 2 mean abs(w) /
                sqrt(qmax), as LSQ has it.

        Raises:
            TypeError, ValueError: an argument has a wrong type or is out of range.

        Example:
            >>> q = fk.Quantizer(fk.Grid.uniform(2), fk.Scale.learned("row"), fk.StraightThrough("identity"))
            >>> model = torch.nn.Linear(8, 4)
            >>> report = fk.quantize_model(model, q)
            >>> model.alpha.shape, model.alpha.requires_grad
            (torch.Size([4, 1]), True)
        """
        return LearnedScale(granularity if init is None else None, init)  # type: ignore[arg-type]

    @property
    @abstractmethod
    def from_weight(self) -> bool:
        """Whether the weight determines alpha, so that another weight has another alpha."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Return the scale as strings and numbers, for JSON; a fixed tensor or function keeps only its kind.

        Example:
            >>> fk.Scale.fixed(0.5).to_dict()
            {'fixed': 'number', 'alpha': 0.5}
        """

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Scale:
        """Return the scale of a dict from :meth:`to_dict`.

        A tensor or a function, which the dict could not keep, raises when the scale is used.

        Args:
            data: a result of :meth:`to_dict`.

        Example:
            >>> fk.Scale.from_dict({"fixed": "number", "alpha": 0.5})
            Scale.fixed(0.5)
        """
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
    """A scale measured from the weight as it is in each step; :meth:`Scale.absmax` and its like make it."""

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
