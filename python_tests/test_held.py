"""Parameters that a child of their module quantizes: of attention, recurrent layers, modules of one's own."""

import copy
import io
import pickle
import threading

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint

import fogzo_kernels as fk
from fogzo_kernels.nn.held import CHILD, HeldWeight

LSQ, ROW = fk.presets.lsq(2), fk.presets.lsq(2, "row")


class Experts(nn.Module):
    """A stack, transposed or not, in a module that has an attribute alpha of its own."""

    def __init__(self, letters):
        super().__init__()
        torch.manual_seed(0)
        shape = {"e": 3, "o": 8, "i": 16}
        self.stack, self.letters = nn.Parameter(torch.randn([shape[x] for x in letters])), letters
        self.alpha, self.calls = 2.0, 0

    def forward(self, x, scale=1.0):
        self.calls += 1
        return scale * self.alpha * torch.einsum(f"{self.letters},ebi->ebo", self.stack, x)


class Usual(Experts):
    def __init__(self):
        super().__init__("eoi")


class Transposed(Experts):
    def __init__(self):
        super().__init__("eio")


class Router(nn.Module):
    """A matrix that nothing is known of."""

    def __init__(self):
        super().__init__()
        self.table, self.norm = nn.Parameter(torch.randn(5, 6)), nn.Parameter(torch.randn(6))

    def forward(self, x):
        return (x * self.norm) @ self.table.mT


@pytest.fixture(autouse=True)
def declared(monkeypatch):
    monkeypatch.setattr("fogzo_kernels.nn.dims.DECLARED", known := {})
    for module in ("registry",):
        monkeypatch.setattr(f"fogzo_kernels.nn.{module}.DECLARED", known)
    fk.declare_weights(Usual, stack="eoi")
    fk.declare_weights(Transposed, stack="eio")


SELF = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))
KINDS = {
    "attention": (lambda: nn.MultiheadAttention(16, 4, batch_first=True), lambda m: m(SELF, SELF, SELF)[0]),
    "attention of three widths": (
        lambda: nn.MultiheadAttention(16, 4, kdim=8, vdim=4, batch_first=True),
        lambda m: m(SELF, SELF[..., :8], SELF[..., :4])[0],
    ),
    "lstm": (lambda: nn.LSTM(16, 8, 2, bidirectional=True, proj_size=4), lambda m: m(SELF)[0]),
    "gru": (lambda: nn.GRU(16, 8, batch_first=True), lambda m: m(SELF)[0]),
    "rnn, packed": (
        lambda: nn.RNN(16, 8, batch_first=True),
        lambda m: m(pack_padded_sequence(SELF, [5, 3], batch_first=True))[1],
    ),
    "cell": (lambda: nn.LSTMCell(16, 8), lambda m: m(SELF[:, 0])[0]),
    "encoder": (
        lambda: nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True), lambda m: m(SELF),
    ),
    "experts": (Usual, lambda m: m(SELF[:1].expand(3, 5, 16), scale=0.5)),
    "transposed experts": (Transposed, lambda m: m(SELF[:1].expand(3, 5, 16))),
}  # fmt: skip


def made(kind, quantizer=ROW):
    torch.manual_seed(0)
    plain = KINDS[kind][0]()
    model = copy.deepcopy(plain)
    fk.quantize_model(model, quantizer)
    return plain, model, KINDS[kind][1]


@pytest.mark.parametrize("kind", KINDS)
def test_it_computes_what_the_plain_module_does_with_q(kind):
    plain, model, call = made(kind)
    expected = copy.deepcopy(model)
    fk.dequantize_model(expected)
    assert type(expected) is type(plain)
    assert list(expected.state_dict()) == list(plain.state_dict())
    for mode in (True, False):
        with torch.no_grad():
            out = call(model.train(mode))
            torch.testing.assert_close(out, call(expected.train(mode)), rtol=1e-6, atol=1e-6)
            assert not torch.allclose(out, call(plain.train(mode)))
            assert torch.equal(out, call(model))  # Q is kept in eval()


@pytest.mark.parametrize("kind", KINDS)
def test_latents_get_the_gradient_of_q(kind):
    _, model, call = made(kind, fk.presets.fixed(8, 1 / 16))  # nothing is clipped: h' is 1
    expected = copy.deepcopy(model)
    fk.dequantize_model(expected)
    for m in (model, expected):
        call(m.train()).square().sum().backward()
    for (name, p), (_, q) in zip(model.named_parameters(), expected.named_parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, fk.AdamW])
