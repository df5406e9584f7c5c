"""Models of ``transformers``: quantized by one call, a FOGZO step is the contract's, and training works."""

import copy
import itertools
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import fogzo_kernels as fk

pytest.importorskip("transformers", reason="transformers is not installed")

from support.models import (
    CASES,
    GRADIENT_TOLERANCE,
    Reference,
    check_losses_and_guides,
    eight,
    low,
    observe,
    quantized_modules,
)
from transformers.pytorch_utils import Conv1D

TRAINED = {"total_steps": 100, "schedule": "constant"}


def quantized(name, *, train=True, prepare=None, **options):
    """A plain model, and the same one quantized, with the report."""
    plain = CASES[name].plain(**options).train(train)
    model = copy.deepcopy(plain)
    if prepare is not None:
        prepare(model)
    return plain, model, CASES[name].quantize(model)


def observed(model, name, *, directions=1, one_minus_beta=1e-2, seed=11, step=5):
    """A step in the middle of training, and which noise it was."""
    which = {"one_minus_beta": one_minus_beta, "directions": directions, "seed": seed}
    fogzo = fk.Fogzo(model, **TRAINED, **which)
    fogzo.load_state_dict({**fogzo.state_dict(), "steps": step})
    return observe(model, fogzo, CASES[name].batch()), {**which, "step": step}


# ---- the report


def blocks(layers, *names):
    return [name.replace("#", str(i)) for i in range(layers) for name in names]


def attention(path, *last):
    return blocks(2, *(f"{path}.#.{name}" for name in last))


