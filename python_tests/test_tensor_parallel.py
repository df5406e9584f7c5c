"""Tensor parallelism: processes that have rows or columns of a layer train as one process."""

import functools

import pytest
import torch
import torch.nn.functional as F
from support.processes import needs_gloo, spawned
from support.sharded_models import STEPS, Net, batch_of, cut, optimizer_of, train, values_of

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
