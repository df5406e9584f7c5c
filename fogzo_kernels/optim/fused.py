"""What optimizers share whose step makes the estimate and the update in one pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..spec.grid import Grid
from ..spec.straight_through import StraightThrough
from ..spec.update import KINDS, UpdateRule
from ..train.estimator import Fogzo
from ..train.losses import Estimate
from ..train.step import Step, alphas_of
from ..train.weights import Key, QuantizedWeight

#: How an op takes a parameter, and what has its shape: a view.
View = Callable[[Tensor], Tensor]
Params = Iterable[Tensor] | Iterable[dict[str, Any]]

#: For parameters that are not quantized, where nothing is drawn and nothing quantized.
PLAIN = Grid.uniform(8), StraightThrough("identity"), None


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

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of training.

        If the passes of ``fogzo`` were run (:meth:`Fogzo.probes`, :meth:`Fogzo.run`), with its estimate
        in place of the straight-through gradient; ``.grad`` stays as it was. Otherwise with ``.grad`` as
        it is, which for quantized weights must be an estimate (:meth:`Fogzo.estimate_`).

        Args:
            closure: with ``fogzo``, runs the model and returns the loss, and the step then runs the
                passes itself: clear the gradients before; the closure does not call ``backward``.
                Without, as in PyTorch.

        Returns:
            The loss where the step knows it, else None.

        Raises:
            RuntimeError: with ``fogzo``, quantized weights hold the gradient of a backward outside its passes.
        """
        loss = None
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
            estimate = passes.collect()
            loss = estimate.loss
        first = True
        for call in list(self._calls()):  # all are prepared before the first one writes
            self._run(call, passes, estimate, first)
            first = first and not call.weights
        if passes is not None:
            passes.finish()
        return loss

    def _check_estimates(self) -> None:
        """Without passes, what quantized weights are trained with must be an estimate that was made before."""
        if self.fogzo is None:
            return
        own = {p for group in self.param_groups for p in group["params"]}
        for i, w in enumerate(self.fogzo.weights):
            if w.parameter in own and w.parameter.grad is not None and not self.fogzo._gradients.is_estimate(i):
                raise RuntimeError(
                    f"step must follow the passes of fogzo, got the gradient of another backward for {w.name}:"
                    " it would train plain straight-through. Give step a closure, or run the passes by"
                    " fogzo.run(closure) or fogzo.probes()"
                )

    def _check_owned(self, passes: Step) -> None:
        """A weight of another optimizer would keep its straight-through gradient, unnoticed."""
        own = {p for group in self.param_groups for p in group["params"]}
        still = [w.name for w in passes.weights if w.parameter.grad is not None and w.still_row is not None]
        if passes.pairs and still:
            raise RuntimeError(
                f"params must not hold a quantized embedding with padding_idx in a fused step, got {still[0]}:"
                " its padding row would not keep still; call fogzo.estimate_() first"
            )
        others = sum(w.parameter.grad is not None and w.parameter not in own for w in passes.weights)
        if others:
            raise RuntimeError(
                f"params must hold every quantized weight of fogzo, got all but {others}; for several"
                " optimizers call estimate_() first"
            )

    # ---- which tensors go into one call

    def _calls(self) -> Iterator[_Call]:
        """Tensors of one param group, dtype, device, grid and step number, quantized ones first.

        Learned alphas come last of all: the estimates of their weights are made with them as they were.
        """
        known = self.fogzo.weights if self.fogzo is not None else []
        weights = {w.parameter: w for w in known}
        alphas = {id(m.alpha) for w in known for m in w.modules}
        last: list[_Call] = []
        for group in self.param_groups:
            names = self._state_names()[: self._rule(group).states]
            found: dict[tuple[Any, ...], _Call] = {}
            plain: list[tuple[Tensor, int, View]] = []
            for p in group["params"]:
                if p.grad is None:
                    continue
                view = weights[p].rows if p in weights else in_memory(p)
                count = self._prepare(p, group, names, view)
                if p in weights:
                    key = weights[p].key(p.grad, self.backend)
                    where: tuple[Any, ...] = (p.device, p.dtype, p.grad.dtype, count, key)
                    found.setdefault(where, _Call(group, count, key)).add(p, view, weights[p])
                else:
                    plain.append((p, count, view))
            moved = [entry for entry in plain if id(entry[0]) in alphas]
            plain = [entry for entry in plain if id(entry[0]) not in alphas]
            for p, count, view in plain:  # with the quantized ones of their kind, if any, in one call
                where = (p.device, p.dtype, p.grad.dtype if p.grad is not None else None, count)
                there = next((c for k, c in found.items() if k[:4] == where), None)
                if there is None:
                    there = found.setdefault((*where, None), _Call(group, count, None))
                there.add(p, view, None)
            yield from found.values()
            later: dict[tuple[Any, ...], _Call] = {}
            for p, count, view in moved:
                assert p.grad is not None
                where = (p.device, p.grad.dtype, count)
                later.setdefault(where, _Call(group, count, None)).add(p, view, None)
            last += later.values()
        yield from last

    def _prepare(self, p: Tensor, group: dict[str, Any], names: list[str], view: View) -> int:
        """Make the state, and return the number of the coming step; 0 if only the device knows it.

        Gradient and state come to lie in memory as the parameter does, so that ``view`` sees them alike.
        """
        grad = p.grad
        assert grad is not None
        if grad.is_sparse:
            raise ValueError(f"params must have dense gradients, got a sparse one of shape {tuple(p.shape)}")
        if not view(grad).is_contiguous():
            p.grad = torch.empty_like(p, dtype=grad.dtype, requires_grad=False).copy_(grad)
        state = self.state[p]
        capturable = group["capturable"]
        if not state:
            device = p.device if capturable else torch.device("cpu")
            state["step"] = torch.zeros((), dtype=torch.int64, device=device)
            if group["master_weights"] and p.dtype != torch.float32:
                state["master"] = p.detach().float()
        elif any(name not in state for name in names) and group.get("dampening"):
            raise ValueError(
                "momentum must not be raised from 0 where dampening is not 0: a buffer starts undampened"
            )
        for name in names:  # also of a momentum that was 0 until now
            if name not in state:
                state[name] = torch.zeros_like(p, dtype=torch.float32, requires_grad=False)
        for name in ("master", *names):
            if name in state and not view(state[name]).is_contiguous():  # from a checkpoint of another layout
                state[name] = torch.empty_like(p, dtype=torch.float32, requires_grad=False).copy_(state[name])
        if capturable:
            state["step"] += 1
            return 0
        return int(state["step"]) + 1

    # ---- one call

    def _run(self, call: _Call, passes: Step | None, estimate: Estimate | None, first: bool) -> None:
        group, device = call.group, call.params[0].device
        own = [self.state[p] for p in call.params]

        def viewed(name: str) -> list[Tensor]:
            return [view(s[name]) for view, s in zip(call.views, own, strict=True)]

        plus = minus = self._nothing(device)
        norm = torch.zeros((), device=device) if estimate is None or estimate.norm is None else estimate.norm
        lr = group["lr"]
        options: dict[str, Any] = {
            "lr": lr.double() if isinstance(lr, Tensor) else lr,
            "optimizer_step": call.count or own[0]["step"],
            "masters": viewed("master") if "master" in own[0] else None,
            **self._hyperparameters(group),
        }
        used = self._rule(group).states
        states = [viewed(n) if i < used else None for i, n in enumerate(self._state_names())]

        def update(plus: Tensor, minus: Tensor, **noise: Any) -> None:
            tensors = call.latents, call.grads, *states, plus, minus, alphas_of(call.weights), norm
            type(self).OP(*tensors, **options, **noise)

        if passes is None or estimate is None or estimate.norm is None or not call.weights:
            grid, straight_through, transform = (call.key or PLAIN)[:3]
            update(
                plus,
                minus,
                grid=grid,
                straight_through=straight_through,
                transform=transform,
                one_minus_beta=0.0,
                seed=0,
                backend=self.backend,
            )
        else:
            assert call.key is not None
            noise = passes.options(call.key, call.weights)
            with passes.counting(first) as counters:
                update(estimate.losses_plus, estimate.losses_minus, counters=counters, **noise)
        if call.count:
            for state in own:
                state["step"].fill_(call.count)

    def _nothing(self, device: torch.device) -> Tensor:
        if device not in self._empty:
            self._empty[device] = torch.empty(0, device=device)
        return self._empty[device]

    # ---- state

    def __getstate__(self) -> dict[str, Any]:
        """PyTorch's own leaves out what a subclass adds, and a copy could not step."""
        own = {name: getattr(self, name) for name in ("fogzo", "backend", "_names", "_empty")}
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
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [(p, group) for group in self.param_groups for p in group["params"]]
        for i, (p, group) in zip(ids, params, strict=True):
            for name, value in state_dict["state"].get(i, {}).items():
                if name == "step":
                    device = p.device if group["capturable"] else torch.device("cpu")
                    step = torch.as_tensor(value).detach()
                    self.state[p][name] = step.to(device, torch.int64, copy=True)
                elif isinstance(value, Tensor):
                    self.state[p][name] = value.detach().to(p.device, torch.float32, copy=True)
            if self.state[p] and "step" not in self.state[p]:  # torch's SGD does not count; not the first
                device = p.device if group["capturable"] else torch.device("cpu")
                self.state[p]["step"] = torch.ones((), dtype=torch.int64, device=device)


