"""Tensor parallelism: processes that have rows or columns of a layer train as one process."""

import functools

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from support.processes import needs_gloo, spawned
from support.sharded_models import STEPS, Net, batch_of, cut, optimizer_of, train, values_of
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import fogzo_kernels as fk
from fogzo_kernels.nn.view import whole

pytestmark = needs_gloo


def in_parts(scale, rank):
    return parallel_run(scale, cut)


def parallel_run(scale, sharded=lambda model: None):
    torch.manual_seed(0)
    model = Net(16)
    for block in model.blocks:
        block.dropout.p = 0.0  # between the two layers each process would draw for its columns
    sharded(model)
    fk.quantize_model(model, fk.presets.lsq(2, scale), skip=["embed", "head"])
    fogzo = fk.Fogzo(model, total_steps=STEPS, kappa=0.1, seed=3, directions=1)
    optimizer = optimizer_of(model, fogzo)
    losses = train(model, "learned row", fogzo=fogzo, optimizer=optimizer)
    tokens, labels = batch_of(0)
    optimizer.zero_grad()
    F.cross_entropy(model(tokens), labels).backward()  # plain straight-through, outside a step
    grads = {name: whole(p.grad) for name, p in model.named_parameters()}
    return losses, values_of(model), grads


@pytest.mark.parametrize("scale", ["tensor", "row", 8])
def test_tensor_parallelism_trains_as_one_process(tmp_path, scale):
    """Rows of one layer and columns of the next on each process: the noise of one, up to float's sums."""
    expected, state, grads = parallel_run(scale)
    for losses, values, found in spawned(functools.partial(in_parts, scale), tmp_path):
        torch.testing.assert_close(losses, expected, rtol=1e-3, atol=1e-4)
        for name in [name for name in values if name.endswith((".weight", ".alpha"))]:
            torch.testing.assert_close(values[name], state[name], rtol=1e-2, atol=1e-3, msg=name)
        for name, grad in found.items():
            torch.testing.assert_close(grad, grads[name], rtol=1e-2, atol=1e-4, msg=name)


def embedding_in_columns(rank):
    """The estimate of an embedding that is cut by columns, or whole where there is one process."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(8, 6, padding_idx=5), nn.Linear(6, 3))
    nn.init.normal_(model[0].weight)
    if dist.is_initialized():
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        parallelize_module(model[0], mesh, ColwiseParallel(output_layouts=Replicate()))
    fk.quantize_model(model, fk.presets.fixed(3, 0.3), skip="1")
    tokens = torch.tensor([0, 5, 6, 2])
    fogzo = fk.Fogzo(model, total_steps=10, one_minus_beta=0.5, schedule="constant", directions=1)
    fogzo.backward(lambda: F.cross_entropy(model(tokens), tokens % 3))
    return whole(model[0].weight.grad).clone()


def test_rows_without_a_gradient_keep_still_where_columns_are_cut(tmp_path):
    """The padding row and rows out of the batch, on processes that each see a part of a row."""
    expected = embedding_in_columns(0)
    assert expected.ne(0).any(1).tolist() == [row in (0, 2, 6) for row in range(8)]
    for found in spawned(embedding_in_columns, tmp_path):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
        assert torch.equal(found.ne(0).any(1), expected.ne(0).any(1))
