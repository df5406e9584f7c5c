"""A weight's quantizer and its alpha: made by the scale, measured, held in its range, checked."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..functional import hadamard_, measure_alphas_
from ..ops import checks, memory, transforms
from ..ops.differentiable import Options
from ..ops.listop import is_plain
from ..ops.native import outside
from ..spec.hadamard import Hadamard
from ..spec.quantizer import Quantizer
from ..spec.scale import FixedScale, LearnedScale, MeasuredScale, Scale, not_saved
from .view import LOCAL, is_dtensor, local

if TYPE_CHECKING:
    from .quantized import QuantizedWeight

Tensors = Sequence[Tensor]
#: A learned alpha that an update drove out of range is held at this part of its first value.
FLOOR = 2.0**-20
#: The largest that it may be, on any grid.
MOST = memory.alpha_range(2)[1]
#: The alphas of a module that can be learned.
LEARNED = ("alpha", "input_alpha")
#: Statistics of the weights that PyTorch's layers begin with, uniform within 1 / sqrt(inputs), times that root.
FIRST = {"absmax": 1.0, "absmean": 1 / 2, "rms": 1 / math.sqrt(3)}
#: An alpha differs by more than this factor, on average, from what its scale makes of its first weights.
FAR = 4.0


class Changes:
    """Counts changes of how modules quantize, over all modules: a step sees at once that there is none."""

    count = 0


changes = Changes()


class QuantizerOptions:
    """A quantizer whose arguments of ops are made once."""

    quantizer: Quantizer
    _prepared: tuple[Quantizer | None, Any, Any] = None, None, None

    def options(self, shared: int, backend: str | None) -> Options:
        """What ops take that quantize a tensor of which ``shared`` elements share an alpha."""
        how, key = self.quantizer, (shared, backend)
        if self._prepared[0] is not how or self._prepared[1] != key:
            factor = how.scale.gradient_factor(how.grid, shared) if isinstance(how.scale, LearnedScale) else 1.0
            self._prepared = how, key, Options(**how.options, alpha_factor=factor, backend=backend)
        options: Options = self._prepared[2]
        return options


@dataclass(eq=False)
class WeightQuantizer(QuantizerOptions):
    """How a module quantizes its weight, and what it knows of alpha.

    Attributes:
        quantizer: grid, scale and straight-through estimator.
        tensor_id: which noise the weight draws (docs/contract.md, section 2).
        path: the module's name in the model that was quantized, for messages.
        backend: of the ops; None takes the best available.
        stale: whether the weight was replaced since alpha was made.
        shares: whether alpha is a parameter that another module had first.
        warned: whether a warning told of an alpha that is held in its range.
    """

    quantizer: Quantizer
    tensor_id: int
    path: str = ""
    backend: str | None = None
    stale: bool = False
    shares: bool = False
    warned: bool = False

    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__(name, value)
        changes.count += name not in ("warned", "_prepared")


# ---- alpha, as a scale makes it


@torch.no_grad()
def alpha_of(
    name: str, weight: Tensor, outputs: int, quantizer: Quantizer, expert_outputs: int | None = None
) -> Tensor:
    """Alpha that the quantizer's scale gives a weight, float32; dimension ``outputs`` counts the outputs.

    Of a stack of experts dimension ``expert_outputs`` counts an expert's outputs. Each expert has alphas of its
    own, a row of the result.

    The scale is given rows in their plain order, whatever the memory format, so that it gives the same bits. A
    learned alpha of weights that are all 0 begins as that of PyTorch's first weights does, see :data:`FIRST`.
    Raises TypeError or ValueError, with the ``name`` of the weight, if alpha does not fit.
    """
    if expert_outputs is not None:
        experts = enumerate(weight.detach())
        every = [alpha_of(f"{name}[{e}]", w, expert_outputs - 1, quantizer) for e, w in experts]
        return torch.stack([alpha.reshape(-1) for alpha in every])
    rows = weight.detach().movedim(outputs, 0).flatten(1).contiguous()
    transform = quantizer.transform
    if transform and rows.shape[1] % transform.block:
        raise ValueError(
            f"transform must have a block that divides the rows of the weight, of {rows.shape[1]} elements, got"
            f" {transform} for {name}"
        )
    alpha = _made(name, rows, quantizer)
    count, length = rows.shape
    shape = tuple(alpha.shape)
    own = alpha.numel() == rows.numel() and length > 1  # one for each weight: nothing would be left to train
    if own or not checks.fits(shape, rows.shape):
        raise ValueError(
            f"alpha must have one element, one per row, shape ({count}, 1), or one per group of a row, shape"
            f" ({count}, groups) with {length} / groups elements each, for {name} with {count} rows of"
            f" {length}, got shape {shape}"
        )
    if transform and (shared := rows.numel() // max(alpha.numel(), 1)) % transform.block:
        raise ValueError(
            f"alpha must be one for whole blocks of {transform}, got one for each {shared} elements for {name}"
        )
    if not alpha.is_meta and (wrong := against_alpha(name, rows, alpha, quantizer)) is not None:
        raise wrong
    return alpha


def against_alpha(name: str, rows: Tensor, alpha: Tensor, quantizer: Quantizer) -> ValueError | None:
    """An error that names the weight if its alpha is out of range, and says what of the weight is the cause."""
    low, high = memory.alpha_range(quantizer.grid.r)
    if memory.in_range(alpha, low, high):
        return None
    cause = ""
    if quantizer.scale.from_weight and not rows.isfinite().all():
        cause = f": {name} holds NaN or inf"
    elif quantizer.scale.from_weight and float(alpha.min()) == 0:
        zeros = "holds rows or groups of zeros" if rows.any() else "is all zeros"
        bound = (
            "return more than 0 from the function"
            if callable(getattr(quantizer.scale, "alpha", None))
            else ("give the scale a bound, Scale.absmax(least=1e-5) say")
        )
        cause = f": {name} {zeros}; {bound}"
    got = f"{alpha.min()}..{alpha.max()} for {name}{cause}"
    return ValueError(f"alpha must be finite, > 0 and in {low:g}..{high:g}, got {got}")


def name_of(module: QuantizedWeight) -> str:
    """The name of a module's weight in the model that was quantized, for messages."""
    return ".".join(filter(None, [module.weight_quantizer.path, module.PARAMETER]))


