"""``transformers``: ``from_pretrained`` loads a quantized model that ``save_pretrained`` wrote.

Import it before you load such a model: ``import fogzo_kernels.integrations.transformers``. Without it
``transformers`` warns that it does not know the type "fogzo", and loads the latents into a plain model. Saving
needs no import.

Example:
    >>> import transformers, fogzo_kernels.integrations.transformers
    >>> model = transformers.BertModel(transformers.BertConfig(num_hidden_layers=1, hidden_size=24))
    >>> report = fk.quantize_model(model, fk.presets.lsq(2))
    >>> model.save_pretrained("saved")
    >>> type(transformers.BertModel.from_pretrained("saved").pooler.dense).__name__
    'QuantLinear'
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Container, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..nn import pretrained
from ..nn.convert import dequantize_model
from ..nn.held import CHILD
from ..nn.pretrained import METHOD, Entry
from ..nn.quantized import QuantizedWeight
from ..nn.registry import quantized_form, quantizing, reason_against, reason_against_tensor
from ..nn.replaced import settle
from ..nn.state_dict import EXTRA_STATE
from ..nn.tied import check_raw_uses, link
from ..nn.weight import WeightQuantizer, alpha_of
from ..spec.scale import Scale

#: A user only imports the module.
__all__: list[str] = []


@register_quantization_config(METHOD)
class FogzoConfig(QuantizationConfigMixin):
    """The quantized modules of a checkpoint, which ``quantize_model`` writes into the model's config."""

    quant_method: Any

    def __init__(self, quantizers: Any = None, modules: Any = None, quant_method: str = METHOD) -> None:
        self.quant_method = quant_method
        self.quantizers, self.modules = quantizers, modules
        self.entries()

    def entries(self) -> dict[str, Entry]:
        """How each module is quantized, by its name in the saved model."""
        return pretrained.entries({"quantizers": self.quantizers, "modules": self.modules})


