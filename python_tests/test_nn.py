"""Quantized modules: names, checkpoints, dtypes, tied weights, gradients."""

import copy

import pytest
import torch
from torch import nn

import fogzo_kernels as fk

GRID, STE = fk.Grid.uniform(2), fk.StraightThrough("identity")


def quantizer(alpha):
    return fk.Quantizer(GRID, fk.Scale.fixed(alpha), STE)


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4, bias=False))


def test_forward_uses_quantized_weights(backend):
    plain, model = mlp(), mlp()
    fk.quantize_model(model, quantizer(0.3), backend=backend)
    x = torch.randn(5, 8)
    for i in (0, 2):
        assert isinstance(model[i], fk.QuantLinear)
        codes = model[i].codes()
        assert codes.dtype == torch.int8
        values = fk.dequantize(codes, model[i].alpha, grid=GRID, dtype=torch.float32)
        assert len(values.unique()) > 1
        plain[i].weight.data = values
    assert torch.equal(model(x), plain(x))


def test_gradient_is_straight_through(backend):
    model = mlp()
    fk.quantize_model(model, quantizer(0.1), backend=backend)
    linear = model[0]
    x, upstream = torch.randn(5, 8), torch.randn(5, 6)
    linear(x).backward(upstream)
    w = linear.weight.detach() / 0.1
    inside = (w > GRID.qmin) & (w < GRID.qmax)
    assert 0 < inside.sum() < inside.numel()
    torch.testing.assert_close(linear.weight.grad, (upstream.t() @ x) * inside)
    assert linear.bias.grad is not None
    assert linear.alpha.grad is None


def test_plain_checkpoint_loads_strictly_and_own_restores_alpha():
    plain, model = mlp(), mlp()
    fk.quantize_model(model, quantizer(0.3))
    assert model.load_state_dict(plain.state_dict()).missing_keys == []
    assert model[0].alpha == torch.tensor(0.3)
    other = mlp()
    fk.quantize_model(other, quantizer(0.7))
    other.load_state_dict(model.state_dict())
    assert other[0].alpha == torch.tensor(0.3)
    assert set(model.state_dict()) == {*plain.state_dict(), "0.alpha", "2.alpha"}
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict({k: v for k, v in plain.state_dict().items() if k != "0.weight"})


def test_alpha_stays_float32():
    model = mlp()
    fk.quantize_model(model, quantizer(lambda w: w.abs().mean(1, keepdim=True)))
    before = model[0].alpha.clone()
    model.to(torch.bfloat16)
    assert model[0].weight.dtype == torch.bfloat16
    assert model[0].alpha.dtype == torch.float32
    assert torch.equal(model[0].alpha, before)
    model.half().float()
    assert torch.equal(model[0].alpha, before)
    assert model.to("meta")[0].alpha.device.type == "meta"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_and_autocast(dtype):
    model = mlp()
    fk.quantize_model(model, quantizer(0.3))
    if dtype == torch.bfloat16:
        with torch.autocast("cpu", dtype=dtype):
            assert model(torch.randn(2, 8)).dtype == dtype
    model.to(dtype)
    out = model(torch.randn(2, 8, dtype=dtype))
    out.sum().backward()
    assert out.dtype == model[0].weight.grad.dtype == dtype


def test_tied_weights_and_deepcopy():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    fk.quantize_model(model, quantizer(0.3))
    assert [m.tensor_id for m in model] == [0, 1, 0]
    twin = copy.deepcopy(model)
    assert twin[2].weight is twin[0].weight
    x = torch.randn(2, 4)
    assert torch.equal(twin(x), model(x))


def test_subclasses_and_skipped_modules_stay():
    model = nn.ModuleDict({
        "attention": nn.MultiheadAttention(4, 2), "head": nn.Linear(4, 4), "body": nn.Linear(4, 4),
    })  # fmt: skip
    fk.quantize_model(model, quantizer(0.3), skip=["he*"])
    assert type(model["head"]) is nn.Linear
    assert type(model["attention"].out_proj) is not fk.QuantLinear
    assert type(model["body"]) is fk.QuantLinear


def test_errors_leave_the_model_alone():
    model = mlp()
    with pytest.raises(ValueError, match=r"alpha must have one element.*2\.weight"):
        fk.quantize_model(model, quantizer(torch.ones(6)))
    assert type(model[0]) is nn.Linear


def test_quantize_gradcheck_of_the_smooth_derivative(backend):
    """The straight-through derivative of tanh is that of alpha tanh(theta / alpha)."""
    theta = torch.linspace(-1, 1, 41).requires_grad_()
    alpha = torch.tensor(0.5)
    tanh = fk.StraightThrough("tanh")
    q = fk.quantize(theta, alpha, grid=fk.Grid.sign(), straight_through=tanh, backend=backend)
    assert set(q.unique().tolist()) == {-0.5, 0.5}
    q.sum().backward()
    smooth = theta.detach().clone().double().requires_grad_()
    (0.5 * torch.tanh(smooth / 0.5)).sum().backward()
    torch.testing.assert_close(theta.grad.double(), smooth.grad, rtol=0, atol=2e-6)
