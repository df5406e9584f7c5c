"""Which modules quantize_model takes, what its report says, and what it refuses before it changes anything."""

import copy
import json
import pickle
import re

import pytest
import torch
from support.layers import QUANTIZER, row_mean
from torch import nn
from torch.nn.utils import parametrizations, prune

import fogzo_kernels as fk

FOUR = fk.Quantizer(fk.Grid.uniform(4), fk.Scale.fixed(0.1), fk.StraightThrough("identity"))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)
        self.table = nn.Parameter(torch.zeros(3, 4))


class Model(nn.Module):
    """Linears, an embedding, norms, a table, and what has no quantized form."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(8, 4)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.lstm, self.attention = nn.LSTM(4, 4), nn.MultiheadAttention(4, 2)
        self.head = nn.Linear(4, 8)


def snapshot(model):
    return [(type(m), dict(vars(m)), dict(m._parameters), dict(m._buffers)) for m in model.modules()]


def kinds(model):
    """Bits of each quantized module by its name."""
    return {name: m.quantizer.grid.bits for name, m in model.named_modules() if hasattr(m, "effective_weight")}


ALL = dict.fromkeys(["embed", "blocks.0.proj", "blocks.1.proj", "head"], 2.0)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ALL),
        ({"skip": "head"}, {k: v for k, v in ALL.items() if k != "head"}),
        ({"skip": nn.Embedding}, {k: v for k, v in ALL.items() if k != "embed"}),
        ({"skip": ["head", nn.Embedding]}, {"blocks.0.proj": 2, "blocks.1.proj": 2}),
        ({"skip": lambda name, m: name.startswith("blocks")}, {"embed": 2, "head": 2}),
        ({"rules": [("head", FOUR)]}, ALL | {"head": 4}),
        ({"rules": [("h*", FOUR), ("head", None)]}, ALL | {"head": 4}),
        ({"rules": [("head", FOUR)], "skip": "h*"}, {k: v for k, v in ALL.items() if k != "head"}),
        ({"rules": [("blocks.1", FOUR)]}, ALL | {"blocks.1.proj": 4}),
        ({"rules": [("blocks", FOUR)]}, ALL | {"blocks.0.proj": 4, "blocks.1.proj": 4}),
        ({"rules": [("*.proj", FOUR)]}, ALL | {"blocks.0.proj": 4, "blocks.1.proj": 4}),
        ({"rules": [(Block, FOUR), (nn.Linear, None)]}, {"embed": 2, "blocks.0.proj": 4, "blocks.1.proj": 4}),
        ({"rules": [("blocks.0", None), (Block, FOUR)]}, {"embed": 2, "blocks.1.proj": 4, "head": 2}),
        ({"rules": [(nn.LSTM, None), (nn.MultiheadAttention, None), ("*", FOUR)]}, dict.fromkeys(ALL, 4)),
        ({"rules": [(lambda name, m: getattr(m, "out_features", 0) == 8, FOUR)]}, ALL | {"head": 4}),
        ({"quantizer": None, "rules": [("head", FOUR)]}, {"head": 4}),
    ],
)
def test_the_first_rule_that_matches_decides(options, expected):
    """A name or type matches what lies in it too; a function is asked for each module."""
    model = Model()
    fk.quantize_model(model, **({"quantizer": QUANTIZER} | options))
    assert kinds(model) == expected


def test_a_module_with_two_names_is_found_by_either():
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    model["c"] = model["b"]
    fk.quantize_model(model, QUANTIZER, rules=[("c", FOUR)])
    assert kinds(model) == {"a": 2, "b": 4}


# ---- the report


def test_report_names_everything_once():
    model = Model()
    model.blocks[1].proj.weight = model.blocks[0].proj.weight
    total = sum(p.numel() for p in model.parameters())
    report = fk.quantize_model(model, QUANTIZER, rules=[("blocks", FOUR)], skip="embed")
    assert [(r.name, r.kind, r.shape, r.bits, r.scales, r.tied) for r in report.quantized] == [
        ("blocks.0.proj", "Linear", "(4, 4)", 4.0, 1, ""),
        ("blocks.1.proj", "Linear", "(4, 4)", 4.0, 1, "blocks.0.proj"),
        ("head", "Linear", "(8, 4)", 2.0, 8, ""),
    ]
    assert [r.quantizer for r in report.quantized] == [FOUR, FOUR, QUANTIZER]
    left = {r.name: (r.kind, r.numel, r.bits, r.reason) for r in report.left}
    assert left == {
        "embed": ("Embedding", 32, 32.0, "skip[0], 'embed'"),
        "blocks.0": ("Block", 12, 32.0, "Block has no quantized form"),
        "blocks.1": ("Block", 12, 32.0, "Block has no quantized form"),
        "lstm": ("LSTM", 128, 32.0, "LSTM has no quantized form"),
        "attention": ("MultiheadAttention", 64, 32.0, "MultiheadAttention has no quantized form"),
    }
    assert report.total == total
    assert report.quantized_numel == 16 + 32
    assert report.share == 48 / total
    assert report.vector_numel == total - 48 - sum(numel for _, numel, _, _ in left.values())
    # codes, scales, the rest in float32
    assert report.size == (16 * 4 + 32 * 2) / 8 + 4 * (1 + 8) + 4 * (total - 48)
    assert report.bits == pytest.approx(8 * report.size / total)


def test_a_report_prints_each_quantizer_and_each_reason():
    report = fk.quantize_model(Model(), QUANTIZER, rules=[("blocks", FOUR), ("lstm", None)])
    text = str(report)
    lines = {line.split("  ")[0]: " ".join(line.split()) for line in text.splitlines() if line}
    assert lines["embed"].endswith("Embedding (8, 4) 2 8 A")
    assert lines["blocks.{0..1}.proj (2)"].endswith("Linear (4, 4) 4 1 B")
    assert lines["head"].endswith("Linear (8, 4) 2 8 A")
    assert "A: 4 levels -1.5..1.5 times alpha, Scale.fixed(row_mean), identity" in text.splitlines()
    assert "B: 16 levels -8..7 times alpha, Scale.fixed(0.1), identity" in text.splitlines()
    for clip, told in ((False, "identity, clip=False"), ("trust", "identity, clip='trust'")):
        quantizer = fk.Quantizer(FOUR.grid, FOUR.scale, fk.StraightThrough("identity", clip=clip))
        report_of_one = fk.quantize_model(nn.Linear(4, 4), quantizer)
        assert f"A: 16 levels -8..7 times alpha, Scale.fixed(0.1), {told}" in str(report_of_one).splitlines()
    assert lines["attention"].endswith("MultiheadAttention in_proj_weight (12, 4) has no quantized form")
    assert " out_proj.weight (4, 4)" in text  # each weight has a line
    assert lines["lstm"].endswith("LSTM weight_ih_l0 (16, 4) rules[1], 'lstm'")
    assert text.splitlines()[-2].startswith(f"{report.total} parameters: {report.quantized_numel} (")
    assert max(map(len, text.splitlines())) < 110


def test_what_the_braces_of_a_name_give_is_there():
    """Four layers without the one at 1, 1 are no block of two by two."""
    model = nn.ModuleList(nn.ModuleList(nn.Linear(4, 4) for _ in range(2)) for _ in range(2))
    model[1][1] = nn.Linear(4, 8)
    names = [line.split("  ")[0] for line in str(fk.quantize_model(model, QUANTIZER)).splitlines()]
    assert names[1:4] == ["0.{0..1} (2)", "1.0", "1.1"]


def test_a_second_call_reports_the_whole_model():
    model = Model()
    fk.quantize_model(model, QUANTIZER, skip=["head", "embed"])
    report = fk.quantize_model(model, FOUR, skip="embed")
    assert [(r.name, r.bits) for r in report.quantized] == [
        ("blocks.0.proj", 2.0), ("blocks.1.proj", 2.0), ("head", 4.0)
    ]  # fmt: skip
    assert kinds(model) == {"blocks.0.proj": 2, "blocks.1.proj": 2, "head": 4}
    ids = [m.tensor_id for m in model.modules() if isinstance(m, fk.QuantLinear)]
    assert sorted(ids) == [0, 1, 2]


# ---- weights that are made anew in each forward


def parametrized():
    return parametrizations.weight_norm(nn.Linear(4, 4))


def spectral():
    return nn.utils.spectral_norm(nn.Linear(4, 4))


def normed():
    with pytest.warns(FutureWarning, match="weight_norm"):
        return nn.utils.weight_norm(nn.Linear(4, 4))


def pruned():
    return prune.l1_unstructured(nn.Linear(4, 4), "weight", 0.5)


class Subclass(torch.Tensor):
    pass


def of_subclass():
    linear = nn.Linear(4, 4)
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(Subclass))
    return linear


class Mine(nn.Linear):
    pass


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (parametrized, "its weight is parametrized: made anew in each forward"),
        (spectral, "its weight is made anew in each forward, by SpectralNorm"),
        (normed, "its weight is made anew in each forward, by WeightNorm"),
        (pruned, "its weight is made anew in each forward, by L1Unstructured"),
        (of_subclass, "its weight is a Subclass"),
        (lambda: Mine(4, 4), "Mine has no quantized form"),
        (lambda: nn.LSTM(4, 4), "LSTM has no quantized form"),
        (lambda: nn.Bilinear(4, 4, 4), "Bilinear has no quantized form"),
        (lambda: nn.ConvTranspose2d(4, 4, 3), "ConvTranspose2d has no quantized form"),
        (lambda: nn.MultiheadAttention(4, 2), "MultiheadAttention has no quantized form"),
    ],
)
def test_what_has_no_quantized_form_is_left_alone_with_the_reason(make, reason):
    """And is an error where a rule asks for it: by name, by pattern, by type."""
    model = nn.ModuleDict({"odd": make(), "linear": nn.Linear(4, 4)})
    before = snapshot(model["odd"])
    for which in ("odd", "*", nn.Module):
        with pytest.raises(ValueError, match=re.escape(f"odd: {reason}")):
            fk.quantize_model(model, None, rules=[(which, QUANTIZER)])
    report = fk.quantize_model(model, QUANTIZER)
    assert [(r.name, r.reason) for r in report.left] == [("odd", reason)]
    assert snapshot(model["odd"]) == before
    assert type(model["linear"]) is fk.QuantLinear


def test_a_rule_that_a_pattern_spreads_over_norms_is_no_error():
    model = Model()
    fk.quantize_model(model, None, rules=[("blocks*", FOUR)])
    assert kinds(model) == {"blocks.0.proj": 4, "blocks.1.proj": 4}


# ---- errors, before anything has changed


def tied(model):
    model.head = nn.Linear(4, 8, bias=False)
    model.head.weight = model.embed.weight
    return model


def float64():
    return nn.Linear(4, 4).double()


def quantized(**options):
    model = Model()
    fk.quantize_model(model, QUANTIZER, **options)
    return model


def half_quantized():
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    fk.quantize_model(model, QUANTIZER, skip="b")
    model["b"].weight = model["a"].weight
    return model


def one_memory():
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    model["b"].weight = nn.Parameter(model["a"].weight.detach())
    return model


def raw_table():
    """A parameter of the model's own, used as it is, is the weight of one of its layers."""
    model = Model()
    model.raw = model.head.weight
    return model


