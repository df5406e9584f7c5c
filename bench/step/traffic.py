"""What a step asks of this package's ops and of memory: calls, bytes, time by op, peak; kernels on a GPU."""

from __future__ import annotations

import gc
import inspect
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from fogzo_kernels.backends import FUNCTIONS, Backend, available_backends, load

from .methods import Clock, Step

#: Arguments of a backend's functions that are read and written; every other list is one or the other.
UPDATED = {"estimate_gradient_": ("grads",), "estimate_update_": ("latents", "masters", "states")}


@dataclass
class Traffic:
    """Of one step."""

    calls: float = 0  # outside of passes, as what follows
    bytes: float = 0
    bytes_in_passes: float = 0
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))


def size(found: Any) -> int:
    """Bytes of the tensors in lists of any depth."""
    if isinstance(found, Tensor):
        return found.numel() * found.element_size()
    return sum(map(size, found)) if isinstance(found, list | tuple) else 0


def bytes_of(function: str, arguments: dict[str, Any]) -> int:
    """Read and written by a call, of the lists of tensors that it takes."""
    given = dict(arguments)
    if (update := given.pop("update", None)) is not None:
        given |= {"masters": update.masters, "states": list(update.states)}
    lists = {name: size(value) for name, value in given.items() if type(value) in (list, tuple)}
    return sum(lists.values()) + sum(lists.get(name, 0) for name in UPDATED.get(function, ()))


@contextmanager
def recorded(clock: Clock) -> Iterator[Traffic]:
    """Every call of a backend's functions, in this thread or autograd's, while it is open."""
    traffic = Traffic()

    def wrapped(function: str, call: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(getattr(Backend, function))

        def recording(*args: Any, **options: Any) -> Any:
            moved = bytes_of(function, signature.bind(None, *args, **options).arguments)
            start = clock.now()
            found = call(*args, **options)
            traffic.seconds[f"{function}{' in passes' * clock.inside}"] += clock.now() - start
            traffic.calls += not clock.inside
            if clock.inside:
                traffic.bytes_in_passes += moved
            else:
                traffic.bytes += moved
            return found

        return recording

    backends: list[Any] = [load(name) for name, reason in available_backends().items() if reason is None]
    kept = [(b, name, getattr(b, name)) for b in backends for name in FUNCTIONS if name != "unavailable"]
    for backend, name, call in kept:
        setattr(backend, name, wrapped(name, call))
    try:
        yield traffic
    finally:
        for backend, name, call in kept:
            setattr(backend, name, call)


def traffic_of(step: Step, device: torch.device, steps: int) -> Traffic:
    """The mean over some steps."""
    clock = Clock(device)
    with recorded(clock) as found:
        for _ in range(steps):
            step(clock)
    return Traffic(
        calls=found.calls / steps,
        bytes=found.bytes / steps,
        bytes_in_passes=found.bytes_in_passes / steps,
        seconds={name: seconds / steps for name, seconds in found.seconds.items()},
    )


def launches_of(step: Step, device: torch.device) -> int | None:
    """Kernels, copies and fills of one step on a GPU; None elsewhere."""
    if device.type != "cuda":
        return None
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        step(Clock(device))
        torch.cuda.synchronize(device)
    on_device = torch.autograd.DeviceType.CUDA
    return sum(event.device_type == on_device for event in found.events() or [])


def peak_of(make: Callable[[], Step], device: torch.device, steps: int = 3) -> int:
    """Bytes at most that PyTorch holds of what a method makes: its copy of the model, and all of some steps."""
    gc.collect()  # what earlier methods left in cycles would be freed, and counted, during this one
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run(make, device, steps)
        return int(torch.cuda.max_memory_allocated(device)) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        run(make, device, steps)
    events = found.profiler.kineto_results.events()  # type: ignore[union-attr]
    held = peak = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return int(peak)


def run(make: Callable[[], Step], device: torch.device, steps: int) -> None:
    step = make()
    for _ in range(steps):
        step(Clock(device))
