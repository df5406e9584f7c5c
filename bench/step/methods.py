"""Methods of training: one step each, with a clock for its passes."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

import fogzo_kernels as fk

from .materialized import Materialized, Mezo
from .models import Setting, Task
from .peers import GROUP, prepare_lsq, prepare_torchao

LR, DECAY, STEPS = 1e-4, 0.1, 10**6
LSQ = fk.presets.lsq(2)
#: As torchao's QAT: the largest value of a group is 7.5 steps, and may round up in one and down in the other.
INT4 = fk.Quantizer(fk.Grid.uniform(4), fk.Scale.absmax(GROUP, factor=1 / 7.5), fk.StraightThrough("identity"))


@dataclass(frozen=True)
class Ours:
    """A method of this package."""

    fogzo: dict[str, Any] | None = field(default_factory=dict)  # options of Fogzo; None: no Fogzo
    quantizer: fk.Quantizer = LSQ
    activation: fk.Quantizer | None = None


STE: dict[str, Any] = {"directions": 0, "kappa": 0.0}
OURS = {
    "modules": Ours(None),
    "ste": Ours(STE),
    "guided": Ours({"directions": 0, "noise_per": "tensor"}),
    "fogzo": Ours(),
    "ste-int4": Ours(STE, INT4),
    "ste-w4a8": Ours(STE, INT4, fk.presets.dynamic(8)),
}
#: Linear layers of others, in a stock loop.
LAYERS: dict[str, Callable[[nn.Module, list[str]], None]] = {
    "torchao": prepare_torchao,
    "torchao-compiled": partial(prepare_torchao, compiled=True),
    "torchao-w4a8": partial(prepare_torchao, inputs=True),
    "lsq": prepare_lsq,
}
LOOPS = {"eager": Materialized, "mezo": Mezo}
BASE = "float"  # the same model without quantization; every ratio has its time below the line
METHODS = (BASE, *LAYERS, *LOOPS, *OURS)
#: The methods that know a compiled model and quantized inputs.
FLEXIBLE = (BASE, *(name for name, ours in OURS.items() if ours.quantizer is LSQ))


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
    if name in LOOPS:
        return by_loop(LOOPS[name](model, task.skip, lr=LR), task)
    if name in OURS:
        return by_this_package(model, OURS[name], task, setting)
    if name in LAYERS:
        LAYERS[name](model, task.skip)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=DECAY, fused=True)
    return by_backward(model, optimizer, task, setting)


def by_loop(loop: Materialized | Mezo, task: Task) -> Step:
    scale = 1 / len(task.batches)

    def step(clock: Clock) -> None:
        loop.step(lambda m, x, y: task.loss_of(m, x, y) * scale, task.batches, clock.timed)

    return step


def by_backward(model: nn.Module, optimizer: torch.optim.Optimizer, task: Task, setting: Setting) -> Step:
    run, scale = torch.compile(model) if setting.compiled else model, 1 / len(task.batches)

    def step(clock: Clock) -> None:
        optimizer.zero_grad()
        for x, y in task.batches:
            clock.timed(lambda x=x, y=y: (task.loss_of(run, x, y) * scale).backward())
        optimizer.step()

    return step


def by_this_package(model: nn.Module, ours: Ours, task: Task, setting: Setting) -> Step:
    quantize(model, ours, task, setting)
    groups = fk.parameter_groups(model, weight_decay=DECAY)
    if ours.fogzo is None:
        return by_backward(model, fk.AdamW(groups, lr=LR, backend=setting.backend), task, setting)
    options = {"directions": setting.directions, "kappa": 0.1, **ours.fogzo}
    fogzo = fk.Fogzo(model, total_steps=STEPS, schedule="constant", backend=setting.backend, **options)
    optimizer = fk.AdamW(groups, lr=LR, fogzo=fogzo)
    run, scale = torch.compile(model) if setting.compiled else model, 1 / len(task.batches)

    def step(clock: Clock) -> None:
        optimizer.zero_grad()
        for probe in fogzo.probes():
            with probe:
                for x, y in task.batches:
                    clock.timed(lambda x=x, y=y, p=probe: p.backward(task.loss_of(run, x, y) * scale))
        optimizer.step()

    return step


def quantize(model: nn.Module, ours: Ours, task: Task, setting: Setting) -> None:
    """By the method's quantizer, and with inputs of its own, or of as many bits as the setting says."""
    activation = ours.activation
    if setting.activation_bits:
        activation = fk.presets.dynamic(setting.activation_bits)
    fk.quantize_model(model, ours.quantizer, skip=task.skip, activation=activation, backend=setting.backend)
    if setting.compute:
        fk.set_compute_(model, setting.compute)
