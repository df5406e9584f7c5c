"""safetensors and load: any quantized model in a file that a few lines of NumPy read."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..distributed.packing import code_bits, pack_codes, unpack_codes
from ..functional import dequantize, hadamard
from ..nn.dims import Dims
from ..nn.held import CHILD, HeldWeight, let_go
from ..nn.module import QuantizedModule
from ..nn.pretrained import quantized_in, quantized_modules
from ..nn.registry import quantized_form, quantizing
from ..nn.weight import WeightQuantizer
from ..ops import checks
from ..spec.grid import Grid
from ..spec.hadamard import Hadamard
from ..spec.quantizer import Quantizer
from ..spec.scale import Scale
from ..spec.straight_through import StraightThrough
from .files import whole
from .integers import copied, plain_tensors

FORMAT, VERSION = "fogzo", "2"
READ = ("1", VERSION)


def safetensors(model: nn.Module, file: str | os.PathLike[str]) -> None:
    """Write any quantized model as a safetensors file: packed codes, alphas, and all other tensors as they are.

    For each quantized weight X the file has ``X.codes``, uint8, and ``X.alpha``, float32. A row of codes
    belongs to one output, or to one expert of a stack: a little-endian stream of code - qmin, filled up to
    bytes. The metadata has ``format``, ``version``, ``tied`` (names that share a weight with another) and, as
    JSON, ``quantized``: for each X its shape, the bits of a code, the grid (qmin, qmax, offset, r), the order
    of the shape's dimensions in the rows, the block of the transform, and the quantizer of the module's input.

    Args:
        model: a model that :func:`fogzo_kernels.quantize_model` quantized, of any architecture.
        file: path of the file. It is complete or absent; an old file is replaced.

    Raises:
        TypeError, ValueError: ``model`` has no quantized modules.
        OSError: the file cannot be written; an old file stays.
        ModuleNotFoundError: ``safetensors`` is not installed.

    Example:
        >>> model = torch.nn.Linear(64, 64)
        >>> report = fk.quantize_model(model, fk.presets.fixed(2, 0.1))
        >>> fk.export.safetensors(model, "model.safetensors")
    """
    from safetensors.torch import save_file

    modules = quantized_in(model, "export")
    tensors: dict[str, Tensor] = {}
    quantized: dict[str, Any] = {}
    tied: dict[str, str] = {}
    first: dict[int, str] = {}
    for key, t in plain_tensors(model).items():
        if first.setdefault(id(t), key) != key:
            tied[key] = first[id(t)]
        else:
            tensors[key] = copied(t)
    for name, m in modules.items():
        key = m.weight_key(f"{name}.").lstrip(".")
        if "input_alpha" in m._parameters:
            tensors[f"{name}.input_alpha".lstrip(".")] = copied(m.input_alpha)
        if first.setdefault(id(m.latent), key) != key:
            tied[key] = first[id(m.latent)]
            continue
        grid, transform = m.quantizer.grid, m.quantizer.transform
        order = (m.OUTPUTS, *(d for d in range(m.latent.ndim) if d != m.OUTPUTS))
        codes = m.codes()
        if m.EXPERT_OUTPUTS is not None:
            order = m.order()
            codes = codes.view(m.latent.shape).permute(order).flatten(1).contiguous()
        tensors[f"{key}.codes"] = pack_codes(codes.cpu(), grid, code_bits(grid))
        tensors[f"{key}.alpha"] = copied(m.alpha)
        quantized[key] = {
            "shape": tuple(m.latent.shape),
            "bits": code_bits(grid),
            **asdict(grid),
            "order": order,
            "transform": transform and transform.block,
            "activation": m.activation and m.activation.to_dict(),
            "straight_through": asdict(m.quantizer.straight_through),
            "dims": m.letters if isinstance(m, HeldWeight) else None,
        }
    said = {"quantized": json.dumps(quantized), "tied": json.dumps(tied)}
    metadata = {"format": FORMAT, "version": VERSION, **said}
    with whole(file) as place:
        save_file(tensors, place, metadata=metadata)


class Weight(NamedTuple):
    """A quantized weight of a file."""

    values: Tensor  # float32, in the model's basis also where the weight is rotated
    alpha: Tensor
    quantizer: Quantizer
    activation: Quantizer | None
    dims: str | None  # letters of a parameter that is held

    @classmethod
    def of(cls, data: dict[str, Any], stream: Tensor, alpha: Tensor) -> Weight:
        """Reads an entry of ``quantized`` with its packed codes."""
        grid = Grid(*(data[name] for name in ("qmin", "qmax", "offset", "r")))
        transform = None if data["transform"] is None else Hadamard(data["transform"])
        how = Quantizer(grid, Scale.fixed(alpha), StraightThrough(**data["straight_through"]), transform)
        activation = None if data["activation"] is None else Quantizer.from_dict(data["activation"])
        shape = data["shape"]
        if "outputs" in data:  # of version 1
            order = [data["outputs"], *(d for d in range(len(shape)) if d != data["outputs"])]
        else:
            order = data["order"]
        lies = [shape[d] for d in order]
        codes = unpack_codes(stream, math.prod(lies[1:]), grid, code_bits(grid))
        rows = dequantize(codes, alpha, grid=grid, dtype=torch.float32)
        if transform is not None:
            rows = hadamard(rows, block=transform.block)
        values = rows.view(lies).permute([order.index(d) for d in range(len(order))])
        return cls(values, alpha, how, activation, data.get("dims"))


#: Plain tensors, quantized weights, and for each tied weight the name that has its values.
Content = tuple[dict[str, Tensor], dict[str, Weight], dict[str, str]]


@torch.no_grad()
def load(file: str | os.PathLike[str], model: nn.Module) -> nn.Module:
    """Put the content of a file of :func:`safetensors` into a model of the same architecture, for inference.

    Modules become plain modules with the quantized values. With a transform or quantized inputs they become
    quantized modules with fixed scales. The outputs equal the written model's, bit for bit, in the same
    dtype and on the same device.

    Args:
        file: path of a file of :func:`safetensors`.
        model: a plain model, or one that :func:`fogzo_kernels.quantize_model` quantized.

    Returns:
        ``model``, changed in place.

    Raises:
        ValueError: the file is damaged, of another format, or does not fit the model. The model is then as it
            was.
        FileNotFoundError: there is no file.
        ModuleNotFoundError: ``safetensors`` is not installed.

    Example:
        >>> model = torch.nn.Linear(8, 4)
        >>> report = fk.quantize_model(model, fk.presets.fixed(2, 0.1))
        >>> fk.export.safetensors(model, "linear.safetensors")
        >>> loaded = fk.export.load("linear.safetensors", torch.nn.Linear(8, 4))
        >>> torch.equal(loaded.weight, model.effective_weight())
        True
    """
    checks.instance("model", model, nn.Module)
    tensors, quantized, tied = content = read(file)
    check_fits(file, content, model)
    let_go(model)
    modules, state = dict(model.named_modules()), model.state_dict(keep_vars=True)
    for key, w in quantized.items():
        names = [key, *(name for name, other in tied.items() if other == key)]
        if w.dims is not None and not w.values.is_contiguous():  # products of it round as they did
            state[key].data = w.values.to(state[key])
        state[key].copy_(w.values)
        if w.quantizer.transform is None and w.activation is None:
            continue
        alpha = w.alpha.to(state[key].device)
        how = replace(w.quantizer, scale=Scale.fixed(alpha))
        for name in names:
            path = name.rpartition(".")[0]
            part, dims = (path, None) if w.dims is None else (name, Dims(w.dims))
            module = quantizing(modules, part, dims, WeightQuantizer(how, 0, path), alpha, w.activation)()
            input_alpha = tensors.get(f"{path if dims is None else name + CHILD}.input_alpha".lstrip("."))
            if input_alpha is not None and module.input_quantizer is not None:
                module.input_quantizer.set_alpha(module, input_alpha.to(alpha.device))
    for name, t in tensors.items():
        if name in state and name not in quantized:
            state[name].copy_(t)
    return model


def read(file: str | os.PathLike[str]) -> Content:
    """Reads a file; raises if it is damaged, or not of this format and version."""
    from safetensors import SafetensorError, safe_open

    if not Path(file).exists():
        raise FileNotFoundError(f"file must be there, got {file}")
    try:
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata() or {}
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118  it is no dict
    except (SafetensorError, OSError) as error:
        raise ValueError(f"file must be of safetensors and whole, got {file}: {error}") from error
    kind = metadata.get("format"), metadata.get("version")
    if kind not in [(FORMAT, version) for version in READ]:
        raise ValueError(
            f"file must be of format {FORMAT} and version {' or '.join(READ)}, got {kind} in {file}"
        )
    try:
        quantized = {
            key: Weight.of(data, tensors.pop(f"{key}.codes"), tensors.pop(f"{key}.alpha"))
            for key, data in json.loads(metadata["quantized"]).items()
        }
        return tensors, quantized, json.loads(metadata["tied"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"file must have its weights and say how they are quantized, got {file}: {error!r}"
        ) from error


def check_fits(file: object, content: Content, model: nn.Module) -> None:
    """Raise unless a file has what a model has, in the same shapes."""
    tensors, quantized, tied = content
    shapes = {name: tuple(t.shape) for name, t in tensors.items()}
    modules = dict(model.named_modules())
    there = {name: tuple(t.shape) for name, t in plain_tensors(model).items()}
    own = quantized_modules(model)
    there |= {m.weight_key(f"{n}.").lstrip("."): tuple(m.latent.shape) for n, m in own.items()}
    for key in (*quantized, *tied):
        shapes.pop(key.removesuffix("weight") + "input_alpha", None)
        shapes.pop(f"{key}{CHILD}.input_alpha", None)
    shapes |= {key: tuple(w.values.shape) for key, w in quantized.items()}
    shapes |= {name: shapes[other] for name, other in tied.items()}
    odd = sorted(there.keys() ^ shapes.keys()) or sorted(n for n in there if there[n] != shapes[n])
    if odd:
        name = odd[0]
        raise ValueError(
            f"file must fit the model, got {name} of shape {shapes.get(name)} in {file} and of shape"
            f" {there.get(name)} in the model{f', and {len(odd) - 1} more' if odd[1:] else ''}"
        )
    for key, w in quantized.items():
        module = modules.get(key.rpartition(".")[0])
        if w.dims is not None:
            continue
        if not isinstance(module, QuantizedModule) and (module is None or quantized_form(module) is None):
            raise ValueError(f"model must have a module for {key} that can be quantized, got {module}")
