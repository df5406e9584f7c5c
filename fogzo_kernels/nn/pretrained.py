"""The configuration of ``transformers`` models: what ``save_pretrained`` writes, ``from_pretrained`` reads.

Nothing of ``transformers`` is imported here; :mod:`fogzo_kernels.integrations.transformers` reads it.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

from torch import nn

from ..backends import check_known
from ..spec.quantizer import Quantizer
from .module import QuantizedModule

METHOD = "fogzo"


class Entry(NamedTuple):
    """How a module is quantized."""

    quantizer: Quantizer
    alpha: tuple[int, ...]  # its shape
    tensor_id: int
    backend: str | None
    activation: Quantizer | None


def models_of(model: nn.Module) -> list[nn.Module]:
    """The outermost pretrained models in a model, by what makes them one."""
    found: list[nn.Module] = []
    inside: set[int] = set()
    for m in model.modules():
        if id(m) in inside:
            continue
        if hasattr(m, "save_pretrained") and hasattr(getattr(m, "config", None), "to_diff_dict"):
            found.append(m)
            inside |= {id(x) for x in m.modules()}
    return found


def check(model: nn.Module) -> None:
    """Raise if a pretrained model is quantized by something else; warn if it should be quantized already."""
    for m in models_of(model):
        config: Any = getattr(m.config, "quantization_config", None)
        method = (
            config.get("quant_method") if isinstance(config, dict) else getattr(config, "quant_method", None)
        )
        if config is not None and method != METHOD:
            raise ValueError(f"model must not be quantized by another library, got quant_method {method!r}")
        if config is not None and not any(isinstance(x, QuantizedModule) for x in m.modules()):
            warnings.warn(
                "model's config says that it was saved quantized, but it was loaded without its alphas, which"
                " are made anew: import fogzo_kernels.integrations.transformers before from_pretrained",
                stacklevel=3,
            )


def record(model: nn.Module) -> None:
    """Write into each pretrained model's configuration how its modules are quantized, or that they are not."""
    for m in models_of(model):
        found = {name: x for name, x in m.named_modules() if isinstance(x, QuantizedModule)}
        config: Any = m.config
        if found:
            config.quantization_config = described(found)
        elif getattr(config, "quantization_config", None) is not None:
            del config.quantization_config


def described(modules: dict[str, QuantizedModule]) -> dict[str, Any]:
    """Quantizers, and for each module the place of its own, its alpha's shape, tensor id and backend, and the
    place of its input's quantizer or None.
    """
    quantizers: list[dict[str, Any]] = []
    rows = {}
    for name, m in modules.items():
        places: list[int | None] = []
        for q in (m.quantizer, m.activation):
            if q is not None and q.to_dict() not in quantizers:
                quantizers.append(q.to_dict())
            places.append(None if q is None else quantizers.index(q.to_dict()))
        rows[name] = [places[0], list(m.alpha.shape), m.tensor_id, m.backend, places[1]]
    return {"quant_method": METHOD, "quantizers": quantizers, "modules": rows}


def entries(found: dict[str, Any]) -> dict[str, Entry]:
    """What :func:`described` wrote, by the modules' names.

    Raises:
        ValueError: it is not what that writes, or names a backend that is not there.
    """
    try:
        quantizers = [Quantizer.from_dict(q) for q in found["quantizers"]]
        read = {}
        for name, (q, alpha, tensor_id, backend, inputs) in found["modules"].items():
            activation = None if inputs is None else quantizers[int(inputs)]
            shape = tuple(map(int, alpha))
            read[name] = Entry(quantizers[int(q)], shape, int(tensor_id), backend, activation)
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"quantization_config must be as quantize_model writes it, got {found} ({error})"
        ) from error
    for entry in read.values():
        check_known(entry.backend)
    return read
