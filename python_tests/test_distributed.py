"""Data parallel: two processes give the estimate of one with the whole batch."""

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fogzo_kernels as fk

STEPS = 3


def train(model, rows, reduction="mean", factor=1.0):
    """Gradients after each of a few steps on the given rows of a fixed batch."""
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(8, 6, generator=generator), torch.randint(3, (8,), generator=generator)
    fogzo = fk.Fogzo(model, total_steps=10, one_minus_beta=0.1, schedule="constant", loss_reduction=reduction)
    found = []
    for _ in range(STEPS):
        model.zero_grad()
        loss = fogzo.step(lambda: factor * F.cross_entropy(model(x[rows]), y[rows]))
        found.append((loss, *(p.grad.clone() for p in model.parameters())))
    return found


SCALES = {"fixed": fk.Scale.fixed(0.2), "learned": fk.Scale.learned("row")}


def net(scale):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    straight_through = fk.StraightThrough("identity", clip=False)
    fk.quantize_model(model, fk.Quantizer(fk.Grid.uniform(2), SCALES[scale], straight_through))
    return model


def worker(rank, folder, scale):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    half = slice(0, 4) if rank == 0 else slice(4, 8)
    found = train(DistributedDataParallel(net(scale)), half)
    torch.save(found, os.path.join(folder, f"{rank}.pt"))
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="this build of PyTorch has no gloo")
@pytest.mark.parametrize("scale", SCALES)
def test_two_processes_give_one_estimate(tmp_path, scale):
    mp.spawn(worker, (str(tmp_path), scale), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    whole = train(net(scale), slice(0, 8))
    for a, b, expected in zip(first, second, whole, strict=True):
        for x, y, z in zip(a, b, expected, strict=True):
            assert torch.equal(x, y)
            torch.testing.assert_close(x, z, rtol=1e-3, atol=1e-5)