@pytest.mark.parametrize("directions", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_it_trains_and_its_state_loads(kind, directions, optimizer):
    _, model, call = made(kind)
    target = torch.randn(call(model).shape, generator=torch.Generator().manual_seed(2)) / 2
    fogzo = fk.Fogzo(model, total_steps=40, directions=directions)
    groups = fk.parameter_groups(model, weight_decay=0.0, alpha_lr=1e-3)
    fused = {"fogzo": fogzo} if optimizer is fk.AdamW else {}
    steps = optimizer(groups, lr=1e-2, **fused)
    losses = []
    for _ in range(40):
        steps.zero_grad()
        closure = lambda: (call(model) - target).square().mean()  # noqa: E731
        losses.append(float(steps.step(closure) if fused else fogzo.backward(closure)))
        if not fused:
            steps.step()
    assert losses[-1] < 0.97 * losses[0]
    other = KINDS[kind][0]()
    fk.quantize_model(other, ROW)
    other.load_state_dict(model.state_dict())
    assert torch.equal(call(other.eval()), call(model.eval()))


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_copied_and_pickled(kind):
    _, model, call = made(kind)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)]
    out = call(model.eval())
    for other in copies:
        assert type(other) is type(model)
        assert torch.equal(call(other.eval()), out)
        with torch.no_grad():  # a copy has weights of its own
            for m in other.modules():
                if isinstance(m, HeldWeight):
                    m.latent.mul_(-2)
                    assert m.home is not model
        assert torch.equal(call(model), out)
        assert not torch.equal(call(other), out)


@pytest.mark.parametrize("kind", KINDS)
def test_outside_the_forward_a_parameter_is_the_latent(kind):
    plain, model, _ = made(kind)
    for name, p in plain.named_parameters():
        assert torch.equal(model.get_parameter(name), p)
    names = [name for name, p in plain.named_parameters() if p.ndim > 1]
    assert set(names) <= set(dict(model.named_parameters()))


def test_a_method_that_the_forward_calls_reads_q_and_others_the_latent():
    _, model, call = made("experts")
    assert torch.equal(model.stack, dict(model.named_parameters())["stack"])
    out = call(model)
    with torch.no_grad():
        by_hand = model.alpha * torch.einsum("eoi,ebi->ebo", model.stack, SELF[:1].expand(3, 5, 16)) / 2
    assert not torch.allclose(out, by_hand)


