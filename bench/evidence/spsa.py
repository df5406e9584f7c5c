"""n-SPSA of an MLP, its probes batched: the estimate of Fogzo with one_minus_beta = 1, for thousands of them.

A probe of ``Fogzo`` is a forward of its own. Here those of many directions are one product a layer, whose
weights are the probes side by side.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fogzo_kernels as fk

TOGETHER = 64  # directions


class Spsa:
    """Leaves the estimate in ``.grad`` of the weights; biases keep the gradients of the straight-through pass.

    Args:
        model: linear layers with ReLU between, all quantized by one quantizer.
        directions: n.
        seed: of the noise.
    """

    def __init__(self, model: nn.Sequential, directions: int, seed: int) -> None:
        self.layers = [m for m in model if isinstance(m, fk.QuantLinear)]
        self.model, self.directions, self.seed, self.steps = model, directions, seed, 0

    def step(self, x: Tensor, y: Tensor) -> None:
        F.cross_entropy(self.model(x), y).backward()
        grads = [m.weight.grad for m in self.layers]
        alphas = [m.alpha for m in self.layers]
        quantizer = self.layers[0].quantizer
        norm = fk.guide_norm(grads, alphas, grid=quantizer.grid)  # type: ignore[arg-type]
        how: dict[str, Any] = {
            "grid": quantizer.grid, "straight_through": quantizer.straight_through, "one_minus_beta": 1.0,
            "seed": self.seed, "step": self.steps, "tensor_ids": [m.tensor_id for m in self.layers],
        }  # fmt: skip
        losses = torch.empty(2, self.directions)
        with torch.no_grad():
            latents = [m.weight.detach() for m in self.layers]
            for first in range(0, self.directions, TOGETHER):
                count = min(TOGETHER, self.directions - first)
                probes = [w.new_empty(2, count, *w.shape) for w in latents]
                for i in range(count):
                    fk.perturb_quantize_(
                        [p[0, i] for p in probes],
                        [p[1, i] for p in probes],
                        latents,
                        grads,
                        alphas,
                        norm,
                        direction=first + i,
                        **how,
                    )
                found = self.losses([p.flatten(0, 1) for p in probes], x, y)
                losses[:, first : first + count] = found.view(2, count)
            fk.estimate_gradient_(grads, losses[0], losses[1], alphas, norm, **how)  # type: ignore[arg-type]
        self.steps += 1

    def losses(self, weights: list[Tensor], x: Tensor, y: Tensor) -> Tensor:
        """Of many models: weights of (models, outputs, inputs), biases shared."""
        models = len(weights[0])
        flat = weights[0].flatten(0, 1)
        h = F.linear(x, flat).view(len(x), models, -1).transpose(0, 1)  # (models, rows, outputs)
        for i, (layer, w) in enumerate(zip(self.layers, weights, strict=True)):
            if i:
                h = F.relu(h) @ w.transpose(1, 2)
            if layer.bias is not None:
                h = h + layer.bias
        targets = y.expand(models, -1).flatten()
        return F.cross_entropy(h.flatten(0, 1), targets, reduction="none").view(models, -1).mean(1)
