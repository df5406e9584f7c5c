"""Scales that are measured in each step or learned: in modules, steps, checkpoints."""

import copy
import io
import math
import pickle
import re

import pytest
import torch
from support.layers import LAYERS, cells
from support.training import estimator
from torch import nn

import fogzo_kernels as fk
from fogzo_kernels.spec.scale import STATISTICS

STE = fk.StraightThrough("identity")


def quantizer(scale, grid=None, ste=STE):
    return fk.Quantizer(grid or fk.Grid.uniform(3), scale, ste)


MEASURED = quantizer(fk.Scale.absmean("row", factor=0.8, least=1e-4))
LEARNED = quantizer(fk.Scale.learned("row"))


def mlp():
    return nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 4))


def made(q, make=mlp, **options):
    model = make()
    fk.quantize_model(model, q, **options)
    return model


X = torch.linspace(-1, 1, 40).view(5, 8)


def loss_of(model):
    return (model(X) - X[:, :4]).square().mean()


@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize("granularity", ["tensor", "row", 4])
def test_measured_scales_are_statistics(granularity, statistic, backend):
    scale = getattr(fk.Scale, statistic)(granularity, factor=0.7, add=0.01, least=0.1)
    linear = nn.Linear(8, 6)
    nn.init.normal_(linear.weight)
    linear.weight.data[0] *= 1e-3
    fk.quantize_model(linear, quantizer(scale), backend=backend)
    w = cells(linear.weight.detach().double(), granularity)
    found = {"absmax": w.abs().amax(2), "absmean": w.abs().mean(2), "rms": w.square().mean(2).sqrt()}[statistic]
    expected = (0.7 * (found + 0.01)).clamp(min=0.1)
    torch.testing.assert_close(linear.alpha.double().flatten(), expected.flatten(), rtol=1e-6, atol=0)
    assert linear.alpha.shape == {"tensor": (), "row": (6, 1), 4: (6, 2)}[granularity]


# ---- measured in each step


def test_a_measured_alpha_follows_the_weight():
    model = made(MEASURED)
    before = model[0].alpha.clone()
    with torch.no_grad():
        model[0].weight.mul_(2)
    y = model(X)
    torch.testing.assert_close(model[0].alpha, 2 * before)
    twin = made(MEASURED, lambda: copy.deepcopy(fk.dequantize_model(copy.deepcopy(model), latents=True)))
    assert torch.equal(twin(X), y)
    with torch.no_grad():
        model[0].weight.mul_(2)
    codes = model[0].codes()  # of the weight as it is
    torch.testing.assert_close(model[0].alpha, 4 * before)
    values = fk.dequantize(codes, model[0].alpha, grid=MEASURED.grid, dtype=torch.float32)
    assert torch.equal(values, model[0].effective_weight())


def test_all_passes_of_a_step_have_one_alpha_measured_once(monkeypatch):
    from fogzo_kernels.nn import weight

    model = made(MEASURED, rules=[("2", quantizer(fk.Scale.rms()))])
    calls, measure = [], weight.measure_alphas_
    monkeypatch.setattr(weight, "measure_alphas_", lambda *a, **k: calls.append(k) or measure(*a, **k))
    fogzo, seen = estimator(model, directions=2), []

    def closure():
        seen.append([m.alpha.clone() for m in (model[0], model[2])])
        return loss_of(model)

    with torch.no_grad():
        model[0].weight.mul_(1.5)
    fogzo.backward(closure)
    assert [c["statistic"] for c in calls] == ["absmean", "rms"]  # a call for each scale, not for each pass
    assert len(seen) >= 5  # the first step runs the closure more often
    for alphas in seen:
        assert all(torch.equal(a, b) for a, b in zip(alphas, seen[0], strict=True))
    expected = 0.8 * model[0].weight.abs().mean(1, keepdim=True)
    torch.testing.assert_close(seen[0][0], expected, rtol=1e-6, atol=0)


def test_tied_modules_measure_alike():
    model = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
    model[1].weight = model[0].weight
    fk.quantize_model(model, MEASURED)
    with torch.no_grad():
        model[0].weight.mul_(3)
    fogzo = estimator(model)
    fogzo.backward(lambda: sum(m(X).square().mean() for m in model))
    assert torch.equal(model[0].alpha, model[1].alpha)


