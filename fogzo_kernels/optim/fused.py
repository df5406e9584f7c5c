"""FusedOptimizer: what optimizers share whose step makes the estimate and the update in one pass."""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..functional import TensorList
from ..nn.view import WeightView, local
from ..nn.weights import Facts
from ..ops import arguments
from ..ops.native import add_one
from ..spec.grid import Grid
from ..spec.straight_through import StraightThrough
from ..spec.update import KINDS, UpdateRule
from ..train.calls import WeightGroup
from ..train.fogzo import Fogzo
from ..train.guards.uncompiled import uncompiled
from ..train.replay import capturing
from ..train.step import Step
from .calls import Call, Kept, Operands, Options, Rows
from .memory import View, follow, in_memory, lies_so
from .scaling import Scaling

Params = Iterable[Tensor] | Iterable[dict[str, Any]]

#: For parameters that take their gradient as it is, where nothing is drawn.
PLAIN = {
    "grid": Grid.uniform(8), "straight_through": StraightThrough("identity"), "transform": None,
    "one_minus_beta": 0.0, "seed": 0,
}  # fmt: skip

#: Options of PyTorch's optimizers that change the update and are not offered.
NOT_OFFERED = ("amsgrad", "maximize")


class FusedOptimizer(torch.optim.Optimizer):
    """An optimizer on one op of the fused tail. A subclass names its rule and op, and takes the rule's numbers.

    Args:
        hyperparameters: the rule's numbers, by the names that both ``torch.optim`` and ``OP`` give them.
        params, lr, fogzo, master_weights, capturable, backend: as :class:`fogzo_kernels.AdamW` has them.
    """

    #: Lets ``torch.amp.GradScaler.step`` hand its scale to the step, which divides losses and gradients by it.
    _step_supports_amp_scaling = True
    KIND: ClassVar[str]  # of its UpdateRule
    OP: ClassVar[Callable[..., None]]  # of functional.py; the rule's state stands after the gradients

    def __init__(
        self, params: Params, hyperparameters: dict[str, Any], lr: float | Tensor, fogzo: Fogzo | None,
        master_weights: bool, capturable: bool, backend: str | None,
    ) -> None:  # fmt: skip
        if fogzo is not None and not isinstance(fogzo, Fogzo):
            raise TypeError(f"fogzo must be a Fogzo or None, got {type(fogzo).__name__}")
        self.fogzo = fogzo
        self.backend = fogzo.backend if backend is None and fogzo is not None else backend
        self._names = tuple(hyperparameters)
        self._calls_so_far = 0  # of step()
        self._joined: dict[int, int] = {}  # by id of a parameter: at which of them its own steps began
        self._kept: Kept | None = None
        self._owned: tuple[list[Tensor], Facts | None, list[WeightView], list[Tensor]] = [], None, [], []
        common = {"master_weights": master_weights, "capturable": capturable}
        super().__init__(params, {"lr": lr, **hyperparameters, **common})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, as in PyTorch; the call checks its numbers before the group joins.

        Args:
            param_group: a dict with ``params`` and options of the group.

        Raises:
            TypeError, ValueError: an option has a wrong type or is out of range.

        Example:
            >>> model = torch.nn.Linear(8, 4)
            >>> optimizer = fk.SGD([model.weight], lr=0.1)
            >>> optimizer.add_param_group({"params": [model.bias], "lr": 0.01})
            >>> len(optimizer.param_groups)
            2
        """
        super().add_param_group(param_group)
        try:
            group = self.param_groups[-1]
            self._rule(group)
            if not isinstance(group["lr"], Tensor) and not group["lr"] >= 0:
                raise ValueError(f"lr must be >= 0, got {group['lr']}")
        except Exception:
            self.param_groups.pop()
            raise

    def _hyperparameters(self, group: dict[str, Any]) -> dict[str, Any]:
        return {name: group[name] for name in self._names}

    def _rule(self, group: dict[str, Any]) -> UpdateRule:
        return UpdateRule.from_torch(self.KIND, self._hyperparameters(group))

    def _state_names(self) -> list[str]:
        """In ``state``, as torch's own optimizer has them: the ops' names for lists, in the singular."""
        return [name.removesuffix("s") for name in KINDS[self.KIND]]

    @uncompiled
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step of training.

        With ``fogzo``, the step takes the estimate of the passes that were run by :meth:`Fogzo.probes` or
        :meth:`Fogzo.run`, or that it runs itself with ``closure``. ``.grad`` keeps the straight-through
        gradient. Without passes it takes ``.grad`` as it is; for quantized weights that must be an estimate of
        :meth:`Fogzo.estimate_`, unless :meth:`Fogzo.attach` adds the noise.

        A lost step (:meth:`Fogzo.diagnostics`) changes no parameter, no state and no count. You may call
        ``scaler.step(optimizer)`` of a ``torch.amp.GradScaler`` that scaled the losses of all passes: the step
        then divides losses and ``.grad`` by the scale, and skips where the scaler found an overflow.

        Args:
            closure: with ``fogzo``, a function that runs the model and returns the loss, and does not call
                ``backward``. Clear the gradients before the step. Without ``fogzo``, as in PyTorch.

        Returns:
            The loss if the step knows it, else None.

        Raises:
            RuntimeError: with ``fogzo``, a quantized weight holds the gradient of a backward outside the
                passes; a gradient scaler has unscaled the gradients of passes; or a scaler gets a closure.

        Example:
            >>> model = torch.nn.Linear(8, 4)
            >>> report = fk.quantize_model(model, fk.presets.fixed(2, 0.1))
            >>> optimizer = fk.SGD(model.parameters(), lr=0.1, fogzo=fk.Fogzo(model, total_steps=100))
            >>> loss = optimizer.step(lambda: model(torch.ones(2, 8)).square().mean())
            >>> optimizer.fogzo.steps
            1
        """
        loss, fogzo, scaling = None, self.fogzo, Scaling.of(self)
        shares = fogzo is not None and getattr(self, "found_inf", None) is fogzo.found_inf
        pending = None if fogzo is None else fogzo.pending_step()
        scaling.check(closure is not None, pending is not None and not pending.taken_over, shares)
        if closure is not None:
            with torch.enable_grad():
                if fogzo is None or fogzo.attached:
                    loss = closure()
                    self._check_backward(loss)
                else:
                    fogzo.run(closure)
        step = None if fogzo is None else fogzo.pending_step()
        lost, unknown = False, None  # whether the step is lost; the same where only the device knows
        if step is not None:
            beside = [p.grad for p in self._beside(step) if p.grad is not None]
            self._warn_of_restart(step)
            step.lose_if_not_finite(beside, None if shares else scaling.found_inf)
            estimate = step.collect(scaling.scale)
            loss = loss if step.taken_over else estimate.loss
            lost, unknown = step.lost, step.unknown
        else:
            if fogzo is not None:
                fogzo.check_estimates(self._parameters())
            if scaling.found_inf is not None:
                unknown = scaling.found_inf.reshape(()) != 0
                if not capturing():
                    lost, unknown = bool(unknown), None
        if not lost:
            with Rows(step) as rows:
                calls = self._calls(step)  # all are prepared before the first one writes
                grads = (p.grad for p in self._parameters() if p.grad is not None)
                scaling.unscale_([*grads, *(g for g in rows.gradients if g is not None)])
                rows.estimate()
                self._calls_so_far += 1
                for i, call in enumerate(calls):
                    self._run(call, step, i == 0 and not rows.groups, unknown)
                assert self._kept is not None
                self._kept.ran()
        if step is not None:
            step.end(estimated=True)
        return loss

    def _parameters(self) -> Iterator[Tensor]:
        for group in self.param_groups:
            yield from group["params"]

    def _check_backward(self, loss: Any) -> None:
        """Raise if a closure has left its backward to the step, and no ``fogzo`` is there to run it."""
        left = isinstance(loss, Tensor) and loss.requires_grad
        if left and all(p.grad is None for p in self._parameters()):
            name = type(self).__name__
            raise RuntimeError(
                f"the closure returned a loss and left no gradient: pass fogzo= to {name}, whose step then runs"
                " the backward, or call loss.backward() in the closure"
            )

    def _beside(self, step: Step) -> list[Tensor]:
        """Return the parameters that are not the model's.

        Raises RuntimeError if another optimizer has a quantized weight with a gradient, which would keep its
        straight-through gradient unnoticed.
        """
        every = [*self._parameters()]
        known, facts, missing, beside = self._owned
        if not (facts is step.facts and len(every) == len(known) and all(map(operator.is_, every, known))):
            own, of_model = set(map(id, every)), set(map(id, step.parameters))
            missing = [w for w in step.run.weights if id(w.parameter) not in own]
            beside = [p for p in every if id(p) not in of_model]
            self._owned = every, step.facts, missing, beside
        others = sum([w.parameter.grad is not None for w in missing])
        if others:
            raise RuntimeError(
                f"params must hold every quantized weight of fogzo, got all but {others}; for several"
                " optimizers call estimate_() first"
            )
        return beside

    def _warn_of_restart(self, step: Step) -> None:
        """In the first step of a Fogzo, warn if its state was left behind where the optimizer was loaded."""
        if step.run.steps or capturing():
            return
        taken = max((int(state["step"]) for state in self.state.values() if "step" in state), default=0)
        if taken:
            warnings.warn(
                f"the optimizer has taken {taken} steps, and fogzo none: if you resume a run, call"
                " fogzo.load_state_dict too; without it beta begins at 1 again",
                stacklevel=4,
            )

    # ---- which tensors go into one call

    def _calls(self, step: Step | None) -> list[Call]:
        """Tensors of alike options, dtypes, device, step number and kind of quantizer, estimated ones first.

        Learned alphas come last of all: the estimates of their weights are made with them as they were. The
        calls of the last step serve again while their tensors stay as they are.
        """
        estimated = [g for g in step.groups if not g.by_rows] if step is not None and step.estimates else []
        options = [self._options(group) for group in self.param_groups]
        if self._kept is None or not self._kept.again(self, estimated, options):
            self._kept = Kept(self, list(self._made(step, estimated, options)), estimated, options)
        return self._kept.calls

    def _made(self, step: Step | None, estimated: list[WeightGroup], options: list[Options]) -> Iterator[Call]:
        every = step.run.weights if step is not None else []
        stacks = {id(w.parameter): w for w in every if w.expert_count > 1}
        idle = {id(w.modules[0].alpha): step.idle(w) for w in stacks.values()} if step is not None else {}
        weights = [(k, i, w) for k, group in enumerate(estimated) for i, w in enumerate(group.weights)]
        places = {(id(w.parameter), w.row): (k, i) for k, i, w in weights}
        views = {id(w.parameter): w.whole.rows for *_, w in weights}
        alphas = {id(m.alpha) for w in every for m in w.modules}
        last: dict[tuple[Any, ...], Call] = {}
        for number, group in enumerate(self.param_groups):
            own = options[number]
            calls: dict[tuple[Any, ...], Call] = {}
            first: dict[tuple[Any, ...], Call] = {}  # estimated weights, which others that are alike join
            others: list[Operands] = []
            for p in group["params"]:
                if p.grad is None:
                    if id(p) in self._joined:  # its number of steps falls behind
                        self._joined[id(p)] += 1
                    continue
                view = views.get(id(p))
                operands = self._prepare(p, group, own.states, in_memory(p) if view is None else view)
                cut = [operands]
                if id(p) in stacks and view is not None:
                    cut = operands.rows()
                elif any(idle.get(id(p), ())):  # scales of experts that take no part keep still
                    cut = [row for row, rests in zip(operands.rows(), idle[id(p)], strict=True) if not rests]
                for row, one in enumerate(cut):
                    k, i = places.get((id(p), row), (None, 0))
                    if k is None:
                        others.append(one)
                        continue
                    key = *one.alike, k
                    if key not in calls:
                        calls[key] = Call(number, own, one.number)
                    call = calls[key]
                    first.setdefault(one.alike, call)
                    call.add(one)
                    call.places.append(i)
            for (*_, k), call in calls.items():
                call.of, call.weights = k, estimated[k].part(call.places)
            for operands in others:
                # with estimated ones of their group, if any, in one call; else with all that is updated alike
                joint = None if id(operands.parameter) in alphas else first.get(operands.alike)
                if joint is None:
                    key = *operands.alike, *own.key
                    joint = last.setdefault(key, Call(number, own, operands.number))
                joint.add(operands)
            yield from calls.values()
        yield from last.values()

    def _options(self, group: dict[str, Any]) -> Options:
        lr = group["lr"]
        hyperparameters = self._hyperparameters(group)
        return Options(
            lr.double() if isinstance(lr, Tensor) else arguments.scalar("lr", lr),
            hyperparameters,
            self._state_names()[: self._rule(group).states],
            (id(lr) if isinstance(lr, Tensor) else lr, *map(repr, hyperparameters.values())),
        )

    def _prepare(self, p: Tensor, group: dict[str, Any], names: list[str], view: View) -> Operands:
        """Make the state. Gradient and state come to lie in memory as the parameter does, for ``view``."""
        grad, latent = p.grad, view(p)
        assert grad is not None
        if grad.is_sparse:
            raise ValueError(f"params must have dense gradients, got a sparse one of shape {tuple(p.shape)}")
        seen, state = local if latent is p else view, self.state[p]

        def like_parameter(t: Tensor) -> Tensor:
            return torch.empty_like(p, dtype=t.dtype, requires_grad=False).copy_(t)

        if not lies_so(grad, seen):
            p.grad = grad = like_parameter(grad)
        if not state:
            state["step"] = torch.zeros((), dtype=torch.int64, device=_device_of_count(p, group))
            self._joined[id(p)] = self._calls_so_far
            if group["master_weights"] and p.dtype != torch.float32:
                state["master"] = p.detach().float()
        elif group.get("dampening") and any(state.get(name) is None for name in names):
            raise ValueError(
                "momentum must not be raised from 0 where dampening is not 0: a buffer starts undampened"
            )
        for name in names:  # also of a momentum that was 0 until now
            if state.get(name) is None:
                state[name] = torch.zeros_like(p, dtype=torch.float32, requires_grad=False)
        for name in ("master", *names) if "master" in state else names:
            if not lies_so(state[name], seen):  # from a checkpoint of another layout
                state[name] = like_parameter(state[name])
        master = seen(state["master"]) if "master" in state else None
        if master is not None:
            follow(master, latent)
        joined = number = 0
        if group["capturable"]:  # only the device has the number: parameters that joined at once have one
            if id(p) not in self._joined:
                self._joined[id(p)] = self._calls_so_far - int(state["step"])
            joined = self._joined[id(p)]
        else:
            number = int(state["step"]) + 1
        alike = p.device, p.dtype, grad.dtype, number, joined, master is None
        states = [seen(state[name]) for name in names]
        return Operands(p, latent, seen, master, states, state["step"], number, alike)

    # ---- one call

    def _run(self, call: Call, step: Step | None, first: bool, unknown: Tensor | None) -> None:
        """Run the op. ``first``: whether it counts what the calls of a step have in common."""
        operands, options, group = call.operands, call.options, call.weights
        device = operands[0].latent.device
        if not call.number and len(call.steps):  # the op reads the coming number on the device
            torch._foreach_add_([*call.steps], 1 if unknown is None else (~unknown).long().to(device))
        states: list[Any] = [*call.states]
        states += [None] * (len(self._state_names()) - len(states))  # a momentum of 0 has no buffer
        grads: Any = call.grads
        if isinstance(call.latents, TensorList):  # a step may have prepared the list
            lists = [g.grads for g in step.groups if len(g.grads) == len(grads)] if step is not None else []
            grads = next((own for own in lists if all(map(operator.is_, own, grads))), None) or TensorList(
                grads
            )
        tensors = call.latents, grads, *states
        how: dict[str, Any] = {
            "lr": options.lr,
            "optimizer_step": call.number or operands[0].step,
            "masters": None if operands[0].master is None else [o.master for o in operands],
            "backend": self.backend,
            **options.hyperparameters,
        }
        op = type(self).OP
        if group is None:
            nothing = torch.empty(0, dtype=torch.float32, device=device)
            norm = nothing.new_zeros(())
            if unknown is not None:  # a norm that is not finite lets the op skip a step, if it has losses
                nothing, norm = nothing.new_zeros(1), norm.masked_fill(unknown.to(device), math.nan)
            op(*tensors, nothing, nothing, [], norm, **PLAIN, **how)
        else:
            assert step is not None
            assert step.estimate is not None
            _, plus, minus, n = step.estimate
            assert n is not None
            with step.run.counting(first) as counters:
                options_of_step = step.options(group) | how
                if not isinstance(call.latents, TensorList):
                    options_of_step |= {"tensor_ids": group.tensor_ids, "layouts": group.layouts}
                op(*tensors, plus, minus, group.alphas, n, counters=counters, **options_of_step)
        if call.number and len(call.steps):
            add_one(call.steps)

    # ---- state

    def __getstate__(self) -> dict[str, Any]:
        """PyTorch's own leaves out what a subclass adds, and a copy could not step."""
        own = {name: getattr(self, name) for name in ("fogzo", "backend", "_names", "_calls_so_far")}
        own |= {"_joined": {}, "_kept": None, "_owned": ([], None, [], [])}  # of other parameters
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # of PyTorch's own optimizer
            group.setdefault("capturable", False)
            group.setdefault("master_weights", False)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of this class or of PyTorch's own optimizer. The state keeps its float32.

        PyTorch's own method would round the state to the parameters' dtype.

        Args:
            state_dict: a result of ``state_dict()`` of this class or of the optimizer of the same name in
                ``torch.optim``.

        Raises:
            ValueError: the state is of an optimizer with ``amsgrad`` or ``maximize``, or does not fit the
                groups.

        Example:
            >>> model = torch.nn.Linear(8, 4)
            >>> plain = torch.optim.AdamW(model.parameters(), lr=0.5)
            >>> optimizer = fk.AdamW(model.parameters())
            >>> optimizer.load_state_dict(plain.state_dict())
            >>> optimizer.param_groups[0]["lr"]
            0.5
        """
        for i, group in enumerate(state_dict["param_groups"]):
            for name in NOT_OFFERED:
                if group.get(name):
                    raise ValueError(f"state_dict['param_groups'][{i}] must not have {name}, got {group[name]}")
        super().load_state_dict(state_dict)
        self._joined.clear()
        self._kept = None
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [(p, group) for group in self.param_groups for p in group["params"]]
        for i, (p, group) in zip(ids, params, strict=True):
            for name, value in state_dict["state"].get(i, {}).items():
                if name == "step":
                    step = torch.as_tensor(value, dtype=torch.float64).detach()
                    self.state[p][name] = step.to(_device_of_count(p, group), torch.int64, copy=True)
                elif isinstance(value, Tensor):
                    self.state[p][name] = value.detach().to(p.device, torch.float32, copy=True)
            if self.state[p] and "step" not in self.state[p]:  # torch's SGD does not count; not the first
                self.state[p]["step"] = torch.ones((), dtype=torch.int64, device=_device_of_count(p, group))


def _device_of_count(p: Tensor, group: dict[str, Any]) -> torch.device:
    return p.device if group["capturable"] else torch.device("cpu")