def test_threads_and_checkpoints_run_with_their_own_values():
    _, model, call = made("experts")
    expected, found = call(model), []
    threads = [threading.Thread(target=lambda: found.append(call(model))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(out, expected) for out in found)
    x = SELF[:1].expand(3, 5, 16).clone().requires_grad_()
    grads = []
    for run in (model, lambda x: checkpoint(model, x, use_reentrant=False)):
        model.zero_grad()
        run(x).square().sum().backward()
        grads.append(model.stack.grad.clone())
    assert torch.equal(*grads)


@pytest.mark.parametrize("kind", ["attention", "experts", "transposed experts", "cell"])
def test_a_compiled_module_computes_the_same(kind):
    _, model, call = made(kind)
    torch.testing.assert_close(call(torch.compile(model)), call(model), rtol=1e-5, atol=1e-5)


def test_a_weight_that_another_takes_the_place_of_needs_a_new_alpha():
    _, model, call = made("experts")
    model.stack = nn.Parameter(torch.randn(3, 8, 16) * 9)
    with pytest.raises(RuntimeError, match=r"stack was replaced after its alpha was made"):
        call(model)
    getattr(model, "stack" + CHILD).calibrate_()
    call(model)


def test_a_module_moves_and_keeps_its_alphas_in_float32():
    _, model, _ = made("attention")
    model.to(torch.bfloat16)
    held = getattr(model, "in_proj_weight" + CHILD)
    assert (held.alpha.dtype, held.latent.dtype) == (torch.float32, torch.bfloat16)
    x = SELF.bfloat16()
    assert model(x, x, x)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("scale", ["tensor", "row", 4])
@pytest.mark.parametrize("kind", ["experts", "transposed experts"])
def test_each_expert_has_the_scales_of_a_linear_layer(kind, scale):
    plain, model, _ = made(kind, fk.presets.lsq(2, scale))
    held = getattr(model, "stack" + CHILD)
    for e, matrix in enumerate(plain.stack):
        linear = nn.Linear(16, 8, bias=False)
        linear.weight = nn.Parameter((matrix.mT if kind.startswith("tr") else matrix).detach().contiguous())
        fk.quantize_model(linear, fk.presets.lsq(2, scale))
        torch.testing.assert_close(held.alpha[e].flatten(), linear.alpha.flatten())
        values = held.effective_weight()[e].detach()
        torch.testing.assert_close(values.mT if kind.startswith("tr") else values, linear.effective_weight())


# ---- parameters that a rule names


def test_a_rule_names_a_parameter_of_an_unknown_module():
    model = nn.Sequential(Router(), nn.Linear(5, 2))
    report = fk.quantize_model(model, LSQ)
    assert [row.name for row in report.quantized] == ["1"]
    assert report.left[0].reason == "Router is unknown: a rule can name it"
    before = model(SELF[0, :, :6])
    report = fk.quantize_model(model, None, rules=[("0.table", ROW)])
    assert {row.name for row in report.quantized} == {"0.table", "1"}
    assert not torch.equal(model(SELF[0, :, :6]), before)
    fogzo = fk.Fogzo(model, total_steps=5)
    fogzo.backward(lambda: model(SELF[0, :, :6]).square().mean())


def test_a_rule_for_everything_names_no_parameter_of_an_unknown_module():
    report = fk.quantize_model(nn.Sequential(Router(), nn.Linear(5, 2)), None, rules=[("*", LSQ)])
    assert [row.name for row in report.quantized] == ["1"]


def remade(kind):
    """A module with a hook that makes one of its weights anew from others."""
    if kind == "weight_norm":
        return nn.utils.weight_norm(nn.LSTM(4, 4), "weight_hh_l0"), "weight_hh_l0", "weight_hh_l0_v"
    attention = nn.MultiheadAttention(4, 2)
    prune.l1_unstructured(attention, "in_proj_weight", 0.5)
    return attention, "in_proj_weight", "in_proj_weight_orig"


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("kind", ["weight_norm", "prune"])
def test_what_hooks_make_a_weight_of_is_left_alone(kind):
    """The forward reads the weight that the hook has made: to quantize its parts would do nothing."""
    module, whole, part = remade(kind)
    report = fk.quantize_model(module, LSQ)
    assert not any(row.name.startswith(whole) for row in report.quantized)
    reasons = {row.name: row.reason for row in report.left}
    assert reasons[part] == f"it is a part of {whole}, which is made anew in each forward"
    with pytest.raises(ValueError, match=f"{part}: it is a part of {whole}, which is made anew"):
        fk.quantize_model(remade(kind)[0], None, rules=[(part, LSQ)])


def test_rules_find_a_child_that_its_parent_reads():
    model = nn.Sequential(nn.MultiheadAttention(4, 2))
    report = fk.quantize_model(model, LSQ, skip="0.out_proj")
    assert [row.name for row in report.quantized] == ["0.in_proj_weight"]


def test_a_second_call_leaves_what_a_rule_named_as_it_is():
    config = torch.ao.quantization.get_default_qat_qconfig()
    model = nn.Sequential(torch.ao.nn.qat.Linear(4, 4, qconfig=config), nn.Linear(4, 4))
    fk.quantize_model(model, None, rules=[("0.weight", LSQ)])
    report = fk.quantize_model(model, LSQ)
    assert {row.name for row in report.quantized} == {"0.weight", "1"}


@pytest.mark.parametrize(
    ("dims", "error", "match"),
    [
        ({"stack": "eo"}, ValueError, "stack must be letters such as 'oi', 'eoi' or 'eio'"),
        ({"stack": "oei"}, ValueError, "stack must be letters such as"),
        ({"stack": "ooi"}, ValueError, "stack must be letters such as"),
        ({"stack": "eoii"}, ValueError, "stack must be letters such as"),
        ({"stack": 3}, TypeError, "stack must be a string of letters"),
    ],
)
def test_wrong_letters_are_refused(dims, error, match):
    with pytest.raises(error, match=match):
        fk.declare_weights(Usual, **dims)
    with pytest.raises(TypeError, match="kind must be a class of modules, got 3"):
        fk.declare_weights(3, stack="oi")


def test_a_parameter_with_other_dimensions_than_declared_is_refused():
    fk.declare_weights(Usual, stack="oi")
    with pytest.raises(ValueError, match=r"Usual.stack must have the 2 dimensions .* got shape \(3, 8, 16\)"):
        fk.quantize_model(Usual(), LSQ)


def test_an_input_that_cannot_be_quantized_is_in_the_report():
    inputs = fk.presets.dynamic(8)
    report = fk.quantize_model(nn.Sequential(nn.GRU(4, 4), nn.Linear(4, 4)), LSQ, activation=inputs)
    text = str(report)
    assert "inputs stay: GRU does not say which tensor meets this weight" in text
    assert "inputs B" in text
