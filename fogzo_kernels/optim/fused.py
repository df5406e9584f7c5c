"""Optimizers whose step makes the estimate, the update and the next Q(theta) in one pass over memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..functional import estimate_adamw_, estimate_sgd_
from ..spec.grid import Grid
from ..spec.straight_through import StraightThrough
from ..spec.update import UpdateRule
from ..train.estimator import Estimate, Fogzo
from ..train.weights import Key, QuantizedWeight

Params = Iterable[Tensor] | Iterable[dict[str, Any]]

#: For parameters that are not quantized, where nothing is drawn and nothing quantized.
PLAIN = Grid.uniform(8), StraightThrough("identity")


class _FusedOptimizer(torch.optim.Optimizer):
    """What :class:`AdamW` and :class:`SGD` share."""

    STATES: tuple[str, ...] = ()  # names in ``state``, as torch's own optimizer has them

    def __init__(
        self, params: Params, defaults: dict[str, Any], fogzo: Fogzo | None, backend: str | None
    ) -> None:
        if fogzo is not None and not isinstance(fogzo, Fogzo):
            raise TypeError(f"fogzo must be a Fogzo or None, got {type(fogzo).__name__}")
        self.fogzo = fogzo
        self.backend = fogzo.backend if backend is None and fogzo is not None else backend
        self._empty: dict[torch.device, Tensor] = {}
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        try:
            group = self.param_groups[-1]
            self._rule(group)
            if not isinstance(group["lr"], Tensor) and not group["lr"] >= 0:
                raise ValueError(f"lr must be >= 0, got {group['lr']}")
        except Exception:
            self.param_groups.pop()
            raise

    def _rule(self, group: dict[str, Any]) -> UpdateRule:
        raise NotImplementedError

    def _update(
        self, group: dict[str, Any], call: _Call, lr: float | Tensor, *, losses: tuple[Tensor, Tensor],
        norm: Tensor, **common: Any,
    ) -> None:  # fmt: skip
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of training.

        If the passes of ``fogzo`` were run (:meth:`Fogzo.probes`, :meth:`Fogzo.run`), with its estimate
        in place of the straight-through gradient; ``.grad`` stays as it was. Otherwise with ``.grad`` as
        it is.

        Args:
            closure: with ``fogzo``, runs the model and returns the loss, and the step then runs the
                passes itself: clear the gradients before; the closure does not call ``backward``.
                Without, as in PyTorch.

        Returns:
            The loss where the step knows it, else None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                if self.fogzo is None:
                    loss = closure()
                else:
                    self.fogzo.run(closure)
        estimate = None
        if self.fogzo is not None and self.fogzo.pending:
            self._check_complete(self.fogzo)
            estimate = self.fogzo.collect()
            loss = estimate.loss
        first = True
        for call in self._calls():
            self._run(call, estimate, first)
            first = first and not call.weights
        if estimate is not None:
            assert self.fogzo is not None
            self.fogzo.finish()
        return loss

    def _check_complete(self, fogzo: Fogzo) -> None:
        """A weight of another optimizer would keep its straight-through gradient, unnoticed."""
        own = {p for group in self.param_groups for p in group["params"]}
        others = sum(w.parameter.grad is not None and w.parameter not in own for w in fogzo.weights)
        if others:
            raise RuntimeError(
                f"params must hold every quantized weight of fogzo, got all but {others}; for several"
                " optimizers call estimate_() first"
            )

    # ---- which tensors go into one call

    def _calls(self) -> Iterator[_Call]:
        """Tensors of one param group, dtype, device, grid and step number, quantized ones first."""
        weights = {w.parameter: w for w in self.fogzo.weights} if self.fogzo is not None else {}
        for group in self.param_groups:
            found: dict[tuple[Any, ...], _Call] = {}
            plain: list[tuple[Tensor, int]] = []
            for p in group["params"]:
                if p.grad is None:
                    continue
                count = self._prepare(p, group)
                if p in weights:
                    key = weights[p].key(p.grad, self.backend)
                    where: tuple[Any, ...] = (p.device, p.dtype, p.grad.dtype, count, key)
                    found.setdefault(where, _Call(group, count, key)).add(p, weights[p])
                else:
                    plain.append((p, count))
            for p, count in plain:  # with the quantized ones of their kind, if any, in one call
                where = (p.device, p.dtype, p.grad.dtype if p.grad is not None else None, count)
                there = next((c for k, c in found.items() if k[:4] == where), None)
                if there is None:
                    there = found.setdefault((*where, None), _Call(group, count, None))
                there.add(p, None)
            yield from found.values()

    def _prepare(self, p: Tensor, group: dict[str, Any]) -> int:
        """Make the state, and return the number of the coming step; 0 if only the device knows it."""
        grad = p.grad
        assert grad is not None
        if grad.is_sparse:
            raise ValueError(f"params must have dense gradients, got a sparse one of shape {tuple(p.shape)}")
        if not grad.is_contiguous():
            p.grad = grad.contiguous()
        state = self.state[p]
        capturable = group["capturable"]
        if not state:
            device = p.device if capturable else torch.device("cpu")
            state["step"] = torch.zeros((), dtype=torch.int64, device=device)
            for name in self.STATES[: self._rule(group).states]:
                state[name] = torch.zeros_like(p, dtype=torch.float32, requires_grad=False)
            if group["master_weights"] and p.dtype != torch.float32:
                state["master"] = p.detach().float()
        if capturable:
            state["step"] += 1
            return 0
        return int(state["step"]) + 1

    # ---- one call

    def _run(self, call: _Call, estimate: Estimate | None, first: bool) -> None:
        group, device = call.group, call.params[0].device
        states = [self.state[p] for p in call.params]
        lr = group["lr"]
        common: dict[str, Any] = {"one_minus_beta": 0.0, "seed": 0, "backend": self.backend}
        common["grid"], common["straight_through"] = (call.key or PLAIN)[:2]
        plus = minus = self._nothing(device)
        norm = torch.zeros((), device=device) if estimate is None or estimate.norm is None else estimate.norm
        step: dict[str, Any] = {
            "optimizer_step": call.count or states[0]["step"],
            "masters": [s["master"] for s in states] if "master" in states[0] else None,
            "quantized": [w.memory() for w in call.weights] or None,
        }
        lr = lr.double() if isinstance(lr, Tensor) else lr
        if estimate is None or estimate.norm is None or not call.weights:
            self._update(group, call, lr, losses=(plus, minus), norm=norm, **common, **step)
        else:
            assert self.fogzo is not None
            assert call.key is not None
            common = self.fogzo.noise_options(call.key, call.weights)
            losses = estimate.losses_plus, estimate.losses_minus
            with self.fogzo.counting(first) as counters:
                self._update(
                    group, call, lr, losses=losses, norm=norm, counters=counters, **common, **step
                )  # fmt: skip
        for w in call.weights:
            w.wrote_quantized()
        if call.count:
            for state in states:
                state["step"].fill_(call.count)

    def _nothing(self, device: torch.device) -> Tensor:
        if device not in self._empty:
            self._empty[device] = torch.empty(0, device=device)
        return self._empty[device]

    # ---- state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # of PyTorch's own optimizer
            group.setdefault("capturable", False)
            group.setdefault("master_weights", False)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, of this class or of PyTorch's own optimizer; state keeps its float32.

        (PyTorch would round it to the parameters' dtype.)
        """
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
        self.weights: list[QuantizedWeight] = []

    def add(self, p: Tensor, weight: QuantizedWeight | None) -> None:
        self.params.append(p)
        if weight is not None:
            self.weights.append(weight)

    @property
    def grads(self) -> list[Tensor]:
        return [p.grad for p in self.params if p.grad is not None]

    @property
    def alphas(self) -> list[Tensor]:
        return [w.alpha for w in self.weights]


