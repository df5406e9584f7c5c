"""Which weights, and which rows of embeddings, take part in a step: those whose gradient is there and not 0."""

import copy
import functools

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from support.processes import leave, needs_gloo, spawned
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fogzo_kernels as fk
from fogzo_kernels.nn.view import whole

PRESETS = {"fixed": fk.presets.fixed(3, 0.05), "lsq": fk.presets.lsq(2), "bitnet": fk.presets.bitnet()}


class Experts(nn.Module):
    """Expert k sees the batch, or none of it: ``empty`` experts run with no tokens."""

    def __init__(self, count=2):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(count))
        self.out = nn.Linear(16, 3)

    def forward(self, x, k, empty=()):
        found = self.experts[k](x)
        for other in empty:
            found = torch.cat([found, self.experts[other](x[:0])])
        return self.out(found)


def experts(preset="fixed", dtype=torch.float32):
    torch.manual_seed(0)
    model = Experts()
    fk.quantize_model(model, PRESETS[preset])
    return model.to(dtype)


def batch(seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(8, 16, generator=generator).to(dtype), torch.randint(3, (8,), generator=generator)


def loss_of(model, x, y, k, empty=()):
    return F.cross_entropy(model(x, k, empty).float(), y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("directions", [1, 3])
@pytest.mark.parametrize("preset", PRESETS)
def test_none_zeros_and_no_tokens_are_alike(preset, directions, dtype):
    """The others' estimates are to the bit those of a step that it is not there for."""
    found = []
    for how in ("none", "zeros", "no tokens"):
        model = experts(preset, dtype)
        fogzo = fk.Fogzo(model, total_steps=10, kappa=1.0, schedule="constant", directions=directions)
        loss_of(model, *batch(0, dtype), 1).backward()
        model.zero_grad(set_to_none=how != "zeros")
        fogzo.backward(lambda m=model, e=[1] if how == "no tokens" else []: loss_of(m, *batch(1, dtype), 0, e))
        idle = model.experts[1]
        assert idle.weight.grad is None if how == "none" else not idle.weight.grad.any()
        assert model.experts[0].weight.grad.any()
        if how == "zeros" and preset == "lsq":
            assert not idle.alpha.grad.any()
        used = [*model.experts[0].parameters(), *model.out.parameters()]
        found.append([p.grad for p in used])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("optimizer", [fk.AdamW, fk.SGD])
@pytest.mark.parametrize("groups", [False, True])
def test_an_idle_weight_is_not_moved_by_a_fused_step(optimizer, groups):
    for none in (True, False):
        model = experts()
        fogzo = fk.Fogzo(model, total_steps=10, kappa=1.0, schedule="constant", directions=1)
        params = fk.parameter_groups(model, weight_decay=0.0) if groups else model.parameters()
        end = optimizer(params, lr=0.1, weight_decay=0.0, fogzo=fogzo)
        loss_of(model, *batch(0), 1).backward()
        end.zero_grad(set_to_none=none)
        before = model.experts[1].weight.detach().clone()
        end.step(lambda model=model: loss_of(model, *batch(1), 0))
        assert torch.equal(model.experts[1].weight, before)


def test_a_step_without_any_gradient_but_zeros_is_no_error():
    """Nothing takes part; it is a step all the same, and no error."""
    model = experts("lsq")
    fogzo = fk.Fogzo(model, total_steps=10, kappa=1.0, schedule="constant", directions=1)
    fogzo.backward(lambda: loss_of(model, *batch(0), 0) * 0)
    assert fogzo.steps == 1
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("directions", [0, 1])
def test_noise_per_tensor_counts_the_rows_of_an_embedding_that_got_a_gradient(directions):
    """The rest of a large table would make the noise of its few rows in the batch small."""
    model, tokens = nn.Sequential(nn.Embedding(40, 16), nn.Linear(16, 6)), torch.tensor([0, 3, 3, 17])
    fk.quantize_model(model, PRESETS["bitnet"])
    options = {"schedule": "constant", "directions": directions, "noise_per": "tensor", "seed": 7}
    fogzo = fk.Fogzo(model, total_steps=9, kappa=1.0, **options)
    losses, weights = [], [model[0].weight, model[1].weight]
    for probe in fogzo.probes():
        with probe:
            probe.backward(F.cross_entropy(model(tokens), tokens % 6))
        losses.append(probe.loss.clone())
    grads, rate = [p.grad.clone() for p in weights], fogzo.one_minus_beta
    fogzo.estimate_()
    q, alphas = model[0].quantizer, [model[0].alpha, model[1].alpha]
    sumsqs = fk.guide_sumsq(grads, alphas, grid=q.grid, per_tensor=True)
    factors = fk.noise_factors(sumsqs, [3 * 16, 6 * 16])
    unread = grads[0].eq(0).all(1)
    assert unread.sum() == 37
    sides = (torch.stack(side) if directions else None for side in (losses[1::2], losses[2::2]))
    fk.estimate_gradient_(
        grads, *sides, alphas, sumsqs.sum().sqrt().float(), grid=q.grid, straight_through=q.straight_through,
        one_minus_beta=rate, seed=7, step=0, tensor_ids=[0, 1], noise_factors=factors,
    )  # fmt: skip
    assert rate > 0
    grads[0][unread] = 0
    assert all(torch.equal(p.grad, grad) for p, grad in zip(weights, grads, strict=True))


@pytest.mark.parametrize("ours", [fk.AdamW, fk.SGD])
def test_a_weight_that_was_idle_keeps_its_own_count_on_the_device(ours):
    """It has its own number of steps, as in PyTorch, and is not updated with that of another."""
    theirs = {fk.AdamW: torch.optim.AdamW, fk.SGD: functools.partial(torch.optim.SGD, momentum=0.9)}[ours]
    options = {"momentum": 0.9} if ours is fk.SGD else {}
    rate = torch.tensor(0.1, dtype=torch.float64)
    found = []
    for make in (lambda p: ours(p, lr=rate, capturable=True, **options), lambda p: theirs(p, lr=0.1)):
        pair = [torch.ones(3, requires_grad=True) for _ in "ab"]
        optimizer = make(pair)
        for step in range(4):
            for i, p in enumerate(pair):
                p.grad = None if i and step == 1 else torch.full((3,), 1.0 + step)
            optimizer.step()
        found.append(pair)
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


# ---- replicas


def replicas(preset, options, rank):
    """Each process runs one expert; in the last steps all run the first one."""
    model = DistributedDataParallel(experts(preset), **options)
    fogzo = fk.Fogzo(model, total_steps=50, kappa=0.5, schedule="constant", directions=2)
    count, found = dist.get_world_size(), []
    fused = preset != "bitnet"
    params = (
        fk.parameter_groups(model, weight_decay=0.1, alpha_lr=1e-3) if preset == "lsq" else model.parameters()
    )
    end = fk.AdamW(params, lr=1e-2, fogzo=fogzo) if fused else torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(5):
        k = rank % 2 if step < 3 or "static_graph" in options else 0
        end.zero_grad(set_to_none=step % 2 == 0)
        fogzo.run(lambda s=step, k=k: loss_of(model, *batch(s * count + rank), k))
        if step == 0:
            found.append([None if p.grad is None else p.grad.clone() for p in model.parameters()])
        if not fused:
            fogzo.estimate_()
        end.step()
    found += [[p.detach().clone() for p in model.parameters()], fogzo.diagnostics()]
    leave()
    return found


OPTIONS = {"unused": {"find_unused_parameters": True}, "static": {"static_graph": True},
           "views": {"find_unused_parameters": True, "gradient_as_bucket_view": True}}  # fmt: skip


@needs_gloo
@pytest.mark.parametrize(
    ("preset", "how", "count"),
    [("fixed", "unused", 2), ("lsq", "unused", 2), ("bitnet", "unused", 2), ("lsq", "views", 3),
     ("fixed", "static", 2), ("lsq", "static", 2)],
)  # fmt: skip
def test_replicas_with_unused_parameters_stay_equal(tmp_path, preset, how, count):
    """And the gradients of their first step are those of one process with all batches."""
    first, *others = spawned(functools.partial(replicas, preset, OPTIONS[how]), tmp_path, count)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first[1], other[1], strict=True))
    model = experts(preset)
    fogzo = fk.Fogzo(model, total_steps=50, kappa=0.5, directions=1)
    passes = fogzo.probes()
    with next(passes) as probe:
        probe.backward(sum(loss_of(model, *batch(rank), rank % 2) for rank in range(count)) / count)
    for p, grad in zip(model.parameters(), first[0], strict=True):
        torch.testing.assert_close(grad, p.grad, rtol=1e-4, atol=1e-6)


