"""Modules whose weights or inputs are rotated, QuEST's among them, against float64 programs."""

import copy
import math
import re

import pytest
import torch
import torch.nn.functional as F
from support.hadamard import matrix
from support.layers import conv1d_of_transformers, rows_of, weight_of
from torch import nn

import fogzo_kernels as fk
from fogzo_kernels.spec.presets import CLIPS

QUEST = fk.presets.quest(4, block=16)
COARSE = fk.presets.quest(2, block=16)
STE = fk.StraightThrough("identity", clip=False)
#: Rows of 32 or more elements, that blocks of 16 divide.
MAKE = {
    "linear": (lambda: nn.Linear(64, 5), lambda: torch.randn(3, 64), 0),
    "conv2d": (lambda: nn.Conv2d(16, 6, (2, 2), groups=2), lambda: torch.randn(2, 16, 5, 4), 0),
    "channels-last": (
        lambda: nn.Conv2d(8, 6, (2, 2)).to(memory_format=torch.channels_last),
        lambda: torch.randn(2, 8, 5, 4),
        0,
    ),
    "embedding": (lambda: nn.Embedding(9, 32), lambda: torch.tensor([[0, 2, 8], [1, 1, 4]]), 0),
    "transformers": (lambda: conv1d_of_transformers(5, 32), lambda: torch.randn(3, 32), 1),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _fixed_data():
    """What lies on a tie in float32 would take another code in float64; test_transform.py draws afresh."""
    torch.manual_seed(0)


def rotated(x, block=16):
    x = x.double()
    return (x.reshape(-1, block) @ matrix(block)).view(x.shape)


def quest_of(x, bits):
    """QuEST (arXiv 2502.05003): Q of rotated rows, and where gradients pass; float64."""
    sigma = x.square().mean(1, keepdim=True).sqrt() + 1e-8
    clip = CLIPS[bits - 1] * sigma
    step = 2 * clip / (2**bits - 1)
    q = ((x.clamp(-clip, clip) / step + 0.5).round() - 0.5) * step
    q = q.clamp(-(2**bits - 1) * step / 2, (2**bits - 1) * step / 2)
    return q, ((q - x).abs() <= step / 2).double()


def gaussian(module):
    nn.init.normal_(module.weight)
    return module


# ---- QuEST


@pytest.mark.parametrize("bits", range(1, 9))
def test_quest_is_the_papers_formula(bits, backend):
    """Forward, and the gradients of weight and input, of a linear layer with both quantized."""
    linear, x = gaussian(nn.Linear(64, 5)), torch.randn(7, 64)
    preset = fk.presets.quest(bits, block=16)
    wq, w_mask = quest_of(rotated(linear.weight.detach()), bits)
    xq, x_mask = quest_of(rotated(x), bits)
    wanted = xq @ wq.t() + linear.bias.detach()
    upstream = torch.randn(7, 5)
    fk.quantize_model(linear, preset, activation=preset, backend=backend)
    y = linear(x.requires_grad_())
    y.backward(upstream)
    torch.testing.assert_close(y.double(), wanted, rtol=1e-5, atol=1e-5)
    up = upstream.double()
    for found, exact in (
        (linear.weight.grad, rotated((up.t() @ xq) * w_mask)),
        (x.grad, rotated((up @ wq) * x_mask)),
    ):
        torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-4)
    levels = linear.codes().unique()
    assert levels.numel() == 2**bits if bits < 4 else levels.numel() > 12
    assert (levels.min(), levels.max()) >= (-(2 ** (bits - 1)), 0)


@pytest.mark.parametrize(
    "q",
    [QUEST, fk.Quantizer(QUEST.grid, fk.Scale.absmax("row", factor=0.19), STE, fk.Hadamard(32))],
    ids=["rms", "absmax"],
)
@pytest.mark.parametrize("name", MAKE)
def test_layers_run_with_the_weight_rotated_back(name, q, backend):
    """Whatever a layer rotates, what it computes is that of the plain layer with H(Q(H w))."""
    make, given, outputs = MAKE[name]
    plain = gaussian(make())
    model = copy.deepcopy(plain)
    fk.quantize_model(model, q, backend=backend)
    rows, block = rows_of(plain.weight, outputs), q.transform.block
    if name == "channels-last":
        rows = plain.weight.detach().permute(0, 2, 3, 1).flatten(1)
    x = rotated(rows, block)
    scale = q.scale
    statistic = (
        x.square().mean(1, keepdim=True).sqrt() if scale.statistic == "rms" else x.abs().amax(1, keepdim=True)
    )
    delta = scale.factor * (statistic + scale.add)
    code = (x / delta - 0.5).round().clamp(q.grid.qmin, q.grid.qmax)
    back = rotated(delta * (code + 0.5), block).float()
    if name == "channels-last":
        weight = back.view(6, 2, 2, 8).permute(0, 3, 1, 2)
    else:
        weight = weight_of(back, plain.weight, outputs)
    with torch.no_grad():
        plain.weight.copy_(weight)
    inputs = given()
    torch.testing.assert_close(model(inputs), plain(inputs), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.effective_weight(), weight, rtol=1e-4, atol=1e-5)
    whole = fk.dequantize_model(copy.deepcopy(model))
    torch.testing.assert_close(whole(inputs), plain(inputs), rtol=1e-4, atol=1e-4)
    assert type(whole) is type(plain)


