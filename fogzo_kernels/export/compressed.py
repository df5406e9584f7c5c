"""compressed_tensors: what transformers' ``from_pretrained`` and vLLM load (``pack-quantized``)."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..nn.held import HeldWeight
from ..nn.linear import QuantLinear
from ..nn.pretrained import quantized_in
from ..nn.quantized import QuantizedWeight
from .files import whole
from .integers import bits_of, check_exact, check_fits, copied, integers_of, plain_tensors, reason_against_held

CONFIG, WEIGHTS = "config.json", "model.safetensors"
#: What matches the names of experts in a checkpoint.
EXPERTS = r"re:.*\.experts\..*"


class Packed(NamedTuple):
    """A linear layer of a checkpoint, as integers."""

    name: str
    numbers: Tensor  # int16, (rows, columns)
    scale: Tensor  # float32: one element, (rows, 1) or (rows, groups)
    bits: int
    is_expert: bool


def compressed_tensors(model: nn.Module, folder: str | os.PathLike[str], *, bits: int | None = None) -> None:
    """Write a quantized model of ``transformers`` in the format ``pack-quantized`` of compressed-tensors.

    ``AutoModelForCausalLM.from_pretrained(folder)`` has the same logits, bit for bit, in the model's dtype.
    vLLM loads the folder too. Save the tokenizer beside it. Codes of a grid with an offset become odd numbers
    at half of delta, with one more bit. Experts become single linear layers under the names of their
    checkpoints. ``transformers`` then loads all weights as values, and wants one scheme for the linear layers
    and one for the experts.

    Args:
        model: a model of ``transformers`` that :func:`fogzo_kernels.quantize_model` quantized.
        folder: a new or empty folder, or an earlier export, which the call replaces. It is there whole or not
            at all.
        bits: bits of a code in the file, 2 to 8. vLLM on a CPU takes 4 only. Values stay the same; the file's
            metadata keeps the bits that the grids need as ``code_bits``. None: as many as each grid needs.

    Raises:
        TypeError, ValueError: the format cannot hold the model. The message names the module and the reason;
            nothing is written then.
        FileNotFoundError, FileExistsError, OSError: the folder cannot be written; an old one stays.
        ModuleNotFoundError: ``compressed-tensors`` is not installed.

    Example:
        >>> import transformers
        >>> sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 64}
        >>> model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_attention_heads=2))
        >>> report = fk.quantize_model(model, fk.presets.fixed(2, 0.0625), skip=torch.nn.Embedding)
        >>> fk.export.compressed_tensors(model, "exported")
    """
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
    from safetensors.torch import save_file

    modules = quantized_in(model, "export")
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "to_dict"):
        raise TypeError(f"model must be one of transformers, with a config, got {type(model).__name__}")
    if bits is not None and (isinstance(bits, bool) or bits not in range(2, 9)):
        raise ValueError(f"bits must be None or an int from 2 to 8, got {bits!r}")
    tied = bool(getattr(config, "tie_word_embeddings", False))
    for name, m in modules.items():
        check_module(name, m, tied and name == "lm_head", bits)
    dtype = next(iter(modules.values())).latent.dtype
    packed = [one for name, m in modules.items() for one in layers_of(model, name, m, bits)]
    has_experts = any(one.is_expert for one in packed)
    tensors: dict[str, Tensor] = {}
    for one in packed:
        check_exact(one.name, one.scale, dtype)
        tensors[f"{one.name}.weight_packed"] = pack_to_int32(one.numbers.to(torch.int8), one.bits)
        tensors[f"{one.name}.weight_scale"] = one.scale.to(dtype).contiguous()
        tensors[f"{one.name}.weight_shape"] = torch.tensor(one.numbers.shape)
    left = ["lm_head.weight"] * tied  # which is the embedding's
    plain = {key: copied(t) for key, t in plain_tensors(model).items() if key not in left}
    tensors |= in_checkpoint(model, plain) if has_experts else plain
    quantization = quantization_of(model, packed)
    if has_experts:
        check_schemes(quantization)
        quantization["dequantize"] = True  # transformers has no layers for single experts
    written = {**config.to_dict(), "quantization_config": quantization}
    metadata = {"format": "pt", "code_bits": json.dumps(sorted({needed(m) for m in modules.values()}))}
    with whole(folder, CONFIG) as place:
        (place / CONFIG).write_text(json.dumps(written, indent=1, default=str))
        save_file(tensors, place / WEIGHTS, metadata=metadata)
        generation: Any = getattr(model, "generation_config", None)
        if generation is not None:
            generation.save_pretrained(place)


def needed(module: QuantizedWeight) -> int:
    """How many bits the format needs for a module's codes."""
    return max(bits_of(module.quantizer.grid), 2)


