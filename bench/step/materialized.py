"""What people write for FOGZO and for MeZO in plain PyTorch: directions in memory, Q by eager ops."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

ALPHA, BITS_MIN, BITS_MAX = 0.05, -2.0, 1.0  # of the grid: codes -2..1
EPS, KAPPA = 0.5, 0.1  # eps of identity noise, in units of alpha
Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]
Batches = Sequence[tuple[Tensor, Tensor]]
Timed = Callable[[Callable[[], Any]], Any]


def quantized(w: Tensor) -> Tensor:
    return ALPHA * torch.clamp(torch.round(w / ALPHA), BITS_MIN, BITS_MAX)


def straight_through(w: Tensor) -> Tensor:
    inside = (w / ALPHA > BITS_MIN) & (w / ALPHA < BITS_MAX)
    return quantized(w).detach() + (w - w.detach()) * inside


def directions(grads: list[Tensor], kappa: float) -> list[Tensor]:
    """sqrt(beta) s g / N + sqrt(1 - beta) u, each kept."""
    norm = torch.sqrt(sum(g.square().sum() for g in grads))
    one_minus_beta = kappa / sum(g.numel() for g in grads)
    return [
        (1 - one_minus_beta) ** 0.5 * g / norm + one_minus_beta**0.5 * (torch.rand_like(g) - 0.5) * 12**0.5
        for g in grads
    ]


def probes(weights: list[Tensor], v: list[Tensor], eps: float) -> list[Tensor]:
    return [quantized(w + eps * one) for w, one in zip(weights, v, strict=True)]


def estimates(v: list[Tensor], plus: Tensor, minus: Tensor, eps: float) -> list[Tensor]:
    c = (plus - minus) / (2 * eps)
    return [c * one for one in v]


class Model:
    """A model, and those of its weights that are quantized: of two dimensions or more, but the skipped."""

    def __init__(self, model: nn.Module, skip: list[str]) -> None:
        self.model = model
        named = {n: p for n, p in model.named_parameters() if p.ndim > 1 and not n.startswith(tuple(skip))}
        self.names, self.weights = list(named), list(named.values())

    def loss(self, values: list[Tensor], loss: Loss, x: Tensor, y: Tensor) -> Tensor:
        """Of the model with these in the places of its quantized weights."""
        chosen = dict(zip(self.names, values, strict=True))
        model = self.model

        class Called(nn.Module):
            def forward(self, *inputs: Tensor, **options: Any) -> Any:
                return functional_call(model, chosen, inputs, options)

        return loss(Called(), x, y)

    def total(self, values: list[Tensor], loss: Loss, batches: Batches, timed: Timed) -> Tensor:
        """The sum of it over micro-batches."""
        losses = [timed(lambda x=x, y=y: self.loss(values, loss, x, y)) for x, y in batches]
        return torch.stack(losses).sum()


class Materialized(Model):
    """FOGZO with n = 1, and AdamW of PyTorch."""

    def __init__(self, model: nn.Module, skip: list[str], *, lr: float) -> None:
        super().__init__(model, skip)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=lr, fused=True)

    def step(self, loss: Loss, batches: Batches, timed: Timed) -> None:
        self.optimizer.zero_grad()
        for x, y in batches:
            timed(lambda x=x, y=y: self.loss([*map(straight_through, self.weights)], loss, x, y).backward())
        grads = [w.grad for w in self.weights]
        eps = EPS * ALPHA
        with torch.no_grad():
            v = directions(grads, KAPPA)
            losses = [self.total(probes(self.weights, v, side), loss, batches, timed) for side in (eps, -eps)]
            for w, g in zip(self.weights, estimates(v, *losses, eps), strict=True):
                w.grad = g
        self.optimizer.step()


class Mezo(Model):
    """Two forwards with all weights moved in place, noise drawn anew from its seed each time; SGD."""

    def __init__(self, model: nn.Module, skip: list[str], *, lr: float) -> None:
        super().__init__(model, skip)
        self.lr, self.seed = lr, 0

    def move(self, factor: float | Tensor) -> None:
        torch.manual_seed(self.seed)
        for w in self.weights:
            w.data.add_(torch.randn_like(w) * factor)

    @torch.no_grad()
    def step(self, loss: Loss, batches: Batches, timed: Timed) -> None:
        self.seed += 1
        eps, losses = EPS * ALPHA, []
        for factor in (eps, -2 * eps):
            self.move(factor)
            losses.append(self.total([*map(quantized, self.weights)], loss, batches, timed))
        self.move(eps)
        self.move(-self.lr * (losses[0] - losses[1]) / (2 * eps))