# ---- both, in a step


@pytest.mark.parametrize("q", [MEASURED, LEARNED], ids=["measured", "learned"])
def test_a_step_is_the_functional_ops(q, backend):
    """The estimate replaces the weights' gradients; a learned alpha keeps its straight-through gradient."""
    model = made(q, backend=backend)
    fogzo = estimator(model, seed=3, backend=backend)
    losses = []
    for probe in fogzo.probes():
        with probe:
            probe.backward(loss_of(model))
        losses.append(probe.loss.clone())
        if not probe.sign:
            grads = [m.weight.grad.clone() for m in (model[0], model[2])]
            of_alphas = [m.alpha.grad.clone() for m in (model[0], model[2]) if m.alpha.requires_grad]
    fogzo.estimate_()
    modules = [model[0], model[2]]
    latents, alphas = [m.weight.detach() for m in modules], [m.alpha.detach() for m in modules]
    norm = fk.guide_norm(grads, alphas, grid=q.grid, backend=backend)
    options = {
        "grid": q.grid, "straight_through": STE, "one_minus_beta": 0.5, "seed": 3, "step": 0,
        "tensor_ids": [0, 1], "backend": backend,
    }  # fmt: skip
    out = [[torch.empty_like(w) for w in latents] for _ in "+-"]
    fk.perturb_quantize_(*out, latents, grads, alphas, norm, **options)
    for rows, loss in zip(out, losses[1:], strict=True):
        for m, values in zip(modules, rows, strict=True):
            m.probe = values
        assert torch.equal(loss_of(model), loss)
    for m in modules:
        m.probe = None
    fk.estimate_gradient_(grads, losses[1].view(1), losses[2].view(1), alphas, norm, **options)
    assert all(torch.equal(m.weight.grad, g) for m, g in zip(modules, grads, strict=True))
    assert [m.alpha.requires_grad for m in modules] == [q is LEARNED] * 2
    assert all(torch.equal(m.alpha.grad, g) for m, g in zip(modules, of_alphas, strict=q is LEARNED))


@pytest.mark.parametrize("fused", [fk.AdamW, fk.SGD])
@pytest.mark.parametrize("q", [MEASURED, LEARNED], ids=["measured", "learned"])
def test_a_fused_step_is_the_estimate_and_a_plain_one(q, fused):
    """No Q of an alpha that has moved is kept, and alphas move after the estimates that need them."""
    one = made(q)
    two = copy.deepcopy(one)
    ours = {"lr": 1e-2} | ({"momentum": 0.9} if fused is fk.SGD else {})
    fogzo = [estimator(m) for m in (one, two)]
    groups = [fk.parameter_groups(m, weight_decay=0.1)[::-1] for m in (one, two)]  # alphas' group first
    a = fused(groups[0], fogzo=fogzo[0], **ours)
    b = getattr(torch.optim, fused.__name__)(groups[1], **ours)
    for _ in range(4):
        for opt in (a, b):
            opt.zero_grad()
        loss = a.step(lambda: loss_of(one))
        assert loss == fogzo[1].backward(lambda: loss_of(two))
        b.step()
        for p, r in zip(one.parameters(), two.parameters(), strict=True):
            torch.testing.assert_close(p, r, rtol=1e-5, atol=1e-7)
            with torch.no_grad():  # or a rounding might move a code of the next step
                r.copy_(p)


