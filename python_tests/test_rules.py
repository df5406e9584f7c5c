"""Which modules quantize_model takes, what its report says, and what it refuses before it changes anything."""

import re

import pytest
import torch
from support.layers import QUANTIZER
from torch import nn
from torch.ao.nn import qat
from torch.ao.quantization import get_default_qat_qconfig
from torch.nn.utils import parametrizations, prune

import fogzo_kernels as fk

FOUR = fk.Quantizer(fk.Grid.uniform(4), fk.Scale.fixed(0.1), fk.StraightThrough("identity"))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)
        self.table = nn.Parameter(torch.zeros(3, 4))


class Model(nn.Module):
    """Linears, an embedding, modules with several weights, norms, and tables of a class that is unknown."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(8, 4)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.lstm, self.attention = nn.LSTM(4, 4), nn.MultiheadAttention(4, 2)
        self.head = nn.Linear(4, 8)


def snapshot(model):
    return [(type(m), dict(vars(m)), dict(m._parameters), dict(m._buffers)) for m in model.modules()]


def kinds(model):
    """Bits of each quantized weight, by the name of its module, or by its own where a module has several."""
    named = ((name.removesuffix("_quantizer"), m) for name, m in model.named_modules())
    return {name: m.quantizer.grid.bits for name, m in named if hasattr(m, "effective_weight")}


RECURRENT = ["lstm.weight_ih_l0", "lstm.weight_hh_l0"]
PROJECTIONS = ["attention.in_proj_weight", "attention.out_proj.weight"]
SEVERAL = dict.fromkeys(RECURRENT + PROJECTIONS, 2.0)
ALL = dict.fromkeys(["embed", "blocks.0.proj", "blocks.1.proj", "head"], 2.0) | SEVERAL


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ALL),
        ({"skip": "head"}, {k: v for k, v in ALL.items() if k != "head"}),
        ({"skip": nn.Embedding}, {k: v for k, v in ALL.items() if k != "embed"}),
        ({"skip": ["head", nn.Embedding]}, SEVERAL | {"blocks.0.proj": 2, "blocks.1.proj": 2}),
        ({"skip": lambda name, m: name.startswith("blocks")}, SEVERAL | {"embed": 2, "head": 2}),
        ({"rules": [("head", FOUR)]}, ALL | {"head": 4}),
        ({"rules": [("h*", FOUR), ("head", None)]}, ALL | {"head": 4}),
        ({"rules": [("head", FOUR)], "skip": "h*"}, {k: v for k, v in ALL.items() if k != "head"}),
        ({"rules": [("blocks.1", FOUR)]}, ALL | {"blocks.1.proj": 4}),
        ({"rules": [("blocks", FOUR)]}, ALL | {"blocks.0.proj": 4, "blocks.1.proj": 4}),
        ({"rules": [("*.proj", FOUR)]}, ALL | {"blocks.0.proj": 4, "blocks.1.proj": 4}),
        (
            {"rules": [(Block, FOUR), (nn.Linear, None)]},
            {k: v for k, v in SEVERAL.items() if k != "attention.out_proj.weight"}  # a linear layer, too
            | {"embed": 2, "blocks.0.proj": 4, "blocks.1.proj": 4},
        ),
        ({"rules": [("blocks.0", None), (Block, FOUR)]}, SEVERAL | {"embed": 2, "blocks.1.proj": 4, "head": 2}),
        ({"rules": [("*", FOUR)]}, dict.fromkeys(ALL, 4)),
        (
            {"rules": [(nn.LSTM, None), (nn.MultiheadAttention, None), ("*", FOUR)]},
            dict.fromkeys(ALL.keys() - SEVERAL.keys(), 4),
        ),
        (
            {"rules": [("lstm", FOUR)], "skip": "attention"},
            {**{k: v for k, v in ALL.items() if k not in PROJECTIONS}, **dict.fromkeys(RECURRENT, 4)},
        ),
        ({"rules": [(nn.LSTM, FOUR), ("attention*", FOUR)]}, ALL | dict.fromkeys(SEVERAL, 4)),
        ({"rules": [("lstm.weight_hh_l0", FOUR)]}, ALL | {"lstm.weight_hh_l0": 4}),
        ({"rules": [("*.out_proj.weight", FOUR)]}, ALL | {"attention.out_proj.weight": 4}),
        (
            {"skip": ["*.weight_hh_*", "head.weight"]},
            {k: v for k, v in ALL.items() if k not in ("lstm.weight_hh_l0", "head")},
        ),
        ({"rules": [("blocks.*.proj.weight", FOUR)]}, ALL | {"blocks.0.proj": 4, "blocks.1.proj": 4}),
        ({"rules": [("blocks.1.table", FOUR)]}, ALL | {"blocks.1.table": 4}),
        ({"rules": [("*.table", FOUR)]}, ALL | {"blocks.0.table": 4, "blocks.1.table": 4}),
        ({"rules": [(lambda name, m: getattr(m, "out_features", 0) == 8, FOUR)]}, ALL | {"head": 4}),
        ({"quantizer": None, "rules": [("head", FOUR)]}, {"head": 4}),
    ],
)
def test_the_first_rule_that_matches_decides(options, expected):
    """A name or type matches what lies in it too; a name may be a weight's; a function sees each module."""
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
        ("lstm.weight_ih_l0", "LSTM", "(16, 4)", 2.0, 16, ""),
        ("lstm.weight_hh_l0", "LSTM", "(16, 4)", 2.0, 16, ""),
        ("attention.in_proj_weight", "MultiheadAttention", "(12, 4)", 2.0, 12, ""),
        ("attention.out_proj.weight", "MultiheadAttention", "(4, 4)", 2.0, 4, ""),
        ("head", "Linear", "(8, 4)", 2.0, 8, ""),
    ]
    assert [r.quantizer for r in report.quantized] == [FOUR] * 2 + [QUANTIZER] * 5
    left = {r.name: (r.kind, r.numel, r.bits, r.reason) for r in report.left}
    assert left == {
        "embed": ("Embedding", 32, 32.0, "skip[0], 'embed'"),
        "blocks.0.table": ("Block", 12, 32.0, "Block is unknown: a rule can name it"),
        "blocks.1.table": ("Block", 12, 32.0, "Block is unknown: a rule can name it"),
    }
    low = 2 * 64 + 48 + 16 + 32  # of the LSTM, the attention and the head
    assert report.total == total
    assert report.quantized_numel == 16 + low
    assert report.share == (16 + low) / total
    assert report.vector_numel == total - 16 - low - sum(numel for _, numel, _, _ in left.values())
    # codes, scales, the rest in float32
    scales = 1 + 2 * 16 + 12 + 4 + 8
    assert report.size == (16 * 4 + low * 2) / 8 + 4 * scales + 4 * (total - 16 - low)
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
    assert lines["attention.in_proj_weight"].endswith("MultiheadAttention (12, 4) 2 12 A")
    assert lines["attention.out_proj.weight"].endswith("MultiheadAttention (4, 4) 2 4 A")
    assert lines["lstm.weight_ih_l0"].endswith("LSTM (16, 4) rules[1], 'lstm'")
    assert lines["lstm.weight_hh_l0"].endswith("LSTM (16, 4) rules[1], 'lstm'")
    assert lines["blocks.{0..1}.table (2)"].endswith("Block (3, 4) is unknown: a rule can name it")
    assert text.splitlines()[-2].startswith(f"{report.total} parameters: {report.quantized_numel} (")
    assert max(map(len, text.splitlines())) < 110