def _made(name: str, rows: Tensor, quantizer: Quantizer) -> Tensor:
    scale = quantizer.scale
    if isinstance(scale, LearnedScale):
        scale = scale.first(quantizer.grid)
    transform = None if rows.is_meta else quantizer.transform
    if isinstance(scale, FixedScale):
        return scale.of(rotated_rows([rows], transform)[0] if scale.from_weight else rows)
    assert isinstance(scale, MeasuredScale)
    try:
        shape = scale.shape_for(*rows.shape)
    except ValueError as error:
        raise ValueError(f"{error} for {name}") from None
    alpha = torch.empty(shape, dtype=torch.float32, device=rows.device)
    if not rows.is_meta:
        measure_([alpha], [rows], scale, transform)
        if quantizer.learned:
            first = scale.factor * FIRST[scale.statistic] / math.sqrt(max(rows.shape[1], 1))
            alpha.masked_fill_(alpha == 0, first)
    return alpha


def measure_(
    alphas: Tensors, rows: Tensors, scale: MeasuredScale, transform: Hadamard | None, backend: str | None = None
) -> None:
    """Write the alphas that the scale measures from these rows, or from what a transform makes of them.

    A transform leaves the rms of whole blocks as it is. No gradient passes; there is no ``no_grad`` here, as
    exported programs that have one cannot be loaded.
    """
    if scale.statistic != "rms":
        rows = rotated_rows(rows, transform, backend)
    measure_alphas_(alphas, rows, backend=backend, **scale.options)


