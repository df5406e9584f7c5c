"""Data parallel: two processes give the estimate of one with the whole batch."""

import functools

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from support.processes import needs_gloo, spawned
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fogzo_kernels as fk
from fogzo_kernels.nn.view import whole

STEPS = 3


def train(model, rows, reduction="mean", factor=1.0):
    """Gradients after each of a few steps on the given rows of a fixed batch."""
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(8, 6, generator=generator), torch.randint(3, (8,), generator=generator)
    fogzo = fk.Fogzo(
        model, total_steps=10, one_minus_beta=0.1, schedule="constant", loss_reduction=reduction, directions=1
    )
    found = []
    for _ in range(STEPS):
        model.zero_grad()
        loss = fogzo.backward(lambda: factor * F.cross_entropy(model(x[rows]), y[rows]))
        found.append((loss, *(p.grad.clone() for p in model.parameters())))
    return found


SCALES = {"fixed": fk.Scale.fixed(0.2), "learned": fk.Scale.learned("row")}


def net(scale):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    straight_through = fk.StraightThrough("identity", clip=False)
    fk.quantize_model(model, fk.Quantizer(fk.Grid.uniform(2), SCALES[scale], straight_through))
    return model


def half(rank):
    return slice(0, 4) if rank % 2 == 0 else slice(4, 8)


def halves(scale, rank):
    return train(DistributedDataParallel(net(scale)), half(rank))


@needs_gloo
@pytest.mark.parametrize("scale", SCALES)
def test_two_processes_give_one_estimate(tmp_path, scale):
    first, second = spawned(functools.partial(halves, scale), tmp_path)
    whole = train(net(scale), slice(0, 8))
    for a, b, expected in zip(first, second, whole, strict=True):
        for x, y, z in zip(a, b, expected, strict=True):
            assert torch.equal(x, y)
            torch.testing.assert_close(x, z, rtol=1e-3, atol=1e-5)


# ---- who trains what


def steps_of(model, count=2, rows=slice(0, 8), before=lambda fogzo: None, **options):
    """Losses of a few steps of SGD with the estimate."""
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(8, 6, generator=generator), torch.randint(3, (8,), generator=generator)
    fogzo = fk.Fogzo(
        model, **{"directions": 1, "total_steps": 10, "kappa": 0.1, "schedule": "constant"} | options
    )
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.1), []
    before(fogzo)
    for _ in range(count):
        optimizer.zero_grad()
        losses.append(fogzo.backward(lambda: F.cross_entropy(model(x[rows]), y[rows])))
        optimizer.step()
    return torch.stack(losses), *(p.detach() for p in model.parameters())


def with_seeds_of_their_own(rank):
    return steps_of(DistributedDataParallel(net("fixed")), seed=rank + 5)


def with_other_settings(rank):
    return steps_of(DistributedDataParallel(net("fixed")), kappa=0.1 + rank)


def resumed_on_one(rank):
    def load(fogzo):
        if rank:
            fogzo.load_state_dict(fogzo.state_dict() | {"steps": 7})

    return steps_of(DistributedDataParallel(net("fixed")), before=load)


def with_other_quantizers(rank):
    model = DistributedDataParallel(net("fixed"))
    model.module[0].quantizer = fk.Quantizer(
        fk.Grid.uniform(3 if rank else 2), SCALES["fixed"], fk.StraightThrough("identity", clip=False)
    )
    return steps_of(model)


def with_other_values(rank):
    model = DistributedDataParallel(net("learned"))
    with torch.no_grad():
        model.module[2].alpha.view(-1)[0] *= 1 + 1e-6 * rank
    return steps_of(model)


DIFFERENCES = {
    "seed": (with_seeds_of_their_own, ": 5 to 6. This one has Settings"),
    "number of steps taken": (resumed_on_one, ": 0 to 7. This one has Settings"),
    "settings": (with_other_settings, ". This one has Settings"),
    "quantized weights": (with_other_quantizers, ". This one has Settings"),
    "values of the weights": (with_other_values, ". This one has Settings"),
}


@needs_gloo
@pytest.mark.parametrize("what", DIFFERENCES)
def test_processes_that_train_another_model_are_told(tmp_path, what):
    """All of them, in the first step, so that none waits for another."""
    case, shown = DIFFERENCES[what]
    for found in spawned(case, tmp_path):
        assert found.startswith(
            f"RuntimeError: all processes of a group must have the same {what}, and some differ{shown}"
        )


