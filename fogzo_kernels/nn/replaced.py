"""Guards against code that replaces quantized modules, merges adapters into them or computes in their place.

PyTorch calls :func:`see` for every module that becomes a child of another module. :func:`see` notes on the
parent where a plain module replaces a quantized module, and guards ``merge`` of adapters (PEFT's) that get a
quantized ``base_layer``. :func:`close_fast_path` is for PyTorch's own encoders.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from .dims import weights_in
from .module import QuantizedModule
from .quantized import QuantizedWeight
from .registry import quantized_form
from .tied import follow

#: Where a parent keeps the names of children that were quantized modules before.
REPLACED = "_fogzo_replaced"
#: Attributes of encoders, and values that close the fast path; an encoder makes nested tensors for it alone.
CLOSED: dict[type[nn.Module], tuple[str, object]] = {
    nn.TransformerEncoderLayer: ("activation_relu_or_gelu", 0),
    nn.TransformerEncoder: ("use_nested_tensor", False),
}
#: Where an encoder keeps the former value.
KEPT = "_fogzo_fast_path"


def see(parent: nn.Module, name: str, module: nn.Module | None) -> None:
    """A hook of PyTorch: ``module`` is about to be the child ``name`` of ``parent``."""
    if name == "base_layer":
        guard_merge(parent, module)
    old = parent._modules.get(name)
    if old is None or old is module or module is None or not holds_quantized(old):
        return
    if is_left_plain(module):
        vars(parent).setdefault(REPLACED, set()).add(name)
        if not any(hook is refuse_to_save for hook in parent._state_dict_pre_hooks.values()):
            parent.register_state_dict_pre_hook(refuse_to_save)


register_module_module_registration_hook(see)


def holds_quantized(module: nn.Module) -> bool:
    return any(isinstance(m, QuantizedWeight) for m in module.modules())


def is_left_plain(module: nn.Module) -> bool:
    """Whether it holds what could be quantized, and nothing that is."""
    could_be = (quantized_form(m) or weights_in(m) for m in module.modules())
    return not holds_quantized(module) and any(could_be)


# ---- modules that were replaced


def replaced_in(modules: Iterable[tuple[str, nn.Module]]) -> dict[str, nn.Module]:
    """Returns the children of these named modules that replaced quantized modules and are still plain."""
    children = {
        f"{path}.{name}".lstrip("."): parent._modules.get(name)
        for path, parent in modules
        for name in sorted(vars(parent).get(REPLACED, ()))
    }
    return {path: child for path, child in children.items() if child is not None and is_left_plain(child)}


def check_replaced(modules: Iterable[tuple[str, nn.Module]]) -> None:
    """Raise if a plain module replaced a quantized child of these named modules."""
    for where, child in replaced_in(modules).items():
        raise RuntimeError(
            f"{where} is a plain {type(child).__name__}, and took the place of a quantized module, as"
            " resize_token_embeddings and new heads do: call quantize_model(model, ...) again to quantize it"
            f" too, or with skip={where!r} to leave it plain"
        )


def refuse_to_save(parent: nn.Module, prefix: str, keep_vars: bool) -> None:
    """Raise if a child was replaced: the state would not load into a model quantized as this model was."""
    check_replaced([(prefix.removesuffix("."), parent)])


def settle(model: nn.Module) -> None:
    """Forget what was replaced, as ``quantize_model`` has decided on it, with all hooks of earlier calls.

    Adapters and encoders that came before their layers were quantized are guarded here.
    """
    for parent in model.modules():
        remove_hook(parent._load_state_dict_post_hooks, follow)
        vars(parent).pop(REPLACED, None)
        remove_hook(parent._state_dict_pre_hooks, refuse_to_save)
        if "base_layer" in parent._modules:  # TorchScript has no get()
            guard_merge(parent, parent._modules["base_layer"])
        close_fast_path(parent)


def remove_hook(hooks: dict[int, Any], hook: Any) -> None:
    for key in [key for key, other in hooks.items() if other is hook]:
        del hooks[key]


# ---- the fast path of encoders


def close_fast_path(module: nn.Module) -> None:
    """Close the path of an encoder that holds quantized modules, and open it where it holds none any more.

    In evaluation a fused kernel takes the ``weight`` tensors of the modules, which are latents, and never runs
    the modules.
    """
    for name, closed in (closing for kind, closing in CLOSED.items() if isinstance(module, kind)):
        quantized = holds_quantized(module)
        if quantized and not hasattr(module, KEPT):
            setattr(module, KEPT, getattr(module, name))
            setattr(module, name, closed)
        elif not quantized and hasattr(module, KEPT):
            setattr(module, name, getattr(module, KEPT))
            delattr(module, KEPT)


# ---- adapters


def guard_merge(adapter: nn.Module, base: nn.Module | None) -> None:
    """Let ``merge`` of a module raise while its base layer is quantized."""
    if isinstance(innermost(base), QuantizedModule) and callable(getattr(adapter, "merge", None)):
        vars(adapter)["merge"] = partial(refused_or_merged, adapter)


def innermost(base: nn.Module | None) -> nn.Module | None:
    """The layer below adapters of adapters."""
    while base is not None and "base_layer" in base._modules:
        base = base._modules["base_layer"]
    return base


def refused_or_merged(adapter: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Run ``merge`` of an adapter's class unless the base layer is quantized: Q(W + BA) is not Q(W) + BA."""
    base = innermost(adapter._modules.get("base_layer"))
    if isinstance(base, QuantizedModule):
        raise RuntimeError(
            f"an adapter must not be merged into {base.weight_quantizer.path or 'a layer'} while that is a"
            f" {type(base).__name__}: Q(W + BA) is not Q(W) + BA. Call fogzo_kernels.dequantize_model(model)"
            " first, which gives base layers their values Q(weight), then merge"
        )
    return type(adapter).merge(adapter, *args, **kwargs)  # type: ignore[attr-defined]
