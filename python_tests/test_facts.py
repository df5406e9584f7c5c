"""What a step finds changed since the step before: Fogzo looks natively at a model that it has seen."""

import pytest
import torch
from torch import nn

import fogzo_kernels as fk
from fogzo_kernels.ops import native


@pytest.fixture(params=["native", "python"])
def either(request, monkeypatch):
    if request.param == "python":
        monkeypatch.setattr(native, "native", lambda: None)


class Model(nn.Module):
    """Two weights that train, a frozen one, a plain layer, a buffer."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.frozen, self.plain = (nn.Linear(8, 8) for _ in range(4))
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        self.count += 1
        return self.plain(self.frozen(torch.tanh(self.b(torch.tanh(self.a(x))))))


def trained(directions=0):
    """After two steps: the second one finds the model as it was."""
    model, x = Model(), torch.randn(4, 8)
    fk.quantize_model(model, fk.presets.lsq(4), skip=["plain"])
    model.frozen.weight.requires_grad_(False)
    fogzo = fk.Fogzo(model, total_steps=100, directions=directions)
    optimizer = fk.AdamW(model.parameters(), lr=1e-3, fogzo=fogzo)

    def step():
        optimizer.zero_grad()
        return optimizer.step(lambda: model(x).square().mean())

    step()
    facts = fogzo._run.prepared.facts
    step()
    assert fogzo._run.prepared.facts is facts
    return model, fogzo, step


ERRORS = {
    "a weight is replaced": lambda m: setattr(m.b, "weight", nn.Parameter(torch.randn(8, 8))),
    "a weight is frozen": lambda m: m.a.weight.requires_grad_(False),
    "a weight is unfrozen": lambda m: m.frozen.weight.requires_grad_(),
    "weights are tied": lambda m: setattr(m.b, "weight", m.a.weight),
    "a module is dequantized": lambda m: fk.dequantize_model(m.b),
    "a module is quantized": lambda m: fk.quantize_model(m.plain, fk.presets.lsq(4)),
    "a plain module replaces one": lambda m: setattr(m, "b", nn.Linear(8, 8)),
    "a quantized child is added": lambda m: m.add_module("more", quantized()),
}


def quantized():
    layer = nn.Linear(8, 8)
    fk.quantize_model(layer, fk.presets.lsq(4))
    return layer


#: Of the errors: each says what to do.
SAID = r"changed after Fogzo|took the place of|was replaced after its alpha was made|tensor_id of its own"


@pytest.mark.parametrize("change", ERRORS)
def test_a_change_of_the_weights_is_an_error(change, either):
    model, _, step = trained()
    ERRORS[change](model)
    with pytest.raises((RuntimeError, ValueError), match=SAID):
        step()


SEEN = {
    "data of a weight": lambda m: setattr(m.a.weight, "data", torch.randn(8, 8)),
    "data of a plain parameter": lambda m: setattr(m.plain.weight, "data", torch.randn(8, 8)),
    "a plain parameter": lambda m: setattr(m.plain, "bias", nn.Parameter(torch.zeros(8))),
    "a plain child": lambda m: m.add_module("more", nn.Tanh()),
    "a hook": lambda m: m.a.weight.register_hook(lambda grad: grad),
    "a hook after accumulation": lambda m: m.a.weight.register_post_accumulate_grad_hook(lambda p: None),
    "a floor of alpha": lambda m: m.a.calibrate_(),
    "a backend": lambda m: setattr(m.a, "backend", "reference"),
}


@pytest.mark.parametrize("change", SEEN)
def test_another_change_is_seen(change, either):
    model, fogzo, _ = trained()
    facts = fogzo._run.prepared.facts
    assert facts.hold()
    SEEN[change](model)
    assert not facts.hold()


@pytest.mark.parametrize("directions", [0, 1])
def test_a_scripted_module_keeps_its_buffers(directions):
    """Its modules have no dicts: they are looked at anew in each step."""
    model, x = nn.Sequential(nn.Linear(8, 8), torch.jit.script(nn.BatchNorm1d(8))), torch.randn(4, 8)
    fk.quantize_model(model, fk.presets.lsq(4))
    fogzo = fk.Fogzo(model, total_steps=100, directions=directions)
    for i in range(3):
        model.zero_grad()
        fogzo.backward(lambda: model(x).square().mean())
        assert model[1].num_batches_tracked == i + 1


@pytest.mark.parametrize("directions", [0, 1])
def test_a_buffer_that_comes_in_a_forward_is_wound_back(directions):
    model, _, step = trained(directions)

    def count(module, args, out):
        if "late" not in module._buffers:
            module.register_buffer("late", torch.zeros(()))
        module.late.add_(1)

    model.a.register_forward_hook(count)
    for i in range(3):
        step()
        assert model.a.late == i + 1
    assert model.count == 5
