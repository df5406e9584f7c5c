"""A module that runs several times before a backward: its weight is shared, or losses are summed."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import fogzo_kernels as fk
from fogzo_kernels.nn import quantized, weight

PRESETS = {
    "bitnet": fk.presets.bitnet(),
    "quest": replace(fk.presets.quest(2), transform=fk.Hadamard(16)),
    "lsq": fk.presets.lsq(3),
    "lsq rows": fk.presets.lsq(3, "row"),
    "fixed": fk.presets.fixed(3, 0.1),
}


def made(preset, activation=None):
    torch.manual_seed(0)
    model, x = nn.Linear(16, 16), torch.randn(4, 16)
    fk.quantize_model(model, PRESETS[preset], activation=activation)
    if activation is not None and activation.learned:
        fk.calibrate_inputs_(model, lambda: model(x))
    return model, x


def gradients(model, loss):
    model.zero_grad()
    loss().backward()
    return [p.grad.clone() for p in model.parameters()]


def on_a_device(monkeypatch):
    """Alphas as on a device, whose values the host does not look at."""
    monkeypatch.setattr(weight, "seen_by_host", lambda alpha: False)
    monkeypatch.setattr(weight, "is_held", lambda alpha, least: False)
    monkeypatch.setattr(quantized, "is_held", lambda alpha, least: False)
    monkeypatch.setattr(quantized, "direct_values", lambda module: None)


@pytest.mark.parametrize("where", ["host", "device"])
@pytest.mark.parametrize("inputs", ["none", "dynamic", "learned"])
@pytest.mark.parametrize("preset", PRESETS)
def test_losses_of_two_forwards_add_up(preset, inputs, where, monkeypatch):
    activation = {"none": None, "dynamic": fk.presets.dynamic(8), "learned": fk.presets.lsq(4)}[inputs]
    model, x = made(preset, activation)
    if where == "device":
        on_a_device(monkeypatch)
    halves = [lambda part=part: model(part).square().sum() for part in (x[:2], x[2:])]
    one, other = (gradients(model, half) for half in halves)
    for found, a, b in zip(gradients(model, lambda: halves[0]() + halves[1]()), one, other, strict=True):
        torch.testing.assert_close(found, a + b)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_weight_that_was_edited_between_is_found(preset):
    model, x = made(preset)
    loss = model(x).square().sum()
    with torch.no_grad():
        model.weight.mul_(2.0)
    model(x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
