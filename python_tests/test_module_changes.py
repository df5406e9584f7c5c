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
    fogzo = fk.Fogzo(model, total_steps=steps, kappa=0.01, directions=1)
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
def test_a_row_that_begins_at_0_gets_the_alpha_of_first_weights(statistic, make):
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
    bound, function = (
        r"give the scale a bound, Scale.absmax\(least=1e-5\) say",
        "return more than 0 from the function",
    )
    for scale, remedy in (
        (fk.Scale.absmax("row"), bound),
        (fk.Scale.fixed(lambda w: w.abs().mean()), function),
    ):
        model = nn.Sequential(nn.Linear(4, 4))
        nn.init.zeros_(model[0].weight)
        with pytest.raises(ValueError, match=f"got 0.0..0.0 for 0.weight: 0.weight is all zeros; {remedy}"):
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


# ---- weights that are replaced


def fused(q):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).eval()
    model[1].running_var.uniform_(0.1, 3)
    fk.quantize_model(model, q)
    return model, torch.randn(2, 3, 8, 8)


@pytest.mark.parametrize("preset", [name for name in PRESETS if name != "quest"])
def test_a_fused_convolution_is_an_error_that_names_the_remedy(preset):
    model, x = fused(PRESETS[preset])
    expected = model(x)
    with pytest.raises(
        RuntimeError,
        match=r"0.weight was replaced after its alpha was made: call fogzo_kernels.dequantize_model",
    ):
        nn.utils.fuse_conv_bn_eval(model[0], model[1])(x)
    assert torch.equal(model(x), expected)
    fk.dequantize_model(model)
    torch.testing.assert_close(nn.utils.fuse_conv_bn_eval(model[0], model[1])(x), expected)


def test_a_fused_linear_layer_is_an_error_too():
    model, x = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)).eval(), torch.randn(3, 6)
    model[1].running_var.fill_(4)
    fk.quantize_model(model, fk.presets.lsq(3))
    broken = nn.utils.fuse_linear_bn_eval(model[0], model[1])
    for use in (lambda: broken(x), broken.codes, lambda: fk.dequantize_model(broken), lambda: fogzo(broken)):
        with pytest.raises(RuntimeError, match="was replaced after its alpha was made"):
            use()


def fogzo(model, steps=3):
    return fk.Fogzo(model, total_steps=steps, kappa=1.0, directions=1)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_new_weight_is_an_error_until_calibrate(preset):
    torch.manual_seed(0)
    model, like, x = nn.Linear(16, 4), nn.Linear(16, 4), torch.randn(3, 16)
    fk.quantize_model(model, PRESETS[preset])
    model.weight = nn.Parameter(9 * like.weight.detach())
    with pytest.raises(RuntimeError, match=r"weight .* call calibrate_\(\) of its module"):
        model(x)
    model.calibrate_()
    like.weight.data.mul_(9)
    like.bias = model.bias
    fk.quantize_model(like, PRESETS[preset])
    assert torch.equal(model(x), like(x))
    fogzo(model).backward(lambda: model(x).square().sum())


def test_a_weight_that_moves_with_its_alpha_is_no_error():
    """With their alphas, as whole modules, for the time of a call, or to another dtype or Parameter."""
    torch.manual_seed(0)
    model, other, x = nn.Linear(16, 4), nn.Linear(16, 4), torch.randn(3, 16)
    for one in (model, other):
        fk.quantize_model(one, fk.presets.lsq(3, "row"))
    expected = other(x)
    torch.func.functional_call(model, dict(other.named_parameters()), (x,))
    model.load_state_dict(other.state_dict(), assign=True)
    assert torch.equal(model(x), expected)
    model.weight = nn.Parameter(model.weight.detach().clone())
    assert torch.equal(copy.deepcopy(model)(x), expected)
    model.weight = nn.Parameter(model.weight.detach().bfloat16())
    model.bfloat16()(x.bfloat16())
    empty = nn.Linear(16, 4, device="meta")
    fk.quantize_model(empty, fk.presets.lsq(3, "row"))
    empty.load_state_dict(other.state_dict(), assign=True)
    assert torch.equal(empty(x), expected)
    empty.to_empty(device="cpu").load_state_dict(other.state_dict())
    assert torch.equal(empty(x), expected)


@pytest.mark.parametrize("use", ["forward", "fogzo", "step"])
def test_a_resized_weight_needs_scales_for_its_rows(use):
    model = nn.Sequential(nn.Embedding(6, 8), nn.Linear(8, 3))
    fk.quantize_model(model, fk.presets.lsq(8, "row"))
    ids, made = torch.arange(6), fogzo(model)
    model[0].weight.data = torch.cat([model[0].weight.data, torch.randn(2, 8)])
    with pytest.raises(
        RuntimeError, match=r"0.weight has 8 rows, and its alpha was made for 6: call calibrate_\(\)"
    ):
        {
            "forward": lambda: model(ids),
            "fogzo": lambda: fogzo(model),
            "step": lambda: made.backward(lambda: model(ids).sum()),
        }[use]()
    before = model[1].alpha.clone()
    model[0].calibrate_()
    fogzo(model).backward(lambda: model(torch.arange(8)).square().sum())
    assert torch.equal(model[1].alpha, before)
    assert model[0].alpha.grad.shape == (8, 1)


# ---- weights that are initialized anew


@pytest.mark.parametrize("make", [nn.Linear, lambda i, o: nn.Conv2d(i, o, 2), lambda i, o: nn.Embedding(o, i)])
@pytest.mark.parametrize("preset", ["lsq rows", "seq", "bitnet", "fixed"])
def test_reset_parameters_makes_alpha_anew(preset, make):
    model, like = make(16, 4), make(16, 4)
    model.weight.data.mul_(50)
    fk.quantize_model(model, PRESETS[preset])
    model.reset_parameters()
    like.weight.data.copy_(model.weight)
    fk.quantize_model(like, PRESETS[preset])
    assert torch.equal(model.effective_weight(), like.effective_weight())
    assert torch.equal(model.alpha, like.alpha)


@pytest.mark.parametrize("scale", ["lsq", "lsq rows", "seq", "function"])
@pytest.mark.filterwarnings("error")
def test_weights_initialized_in_place_draw_a_warning(scale):
    q = PRESETS.get(scale) or fk.Quantizer(
        fk.Grid.uniform(3), fk.Scale.fixed(lambda w: w.abs().mean()), fk.StraightThrough("identity")
    )
    model = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4))
    fk.quantize_model(model, q)
    fogzo(model)
    nn.init.normal_(model[1].weight, std=5)
    with pytest.warns(
        UserWarning,
        match=r"alpha of 1.weight does not fit the weights as .* call fogzo_kernels.calibrate_\(model\)",
    ):
        fogzo(model)
    fk.calibrate_(model)
    fogzo(model)


@pytest.mark.filterwarnings("error")
def test_a_trained_alpha_draws_no_warning():
    model = nn.Linear(16, 8)
    fk.quantize_model(model, fk.presets.lsq(2))
    with torch.no_grad():
        model.alpha.mul_(9)  # as an optimizer would
    fogzo(model)