BLOCKS = {None: None, 16: fk.Hadamard(16), 32: fk.Hadamard(32)}


@pytest.mark.parametrize("weight", BLOCKS)
@pytest.mark.parametrize("of_input", BLOCKS)
@pytest.mark.parametrize("name", ["linear", "conv2d"])
def test_weight_and_input_may_be_rotated_differently(name, weight, of_input):
    """The input is brought to the weight's basis, or back to its own."""
    make, given, _ = MAKE[name]
    plain, x = gaussian(make()), given()
    if name == "conv2d":
        x = torch.randn(2, 16, 4, 4)
    fine = fk.Grid.uniform(8)
    q, a = (
        fk.Quantizer(fine, fk.Scale.absmax("row", factor=1 / 127, least=1e-5), STE, BLOCKS[b])
        for b in (weight, of_input)
    )
    model = copy.deepcopy(plain)
    fk.quantize_model(model, q, activation=a)
    torch.testing.assert_close(model(x), plain(x), rtol=0.05, atol=0.25)
    model.weight.grad = None
    model(x).square().mean().backward()
    plain(x).square().mean().backward()
    cosine = F.cosine_similarity(model.weight.grad.flatten(), plain.weight.grad.flatten(), dim=0)
    assert cosine > 0.99


# ---- FOGZO


def net(backend=None, optimizer=None):
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(4, 8, 2), nn.Flatten(), nn.ReLU(), nn.Linear(128, 32), nn.Tanh(), nn.Linear(32, 3)
    )
    fk.quantize_model(
        model, COARSE, activation=fk.presets.quest(4, block=16), backend=backend, rules=[("0", COARSE, None)]
    )
    return model


def batch():
    generator = torch.Generator().manual_seed(5)
    return torch.randn(6, 4, 5, 5, generator=generator), torch.randint(3, (6,), generator=generator)


def stepped(backend, steps=1, optimizer=None):
    model, (x, y) = net(backend), batch()
    fogzo = fk.Fogzo(model, total_steps=10, kappa=1.0, directions=2, seed=11)
    opt = optimizer(model, fogzo) if optimizer else None
    for _ in range(steps):
        model.zero_grad()
        if optimizer and isinstance(opt, fk.AdamW):
            loss = opt.step(lambda: F.cross_entropy(model(x), y))
        else:
            loss = fogzo.backward(lambda: F.cross_entropy(model(x), y))
            if opt:
                opt.step()
    return model, loss


def test_a_step_is_that_of_the_reference(backend):
    """Losses of probes and estimates, whoever computes them; no weight moves."""
    (model, loss), (wanted, wanted_loss) = stepped(backend), stepped("reference")
    torch.testing.assert_close(loss, wanted_loss, rtol=1e-5, atol=1e-6)
    for (name, p), other in zip(model.named_parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(p.grad, other.grad, rtol=2e-3, atol=2e-4, msg=lambda m, n=name: f"{n}: {m}")
        assert torch.equal(p, other)


def test_the_estimate_is_the_papers():
    """A linear layer, one direction: probes and G from the matrix, in float64."""
    torch.manual_seed(4)
    linear, x, target = gaussian(nn.Linear(32, 4, bias=False)), torch.randn(9, 32), torch.randn(9, 4)
    weight = linear.weight.detach().double()
    fk.quantize_model(linear, COARSE)
    omb, seed = 0.25, 9
    xh, wh = rotated(x), rotated(weight)
    sigma = wh.square().mean(1, keepdim=True).sqrt() + 1e-8
    delta = 2 * CLIPS[1] * sigma / 3

    def q_of(position):
        return delta * (position.clamp(-2, 1).round() + 0.5)

    def loss_of(q):
        return (xh @ q.t() - target.double()).square().mean()

    q = q_of(wh / delta - 0.5).requires_grad_()
    (dq,) = torch.autograd.grad(loss_of(q), q)
    mask = ((q.detach() - wh).abs() <= delta / 2).double()
    g = rotated(mask * dq)
    linear.zero_grad()
    ((linear(x) - target).square().mean()).backward()
    torch.testing.assert_close(linear.weight.grad.double(), g, rtol=1e-4, atol=1e-6)
    norm = (delta * g).square().sum().sqrt()
    u = fk.noise(128, distribution="uniform", seed=seed, step=0, device="cpu").double().view(4, 32)
    sign = float(fk.direction_sign(seed, 0, 0))
    eps = COARSE.epsilon
    v = math.sqrt(1 - omb) * sign * delta * rotated(g) / norm + math.sqrt(omb) * u
    losses = [loss_of(q_of(wh / delta + s * eps * v - 0.5)) for s in (1, -1)]
    c = (losses[0] - losses[1]) / (2 * eps)
    wanted = c * (math.sqrt(1 - omb) * sign * g / norm + rotated(math.sqrt(omb) * u / delta))
    fogzo = fk.Fogzo(linear, total_steps=10, one_minus_beta=omb, schedule="constant", seed=seed, directions=1)
    seen = []
    linear.zero_grad()
    for probe in fogzo.probes():
        with probe:
            probe.backward((linear(x) - target).square().mean())
        seen.append(probe.loss.double())
    torch.testing.assert_close(torch.stack(seen[1:]), torch.stack(losses), rtol=1e-5, atol=1e-7)
    fogzo.estimate_()
    torch.testing.assert_close(linear.weight.grad.double(), wanted, rtol=1e-3, atol=1e-5)


def test_the_fused_optimizer_makes_the_same_steps():
    def torchs(model, fogzo):
        return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)

    def fused(model, fogzo):
        return fk.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1, fogzo=fogzo)

    (one, _), (other, _) = stepped(None, 1, torchs), stepped(None, 1, fused)
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
    _, first = stepped(None, 1, fused)
    _, last = stepped(None, 25, fused)
    assert last < 0.7 * first