@pytest.mark.parametrize("q", [MEASURED, LEARNED], ids=["measured", "learned"])
@pytest.mark.parametrize("name", LAYERS)
def test_compiled_exported_copied_and_saved_layers_are_the_same(name, q):
    layer = LAYERS[name]
    module = layer.make()
    nn.init.normal_(module.weight)
    fk.quantize_model(module, q)
    x = layer.input()
    y = module(x)
    torch._dynamo.reset()
    forward = torch.compile(module, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        module.weight.mul_(1.25)
    y, upstream = module(x), torch.randn(y.shape)
    y.backward(upstream)
    expected = {n: p.grad.clone() for n, p in module.named_parameters()}
    module.zero_grad()
    found = forward(x)
    assert torch.equal(found, y)
    found.backward(upstream)
    for n, p in module.named_parameters():
        torch.testing.assert_close(p.grad, expected[n])
    program = torch.export.export(copy.deepcopy(module).requires_grad_(False), (x,))
    assert torch.equal(program.module()(x), y)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(x), y)
        assert twin.quantizer == module.quantizer
    low = copy.deepcopy(module).bfloat16()
    assert low.alpha.dtype == torch.float32
    assert torch.equal(low.alpha, module.alpha)
    assert low.alpha.requires_grad == module.alpha.requires_grad


# ---- learned


def test_a_learned_alpha_is_a_parameter_that_is_not_counted_as_a_weight():
    model = mlp()
    total = sum(p.numel() for p in model.parameters())
    report = fk.quantize_model(model, fk.presets.lsq(2))
    assert report.total == total
    assert "Scale.learned()" in str(report)
    assert {n for n, _ in model.named_parameters() if n.endswith("alpha")} == {"0.alpha", "2.alpha"}
    assert estimator(model).total_weights == 8 * 12 + 12 * 4


def test_tied_modules_share_a_learned_alpha():
    model = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
    model[1].weight = model[0].weight
    fk.quantize_model(model, LEARNED)
    assert model[1].alpha is model[0].alpha
    twin = copy.deepcopy(model)
    assert twin[1].alpha is twin[0].alpha
    state = model.state_dict()  # holds it twice, for formats that take each memory once
    assert torch.equal(state["0.alpha"], state["1.alpha"])
    assert state["0.alpha"].data_ptr() == model[0].alpha.data_ptr() != state["1.alpha"].data_ptr()
    estimator(model)
    model[1].alpha = nn.Parameter(model[0].alpha.detach().clone())
    with pytest.raises(ValueError, match=r"0.weight must have one quantizer, alpha and tensor_id in all"):
        estimator(model)


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf], ids=str)
def test_an_alpha_driven_out_of_range_is_held_and_warned_of_once(bad):
    model = made(LEARNED)
    first = model[0].alpha.detach().clone()
    with torch.no_grad():
        model[0].alpha[3] = bad
    with pytest.warns(
        UserWarning, match="an update drove a learned alpha out of range, and it is held"
    ) as seen:
        assert torch.equal(*(model(X) for _ in range(2)))
    assert len(seen) == 1
    held = model[0].alpha.detach()
    assert held[3] == first[3] * 2.0**-20
    assert torch.equal(torch.cat([held[:3], held[4:]]), torch.cat([first[:3], first[4:]]))
    loss_of(model).backward()
    assert model[0].alpha.grad.isfinite().all()


def test_held_alphas_are_counted_by_the_step():
    model = made(LEARNED)
    fogzo = estimator(model)
    with torch.no_grad():
        model[0].alpha[:2] = -1.0
        model[2].alpha[3] = math.nan
    with pytest.warns(
        UserWarning, match="an update drove a learned alpha out of range, and it is held"
    ) as seen:
        fogzo.backward(lambda: loss_of(model))
    assert len(seen) == 1
    assert fogzo.diagnostics()["bad_alphas"] == 3
    assert all((m.alpha > 0).all() for m in (model[0], model[2]))
    model.zero_grad()
    fogzo.backward(lambda: loss_of(model))
    assert fogzo.diagnostics()["bad_alphas"] == 3


def test_training_moves_learned_alphas_and_lowers_the_loss():
    torch.manual_seed(0)
    model = made(fk.presets.lsq(2, "row"))
    before = model[0].alpha.detach().clone()
    fogzo = estimator(model, one_minus_beta=1e-3)
    optimizer = torch.optim.Adam(fk.parameter_groups(model, weight_decay=0.0), lr=1e-2)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        losses.append(fogzo.backward(lambda: loss_of(model)).item())
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]
    assert (model[0].alpha - before).abs().min() > 0


