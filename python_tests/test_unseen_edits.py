"""Edits that no version counter shows: of gradients before an estimate, and of latents with masters."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fogzo_kernels as fk
from fogzo_kernels.train.guards import lost

HALF = torch.tensor(0.5)
EDITS = {
    "clamp": lambda g: g.data.clamp_(-1e-4, 1e-4),
    "scale": lambda g: g.data.mul_(0.01),
    "sign": lambda g: g.data.neg_(),
    "one element": lambda g: g.data.view(-1)[3:4].mul_(1.25),
    "numpy": lambda g: g.data.view(torch.int16).numpy().__setitem__((0, 0), 7),
    "unscale": lambda g: torch._amp_foreach_non_finite_check_and_unscale_([g], g.new_zeros(()).float(), HALF),
}  # fmt: skip


def made(dtype=torch.float32, preset=None, shape=(12, 16), **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(shape[0], shape[1]), nn.ReLU(), nn.Linear(shape[1], 5))
    fk.quantize_model(model, preset or fk.presets.fixed(2, 0.1))
    model.to(dtype)
    fogzo = fk.Fogzo(
        model, **{"directions": 1, "total_steps": 30, "kappa": 1.0, "schedule": "constant"} | options
    )
    x, y = torch.randn(8, shape[0]).to(dtype), torch.randint(5, (8,))
    return model, fogzo, lambda: F.cross_entropy(model(x).float(), y)


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["estimate", fk.AdamW, fk.SGD])
def test_an_edited_gradient_is_an_error(kind, dtype, edit):
    model, fogzo, closure = made(dtype)
    optimizer = None if kind == "estimate" else kind(model.parameters(), lr=0.1, fogzo=fogzo)
    fogzo.run(closure)
    before = [p.detach().clone() for p in model.parameters()]
    EDITS[edit](model[2].weight.grad)
    kept = model[2].weight.grad.clone()
    with pytest.raises(RuntimeError, match=r"\.grad must not change between .* call estimate_\(\) first"):
        (fogzo.estimate_ if optimizer is None else optimizer.step)()
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert torch.equal(model[2].weight.grad, kept)
    assert fogzo.steps == 0
    model.zero_grad()
    fogzo.backward(closure)


@pytest.mark.parametrize("shape", [(12, 16), (11, 13), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reading_gradients_or_editing_plain_ones_is_no_error(dtype, shape):
    model, fogzo, closure = made(dtype, shape=shape)
    fogzo.run(closure)
    for p in model.parameters():
        p.grad.norm()
    torch._amp_foreach_non_finite_check_and_unscale_(
        [p.grad for p in model.parameters()], torch.zeros(()), torch.ones(())
    )
    model[0].bias.grad.data.mul_(0.5)
    fogzo.estimate_()
    assert fogzo.steps == 1


@pytest.mark.parametrize("length", [0, 1, 2, 3, 4, 5, 8, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_sum_of_bits_sees_each_element(dtype, length, generator):
    memory = torch.randn(length + 1, generator=generator).to(dtype)
    for values in (memory[:-1], memory[1:]):  # aligned to 8 bytes, and not
        whole = lost.bits([values])
        assert torch.equal(whole, lost.bits([values]))
        for i in range(length):
            values[i] = -values[i]
            assert not torch.equal(lost.bits([values]), whole)
            values[i] = -values[i]


def test_an_edit_on_a_gpu_is_an_error_at_the_next_step(monkeypatch):
    """A GPU's: nothing moves, and the next step raises."""
    monkeypatch.setattr("fogzo_kernels.train.guards.gradients.seen_at_once", lambda tensor: False)
    model, fogzo, closure = made()
    optimizer = fk.AdamW(model.parameters(), lr=0.1, fogzo=fogzo)
    optimizer.step(closure)
    model.zero_grad()
    fogzo.run(closure)
    before = [p.detach().clone() for p in model.parameters()]
    model[0].weight.grad.data.mul_(0.5)
    optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    model.zero_grad()
    with pytest.raises(RuntimeError, match=r"\.grad must not change .*of the step before this one"):
        optimizer.step(closure)
    model.zero_grad()
    optimizer.step(closure)  # once


# ---- masters


def loaded(model, value):
    model.load_state_dict({k: v * 0 + value if k == "0.weight" else v for k, v in model.state_dict().items()})


def written(model, value):
    with torch.no_grad():
        model[0].weight.fill_(value)


def replaced(model, value):
    model[0].weight.data = torch.full_like(model[0].weight, value)


def averaged(model, value):
    """In part: the other elements keep what their masters have beyond bfloat16."""
    model[0].weight.data[:4].fill_(value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("edit", [loaded, written, replaced, averaged])
@pytest.mark.parametrize(
    "optimizer", [functools.partial(fk.AdamW, lr=1e-3, weight_decay=0.0), functools.partial(fk.SGD, lr=1e-3)]
)
def test_masters_follow_what_is_put_into_latents(optimizer, edit, dtype):
    model, fogzo, closure = made(dtype, fk.presets.lsq(2))
    end = optimizer(model.parameters(), fogzo=fogzo, master_weights=True)
    for _ in range(3):
        end.zero_grad()
        end.step(closure)
    master = end.state[model[0].weight]["master"]
    kept = master.clone()
    edit(model, 0.25)
    rows = slice(0, 4) if edit is averaged else slice(None)
    end.param_groups[0]["lr"] = 0.0
    end.zero_grad()
    end.step(closure)
    assert (model[0].weight[rows] == 0.25).all()
    assert (master[rows].to(dtype) == 0.25).all()  # and beyond that as it was, where it was 0.25
    if edit is averaged:
        assert torch.equal(master[4:], kept[4:])
        assert not torch.equal(master[4:], model[0].weight[4:].float())


def test_without_an_edit_masters_keep_their_bits():
    found = []
    for spy in (False, True):
        model, fogzo, closure = made(torch.bfloat16, fk.presets.lsq(2))
        end = fk.AdamW(model.parameters(), lr=1e-4, fogzo=fogzo, master_weights=True)
        for _ in range(4):
            end.zero_grad()
            end.step(closure)
            if spy:
                model.load_state_dict(model.state_dict())
        found.append([end.state[p]["master"] for p in model.parameters() if p.dtype != torch.float32])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
