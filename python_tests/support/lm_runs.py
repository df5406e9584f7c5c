"""Small runs of the trainer of language models, and processes of it that die at a drawn moment."""

import csv
import os
import random

import torch
from conftest import EVERYTHING

from bench.evidence import record, train_lm

from .processes import die_after

SMALL = [
    "--hidden", "64", "--layers", "1", "--context", "32", "--rows", "4", "--device", "cpu", "--threads", "1",
    "--bytes", "200000", "--sample", "0",
]  # fmt: skip
KILLS = 10 if EVERYTHING in os.environ else 2
MOST_STEPS, CALLS = 9, 25_000  # a step has 7,000 calls or more, a save 14,000: at most 12 steps for each kill
STEPS = 12 * (KILLS + 1)  # of a run that all the kills interrupt, and that goes on after them


def train(out, *options):
    return train_lm.main(["--out", str(out), *SMALL, *options])


def tensors(found):
    """All tensors of a checkpoint, in order."""
    if isinstance(found, torch.Tensor):
        return [found]
    inner = found.values() if isinstance(found, dict) else found if isinstance(found, list | tuple) else []
    return [t for one in inner for t in tensors(one)]


def same(a, b):
    assert a["step"] == b["step"]
    pairs = list(zip(tensors(a), tensors(b), strict=True))
    return len(pairs) > 20 and all(torch.equal(x, y) for x, y in pairs)


def rows(out):
    with (out / record.LOG).open(newline="") as file:
        return list(csv.DictReader(file))


def moments():
    """When each process dies: in which of its steps (0: before), after how many calls, how long after."""
    seed = int(os.environ.get("FOGZO_TEST_SEED", random.randrange(2**31)))
    print(f"FOGZO_TEST_SEED={seed}")
    drawn = random.Random(seed)
    for _ in range(KILLS):
        step = drawn.choice([0, 0, 0, *range(1, MOST_STEPS)])
        yield step, drawn.randrange(1, CALLS), drawn.uniform(1e-6, 3e-3)


def die_in(step, calls, seconds):
    """Let this process die at such a moment of its run."""
    take_step = train_lm.take_step

    def counted(run):
        nonlocal step
        step -= 1
        if step == 0:
            die_after(calls, seconds)
        return take_step(run)

    train_lm.take_step = counted
    if step == 0:
        die_after(calls, seconds)
