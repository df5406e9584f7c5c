"""What users and libraries do to the modules of a quantized model: the right result, or an error that helps."""

import copy

import pytest
import torch
from torch import nn

import fogzo_kernels as fk

PRESETS = {
    "lsq": fk.presets.lsq(2),
    "lsq rows": fk.presets.lsq(2, "row"),
    "lsq1": fk.presets.lsq(1, "row"),
    "seq": fk.presets.seq(2),
    "ternary": fk.presets.seq(1.58, "tensor"),
    "bitnet": fk.presets.bitnet(),
    "quest": fk.presets.quest(2, block=16),
    "fixed": fk.presets.fixed(3, 0.05),
}


def trained(model, closure, steps=20):
    """The losses of some steps."""
    fogzo = fk.Fogzo(model, total_steps=steps, kappa=0.01)
    optimizer = fk.AdamW(fk.parameter_groups(model, weight_decay=0.0, alpha_lr=1e-3), lr=0.01, fogzo=fogzo)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        losses.append(float(optimizer.step(closure)))
    return losses


# ---- weights that are 0


class Branched(nn.Module):
    """A branch that ends in a layer of zeros, as of ControlNet."""

    def __init__(self):
        super().__init__()
        self.first, self.zero, self.head = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4)
        nn.init.zeros_(self.zero.weight)

    def forward(self, x):
        x = torch.relu(self.first(x))
        return self.head(x + self.zero(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("preset", PRESETS)
def test_a_layer_that_begins_at_0_trains(preset, dtype):
    torch.manual_seed(0)
    model = Branched().to(dtype)
    fk.quantize_model(model, PRESETS[preset], skip="head")
    x = torch.randn(64, 16, dtype=dtype)
    y = torch.tanh(x[:, :4] + x[:, 4:8])
    losses = trained(model, lambda: (model(x) - y).float().square().mean())
    assert model.zero.effective_weight().any()
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize(
    "make", [nn.Linear, lambda i, o: nn.Conv2d(i // 4, o, 2), lambda i, o: nn.Embedding(o, i)]
)
@pytest.mark.parametrize("statistic", ["absmax", "absmean", "rms"])
def test_its_alpha_is_that_of_first_weights(statistic, make):
    """Those that PyTorch draws, in expectation; other rows keep their own."""
    q = fk.Quantizer(
        fk.Grid.uniform(3),
        fk.Scale.learned(init=getattr(fk.Scale, statistic)("row", factor=0.7)),
        fk.StraightThrough("identity"),
    )
    torch.manual_seed(0)
    model, like = make(400, 8), nn.Linear(400, 8)
    nn.init.zeros_(model.weight[0])
    fk.quantize_model(like, q)
    fk.quantize_model(model, q)
    assert 0.9 < model.alpha[0].item() / like.alpha.mean().item() < 1.1
    fk.calibrate_(model)
    own = model.weight.detach().flatten(1)[1:].double()
    expected = {"absmax": own.abs().amax(1), "absmean": own.abs().mean(1), "rms": own.square().mean(1).sqrt()}
    torch.testing.assert_close(model.alpha[1:, 0].double(), 0.7 * expected[statistic], rtol=1e-5, atol=0)


def test_scales_that_cannot_begin_at_0_name_the_remedy():
    for scale in (fk.Scale.absmax("row"), fk.Scale.fixed(lambda w: w.abs().mean())):
        model = nn.Sequential(nn.Linear(4, 4))
        nn.init.zeros_(model[0].weight)
        with pytest.raises(ValueError, match=r"for 0.weight: where weights are all 0, .* needs a bound"):
            fk.quantize_model(model, fk.Quantizer(fk.Grid.uniform(3), scale, fk.StraightThrough("identity")))


# ---- what quantize_model returns


def test_a_report_taken_for_the_model_says_what_it_is():
    model = nn.Sequential(nn.Linear(8, 4))
    report = fk.quantize_model(model, fk.presets.lsq(2))
    with pytest.raises(TypeError, match="changes the model in place and returns a report"):
        report(1)
    with pytest.raises(AttributeError, match="no attribute 'parameters': quantize_model changes the model"):
        report.parameters()
    assert copy.deepcopy(report) == report
