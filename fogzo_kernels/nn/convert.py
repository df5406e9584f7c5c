"""quantize_model and back, calibrate_, calibrate_inputs_: a model's modules, in place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..backends import check_known
from ..ops import checks, memory
from ..spec.checks import hinted
from ..spec.quantizer import Quantizer
from ..spec.scale import LearnedScale, Scale
from . import pretrained
from .held import let_go
from .inputs import check_activation
from .quantized import QuantizedWeight
from .registry import Unit, quantizing, units_of
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
    """Quantize the weights of a model, in place, and report which weights were quantized and which were not.

    Linear layers, convolutions and transposed convolutions, ``nn.Embedding``, ``nn.EmbeddingBag``,
    ``nn.Bilinear`` and subclasses of these then run with Q(weight). So do recurrent layers,
    ``nn.MultiheadAttention``, the experts and the ``Conv1D`` of ``transformers``, and the parameters that
    :func:`declare_weights` names. All other modules stay as they are unless a rule names one of their
    parameters.

    Parameters, hooks and names stay: optimizers keep their parameters, and checkpoints of the plain model load.
    Tied weights are quantized once, and share their alpha and noise. In a stack of experts (one parameter of
    three dimensions) each expert is a weight with its own scale and noise.

    Call it again for modules that an earlier call left alone, or after you replaced a quantized module with a
    plain one. Until then such a model neither trains nor saves.

    Args:
        model: a module that is or holds such layers, with weights of float32, bfloat16 or float16. On the meta
            device the alphas get their values from a checkpoint, or from :func:`calibrate_`.
        quantizer: the quantizer of all weights that no rule names. None: they stay as they are.
        activation: the quantizer of the inputs of quantized linear layers, convolutions and experts of
            ``transformers``, in each forward. A row is a token (the last dimension), or of a convolution a
            sample. Other modules ignore it. FOGZO perturbs only weights. None: inputs stay as they are.
        rules: pairs (which, quantizer or None), or triples with an ``activation`` of their own; the first that
            matches a module decides. ``which`` is a name as in ``model.named_modules()``, where ``*`` and ``?``
            stand for anything; or a type; or a function of name and module that returns a bool. A name or a
            type also matches all modules inside. A name may also name a parameter, such as
            ``"*.experts.down_proj"``, of any module: if its class is unknown, the first dimension counts
            outputs, or experts where there are three.
        skip: one ``which``, or a list of them, to leave alone; they come before all rules.
        backend: backend of the modules' ops. None: the best one for the device, at each call.

    Returns:
        A :class:`Report`; print it.

    Raises:
        TypeError, ValueError: an argument is wrong, does not fit a weight, matches nothing, or asks for a
            weight that cannot be quantized; or one of several modules that share a weight would use it without
            quantization. The model is then as it was.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 16), torch.nn.ReLU(), torch.nn.Linear(16, 10))
        >>> report = fk.quantize_model(model, fk.presets.lsq(2), skip="2")
        >>> [row.name for row in report.quantized], [row.name for row in report.left]
        (['0'], ['2'])
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
    modules = dict(model.named_modules(remove_duplicate=False))
    made: dict[Tensor, tuple[int, Tensor]] = {}  # a shared weight has one tensor id and equal alphas
    plan: list[Callable[[], QuantizedWeight]] = []
    for unit, q, own in chosen:
        weight = unit.weights[unit.parameter]
        if weight not in made:
            made[weight] = next_id, alpha_for(unit, whole(weight), q)
            next_id += weight.shape[0] if unit.dims and unit.dims.is_stack else 1
        tensor_id, alpha = made[weight]
        how = WeightQuantizer(q, tensor_id, unit.name, backend)
        plan.append(quantizing(modules, unit.name, unit.dims, how, alpha.clone(), own))
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


def _quantized(model: nn.Module, what: str) -> list[QuantizedWeight]:
    modules: list[QuantizedWeight] = list(pretrained.quantized_in(model, what).values())
    if any(m.pass_weight is not None for m in modules):
        raise RuntimeError(f"model must not be inside a pass of Fogzo to {what} it: end the step first")
    return modules


@torch.no_grad()
def calibrate_(model: nn.Module, scale: Scale | None = None) -> None:
    """Compute the alphas of a quantized model again, each by its scale from the current weight.

    Args:
        model: a model that :func:`quantize_model` quantized.
        scale: a new scale for all its quantizers. None: each keeps its own.

    Raises:
        TypeError, ValueError, RuntimeError: an argument is wrong, or a scale does not fit a weight. Nothing has
            changed then.

    Example:
        >>> model = torch.nn.Linear(2, 1)
        >>> report = fk.quantize_model(model, fk.presets.fixed(2, 0.1))
        >>> fk.calibrate_(model, fk.Scale.fixed(0.25))
        >>> model.alpha
        tensor(0.2500)
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
    quantizers = [m.quantizer if scale is None else replace(m.quantizer, scale=scale) for m in modules]
    alphas = [m.alpha_by(q) for m, q in zip(modules, quantizers, strict=True)]
    for m, q, alpha in zip(modules, quantizers, alphas, strict=True):
        m.quantizer = q
        m.set_alpha(alpha)
        m.lay_out()
    pretrained.record(model)


def calibrate_inputs_(model: nn.Module, run: Callable[[], Any]) -> None:
    """Give the learned scales of activations their first values, from one run of the model.

    Each module takes its first input x: alpha = 2 mean abs(x) / sqrt(qmax) (LSQ, arXiv 1902.08153), or the
    value of the scale's ``init``. With several processes, call it before you wrap the model, with the same
    batch in each, so that all start with the same scales.

    Args:
        model: a model that :func:`quantize_model` quantized, with a learned scale in ``activation``.
        run: a function that runs the model forward, such as ``lambda: model(batch)``. In training mode
            BatchNorm updates its statistics and dropout draws. No gradient is computed.

    Raises:
        TypeError, ValueError: an argument is wrong, an input is all 0 or not finite, or ``run`` did not reach
            one of the modules. No scale has changed then.

    Example:
        >>> model = torch.nn.Linear(8, 4)
        >>> report = fk.quantize_model(model, fk.presets.lsq(4), activation=fk.presets.lsq(8))
        >>> fk.calibrate_inputs_(model, lambda: model(torch.ones(2, 8)))
        >>> round(model.input_alpha.item(), 4)
        0.1775
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
    """Turn a quantized model back into plain modules that hold Q(weight), in place.

    Call it before ``torch.jit``, ONNX, torchao or strict loading. It overwrites the latents: ``copy.deepcopy``
    the model first if you want to train on. ``state_dict()`` then has the plain model's keys. Estimators and
    optimizers of the quantized model are of no further use.

    Args:
        model: a model that :func:`quantize_model` quantized.
        latents: keep the latents as weights, to quantize them in another way.

    Returns:
        ``model``; if it is itself a quantized module, the same module, now plain.

    Raises:
        TypeError, ValueError, RuntimeError: an argument is wrong, or an alpha is out of range. Nothing has
            changed then.

    Example:
        >>> model = torch.nn.Linear(8, 4)
        >>> report = fk.quantize_model(model, fk.presets.fixed(2, 0.5))
        >>> type(fk.dequantize_model(model)).__name__, set(model.weight.flatten().tolist()) <= {-0.5, 0.0, 0.5}
        ('Linear', True)
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
    let_go(model)
    settle(model)
    pretrained.record(model)
    return model