def test_a_report_prints_a_line_for_each_weight_of_a_module_that_is_left_alone():
    """A module whose weight is made of others is left alone with all of these."""
    model = nn.ModuleDict({"normed": parametrized(), "linear": nn.Linear(4, 4)})
    report = fk.quantize_model(model, QUANTIZER)
    *_, first, second = [" ".join(line.split()) for line in str(report).splitlines()[:-3]]
    assert first == (
        "normed ParametrizedLinear parametrizations.weight.original0 (4, 1)"
        " its weight is parametrized: made anew in each forward"
    )
    assert second == "parametrizations.weight.original1 (4, 4)"


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
        ("blocks.0.proj", 2.0), ("blocks.1.proj", 2.0), *SEVERAL.items(), ("head", 4.0)
    ]  # fmt: skip
    assert kinds(model) == SEVERAL | {"blocks.0.proj": 2, "blocks.1.proj": 2, "head": 4}
    ids = [m.tensor_id for m in model.modules() if hasattr(m, "effective_weight")]
    assert sorted(ids) == list(range(7))
    assert model.head.tensor_id == 6


# ---- what is left alone: weights made anew in each forward, and modules that nothing is known of


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


class Unknown(nn.Module):
    """It may multiply with its weight, or add it: nobody knows."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))


@pytest.mark.parametrize(
    ("make", "reasons"),
    [
        (parametrized, "its weight is parametrized: made anew in each forward"),
        (spectral, "its weight is made anew in each forward, by SpectralNorm"),
        (normed, "its weight is made anew in each forward, by WeightNorm"),
        (pruned, "its weight is made anew in each forward, by L1Unstructured"),
        (of_subclass, "its weight is a Subclass"),
        (
            lambda: qat.Linear(4, 4, qconfig=get_default_qat_qconfig()),
            {"odd.weight": "Linear is unknown: a rule can name it"},
        ),
        (Unknown, {"odd.weight": "Unknown is unknown: a rule can name it"}),
    ],
)
def test_what_cannot_be_quantized_is_left_alone_with_the_reason(make, reasons):
    """And is an error where a rule asks for it: by name, by pattern, by type."""
    model = nn.ModuleDict({"odd": make(), "linear": nn.Linear(4, 4)})
    reasons = {"odd": reasons} if isinstance(reasons, str) else reasons
    before = snapshot(model["odd"])
    for which in ("odd", "*", nn.Module):
        for name, reason in reasons.items():
            with pytest.raises(ValueError, match=re.escape(f"{name}: {reason}")):
                fk.quantize_model(model, None, rules=[(which, QUANTIZER)])
    report = fk.quantize_model(model, QUANTIZER)
    assert [(r.name, r.reason) for r in report.left] == [*reasons.items()]
    assert snapshot(model["odd"]) == before
    assert type(model["linear"]) is fk.QuantLinear


# ---- layers of every kind


class Mine(nn.Linear):
    pass


@pytest.mark.parametrize(
    ("make", "weights"),
    [
        (lambda: Mine(4, 4), {"odd": "(4, 4)"}),
        (lambda: nn.ConvTranspose1d(4, 6, 3), {"odd": "(4, 6, 3)"}),
        (lambda: nn.ConvTranspose2d(4, 6, 3), {"odd": "(4, 6, 3, 3)"}),
        (lambda: nn.ConvTranspose3d(4, 6, 3), {"odd": "(4, 6, 3, 3, 3)"}),
        (lambda: nn.EmbeddingBag(9, 4), {"odd": "(9, 4)"}),
        (lambda: nn.Bilinear(4, 5, 6), {"odd": "(6, 4, 5)"}),
        (
            lambda: nn.GRU(4, 5, bidirectional=True),
            {
                "odd.weight_ih_l0": "(15, 4)", "odd.weight_hh_l0": "(15, 5)",
                "odd.weight_ih_l0_reverse": "(15, 4)", "odd.weight_hh_l0_reverse": "(15, 5)",
            },
        ),
        (
            lambda: nn.LSTM(4, 5, proj_size=3),
            {"odd.weight_ih_l0": "(20, 4)", "odd.weight_hh_l0": "(20, 3)", "odd.weight_hr_l0": "(3, 5)"},
        ),
        (lambda: nn.RNN(4, 5), {"odd.weight_ih_l0": "(5, 4)", "odd.weight_hh_l0": "(5, 5)"}),
        (lambda: nn.LSTMCell(4, 5), {"odd.weight_ih": "(20, 4)", "odd.weight_hh": "(20, 5)"}),
        (
            lambda: nn.MultiheadAttention(4, 2),
            {"odd.in_proj_weight": "(12, 4)", "odd.out_proj.weight": "(4, 4)"},
        ),
        (
            lambda: nn.MultiheadAttention(4, 2, kdim=3, vdim=5),
            {
                "odd.q_proj_weight": "(4, 4)", "odd.k_proj_weight": "(4, 3)", "odd.v_proj_weight": "(4, 5)",
                "odd.out_proj.weight": "(4, 4)",
            },
        ),
    ],
)  # fmt: skip
def test_a_rule_quantizes_all_weights_of_a_layer_by_name_pattern_or_type(make, weights):
    for which in ("odd", "o*", type(make()), "odd.*weight*"):
        model = nn.ModuleDict({"odd": make(), "linear": nn.Linear(4, 4)})
        report = fk.quantize_model(model, None, rules=[("linear", None), (which, FOUR)])
        assert {r.name: r.shape for r in report.quantized} == weights
        assert {r.kind for r in report.quantized} == {type(make()).__name__}
        assert kinds(model) == dict.fromkeys(weights, 4)
        assert [r.name for r in report.left] == ["linear"]


def test_a_rule_that_names_a_parameter_of_an_unknown_module_quantizes_it():
    """A rule that names the module does not: of its parameters some may be added, not multiplied."""
    for which in ("odd.weight", "*.weight", "*d.weight"):
        model = nn.ModuleDict({"odd": Unknown(), "linear": nn.Linear(4, 4)})
        report = fk.quantize_model(model, None, rules=[("linear", None), (which, FOUR)])
        assert [(r.name, r.kind, r.shape, r.bits) for r in report.quantized] == [
            ("odd.weight", "Unknown", "(4, 4)", 4)
        ]
        assert kinds(model) == {"odd.weight": 4}


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
         "model must have modules that are not quantized yet, got 8 that are and no other to quantize"),
        (quantized, {"rules": [("head", FOUR)]}, ValueError,
         "got 'head', which matches head: it is quantized already"),
        (float64, {}, TypeError, "weight must be float32 or bfloat16 or float16, got float64"),
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(4)), {}, ValueError,
         "LazyLinear.weight must be initialized: run the model once before"),
        (probed, {}, ValueError, "b must not have an attribute 'probe' of its own"),
        (Model, {"rules": [("heads", FOUR)]}, ValueError,
         "rules[0] must match a module of model that holds weights, or such a weight, got 'heads'"),
        (Model, {"rules": [("lstm.weight_ih_l1", FOUR)]}, ValueError,
         "rules[0] must match a module of model that holds weights, or such a weight, got 'lstm.weight_ih_l1'"),
        (Model, {"rules": [("lstm.bias_ih_l0", FOUR)]}, ValueError,
         "rules[0] must match a module of model that holds weights, or such a weight, got 'lstm.bias_ih_l0'"),
        (Model, {"rules": [(nn.Conv2d, None)]}, ValueError,
         "rules[0] must match a module of model that holds weights, or such a weight, got Conv2d"),
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