LLAMA = attention(
    "model.layers",
    *(f"self_attn.{x}_proj" for x in "qkvo"),
    *(f"mlp.{x}_proj" for x in ("gate", "up", "down")),
)
VIT = [*(f"attention.{x}_proj" for x in "qkvo"), "mlp.fc1", "mlp.fc2"]
TABLES, UNKNOWN = ["cls_token", "position_embeddings", "distillation_token"], "is unknown: a rule can name it"
CONVOLUTIONS = [
    *(
        f"resnet.encoder.stages.{s}.layers.{a}.layer.{b}.convolution"
        for s, a, b in itertools.product(range(4), range(2), range(2))
    ),
    *(f"resnet.encoder.stages.{s}.layers.0.shortcut.convolution" for s in range(1, 4)),
]
#: Names with 3 bits; with 8 bits; tied to others; left alone with the reason.
EXPECTED = {
    "llama": (
        LLAMA, [], {},
        {"model.embed_tokens": "skip[0], 'model.embed_tokens'", "lm_head": "skip[1], 'lm_head'"},
    ),
    "tied_llama": (LLAMA, ["model.embed_tokens", "lm_head"], {"lm_head": "model.embed_tokens"}, {}),
    "gpt2": (
        attention("transformer.h", "attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
        ["transformer.wte", "transformer.wpe", "lm_head"], {"lm_head": "transformer.wte"}, {},
    ),
    "vit": (
        attention("vit.layers", *VIT), ["vit.embeddings.patch_embeddings.projection", "classifier"], {},
        {f"vit.embeddings.{x}": f"ViTEmbeddings {UNKNOWN}" for x in TABLES[:2]},
    ),
    "deit": (
        [*attention("deit.layers", *VIT), "deit.embeddings.patch_embeddings.projection", "classifier"], [], {},
        {f"deit.embeddings.{x}": f"DeiTEmbeddings {UNKNOWN}" for x in TABLES},
    ),
    "resnet": (CONVOLUTIONS, ["resnet.embedder.embedder.convolution", "classifier.1"], {}, {}),
}  # fmt: skip


def llama_counts(c):
    h, heads, kv = c.hidden_size, c.num_attention_heads, c.num_key_value_heads
    layer = 2 * h * h + 2 * h * h * kv // heads + 3 * h * c.intermediate_size
    table, norms = c.vocab_size * h, (2 * c.num_hidden_layers + 1) * h
    if c.tie_word_embeddings:
        return c.num_hidden_layers * layer + table, 0, norms
    return c.num_hidden_layers * layer, 2 * table, norms


def gpt2_counts(c):
    h, n = c.n_embd, c.n_layer
    return n * 12 * h * h + (c.vocab_size + c.n_positions) * h, 0, n * (9 + 4) * h + 2 * h


def patch_counts(c, tokens):
    h, wide, n, classes = c.hidden_size, c.intermediate_size, c.num_hidden_layers, c.num_labels
    patch, patches = c.num_channels * c.patch_size**2, (c.image_size // c.patch_size) ** 2
    matrices = n * (4 * h * h + 2 * h * wide) + h * patch + h * classes
    return matrices, (tokens + tokens + patches) * h, n * (4 * h + wide + h + 4 * h) + h + 2 * h + classes


def resnet_counts(c):
    before, matrices, norms = c.embedding_size, c.num_channels * c.embedding_size * 49, c.embedding_size
    for width in c.hidden_sizes:
        matrices += 9 * before * width + 3 * 9 * width * width
        norms += 4 * width
        if before != width:
            matrices, norms = matrices + before * width, norms + width
        before = width
    return matrices + before * c.num_labels, 0, 2 * norms + c.num_labels


#: Of quantized weights, weights left alone, biases and norms: from the configuration. And the least share.
COUNTS = {
    "llama": (llama_counts, 0.8),
    "tied_llama": (llama_counts, 0.99),
    "gpt2": (gpt2_counts, 0.96),
    "vit": (lambda c: patch_counts(c, 1), 0.92),
    "deit": (lambda c: patch_counts(c, 2), 0.92),
    "resnet": (resnet_counts, 0.95),
}


@pytest.mark.parametrize("name", CASES)
def test_report_says_what_was_done(name):
    plain, model, report = quantized(name)
    three, bits8, tied, left = EXPECTED[name]
    rows = {row.name: row for row in report.quantized}
    assert set(rows) == {*three, *bits8}
    assert len(rows) == len(report.quantized)
    for path, row in rows.items():
        module, new = plain.get_submodule(path), model.get_submodule(path)
        q = eight if path in bits8 else low
        assert row.kind == type(module).__name__
        assert row.shape == str(tuple(module.weight.shape))
        assert row.quantizer == new.quantizer == q
        outputs = module.weight.shape[1 if isinstance(module, Conv1D) else 0]
        assert row.scales == new.alpha.numel() == outputs
        assert row.tied == tied.get(path, "")
        assert row.numel == (0 if row.tied else module.weight.numel())
        assert row.bits == q.grid.bits
    assert {row.name: row.reason for row in report.left} == left
    for row in report.left:  # a module, or a parameter of an unknown one
        path, _, own = row.name.rpartition(".") if "unknown" in row.reason else (row.name, "", "weight")
        kind, kept = type(plain.get_submodule(path)), plain.get_parameter(f"{path}.{own}")
        assert type(model.get_submodule(path)) is kind
        assert (row.kind, row.numel, row.shape) == (kind.__name__, kept.numel(), str(tuple(kept.shape)))


@pytest.mark.parametrize("name", CASES)
def test_report_counts_what_the_configuration_says(name):
    plain, model, report = quantized(name)
    counts, least = COUNTS[name]
    done, left, vectors = counts(plain.config)
    assert report.quantized_numel == done
    assert sum(row.numel for row in report.left) == left
    assert report.vector_numel == vectors
    assert report.total == done + left + vectors == sum(p.numel() for p in plain.parameters())
    assert report.share == done / report.total >= least
    held = {m.weight: m for m in model.modules() if hasattr(m, "quantizer")}  # tied ones once
    size = sum(p.numel() * m.quantizer.grid.bits / 8 + 4 * m.alpha.numel() for p, m in held.items())
    assert report.size == size + 4 * (left + vectors)
    assert report.bits == 8 * report.size / report.total


def expanded(name):
    """The names that one of the printed table stands for."""
    parts = [
        [str(i) for i in range(int(a), int(b) + 1)] if b else a.split(",")
        for a, b in re.findall(r"\{([\d,]+)(?:\.\.(\d+))?\}", name)
    ]
    template = re.sub(r"\{.*?\}", "{}", name)
    return [template.format(*values) for values in itertools.product(*parts)]


def printed_names(text):
    """Names in a report's tables, by the table."""
    tables = {}
    for part in text.split("\n\n"):
        head, *lines = part.splitlines()
        if head.startswith(("module ", "left alone ")):
            found = tables.setdefault(head.split("  ")[0], [])
            for name, count in re.findall(r"^(\S+)(?: \((\d+)\))? ", "\n".join(lines), re.MULTILINE):
                assert len(expanded(name)) == int(count or 1), name
                found += expanded(name)
    return tables


@pytest.mark.parametrize("name", CASES)
def test_printed_report_names_every_weight(name):
    _, model, report = quantized(name)
    three, bits8, tied, left = EXPECTED[name]
    text = str(report)
    found = printed_names(text)
    assert sorted(found["module"]) == sorted([*three, *bits8])
    assert found.get("left alone", []) == list(left)
    assert all(re.search(rf"^{a} .* tied to {b}$", text, re.MULTILINE) for a, b in tied.items())
    for path, p in model.named_parameters():
        if p.ndim > 1 and {path, path.rpartition(".")[0]} & left.keys():
            assert str(tuple(p.shape)) in text
    assert max(map(len, text.splitlines())) <= 110
    assert f"{report.total:,} parameters" in text
    assert text == str(report) == str(quantized(name)[2])


# ---- one step


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", CASES)
def test_step_is_the_contract_by_hand(name, train):
    plain, model, _ = quantized(name, train=train)
    twin = copy.deepcopy(model)
    seen, which = observed(model, name, directions=2)
    reference = Reference(plain, model, seen, CASES[name].batch(), **which)
    check_losses_and_guides(reference)
    assert len({float(loss) for loss in seen.losses}) == 5
    assert reference.ambiguous <= 8
    assert (
        set(reference.total)
        == set(quantized_modules(model))
        == {f"{x}.weight" for x in {*EXPECTED[name][0], *EXPECTED[name][1]} - set(EXPECTED[name][2])}
    )
    for path in reference.total:
        assert reference.excess(path) <= 1, path
        assert not torch.equal(seen.estimates[path], seen.guides[path])
    twin(**CASES[name].batch()).loss.backward()  # what is not quantized: as without FOGZO, to the bit
    plain_gradients = {n: p.grad for n, p in twin.named_parameters() if n not in reference.total}
    assert plain_gradients.keys() == reference.others.keys()
    largest = max(g.abs().max() for g in reference.others.values())
    for path, grad in plain_gradients.items():
        assert torch.equal(seen.estimates[path], grad), path
        assert (grad - reference.others[path]).abs().max() <= GRADIENT_TOLERANCE * largest, path
    buffers = dict(model.named_buffers())
    for path, buffer in reference.buffers.items():  # BatchNorm's, as after one forward
        torch.testing.assert_close(buffers[path], buffer, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", [n for n in CASES if n != "resnet"])
def test_a_step_is_the_contract_with_every_attention(name, attention):
    plain, model, _ = quantized(name, attn_implementation=attention)
    assert model.config._attn_implementation == attention
    seen, which = observed(model, name)
    reference = Reference(plain, model, seen, CASES[name].batch(), **which)
    check_losses_and_guides(reference)
    assert max(reference.excess(path) for path in reference.total) <= 1


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["llama", "tied_llama", "gpt2", "vit", "deit"])
def test_activation_checkpointing_changes_nothing(name, reentrant):
    """With dropout: a part that is run again must see the masks of its pass. Only sums change their order."""
    options = {"attention_dropout": 0.1} if "llama" in name else {}
    found = []
    for on in (False, True):
        _, model, _ = quantized(name, **options)
        for m in model.modules():
            if isinstance(m, nn.Dropout):
                m.p = 0.1
        if on:
            checkpoint(model, use_reentrant=reentrant)
        runs = []
        first = next(m for n, m in model.named_modules() if n.endswith(("q_proj", "c_attn")))
        first.register_forward_hook(lambda *_, runs=runs: runs.append(1))
        torch.manual_seed(3)
        found.append(observed(model, name)[0])
        assert len(runs) == 3 + on  # the gradient pass, twice where it is checkpointed, and two probes
    off, on = found
    assert all(torch.equal(a, b) for a, b in zip(off.losses, on.losses, strict=True))
    for before, after in ((off.guides, on.guides), (off.estimates, on.estimates)):
        largest = max(g.abs().max() for g in before.values())
        for path, g in before.items():
            allowed = GRADIENT_TOLERANCE * g.abs().max() + 2.0**-22 * largest
            assert (after[path] - g).abs().max() <= allowed, path


def checkpoint(model, **options):
    if hasattr(model, "activation_checkpointing_enable"):  # the newer name
        model.activation_checkpointing_enable(options)
    else:
        model.gradient_checkpointing_enable(options)


def test_a_dequantized_model_has_the_same_hidden_states_and_text():
    _, model, _ = quantized("gpt2", train=False)
    tokens = CASES["gpt2"].batch()["input_ids"]
    hidden = model(tokens, output_hidden_states=True).hidden_states
    made = model.generate(tokens, max_new_tokens=5, do_sample=False)
    fk.dequantize_model(model)
    assert len(hidden) == 3
    for a, b in zip(hidden, model(tokens, output_hidden_states=True).hidden_states, strict=True):
        torch.testing.assert_close(a, b)
    assert torch.equal(made, model.generate(tokens, max_new_tokens=5, do_sample=False))


# ---- embeddings


def test_the_padding_row_and_rows_out_of_the_batch_keep_still():
    """So does a token that only stands last, where it predicts nothing. A fused step moves none of them."""
    model = CASES["llama"].plain(pad_token_id=63)
    fk.quantize_model(model, eight)
    batch = {k: v % 32 for k, v in CASES["llama"].batch().items()}
    fogzo = fk.Fogzo(model, **TRAINED, directions=1, one_minus_beta=1e-2)
    seen = observe(model, fogzo, batch)
    name = "model.embed_tokens.weight"
    read = torch.zeros(64, dtype=torch.bool).index_fill(0, batch["input_ids"][:, :-1].unique(), True)
    assert torch.equal(seen.guides[name].any(1), read)
    assert torch.equal(seen.estimates[name] != 0, read.unsqueeze(1).expand(64, 32))
    model.zero_grad()
    before = model.get_parameter(name).detach().clone()
    fk.SGD(model.parameters(), lr=0.1, fogzo=fogzo).step(lambda: model(**batch).loss)
    assert torch.equal(model.get_parameter(name).ne(before).any(1), read)


@pytest.mark.parametrize("rule", ["model.embed_tokens", "lm_head"])
def test_a_rule_for_one_of_two_tied_weights_is_refused(rule):
    model = CASES["tied_llama"].plain()
    with pytest.raises(ValueError, match="are one parameter: rules must give both one quantizer"):
        fk.quantize_model(model, low, rules=[(rule, eight)])
    with pytest.raises(ValueError, match="are one parameter"):
        fk.quantize_model(model, low, skip=[rule])
    assert not quantized_modules(model)


# ---- training


@pytest.mark.parametrize("fused", [False, True], ids=["torch Adam", "fk.AdamW"])
@pytest.mark.parametrize("name", CASES)
def test_thirty_steps_lower_the_loss(name, fused):
    _, model, _ = quantized(name)
    batch, steps = CASES[name].batch(), 30
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    codes = {n: m.codes() for n, m in quantized_modules(model).items()}
    fogzo = fk.Fogzo(model, total_steps=steps, kappa=1.0, directions=1)
    if fused:
        optimizer = fk.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0, fogzo=fogzo)
    else:
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)

    def loss_of():
        return model(**batch).loss

    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        losses.append(optimizer.step(loss_of) if fused else fogzo.backward(loss_of))
        if not fused:
            optimizer.step()
    assert losses[-1] < 0.75 * losses[0]
    assert fogzo.steps == steps
    assert not any(fogzo.diagnostics().values())
    assert [n for n, p in model.named_parameters() if torch.equal(p, before[n])] == []
    assert [n for n, m in quantized_modules(model).items() if torch.equal(m.codes(), codes[n])] == []


