"""accelerate, the real package: its loop is the plain one, and what it must not do unnoticed."""

import os
import warnings

import pytest
import torch
import torch.nn.functional as F
from support.processes import as_launched, fresh_accelerate, leave, needs_gloo, two_of  # noqa: F401
from torch import nn

import fogzo_kernels as fk

accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
pytestmark = pytest.mark.usefixtures("fresh_accelerate")
STEPS = 4


def network(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 4))
    fk.quantize_model(model, fk.presets.lsq(2))
    return model


def batches(count=STEPS, rows=slice(None)):
    generator = torch.Generator().manual_seed(3)
    return [
        (torch.randn(8, 12, generator=generator)[rows], torch.randint(4, (8,), generator=generator)[rows])
        for _ in range(count)
    ]


def made(model, kind):
    """Fogzo and an optimizer."""
    fogzo = fk.Fogzo(model, total_steps=10, kappa=0.5, directions=1)
    if kind == "fused":
        return fogzo, fk.AdamW(model.parameters(), lr=0.01, fogzo=fogzo)
    return fogzo, torch.optim.AdamW(model.parameters(), lr=0.01)


def step(model, fogzo, optimizer, kind, batch, closure=False):
    def loss():
        return F.cross_entropy(model(batch[0]), batch[1])

    optimizer.zero_grad()
    if closure:
        return optimizer.step(loss)
    fogzo.run(loss)
    if kind != "fused":
        fogzo.estimate_()
    optimizer.step()
    return fogzo.stats()["loss"]


def plain(kind, count=STEPS):
    model = network()
    fogzo, optimizer = made(model, kind)
    torch.manual_seed(5)
    losses = [step(model, fogzo, optimizer, kind, batch) for batch in batches(count)]
    return losses, [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("kind", ["fused", "torch"])
def test_a_prepared_run_is_the_plain_one(kind):
    model = accelerate.Accelerator(cpu=True).prepare(network())
    fogzo, optimizer = made(model, kind)
    optimizer = accelerate.Accelerator(cpu=True).prepare(optimizer)
    torch.manual_seed(5)
    losses = [step(model, fogzo, optimizer, kind, batch) for batch in batches()]
    expected, weights = plain(kind)
    assert losses == expected
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))


def test_a_closure_takes_the_same_step_and_returns_none():
    accelerator = accelerate.Accelerator(cpu=True)
    model = accelerator.prepare(network())
    fogzo, optimizer = made(model, "fused")
    optimizer = accelerator.prepare(optimizer)
    expected, _ = plain("fused")
    torch.manual_seed(5)
    for batch, loss in zip(batches(), expected, strict=True):
        assert step(model, fogzo, optimizer, "fused", batch, closure=True) is None
        assert fogzo.stats()["loss"] == loss


def test_an_optimizer_that_accumulation_skips_does_not_lose_a_step():
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = accelerator.prepare(network())
    fogzo, optimizer = made(model, "fused")
    optimizer = accelerator.prepare(optimizer)
    first, second = batches(2)
    with accelerator.accumulate(model):
        step(model, fogzo, optimizer, "fused", first)
    with accelerator.accumulate(model), pytest.raises(RuntimeError, match="the last step had no estimate"):
        step(model, fogzo, optimizer, "fused", second)


@pytest.mark.parametrize("registered", [True, False])
def test_a_resumed_run_goes_on_or_says_that_it_does_not(tmp_path, registered):
    expected, weights = plain("fused")
    runs = []
    for part in (slice(0, 2), slice(2, 4)):
        accelerator = accelerate.Accelerator(cpu=True)
        model = accelerator.prepare(network())
        fogzo, optimizer = made(model, "fused")
        optimizer = accelerator.prepare(optimizer)
        if registered:
            accelerator.register_for_checkpointing(fogzo)
        torch.manual_seed(5)
        if part.start:
            accelerator.load_state(str(tmp_path / "state"))
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            runs += [step(model, fogzo, optimizer, "fused", batch) for batch in batches()[part]]
        accelerator.save_state(str(tmp_path / "state"))
    found = [str(w.message) for w in said if "beta begins at 1" in str(w.message)]
    if registered:
        assert runs == expected
        assert not found
        assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))
    else:
        assert found == [
            "the optimizer has taken 2 steps, and fogzo none: if you resume a run, call"
            " fogzo.load_state_dict too; without it beta begins at 1 again"
        ]


def worker(rank, folder, port):
    as_launched(rank, port)
    accelerator = accelerate.Accelerator(cpu=True)
    model = network()
    model[2].p = 0.0
    model = accelerator.prepare(model)
    assert isinstance(model, nn.parallel.DistributedDataParallel)
    fogzo, optimizer = made(model, "fused")
    optimizer = accelerator.prepare(optimizer)
    half = slice(0, 4) if rank == 0 else slice(4, 8)
    losses = [step(model, fogzo, optimizer, "fused", batch) for batch in batches(rows=half)]
    torch.save((losses, [p.detach() for p in model.parameters()]), os.path.join(folder, f"{rank}.pt"))
    leave()


@needs_gloo
def test_two_processes_take_the_steps_of_one(tmp_path):
    (losses, weights), (others, same) = two_of(worker, tmp_path)
    assert losses == others
    assert all(torch.equal(a, b) for a, b in zip(weights, same, strict=True))
    model = network()
    model[2].p = 0.0
    fogzo, optimizer = made(model, "fused")
    expected = [step(model, fogzo, optimizer, "fused", batch) for batch in batches()]
    assert losses == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("first", ["attach", "prepare"])
@pytest.mark.parametrize("kind", ["fused", "torch"])
def test_a_hook_adds_guided_noise_in_the_usual_loop(kind, first):
    """``accelerator.backward`` and ``optimizer.step``, whose wrapper may have come before the hook or after."""

    def run(accelerator):
        model = network()
        fogzo = fk.Fogzo(model, total_steps=10, directions=0, noise_per="tensor", kappa=0.5)
        optimizer = (fk.AdamW if kind == "fused" else torch.optim.AdamW)(model.parameters(), lr=0.01)
        if first == "attach" or accelerator is None:
            fogzo.attach(optimizer)
        if accelerator is not None:
            model, optimizer = accelerator.prepare(model, optimizer)
        if not fogzo.attached:
            fogzo.attach(optimizer)
        torch.manual_seed(5)
        for x, y in batches():
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward() if accelerator is None else accelerator.backward(loss)
            optimizer.step()
        assert fogzo.steps == STEPS
        return [p.detach() for p in model.parameters()]

    ours, plainly = run(accelerate.Accelerator(cpu=True)), run(None)
    assert all(torch.equal(p, q) for p, q in zip(ours, plainly, strict=True))
