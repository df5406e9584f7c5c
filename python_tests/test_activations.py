"""Quantized inputs of linear layers and convolutions."""

import copy
import re

import pytest
import torch
from support.layers import LAYERS, WITH_INPUTS, of_groups, rows_of
from torch import nn

import fogzo_kernels as fk

WEIGHTS = fk.presets.lsq(4)
INT8 = fk.presets.dynamic(8)
TENSOR = fk.presets.dynamic(4, "tensor")
FIXED = fk.Quantizer(fk.Grid.uniform(4), fk.Scale.fixed(0.2), fk.StraightThrough("identity"))


def q_of(rows, activation):
    """Q of a matrix of inputs and the slope that gradients see, in float64."""
    grid, rows = activation.grid, rows.double()
    if activation is FIXED:
        alpha = torch.tensor(0.2, dtype=torch.float32).double()
    else:
        largest = rows.abs().amax(1, keepdim=True) if activation is INT8 else rows.abs().amax()
        alpha = (largest / grid.qmax).clamp(min=1e-5 / grid.qmax)
    z = rows / alpha
    clipped = activation.straight_through.clip is True
    inside = (z > grid.qmin) & (z < grid.qmax) if clipped else torch.ones_like(z, dtype=torch.bool)
    return alpha * z.round().clamp(grid.qmin, grid.qmax), inside


def input_rows(name, x):
    """A token of a linear layer, a sample of a convolution."""
    return x.flatten(1) if "conv" in name else x.reshape(-1, x.shape[-1])


@pytest.mark.parametrize("activation", [INT8, TENSOR, FIXED], ids=["token", "tensor", "fixed"])
@pytest.mark.parametrize("name", WITH_INPUTS)
def test_a_layer_runs_with_q_of_its_input(name, activation, backend):
    """Forward and the input's gradient are those of the layer without it, given Q of the input."""
    layer = LAYERS[name]
    module = layer.make()
    fk.quantize_model(module, WEIGHTS, activation=activation, backend=backend)
    without = layer.make()
    without.load_state_dict({k: v for k, v in module.state_dict().items() if k in without.state_dict()})
    fk.quantize_model(without, WEIGHTS, backend=backend)
    x = layer.input().requires_grad_()
    expected, inside = q_of(input_rows(name, x.detach()), activation)
    xq = expected.float().view(x.shape).requires_grad_()
    found, y = module(x), without(xq)
    torch.testing.assert_close(found, y, rtol=1e-4, atol=1e-5)
    upstream = torch.randn_like(y)
    found.backward(upstream)
    y.backward(upstream)
    torch.testing.assert_close(x.grad, xq.grad * inside.view(x.shape), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(module.weight.grad, without.weight.grad, rtol=1e-4, atol=1e-5)


def of_integers_(module):
    """Weights and biases whose products with small integers are summed exactly, in whatever order.

    BLAS may add in another order for each shape, so that equal rows have equal bits only of exact sums.
    """
    with torch.no_grad():
        for p in (module.weight, module.bias):
            p.copy_(torch.randint(-7, 8, p.shape))


def test_inputs_of_any_rank_have_an_alpha_per_token():
    """Any number of leading dimensions, none, no rows, and one sample of a convolution."""
    linear, conv = nn.Linear(6, 4), nn.Conv2d(2, 3, 3)
    weights = fk.Quantizer(fk.Grid.uniform(4), fk.Scale.fixed(1.0), fk.StraightThrough("identity"))
    for m in (linear, conv):
        of_integers_(m)
        fk.quantize_model(m, weights, activation=INT8)
    x = torch.randint(-126, 127, (2, 3, 6)).float()
    x[..., 0] = 127 * torch.tensor([[1, 2, 4], [8, 16, 1]])  # a token's alpha is a power of two: 1 to 16
    tokens = linear(x)
    assert len(tokens.unique()) > 12
    assert torch.equal(tokens[1, 2], linear(x[1, 2]))
    assert torch.equal(tokens.transpose(0, 1), linear(x.transpose(0, 1)))
    assert linear(torch.zeros(0, 6)).shape == (0, 4)
    x = torch.randint(-126, 127, (2, 2, 5, 5)).float()
    x[:, 0, 0, 0] = 127 * torch.tensor([1.0, 4.0])  # and a sample's
    assert torch.equal(conv(x[1]), conv(x)[1])
    zeros = linear(torch.zeros(3, 6))  # a padded token has a scale too
    assert torch.equal(zeros, linear.bias.expand(3, 4))


def net():
    return nn.Sequential(
        nn.Embedding(9, 8), nn.Linear(8, 12), nn.Tanh(), nn.Dropout(0.2), nn.Linear(12, 8), nn.Linear(8, 4)
    )


X = torch.tensor([[0, 2, 8], [1, 1, 4]])


def quantized(**options):
    model = net()
    report = fk.quantize_model(model, WEIGHTS, **({"activation": INT8} | options))
    return model, report


def test_a_rule_gives_its_modules_their_own_input_quantizer():
    """A third entry of a rule is its modules' own; embeddings take indices."""
    model, report = quantized(rules=[("4", WEIGHTS, TENSOR), ("5", fk.presets.bitnet(), None)])
    assert [m.activation for m in model if hasattr(m, "activation")] == [None, INT8, TENSOR, None]
    assert [row.activation for row in report.quantized] == [None, INT8, TENSOR, None]
    lines = {line.split()[0]: line.split("  ")[-1] for line in str(report).splitlines() if line}
    assert [lines[x].strip() for x in "0145"] == ["A", "A, inputs B", "A, inputs C", "D"]
    assert f"B: 256 levels -128..127 times alpha, {INT8.scale}" in str(report)
    assert "input levels=256" in repr(model[1])
    assert "input levels" not in repr(model[5])


def test_a_step_perturbs_weights_only():
    """All passes see the same inputs' quantizer and dropout; the estimate is that of the functional ops."""
    model, _ = quantized()
    fogzo = fk.Fogzo(model, total_steps=3, one_minus_beta=0.5, schedule="constant", directions=1)
    seen = []
    model[1].register_forward_hook(lambda m, args, out: seen.append(m.effective_input(args[0]).detach()))
    model[0].weight.requires_grad_(False)
    fogzo = fk.Fogzo(model, total_steps=3, one_minus_beta=0.5, schedule="constant", directions=1)
    fogzo.backward(lambda: model(X).square().mean())
    assert len(seen) == 3
    assert all(torch.equal(x, seen[0]) for x in seen)
    assert len(seen[0].unique()) > 3
    assert all(model[i].weight.grad.abs().sum() > 0 for i in (1, 4, 5))


@pytest.mark.parametrize("name", WITH_INPUTS)
def test_compiled_exported_copied_and_bfloat16_layers_give_the_eager_output(name):
    layer = LAYERS[name]
    module = layer.make()
    fk.quantize_model(module, fk.presets.fixed(4, 0.1), activation=INT8)
    x = layer.input()
    y = module(x)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), y)
    assert torch.equal(torch.export.export(module, (x,)).module()(x), y)
    assert torch.equal(copy.deepcopy(module)(x), y)
    with torch.no_grad():  # of values that bfloat16 has
        module.weight.copy_(module.weight.bfloat16())
        y = module(x.bfloat16().float())
    low = module.bfloat16()(x.bfloat16())
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), y, rtol=0.05, atol=0.05)


