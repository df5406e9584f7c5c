"""Training runs over processes, with one bar that counts their steps; and what such runs share."""

from __future__ import annotations

import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, TypeVar

from tqdm import tqdm

J = TypeVar("J")
K = TypeVar("K")
R = TypeVar("R")
DECAYS = ("cosine", "linear", "constant")
EVERY = 5  # steps of a run between two words to the bar


class Progress:
    """What a run calls after each step; the bar hears of some of them."""

    def __init__(self, queue: Any) -> None:
        self.queue, self.steps = queue, 0

    def __call__(self) -> None:
        self.steps += 1
        if self.steps % EVERY == 0:
            self.queue.put(EVERY)

    def end(self) -> None:
        self.queue.put(self.steps % EVERY)


def one(train: Callable[[J, Callable[[], None]], R], queue: Any, job: J) -> R:
    progress = Progress(queue)
    try:
        return train(job, progress)
    finally:
        progress.end()


def run(
    train: Callable[[J, Callable[[], None]], R],
    jobs: Sequence[J],
    steps: int,
    workers: int | None,
    preload: Sequence[str] = (),
    keep: Callable[[R], object] = lambda result: None,
) -> list[R]:
    """The results of the jobs, in their order; the last jobs are begun first.

    Args:
        train: of one job; it calls its second argument after each step.
        steps: of a job.
        workers: processes; None: one for each core.
        preload: modules that processes have loaded when they start, where the system can do that.
        keep: is called with each result when it comes.
    """
    server = "forkserver" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if server else "spawn")
    if server:
        context.set_forkserver_preload(["fogzo_kernels", "tqdm", *preload])
    bar = tqdm(total=len(jobs) * steps, unit="step", desc=f"{len(jobs)} runs", smoothing=0.05)
    with bar, context.Manager() as manager, context.Pool(workers or os.cpu_count()) as pool:
        queue = manager.Queue()
        pending = [pool.apply_async(partial(one, train, queue), (job,)) for job in reversed(jobs)]
        left = list(pending)
        while left or not queue.empty():
            for result in [result for result in left if result.ready()]:
                left.remove(result)
                keep(result.get())  # raises what the run raised
            while not queue.empty():
                bar.update(queue.get())
            time.sleep(0.1)
        return [result.get() for result in reversed(pending)]


def best_of(losses: Iterable[tuple[K, float]]) -> K:
    """What has the least mean loss; what has diverged once is the worst."""
    groups: dict[K, list[float]] = {}
    for what, loss in losses:
        groups.setdefault(what, []).append(loss if math.isfinite(loss) else math.inf)
    return min(groups, key=lambda what: statistics.mean(groups[what]))


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error. The error of one value is NaN, and so are both where one is not finite."""
    if not all(map(math.isfinite, values)):
        return math.nan, math.nan
    spread = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.mean(values), spread


def plus_minus(values: Sequence[float], digits: int) -> str:
    mean, error = mean_and_error(values)
    return f"{mean:.{digits}f} ± {error:.{digits}f}" if len(values) > 1 else f"{mean:.{digits}f}"


def rate_at(step: int, steps: int, warm_up: float, decay: str = "cosine") -> float:
    """Share of the learning rate: up over a share of the steps, then down to a tenth of it, but if constant."""
    warm = max(int(warm_up * steps), 1)
    if step < warm:
        return (step + 1) / warm
    done, left = step - warm, max(steps - warm, 1)
    if decay == "cosine":
        return 0.55 + 0.45 * math.cos(math.pi * done / left)
    return 1 - 0.9 * (done / left) if decay == "linear" else 1.0
