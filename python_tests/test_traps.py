"""Settings that look right and would silently train or evaluate something else: errors, or right numbers."""

import copy
import pickle
import re

import pytest
import torch
import torch.nn.functional as F
from support.layers import QUANTIZER
from support.training import estimator
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrizations, prune

import fogzo_kernels as fk


def mlp():
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4))


def quantized(**options):
    model = mlp()
    fk.quantize_model(model, QUANTIZER, **options)
    return model


X = torch.linspace(-1, 1, 12).view(3, 4)


def loss_of(model):
    return model(X).square().mean()


# ---- PyTorch's fast path of encoder layers


def encoder(nested=True, **options):
    options = {"batch_first": True, "dropout": 0.0} | options
    layer = nn.TransformerEncoderLayer(8, 2, 16, **options)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested)


MASK = torch.tensor([[False, False, False], [False, False, True]])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("mask", [None, MASK], ids=["", "padded"])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"]
)
def test_encoder_layers_evaluate_what_they_train(copied, activation, mask):
    """Their fast path reads the latents: every number of an evaluation would be the float model's."""
    plain = encoder(activation=activation).eval()
    model = copy.deepcopy(plain)
    fk.quantize_model(model, QUANTIZER)
    model = copied(model)
    x = torch.randn(2, 3, 8)
    trained = copy.deepcopy(model).train()(x, src_key_padding_mask=mask)
    with torch.no_grad():
        float_model = plain(x, src_key_padding_mask=mask)
        found = model(x, src_key_padding_mask=mask)
    seen = slice(None) if mask is None else ~mask
    torch.testing.assert_close(found[seen], trained[seen])
    assert (found[seen] - float_model[seen]).abs().max() > 0.01


def test_training_in_eval_mode_perturbs_encoder_layers():
    model = encoder().eval()
    fk.quantize_model(model, QUANTIZER)
    fogzo, x, upstream = estimator(model), torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    losses = []
    for probe in fogzo.probes():
        with probe:
            probe.backward((model(x) * upstream).sum())
        losses.append(probe.loss.item())
    assert len(set(losses)) == 3


@pytest.mark.parametrize("nested", [True, False])
def test_a_dequantized_encoder_is_fast_again(nested):
    model = encoder(nested).eval()
    before = [dict(vars(m)) for m in model.modules()]
    fk.quantize_model(model, QUANTIZER)
    fk.dequantize_model(model)
    assert [dict(vars(m)) for m in model.modules()] == before
    with torch.no_grad():
        x = torch.randn(2, 3, 8)
        torch.testing.assert_close(model(x), copy.deepcopy(model).train()(x))


def test_an_encoder_without_quantized_layers_keeps_its_path():
    model = nn.ModuleDict({"encoder": encoder(), "head": nn.Linear(8, 4)})
    fk.quantize_model(model, QUANTIZER, skip="encoder")
    assert model["encoder"].use_nested_tensor
    assert [layer.activation_relu_or_gelu for layer in model["encoder"].layers] == [1, 1]


# ---- weights that the estimator would not see


def test_a_weight_tied_to_a_plain_module_later_is_refused():
    model = nn.ModuleDict({"emb": nn.Embedding(6, 4), "head": nn.Linear(4, 6, bias=False)})
    fk.quantize_model(model, QUANTIZER, skip="emb")
    model["emb"].weight = model["head"].weight
    with pytest.raises(ValueError, match=r"head.weight and emb.weight are one parameter, and only head.weight"):
        estimator(model)


@pytest.mark.parametrize("change", ["alpha", "quantizer", "tensor_id"])
def test_modules_that_share_a_weight_must_agree(change):
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    model["b"].weight = model["a"].weight
    fk.quantize_model(model, QUANTIZER)
    estimator(model)
    if change == "alpha":
        model["b"].alpha.mul_(2)
    elif change == "quantizer":
        model["b"].quantizer = fk.Quantizer(fk.Grid.uniform(2), QUANTIZER.scale, QUANTIZER.straight_through)
    else:
        model["b"].tensor_id = 7
    with pytest.raises(ValueError, match=r"a.weight must have one quantizer, alpha and tensor_id in all"):
        estimator(model)