def check_module(name: str, module: QuantizedWeight, is_tied_head: bool, bits: int | None) -> None:
    """Raise unless the format holds a module."""
    transform, grid = module.quantizer.transform, module.quantizer.grid
    held, is_linear = isinstance(module, HeldWeight), isinstance(module, QuantLinear)
    is_linear |= module.expert_count is not None
    outputs, columns = matrix_of(module)
    groups = module.alpha.numel() // ((module.expert_count or 1) * outputs)
    reasons = {
        reason_against_held(module): held and not is_linear,
        f"it holds linear layers only, got {type(module).__name__}": not is_linear,
        f"it has no transforms, got {transform}": transform is not None,
        "quantized inputs are not written": module.activation is not None,
        f"{grid} takes 9 bits as odd numbers, and it has 8": bits_of(grid) > 8,
        f"{grid} takes {needed(module)} bits, and bits={bits}": bits is not None and needed(module) > bits,
        "transformers does not load a head that is quantized and tied to the embedding": is_tied_head,
        "groups must divide a row": columns % max(groups, 1) != 0,
    }
    check_fits(name, "compressed-tensors", reasons)


def matrix_of(module: QuantizedWeight) -> tuple[int, int]:
    """Outputs and columns of a weight, or of an expert."""
    first, *others = module.latent.shape[-2:] if module.expert_count is not None else module.latent.shape
    columns = math.prod(others)
    return (columns, first) if module.EXPERT_OUTPUTS == 2 else (first, columns)


def layers_of(model: nn.Module, name: str, module: QuantizedWeight, bits: int | None) -> Iterator[Packed]:
    """Yields the linear layers of a checkpoint that a module stands for."""
    numbers, scale = integers_of(module)
    wide = bits or needed(module)
    if module.expert_count is None:
        yield Packed(name, numbers, scale.reshape(1) if scale.numel() == 1 else scale, wide, False)
        return
    key, (outputs, columns) = module.weight_key(f"{name}."), matrix_of(module)
    rows = numbers.view(module.latent.shape)
    each = scale.repeat_interleave(outputs * columns // scale.shape[1], dim=1).view(-1, outputs, columns)
    each = each.mT if module.EXPERT_OUTPUTS == 2 else each
    group = min(outputs * columns // scale.shape[1], columns)
    split, scales = (in_checkpoint(model, {key: t.float()}) for t in (rows, each))
    for where, own in split.items():
        if own.ndim != 2:
            raise ValueError(
                f"{name} must fit compressed-tensors: a checkpoint of {type(model).__name__} keeps all experts"
                " in one tensor, which it does not pack. fk.export.safetensors holds any model, and"
                " fk.dequantize_model(model) makes a plain one to save as ever"
            )
        yield Packed(where.removesuffix(".weight"), own.to(torch.int16), scales[where][:, ::group], wide, True)


def in_checkpoint(model: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a model by the names and in the shapes of its checkpoints, as ``save_pretrained`` has them."""
    from transformers.core_model_loading import revert_weight_conversion

    return {key: t.contiguous().clone() for key, t in revert_weight_conversion(model, tensors).items()}


def check_schemes(config: dict[str, Any]) -> None:
    """Raise unless transformers tells the schemes of a mixture apart: one of experts and one of others."""
    groups = config["config_groups"].values()
    experts = [g for g in groups if g["targets"] == [EXPERTS]]
    if len(experts) > 1 or len(groups) - len(experts) > 1:
        raise ValueError(
            "model must have one kind of bits and scales for all experts, and one for all linear layers, for a"
            f" mixture in compressed-tensors, got {len(experts)} and {len(groups) - len(experts)}"
        )


def quantization_of(model: nn.Module, layers: list[Packed]) -> dict[str, Any]:
    """Makes the entry of config.json, which has a group of layers for each scheme."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme

    schemes: dict[tuple[str, bool], tuple[QuantizationArgs, list[str]]] = {}
    for one in layers:
        (rows, columns), count = one.numbers.shape, one.scale.numel()
        how: dict[str, Any] = {"strategy": "tensor" if count == 1 and rows > 1 else "channel"}
        if count > rows:
            how = {"strategy": "group", "group_size": rows * columns // count}
        args = QuantizationArgs(num_bits=one.bits, type="int", symmetric=True, dynamic=False, **how)
        schemes.setdefault((args.model_dump_json(), one.is_expert), (args, []))[1].append(one.name)
    named = {one.name for one in layers}
    left = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n not in named]
    config: dict[str, Any] = QuantizationConfig(
        config_groups={
            f"group_{i}": QuantizationScheme(
                targets=[EXPERTS] if is_expert else names, weights=args, format="pack-quantized"
            )
            for i, ((_, is_expert), (args, names)) in enumerate(schemes.items())
        },
        format="pack-quantized",
        quantization_status="compressed",  # or the loader keeps random weights without a word
        ignore=left,
    ).model_dump(mode="json")
    return config
