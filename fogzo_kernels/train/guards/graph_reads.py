"""The graph of a loss: it reads a quantized weight by its module alone, and a probe has no graph to derive."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from ...nn.view import WeightView

#: Nodes of the autograd graph that show the same elements in another shape.
VIEWS = {
    "Permute", "View", "T", "Transpose", "ReshapeAlias", "Clone", "UnsafeView", "Unsqueeze", "Squeeze",
    "_ToTorchTensor",
}  # fmt: skip
#: Parts of the names of nodes that may read a weight: the quantizer's own, and a compiled graph, which is
#: opaque and not looked into.
ALLOWED = ("fogzo_quantize", "QuantizedBackward", "Deferred", "CompiledFunction", "ApplyTemplate")
#: In what PyTorch says of a derivative that is asked for without autograd.
WITHOUT_AUTOGRAD = re.compile(r"requires?[_ ]grad|require gradient")
DERIVATIVE = (
    "a probe runs without autograd, and its forward asked for a derivative: put `with torch.enable_grad():`"
    " around the part that differentiates; fogzo.backward and fogzo.run with a closure do so by themselves"
)


def check_reads(loss: Tensor, weights: list[WeightView]) -> None:
    """Raise if the graph of a loss reads a quantized weight other than by quantizing it.

    The graph does not show reads without autograd, or in a compiled or reentrantly checkpointed part.
    """
    names = {w.parameter: w.name for w in weights}
    readers = _readers(loss)
    for leaf in readers:
        weight = getattr(leaf, "variable", None)
        name = None if weight is None else names.get(weight)
        reader = None if name is None else _reader_beyond_views(leaf, readers)
        if reader is not None:
            raise RuntimeError(
                f"{name} must be used only by running its module, got a loss that reads it in {reader} too:"
                " probes do not perturb that use, and its gradient would be lost. Run the module instead; add"
                " the gradient of a penalty on weights after estimate_(), or use the optimizer's weight decay"
            )


def leaves_of(loss: Tensor) -> dict[int, Tensor]:
    """Return by id the tensors whose gradient a backward of this loss adds to, parameters of no model too."""
    leaves = (getattr(node, "variable", None) for node in _readers(loss))
    return {id(leaf): leaf for leaf in leaves if isinstance(leaf, Tensor)}


def _readers(loss: Tensor) -> dict[Any, list[Any]]:
    """Return each node of a loss's graph with the nodes that read it."""
    readers: dict[Any, list[Any]] = {} if loss.grad_fn is None else {loss.grad_fn: []}
    todo = list(readers)
    for node in todo:  # grows
        for child, _ in node.next_functions:
            if child is None:
                continue
            if child not in readers:
                readers[child] = []
                todo.append(child)
            readers[child].append(node)
    return readers


def _reader_beyond_views(node: Any, readers: dict[Any, list[Any]]) -> str | None:
    """Return the name of a node that reads this one, or a view of it, and may not."""
    for reader in readers[node]:
        name: str = reader.name()
        if any(part in name for part in ALLOWED):
            continue
        if name.removesuffix("0").removesuffix("Backward") not in VIEWS:
            return name
        beyond = _reader_beyond_views(reader, readers)
        if beyond is not None:
            return beyond
    return None


def asks_for_autograd(error: BaseException | None) -> bool:
    """Return whether an error came of a derivative, where autograd is off."""
    without = isinstance(error, RuntimeError) and not torch.is_grad_enabled()
    return without and WITHOUT_AUTOGRAD.search(str(error)) is not None
