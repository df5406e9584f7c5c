"""A small model with all that a step must leave in place, and one step of it; for the tests."""

import torch
import torch.nn.functional as F
from torch import nn

import fogzo_kernels as fk

GRID, STE = fk.Grid.uniform(2), fk.StraightThrough("identity", clip=False)
QUANTIZER = fk.Quantizer(GRID, fk.Scale.fixed(0.2), STE)


class Net(nn.Module):
    """Dropout, BatchNorm, a tied weight and parameters that are not quantized."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.out = nn.Linear(9, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.tied = nn.Linear(8, 8, bias=False)
        self.tied.weight = self.second.weight
        self.norm, self.drop = nn.BatchNorm1d(8), nn.Dropout(0.3)

    def forward(self, x):
        x = self.drop(F.relu(self.norm(self.first(x))))
        x = x + self.drop(F.relu(self.second(x)))
        return self.out(x + self.tied(x))


def make(dtype=torch.float32, seed=0, backend=None, **kwargs):
    torch.manual_seed(seed)
    model = Net()
    fk.quantize_model(model, QUANTIZER, skip=["out"], backend=backend)
    model.to(dtype)
    options = {"total_steps": 100, "one_minus_beta": 1e-2, "backend": backend, **kwargs}
    return model, fk.Fogzo(model, **{"directions": 1} | options)


def batch(dtype=torch.float32, rows=12, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 9, generator=generator).to(dtype)
    return x, torch.randint(3, (rows,), generator=generator)


def loss_of(model, x, y):
    return F.cross_entropy(model(x).float(), y)


def state_of(model):
    return {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()


def same_state(a, b):
    same = all(torch.equal(a[0][k], b[0][k]) for k in a[0])
    return same and a[0].keys() == b[0].keys() and torch.equal(a[1], b[1])


def run_step(model, fogzo, micro_batches):
    """All losses of a step."""
    losses = []
    for probe in fogzo.probes():
        with probe:
            for x, y in micro_batches:
                probe.backward(loss_of(model, x, y) / len(micro_batches))
        losses.append(probe.loss)
    fogzo.estimate_()
    return torch.stack(losses)


def setup(**options):
    """A model, its Fogzo, and a closure of one batch."""
    model, fogzo = make(schedule="constant", **options)
    x, y = batch()
    return model, fogzo, lambda: loss_of(model, x, y)


def estimator(model, **options):
    return fk.Fogzo(
        model, **({"directions": 1, "total_steps": 9, "one_minus_beta": 0.5, "schedule": "constant"} | options)
    )