def test_checkpoints_keep_the_input_quantizer():
    model, _ = quantized()
    twin, _ = quantized()
    twin.load_state_dict(model.state_dict())
    model.eval(), twin.eval()
    assert torch.equal(twin(X), model(X))
    other, _ = quantized(activation=None)
    with pytest.raises(RuntimeError, match="1: activation must be None, got a state with Quantizer"):
        other.load_state_dict(model.state_dict())
    with pytest.raises(RuntimeError, match=r"1: activation must be Quantizer.* got a state with None"):
        model.load_state_dict(other.state_dict())
    fk.dequantize_model(model)
    assert not hasattr(model[1], "activation")
    assert set(model.state_dict()) == set(net().state_dict())


def test_transformers_keep_the_input_quantizer(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    import fogzo_kernels.integrations.transformers  # noqa: F401

    config = transformers.GPT2Config(
        vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    fk.quantize_model(model, WEIGHTS, activation=INT8, rules=[("*.mlp", WEIGHTS, TENSOR)])
    model.save_pretrained(tmp_path)
    loaded = copy.deepcopy(transformers.GPT2LMHeadModel.from_pretrained(tmp_path))  # of aligned weights
    assert torch.equal(loaded(X).logits, model(X).logits)
    assert loaded.transformer.h[0].mlp.c_fc.activation == TENSOR
    assert loaded.transformer.h[0].attn.c_attn.activation == INT8
    assert loaded.transformer.wte.activation is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation": fk.presets.lsq(4, "row")},
         "activation must have one learned alpha for a module's inputs, granularity 'tensor', got"
         " Scale.learned('row')"),
        ({"activation": fk.Quantizer(INT8.grid, fk.Scale.absmax("row"), INT8.straight_through)},
         "activation must have a scale with least > 0, for inputs that are all 0, got Scale.absmax('row')"),
        ({"rules": [("1", WEIGHTS, fk.presets.seq(2))]}, "rules[0][2] must have one learned alpha"),
    ],
)  # fmt: skip
def test_what_inputs_cannot_have_is_refused(options, message):
    model = net()
    with pytest.raises(ValueError, match=re.escape(message)):
        fk.quantize_model(model, WEIGHTS, **options)
    assert type(model[1]) is nn.Linear


def test_a_scale_that_does_not_fit_the_input_is_an_error():
    linear = nn.Linear(6, 4)
    activation = fk.Quantizer(INT8.grid, fk.Scale.fixed(of_groups), INT8.straight_through)
    fk.quantize_model(linear, WEIGHTS, activation=activation)
    assert linear(torch.randn(3, 6)).shape == (3, 4)
    assert rows_of(linear.weight, 0).shape == (4, 6)
    linear.activation = fk.Quantizer(INT8.grid, fk.Scale.absmax(4, least=1.0), INT8.straight_through)
    with pytest.raises(
        ValueError, match="granularity must divide the rows of the weight, of 6 elements, got 4"
    ):
        linear(torch.randn(3, 6))
