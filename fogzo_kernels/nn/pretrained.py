"""The configuration of ``transformers`` models: ``save_pretrained`` writes it, ``from_pretrained`` reads it.

Nothing of ``transformers`` is imported here; :mod:`fogzo_kernels.integrations.transformers` reads it.
"""

from __future__ import annotations

import copy
import warnings
import weakref
from typing import Any, NamedTuple

from torch import nn

from ..backends import check_known
from ..ops import checks
from ..spec.quantizer import Quantizer
from .dims import Dims, checked
from .held import CHILD, HeldWeight
from .quantized import QuantizedWeight

METHOD = "fogzo"


class Entry(NamedTuple):
    """How a module's weight, or a parameter of a module, is quantized."""

    quantizer: Quantizer
    alpha: tuple[int, ...]  # its shape
    tensor_id: int
    backend: str | None
    activation: Quantizer | None
    dims: Dims | None = None  # of a parameter; its name then is that of the entry


def quantized_modules(model: nn.Module) -> dict[str, QuantizedWeight]:
    """Returns the quantized modules of a model by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, QuantizedWeight)}


def quantized_in(model: nn.Module, what: str) -> dict[str, QuantizedWeight]:
    """Returns the quantized modules of a model by name; raises if it has none to ``what``."""
    checks.instance("model", model, nn.Module)
    if modules := quantized_modules(model):
        return modules
    raise ValueError(f"model must have quantized modules to {what}, got none: call quantize_model first")


def models_of(model: nn.Module) -> list[nn.Module]:
    """Returns the outermost pretrained models in a model."""
    pretrained = [
        m
        for m in model.modules()
        if hasattr(m, "save_pretrained") and hasattr(getattr(m, "config", None), "to_diff_dict")
    ]
    inner = {x for m in pretrained for x in m.modules() if x is not m}
    return [m for m in pretrained if m not in inner]


def check_config(model: nn.Module) -> None:
    """Raise if a pretrained model is quantized by something else; warn if it should be quantized already."""
    for m in models_of(model):
        config: Any = getattr(m.config, "quantization_config", None)
        if config is None or is_of_another(m):
            continue
        get: Any = dict.get if isinstance(config, dict) else getattr
        method = get(config, "quant_method", None)
        if method != METHOD:
            raise ValueError(f"model must not be quantized by another library, got quant_method {method!r}")
        if not quantized_modules(m):
            warnings.warn(
                "model's config says that it was saved quantized, but it was loaded without its alphas, which"
                " are made anew: import fogzo_kernels.integrations.transformers before from_pretrained",
                stacklevel=4,
            )


def record(model: nn.Module) -> None:
    """Write into each pretrained model's configuration how its modules are quantized, or that they are not."""
    for m in models_of(model):
        config: Any = m.config
        if modules := quantized_modules(m):
            if is_of_another(m):
                config = own_config(m)
            config.quantization_config = described(modules)
            _recorded[id(config)] = weakref.ref(config), weakref.ref(m)
        elif getattr(config, "quantization_config", None) is not None:
            del config.quantization_config


#: By id of a configuration: it, and the model that was recorded in it.
_recorded: dict[int, tuple[weakref.ref[Any], weakref.ref[nn.Module]]] = {}


def is_of_another(model: nn.Module) -> bool:
    """Whether the configuration says how another model is quantized, which was made of the same object."""
    config, recorded = _recorded.get(id(model.config), (None, None))
    other = recorded() if recorded is not None and config is not None and config() is model.config else None
    return other is not None and model not in other.modules() and other not in model.modules()


def own_config(model: nn.Module) -> Any:
    """Give a pretrained model a copy of its configuration, which other models may share; returns the copy."""
    shared: Any = model.config
    own = copy.deepcopy(shared)
    for module in model.modules():
        if vars(module).get("config") is shared:
            module.config = own
    return own


def described(modules: dict[str, QuantizedWeight]) -> dict[str, Any]:
    """Makes the entry of the config; see :func:`entries` for a module's row."""
    quantizers: list[dict[str, Any]] = []
    rows: dict[str, list[Any]] = {}
    for name, m in modules.items():
        own = [q and q.to_dict() for q in (m.quantizer, m.activation)]
        for q in own:
            if q and q not in quantizers:
                quantizers.append(q)
        weight, inputs = (q and quantizers.index(q) for q in own)
        row = [weight, list(m.alpha.shape), m.tensor_id, m.backend, inputs]
        if isinstance(m, HeldWeight):
            rows[name.removesuffix(CHILD)] = [*row, m.letters]
        else:
            rows[name] = row
    return {"quant_method": METHOD, "quantizers": quantizers, "modules": rows}


def entries(config: dict[str, Any]) -> dict[str, Entry]:
    """Reads what :func:`described` wrote."""
    try:
        quantizers = [Quantizer.from_dict(q) for q in config["quantizers"]]
        read = {}
        for name, (q, alpha, tensor_id, backend, inputs, *dims) in config["modules"].items():
            activation = None if inputs is None else quantizers[int(inputs)]
            shape = tuple(map(int, alpha))
            letters = checked("dims", *dims) if dims else None
            read[name] = Entry(quantizers[int(q)], shape, int(tensor_id), backend, activation, letters)
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"quantization_config must be as quantize_model writes it, got {config} ({error})"
        ) from error
    for entry in read.values():
        check_known(entry.backend)
    return read