def rotated_rows(rows: Tensors, transform: Hadamard | None, backend: str | None = None) -> Tensors:
    """Rows in the basis in which they are quantized: float32 where there is a transform."""
    if transform is None:
        return rows
    out = [torch.empty_like(t, dtype=torch.float32) for t in rows]
    hadamard_(out, list(rows), block=transform.block, backend=backend)
    return out


def keeping_versions(alphas: Tensors) -> AbstractContextManager[object]:
    """Lets a forward write alphas that an earlier forward saved for its backward, as a module may run twice.

    Both write the same numbers, unless something changed the weight or alpha itself, which autograd then sees.
    """
    if not is_plain(*alphas) or any(alpha.is_inference() for alpha in alphas):
        return nullcontext()
    return torch.autograd._unsafe_preserve_version_counter(tuple(alphas))


# ---- learned alphas, in their range


@torch.no_grad()
def hold_alphas(modules: Sequence[QuantizedWeight], names: Sequence[str] = LEARNED) -> Tensor | None:
    """Hold learned alphas that an update drove out of range at 2^-20 of their first value, and warn once.

    Returns how many, 0-dim int64 on their device, where nothing waits for it. Returns None if there are none,
    which only the CPU sees.
    """
    return hold_pairs(modules, *pairs_of(modules, names))


def pairs_of(modules: Sequence[QuantizedWeight], names: Sequence[str]) -> tuple[list[Tensor], list[Tensor]]:
    """The learned alphas of these names, each once, and where each is held."""
    pairs = {id(pair[0]): pair for m in modules for pair in m.learned_alphas(names)}
    return [alpha for alpha, _ in pairs.values()], [least for _, least in pairs.values()]


def hold_pairs(modules: Sequence[QuantizedWeight], alphas: Tensors, lows: Tensors) -> Tensor | None:
    """:func:`hold_alphas` of alphas that are known; ``lows``: where each is held."""
    if not alphas:
        return None
    seen = seen_by_host(alphas[0])
    if seen and outside(alphas, lows, MOST) == 0:
        return None
    now, least = memory.in_a_row(alphas), memory.in_a_row(lows)
    if seen and torch.equal(now, torch.maximum(now, least).clamp_(max=MOST)):
        return None
    kept = in_its_range(now, least)
    count = (now != kept).sum()  # NaN too
    parts = kept.split([alpha.numel() for alpha in alphas])
    with nullcontext() if seen else keeping_versions(alphas):  # a device may write what is there
        torch._foreach_copy_([*alphas], [part.view_as(a) for part, a in zip(parts, alphas, strict=True)])
    if seen:
        if not any(m.weight_quantizer.warned for m in modules):
            warnings.warn(
                "an update drove a learned alpha out of range, and it is held at 2^-20 of its first value:"
                " lower its learning rate, fk.parameter_groups(model, weight_decay=..., alpha_lr=...)",
                stacklevel=3,
            )
        for m in modules:
            m.weight_quantizer.warned = True
    return count


def seen_by_host(alpha: Tensor) -> bool:
    """Whether the host can look at an alpha without waiting for a device."""
    return alpha.device.type == "cpu" and not torch.compiler.is_compiling()


def is_held(alpha: Tensor, least: Tensor | None) -> bool:
    """Whether one number on the CPU lies where :func:`hold_alphas` leaves it; it asks less than that does."""
    if least is None or not (alpha.is_cpu and alpha.numel() == 1 == least.numel()):
        return False
    return least.item() <= alpha.item() <= MOST


def in_its_range(alpha: Tensor, least: Tensor) -> Tensor:
    """What :func:`hold_alphas` would make of a learned alpha, for an exported program: nothing is written."""
    return torch.where((alpha >= least) & (alpha <= MOST), alpha, least)


