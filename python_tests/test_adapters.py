"""Adapters of peft over quantized layers, and modules of transformers that it replaces or resizes."""

import copy
import io

import peft
import pytest
import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

import fogzo_kernels as fk
import fogzo_kernels.integrations.transformers

PRESETS = {
    "lsq": fk.presets.lsq(2, "row"),
    "bitnet": fk.presets.bitnet(),
    "fixed": fk.presets.fixed(3, 0.1),
    "quest": fk.presets.quest(2, block=16),
}


pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set")

# ---- peft


class Net(nn.Module):
    """A layer of each kind that peft adapts."""

    def __init__(self):
        super().__init__()
        self.embed, self.conv, self.other = nn.Embedding(8, 16), nn.Conv1d(16, 16, 1), Conv1D(16, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, ids):
        return self.head(torch.relu(self.other(self.conv(self.embed(ids).mT).mT.contiguous())))


IDS = torch.arange(8).view(2, 4)


def adapted(q, before=True, targets=("embed", "conv", "other", "head"), dtype=torch.float32, **options):
    """A model with adapters that change it, quantized before or after it got them."""
    torch.manual_seed(0)
    model = Net()
    if before:
        fk.quantize_model(model, q)
    kind = options.pop("kind", peft.LoraConfig)
    options = {"r": 4, **options} if kind is peft.LoraConfig else options
    model = peft.get_peft_model(model, kind(target_modules=list(targets), **options))
    if not before:
        fk.quantize_model(model, q, skip=["*lora_*"])
    for name, p in model.named_parameters():
        if any(x in name for x in ("lora_B", "lora_embedding_A", "ia3")):
            nn.init.normal_(p, mean=1.0 if "ia3" in name else 0.0, std=0.3)
    return model.to(dtype).eval()


WAYS = {
    "merge_and_unload": lambda p: p.merge_and_unload(),
    "safe_merge": lambda p: p.merge_and_unload(safe_merge=True),
    "merge_adapter": lambda p: p.merge_adapter(),
    "the layer's merge": lambda p: p.base_model.model.head.merge(),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("preset", PRESETS)
def test_a_merge_into_quantized_weights_is_an_error_that_names_the_remedy(preset, before, way):
    model = adapted(PRESETS[preset], before)
    expected = model(IDS).detach()
    with pytest.raises(
        RuntimeError,
        match=r"adapter must not be merged into .* Call fogzo_kernels.dequantize_model\(model\) first",
    ):
        WAYS[way](model)
    assert torch.equal(model(IDS), expected)
    fk.dequantize_model(model)
    WAYS[way](model)
    torch.testing.assert_close(model(IDS), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True},
        {"use_rslora": True, "lora_bias": True},
        {"kind": peft.IA3Config, "feedforward_modules": []},
    ],
    ids=str,
)
def test_every_kind_of_adapter_refuses_to_merge_until_dequantized(options):
    model = adapted(PRESETS["lsq"], targets=["head"], **options)
    with pytest.raises(RuntimeError, match="merged into head while that is a QuantLinear"):
        model.merge_and_unload()
    fk.dequantize_model(model)
    expected = model(IDS).detach()
    torch.testing.assert_close(model.merge_and_unload()(IDS), expected, rtol=1e-4, atol=1e-4)


def test_copies_and_files_of_adapted_models_refuse_too():
    model = adapted(PRESETS["bitnet"], dtype=torch.bfloat16)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for one in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        with pytest.raises(RuntimeError, match="dequantize_model"):
            one.merge_and_unload()
        fk.dequantize_model(one)
        one.merge_and_unload()
    with pytest.raises(RuntimeError, match="dequantize_model"):
        model.merge_and_unload()


def test_adapters_that_are_taken_off_leave_the_quantized_model():
    model = adapted(PRESETS["lsq"])
    with model.disable_adapter():
        expected = model(IDS).detach()
    plain = model.unload()
    assert isinstance(plain.head, fk.QuantLinear)
    assert torch.equal(plain(IDS), expected)
    plain.state_dict()


# ---- transformers


def llama(q, tied=False):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = transformers.LlamaForCausalLM(config)
    fk.quantize_model(model, q)
    return model


TOKENS = torch.arange(8)[None]