class AdamW(_FusedOptimizer):
    """``torch.optim.AdamW`` with FOGZO's estimate and the next Q(theta) in the same pass.

    Without ``fogzo``, and for parameters that are not quantized, it is AdamW up to float32 rounding
    (Loshchilov & Hutter, ICLR 2019; docs/contract.md, section 4); amsgrad, maximize and sparse
    gradients are not offered. State is float32 whatever the parameters' dtype.

    Args:
        lr: learning rate, a number or a 0-dim tensor on the parameters' device (for CUDA graphs).
        fogzo: the estimator around the model whose parameters these are.
        master_weights: keep a float32 copy of bfloat16 and float16 parameters, and update that.
        capturable: count steps on the device, for capture in a CUDA graph.
        backend: of the op; None takes the best available.
    """

    STATES = ("exp_avg", "exp_avg_sq")

    def __init__(
        self, params: Params, lr: float | Tensor = 1e-3, betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8, weight_decay: float = 1e-2, *, fogzo: Fogzo | None = None,
        master_weights: bool = False, capturable: bool = False, backend: str | None = None,
    ) -> None:  # fmt: skip
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay,
            "master_weights": master_weights, "capturable": capturable,
        }  # fmt: skip
        super().__init__(params, defaults, fogzo, backend)

    def _rule(self, group: dict[str, Any]) -> UpdateRule:
        beta1, beta2 = group["betas"]
        return UpdateRule(
            "adamw", weight_decay=group["weight_decay"], beta1=beta1, beta2=beta2, eps=group["eps"]
        )

    def _update(
        self, group: dict[str, Any], call: _Call, lr: float | Tensor, *, losses: tuple[Tensor, Tensor],
        norm: Tensor, **common: Any,
    ) -> None:  # fmt: skip
        states = [self.state[p] for p in call.params]
        estimate_adamw_(
            call.params, call.grads, [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states],
            *losses, call.alphas, norm, lr=lr, betas=group["betas"], eps=group["eps"],
            weight_decay=group["weight_decay"], **common,
        )  # fmt: skip