# ---- memory format


def to_channels_last(model):
    model.to(memory_format=torch.channels_last)


@pytest.mark.parametrize("one_minus_beta", [0.0, 1e-2])
def test_channels_last_is_the_same_step(one_minus_beta):
    """The reference is the contiguous model; noise is numbered as the elements lie."""
    plain, model, report = quantized("resnet", prepare=to_channels_last)
    weights = [p for p in model.parameters() if p.ndim == 4]
    assert any(not p.is_contiguous() for p in weights)
    assert str(report) == str(quantized("resnet")[2])
    seen, which = observed(model, "resnet", one_minus_beta=one_minus_beta)
    reference = Reference(plain, model, seen, CASES["resnet"].batch(), **which)
    check_losses_and_guides(reference)
    assert max(reference.excess(path) for path in reference.total) <= 1
    _, other, _ = quantized("resnet", train=False)
    pixels = CASES["resnet"].batch()["pixel_values"]
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(model.eval()(pixels).logits, other(pixels).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["AdamW", "SGD"])
def test_channels_last_fused_step_is_estimate_and_step(kind):
    """Within what the two ways of rounding an update differ by."""
    options = {"lr": 1e-2, "weight_decay": 0.01} | ({"momentum": 0.9} if kind == "SGD" else {"eps": 1e-2})
    found = []
    for fused in (False, True):
        _, model, _ = quantized("resnet", prepare=to_channels_last)
        formats = [p.stride() for p in model.parameters()]
        batch = CASES["resnet"].batch()
        fogzo = fk.Fogzo(model, **TRAINED, directions=1, one_minus_beta=1e-4)
        if fused:
            optimizer = getattr(fk, kind)(model.parameters(), fogzo=fogzo, **options)
            optimizer.step(lambda model=model, batch=batch: model(**batch).loss)
        else:
            fogzo.backward(lambda model=model, batch=batch: model(**batch).loss)
            getattr(torch.optim, kind)(model.parameters(), **options).step()
        assert [p.stride() for p in model.parameters()] == formats
        found.append(dict(model.named_parameters()))
    start = dict(CASES["resnet"].plain().named_parameters())
    for path, p in found[0].items():
        assert not torch.equal(p, start[path]), path
        moved = (p - start[path]).abs().max()
        assert (p - found[1][path]).abs().max() <= 1e-4 * moved + 2.0**-22 * p.abs().max(), path


# ---- docs/models.md

PAGE = Path(__file__).parents[1] / "docs/models.md"


def examples():
    """The program of the page, with the indented text that follows it."""
    text = PAGE.read_text()
    for found in re.finditer(r"^```python\n((?:.*\n)*?)```\n((?:\n|    .*\n)*)", text, re.MULTILINE):
        yield found[1], re.sub(r"^    ", "", found[2], flags=re.MULTILINE).strip("\n")


@pytest.mark.skipif(not PAGE.exists(), reason="the documents are not here")
def test_the_page_shows_what_its_program_prints(capsys):
    shown = []
    for code, expected in examples():
        with torch.random.fork_rng(devices=[]):
            exec(compile(code, str(PAGE), "exec"), {})
        assert capsys.readouterr().out.strip("\n") == expected
        shown.append(expected)
    (text,) = shown
    assert without_names(text) == without_names(str(quantized("llama")[2]))


def without_names(text):
    """Without those of the functions that make alpha."""
    return re.sub(r"Scale\.fixed\(\w+\)", "", text)