class Rows(nn.Module):
    """An embedding, of which a batch reads some rows alone, and so a process has none of them."""

    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Embedding(16, 8), nn.Linear(8, 3)

    def forward(self, tokens):
        return self.out(self.embed(tokens))


def rows_run(preset, sharded=lambda model: None, rank=0):
    torch.manual_seed(0)
    model = Rows()
    fk.quantize_model(model, PRESETS[preset])
    sharded(model)
    fogzo = fk.Fogzo(model, total_steps=10, kappa=1.0, schedule="constant", seed=3, directions=1)
    end = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(3):
        end.zero_grad()
        tokens = torch.arange(4) + 2 * step  # of rows 0..7, which the first of two processes holds
        fogzo.backward(lambda t=tokens: F.cross_entropy(model(t), t % 3))
        end.step()
    return {name: whole(p).clone() for name, p in model.named_parameters()}


def sharded_rows(preset, rank):
    def shard(model):
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        fully_shard(model, mesh=mesh, ignored_params=fk.learned_alphas(model))

    return rows_run(preset, shard, rank)


@needs_gloo
@pytest.mark.parametrize(("preset", "count"), [("fixed", 2), ("lsq", 2), ("fixed", 3)])
def test_rows_without_a_gradient_on_one_process_take_part(tmp_path, preset, count):
    """The noise of the whole weight is that of one process."""
    expected = rows_run(preset)
    for found in spawned(functools.partial(sharded_rows, preset), tmp_path, count):
        for name, p in expected.items():
            torch.testing.assert_close(found[name], p, rtol=1e-5, atol=1e-6)


def test_copies_take_part_alike():
    model = experts("lsq")
    fogzo = fk.Fogzo(model, total_steps=10, kappa=1.0, schedule="constant", directions=1)
    twins = [(model, fogzo), copy.deepcopy((model, fogzo))]
    for m, f in twins:
        f.backward(lambda m=m: loss_of(m, *batch(0), 0))
    assert torch.equal(twins[0][0].out.weight.grad, twins[1][0].out.weight.grad)