@register_quantizer(METHOD)
class FogzoQuantizer(HfQuantizer):
    """Quantize the modules of a checkpoint before ``from_pretrained`` loads its tensors into them."""

    quantization_config: FogzoConfig

    def __init__(self, quantization_config: FogzoConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        if not self.pre_quantized:
            raise ValueError(
                "quantization_config must not be given for a checkpoint that is not quantized: load it without,"
                " then call fogzo_kernels.quantize_model(model, quantizer)"
            )

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        modules = dict(model.named_modules(remove_duplicate=False))
        named = located(model, self.quantization_config.entries(), modules)
        check_all_named(model, named, modules, kwargs.get("checkpoint_files") or [])
        order = {name: i for i, (name, _) in enumerate(model.named_parameters())}  # as quantize_model has it
        plan = sorted(named.items(), key=lambda one: order.get(one[0], -1))
        for quantize in [planned(name, modules, entry) for name, entry in plan]:
            quantize()
        settle(model)
        return model

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """The dtype to load a tensor in. A cast alpha would move all values, so it raises."""
        targets = getattr(converter, "target_patterns", [])
        if any(target.rpartition(".")[2] == "alpha" for target in targets):
            got = param.get_dtype() if hasattr(param, "get_dtype") else param.dtype
            if got not in ("F32", torch.float32):
                raise ValueError(f"{targets[0]} must be float32, got {got}: was the checkpoint cast?")
        new: torch.dtype | None = super().get_new_dtype(converter, param, dtype)
        return new

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        modules = pretrained.quantized_modules(model)
        missing = [f"{name}.{key}" for name, m in modules.items() for key in not_loaded(m)]
        if missing:
            raise ValueError(
                f"the checkpoint must hold {', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''} of the"
                " modules that its config calls quantized, got none"
            )
        check_raw_uses(model)
        for m in modules.values():
            m.weight_quantizer.stale = False  # tied and loaded weights come with their alphas
            m.lay_out()
            if m.input_quantizer is not None and m.input_quantizer.quantizer.learned:
                m.input_quantizer.note(m.input_alpha)
        link(model)
        pretrained.record(model)  # by the names of this model
        vars(model).pop("is_quantized", None)  # or it has no half(), no float(): latents are ordinary tensors
        return model

    def _dequantize(self, model: PreTrainedModel, dtype: Any = None) -> nn.Module:
        return dequantize_model(model)

    def is_serializable(self) -> bool:
        return True

    is_trainable = is_qat_trainable = True


def located(model: PreTrainedModel, entries: dict[str, Entry], modules: Collection[str]) -> dict[str, Entry]:
    """Returns entries by the names of a model, the saved model or its base, maybe with another head."""
    kind, saved_as = type(model).__name__, model.config.architectures or []
    named, absent = {}, []
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    modules = {*modules, *parameters}
    for name, entry in entries.items():
        where = place(model, name, modules)
        if where is not None:
            named[where] = entry
        elif kind in saved_as or name.startswith(f"{model.base_model_prefix}."):
            raise ValueError(f"{kind} must have the quantized module {name}, got none")
        else:
            absent.append(name)
    if not named:
        raise ValueError(f"{kind} must have one of the quantized modules {', '.join(absent)}, got none")
    if absent:
        warnings.warn(f"{kind} has no {', '.join(absent)}, which {saved_as} had: left out", stacklevel=2)
    return named


def place(model: PreTrainedModel, name: str, modules: Container[str]) -> str | None:
    """Returns the name in this model of a module of the checkpoint, as transformers maps tensors."""
    base = f"{model.base_model_prefix}."
    return next((x for x in (name.removeprefix(base), base + name, name) if x in modules), None)


def check_all_named(
    model: PreTrainedModel, named: Collection[str], modules: Collection[str], files: Sequence[str]
) -> None:
    """Raise if a file has the quantizer of a module that the config does not name: it would be left plain."""
    modules = {*modules, *(f"{name}{CHILD}" for name, _ in model.named_parameters())}
    named = {*named, *(f"{name}{CHILD}" for name in named)}
    for file in files:
        if not file.endswith(".safetensors"):
            continue
        with safe_open(file, framework="pt") as tensors:
            keys = list(tensors.keys())
        for key in keys:
            where = place(model, key.removesuffix(f".{EXTRA_STATE}"), modules)
            if key.endswith(EXTRA_STATE) and where not in (None, *named):
                raise ValueError(
                    f"quantization_config must name {where}, whose quantizer the checkpoint holds, got none:"
                    " quantize_model was called for a part of the model that was saved, not for all of it"
                )


def planned(name: str, modules: Mapping[str, nn.Module], entry: Entry) -> Callable[[], QuantizedWeight]:
    """Returns what quantizes a module, with an alpha on the meta device; raises if it cannot be so."""
    how = WeightQuantizer(entry.quantizer, entry.tensor_id, name, entry.backend)
    if entry.dims is not None:
        path, _, own = name.rpartition(".")
        weight = modules[path].get_parameter(own)
        against = reason_against_tensor(name, weight)
        if against is not None or weight.ndim != len(entry.dims.letters):
            raise ValueError(
                f"{name} must be a parameter of dimensions {entry.dims} that can be quantized, got shape"
                f" {tuple(weight.shape)} ({against or 'other dimensions'})"
            )
        alpha = alpha_like(name, weight, entry, entry.dims.rows, entry.dims.expert_outputs)
    else:
        module = modules[name]
        form = quantized_form(module)
        reason = reason_against(name, module, form)
        if isinstance(reason, Exception):
            raise reason
        if form is None or reason is not None:
            raise ValueError(f"{name} must be a module that can be quantized, got one that cannot: {reason}")
        alpha = alpha_like(f"{name}.weight", module.get_parameter("weight"), entry, form.OUTPUTS)
    return quantizing(modules, name, entry.dims, how, alpha, entry.activation)


def alpha_like(
    name: str, weight: Tensor, entry: Entry, outputs: int, expert_outputs: int | None = None
) -> Tensor:
    """Returns an alpha on the meta device, of an entry's shape; raises if it does not fit the weight."""
    shape = entry.alpha
    if len(shape) == 2:  # the weight may have been resized
        shape = (weight.shape[outputs], *shape[1:])
    alpha = torch.empty(shape, dtype=torch.float32, device="meta")
    if expert_outputs is not None:
        if weight.shape[1:].numel() % shape[1]:
            raise ValueError(f"alpha must fit {name} of shape {tuple(weight.shape)}, got shape {shape}")
        return alpha
    like = replace(entry.quantizer, scale=Scale.fixed(alpha))
    return alpha_of(name, torch.empty_like(weight, device="meta"), outputs, like)


def not_loaded(module: QuantizedWeight) -> list[str]:
    """Returns the tensors that the checkpoint did not have; transformers marks each tensor that it loads."""
    own = module.own_tensors()
    missing = [x for x in own if not getattr(getattr(module, x), "_is_hf_initialized", False)]
    if vars(module).pop(EXTRA_STATE, None) is not None:  # transformers puts it there where it had none
        missing.append(EXTRA_STATE)
    return missing