def replaced(model):
    model[0].weight = nn.Parameter(model[0].weight.detach().clone())


def frozen(model):
    model[0].weight.requires_grad_(False)


def unfrozen(model):
    model[2].weight.requires_grad_()


def tied(model):
    model.append(copy.deepcopy(model[0]))
    model[3].weight = model[0].weight


def another(model):
    model.append(nn.Linear(4, 4))
    fk.quantize_model(model, QUANTIZER)


def dequantized(model):
    fk.dequantize_model(model)


@pytest.mark.parametrize("change", [replaced, frozen, unfrozen, tied, another, dequantized])
def test_a_change_of_the_weights_is_an_error_at_the_next_step(change):
    model = quantized()
    model[2].weight.requires_grad_(False)
    fogzo = estimator(model)
    fogzo.backward(lambda: loss_of(model))
    model.zero_grad()
    change(model)
    with pytest.raises(RuntimeError, match=r"the quantized weights changed after Fogzo\(model\)"):
        fogzo.backward(lambda: loss_of(model))
    assert all(p.grad is None for p in model.parameters())
    if change not in (dequantized, frozen):  # which leave no weight to train
        twin = estimator(model)
        twin.load_state_dict(fogzo.state_dict())
        if change is not tied:  # which no longer runs on these inputs
            twin.backward(lambda: loss_of(model))


def normed(linear):
    with pytest.warns(FutureWarning, match="weight_norm"):
        nn.utils.weight_norm(linear)


@pytest.mark.parametrize(
    "make_anew",
    [
        parametrizations.weight_norm, parametrizations.spectral_norm, parametrizations.orthogonal, normed,
        nn.utils.spectral_norm, lambda m: prune.l1_unstructured(m, "weight", 0.5),
    ],
)  # fmt: skip
def test_a_quantized_weight_that_is_made_anew_is_an_error(make_anew):
    model = quantized()
    fogzo = estimator(model)
    fogzo.backward(lambda: loss_of(model))
    model.zero_grad()
    make_anew(model[0])
    for call in (lambda: fogzo.backward(lambda: loss_of(model)), lambda: estimator(model)):
        with pytest.raises(ValueError, match=r"0.weight must be a Parameter of its quantized module"):
            call()
    assert all(p.grad is None for p in model.parameters())


# ---- weights of others


def test_functional_call_with_other_weights_is_refused_inside_a_pass():
    model, fogzo = quantized(), None
    fogzo = estimator(model)
    own = dict(model.named_parameters())
    others = {k: nn.Parameter(2 * v.detach()) for k, v in own.items()}
    outside = functional_call(model, others, (X,))
    twin = copy.deepcopy(model)
    twin.load_state_dict(others | {k: v for k, v in model.state_dict().items() if k not in others})
    assert torch.equal(outside, twin(X))
    fogzo.backward(lambda: functional_call(model, own, (X,)).square().mean())
    model.zero_grad()
    for bad in (0, 1, 2):
        passes = []

        def closure(passes=passes, bad=bad):
            passes.append(None)
            return functional_call(model, others if len(passes) > bad else own, (X,)).square().mean()

        with pytest.raises(RuntimeError, match="a quantized module must run with its own weight"):
            fogzo.backward(closure)
        assert len(passes) == bad + 1
        assert all(m.pass_weight is None for m in model.modules() if isinstance(m, fk.QuantLinear))
        model.zero_grad()


# ---- code that reads a weight itself


