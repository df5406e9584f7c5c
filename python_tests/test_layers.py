"""Every layer that can be quantized, through everything that a layer goes through."""

import copy
import pickle
import warnings

import pytest
import torch
from support.layers import GRID, LAYERS, QUANTIZER, STE, made, of_groups, row_mean, rows_of, weight_of
from torch import nn

import fogzo_kernels as fk

NAMES = list(LAYERS)


def scaled(alpha):
    return fk.Quantizer(GRID, fk.Scale.fixed(alpha), STE)


def q_of(rows, alpha):
    """Q of rows in float64, and the mask of the clipped identity; alpha as (rows, groups) or one."""
    alpha = alpha.double().reshape(len(rows) if alpha.numel() > 1 else 1, -1)
    alpha = alpha.repeat_interleave(rows.shape[1] // alpha.shape[1], 1)
    w = rows.double() / alpha
    code = (w - GRID.offset).round().clamp(GRID.qmin, GRID.qmax)
    inside = (w - GRID.offset > GRID.qmin) & (w - GRID.offset < GRID.qmax)
    return alpha * (code + GRID.offset), inside


@pytest.mark.parametrize("alpha", [0.5, row_mean, of_groups], ids=["tensor", "row", "group"])
@pytest.mark.parametrize("name", NAMES)
def test_output_and_gradient_are_those_of_the_plain_layer_with_q(name, alpha, backend):
    """The gradient is masked where the clipped identity is flat, in rows of outputs whatever the layout."""
    plain, model, x = made(name, scaled(alpha), backend=backend)
    outputs = LAYERS[name].outputs
    rows = rows_of(plain.weight, outputs)
    q, inside = q_of(rows, model.alpha)
    assert 0 < inside.sum() < inside.numel()
    assert len(q.unique()) > 2
    with torch.no_grad():
        plain.weight.copy_(weight_of(q.float(), plain.weight, outputs))
    found, expected = model(x), plain(x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    upstream = torch.randn_like(expected)
    found.backward(upstream)
    expected.backward(upstream)
    masked = plain.weight.grad * weight_of(inside.float(), plain.weight, outputs)
    torch.testing.assert_close(model.weight.grad, masked, rtol=1e-5, atol=1e-6)
    values = fk.dequantize(model.codes(), model.alpha, grid=GRID, dtype=torch.float32)
    torch.testing.assert_close(values.double(), q, rtol=1e-6, atol=0)


# ---- layer x what happens to it


def compiled(name):
    torch._dynamo.reset()
    _, model, x = made(name)
    forward = torch.compile(model, fullgraph=True, backend="aot_eager")
    y, upstream = model(x), torch.randn(model(x).shape)
    y.backward(upstream)
    expected = model.weight.grad.clone()
    model.weight.grad = None
    found = forward(x)
    found.backward(upstream)
    assert torch.equal(found, y)
    torch.testing.assert_close(model.weight.grad, expected)
    probe = torch.randn(model.codes().shape)
    with torch.no_grad():
        model.probe = probe
        assert torch.equal(forward(x), model(x))
        assert not torch.equal(forward(x), y)
        model.probe = None
        assert torch.equal(forward(x), y)


def exported(name):
    _, model, x = made(name)
    program = torch.export.export(model, (x,))
    assert torch.equal(program.module()(x), model(x))
    assert "fogzo.quantize" in str(program.graph)


def deep_copied(name):
    _, model, x = made(name)
    check_twin(model, copy.deepcopy(model), x)


def pickled(name):
    _, model, x = made(name)
    check_twin(model, pickle.loads(pickle.dumps(model)), x)


def check_twin(model, twin, x):
    """The same values and settings, in memory of its own."""
    before = model(x)
    assert torch.equal(twin(x), before)
    assert type(twin) is type(model)
    assert twin.quantizer == model.quantizer
    assert (twin.tensor_id, twin.backend, twin.pass_weight) == (model.tensor_id, model.backend, None)
    assert twin.in_rows(twin.weight)
    with torch.no_grad():
        twin.weight.neg_()
        twin.alpha.mul_(2)
    assert torch.equal(model(x), before)


def tied(name):
    layer = LAYERS[name]
    model = nn.ModuleDict({"a": layer.make(), "b": layer.make(), "c": layer.make()})
    model["c"].weight = model["a"].weight
    report = fk.quantize_model(model, QUANTIZER)
    assert [row.tied for row in report.quantized] == ["", "", "a"]
    assert report.quantized_numel == 2 * model["a"].weight.numel()
    assert [m.tensor_id for m in model.values()] == [0, 1, 0]
    assert torch.equal(model["a"].alpha, model["c"].alpha)
    twin = copy.deepcopy(model)
    assert twin["c"].weight is twin["a"].weight
    x = layer.input()
    fogzo = fk.Fogzo(model, total_steps=2, one_minus_beta=1.0, schedule="constant", directions=1)
    assert [len(w.modules) for w in fogzo.weights] == [2, 1]
    seen = []

    def closure():
        seen.append([m.effective_weight().detach().clone() for m in model.values()])
        return sum(m(x).float().square().sum() for m in model.values())

    fogzo.backward(closure)
    assert all(torch.equal(a, c) for a, _, c in seen)
    assert not torch.equal(seen[-1][0], seen[-2][0])  # the first step runs the closure more often
    fk.dequantize_model(model)
    assert model["c"].weight is model["a"].weight


def in_bfloat16(name):
    _, model, x = made(name)
    alpha = model.alpha.clone()
    low = x if x.dtype == torch.int64 else x.bfloat16()
    with torch.no_grad():  # of the latent that there will be
        model.weight.copy_(model.weight.bfloat16())
        y = model(low if x.dtype == torch.int64 else low.float())
    model.bfloat16()
    found = model(low)
    assert found.dtype == model.weight.dtype == torch.bfloat16
    assert torch.equal(model.alpha, alpha)
    torch.testing.assert_close(found.float(), y, rtol=0.1, atol=0.1)
    found.sum().backward()
    assert model.weight.grad.dtype == torch.bfloat16
    assert model.in_rows(model.weight)


def on_meta(name):
    """Quantized before it has values: it gets them from either kind of checkpoint, or says that it has none."""
    plain, quantized, x = made(name)
    y = quantized(x)
    for state in (plain.state_dict(), quantized.state_dict()):
        for assign in (False, True):
            model = copy.deepcopy(plain).to("meta")
            fk.quantize_model(model, QUANTIZER)
            assert model.alpha.is_meta
            assert model(x.to("meta")).shape == y.shape
            if not assign:
                model.to_empty(device="cpu")
                assert model.alpha.isnan().all()  # not what memory held before
                with pytest.raises(ValueError, match=r"^alpha must be finite, > 0 .* for weight(: |$)"):
                    model(x)
            model.load_state_dict(state, assign=assign)
            assert torch.equal(model(x), y)
            assert model.in_rows(model.weight)
    model = copy.deepcopy(plain).to("meta")
    fk.quantize_model(model, QUANTIZER)
    model.to_empty(device="cpu")
    with torch.no_grad():
        model.weight.copy_(plain.weight)
    fk.calibrate_(model)
    assert torch.equal(model.effective_weight(), quantized.effective_weight())


@pytest.mark.parametrize(
    "what", [compiled, exported, deep_copied, pickled, tied, in_bfloat16, on_meta], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("name", NAMES)
def test_matrix(name, what):
    what(name)


# ---- FOGZO on each


@pytest.mark.parametrize("name", NAMES)
def test_a_step_is_the_functional_ops_on_rows(name, backend):
    """Losses and estimate, rebuilt by hand on a plain layer whose weight is set to each probe.

    Rows of an embedding that are not in the batch have no estimate.
    """
    plain, model, x = made(name, backend=backend)
    outputs = LAYERS[name].outputs
    fogzo = fk.Fogzo(
        model, total_steps=9, one_minus_beta=0.5, schedule="constant", seed=7, directions=2, backend=backend
    )
    target = torch.randn_like(plain(x))

    def loss_of(m):
        return (m(x) - target).square().mean()

    losses = []
    for probe in fogzo.probes():
        with probe:
            probe.backward(loss_of(model))
        losses.append(probe.loss.clone())
    grad = rows_of(model.weight.grad, outputs)
    reached = grad.ne(0).any(1)
    assert reached.sum().item() == (len(x.unique()) if name.startswith("embedding") else len(grad))
    fogzo.estimate_()

    latent, alpha = rows_of(model.weight, outputs), model.alpha
    norm = fk.guide_norm(grad, alpha, grid=GRID, backend=backend)
    options = {
        "grid": GRID, "straight_through": STE, "one_minus_beta": 0.5, "seed": 7, "step": 0, "tensor_ids": [0],
        "backend": backend,
    }  # fmt: skip
    for i in range(2):
        plus, minus = torch.empty_like(latent), torch.empty_like(latent)
        fk.perturb_quantize_(plus, minus, latent, grad, alpha, norm, direction=i, **options)
        for k, rows in enumerate((plus, minus)):
            with torch.no_grad():
                plain.weight.copy_(weight_of(rows, plain.weight, outputs))
                torch.testing.assert_close(losses[1 + 2 * i + k], loss_of(plain), rtol=1e-5, atol=1e-6)
    fk.estimate_gradient_(grad, torch.stack(losses[1::2]), torch.stack(losses[2::2]), alpha, norm, **options)
    grad[~reached] = 0
    assert torch.equal(rows_of(model.weight.grad, outputs), grad)
    assert grad[reached].ne(0).any(1).all()


@pytest.mark.parametrize("fused", [fk.AdamW, fk.SGD])
@pytest.mark.parametrize("name", NAMES)
def test_a_fused_step_is_the_estimate_and_a_plain_one(name, fused):
    """For whatever layout of parameter and state, also from a checkpoint of another layout."""
    _, one, x = made(name)
    two = copy.deepcopy(one)
    steps = 3
    ours = {"lr": 1e-2, "weight_decay": 0.1} | ({"momentum": 0.9} if fused is fk.SGD else {})
    fogzo = [fk.Fogzo(m, total_steps=steps, one_minus_beta=0.5, directions=1) for m in (one, two)]
    a = fused(one.parameters(), fogzo=fogzo[0], **ours)
    b = getattr(torch.optim, fused.__name__)(two.parameters(), **ours)
    for _ in range(steps):
        for opt in (a, b):
            opt.zero_grad()
        loss = a.step(lambda: one(x).square().mean())
        assert loss == fogzo[1].backward(lambda: two(x).square().mean())
        b.step()
        torch.testing.assert_close(one.weight, two.weight, rtol=1e-5, atol=1e-7)
        with torch.no_grad():  # or a rounding might move a code of the next step
            for p, q in zip(two.parameters(), one.parameters(), strict=True):
                p.copy_(q)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # PyTorch on tensors whose layouts differ
            state = a.state_dict()
        for entry in state["state"].values():
            for key, value in entry.items():
                entry[key] = value.clone(memory_format=torch.contiguous_format)
        a.load_state_dict(state)


@pytest.mark.parametrize("name", ["conv2d", "conv3d"])
def test_channels_last_is_seen_as_it_lies(name, backend):
    """The values of the plain format, with and without groups; nothing is copied but for groups."""
    memory = torch.channels_last if name == "conv2d" else torch.channels_last_3d
    for alpha in (0.25, row_mean, of_groups):
        _, model, x = made(name, scaled(alpha), backend=backend)
        other = copy.deepcopy(model).to(memory_format=memory)
        assert not other.weight.is_contiguous()
        assert other.in_rows(other.weight) == (alpha is not of_groups)
        assert torch.equal(other.codes(), model.codes())
        torch.testing.assert_close(other(x), model(x), rtol=1e-5, atol=1e-6)
        upstream = torch.randn_like(model(x))
        for m in (model, other):
            m(x).backward(upstream)
        torch.testing.assert_close(other.weight.grad, model.weight.grad, rtol=1e-5, atol=1e-6)
        assert torch.equal(fk.dequantize_model(other).weight, fk.dequantize_model(model).weight)


def test_channels_last_with_groups_is_laid_out_or_refused():
    """Groups are cut from a row in plain order, so that a weight's codes do not depend on its memory."""
    conv = nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last)
    fk.quantize_model(conv, scaled(of_groups))
    assert conv.weight.is_contiguous()
    conv.to(memory_format=torch.channels_last)
    with pytest.raises(ValueError, match="weight must lie in memory row by row, got strides"):
        fk.Fogzo(conv, total_steps=1, kappa=1.0, directions=1)


def test_a_transposed_linear_is_laid_out():
    linear = nn.Linear(4, 6)
    linear.weight = nn.Parameter(torch.randn(4, 6).t())
    value = linear.weight.detach().clone()
    fk.quantize_model(linear, QUANTIZER)
    assert linear.weight.is_contiguous()
    assert torch.equal(linear.weight, value)


# ---- embeddings


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
@pytest.mark.parametrize("option", [{"sparse": True}, {"max_norm": 1.0}], ids=str)
def test_embeddings_that_write_or_are_sparse_stay(option, kind):
    model = nn.ModuleDict({"emb": kind(4, 2, **option), "linear": nn.Linear(2, 2)})
    report = fk.quantize_model(model, QUANTIZER)
    assert type(model["emb"]) is kind
    assert "sparse" in report.left[0].reason or "max_norm" in report.left[0].reason
    with pytest.raises(ValueError, match=r"rules\[0\] must match modules that can be quantized"):
        fk.quantize_model(model, None, rules=[("emb", QUANTIZER)])


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
@pytest.mark.parametrize("noise_per", ["tensor", "model"])
def test_rows_that_got_no_gradient_keep_still(kind, noise_per):
    """The padding row, as in PyTorch, and rows that are not in the batch: they get no estimate."""
    emb = kind(6, 64, padding_idx=3)
    nn.init.normal_(emb.weight)
    fk.quantize_model(emb, scaled(0.3))
    options = {"one_minus_beta": 1.0, "schedule": "constant", "directions": 1, "noise_per": noise_per}
    fogzo = fk.Fogzo(emb, total_steps=4, **options)
    x = torch.tensor([[0, 3, 4]])
    upstream = torch.randn(emb(x).shape)

    def closure():
        return (emb(x) * upstream).sum()

    fogzo.backward(closure)
    in_batch = emb.weight.grad.ne(0)
    assert in_batch[[0, 4]].all()  # its noise reaches each element
    assert not in_batch[[1, 2, 3, 5]].any()


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
@pytest.mark.parametrize("fused", [fk.AdamW, fk.SGD])
def test_a_fused_step_of_an_embedding_with_padding_is_the_estimate_and_a_plain_one(kind, fused):
    """Without weight decay its padding row and rows that are not in the batch keep still."""
    emb = kind(6, 512, padding_idx=3)
    nn.init.normal_(emb.weight, std=0.3)  # few are clipped, so that each probe moves some codes
    fk.quantize_model(emb, scaled(0.3))
    twin = copy.deepcopy(emb)
    fogzo = [fk.Fogzo(m, total_steps=4, one_minus_beta=0.5, directions=1) for m in (emb, twin)]
    a = fused(emb.parameters(), lr=0.5, weight_decay=0.0, fogzo=fogzo[0])
    b = getattr(torch.optim, fused.__name__)(twin.parameters(), lr=0.5, weight_decay=0.0)
    x, before = torch.tensor([[0, 3, 4]]), emb.weight.detach().clone()
    for _ in range(2):
        for optimizer in (a, b):
            optimizer.zero_grad()
        loss = a.step(lambda: emb(x).square().mean())
        assert loss == fogzo[1].backward(lambda: twin(x).square().mean())
        b.step()
        torch.testing.assert_close(emb.weight, twin.weight, rtol=1e-5, atol=1e-7)
        with torch.no_grad():  # or a rounding might move a code of the next step
            twin.weight.copy_(emb.weight)
    assert torch.equal(emb.weight[[1, 2, 3, 5]], before[[1, 2, 3, 5]])
    assert emb.weight[[0, 4]].ne(before[[0, 4]]).any(1).all()


@pytest.mark.parametrize("directions", [1, 3])
def test_a_padding_row_is_read_alike_in_all_passes(directions):
    emb, seen = nn.Embedding(5, 512, padding_idx=3), []
    nn.init.normal_(emb.weight, std=0.3)  # few are clipped, so that each probe moves some codes
    fk.quantize_model(emb, scaled(0.3))
    options = {"one_minus_beta": 1.0, "schedule": "constant", "directions": directions}
    fogzo = fk.Fogzo(emb, total_steps=4, **options)

    for probe in fogzo.probes():
        with probe:
            out = emb(torch.tensor([0, 3]))
            seen.append(out.detach().clone())
            probe.backward(out.square().mean())
    fogzo.estimate_()
    assert all(torch.equal(out[1], seen[0][1]) for out in seen)
    assert all(out[0].ne(seen[0][0]).any() for out in seen[1:])


@pytest.mark.parametrize("fused", [fk.AdamW, fk.SGD])
@pytest.mark.parametrize("name", ["transposed", "channels last"])
def test_state_of_another_layout_is_what_a_fused_step_moves(name, fused):
    """A checkpoint may hold momenta as they lie in a plain model."""
    torch.manual_seed(0)
    plain = nn.ConvTranspose2d(3, 4, 2) if name == "transposed" else nn.Conv2d(3, 4, 2)
    if name == "channels last":
        plain = plain.to(memory_format=torch.channels_last)
    options = {"momentum": 0.9} if fused is fk.SGD else {}
    x, found = torch.randn(2, 3, 5, 5), []
    for contiguous in (False, True):
        model = copy.deepcopy(plain)
        fk.quantize_model(model, scaled(0.3))
        fogzo = fk.Fogzo(model, total_steps=9, directions=1)
        optimizer = fused(model.parameters(), lr=0.1, fogzo=fogzo, **options)
        for step in range(3):
            if step and contiguous:
                state = copy.deepcopy(optimizer.state_dict())
                for own in state["state"].values():
                    for key, value in own.items():
                        if key != "step" and value is not None:
                            own[key] = value.clone(memory_format=torch.contiguous_format)
                optimizer.load_state_dict(state)
            optimizer.zero_grad()
            optimizer.step(lambda model=model: model(x).square().mean())
        found.append(model.weight.detach().clone())
    assert torch.equal(*found)


@pytest.mark.parametrize("directions", [0, 1])
def test_scales_of_rows_that_are_not_in_the_batch_keep_still(directions):
    """In a fused step, whatever momentum they have from earlier batches."""
    emb = nn.Embedding(6, 64)
    fk.quantize_model(emb, fk.presets.lsq(2, "row"))
    fogzo = fk.Fogzo(emb, total_steps=9, directions=directions)
    optimizer = fk.AdamW(fk.parameter_groups(emb, weight_decay=0.0), lr=1e-2, fogzo=fogzo)
    for rows in ([0, 1], [1, 2], [3, 3]):
        before, x = emb.alpha.detach().clone(), torch.tensor(rows)
        optimizer.zero_grad()
        optimizer.step(lambda x=x: emb(x).square().sum())
        moved = emb.alpha.detach().ne(before).flatten()
        assert moved.nonzero().flatten().tolist() == sorted(set(rows))


def test_a_padding_row_of_a_tied_head_trains():
    model = nn.ModuleDict({"emb": nn.Embedding(5, 64, padding_idx=3), "head": nn.Linear(64, 5, bias=False)})
    model["head"].weight = model["emb"].weight
    fk.quantize_model(model, scaled(0.3))
    fogzo = fk.Fogzo(model, total_steps=4, one_minus_beta=0.5, directions=1)
    fogzo.backward(lambda: model["head"](model["emb"](torch.tensor([0, 3, 4]))).square().sum())
    assert model["emb"].weight.grad[3].ne(0).any()
