"""FSDP2: several processes with the same batch train with the bits of one, whoever holds which rows."""

import functools

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from processes import needs_gloo, spawned
from sharded_models import CASES, ONLY_BEFORE, STEPS, batch_of, made, optimizer_of, train, values_of
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import fogzo_kernels as fk
from fogzo_kernels.nn.sharded import local, whole

pytestmark = needs_gloo
#: Of these the sums of a scale or its gradient are made in another order than in one process.
ROUNDED = {"learned"}


def shard(model, mesh=None, **options):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),)) if mesh is None else mesh
    options |= {"ignored_params": fk.learned_alphas(model)} if fk.learned_alphas(model) else {}
    for part in (*model.blocks, model):
        fully_shard(part, mesh=mesh, **options)


def hybrid(model):
    shard(model, init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "rows")))


def everything(rank):
    """By case and order, losses, and the model at the end."""
    found = {}
    for case in CASES:
        for before in (True, False)[: 2 - (case in ONLY_BEFORE)]:
            model = made(case, shard, before)
            found[case, before] = train(model, case), values_of(model)
    model = made("learned row", shard)
    found["learned row", "estimate_"] = train(model, "learned row", fused=False), values_of(model)
    if dist.get_world_size() == 4:
        model = made("learned row", hybrid)
        found["learned row", "hybrid"] = train(model, "learned row"), values_of(model)
    return found


@functools.cache
def one_process(case, fused=True):
    model = made(case)
    return train(model, case, fused=fused), values_of(model)


@pytest.mark.slow_first
@pytest.mark.parametrize("processes", [2, 4])
def test_many_processes_have_the_bits_of_one(tmp_path, processes):
    """Dropout, BatchNorm, tied weights, checkpointing, rows that do not divide, every kind of scale."""
    for found in spawned(everything, tmp_path, processes):
        assert len(found) == 2 * len(CASES) - len(ONLY_BEFORE) + processes // 2
        for (case, how), (losses, values) in found.items():
            expected, state = one_process(case, how != "estimate_")
            close = {"rtol": 1e-4, "atol": 1e-5} if case in ROUNDED else {"rtol": 0, "atol": 0}
            torch.testing.assert_close(losses, expected, **close, msg=f"{case} {how}: {losses} {expected}")
            assert values.keys() == state.keys()
            for name in values:
                torch.testing.assert_close(values[name], state[name], **close, msg=f"{case} {how}: {name}")
            assert losses[-1] < losses[0]
