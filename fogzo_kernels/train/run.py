"""Run: what the steps of an estimator share; DeviceState: its numbers that a captured CUDA graph advances."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed.group import Peers
from ..nn.view import WeightView
from ..nn.weights import Facts, check_unchanged
from ..ops import arguments
from ..spec.noise import signed64
from .calls import Guide, Prepared
from .guards.gradients import Gradients
from .guards.unmoved_alphas import UnmovedAlphas
from .replay import ReplayState
from .settings import Settings, linear
from .stats import Stats

COUNTERS = ("lost_directions", "lost_steps", "bad_alphas")


class DeviceState:
    """Seed (int64), step (int64) and 1 - beta (float64) as 0-dim tensors on a device; all steps have probes."""

    def __init__(self, device: torch.device, settings: Settings) -> None:
        for name, only in (("start", 0), ("every", 1)):
            if (value := getattr(settings, name)) != only:
                raise ValueError(
                    f"{name} must be {only} if capturable, got {value}: a graph has its probes or not"
                )
        self.settings = settings
        self.seed = torch.tensor(signed64(settings.seed), device=device)
        self.step = torch.zeros((), dtype=torch.int64, device=device)
        self.one_minus_beta = torch.full((), settings.one_minus_beta, dtype=torch.float64, device=device)
        self.set_step(0)

    def noise(self) -> dict[str, Tensor]:
        """Return the tensors by the names that ops give them."""
        return {"one_minus_beta": self.one_minus_beta, "seed": self.seed, "step": self.step}

    def set_step(self, step: int) -> None:
        """Set the number of the coming step."""
        self.step.fill_(step)
        self.advance(0)

    def advance(self, by: int | Tensor) -> None:
        """Go on by 1, or by 0 where only the device knows that the step is lost, without a wait for it."""
        self.step.add_(by)
        s = self.settings
        if s.schedule == "linear":
            self.one_minus_beta.copy_(linear(self.step.double(), s.total_steps, s.one_minus_beta))


@dataclass(eq=False)
class Run:
    """What the steps of an estimator share, and what a step leaves for the next one."""

    settings: Settings
    backend: str | None
    weights: list[WeightView]
    replay: ReplayState
    peers: Peers
    device_state: DeviceState | None  # where a step may be captured in a CUDA graph
    counters: Tensor  # int64, on the weights' device: as COUNTERS (contract section 5)
    found_inf: Tensor  # float32, 0-dim, there: 1 after a gradient pass whose step is lost, else 0
    gradients: Gradients = field(init=False)
    stats: Stats = field(init=False)
    prepared: Prepared = field(init=False)
    pieces: list[WeightView] = field(init=False)  # the weights, each expert of a stack for itself
    places: dict[WeightView, int] = field(init=False)  # of the pieces that this process has, among all
    spans: dict[WeightView, slice] = field(init=False)  # of each weight: the places of all its pieces
    count: int = field(init=False)  # of all pieces
    guide: Guide = field(init=False)
    unmoved_alphas: UnmovedAlphas = field(default_factory=UnmovedAlphas)
    step: Any = None  # the Step that has begun, until it ends
    steps: int = 0  # taken so far, which numbers the noise of the coming step
    reads_checked: bool = False  # whether a step has looked for reads of a weight beside its module
    attached: Any = None  # the handle of the hook that makes each step of an optimizer one of these
    _others: tuple[Facts, list[nn.Parameter]] | None = None
    passes_compared: bool = False  # whether a step with probes has looked for what passes do not see alike

    def __post_init__(self) -> None:
        self.gradients = Gradients([w.parameter for w in self.weights])
        self.stats = Stats(self.settings, self.weights)
        self.pieces, self.places, self.spans, self.count = [], {}, {}, 0
        for w in self.weights:
            own = w.pieces()
            self.pieces += own
            self.places |= {piece: self.count + piece.tensor_id - w.tensor_id for piece in own}
            self.spans[w] = slice(self.count, self.count + w.expert_count)
            self.count += w.expert_count
        self.prepared = Prepared(self.weights, self.pieces, self.backend)
        sum_of = self.peers.sum if self.peers.sharded else None
        self.guide = Guide(self.settings.noise_per == "tensor", self.places, self.count, sum_of)

    def next_noise(self) -> dict[str, Any]:
        """Return which noise the coming step draws, and how much of it, as the ops take it."""
        state, left = self.device_state, self.settings.one_minus_beta_at(self.steps)
        noise = {
            "one_minus_beta": None if left is None else arguments.scalar("one_minus_beta", left),
            "seed": arguments.scalar("seed", self.settings.seed),
            "step": arguments.scalar("step", self.steps),
            "epsilon_scale": self.settings.epsilon_scale,
        }
        return noise if state is None or left is None else noise | state.noise()

    @contextmanager
    def counting(self, first: bool) -> Iterator[Tensor]:
        """Give counters for one of a step's calls: losses and norm are the same for all of them."""
        counters = self.counters if first else torch.zeros_like(self.counters)
        yield counters
        if not first:
            self.counters[2] += counters[2]

    def forget(self, caller: str) -> None:
        """Leave a step whose estimate was not made."""
        if self.step is not None:
            if self.step.active:
                raise RuntimeError(f"{caller}() must not be called inside a pass")
            self.step.end()

    def look(self) -> Facts:
        """Return what the model holds now, and raise if its weights have changed."""
        self.peers.between_passes()
        prepared = self.prepared
        prepared.facts = check_unchanged(self.replay.model, self.weights, prepared.facts)
        return prepared.facts

    def others(self, facts: Facts) -> list[nn.Parameter]:
        """Return the parameters of the model that are no quantized weights."""
        if self._others is None or self._others[0] is not facts:
            own = set(map(id, self.gradients.parameters))
            self._others = facts, [p for p in facts.parameters if id(p) not in own]
        return self._others[1]

    def advance(self, with_probes: bool, lost: Tensor | None) -> None:
        """Go on to the next step. ``lost``: whether this one is lost, where only the device knows."""
        self.gradients.left_estimates(versions=self.attached is not None)
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