def test_a_fused_step_keeps_the_q_that_the_next_one_needs():
    """Before FOGZO starts and after, of a scale that stays."""
    linear, (x, target) = nn.Linear(32, 4), (torch.randn(9, 32), torch.randn(9, 4))
    fk.quantize_model(linear, fk.Quantizer(QUEST.grid, fk.Scale.fixed(0.05), STE, fk.Hadamard(32)))
    fogzo = fk.Fogzo(linear, total_steps=6, kappa=1.0, start=0.5, directions=1)
    optimizer = fk.AdamW(linear.parameters(), lr=1e-2, fogzo=fogzo)
    for _ in range(6):
        wanted = (linear(x) - target).square().mean().detach()
        optimizer.zero_grad()
        assert torch.equal(optimizer.step(lambda: (linear(x) - target).square().mean()), wanted)


# ---- checkpoints, reports


def test_checkpoints_keep_the_transform():
    model, other = net(), net()
    assert "Hadamard(block=16)" in str(model)
    with torch.no_grad():
        model[3].weight.normal_()
    other.load_state_dict(model.state_dict())
    x, _ = batch()
    assert torch.equal(model(x), other(x))
    plain = nn.Linear(128, 32)
    fk.quantize_model(plain, fk.Quantizer(COARSE.grid, COARSE.scale, COARSE.straight_through))
    with pytest.raises(
        RuntimeError, match=re.escape("must have no transform, got a state with Hadamard(block=16)")
    ):
        plain.load_state_dict(model[3].state_dict())
    assert fk.Quantizer.from_dict(QUEST.to_dict()) == QUEST
    assert "transform" not in fk.presets.lsq(2).to_dict()


@pytest.mark.parametrize(
    ("quantizer", "message"),
    [
        (
            fk.presets.quest(2),
            "transform must have a block that divides the rows of the weight, of 64 elements, got"
            " Hadamard(block=128) for 1.weight",
        ),
        (
            fk.Quantizer(QUEST.grid, fk.Scale.fixed(torch.ones(4, 8)), STE, fk.Hadamard(16)),
            "alpha must be one for whole blocks of Hadamard(block=16), got one for each 8 elements for"
            " 1.weight",
        ),
    ],
    ids=["rows", "groups"],
)
def test_what_does_not_fit_is_refused_before_anything_changes(quantizer, message):
    model = nn.Sequential(nn.Linear(128, 64), nn.Linear(64, 4))
    with pytest.raises(ValueError, match=re.escape(message)):
        fk.quantize_model(model, fk.presets.quest(2), rules=[("1", quantizer)])
    assert type(model[0]) is nn.Linear


def test_inputs_that_do_not_fit_are_refused():
    linear = nn.Linear(24, 4)
    fk.quantize_model(linear, fk.presets.lsq(2), activation=QUEST)
    with pytest.raises(
        ValueError, match=r"activation must have a transform whose block divides .* of 24 elements"
    ):
        linear(torch.randn(2, 24))
    with pytest.raises(
        ValueError, match=r"scale must have groups of whole blocks of Hadamard\(block=16\), got"
    ):
        fk.presets.quest(2, 16, granularity=24)
    for bits in (0, 9, 2.5, True):
        with pytest.raises(ValueError, match=r"bits must be an int in 1\.\.8, got"):
            fk.presets.quest(bits)