def probed():
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    model["b"].probe = None
    return model


PAIR = "are one parameter, and only {} would be quantized: probes would not perturb"


@pytest.mark.parametrize(
    ("make", "options", "exception", "message"),
    [
        (lambda: tied(Model()), {"skip": nn.Embedding}, ValueError,
         "head.weight and embed.weight " + PAIR.format("head.weight")),
        (lambda: tied(Model()), {"skip": "head"}, ValueError,
         "leave both alone (rules=[('embed', None), ('head', None)])"),
        (lambda: tied(Model()), {"rules": [("head", FOUR)]}, ValueError,
         "embed.weight and head.weight are one parameter: rules must give both one quantizer"),
        (raw_table, {}, ValueError, "head.weight and raw " + PAIR.format("head.weight")),
        (one_memory, {}, ValueError, "a.weight and b.weight must not be two parameters with one memory"),
        (half_quantized, {}, ValueError,
         "b.weight must be quantized in one call with the modules that share it, got a.weight quantized"),
        (quantized, {}, ValueError,
         "model must have modules that are not quantized yet, got 4 that are and no other to quantize"),
        (quantized, {"rules": [("head", FOUR)]}, ValueError,
         "got 'head', which matches head: it is quantized already"),
        (float64, {}, TypeError, "weight must be float32 or bfloat16 or float16, got float64"),
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(4)), {}, ValueError,
         "LazyLinear.weight must be initialized: run the model once before"),
        (probed, {}, ValueError, "b must not have an attribute 'probe' of its own"),
        (Model, {"rules": [("heads", FOUR)]}, ValueError,
         "rules[0] must match a module of model that holds weights, got 'heads'"),
        (Model, {"rules": [(nn.Conv2d, None)]}, ValueError,
         "rules[0] must match a module of model that holds weights, got Conv2d"),
        (Model, {"rules": [("head", FOUR), ("blocks.0.norm", FOUR)]}, ValueError,
         "rules[1] must match a module that can be quantized, got 'blocks.0.norm'"),
        (Model, {"quantizer": None}, ValueError, "model must have a module to quantize, got none"),
        (Model, {"backend": "gpu"}, ValueError, "backend must be one of cpu, triton, cuda, reference"),
    ],
)  # fmt: skip
def test_errors_change_nothing(make, options, exception, message):
    model = make()
    before = snapshot(model)
    with pytest.raises(exception, match=re.escape(message)):
        fk.quantize_model(model, **({"quantizer": QUANTIZER} | options))
    assert snapshot(model) == before