@torch.no_grad()
def share_at_floor(modules: Sequence[QuantizedWeight]) -> float:
    """The share of alphas that lie at the least value that they may have, of those that move; NaN without any.

    Learned ones are held there, measured ones have a bound. An alpha that is no number counts.
    """
    pairs: dict[int, tuple[Tensor, Tensor | float]] = {}
    for m in modules:
        if isinstance(m.quantizer.scale, MeasuredScale):
            pairs[id(m.alpha)] = m.alpha, m.quantizer.scale.least
        pairs |= {id(alpha): (alpha, least) for alpha, least in m.learned_alphas(LEARNED)}
    low = sum(int((~(alpha > least)).sum()) for alpha, least in pairs.values())
    return low / total if (total := sum(alpha.numel() for alpha, _ in pairs.values())) else math.nan


# ---- weights that are not the ones that alpha was made for


def is_replaced(module: QuantizedWeight, old: Tensor | None, new: object) -> bool:
    """Whether a module that got another weight has other values now, which its alpha was not made for.

    Not so with what brings its alphas along or moves values: a DTensor, a weight without values.
    """
    if old is None or not isinstance(new, Tensor) or new is old or module.placement is not LOCAL:
        return False
    if is_dtensor(old) or is_dtensor(new) or old.is_meta or new.is_meta:
        return False
    return old.shape != new.shape or not torch.equal(old.detach().to(new), new.detach())


def fits(module: QuantizedWeight, weight: Tensor, alpha: Tensor) -> bool:
    """Whether alpha was made for the weight that is there, and for as many rows."""
    rows = alpha.numel() == 1 or alpha.shape[0] == weight.shape[module.OUTPUTS]
    return rows and not module.weight_quantizer.stale


def check(module: QuantizedWeight, name: str | None = None) -> None:
    """Raise unless alpha fits the weight.

    ``name`` is the weight's, for messages: by default that in the model that was quantized.
    """
    name = name or name_of(module)
    if transforms.active() and (transforms.is_batched(module.latent) or transforms.is_batched(module.alpha)):
        raise RuntimeError(
            f"{name} must not be batched by vmap, as functional_call with stacked parameters has it: call the"
            " model once for each set of parameters"
        )
    if fits(module, module.latent, module.alpha):
        return
    if module.weight_quantizer.stale:
        raise RuntimeError(
            f"{name} was replaced after its alpha was made: call fogzo_kernels.dequantize_model(model) before"
            " another layer (BatchNorm, say) is fused into it; for a new weight call calibrate_() of its module"
        )
    rows = module.latent.shape[module.OUTPUTS]
    raise RuntimeError(
        f"{name} has {rows} rows, and its alpha was made for {module.alpha.shape[0]}: call calibrate_() of its"
        " module after a resize, as by resize_token_embeddings"
    )


@torch.no_grad()
def warn_of_new_weights(modules: Iterable[tuple[str, QuantizedWeight]]) -> None:
    """Once for all whose first alpha is far from what their scale would make of the weights that are there."""
    far = [name for name, m in modules if _is_far(m)]
    if far:
        more = f" and {len(far) - 1} more" if far[1:] else ""
        warnings.warn(
            f"the alpha of {far[0]}{more} does not fit the weights as they are now: if you initialized or"
            " loaded them after quantize_model, call fogzo_kernels.calibrate_(model)",
            stacklevel=6,
        )


def _is_far(module: QuantizedWeight) -> bool:
    scale, alpha = module.quantizer.scale, module.alpha
    if (
        alpha.is_meta
        or any(local(t) is not t for t in (alpha, module.latent))
        or not fits(module, module.latent, alpha)
    ):
        return False
    first: Scale
    if isinstance(scale, LearnedScale):
        first = scale.first(module.quantizer.grid)
        begins = torch.equal(alpha * FLOOR, module.alpha_least)  # it was not trained yet
    else:
        first, begins = scale, isinstance(scale, FixedScale)
    kept = getattr(first, "alpha", None) is not not_saved
    if not (begins and kept and first.from_weight):
        return False
    try:
        now = module.alpha_by(module.quantizer)
    except ValueError:  # weights that are not finite, say, of which a step speaks
        return False
    return float((now / alpha).log().abs().mean()) > math.log(FAR)
