"""compressed_tensors: what transformers' ``from_pretrained`` and vLLM load (``pack-quantized``)."""

from __future__ import annotations

import json
import os
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.linear import QuantLinear
from ..nn.module import QuantizedModule
from ..nn.pretrained import quantized_in
from .files import whole
from .integers import bits_of, check_exact, check_fits, copied, integers_of, plain_tensors

CONFIG, WEIGHTS = "config.json", "model.safetensors"


def compressed_tensors(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write a quantized transformers model in the format ``pack-quantized`` of compressed-tensors.

    ``AutoModelForCausalLM.from_pretrained(folder)`` has the same logits bit for bit, in the model's dtype; vLLM
    loads the folder too. A tokenizer is to be saved beside it. Codes of a grid with an offset are written as
    odd numbers at half of delta, in a bit more.

    Args:
        model: as :func:`quantize_model` made it from a model of transformers.
        folder: new, empty, or an export of before, which is replaced. It is there whole or not at all.

    Raises:
        TypeError, ValueError: the format cannot hold the model; the message names the module and the reason.
            Nothing is written then.
        FileNotFoundError, FileExistsError, OSError: the folder cannot be written; what was there stays.
        ModuleNotFoundError: ``compressed-tensors`` is not installed.
    """
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
    from safetensors.torch import save_file

    modules = quantized_in(model, "export")
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "to_dict"):
        raise TypeError(f"model must be one of transformers, with a config, got {type(model).__name__}")
    tied = bool(getattr(config, "tie_word_embeddings", False))
    for name, m in modules.items():
        transform, grid, rows = m.quantizer.transform, m.quantizer.grid, m.weight.shape[0]
        reasons = {
            f"it holds linear layers only, got {type(m).__name__}": not isinstance(m, QuantLinear),
            f"it has no transforms, got {transform}": transform is not None,
            "quantized inputs are not written": m.activation is not None,
            f"{grid} takes 9 bits as odd numbers, and it has 8": bits_of(grid) > 8,
            "transformers does not load a head that is quantized and tied to the embedding": (
                tied and name == "lm_head"
            ),
            "groups must divide a row": m.weight.shape[1] % max(m.alpha.numel() // rows, 1) != 0,
        }
        check_fits(name, "compressed-tensors", reasons)
    dtype = next(iter(modules.values())).weight.dtype
    tensors: dict[str, Tensor] = {}
    for name, m in modules.items():
        numbers, scale = integers_of(m)
        check_exact(name, scale, dtype)
        tensors[f"{name}.weight_packed"] = pack_to_int32(numbers.to(torch.int8), bits_of(m.quantizer.grid))
        scale = scale.reshape(1) if scale.numel() == 1 else scale
        tensors[f"{name}.weight_scale"] = scale.to(dtype).contiguous()
        tensors[f"{name}.weight_shape"] = torch.tensor(m.weight.shape)
    left = ["lm_head.weight"] * tied  # which is the embedding's
    tensors |= {key: copied(t) for key, t in plain_tensors(model).items() if key not in left}
    written = {**config.to_dict(), "quantization_config": quantization_of(model, modules)}
    with whole(folder, CONFIG) as place:
        (place / CONFIG).write_text(json.dumps(written, indent=1, default=str))
        save_file(tensors, place / WEIGHTS, metadata={"format": "pt"})
        generation: Any = getattr(model, "generation_config", None)
        if generation is not None:
            generation.save_pretrained(place)


def quantization_of(model: nn.Module, modules: dict[str, QuantizedModule]) -> dict[str, Any]:
    """Makes the entry of config.json, which has a group of modules for each scheme."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme

    schemes: dict[str, tuple[QuantizationArgs, list[str]]] = {}
    for name, m in modules.items():
        rows, count = m.weight.shape[0], m.alpha.numel()
        how: dict[str, Any] = {"strategy": "tensor" if count == 1 and rows > 1 else "channel"}
        if count > rows:
            how = {"strategy": "group", "group_size": m.weight.numel() // count}
        bits = max(bits_of(m.quantizer.grid), 2)
        args = QuantizationArgs(num_bits=bits, type="int", symmetric=True, dynamic=False, **how)
        schemes.setdefault(args.model_dump_json(), (args, []))[1].append(name)
    left = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n not in modules]
    config: dict[str, Any] = QuantizationConfig(
        config_groups={
            f"group_{i}": QuantizationScheme(targets=names, weights=args, format="pack-quantized")
            for i, (args, names) in enumerate(schemes.values())
        },
        format="pack-quantized",
        quantization_status="compressed",  # or the loader keeps random weights without a word
        ignore=left,
    ).model_dump(mode="json")
    return config