def step(model):
    fogzo = fk.Fogzo(model, total_steps=3, kappa=1.0, directions=1)
    return fogzo.backward(lambda: model(input_ids=TOKENS, labels=TOKENS).loss)


@pytest.mark.parametrize("leave", [False, True])
@pytest.mark.parametrize("preset", ["lsq", "bitnet", "fixed"])
def test_a_resized_model_is_quantized_again_and_loads(preset, leave, tmp_path):
    model = llama(PRESETS[preset])
    made = fk.Fogzo(model, total_steps=3, kappa=1.0, directions=1)
    model.resize_token_embeddings(70)
    for use in (
        lambda: step(model),
        lambda: made.backward(lambda: model(input_ids=TOKENS, labels=TOKENS).loss),
        lambda: model.save_pretrained(tmp_path),
        model.state_dict,
    ):
        with pytest.raises(
            RuntimeError,
            match=r"lm_head is a plain Linear, and took the place of a quantized .* skip='lm_head'",
        ):
            use()
    if preset == "lsq":
        with pytest.raises(
            RuntimeError, match=r"embed_tokens.weight has 70 rows, and its alpha was made for 64: call calib"
        ):
            model(TOKENS)
        model.model.embed_tokens.calibrate_()
    fk.quantize_model(model, PRESETS[preset], skip="lm_head" if leave else ())
    assert isinstance(model.lm_head, fk.QuantLinear) != leave
    step(model)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(TOKENS).logits, model.eval()(TOKENS).logits, rtol=0, atol=1e-6)
    assert type(loaded.lm_head) is type(model.lm_head)


def test_tied_embeddings_are_resized(tmp_path):
    model = llama(PRESETS["lsq"], tied=True)
    model.resize_token_embeddings(70)
    embedding = model.model.embed_tokens
    for use in (lambda: model(TOKENS), lambda: step(model)):
        with pytest.raises(
            RuntimeError, match=r"embed_tokens.weight has 70 rows, and its alpha was made for 64"
        ):
            use()
    embedding.calibrate_()
    step(model)
    assert model.lm_head.weight is embedding.weight
    assert model.lm_head.alpha is embedding.alpha
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(TOKENS).logits, model.eval()(TOKENS).logits, rtol=0, atol=1e-6)


def test_modules_may_be_deleted_or_wrapped_but_not_replaced_by_plain_ones():
    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)), nn.Linear(4, 4))
    fk.quantize_model(model, PRESETS["lsq"])
    model[2] = nn.Sequential(model[2])  # still there
    model[0] = nn.Identity()  # nothing to quantize
    del model[2]
    fk.dequantize_model(model[1][0])
    model.state_dict()
    fk.Fogzo(model, total_steps=3, kappa=1.0, directions=1)
    model[1] = nn.Sequential(nn.Linear(8, 3))  # a block without a quantized module
    model.append(nn.Linear(3, 3))
    fk.quantize_model(model, PRESETS["lsq"], skip="1")
    model.state_dict()
    model[2] = nn.Linear(3, 2)
    for use in (
        model.state_dict,
        copy.deepcopy(model).state_dict,
        lambda: fk.Fogzo(model, total_steps=3, kappa=1.0, directions=1),
    ):
        with pytest.raises(RuntimeError, match="2 is a plain Linear, and took the place of a quantized module"):
            use()


def test_a_module_without_reset_parameters_has_none():
    layer = Conv1D(4, 6)
    fk.quantize_model(layer, PRESETS["bitnet"])
    assert not hasattr(layer, "reset_parameters")


def test_models_of_one_configuration_have_quantizers_of_their_own(tmp_path, recwarn):
    """The second one gets a copy, and neither warns that it was saved before."""
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2,
    )  # fmt: skip
    first, second = (transformers.AutoModelForCausalLM.from_config(config) for _ in range(2))
    for model, bits in ((first, 2), (second, 4)):
        fk.quantize_model(model, fk.presets.lsq(bits), skip="lm_head")
    assert not [w for w in recwarn if "saved quantized" in str(w.message)]
    assert second.config is second.model.config is not first.config
    for model, bits in ((first, 2), (second, 4)):
        model.save_pretrained(tmp_path / str(bits))
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / str(bits))
        assert loaded.model.layers[0].mlp.up_proj.quantizer.grid == fk.Grid.uniform(bits)