class Reads(nn.Module):
    """An embedding and layers, whose weights a function of the model reads as well."""

    def __init__(self, read):
        super().__init__()
        self.emb, self.linear, self.conv = nn.Embedding(6, 4), nn.Linear(4, 4), nn.Conv1d(4, 4, 1)
        self.read = read

    def forward(self, i):
        h = self.linear(self.emb(i))
        h = self.conv(h.transpose(1, 2)).transpose(1, 2)
        return self.read(self, h)


TOKENS = torch.tensor([[0, 1, 5]])


@pytest.mark.parametrize(
    ("read", "name", "node"),
    [
        (lambda m, h: F.linear(h, m.emb.weight).square().sum(), "emb.weight", "UnsafeViewBackward|MmBackward"),
        (lambda m, h: (h @ m.emb.weight.t()).square().sum(), "emb.weight", "MmBackward|UnsafeView|Bmm|Expand"),
        (lambda m, h: h.sum() + m.linear.weight.square().sum(), "linear.weight", "PowBackward"),
        (lambda m, h: h.sum() + 1e-3 * m.conv.weight.flatten().norm(), "conv.weight", "LinalgVectorNorm"),
        (lambda m, h: h.sum() + m.conv.weight.mean(), "conv.weight", "MeanBackward"),
        (lambda m, h: F.linear(h, m.linear.weight.bfloat16().float()).sum(), "linear.weight", "ToCopy"),
    ],
)
def test_a_loss_that_reads_a_weight_itself_is_an_error(read, name, node):
    model = Reads(read)
    fk.quantize_model(model, QUANTIZER)
    fogzo = estimator(model)
    before = copy.deepcopy(model.state_dict())
    for _ in range(2):  # also once the exception was swallowed
        with pytest.raises(
            RuntimeError, match=f"{re.escape(name)} must be used only by .* reads it in ({node})"
        ):
            fogzo.backward(lambda: model(TOKENS))
        assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    "read",
    [
        lambda m, h: h.sum() + 1e-3 * m.linear.bias.square().sum(),
        lambda m, h: h.sum() + m.linear.weight.detach().square().sum(),
        lambda m, h: F.linear(h, m.emb(torch.arange(6))).sum(),
        lambda m, h: m.linear(m.linear(h)).sum(),
        lambda m, h: h.bfloat16().sum().float(),
    ],
)
def test_other_uses_are_no_error(read):
    """Biases, detached values, rows looked up, a module that runs twice."""
    model = Reads(read)
    fk.quantize_model(model, QUANTIZER)
    fogzo = estimator(model)
    fogzo.backward(lambda: model(TOKENS))
    with torch.autocast("cpu"):
        model.zero_grad()
        fogzo.backward(lambda: model(TOKENS))
    compiled = torch.compile(model, backend="aot_eager")
    twin = estimator(model)
    model.zero_grad()
    twin.backward(lambda: compiled(TOKENS))
    assert model.linear.weight.grad is not None


# ---- messages


def test_frozen_weights_are_not_taken_for_none():
    model = quantized().requires_grad_(False)
    with pytest.raises(ValueError, match=r"got 2 quantized modules \('0' first\) whose weights are all frozen"):
        estimator(model)
    with pytest.raises(ValueError, match="got none: call quantize_model first"):
        estimator(mlp())


@pytest.mark.parametrize(
    ("backend", "exception", "message"),
    [
        ("gpu", ValueError, "backend must be one of"),
        (3, TypeError, "backend must be a string or None, got int"),
        ("elsewhere", RuntimeError, "backend 'elsewhere' is unavailable on cpu: not here"),
    ],
)
def test_a_bad_backend_is_found_before_the_first_step(backend, exception, message, monkeypatch):
    from fogzo_kernels import backends

    if backend == "elsewhere":
        monkeypatch.setattr(backends, "names", lambda: ("elsewhere",))
        monkeypatch.setattr(backends, "reason_unavailable", lambda name, device: "not here")
    model = quantized()
    with pytest.raises(exception, match=message):
        estimator(model, backend=backend)