class SGD(_FusedOptimizer):
    """``torch.optim.SGD`` with FOGZO's estimate and the next Q(theta) in the same pass.

    See :class:`AdamW`; momentum, dampening, weight decay and Nesterov's form are as in PyTorch.
    """

    STATES = ("momentum_buffer",)

    def __init__(
        self, params: Params, lr: float | Tensor = 1e-3, momentum: float = 0.0, dampening: float = 0.0,
        weight_decay: float = 0.0, nesterov: bool = False, *, fogzo: Fogzo | None = None,
        master_weights: bool = False, capturable: bool = False, backend: str | None = None,
    ) -> None:  # fmt: skip
        defaults = {
            "lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay,
            "nesterov": nesterov, "master_weights": master_weights, "capturable": capturable,
        }  # fmt: skip
        super().__init__(params, defaults, fogzo, backend)

    def _rule(self, group: dict[str, Any]) -> UpdateRule:
        names = "weight_decay", "momentum", "dampening", "nesterov"
        return UpdateRule("sgd", **{name: group[name] for name in names})

    def _update(
        self, group: dict[str, Any], call: _Call, lr: float | Tensor, *, losses: tuple[Tensor, Tensor],
        norm: Tensor, **common: Any,
    ) -> None:  # fmt: skip
        buffers = [self.state[p]["momentum_buffer"] for p in call.params] if group["momentum"] else None
        estimate_sgd_(
            call.params, call.grads, buffers, *losses, call.alphas, norm, lr=lr,
            momentum=group["momentum"], dampening=group["dampening"],
            weight_decay=group["weight_decay"], nesterov=group["nesterov"], **common,
        )  # fmt: skip