class _Call:
    """What one call of an op updates; quantized parameters stand first."""

    def __init__(self, group: dict[str, Any], count: int, key: Key | None) -> None:
        self.group, self.count, self.key = group, count, key
        self.params: list[Tensor] = []
        self.views: list[View] = []
        self.weights: list[QuantizedWeight] = []

    def add(self, p: Tensor, view: View, weight: QuantizedWeight | None) -> None:
        self.params.append(p)
        self.views.append(view)
        if weight is not None:
            self.weights.append(weight)

    @property
    def latents(self) -> list[Tensor]:
        return [view(p) for view, p in zip(self.views, self.params, strict=True)]

    @property
    def grads(self) -> list[Tensor]:
        pairs = zip(self.views, self.params, strict=True)
        return [view(p.grad) for view, p in pairs if p.grad is not None]


def in_memory(p: Tensor) -> View:
    """How to see tensors that lie in memory as this one does, in the order of memory: elementwise all the same.

    Raises:
        ValueError: it does not fill its memory.
    """
    if p.is_contiguous():
        return lambda t: t
    strides = p.stride()
    order = sorted(range(p.ndim), key=lambda d: -strides[d])
    if not p.permute(order).is_contiguous():
        raise ValueError(
            f"params must be dense in memory, got one of shape {tuple(p.shape)} with strides {strides}"
        )
    return lambda t: t.permute(order)
