"""Call: what one call of an op updates. Kept: the calls of a step, which the next step makes again."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from itertools import repeat
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..functional import TensorList
from ..ops.native import Objects, state_of
from ..train.calls import WeightGroup
from ..train.step import Step
from .memory import View

if TYPE_CHECKING:
    from .fused import FusedOptimizer


DTYPE, LAYOUT, VERSION = map(operator.attrgetter, ("dtype", "layout", "_version"))


class Options(NamedTuple):
    """Of a param group: numbers as the op takes them, and which state its rule has."""

    lr: Tensor
    hyperparameters: dict[str, Any]
    states: list[str]
    key: tuple[Any, ...]  # the same for groups with the same numbers


class Operands(NamedTuple):
    """What a parameter adds to the lists of a call: views that lie in memory alike."""

    parameter: Tensor
    latent: Tensor
    seen: View  # how the others lie
    master: Tensor | None
    states: list[Tensor]
    step: Tensor  # how many steps were taken; not a view
    number: int  # of the coming step, or 0 if only the device knows it
    alike: tuple[Any, ...]  # the same for parameters that one call can have
    row: int | None = None  # of a stack: which of its weights this is

    def rows(self) -> list[Operands]:
        """Cut into rows, each seen as a matrix of one row."""

        def cut(tensor: Tensor) -> tuple[Tensor, ...]:
            return torch.split(tensor.flatten(1), 1)

        def row(i: int) -> View:
            return lambda t: self.seen(t)[i : i + 1].flatten(1)

        latents, states = cut(self.latent), [*map(cut, self.states)]
        masters = None if self.master is None else cut(self.master)
        return [
            self._replace(
                latent=latent,
                master=None if masters is None else masters[i],
                states=[state[i] for state in states],
                seen=row(i),
                row=i,
            )
            for i, latent in enumerate(latents)
        ]


class Call:
    """What one call of an op updates; parameters that are estimated stand first."""

    def __init__(self, group: int, options: Options, number: int) -> None:
        self.group, self.options, self.number = group, options, number  # group: the place of its options
        self.operands: list[Operands] = []
        self.grads: list[Tensor] = []  # of the coming step
        self.places: list[int] = []  # of the estimated weights in their group
        self.of: int | None = None  # which group of estimated weights
        self.weights: WeightGroup | None = None
        self.latents: Sequence[Tensor] = []
        self.states: list[Sequence[Tensor]] = []
        self.steps: Sequence[Tensor] = []  # their counts

    def prepare(self, plain: bool, counted: set[int]) -> None:
        """Make the lists that stay. ``plain``: no parameter has a view or a master copy.

        A count of steps that is among ``counted`` goes up in another call.
        """
        latents = [o.latent for o in self.operands]
        states = [list(state) for state in zip(*[o.states for o in self.operands], strict=True)]
        steps = {id(o.step): o.step for o in self.operands if id(o.step) not in counted}
        counted.update(steps)
        self.steps = TensorList([*steps.values()])
        if not plain:
            self.latents, self.states = latents, [*states]
            return
        ids = self.weights.tensor_ids if self.weights is not None else []
        self.latents = TensorList(latents, tensor_ids=[*ids, *[0] * (len(latents) - len(ids))])
        self.states = [TensorList(state) for state in states]

    def add(self, operands: Operands) -> None:
        self.operands.append(operands)
        self.grads.append(operands.seen(operands.parameter.grad))  # type: ignore[arg-type]


class Kept:
    """The calls of a step, and what they were made of: by it the next step tells whether they serve again."""

    def __init__(
        self, optimizer: FusedOptimizer, calls: list[Call], estimated: list[WeightGroup], options: list[Options]
    ) -> None:
        self.calls, self.estimated = calls, [group.weights for group in estimated]
        self.alike = pattern(optimizer, options)
        operands = [o for call in calls for o in call.operands]
        self.every = every_parameter(optimizer)
        places = {id(p): i for i, p in enumerate(self.every)}
        self.order = [places[id(o.parameter)] for o in operands]
        self.grad_dtypes = [grad.dtype for call in calls for grad in call.grads]
        self.rows = [o.row for o in operands]
        self.cut = any(row is not None for row in self.rows)
        whole = [
            o.latent is o.parameter or (o.row is not None and o.parameter.is_contiguous()) for o in operands
        ]
        self.plain = all(whole) and all(o.master is None for o in operands)
        self.count = len(set(self.order))  # of parameters
        counted: set[int] = set()
        for call in calls:
            call.prepare(self.plain, counted)
        self.parameters = TensorList(self.every)
        self.memory = state_of(self.parameters)
        self.of_state = [*optimizer.state.values()]
        sizes = [x for state in self.of_state for x in (state, len(state))]
        entries = [x for state in self.of_state for name, value in state.items() for x in (state, name, value)]
        self.state = Objects(tuple(entries), tuple(sizes), (), ())
        self.steps = [o.step for o in operands]
        self.versions: list[int] = []

    def ran(self) -> None:
        """The calls were made: each parameter has taken a step, and gradients may be freed."""
        self.versions = [*map(VERSION, self.steps)]
        for call in self.calls:
            call.grads, call.weights = [], None

    def again(self, optimizer: FusedOptimizer, estimated: list[WeightGroup], options: list[Options]) -> bool:
        """Give the calls the gradients, options and numbers of another step; False if they do not fit it."""
        every = every_parameter(optimizer)
        all_grads = [p.grad for p in every]
        count = sum([grad is not None for grad in all_grads])
        if not (self.plain and len(every) == len(self.every) and count == self.count):
            return False
        grads: Any = [all_grads[i] for i in self.order]
        if any(map(operator.is_, grads, repeat(None))):
            return False
        state = optimizer.state
        fits = (
            all(map(operator.is_, every, self.every))
            and {*map(LAYOUT, grads)} <= {torch.strided}
            and [*map(DTYPE, grads)] == self.grad_dtypes
            and all(map(Tensor.is_contiguous, grads))
            and len(estimated) == len(self.estimated)
            and all(map(operator.is_, [group.weights for group in estimated], self.estimated))
            and pattern(optimizer, options) == self.alike
            and state_of(self.parameters) == self.memory
            and len(state) == len(self.of_state)
            and all(map(operator.is_, state.values(), self.of_state))
            and self.state.holds()
            and [*map(VERSION, self.steps)] == self.versions
            and (not optimizer._joined or count == len(every))
        )
        if not fits:
            return False
        if self.cut:
            stacks = {i for i, row in zip(self.order, self.rows, strict=True) if row is not None}
            pieces = {i: all_grads[i].flatten(1).split(1) for i in stacks}  # type: ignore[union-attr]
            places = zip(grads, self.order, self.rows, strict=True)
            grads = [grad if row is None else pieces[i][row] for grad, i, row in places]
        for call in self.calls:
            call.options = options[call.group]
            call.number += bool(call.number)
            call.grads, grads = grads[: len(call.operands)], grads[len(call.operands) :]
            if call.of is not None:
                call.weights = estimated[call.of].part(call.places)
        return True


class Rows:
    """Lets a fused step see estimates of weights whose rows take part by themselves, in place of gradients.

    Learned alphas of rows that take no part keep still: their gradient is 0, but momentum would move them.
    """

    def __init__(self, step: Step | None) -> None:
        self._step = step
        self.groups = [g for g in step.groups if g.by_rows] if step is not None and step.estimates else []
        self._weights = [w for group in self.groups for w in group.weights]
        self.gradients = [w.parameter.grad for w in self._weights]
        alphas = [w.modules[0].alpha for w in self._weights]
        self._alphas = [(a, a.detach().clone()) for a in alphas if a.numel() > 1 and a.grad is not None]

    def __enter__(self) -> Rows:
        for w, grad in zip(self._weights, self.gradients, strict=True):
            w.parameter.grad = None if grad is None else grad.clone()
        return self

    def estimate(self) -> None:
        """Make the estimates."""
        for i, group in enumerate(self.groups):
            step, grads = self._step, [w.guide() for w in group.weights]
            assert step is not None
            assert step.estimate is not None
            step.estimate_into(group, [grad for grad in grads if grad is not None], step.estimate, i == 0)

    def __exit__(self, *error: object) -> None:
        for alpha, before in self._alphas:
            assert alpha.grad is not None
            alpha.copy_(torch.where(alpha.grad != 0, alpha, before))
        for w, grad in zip(self._weights, self.gradients, strict=True):
            w.parameter.grad = grad


def every_parameter(optimizer: FusedOptimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def pattern(optimizer: FusedOptimizer, options: list[Options]) -> list[tuple[Any, ...]]:
    """What decides which parameters share a call: which groups have the same numbers; their state and flags."""
    keys = [own.key for own in options]
    return [
        (keys.index(own.key), tuple(own.states), group["capturable"], group["master_weights"])
        for own, group in zip(options, optimizer.param_groups, strict=True)
    ]
