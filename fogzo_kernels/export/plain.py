"""safetensors and load: any quantized model in one file that a few lines of NumPy read."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..functional import dequantize, hadamard
from ..nn.module import QuantizedModule
from ..nn.registry import quantized_form
from ..nn.weight import WeightQuantizer
from ..ops import checks
from ..spec.grid import Grid
from ..spec.hadamard import Hadamard
from ..spec.quantizer import Quantizer
from ..spec.scale import Scale
from ..spec.straight_through import StraightThrough
from .files import whole_file
from .integers import own_names, quantized_in

FORMAT, VERSION = "fogzo", "1"


def safetensors(model: nn.Module, file: str | os.PathLike[str]) -> None:
    """Write a quantized model: packed codes, alphas, and all else as it is.

    For each quantized weight X: ``X.codes``, uint8, each row of the matrix that is quantized (one for each
    output) as a little-endian stream of code - qmin, filled up to bytes; ``X.alpha``, float32. The file's
    metadata says ``format``, ``version`` and, as JSON, ``quantized``: for each X its shape, bits of a code,
    grid (qmin, qmax, offset, r), which dimension of the shape counts outputs, block of its transform, and the
    quantizer of its module's input; and ``tied``: names that share a weight with another.

    Args:
        model: as :func:`quantize_model` made it, of any architecture.
        file: there whole or not at all; one that is there is replaced.

    Raises:
        TypeError, ValueError: ``model`` has no quantized modules.
        OSError: the file cannot be written; one that was there stays.
        ModuleNotFoundError: ``safetensors`` is not installed.
    """
    from safetensors.torch import save_file

    modules = quantized_in(model)
    own = {key for name, m in modules.items() for key in own_names(name, m)}
    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    first: dict[int, str] = {}
    for name, t in model.state_dict(keep_vars=True).items():
        if name in own:
            continue
        if id(t) in first:
            tied[name] = first[id(t)]
            continue
        first[id(t)] = name
        tensors[name] = t.detach().cpu().contiguous().clone()
    quantized: dict[str, Any] = {}
    weights: dict[int, str] = {}
    for name, m in modules.items():
        key = f"{name}.weight" if name else "weight"
        if id(m.weight) in weights:
            tied[key] = weights[id(m.weight)]
            continue
        weights[id(m.weight)] = key
        grid = m.quantizer.grid
        tensors[f"{key}.codes"] = stream(m.codes().cpu(), grid)
        tensors[f"{key}.alpha"] = m.alpha.detach().cpu().clone()
        quantized[key] = described(m)
    for name, m in modules.items():
        if "input_alpha" in m._parameters:
            tensors[f"{name}.input_alpha" if name else "input_alpha"] = m.input_alpha.detach().cpu().clone()
    metadata = {
        "format": FORMAT, "version": VERSION, "quantized": json.dumps(quantized), "tied": json.dumps(tied),
    }  # fmt: skip
    with whole_file(file) as place:
        save_file(tensors, place, metadata=metadata)


def described(module: QuantizedModule) -> dict[str, Any]:
    """What a decoder must know of a weight, and :func:`load` of its module."""
    how, grid = module.quantizer, module.quantizer.grid
    activation = module.activation and module.activation.to_dict()
    return {
        "shape": list(module.weight.shape), "bits": bits_of(grid), "qmin": grid.qmin, "qmax": grid.qmax,
        "offset": grid.offset, "r": grid.r, "outputs": module.OUTPUTS,
        "transform": None if how.transform is None else how.transform.block, "activation": activation,
        "straight_through": asdict(how.straight_through),
    }  # fmt: skip


def bits_of(grid: Grid) -> int:
    """Of a code in the stream."""
    return max((grid.levels - 1).bit_length(), 1)


def stream(codes: Tensor, grid: Grid) -> Tensor:
    """uint8, (rows, bytes): each row's codes one after the other, lowest bits first."""
    bits = bits_of(grid)
    raised = (codes.to(torch.int16) - grid.qmin).unsqueeze(-1)
    ones = ((raised >> torch.arange(bits)) & 1).flatten(1)
    ones = nn.functional.pad(ones, (0, -ones.shape[1] % 8)).unflatten(1, (-1, 8))
    found: Tensor = (ones << torch.arange(8)).sum(2)
    return found.to(torch.uint8)


def codes_of(stream: Tensor, columns: int, grid: Grid) -> Tensor:
    """int8, (rows, columns): the inverse of :func:`stream`."""
    bits = bits_of(grid)
    ones = ((stream.to(torch.int16).unsqueeze(-1) >> torch.arange(8)) & 1).flatten(1)[:, : columns * bits]
    found: Tensor = (ones.unflatten(1, (columns, bits)) << torch.arange(bits)).sum(2) + grid.qmin
    return found.to(torch.int8)


# ---- back


