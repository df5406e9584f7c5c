"""Methods of training: one step each, with a clock for its passes."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import fogzo_kernels as fk

from .materialized import Materialized, Mezo
from .models import Setting, Task

#: Options of Fogzo by method; STE has none.
FOGZO: dict[str, dict[str, Any]] = {
    "fogzo": {},
    "every-4": {"every": 4},
}
PEERS = ("eager", "compile", "mezo")
METHODS = ("ste", *FOGZO, *PEERS)
LR, STEPS = 1e-4, 10**6


@dataclass
class Clock:
    """Seconds in forwards and backwards of a step."""

    device: torch.device
    passes: float = 0.0
    inside: bool = False  # whether one is running

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def timed(self, call: Callable[[], Any]) -> Any:
        start, self.inside = self.now(), True
        found = call()
        self.passes += self.now() - start
        self.inside = False
        return found


Step = Callable[[Clock], None]


def method_of(name: str, task: Task, setting: Setting) -> Step:
    """A step of a method on a copy of the model."""
    model = copy.deepcopy(task.model)
    scale = 1 / len(task.batches)
    if name in PEERS:
        kind = Mezo if name == "mezo" else Materialized
        peer = kind(model, task.skip, lr=LR, compiled=name == "compile")

        def peers_step(clock: Clock) -> None:
            peer.step(lambda m, x, y: task.loss_of(m, x, y) * scale, task.batches, clock.timed)

        return peers_step
    quantize(model, task, setting)
    groups = fk.parameter_groups(model, weight_decay=0.1)
    run = torch.compile(model) if setting.compiled else model
    if name == "ste":
        plain = fk.AdamW(groups, lr=LR, backend=setting.backend)

        def stes_step(clock: Clock) -> None:
            plain.zero_grad()
            for x, y in task.batches:
                clock.timed(lambda x=x, y=y: (task.loss_of(run, x, y) * scale).backward())
            plain.step()

        return stes_step
    fogzo = fk.Fogzo(
        model,
        total_steps=STEPS,
        kappa=0.1,
        schedule="constant",
        directions=setting.directions,
        backend=setting.backend,
        **FOGZO[name],
    )
    optimizer = fk.AdamW(groups, lr=LR, fogzo=fogzo)

    def fogzos_step(clock: Clock) -> None:
        optimizer.zero_grad()
        for probe in fogzo.probes():
            with probe:
                for x, y in task.batches:
                    clock.timed(lambda x=x, y=y, p=probe: p.backward(task.loss_of(run, x, y) * scale))
        optimizer.step()

    return fogzos_step


def quantize(model: torch.nn.Module, task: Task, setting: Setting) -> None:
    """LSQ with 2 bits, and with inputs of their own bits if the setting says so."""
    activation = fk.presets.dynamic(setting.activation_bits) if setting.activation_bits else None
    fk.quantize_model(model, fk.presets.lsq(2), skip=task.skip, activation=activation, backend=setting.backend)
    if setting.compute:
        fk.set_compute_(model, setting.compute)
