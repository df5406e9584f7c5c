"""Guided noise as a hook of an optimizer: what a stock loop trains is what the passes train, bit for bit."""

import copy
import functools
import math

import pytest
import torch
import torch.nn.functional as F
from support.processes import as_launched, leave, needs_gloo, two_of
from torch import nn

import fogzo_kernels as fk

STEPS = 8
GUIDED = {"total_steps": STEPS, "directions": 0, "kappa": 0.5, "seed": 3}
PER = pytest.mark.parametrize("per", ["tensor", "model"])


def network(quantizer=None):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 4))
    fk.quantize_model(model, quantizer or fk.presets.lsq(2))
    return model


def batch(step, rows=8):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(rows, 12, generator=generator), torch.randint(4, (rows,), generator=generator)


def loss_of(model, step, part=slice(None)):
    x, y = batch(step)
    return F.cross_entropy(model(x[part]), y[part])


def adam(model, fused, **options):
    """``fused``: this package's optimizer; "torch": PyTorch's, which takes a gradient scaler's scale too."""
    kind = fk.AdamW if fused is True else torch.optim.AdamW
    options |= {"fused": True} if fused == "torch" else {}
    return kind(fk.parameter_groups(model, weight_decay=0.1), lr=0.01, **options)


def attached(model, optimizer, **options):
    """Guided noise, which the optimizer's step adds; by default per tensor."""
    fogzo = fk.Fogzo(model, **GUIDED | options)
    fogzo.attach(optimizer)
    return fogzo


def values(model):
    return [p.detach().clone() for p in model.parameters()]


def same(model, expected):
    return all(torch.equal(p, q) for p, q in zip(values(model), expected, strict=True))


def by_passes(per="tensor", fused=False, steps=STEPS, quantizer=None, **options):
    """The reference: the same noise by the passes of Fogzo."""
    model = network(quantizer)
    fogzo = fk.Fogzo(model, **GUIDED | {"noise_per": per} | options)
    optimizer = adam(model, fused, **({"fogzo": fogzo} if fused else {}))
    torch.manual_seed(5)
    for step in range(steps):
        optimizer.zero_grad()
        fogzo.run(functools.partial(loss_of, model, step))
        if not fused:
            fogzo.estimate_()
        optimizer.step()
    return model, fogzo


def by_hook(
    per="tensor", fused=False, steps=STEPS, quantizer=None, closure=False, optimizer_of=adam, **options
):
    model = network(quantizer)
    optimizer = optimizer_of(model, fused)
    fogzo = attached(model, optimizer, noise_per=per, **options)
    torch.manual_seed(5)
    losses = []
    for step in range(steps):

        def backward(step=step):
            optimizer.zero_grad()
            loss = loss_of(model, step)
            loss.backward()
            return loss

        losses.append(optimizer.step(backward) if closure else backward())
        if not closure:
            optimizer.step()
    return model, fogzo, losses


