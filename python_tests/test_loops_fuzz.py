"""Random training loops against plain PyTorch (loops.py), for 5 seconds; or FOGZO_FUZZ_LOOPS=1000 of them."""

import math
import os

import pytest
import torch
from support import loops

from fogzo_kernels.train.run import Run


def test_random_loops_are_those_of_the_contract(generator):
    seed = generator.initial_seed() % 2**31
    wanted = os.environ.get("FOGZO_FUZZ_LOOPS")
    print(f"python -m support.loops --seed {seed}")
    done = loops.many(seed, int(wanted or 10**9), math.inf if wanted else 5.0)
    assert done == int(wanted) if wanted else done > 0


def without_noise(monkeypatch):
    monkeypatch.setattr(Run, "next_noise", lambda run, of=Run.next_noise: of(run) | {"epsilon_scale": 0.5})


def without_a_look(monkeypatch):
    monkeypatch.setattr(
        "fogzo_kernels.train.step.look",
        lambda ts, device, zeros=True: (torch.ones(len(ts), dtype=torch.bool), torch.tensor(True)),
    )


def without_the_scale(monkeypatch):
    monkeypatch.setattr("fogzo_kernels.optim.scaling.Scaling.unscale_", lambda self, grads: None)


def without_buffers(monkeypatch):
    monkeypatch.setattr("fogzo_kernels.train.replay.ReplayState.load_buffers", lambda *args, **options: None)


def without_a_count(monkeypatch):
    monkeypatch.setattr("fogzo_kernels.train.guards.gradients.Gradients.lose", lambda self, parameters: None)


@pytest.mark.parametrize(
    "defect", [without_noise, without_a_look, without_the_scale, without_buffers, without_a_count]
)
def test_random_loops_see_a_planted_defect(defect, monkeypatch):
    defect(monkeypatch)
    with pytest.raises(AssertionError, match=r"loop \d+, step"):
        loops.many(0, 60)
