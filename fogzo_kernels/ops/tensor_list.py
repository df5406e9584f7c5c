"""TensorList: a list of tensors that is prepared once, for many calls of the ops."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends.held import Held
from ..spec.noise import Layout
from . import arguments

#: Types of tensors without an idea of their own of an op.
PLAIN = {Tensor, torch.nn.Parameter, torch.nn.Buffer}


class TensorList(Held):
    """Tensors that many calls take together, such as the weights of a model; immutable, a ``tuple``.

    Every op takes it where it takes a list of tensors, with the same results and errors. A call whose lists are
    all prepared costs the host a few tens of nanoseconds for each tensor: checks and tables are made once and
    kept. Each call still asks every tensor for its address, shape, dtype, device and memory, so tensors may
    change in any way (``t.data = ...``, ``t.resize_``, freed storages): the call then prepares the list anew.

    The list keeps its tensors alive. While it is in use ``torch.utils.swap_tensors`` refuses them. A list that
    holds a tensor of a subclass, and any list in a graph that is traced, is taken as a plain one.

    Args:
        tensors: a list of tensors, or one tensor.
        tensor_ids: where noise is drawn for this list (``latents``, or the ``grads`` of
            :func:`estimate_gradient_`), those that the op takes by default: one for each tensor; by default
            0, 1, 2, ... The fused tail takes those of its first ``len(alphas)`` latents.
        layouts: as ``tensor_ids``, where each tensor lies in its parameter, ``(offset, inner, stride)``; by
            default whole.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or length. Ops check all else.

    Example::

        weights, alphas = fk.TensorList(model_weights, tensor_ids=ids), fk.TensorList(model_alphas)
        out = fk.TensorList([torch.empty_like(w) for w in weights])
        fk.quantize_(out, weights, alphas, grid=grid)
    """

    def __new__(
        cls,
        tensors: arguments.TensorOrList,
        *,
        tensor_ids: Sequence[int] | None = None,
        layouts: Sequence[Layout] | None = None,
    ) -> TensorList:
        self = super().__new__(cls, arguments.tensors("tensors", tensors))
        self.tensor_ids = self.layouts = None
        if tensor_ids is not None:
            self.tensor_ids = tuple(arguments.ids(tensor_ids))
        if layouts is not None:
            self.layouts = tuple([arguments.layout(f"layouts[{i}]", place) for i, place in enumerate(layouts)])
        for name, given in (("tensor_ids", self.tensor_ids), ("layouts", self.layouts)):
            if given is not None and len(given) != len(self):
                raise ValueError(f"{name} must have {len(self)} entries, got {len(given)}")
        self.plain = set(map(type, self)) <= PLAIN
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        made = functools.partial(TensorList, tensor_ids=self.tensor_ids, layouts=self.layouts)
        return made, (list(self),)
