"""What a forward pass consumes besides weights: random generators, buffers and what else is asked for.

Every pass of a step must see the same dropout masks and leave the same BatchNorm statistics, so
their state is saved before the gradient pass and loaded before each probe. ``.training`` is
never touched.
"""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..nn.weights import Buffers, gpus_of


def capturing() -> bool:
    """Whether a CUDA graph is being captured."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


#: Names of methods that read and set an object's state.
METHODS = (("get_state", "set_state"), ("getstate", "setstate"), ("state_dict", "load_state_dict"))


def state_methods(name: str, other: object) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    """How to read and to set the state of a generator, a module such as ``random``, or an object with state."""
    for get, put in METHODS:
        if callable(getattr(other, get, None)) and callable(getattr(other, put, None)):
            return getattr(other, get), getattr(other, put)
    bits = getattr(other, "bit_generator", None)  # NumPy's Generator
    if bits is not None:
        return functools.partial(getattr, bits, "state"), functools.partial(setattr, bits, "state")
    methods = ", ".join(f"{get} and {put}" for get, put in METHODS)
    raise TypeError(f"{name} must have one of {methods}, or be a NumPy Generator, got {type(other).__name__}")


def generators_of(model: nn.Module) -> list[object]:
    """The random generators that modules have as attributes, each once: PyTorch's, NumPy's and Python's."""

    def is_generator(value: object) -> bool:
        kind = type(value)
        of_numpy = kind.__module__.startswith("numpy.random") and kind.__name__ in ("Generator", "RandomState")
        return isinstance(value, torch.Generator) or kind is random.Random or of_numpy

    values = (value for module in model.modules() for value in vars(module).values())
    return list({id(value): value for value in values if is_generator(value)}.values())


class Snapshot(NamedTuple):
    """The state of generators and buffers at one point of a step."""

    cpu: Tensor  # the CPU generator's state
    cuda: dict[int, Tensor]  # the state of each device's
    buffers: list[tuple[nn.Module, str, Tensor, Tensor]]  # owner, name, the tensor, its value
    others: list[Any]


class ReplayState:
    """Saves and loads PyTorch's generators, a model's buffers and generators of its modules, in place.

    It leaves out the buffers that quantized modules add, which passes only read.

    Args:
        model: whose buffers, and on whose devices the generators.
        others: objects that are saved and loaded too, see :func:`state_methods`.
    """

    def __init__(self, model: nn.Module, others: Sequence[object] = ()) -> None:
        self.model, self.others = model, list(others)
        for i, other in enumerate(self.others):
            state_methods(f"replay[{i}]", other)
        self.others += [o for o in generators_of(model) if all(o is not other for other in others)]
        self.draws: bool | None = None  # whether a pass drew numbers on a GPU; None before the first

    def compare(self, before: Snapshot, after: Snapshot) -> None:
        """Note whether the pass between the two drew random numbers on a GPU."""
        if not capturing():
            self.draws = any(not torch.equal(before.cuda[d], after.cuda[d]) for d in before.cuda)

    @torch.no_grad()
    def save(self, buffers: Buffers | None = None, gpus: Sequence[int] | None = None) -> Snapshot:
        """The state as it is. A CUDA graph's capture can neither read nor set the device's generators.

        Args:
            buffers, gpus: those of the model, if they are known.
        """
        buffers = Buffers(self.model.modules()) if buffers is None else buffers
        gpus = gpus_of(self.model.parameters()) if gpus is None else gpus
        if capturing():
            if self.draws is not False:
                raise RuntimeError(
                    "model must not draw random numbers on the GPU in a captured step (dropout, say): every"
                    " pass of a replay would draw others"
                    if self.draws
                    else "a step must be run before one is captured in a CUDA graph"
                )
            if any(isinstance(o, torch.Generator) and o.device.type == "cuda" for o in self.others):
                raise RuntimeError(
                    "model and replay must have no torch.Generator of the GPU in a captured step: every pass of"
                    " a replay would draw other numbers"
                )
            gpus = ()
        named = [(m, name, m._buffers[name]) for m, name in buffers.names()]
        saved = [(m, name, b, b.clone()) for m, name, b in named if b is not None]
        cuda = {d: torch.cuda.get_rng_state(d) for d in gpus}
        others = [copy.deepcopy(state_methods("replay", o)[0]()) for o in self.others]
        return Snapshot(torch.get_rng_state(), cuda, saved, others)

    @torch.no_grad()
    def load(self, snapshot: Snapshot) -> None:
        """Generators and buffers as they were when the snapshot was taken."""
        torch.set_rng_state(snapshot.cpu)
        for device, state in snapshot.cuda.items():
            torch.cuda.set_rng_state(state, device)
        self.load_buffers(snapshot)
        for other, state in zip(self.others, snapshot.others, strict=True):
            state_methods("replay", other)[1](copy.deepcopy(state))

    @torch.no_grad()
    def load_buffers(self, snapshot: Snapshot, where: Tensor | None = None) -> None:
        """Buffers alone as they were then; ``where`` is a 0-dim bool on the device, without a wait for it."""
        for module, name, buffer, value in snapshot.buffers:
            now = module._buffers[name]
            if where is not None and now is not None and now.shape == value.shape:
                value = torch.where(where.to(value.device), value, now)
            buffer.copy_(value)
            module._buffers[name] = buffer  # a forward may have assigned another tensor