@pytest.mark.parametrize(
    ("alpha", "got"),
    [
        (torch.ones(1, 64), "(1, 64)"),  # by its count, groups of 32
        (torch.ones(32, 64), "(32, 64)"),  # a scale of its own for each weight
        (torch.ones(64), "(64,)"),
        (torch.ones(32, 5), "(32, 5)"),
        (torch.ones(1, 32), "(1, 32)"),
        (torch.ones(16, 2), "(16, 2)"),
        (torch.ones(0), "(0,)"),
        (torch.ones(32, 1, 2), "(32, 1, 2)"),
    ],
    ids=str,
)
def test_alphas_of_a_wrong_shape_are_refused(alpha, got):
    message = f"for weight with 32 rows of 64, got shape {got}"
    quantizer = fk.Quantizer(fk.Grid.uniform(2), fk.Scale.fixed(alpha), fk.StraightThrough("identity"))
    linear = nn.Linear(64, 32)
    with pytest.raises(ValueError, match=re.escape(message)):
        fk.quantize_model(linear, quantizer)
    assert type(linear) is nn.Linear


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (32,), (32, 1), (32, 2), (32, 32)], ids=str)
def test_alphas_of_a_right_shape_are_taken(shape):
    alpha = torch.rand(shape) + 0.01
    quantizer = fk.Quantizer(fk.Grid.uniform(2), fk.Scale.fixed(alpha), fk.StraightThrough("identity"))
    linear = nn.Linear(64, 32)
    fk.quantize_model(linear, quantizer)
    assert torch.equal(linear.alpha, alpha)
    each = alpha.reshape(32 if alpha.numel() > 1 else 1, -1)
    each = each.repeat_interleave(64 // each.shape[1], 1).expand(32, 64)
    q = each * (linear.weight / each).round().clamp(-2, 1)
    torch.testing.assert_close(linear.effective_weight(), q, rtol=1e-6, atol=0)


def test_a_quantizer_comes_back_from_its_dict():
    """What JSON holds of them comes back; a function or a tensor says that it did not."""
    for scale in (0.5, torch.ones(3, 1), row_mean):
        q = fk.Quantizer(fk.Grid.sign(), fk.Scale.fixed(scale), fk.StraightThrough("tanh", noise="gaussian"))
        found = fk.Quantizer.from_dict(copy.deepcopy(q.to_dict()))
        assert (found.grid, found.straight_through) == (q.grid, q.straight_through)
        assert (found.scale == q.scale) == (scale == 0.5 if isinstance(scale, float) else False)
        if not isinstance(scale, float):
            with pytest.raises(RuntimeError, match="alpha must be given anew"):
                fk.quantize_model(nn.Linear(4, 4), found)
    for clip in (True, False, "trust"):
        q = fk.Quantizer(fk.Grid.uniform(2), fk.Scale.fixed(0.5), fk.StraightThrough(clip=clip))
        assert fk.Quantizer.from_dict(json.loads(json.dumps(q.to_dict()))) == q
        assert pickle.loads(pickle.dumps(q)) == q
    for wrong in ({}, {"version": 2}, "2", q.to_dict() | {"grid": {"bits": 2}}):
        with pytest.raises(ValueError, match="the quantizer must be"):
            fk.Quantizer.from_dict(wrong)


@pytest.mark.parametrize(
    ("grid", "bits"),
    [
        (fk.Grid.uniform(4), 4.0),
        (fk.Grid.half_offset(1), 1.0),
        (fk.Grid.sign(), 1.0),
        (fk.Grid.ternary(), 1.585),
    ],
    ids=str,
)
def test_a_grid_knows_its_bits(grid, bits):
    assert grid.bits == pytest.approx(bits, abs=1e-3)
