"""Run: what the steps of an estimator share, and what a step leaves for the next one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..distributed.group import Peers
from ..nn.view import WeightView
from ..ops import arguments
from .device import DeviceState
from .guards.gradients import Gradients
from .guards.unmoved_alphas import UnmovedAlphas
from .replay import ReplayState
from .settings import Settings
from .stats import Stats

COUNTERS = ("lost_directions", "lost_steps", "bad_alphas")


@dataclass(eq=False)
class Run:
    """What the steps of an estimator share, and what a step leaves for the next one.

    Attributes:
        settings, backend, weights: of the estimator.
        replay: saves and loads what all passes of a step must see alike.
        peers: the processes that train the model with this one.
        device_state: the step's number and 1 - beta on the device, or None.
        counters: int64, one for each of ``COUNTERS``, on the weights' device (contract section 5).
        found_inf: float32, 0-dim, beside them: 1 after a gradient pass whose step is lost, else 0.
        gradients: watches the gradients of the weights.
        stats: of the last step.
        unmoved_alphas: looks whether learned alphas are in an optimizer.
        step: the Step that has begun, until it ends.
        steps: how many were taken, which numbers the noise of the coming one.
        reads_checked: whether a step has looked for reads of a weight beside its module.
        passes_compared: whether a step with probes has looked for what passes do not see alike.
    """

    settings: Settings
    backend: str | None
    weights: list[WeightView]
    replay: ReplayState
    peers: Peers
    device_state: DeviceState | None
    counters: Tensor
    found_inf: Tensor
    gradients: Gradients = field(init=False)
    stats: Stats = field(init=False)
    unmoved_alphas: UnmovedAlphas = field(default_factory=UnmovedAlphas)
    step: Any = None
    steps: int = 0
    reads_checked: bool = False
    passes_compared: bool = False

    def __post_init__(self) -> None:
        self.gradients = Gradients([w.parameter for w in self.weights])
        self.stats = Stats(self.settings, self.weights)

    def next_noise(self) -> dict[str, Any]:
        """Return which noise the coming step draws, and how much of it, as the ops take it."""
        state, left = self.device_state, self.settings.one_minus_beta_at(self.steps)
        return {
            "one_minus_beta": None if left is None else arguments.scalar("one_minus_beta", left),
            "seed": arguments.scalar("seed", self.settings.seed),
            "step": arguments.scalar("step", self.steps),
            **({} if state is None else state.noise()),
            "epsilon_scale": self.settings.epsilon_scale,
        }

    @contextmanager
    def counting(self, first: bool) -> Iterator[Tensor]:
        """Give counters for one of a step's calls: losses and norm are the same for all of them."""
        counters = self.counters if first else torch.zeros_like(self.counters)
        yield counters
        if not first:
            self.counters[2] += counters[2]

    def advance(self, with_probes: bool, lost: Tensor | None) -> None:
        """Go on to the next step. ``lost``: whether this one is lost, where only the device knows."""
        self.gradients.left_estimates()
        self.unmoved_alphas.end()
        self.reads_checked = True
        self.passes_compared |= with_probes
        if self.device_state is not None:
            self.device_state.advance(1 if lost is None else (~lost).long())
        self.steps += 1

    def restart(self, steps: int, counters: Tensor) -> None:
        """Go on from a state that was loaded."""
        self.steps = steps
        if self.device_state is not None:
            self.device_state.set_step(steps)
        self.counters.copy_(counters)
        self.peers.due = True
        self.stats.restart(int(counters[1]))
