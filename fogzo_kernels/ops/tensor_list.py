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
    """A list of tensors that you prepare once for many calls of the ops; an immutable ``tuple``.

    Every op takes it in place of a list, with the same results and errors. If all lists of a call are prepared,
    the ops keep their checks and tables, and a call takes a few tens of nanoseconds per tensor on the host.
    Tensors may change their memory, shape, dtype or device: the next call notices and prepares the list again.

    The list keeps its tensors alive. ``torch.utils.swap_tensors`` refuses tensors of a list in use. The ops
    treat a list with tensors of a subclass, and any list in a traced graph, as a plain list.

    Args:
        tensors: a list of tensors, or one tensor.
        tensor_ids: default of the ops' ``tensor_ids`` where this list is the one that noise is drawn for: the
            ``latents``, or the ``grads`` of :func:`estimate_gradient_`. One per tensor; None: 0, 1, 2, ... The
            fused tail takes the ids of the first ``len(alphas)`` latents.
        layouts: default of the ops' ``layouts``, as ``tensor_ids``: one ``(offset, inner, stride)`` per tensor;
            None: the tensors are whole.

    Raises:
        TypeError, ValueError: an argument has a wrong type or length. The ops check everything else.

    Example:
        >>> weights = fk.functional.TensorList([torch.tensor([0.9]), torch.tensor([-3.0])])
        >>> alphas = fk.functional.TensorList([torch.tensor([0.5]), torch.tensor([1.0])])
        >>> out = fk.functional.TensorList([torch.empty(1), torch.empty(1)])
        >>> fk.functional.quantize_(out, weights, alphas, grid=fk.Grid.uniform(2))
        >>> out[0], out[1]
        (tensor([0.5000]), tensor([-2.]))
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

    def like(self, tensors: Sequence[Tensor]) -> TensorList:
        """Return a list of as many other tensors, with the ``tensor_ids`` and ``layouts`` of this one.

        Args:
            tensors: one tensor in the place of each.

        Raises:
            TypeError, ValueError: an argument has a wrong type or length.

        Example:
            >>> weights = fk.functional.TensorList([torch.ones(1)], tensor_ids=[3])
            >>> weights.like([torch.zeros(1)]).tensor_ids
            (3,)
        """
        if len(tensors) != len(self):
            raise ValueError(f"tensors must have {len(self)} entries, got {len(tensors)}")
        other = TensorList(tensors)
        other.tensor_ids, other.layouts = self.tensor_ids, self.layouts
        return other

    def __reduce__(self) -> tuple[Any, ...]:
        made = functools.partial(TensorList, tensor_ids=self.tensor_ids, layouts=self.layouts)
        return made, (list(self),)
