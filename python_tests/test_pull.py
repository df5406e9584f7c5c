"""GridPull: against its formula, in whose steps, and what it refuses."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fogzo_kernels as fk

LR, STRENGTH = 0.02, 3.0
STE = fk.StraightThrough("identity")
QUANTIZERS = {
    "fixed": fk.Quantizer(fk.Grid.uniform(2), fk.Scale.fixed(lambda w: 2 * w.abs().mean()), STE),
    "rows": fk.Quantizer(fk.Grid.uniform(3), fk.Scale.fixed(lambda w: w.abs().mean(1, keepdim=True)), STE),
    "lsq": fk.presets.lsq(2),
    "bitnet": fk.presets.bitnet(),
    "quest": fk.presets.quest(2, block=16),
}
OPTIMIZERS = {
    "torch": lambda groups, fogzo: torch.optim.AdamW(groups, lr=LR),
    "fused": lambda groups, fogzo: fk.AdamW(groups, lr=LR, fogzo=fogzo),
    "sgd": lambda groups, fogzo: fk.SGD(groups, lr=LR, momentum=0.9, fogzo=fogzo),
}


def network(generator, quantizer, dtype=torch.float32, conv=False):
    layers = [nn.Conv2d(1, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 5)] if conv else [
        nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 5)
    ]  # fmt: skip
    model = nn.Sequential(*layers).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    fk.quantize_model(model, quantizer)
    return model


def data(generator, dtype=torch.float32, conv=False):
    shape = (6, 1, 8, 8) if conv else (6, 16)
    return torch.randn(shape, generator=generator).to(dtype), torch.randint(5, (6,), generator=generator)


def step(model, optimizer, batch, fogzo=None):
    x, y = batch
    optimizer.zero_grad()

    def closure():
        return F.cross_entropy(model(x).float(), y)

    if fogzo is None:
        closure().backward()
    else:
        fogzo.run(closure)
        if not isinstance(optimizer, fk.AdamW | fk.SGD):
            fogzo.estimate_()
    optimizer.step()


def quantized(model):
    """Each quantized weight and, in float64, Q of it in its own basis."""
    return {
        name: (m.weight, m.effective_weight().detach().double())
        for name, m in model.named_modules()
        if isinstance(m, fk.nn.quantized.QuantizedModule)
    }


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    ("name", "conv"),
    [*((name, False) for name in QUANTIZERS), *((n, True) for n in QUANTIZERS if n != "quest")],
)
def test_a_pull_is_its_formula(name, optimizer, conv, generator):
    """Of a twin that is not pulled in the same step: w - lr strength (w - Q(w)); alphas and biases as there."""
    model = network(generator, QUANTIZERS[name], conv=conv)
    batch, models, optimizers = data(generator, conv=conv), [model, copy.deepcopy(model)], []
    for m in models:
        fogzo = fk.Fogzo(m, total_steps=10, kappa=0.1)
        optimizers.append(OPTIMIZERS[optimizer](m.parameters(), fogzo))
        if m is model:
            fk.GridPull(m, optimizers[0], STRENGTH)  # nobody has to hold it
        step(m, optimizers[-1], batch, fogzo)
    expected = {
        key: weight.double() - LR * STRENGTH * (weight.double() - q)
        for key, (weight, q) in quantized(models[1]).items()
    }
    assert expected
    for key, (weight, _) in quantized(model).items():
        torch.testing.assert_close(weight.double(), expected[key], rtol=1e-6, atol=1e-6)
        assert (weight - models[1].get_submodule(key).weight).abs().max() > 1e-3
    theirs = dict(models[1].named_parameters())
    others = [p for n, p in model.named_parameters() if not n.endswith("weight")]
    assert others
    assert all(torch.equal(p, theirs[n]) for n, p in model.named_parameters() if not n.endswith("weight"))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), strength=st.floats(0, 1 / LR), bits=st.integers(2, 5))
def test_a_pull_never_changes_q_where_alpha_stays(seed, strength, bits):
    generator = torch.Generator().manual_seed(seed)
    quantizer = fk.Quantizer(fk.Grid.uniform(bits), fk.Scale.fixed(lambda w: w.abs().mean()), STE)
    model = network(generator, quantizer)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    pull = fk.GridPull(model, optimizer, strength)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    before = {name: (weight.detach().double(), q) for name, (weight, q) in quantized(model).items()}
    pull.pull(optimizer)
    for name, (weight, q) in quantized(model).items():
        assert torch.equal(q, before[name][1])
        far = (before[name][0] - q).abs()
        assert ((weight.double() - q).abs() <= far + 1e-6).all()


def test_master_copies_are_pulled_and_weights_are_their_rounding(generator):
    model = network(generator, QUANTIZERS["rows"], torch.bfloat16)
    twin = copy.deepcopy(model)
    batch, found = data(generator, torch.bfloat16), []
    for m in (model, twin):
        optimizer = fk.AdamW(m.parameters(), lr=LR, master_weights=True)
        if m is model:
            pull = fk.GridPull(m, optimizer, 1e-3)  # of which bfloat16 alone would keep nothing
        step(m, optimizer, batch)
        found.append(optimizer.state)
    for name, (_, q) in quantized(twin).items():
        pulled, master = (
            state[m.get_submodule(name).weight]["master"] for state, m in zip(found, (model, twin), strict=True)
        )
        expected = master.double() - LR * pull.strength * (master.double() - q)
        torch.testing.assert_close(pulled.double(), expected, rtol=1e-6, atol=1e-7)
        assert not torch.equal(pulled, master)
        assert torch.equal(model.get_submodule(name).weight, pulled.bfloat16())


def test_rate_and_strength_are_those_of_the_step_and_the_group(generator):
    model = network(generator, QUANTIZERS["fixed"])
    first, last = model[0].weight, model[2].weight
    groups = [{"params": [first], "lr": 0.5}, {"params": [last], "lr": torch.tensor(0.25)}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    pull = fk.GridPull(model, optimizer, 0.0)
    for strength, share in ((0.0, (0, 0)), (1.0, (0.25, 0.125)), (0.4, (0.05, 0.025))):
        pull.strength = strength
        for p in (first, last):
            p.grad = torch.zeros_like(p)
        before = [(w.detach().double(), q) for w, q in quantized(model).values()]
        optimizer.step()
        schedule.step()
        for p, (w, q), part in zip((first, last), before, share, strict=True):
            torch.testing.assert_close(p.detach().double(), w - part * (w - q), rtol=1e-6, atol=1e-6)


def test_what_the_optimizer_leaves_alone_and_what_was_removed_stays(generator):
    model = network(generator, QUANTIZERS["fixed"])
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    pull = fk.GridPull(model, optimizer, STRENGTH)
    still, moved = model[0].weight, model[2].weight
    moved.grad = torch.zeros_like(moved)
    kept = still.detach().clone(), moved.detach().clone()
    optimizer.step()
    assert torch.equal(still, kept[0])
    assert not torch.equal(moved, kept[1])
    pull.remove()
    kept = moved.detach().clone()
    optimizer.step()
    assert torch.equal(moved, kept)


def test_bad_arguments_are_named(generator):
    model = network(generator, QUANTIZERS["fixed"])
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    with pytest.raises(TypeError, match="optimizer must be a Optimizer, got list"):
        fk.GridPull(model, [], 1.0)
    for strength in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"strength must be finite and >= 0"):
            fk.GridPull(model, optimizer, strength)
    with pytest.raises(ValueError, match="optimizer must hold quantized weights of the model, got none"):
        fk.GridPull(model, torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=LR), 1.0)
    with pytest.raises(ValueError, match="model must have trainable quantized weights"):
        fk.GridPull(nn.Linear(2, 2), optimizer, 1.0)
    pull = fk.GridPull(model, optimizer, 1.01 / LR)
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    with pytest.raises(ValueError, match=r"lr \* strength must be at most 1, got 0.02 \* 50.5"):
        pull.pull(optimizer)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