@PER
@pytest.mark.parametrize("closure", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_a_stock_loop_trains_what_the_passes_train(fused, closure, per):
    """The noise moves all of it: without, the same loop ends elsewhere."""
    model, fogzo, losses = by_hook(per, fused, closure=closure)
    expected, passes = by_passes(per, fused)
    assert same(model, values(expected))
    assert fogzo.steps == passes.steps == STEPS
    assert all(loss.isfinite() for loss in losses)
    plain, _ = by_passes(per, fused, kappa=0)
    assert not same(model, values(plain))
    for name in ("guide_norm", "one_minus_beta", "cosine", "noise_to_guide"):
        assert fogzo.stats()[name] == passes.stats()[name]
    assert math.isnan(fogzo.stats()["loss"])


@pytest.mark.parametrize(
    "quantizer",
    [
        fk.Quantizer(fk.Grid.sign(), fk.Scale.absmean("row"), fk.StraightThrough("hardtanh")),
        fk.Quantizer(fk.Grid.uniform(2), fk.Scale.fixed(0.3), fk.StraightThrough("identity")),
    ],
    ids=["sign", "fixed"],
)
def test_other_quantizers_do_the_same(quantizer):
    model, *_ = by_hook(quantizer=quantizer)
    assert same(model, values(by_passes(quantizer=quantizer)[0]))


@pytest.mark.parametrize(
    "kind", [torch.optim.SGD, torch.optim.RMSprop, torch.optim.NAdam, torch.optim.Adafactor]
)
def test_any_optimizer_takes_the_noise(kind):
    """The hook writes .grad; what the optimizer makes of it is its own."""

    def made(model, fused):
        return kind(model.parameters(), lr=0.01)

    model, *_ = by_hook(optimizer_of=made)
    expected = network()
    fogzo = fk.Fogzo(expected, **GUIDED, noise_per="tensor")
    optimizer = made(expected, False)
    torch.manual_seed(5)
    for step in range(STEPS):
        optimizer.zero_grad()
        fogzo.backward(functools.partial(loss_of, expected, step))
        optimizer.step()
    assert same(model, values(expected))


@pytest.mark.parametrize("fused", [False, True])
def test_kappa_0_is_the_plain_loop(fused):
    model, fogzo, _ = by_hook(fused=fused, kappa=0)
    plain = network()
    optimizer = adam(plain, fused)
    torch.manual_seed(5)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(plain, step).backward()
        optimizer.step()
    assert same(model, values(plain))
    assert fogzo.steps == STEPS


@pytest.mark.parametrize("fused", [False, True])
def test_micro_batches_add_up_before_the_noise(fused):
    """One step of the optimizer has the noise once, in proportion to the sum.

    The scales are fixed: gradients of learned ones add up in another order.
    """
    parts = slice(0, 4), slice(4, 8)
    ours, theirs = network(fk.presets.fixed(8, 1 / 16)), network(fk.presets.fixed(8, 1 / 16))
    optimizer = adam(ours, fused)
    hook = attached(ours, optimizer)
    passes = fk.Fogzo(theirs, **GUIDED, noise_per="tensor")
    other = adam(theirs, fused, **({"fogzo": passes} if fused else {}))
    for step in range(STEPS):
        torch.manual_seed(step)
        optimizer.zero_grad()
        for part in parts:
            (loss_of(ours, step, part) / 2).backward()
        optimizer.step()
        torch.manual_seed(step)
        other.zero_grad()
        for probe in passes.probes():
            with probe:
                for part in parts:
                    probe.backward(loss_of(theirs, step, part) / 2)
        if not fused:
            passes.estimate_()
        other.step()
    assert same(ours, values(theirs))
    assert hook.steps == STEPS


@PER
def test_the_noise_is_in_proportion_to_what_is_clipped(per):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    fogzo = attached(model, optimizer, schedule="constant", noise_per=per)
    loss_of(model, 0).backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad /= 64
    optimizer.step()
    clipped = [p.grad.clone() for p in model.parameters()]
    fogzo.load_state_dict(fogzo.state_dict() | {"steps": 0})
    for p, grad in zip(model.parameters(), gradients, strict=True):
        p.grad = grad.clone()
    optimizer.step()
    for p, small, grad in zip(model.parameters(), clipped, gradients, strict=True):
        torch.testing.assert_close(small * 64, p.grad)
        assert torch.equal(p.grad, grad) == all(p is not w.parameter for w in fogzo.weights)


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("fused", [False, True, "torch"])
def test_a_gradient_scaler_changes_nothing(fused, unscale):
    """Of a power of 2; its overflow skips the step, which does not count."""
    model = network()
    optimizer = adam(model, fused)
    attached(model, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=1000)
    torch.manual_seed(5)
    for step in range(STEPS):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, step)).backward()
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    expected = network()
    plain = adam(expected, fused)
    attached(expected, plain)
    torch.manual_seed(5)
    for step in range(STEPS):
        plain.zero_grad()
        loss_of(expected, step).backward()
        plain.step()
    assert same(model, values(expected))
    before = values(model)
    optimizer.zero_grad()
    scaler.scale(loss_of(model, 0) * math.inf).backward()
    scaler.step(optimizer)
    scaler.update()
    assert same(model, before)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_whose_gradients_are_not_finite_changes_nothing(fused, bad):
    model, fogzo, _ = by_hook(fused=fused, steps=2)
    optimizer = fogzo._run.attached.optimizer
    before, state = values(model), copy.deepcopy(optimizer.state_dict()["state"])
    optimizer.zero_grad()
    (loss_of(model, 2) * bad).backward()
    with pytest.warns(UserWarning, match="the step is lost"):
        optimizer.step()
    assert same(model, before)
    for i, own in optimizer.state_dict()["state"].items():
        assert all(torch.equal(torch.as_tensor(x), torch.as_tensor(state[i][k])) for k, x in own.items())
    assert fogzo.diagnostics()["lost_steps"] == 1
    assert fogzo.steps == 2
    optimizer.zero_grad()
    loss_of(model, 2).backward()
    optimizer.step()
    assert not same(model, before)
    assert fogzo.steps == 3


def test_a_step_without_a_new_backward_adds_no_noise_again():
    model, fogzo, _ = by_hook(steps=1, optimizer_of=lambda m, fused: torch.optim.SGD(m.parameters(), lr=0.0))
    optimizer = fogzo._run.attached.optimizer
    grads = [p.grad.clone() for p in model.parameters()]
    optimizer.step()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))
    assert fogzo.steps == 1


def test_gradients_that_are_copied_into_the_same_memory_get_noise():
    """Without a backward: some loops reduce gradients by themselves, and copy them."""
    model, fogzo, _ = by_hook(steps=1, optimizer_of=lambda m, fused: torch.optim.SGD(m.parameters(), lr=0.0))
    optimizer = fogzo._run.attached.optimizer
    fresh = torch.ones_like(model[0].weight)
    with torch.no_grad():
        model[0].weight.grad.copy_(fresh)
    optimizer.step()
    assert fogzo.steps == 2
    assert not torch.equal(model[0].weight.grad, fresh)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("to_none", [False, True])
