"""Who reads a quantized weight in a forward: beside its module, nobody may, as no probe would perturb that."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...nn.view import WeightView

#: Nodes of the autograd graph that show the same elements in another shape.
VIEWS = (
    "Permute",
    "View",
    "T",
    "Transpose",
    "ReshapeAlias",
    "Clone",
    "UnsafeView",
    "Unsqueeze",
    "Squeeze",
    "_ToTorchTensor",
)
#: Parts of the names of nodes that may read a weight: the quantizer's own, and a compiled graph, which is
#: opaque and not looked into.
ALLOWED = (
    "fogzo_quantize", "QuantizedBackward", "DeferredBackward", "QuantizedInTransform", "DeferredInTransform",
    "CompiledFunction", "ApplyTemplate",
)  # fmt: skip


def check_reads(loss: Tensor, weights: list[WeightView]) -> None:
    """Raise if the graph of a loss reads a quantized weight other than by quantizing it.

    It sees what the graph shows: not what runs without autograd, or in a compiled or reentrantly checkpointed
    part.

    Raises:
        RuntimeError: it does; the message names the weight and the node that reads it.
    """
    names = {w.parameter: w.name for w in weights}
    readers, leaves = _readers(loss, names)
    for leaf, name in leaves:
        found = _beyond_views(leaf, readers)
        if found is not None:
            raise RuntimeError(
                f"{name} must be used only by running its module, got a loss that reads it in {found} too:"
                " probes do not perturb that use, and its gradient would be lost. Run the module instead; add"
                " the gradient of a penalty on weights after estimate_(), or use the optimizer's weight decay"
            )


def leaves_of(loss: Tensor) -> dict[int, Tensor]:
    """By id, the tensors whose gradient a backward of this loss adds to, parameters of no model too."""
    if loss.grad_fn is None:
        return {}
    todo, seen = [loss.grad_fn], {loss.grad_fn}
    for node in todo:  # grows
        new = [child for child, _ in node.next_functions if child is not None and child not in seen]
        seen.update(new)
        todo += dict.fromkeys(new)
    leaves = (getattr(node, "variable", None) for node in todo)
    return {id(leaf): leaf for leaf in leaves if isinstance(leaf, Tensor)}


def _readers(loss: Tensor, names: dict[Tensor, str]) -> tuple[dict[Any, list[Any]], list[tuple[Any, str]]]:
    """Each node's readers, and the nodes that are quantized weights, with their names."""
    readers: dict[Any, list[Any]] = {}
    leaves: list[tuple[Any, str]] = []
    todo = [loss.grad_fn] if loss.grad_fn is not None else []
    seen = set(todo)
    while todo:
        node = todo.pop()
        for child, _ in node.next_functions:
            if child is None:
                continue
            readers.setdefault(child, []).append(node)
            if child in seen:
                continue
            seen.add(child)
            todo.append(child)
            variable = getattr(child, "variable", None)
            if variable is not None and variable in names:
                leaves.append((child, names[variable]))
    return readers, leaves


def _beyond_views(node: Any, readers: dict[Any, list[Any]]) -> str | None:
    """The name of a node that reads this one, or a view of it, and may not."""
    for reader in readers.get(node, []):
        name = reader.name()
        if any(part in name for part in ALLOWED):
            continue
        if name.removesuffix("0").removesuffix("Backward") not in VIEWS:
            return str(name)
        found = _beyond_views(reader, readers)
        if found is not None:
            return found
    return None
