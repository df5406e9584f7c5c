"""What optimizers share whose step makes the estimate and the update in one pass."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..nn.sharded import local
from ..ops import arguments
from ..spec.grid import Grid
from ..spec.straight_through import StraightThrough
from ..spec.update import KINDS, UpdateRule
from ..train.estimator import Fogzo
from ..train.losses import Estimate
from ..train.replay import capturing
from ..train.step import Step
from ..train.together import Together
from ..train.uncompiled import uncompiled
from .memory import View, follow, in_memory
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
        params: as in ``torch.optim``.
        hyperparameters: the rule's numbers, by the names that both ``torch.optim`` and ``OP`` give them.
        lr: learning rate, a number or a 0-dim tensor on the parameters' device.
        fogzo: the estimator around the model whose parameters these are, or None.
        master_weights: keep a float32 copy of bfloat16 and float16 parameters, and update that.
        capturable: count steps on the device, for capture in a CUDA graph.
        backend: of the op; None takes that of ``fogzo``, else the best available.
    """

    #: Lets ``torch.amp.GradScaler.step`` hand its scale to the step, which divides losses and gradients by it.
    _step_supports_amp_scaling = True
    KIND: ClassVar[str]  # of its UpdateRule
    OP: ClassVar[Callable[..., None]]  # of functional.py; the rule's state stands after the gradients

    def __init__(
        self, params: Params, hyperparameters: dict[str, Any], *, lr: float | Tensor, fogzo: Fogzo | None,
        master_weights: bool, capturable: bool, backend: str | None,
    ) -> None:  # fmt: skip
        if fogzo is not None and not isinstance(fogzo, Fogzo):
            raise TypeError(f"fogzo must be a Fogzo or None, got {type(fogzo).__name__}")
        self.fogzo = fogzo
        self.backend = fogzo.backend if backend is None and fogzo is not None else backend
        self._names = tuple(hyperparameters)
        self._empty: dict[torch.device, Tensor] = {}
        self._calls_so_far = 0  # of step()
        self._joined: dict[int, int] = {}  # by id of a parameter: at which of them its own steps began
        common = {"master_weights": master_weights, "capturable": capturable}
        super().__init__(params, {"lr": lr, **hyperparameters, **common})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as in PyTorch; its numbers are checked before it joins."""
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
        """One step of training.

        If the passes of ``fogzo`` were run (:meth:`Fogzo.probes`, :meth:`Fogzo.run`), with its estimate
        in place of the straight-through gradient; ``.grad`` stays as it was. Otherwise with ``.grad`` as
        it is, which for quantized weights must be an estimate (:meth:`Fogzo.estimate_`).

        A step that is lost (:meth:`Fogzo.diagnostics`) changes nothing: no parameter, no state, no count. By
        ``scaler.step(optimizer)`` of a ``torch.amp.GradScaler`` that scaled the losses of all passes, the step
        divides them and ``.grad`` by the scale, and is skipped where the scaler found an overflow.

        Args:
            closure: with ``fogzo``, runs the model and returns the loss, and the step then runs the
                passes itself: clear the gradients before; the closure does not call ``backward``.
                Without, as in PyTorch.

        Returns:
            The loss where the step knows it, else None.

        Raises:
            RuntimeError: with ``fogzo``, quantized weights hold the gradient of a backward outside its passes,
                or a gradient scaler has unscaled that of passes; a scaler is to run a closure.
        """
        loss = None
        scaling = Scaling.of(self)
        pending = self.fogzo is not None and self.fogzo.pending
        shared = self.fogzo is not None and getattr(self, "found_inf", None) is self.fogzo.found_inf
        scaling.check(closure is not None, pending, shared)
        if closure is not None:
            with torch.enable_grad():
                if self.fogzo is None:
                    loss = closure()
                else:
                    self.fogzo.run(closure)
        passes = estimate = None
        if self.fogzo is not None:
            passes = self.fogzo._completed()
        if passes is None:
            self._check_estimates()
        else:
            self._check_owned(passes)
            self._warn_of_restart()
            passes.look_at(self._beside(passes), None if shared else scaling.found_inf)
            estimate = passes.collect(scaling.scale)
            loss = estimate.loss
        unknown = None if passes is None else passes.unknown
        lost = passes is not None and passes.lost
        if passes is None and scaling.found_inf is not None:
            unknown = scaling.found_inf.reshape(()) != 0
            if not capturing():
                lost, unknown = bool(unknown), None
        if not lost:
            self._update(passes, estimate, scaling, unknown)
        if passes is not None:
            passes.finish()
        return loss

    def _update(
        self, passes: Step | None, estimate: Estimate | None, scaling: Scaling, unknown: Tensor | None
    ) -> None:
        """``unknown``: whether the step is lost, where only the device knows."""
        calls = list(self._calls(passes))  # all are prepared before the first one writes
        if scaling.scale is not None:
            scaling.unscale_(self._grads())
        self._calls_so_far += 1
        first = True
        for call in calls:
            self._run(call, passes, estimate, first, unknown)
            first = first and call.quantized is None

    def _grads(self) -> list[Tensor]:
        return [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]

    def _beside(self, passes: Step) -> list[Tensor]:
        """Gradients of parameters that are not the model's, at which the passes did not look."""
        looked_at = set(map(id, passes.parameters))
        groups = (group["params"] for group in self.param_groups)
        return [p.grad for params in groups for p in params if id(p) not in looked_at and p.grad is not None]

    def _own(self) -> set[int]:
        return {id(p) for group in self.param_groups for p in group["params"]}

    def _check_estimates(self) -> None:
        """Without passes, what quantized weights are trained with must be an estimate that was made before.

        Or nothing: torch.distributed.checkpoint makes the state of an optimizer by a step with gradients of 0.
        """
        if self.fogzo is None:
            return
        own = self._own()
        for i, w in enumerate(self.fogzo.weights):
            if (
                id(w.parameter) in own
                and w.parameter.grad is not None
                and not self.fogzo._gradients.is_estimate(i)
                and bool(local(w.parameter.grad).any())
            ):
                raise RuntimeError(
                    f"step must follow the passes of fogzo, got the gradient of another backward for {w.name}:"
                    " it would train plain straight-through. Give step a closure, or run the passes by"
                    " fogzo.run(closure) or fogzo.probes()"
                )

    def _check_owned(self, passes: Step) -> None:
        """A weight of another optimizer would keep its straight-through gradient, unnoticed."""
        own = self._own()
        estimated = [w for w in passes.weights if w.parameter.grad is not None]
        still = [w.name for w in estimated if any(m.still_row is not None for m in w.modules)]
        if passes.pairs and still:
            raise RuntimeError(
                f"params must not hold a quantized embedding with padding_idx in a fused step, got {still[0]}:"
                " its padding row would not keep still; call fogzo.estimate_() first"
            )
        others = sum(id(w.parameter) not in own for w in estimated)
        if others:
            raise RuntimeError(
                f"params must hold every quantized weight of fogzo, got all but {others}; for several"
                " optimizers call estimate_() first"
            )

    def _warn_of_restart(self) -> None:
        """In the first step of a Fogzo: was its state left behind where the optimizer was loaded?"""
        if self.fogzo is None or self.fogzo._steps or capturing():
            return
        taken = max((int(state["step"]) for state in self.state.values() if "step" in state), default=0)
        if taken:
            warnings.warn(
                f"fogzo has taken no step yet, and the optimizer {taken}: if they go on with a run, load its"
                " state_dict into fogzo, too; otherwise beta begins at 1",
                stacklevel=4,
            )

    # ---- which tensors go into one call

    def _calls(self, passes: Step | None) -> Iterator[_Call]:
        """Tensors of alike options, dtypes, device, step number and kind of quantizer, estimated ones first.

        Learned alphas come last of all: the estimates of their weights are made with them as they were.
        """
        estimated = passes.calls if passes is not None and passes.pairs else []
        places = {id(w.parameter): (k, i) for k, one in enumerate(estimated) for i, w in enumerate(one.weights)}
        alphas = {id(m.alpha) for one in estimated for w in one.weights for m in w.modules}
        later: dict[tuple[Any, ...], _Call] = {}
        for group in self.param_groups:
            options = self._options(group)
            found: dict[tuple[Any, ...], _Call] = {}
            first: dict[tuple[Any, ...], _Call] = {}  # of those that are estimated, for others that are alike
            others: list[tuple[Tensor, _Lists, tuple[Any, ...]]] = []
            for p in group["params"]:
                if p.grad is None:
                    if id(p) in self._joined:  # its number of steps falls behind
                        self._joined[id(p)] += 1
                    continue
                k, i = places.get(id(p), (None, 0))
                view = in_memory(p) if k is None else estimated[k].weights[i].rows
                lists = self._prepare(p, group, options.states, view)
                alike = p.device, p.dtype, lists.grad.dtype, lists.number, lists.joined, lists.master is None
                if k is None:
                    others.append((p, lists, alike))
                    continue
                if (call := found.get((*alike, k))) is None:
                    call = found[*alike, k] = _Call(options, lists.number)
                    first.setdefault(alike, call)
                call.lists.append(lists)
                call.places.append(i)
            for (*_, k), call in found.items():
                call.quantized = estimated[k].part(call.places)
            for p, lists, alike in others:
                # with estimated ones of their group, if any, in one call; else with all that is updated alike
                call = None if id(p) in alphas else first.get(alike)
                if call is None and (call := later.get((*alike, *options.key))) is None:
                    call = later[*alike, *options.key] = _Call(options, lists.number)
                call.lists.append(lists)
            yield from found.values()
        yield from later.values()

    def _options(self, group: dict[str, Any]) -> _Options:
        lr = group["lr"]
        hyperparameters = self._hyperparameters(group)
        return _Options(
            lr.double() if isinstance(lr, Tensor) else arguments.scalar("lr", lr),
            hyperparameters,
            self._state_names()[: self._rule(group).states],
            (id(lr) if isinstance(lr, Tensor) else lr, *map(repr, hyperparameters.values())),
        )

    def _prepare(self, p: Tensor, group: dict[str, Any], names: list[str], view: View) -> _Lists:
        """Make the state. Gradient and state come to lie in memory as the parameter does, for ``view``."""
        grad, latent = p.grad, view(p)
        assert grad is not None
        if grad.is_sparse:
            raise ValueError(f"params must have dense gradients, got a sparse one of shape {tuple(p.shape)}")
        seen = local if latent is p else view
        if not seen(grad).is_contiguous():
            p.grad = grad = torch.empty_like(p, dtype=grad.dtype, requires_grad=False).copy_(grad)
        state = self.state[p]
        capturable = group["capturable"]
        if not state:
            device = p.device if capturable else torch.device("cpu")
            state["step"] = torch.zeros((), dtype=torch.int64, device=device)
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
        views = []
        for name in ("master", *names) if "master" in state else names:
            one = state[name]
            if not seen(one).is_contiguous():  # from a checkpoint of another layout
                one = state[name] = torch.empty_like(p, dtype=torch.float32, requires_grad=False).copy_(one)
            views.append(seen(one))
        joined, step = 0, state["step"]
        if capturable:  # only the device has the number: parameters that joined together have one
            if id(p) not in self._joined:
                self._joined[id(p)] = self._calls_so_far - int(step)
            joined = self._joined[id(p)]
        master = views.pop(0) if "master" in state else None
        if master is not None:
            follow(master, latent)
        number = 0 if capturable else int(step) + 1
        return _Lists(latent, seen(grad), master, views, step, number, joined)

    # ---- one call

    def _run(
        self, call: _Call, passes: Step | None, estimate: Estimate | None, first: bool, unknown: Tensor | None
    ) -> None:
        lists, options = call.lists, call.options
        device, steps = lists[0].latent.device, [one.step for one in lists]
        if not call.number:  # the op reads the coming number on the device
            torch._foreach_add_(steps, 1 if unknown is None else (~unknown).long().to(device))
        states = [[one.states[i] for one in lists] for i in range(len(options.states))]
        unused = [None] * (len(self._state_names()) - len(states))  # a momentum of 0 has no buffer
        masters = None if lists[0].master is None else [one.master for one in lists]
        common: dict[str, Any] = {
            "lr": options.lr,
            "optimizer_step": call.number or steps[0],
            "masters": masters,
            **options.hyperparameters,
        }

        def update(plus: Tensor, minus: Tensor, alphas: list[Tensor], norm: Tensor, **noise: Any) -> None:
            tensors = [one.latent for one in lists], [one.grad for one in lists], *states, *unused
            type(self).OP(*tensors, plus, minus, alphas, norm, **common, **noise)

        if call.quantized is None:
            nothing = self._nothing(device)
            norm = nothing.new_zeros(())
            if unknown is not None:  # a norm that is not finite lets the op skip a step, if it has losses
                nothing, norm = nothing.new_zeros(1), norm.masked_fill(unknown.to(device), math.nan)
            update(nothing, nothing, [], norm, backend=self.backend, **PLAIN)
        else:
            assert passes is not None
            assert estimate is not None
            assert estimate.norm is not None
            noise = passes.options(call.quantized) | {"backend": self.backend}
            with passes.counting(first) as counters:
                update(
                    estimate.losses_plus, estimate.losses_minus, call.quantized.alphas, estimate.norm,
                    counters=counters, **noise,
                )  # fmt: skip
        if call.number:
            torch._foreach_add_(steps, 1)

    def _nothing(self, device: torch.device) -> Tensor:
        if device not in self._empty:
            self._empty[device] = torch.empty(0, dtype=torch.float32, device=device)
        return self._empty[device]

    # ---- state

    def __getstate__(self) -> dict[str, Any]:
        """PyTorch's own leaves out what a subclass adds, and a copy could not step."""
        own = {name: getattr(self, name) for name in ("fogzo", "backend", "_names", "_empty", "_calls_so_far")}
        own["_joined"] = {}  # of other parameters
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # of PyTorch's own optimizer
            group.setdefault("capturable", False)
            group.setdefault("master_weights", False)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, of this class or of PyTorch's own optimizer; state keeps its float32.

        (PyTorch would round it to the parameters' dtype.)

        Raises:
            ValueError: the state is of an optimizer with ``amsgrad`` or ``maximize``.
        """
        for i, group in enumerate(state_dict["param_groups"]):
            for name in NOT_OFFERED:
                if group.get(name):
                    raise ValueError(f"state_dict['param_groups'][{i}] must not have {name}, got {group[name]}")
        super().load_state_dict(state_dict)
        self._joined.clear()
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [(p, group) for group in self.param_groups for p in group["params"]]
        for i, (p, group) in zip(ids, params, strict=True):
            for name, value in state_dict["state"].get(i, {}).items():
                if name == "step":
                    device = p.device if group["capturable"] else torch.device("cpu")
                    step = torch.as_tensor(value, dtype=torch.float64).detach()
                    self.state[p][name] = step.to(device, torch.int64, copy=True)
                elif isinstance(value, Tensor):
                    self.state[p][name] = value.detach().to(p.device, torch.float32, copy=True)
            if self.state[p] and "step" not in self.state[p]:  # torch's SGD does not count; not the first
                device = p.device if group["capturable"] else torch.device("cpu")
                self.state[p]["step"] = torch.ones((), dtype=torch.int64, device=device)


class _Options(NamedTuple):
    """Of a param group: numbers as the op takes them, and which state its rule has."""

    lr: Tensor
    hyperparameters: dict[str, Any]
    states: list[str]
    key: tuple[Any, ...]  # the same for groups with the same numbers


class _Lists(NamedTuple):
    """What a parameter adds to the lists of a call: views that lie in memory alike."""

    latent: Tensor
    grad: Tensor
    master: Tensor | None
    states: list[Tensor]
    step: Tensor  # steps taken; not a view
    number: int  # of the coming step, or 0 if only the device knows it
    joined: int  # the same for those with one number then


class _Call:
    """What one call of an op updates; parameters that are estimated stand first."""

    def __init__(self, options: _Options, number: int) -> None:
        self.options, self.number = options, number
        self.lists: list[_Lists] = []
        self.places: list[int] = []  # of those that are estimated among the weights of the step's call
        self.quantized: Together | None = None
