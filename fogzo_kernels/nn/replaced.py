"""What other libraries do around quantized modules: put plain ones in their place, merge adapters into them.

PyTorch calls :func:`see` for every module that becomes a child of another one, in the whole process. It notes
on the parent where a plain module takes a quantized one's place, and guards the ``merge`` of adapters (PEFT's)
that get a quantized ``base_layer``.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from .module import QuantizedModule
from .registry import quantized_form

#: Where a parent keeps the names of children that were quantized modules before.
REPLACED = "_fogzo_replaced"


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
    return any(isinstance(m, QuantizedModule) for m in module.modules())


def is_left_plain(module: nn.Module | None) -> bool:
    """Whether it holds what could be quantized, and nothing that is."""
    return module is not None and not holds_quantized(module) and any(map(quantized_form, module.modules()))


# ---- modules that were replaced


def replaced_in(parent: nn.Module) -> list[str]:
    """Children that took the place of quantized modules, and are plain still."""
    names = vars(parent).get(REPLACED)
    return [] if names is None else [name for name in sorted(names) if is_left_plain(parent._modules.get(name))]


def check_replaced(modules: Iterable[tuple[str, nn.Module]]) -> None:
    """Raise if one of these modules, with their names, has such a child.

    Raises:
        RuntimeError: it would be trained, or saved, as it is.
    """
    for path, parent in modules:
        if REPLACED not in parent.__dict__:
            continue
        for name in replaced_in(parent):
            where, kind = (f"{path}.{name}" if path else name), type(parent._modules[name]).__name__
            raise RuntimeError(
                f"{where} must be quantized, as the module was whose place it took, got a plain {kind}"
                " (resize_token_embeddings and new heads replace some): call quantize_model(model, ...) again"
                f" to quantize it too, or with skip={where!r} to leave it plain"
            )


def refuse_to_save(parent: nn.Module, prefix: str, keep_vars: bool) -> None:
    """Raise: the saved state would not load into a model that is quantized as this one was."""
    check_replaced([(prefix.removesuffix("."), parent)])


def settle(model: nn.Module) -> bool:
    """Forget what was replaced, as ``quantize_model`` has decided on it; return whether there was something."""
    found = False
    for parent in model.modules():
        found |= bool(replaced_in(parent))
        vars(parent).pop(REPLACED, None)
        hooks = parent._state_dict_pre_hooks
        for key in [key for key, hook in hooks.items() if hook is refuse_to_save]:
            del hooks[key]
    return found


# ---- adapters


def guard_merge(adapter: nn.Module, base: nn.Module | None) -> None:
    """Let ``merge`` of a module with a base layer refuse while that is quantized."""
    if isinstance(innermost(base), QuantizedModule) and callable(getattr(adapter, "merge", None)):
        vars(adapter)["merge"] = partial(refused_or_merged, adapter)


def guard_merges(model: nn.Module) -> None:
    """The same for adapters that were there before their base layers were quantized."""
    for module in model.modules():
        guard_merge(module, module._modules.get("base_layer"))


def innermost(base: nn.Module | None) -> nn.Module | None:
    """The layer below adapters of adapters."""
    while base is not None and "base_layer" in base._modules:
        base = base._modules["base_layer"]
    return base


def refused_or_merged(adapter: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """``merge`` of an adapter's class.

    Raises:
        RuntimeError: the base layer is quantized: Q(W + BA) is not Q(W) + BA.
    """
    base = innermost(adapter._modules.get("base_layer"))
    if isinstance(base, QuantizedModule):
        path = base.weight_quantizer.path or "one"
        raise RuntimeError(
            f"merge must have a plain base layer, got {path}, a {type(base).__name__}, which"
            " would quantize the sum to another function: call fogzo_kernels.dequantize_model(model) first, so"
            " that base layers get their values Q(weight), then merge"
        )
    kind: Any = type(adapter)
    return kind.merge(adapter, *args, **kwargs)