def test_a_step_without_gradients_is_none(to_none, fused):
    model = network()
    optimizer = adam(model, fused)
    fogzo = attached(model, optimizer)
    loss_of(model, 0).backward()
    optimizer.zero_grad(set_to_none=to_none)
    optimizer.step()
    assert fogzo.steps == 0


@PER
def test_a_weight_without_a_gradient_gets_no_noise(per):
    """An expert without tokens: its gradient is None, or all 0."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attached(model, optimizer, schedule="constant", noise_per=per)
    loss_of(model, 0).backward()
    idle = model[3].weight
    idle.grad.zero_()
    before = idle.detach().clone()
    optimizer.step()
    assert torch.equal(idle, before)
    assert not idle.grad.any()


def test_a_resumed_run_goes_on_bit_for_bit():
    expected, fogzo, _ = by_hook()
    model, first, _ = by_hook(steps=3)
    saved = copy.deepcopy((model.state_dict(), first._run.attached.optimizer.state_dict(), first.state_dict()))
    again = network()
    again.load_state_dict(saved[0])
    optimizer, second = adam(again, False), fk.Fogzo(again, **GUIDED, noise_per="tensor")
    optimizer.load_state_dict(saved[1])
    second.load_state_dict(saved[2])
    second.attach(optimizer)
    torch.manual_seed(5)
    for step in range(STEPS):
        if step < 3:
            loss_of(again, step)  # for the dropout masks
            continue
        optimizer.zero_grad()
        loss_of(again, step).backward()
        optimizer.step()
    assert same(again, values(expected))
    assert second.steps == fogzo.steps


def test_remove_ends_it():
    model, fogzo, _ = by_hook(steps=2, fused=True)
    hook = fogzo._run.attached
    assert fogzo.attached
    with pytest.raises(RuntimeError, match="attach must be called once"):
        fogzo.attach(hook.optimizer)
    with pytest.raises(RuntimeError, match="passes must not run while Fogzo is attached"):
        fogzo.backward(lambda: loss_of(model, 2))
    assert fogzo.attached
    hook.remove()
    assert not fogzo.attached
    assert hook.optimizer.fogzo is None
    model.zero_grad()
    fogzo.backward(lambda: loss_of(model, 2))
    assert fogzo.steps == 3


@pytest.mark.parametrize(
    ("options", "broken", "exception", "message"),
    [
        (
            {"directions": 1},
            {},
            ValueError,
            "directions must be 0 for attach, got 1: probes run the model again",
        ),
        ({}, {"optimizer": "adam"}, TypeError, "optimizer must be a torch.optim.Optimizer, got str"),
        (
            {},
            {"parameters": 1},
            ValueError,
            "optimizer must have every quantized weight of the model, got one with",
        ),
    ],
)
def test_a_bad_attach_is_named_and_leaves_no_hook(options, broken, exception, message):
    model = network()
    fogzo = fk.Fogzo(model, **GUIDED | options)
    optimizer = broken.get("optimizer") or torch.optim.SGD(
        list(model.parameters())[: broken.get("parameters")], lr=0.1
    )
    with pytest.raises(exception, match=message):
        fogzo.attach(optimizer)
    assert not fogzo.attached
    assert isinstance(optimizer, str) or not optimizer._optimizer_step_pre_hooks


def test_an_optimizer_of_another_fogzo_is_refused():
    model = network()
    other = fk.Fogzo(model, **GUIDED)
    with pytest.raises(ValueError, match="optimizer must have no other Fogzo"):
        fk.Fogzo(model, **GUIDED).attach(fk.SGD(model.parameters(), lr=0.1, fogzo=other))


# ---- processes


def ddp_worker(rank, folder, port):
    from torch.nn.parallel import DistributedDataParallel

    as_launched(rank, port)
    torch.distributed.init_process_group("gloo")
    model = DistributedDataParallel(network().eval())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fogzo = attached(model, optimizer)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, step, slice(4 * rank, 4 * rank + 4)).backward()
        optimizer.step()
    torch.save((values(model), fogzo.steps), f"{folder}/{rank}.pt")
    leave()


@needs_gloo
def test_ddp_adds_the_noise_of_one_process_to_all(tmp_path):
    (first, steps), (second, _) = two_of(ddp_worker, tmp_path)
    assert steps == STEPS
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    model = network().eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attached(model, optimizer)
    for step in range(STEPS):
        optimizer.zero_grad()
        for rank in range(2):
            (loss_of(model, step, slice(4 * rank, 4 * rank + 4)) / 2).backward()
        optimizer.step()
    for a, b in zip(first, values(model), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