def test_parameter_groups_decay_matrices_only():
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8), "norm": nn.LayerNorm(8)})
    model["b"].weight = model["a"].weight
    model["norm"].bias.requires_grad_(False)
    fk.quantize_model(model, LEARNED)
    decaying, others, alphas = fk.parameter_groups(model, weight_decay=0.1)
    assert [g["weight_decay"] for g in (decaying, others, alphas)] == [0.1, 0.0, 0.0]
    assert [id(p) for p in decaying["params"]] == [id(model["a"].weight)]
    assert set(others["params"]) == {model["a"].bias, model["b"].bias, model["norm"].weight}
    assert len(others["params"]) == 3
    assert [id(p) for p in alphas["params"]] == [id(model["a"].alpha)]
    assert not any("lr" in group for group in (decaying, others, alphas))
    groups = fk.parameter_groups(model, weight_decay=0.1, alpha_lr=1e-4)
    assert [group.get("lr") for group in groups] == [None, None, 1e-4]
    optimizer = fk.AdamW(groups, lr=1e-2)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-2, 1e-2, 1e-4]
    for name in ("weight_decay", "alpha_lr"):
        for wrong, kind in ((-1.0, ValueError), (math.nan, ValueError), ("1", TypeError)):
            with pytest.raises(kind, match=f"{name} must be"):
                fk.parameter_groups(model, **{"weight_decay": 0.0, name: wrong})


# ---- checkpoints


@pytest.mark.parametrize("q", [MEASURED, LEARNED], ids=["measured", "learned"])
def test_checkpoints_keep_alphas_and_plain_weights_make_new_ones(q):
    model, other = made(q), made(q)
    with torch.no_grad():
        model[0].weight.mul_(2)
        if q is LEARNED:
            model[0].alpha.mul_(1.5)
    model(X)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file))
    assert torch.equal(other(X), model(X))
    assert torch.equal(other[0].alpha, model[0].alpha)
    plain = mlp()
    other.load_state_dict(plain.state_dict())
    fk.quantize_model(plain, q)
    assert torch.equal(other(X), plain(X))
    meta = made(q, lambda: mlp().to("meta"))
    meta.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(meta(X), model(X))


@pytest.mark.parametrize(
    ("saved", "into"), [(MEASURED, "fixed"), (LEARNED, "fixed"), (LEARNED, "measured"), (MEASURED, "learned")]
)
def test_a_state_of_another_kind_of_scale_is_refused(saved, into):
    """A measured alpha in a file may be older than the weight beside it."""
    q = {"fixed": quantizer(fk.Scale.fixed(torch.ones(1))), "measured": MEASURED, "learned": LEARNED}[into]
    q = quantizer(fk.Scale.fixed(lambda w: w.abs().mean(1, keepdim=True))) if into == "fixed" else q
    model = made(q)
    before = copy.deepcopy(model.state_dict())
    message = re.escape(f"0: the quantizer must have {q.scale}, got a state with {saved.scale}")
    with pytest.raises(RuntimeError, match=message):
        model.load_state_dict(made(saved).state_dict())
    assert torch.equal(model[0].weight, before["0.weight"])


def test_dequantized_models_have_no_alphas():
    for q in (MEASURED, LEARNED):
        model = made(q)
        y = model(X)
        fk.dequantize_model(model)
        assert set(model.state_dict()) == set(mlp().state_dict())
        torch.testing.assert_close(model(X), y)


@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
@pytest.mark.parametrize("q", [MEASURED, LEARNED], ids=["measured", "learned"])
def test_transformers_keep_scales_and_alphas(q, tied, tmp_path):
    """Also where modules share a weight and a learned alpha, which its files hold twice."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    import fogzo_kernels.integrations.transformers  # noqa: F401

    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=tied,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    fk.quantize_model(model, q)
    tokens = torch.randint(32, (2, 6))
    logits = model(tokens).logits
    model.save_pretrained(tmp_path)
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(tokens).logits, logits)
    head, embedding = loaded.lm_head, loaded.model.embed_tokens
    assert (head.alpha is embedding.alpha) == (tied and q is LEARNED)
    grads = []
    for m in (model, loaded):
        estimator(m).backward(lambda m=m: m(tokens, labels=tokens).loss)
        grads.append([p.grad for p in m.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
