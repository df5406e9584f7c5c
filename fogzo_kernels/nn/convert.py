"""quantize_model and back, calibrate_, calibrate_inputs_: a model's modules, in place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..backends import check_known
from ..ops import checks, memory
from ..spec.checks import hinted
from ..spec.quantizer import Quantizer
from ..spec.scale import LearnedScale, Scale
from . import pretrained
from .held import hold, let_go
from .inputs import check_activation
from .module import QuantizedModule
from .quantized import QuantizedWeight
from .registry import Unit, units_of
from .replaced import replaced_in, settle
from .report import Report, report_of
from .rules import Checked, Rule, Which, check_quantizer, choose
from .tied import check_shared, link
from .view import HANDLERS, LOCAL, reshard, whole
from .weight import WeightQuantizer, alpha_of, check


@hinted(
    otherwise="quantize_model takes model and quantizer, fk.presets.lsq(2) say",
    bits="the bits are those of the quantizer, fk.presets.lsq(4) say",
)
def quantize_model(
    model: nn.Module,
    quantizer: Quantizer | None,
    *,
    activation: Quantizer | None = None,
    rules: Sequence[Rule] = (),
    skip: Which | Sequence[Which] = (),
    backend: str | None = None,
) -> Report:
    """Quantize the weights of a model, in place, and report what was quantized and what was not.

    These modules run with Q(weight) then: ``nn.Linear``, convolutions and transposed convolutions,
    ``nn.Embedding`` and ``EmbeddingBag``, ``nn.Bilinear``, subclasses of all these; recurrent layers,
    ``nn.MultiheadAttention``; the experts of ``transformers``, and its ``Conv1D``; what
    :func:`declare_weights` declares. Parameters, hooks and names stay, so optimizers keep their parameters and
    checkpoints of the plain model load. In a stack of experts, one parameter of three dimensions, each expert
    is a weight: it has its own scale and noise. Other modules stay as they are unless a rule names a parameter
    of theirs; the report names them. Tied weights are quantized once, and share their alpha and noise. Call it
    again for modules that an earlier call left alone, and for plain ones that took the place of quantized
    ones: training and saving are errors until then.

    Args:
        model: a module that is or holds such layers, with weights of float32, bfloat16 or float16. On the
            meta device the alphas get their values when a checkpoint is loaded, or by :func:`calibrate_`.
        quantizer: grid, scale and straight-through estimator of all weights that no rule names; None
            leaves those alone.
        activation: how the inputs of quantized linear layers, convolutions and experts of ``transformers`` are
            quantized in each forward. A row is a token, what the last dimension holds; of convolutions, a
            sample. Other modules ignore it. FOGZO perturbs weights only.
        rules: pairs (which, quantizer or None); the first whose ``which`` matches a module decides, and None
            leaves it alone. A third entry is these modules' own ``activation``. ``which`` is a name as
            ``model.named_modules()`` gives it, where ``*`` and ``?`` stand for anything, or a type; both also
            match all that lies in a matching module. It may be the name of a parameter,
            ``"*.experts.down_proj"``, of any module: of one that is unknown, the parameter's first dimension
            counts outputs, or experts if it has three. Or it is a function of name and module that says whether
            it matches.
        skip: what to leave alone: one such ``which`` or a list of them, as rules that come first.
        backend: of the modules' ops; None takes the best available at each call.

    Returns:
        What was done; print it.

    Raises:
        TypeError, ValueError: an argument is wrong, does not fit a weight, matches nothing or asks for what
            cannot be quantized, or one of several modules that share a weight would use it unquantized. The
            model is then as it was.
    """
    checks.instance("model", model, nn.Module)
    check_quantizer("quantizer", quantizer)
    check_quantizer("activation", activation)
    if activation is not None:
        check_activation("activation", activation)
    check_known(backend)
    reshard(model)
    replaced = bool(replaced_in(model.named_modules()))
    default = Checked("", "*", quantizer, activation)
    choices = choose(units_of(model), default, rules, skip, may_be_none=replaced)
    chosen = [(c.unit, c.quantizer, c.activation) for c in choices if c.quantizer is not None]
    check_shared(model, {unit.home: q for unit, q, _ in chosen})
    pretrained.check_config(model)
    quantized = (m for m in model.modules() if isinstance(m, QuantizedWeight))
    next_id = max((m.tensor_id + (m.expert_count or 1) for m in quantized), default=0)
    made: dict[Tensor, tuple[int, Tensor]] = {}  # a shared weight has one tensor id and equal alphas
    plan: list[Callable[[], QuantizedWeight]] = []
    for unit, q, own in chosen:
        weight = unit.weights[unit.parameter]
        if weight not in made:
            made[weight] = next_id, alpha_for(unit, whole(weight), q)
            next_id += weight.shape[0] if unit.dims and unit.dims.is_stack else 1
        tensor_id, alpha = made[weight]
        how = WeightQuantizer(q, tensor_id, unit.name, backend)
        plan.append(quantizing(unit, how, alpha.clone(), own))
    for quantize in plan:
        quantize()
    HANDLERS.begin_anew(model)
    settle(model)
    link(model)
    pretrained.record(model)
    return report_of(choices)


def alpha_for(unit: Unit, weight: Tensor, quantizer: Quantizer) -> Tensor:
    """The alpha that a quantizer's scale makes of a unit's weight; raises if it does not fit."""
    if unit.dims is not None:
        return alpha_of(unit.paths[0], weight, unit.dims.rows, quantizer, unit.dims.expert_outputs)
    assert unit.form is not None
    return alpha_of(unit.paths[0], weight, unit.form.OUTPUTS, quantizer)


def quantizing(
    unit: Unit, how: WeightQuantizer, alpha: Tensor, activation: Quantizer | None
) -> Callable[[], QuantizedWeight]:
    """What quantizes a unit in place."""
    if unit.dims is None:
        assert unit.form is not None
        return partial(unit.form.from_plain, unit.module, how, alpha=alpha, activation=activation)
    home, name = unit.home
    reader = None if home is unit.module else unit.module
    return partial(hold, home, name, unit.dims, how, alpha=alpha, activation=activation, reader=reader)


def _quantized(model: nn.Module, what: str) -> list[QuantizedWeight]:
    modules: list[QuantizedWeight] = list(pretrained.quantized_in(model, what).values())
    if any(m.pass_weight is not None for m in modules):
        raise RuntimeError(f"model must not be inside a pass of Fogzo to {what} it: end the step first")
    return modules


@torch.no_grad()
def calibrate_(model: nn.Module, scale: Scale | None = None) -> None:
    """Make the alphas of a quantized model anew, each by its scale from the weight as it is now.

    Args:
        model: as :func:`quantize_model` made it.
        scale: from now on the scale of all its quantizers; None keeps each module's own.

    Raises:
        TypeError, ValueError, RuntimeError: an argument is wrong, or a scale does not fit a weight; nothing has
            changed then.
    """
    modules = _quantized(model, "calibrate")
    reshard(model)
    if scale is not None:
        checks.instance("scale", scale, Scale)
        if any(LearnedScale in (type(scale), type(m.quantizer.scale)) for m in modules):
            raise ValueError(
                f"scale must not turn a learned alpha into another or back, got {scale}: call"
                " dequantize_model(model, latents=True), then quantize_model"
            )
    plan = []
    for m in modules:
        q = m.quantizer if scale is None else replace(m.quantizer, scale=scale)
        plan.append((q, m.alpha_by(q)))
    for m, (q, alpha) in zip(modules, plan, strict=True):
        m.quantizer = q
        m.set_alpha(alpha)
        m.lay_out()
    pretrained.record(model)


def calibrate_inputs_(model: nn.Module, run: Callable[[], Any]) -> None:
    """Give the learned scales of activations their first values, from one run of the model.

    Each module takes the first input that it gets: alpha = 2 mean abs(x) / sqrt(qmax) (LSQ, Esser et al. 2020,
    arXiv 1902.08153), or what the scale's ``init`` says. On several devices, call it before the model is
    wrapped, with the same batch, so that all of them begin with the same scales.

    Args:
        model: as :func:`fogzo_kernels.quantize_model` made it, with a learned scale in ``activation``.
        run: runs the model forward, ``lambda: model(batch)``, say, as it is: in training mode BatchNorm takes
            part and dropout draws. No gradient is computed.

    Raises:
        TypeError, ValueError: an argument is wrong, an input is all 0 or not finite, or ``run`` did not reach
            one of the modules; no scale has changed then.
    """
    checks.instance("model", model, nn.Module)
    if not callable(run):
        raise TypeError(f"run must be a function that runs the model, got {type(run).__name__}")
    inputs = [
        (name or "model", m, q)
        for name, m in model.named_modules()
        if isinstance(m, QuantizedWeight) and (q := m.input_quantizer) is not None and q.quantizer.learned
    ]
    if not inputs:
        raise ValueError("model must have quantized modules whose inputs have a learned scale, got none")
    before = [(m.input_alpha.detach().clone(), q.calibrated) for _, m, q in inputs]
    for _, _, q in inputs:
        q.calibrating = True
    try:
        with torch.no_grad():
            run()
        left = [name for name, _, q in inputs if q.calibrating]
        if left:
            raise ValueError(
                f"run must reach every module whose input has a learned scale, got none for {left[0]}"
                + (f" and {len(left) - 1} more" if left[1:] else "")
            )
    except BaseException:
        for (_, m, q), (alpha, calibrated) in zip(inputs, before, strict=True):
            q.set_alpha(m, alpha)
            q.calibrated = calibrated
        raise
    finally:
        for _, _, q in inputs:
            q.calibrating = False


@torch.no_grad()
def dequantize_model(model: nn.Module, *, latents: bool = False) -> nn.Module:
    """Turn a quantized model back into plain modules, in place, which hold Q(weight).

    The way to what knows plain modules only: ``torch.jit``, ONNX, torchao, strict loading. The latents are
    overwritten: ``copy.deepcopy`` the model before to go on training it. ``state_dict()`` is then that of the
    plain model, and an estimator or optimizer made for the quantized one is of no more use.

    Args:
        model: as :func:`quantize_model` made it.
        latents: keep the latents as weights instead, to quantize them in another way.

    Returns:
        ``model``, or where it is a quantized module itself, that module, now a plain one.

    Raises:
        TypeError, ValueError, RuntimeError: an argument is wrong, or an alpha out of range; nothing has changed
            then.
    """
    modules = _quantized(model, "dequantize")
    if any(m.placement is not LOCAL for m in modules):
        raise ValueError(
            "model must not be under fully_shard to be dequantized, got one that is: load its full state dict"
            " into a quantized model of one process, and dequantize that"
        )
    if not latents:
        for m in modules:
            check(m)
            memory.alphas([m.alpha], m.quantizer.grid.r)
        for weight, m in {m.latent: m for m in modules}.items():
            weight.copy_(m.effective_weight())
    for m in modules:
        if isinstance(m, QuantizedModule):
            m.to_plain()
    let_go(model)
    settle(model)
    pretrained.record(model)
    return model