class Weight(NamedTuple):
    """A quantized weight in a file."""

    shape: tuple[int, ...]
    grid: Grid
    outputs: int
    transform: Hadamard | None
    straight_through: StraightThrough
    activation: Quantizer | None

    @classmethod
    def of(cls, found: dict[str, Any]) -> Weight:
        grid = Grid(*(found[name] for name in ("qmin", "qmax", "offset", "r")))
        return cls(
            tuple(found["shape"]), grid, found["outputs"],
            None if found["transform"] is None else Hadamard(found["transform"]),
            StraightThrough(**found["straight_through"]),
            None if found["activation"] is None else Quantizer.from_dict(found["activation"]),
        )  # fmt: skip

    def values(self, stream: Tensor, alpha: Tensor) -> Tensor:
        """float32, of the weight's shape; of a rotated weight, in the model's basis."""
        others = [n for d, n in enumerate(self.shape) if d != self.outputs]
        columns = torch.Size(others).numel()
        rows = dequantize(codes_of(stream, columns, self.grid), alpha, grid=self.grid, dtype=torch.float32)
        if self.transform is not None:
            rows = hadamard(rows, block=self.transform.block)
        return rows.view(self.shape[self.outputs], *others).movedim(0, self.outputs)


@torch.no_grad()
def load(file: str | os.PathLike[str], model: nn.Module) -> nn.Module:
    """Put what :func:`safetensors` wrote into a model of that architecture, for inference.

    Modules whose weights were quantized become plain ones with those values; with a transform or quantized
    inputs they are quantized ones with fixed scales. Outputs are those of the model that was written, bit for
    bit, in the same dtype and on the same device.

    Args:
        file: as :func:`safetensors` wrote it.
        model: plain, or from :func:`quantize_model`.

    Returns:
        ``model``, in place.

    Raises:
        ValueError: the file is damaged or another one, or does not fit the model: names or shapes differ. The
            model is then as it was.
        FileNotFoundError: there is no file.
    """
    checks.instance("model", model, nn.Module)
    tensors, quantized, tied = read(file)
    modules = dict(model.named_modules())
    check_fits(file, tensors, quantized, tied, model)
    values = {
        key: w.values(tensors.pop(f"{key}.codes"), tensors[f"{key}.alpha"]) for key, w in quantized.items()
    }
    state = dict(model.state_dict(keep_vars=True))
    names = {key: [key, *(a for a, b in tied.items() if b == key)] for key in quantized}
    for key, w in quantized.items():
        for place in names[key]:
            module = modules[place.rpartition(".")[0]]
            if isinstance(module, QuantizedModule):
                module.to_plain()
        state[key].copy_(values[key])
        if w.transform is None and w.activation is None:
            continue
        for place in names[key]:
            path = place.rpartition(".")[0]
            alpha = tensors[f"{key}.alpha"].to(state[key].device)
            keep(path, modules[path], w, alpha, tensors.get(place.removesuffix("weight") + "input_alpha"))
    for name, t in tensors.items():
        if name in state and name not in values:
            state[name].copy_(t)
    return model


def keep(path: str, module: nn.Module, w: Weight, alpha: Tensor, input_alpha: Tensor | None) -> None:
    """Make a module quantized that computes otherwise than a plain one."""
    form = quantized_form(module)
    assert form is not None
    how = Quantizer(w.grid, Scale.fixed(alpha), w.straight_through, w.transform)
    made = form.from_plain(module, WeightQuantizer(how, 0, path), alpha=alpha, activation=w.activation)
    if input_alpha is not None and made.input_quantizer is not None:
        made.input_quantizer.set_alpha(made, input_alpha.to(alpha.device))


def read(file: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Weight], dict[str, str]]:
    """Tensors, quantized weights and tied names of a file.

    Raises:
        ValueError: it is damaged, or not of this format and version.
    """
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
    if kind != (FORMAT, VERSION):
        raise ValueError(f"file must be of format {FORMAT} and version {VERSION}, got {kind} in {file}")
    try:
        quantized = {key: Weight.of(found) for key, found in json.loads(metadata["quantized"]).items()}
        return tensors, quantized, json.loads(metadata["tied"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"file must say how its weights are quantized, got {file}: {error!r}") from error


def check_fits(
    file: str | os.PathLike[str], tensors: dict[str, Tensor], quantized: dict[str, Weight],
    tied: dict[str, str], model: nn.Module,
) -> None:  # fmt: skip
    """Raise unless a file has what a model has, in the same shapes."""
    own = {
        key for name, m in model.named_modules() if isinstance(m, QuantizedModule)
        for key in own_names(name, m) if not key.endswith("weight")
    }  # fmt: skip
    there = {name: tuple(t.shape) for name, t in model.state_dict().items() if name not in own}
    shapes = {name: tuple(t.shape) for name, t in tensors.items()}
    for key, w in quantized.items():
        for part in ("codes", "alpha"):
            if shapes.pop(f"{key}.{part}", None) is None:
                raise ValueError(f"file must have {key}.{part}, got none in {file}")
        shapes[key] = w.shape
    inputs = {key.removesuffix("weight") + "input_alpha" for key in (*quantized, *tied)}
    shapes = {name: shape for name, shape in shapes.items() if name not in inputs}
    shapes |= {name: shapes[other] for name, other in tied.items()}
    odd = sorted(there.keys() ^ shapes.keys()) or sorted(n for n in there if there[n] != shapes[n])
    if odd:
        name = odd[0]
        raise ValueError(
            f"file must fit the model, got {name} of shape {shapes.get(name)} in {file} and of shape"
            f" {there.get(name)} in the model{f', and {len(odd) - 1} more' if odd[1:] else ''}"
        )
    modules = dict(model.named_modules())
    for key in quantized:
        module = modules.get(key.rpartition(".")[0])
        if not isinstance(module, QuantizedModule) and (module is None or quantized_form(module) is None):
            raise ValueError(f"model must have a module for {key} that can be quantized, got {module}")