def diverging_late(rank):
    model = DistributedDataParallel(net("fixed"))
    fogzo = fk.Fogzo(model, total_steps=1000, kappa=0.1, directions=1)
    x, y = torch.randn(4, 6), torch.randint(3, (4,))
    for step in range(101):
        if step == 60 and rank:
            with torch.no_grad():
                model.module[0].weight[0, 0] += 1e-3
        model.zero_grad()
        try:
            fogzo.backward(lambda: F.cross_entropy(model(x), y))
        except RuntimeError as error:
            return step, str(error)
    return None


@needs_gloo
def test_what_comes_apart_later_is_seen_in_the_next_hundredth_step(tmp_path):
    for step, message in spawned(diverging_late, tmp_path):
        assert step == 100
        assert message.startswith("all processes of a group must have the same values of the weights")


def plain_model(rank):
    return steps_of(net("fixed"))


@needs_gloo
def test_a_model_that_nothing_says_is_shared_must_say_so(tmp_path):
    for found in spawned(plain_model, tmp_path):
        assert found.startswith(
            "ValueError: process_group must be given: 2 processes run, and the model is neither"
        )


def alone(rank):
    return steps_of(net("fixed"), rows=half(rank), seed=rank, loss_reduction=None)


@needs_gloo
def test_models_of_their_own_are_trained_apart(tmp_path):
    """To the bit as without other processes, whatever seeds they have."""
    for rank, found in enumerate(spawned(alone, tmp_path)):
        expected = steps_of(net("fixed"), rows=half(rank), seed=rank)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def net_of(group):
    model = net("fixed")
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1 + 0.3 * group)
    return model


def two_groups(rank):
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    model = DistributedDataParallel(net_of(rank // 2), process_group=groups[rank // 2])
    return steps_of(model, rows=half(rank), seed=rank // 2)


@needs_gloo
def test_losses_are_those_of_the_group_that_shares_the_model(tmp_path):
    """Two models of two processes each: as two processes by themselves."""
    four = spawned(two_groups, tmp_path, 4)
    for a, b in ((0, 1), (2, 3)):
        assert all(torch.equal(x, y) for x, y in zip(four[a], four[b], strict=True))
    for group in (0, 1):
        whole = steps_of(net_of(group), seed=group)
        for found, expected in zip(four[2 * group], whole, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
    assert not torch.equal(four[0][0], four[2][0])


@pytest.mark.parametrize("reduction", ["max", 1])
def test_a_reduction_is_named(reduction):
    with pytest.raises(ValueError, match=f"loss_reduction must be 'mean', 'sum' or None, got {reduction!r}"):
        fk.Fogzo(net("fixed"), total_steps=1, kappa=0.1, loss_reduction=reduction, directions=1)


# ---- rows of an embedding that get no gradient


def looked_up(options, tokens, sharded, rank=0):
    """The first estimate of an embedding with padding, and its values before and after a fused step."""
    torch.manual_seed(0)
    model, tokens = nn.Sequential(nn.Embedding(8, 6, padding_idx=5), nn.Linear(6, 3)), torch.tensor(tokens)
    nn.init.normal_(model[0].weight)
    fk.quantize_model(model, fk.presets.fixed(3, 0.3))
    sharded(model)
    fogzo = fk.Fogzo(model, **{"total_steps": 10, "schedule": "constant", "directions": 1} | options)
    before, labels = whole(model[0].weight).detach().clone(), tokens % 3

    def loss_of():
        return F.cross_entropy(model(tokens), labels)

    fogzo.backward(loss_of)
    estimate = whole(model[0].weight.grad).clone()
    model.zero_grad()
    fk.SGD(model.parameters(), lr=0.1, fogzo=fogzo).step(loss_of)
    return before, estimate, whole(model[0].weight).detach().clone()


OF_NOISE = {"model": {"one_minus_beta": 0.5}, "tensor": {"kappa": 0.5, "noise_per": "tensor"}}


@needs_gloo
@pytest.mark.parametrize("tokens", [[0, 5, 6, 2], [0, 1]], ids=["in both parts", "in one part"])
@pytest.mark.parametrize("noise", OF_NOISE)
def test_rows_without_a_gradient_keep_still_in_the_process_that_has_them(tmp_path, noise, tokens):
    """The padding row too. The others have the estimate of one process, to the bit."""
    before, estimate, after = expected = looked_up(OF_NOISE[noise], tokens, lambda model: None)
    read = torch.zeros(8, dtype=torch.bool)
    read[[token for token in tokens if token != 5]] = True
    assert torch.equal(estimate != 0, read.unsqueeze(1).expand(8, 6))
    assert torch.equal((before != after).any(1), read)
    for found in spawned(functools.partial(looked_up, OF_NOISE[noise], tokens, fully_shard), tmp_path):
        assert not isinstance(found, str), found
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
