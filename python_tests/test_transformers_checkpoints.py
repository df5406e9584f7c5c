"""save_pretrained and from_pretrained of transformers keep quantizers to the bit, or say that they do not."""

import copy
import importlib
import json
import re

import pytest
import torch
from support.processes import run_code
from support.savable import assert_equal, row_mean
from torch import nn

import fogzo_kernels as fk
from fogzo_kernels.nn.module import QuantizedModule

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
hub = importlib.import_module("fogzo_kernels.integrations.transformers")

IDENTITY = fk.StraightThrough("identity")
FILE = "model.safetensors"


def groups_of_8(w):
    return w.abs().unflatten(1, (-1, 8)).mean(2)


ROWS = fk.Quantizer(fk.Grid.uniform(2), fk.Scale.fixed(row_mean), IDENTITY)
GROUPS = fk.Quantizer(fk.Grid.half_offset(3), fk.Scale.fixed(groups_of_8), IDENTITY)
FIXED = fk.Quantizer(fk.Grid.ternary(), fk.Scale.fixed(0.02), fk.StraightThrough("identity", clip=False))


def llama_config(tied):
    return transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=64,
        tie_word_embeddings=tied,
    )


def gpt2_config():
    return transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=16, bos_token_id=1, eos_token_id=2
    )


def vit_config():
    return transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        image_size=16,
        patch_size=8,
        num_labels=3,
    )


def resnet_config():
    return transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3
    )


CAUSAL = transformers.AutoModelForCausalLM
VISION = transformers.AutoModelForImageClassification
MODELS = {
    "llama tied": (CAUSAL, lambda: llama_config(True), [("*mlp*", GROUPS)]),
    "llama": (CAUSAL, lambda: llama_config(False), [("*mlp*", GROUPS), ("lm_head", FIXED)]),
    "gpt2": (CAUSAL, gpt2_config, [("*c_fc", FIXED), ("*.wpe", GROUPS)]),
    "vit": (VISION, vit_config, [("classifier", FIXED)]),
    "resnet": (VISION, resnet_config, [("classifier", None)]),
}


def plain(name, dtype=torch.float32):
    torch.manual_seed(0)
    auto, config, _ = MODELS[name]
    return auto.from_config(config(), dtype=dtype).eval()  # .to(dtype) would cast buffers that must stay


def quantized(name, dtype=torch.float32):
    model = plain(name, dtype)
    fk.quantize_model(model, ROWS, rules=MODELS[name][2])
    return model


def batch(model):
    generator = torch.Generator().manual_seed(1)
    if hasattr(model.config, "vocab_size"):
        ids = torch.randint(64, (2, 8), generator=generator)
        return {"input_ids": ids, "labels": ids}
    pixels = torch.randn(4, 3, 16, 16, generator=generator).to(model.dtype)
    return {"pixel_values": pixels, "labels": torch.randint(3, (4,), generator=generator)}


@torch.no_grad()
def logits(model):
    """Of a copy, whose weights are aligned: a file's lie anywhere in it, and the bits of a product may tell."""
    return copy.deepcopy(model.eval())(**batch(model)).logits


def parts(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, QuantizedModule)}


def described(model):
    """Of each quantized module, all that its alphas and codes do not show."""
    return {n: (type(m), m.quantizer.to_dict(), m.tensor_id, m.backend) for n, m in parts(model).items()}


def step(model):
    """The losses of a step of FOGZO, and its gradients."""
    torch.manual_seed(2)
    fogzo = fk.Fogzo(model.train(), total_steps=10, one_minus_beta=0.01, seed=3, directions=1)
    model.zero_grad()
    loss = fogzo.backward(lambda: model(**batch(model)).loss)
    return {"loss": loss, **{name: p.grad for name, p in model.named_parameters()}}


def edited(folder, edit):
    """The checkpoint with other tensors."""
    tensors = safetensors.load_file(folder / FILE)
    edit(tensors)
    safetensors.save_file(tensors, folder / FILE, metadata={"format": "pt"})


def configured(folder, edit):
    """The checkpoint with another quantization_config."""
    config = json.loads((folder / "config.json").read_text())
    edit(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))


# ---- round trips


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_a_saved_model_loads_with_the_same_bits_and_step(name, dtype, tmp_path):
    model = quantized(name, dtype)
    model.save_pretrained(tmp_path / "1")
    loaded = type(model).from_pretrained(tmp_path / "1")
    assert loaded.dtype == dtype
    assert described(loaded) == described(model)
    assert {m.alpha.dtype for m in parts(loaded).values()} == {torch.float32}
    assert all(m.in_rows(m.weight) for m in parts(loaded).values())
    assert_equal(loaded.state_dict(), model.state_dict())
    loaded.save_pretrained(tmp_path / "2")
    for file in ("config.json", FILE):
        assert (tmp_path / "2" / file).read_bytes() == (tmp_path / "1" / file).read_bytes()
    assert torch.equal(logits(loaded), logits(model))
    loaded = copy.deepcopy(loaded)  # of aligned weights
    assert_equal(step(loaded), step(model))
    assert_equal(loaded.state_dict(), model.state_dict())  # buffers that the step changed


def test_tied_weights_stay_tied(tmp_path):
    model = quantized("llama tied")
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    embedding, head = loaded.get_input_embeddings(), loaded.get_output_embeddings()
    assert head.weight is embedding.weight
    assert head.alpha is not embedding.alpha
    assert head.tensor_id == embedding.tensor_id
    assert head.quantizer == embedding.quantizer
    fk.calibrate_(loaded, fk.Scale.fixed(row_mean))
    state = {k: 2 * v for k, v in plain("llama tied").state_dict().items() if k != "lm_head.weight"}
    loaded.load_state_dict(state, strict=False)
    assert torch.equal(head.alpha, row_mean(head.weight))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_alphas_are_not_cast(dtype, tmp_path):
    model = quantized("llama")
    model.save_pretrained(tmp_path)
    alphas = {name: m.alpha for name, m in parts(model).items()}
    loaded = type(model).from_pretrained(tmp_path, dtype=dtype)
    assert loaded.lm_head.weight.dtype == dtype
    assert_equal({name: m.alpha for name, m in parts(loaded).items()}, alphas)
    for cast in (lambda m: m.to(dtype), lambda m: m.half(), lambda m: m.float()):
        loaded = cast(type(model).from_pretrained(tmp_path))
        assert_equal({name: m.alpha for name, m in parts(loaded).items()}, alphas)
    assert torch.equal(logits(loaded), logits(model))


def test_shards_binaries_and_states_load_with_the_same_bits(tmp_path):
    model = quantized("gpt2")
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    model.config.save_pretrained(tmp_path / "bin")
    torch.save(model.state_dict(), tmp_path / "bin" / "pytorch_model.bin")
    for folder in ("shards", "bin"):
        loaded = type(model).from_pretrained(tmp_path / folder)
        assert_equal(loaded.state_dict(), model.state_dict())
        assert described(loaded) == described(model)
    given = type(model).from_pretrained(None, config=model.config, state_dict=model.state_dict())
    assert_equal(given.state_dict(), model.state_dict())
    assert described(copy.deepcopy(given)) == described(model)


def test_a_new_scale_and_the_backend_are_saved(tmp_path):
    model = plain("llama")
    fk.quantize_model(model, ROWS, backend="reference")
    fk.calibrate_(model, fk.Scale.fixed(0.03))
    assert model.lm_head.alpha.shape == ()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert_equal(loaded.state_dict(), model.state_dict())
    assert loaded.lm_head.quantizer == model.lm_head.quantizer
    assert loaded.lm_head.backend == "reference"


@pytest.mark.parametrize("dequantize", [fk.dequantize_model, lambda model: model.dequantize()])
def test_a_dequantized_model_is_saved_as_a_plain_one(dequantize, tmp_path):
    model = quantized("gpt2")
    expected = logits(model)
    model.save_pretrained(tmp_path / "1")
    loaded = type(model).from_pretrained(tmp_path / "1")
    assert dequantize(loaded) is loaded
    loaded.save_pretrained(tmp_path / "2")
    assert "quantization_config" not in json.loads((tmp_path / "2" / "config.json").read_text())
    again, info = type(model).from_pretrained(tmp_path / "2", output_loading_info=True)
    assert not any(info.values())
    assert not parts(again)
    assert torch.equal(logits(again), expected)
    assert not hasattr(again.config, "quantization_config")


def test_the_fast_path_of_encoder_layers_is_closed(tmp_path):
    class Encoder(transformers.PreTrainedModel):
        config_class = transformers.LlamaConfig

        def __init__(self, config):
            super().__init__(config)
            self.layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True)
            self.post_init()

        def forward(self, x):
            return self.layer(x)

    model = Encoder(llama_config(False)).eval()
    fk.quantize_model(model, ROWS)
    model.save_pretrained(tmp_path)
    loaded, x = Encoder.from_pretrained(tmp_path), torch.randn(2, 3, 16)
    assert loaded.layer.activation_relu_or_gelu == 0
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))


# ---- a base model and a model with a head


def test_a_base_model_loads_into_one_with_a_head(tmp_path):
    base = quantized("llama").model
    del base.config.quantization_config
    fk.dequantize_model(base, latents=True)
    fk.quantize_model(base, GROUPS)
    base.save_pretrained(tmp_path)
    whole = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    assert set(parts(whole)) == {f"model.{name}" for name in parts(base)}
    assert set(whole.config.quantization_config["modules"]) == set(parts(whole))
    assert_equal(whole.model.state_dict(), base.state_dict())
    whole.save_pretrained(tmp_path)
    assert set(parts(type(whole).from_pretrained(tmp_path))) == set(parts(whole))


def test_a_model_with_a_head_loads_into_its_base_or_another_head(tmp_path):
    model = quantized("llama")
    model.save_pretrained(tmp_path)
    with pytest.warns(
        UserWarning, match=r"LlamaModel has no lm_head, which \['LlamaForCausalLM'\] had: left out"
    ):
        base = transformers.LlamaModel.from_pretrained(tmp_path)
    assert_equal(base.state_dict(), model.model.state_dict())
    assert described(base) == described(model.model)
    with pytest.warns(
        UserWarning, match="LlamaForSequenceClassification has no lm_head, which .* had: left out"
    ):
        other = transformers.LlamaForSequenceClassification.from_pretrained(tmp_path)
    assert_equal(other.model.state_dict(), model.model.state_dict())
    assert type(other.score) is nn.Linear


def test_a_tied_head_must_be_quantized_with_its_embedding(tmp_path):
    base = transformers.LlamaModel(llama_config(True))
    fk.quantize_model(base, GROUPS)
    base.save_pretrained(tmp_path)
    message = "model.embed_tokens.weight and lm_head.weight are one parameter, and only model.embed_tokens"
    with pytest.raises(ValueError, match=message):
        transformers.LlamaForCausalLM.from_pretrained(tmp_path)


# ---- what is refused, or said


def test_without_the_import_transformers_says_so(tmp_path):
    """In its default verbosity; and quantize_model says it of such a model."""
    quantized("llama").save_pretrained(tmp_path)
    code = f"""
import warnings, transformers, fogzo_kernels as fk
model = transformers.LlamaForCausalLM.from_pretrained({str(tmp_path)!r})
assert type(model.lm_head).__name__ == "Linear"
quantizer = fk.Quantizer(fk.Grid.sign(), fk.Scale.fixed(0.1), fk.StraightThrough("tanh"))
fk.quantize_model(model, quantizer)
fk.dequantize_model(model, latents=True)
warnings.simplefilter("error")
fk.quantize_model(model, quantizer)
"""
    status, output = run_code(code, tmp_path)
    assert status == 0, output
    assert "Unknown quantization type, got fogzo" in output
    assert re.search(r"lm_head\.alpha +\| UNEXPECTED", output)
    assert "model's config says that it was saved quantized, but it was loaded without its" in output


def test_a_latent_checkpoint_saved_again_does_not_pass_for_a_quantized_one(tmp_path, monkeypatch):
    quantized("llama").save_pretrained(tmp_path)
    with monkeypatch.context() as without:
        without.delitem(transformers.quantizers.auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "fogzo")
        latents = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    assert not parts(latents)
    latents.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"the checkpoint must hold .*embed_tokens\.alpha, .* got none"):
        transformers.LlamaForCausalLM.from_pretrained(tmp_path)


def pop(key):
    return lambda tensors: tensors.pop(key)


def put(key, value):
    return lambda tensors: tensors.update({key: value(tensors[key])})


def other_grid(state):
    return torch.frombuffer(
        bytearray(bytes(state.tolist()).replace(b'"qmax": 1', b'"qmax": 2')), dtype=torch.uint8
    )


QUERY = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (pop(f"{QUERY}.alpha"), f"the checkpoint must hold {QUERY}.alpha of the modules that its config calls"),
        (pop(f"{QUERY}._extra_state"), f"the checkpoint must hold {QUERY}._extra_state of the modules"),
        (put(f"{QUERY}.alpha", lambda a: a.bfloat16()), f"{QUERY}.alpha must be float32, got BF16: was the"),
        (put(f"{QUERY}.alpha", lambda a: a[:1]), f"the checkpoint must hold {QUERY}.alpha"),
        (put(f"{QUERY}._extra_state", other_grid), "the quantizer must have Grid("),
        (put(f"{QUERY}._extra_state", lambda s: s[:9]), "the quantizer's state must be JSON, got"),
    ],
)
def test_damaged_tensors_are_named(edit, message, tmp_path):
    quantized("llama").save_pretrained(tmp_path)
    edited(tmp_path, edit)
    with pytest.raises(ValueError, match=re.escape(message)):
        transformers.LlamaForCausalLM.from_pretrained(tmp_path, ignore_mismatched_sizes=True)


def test_an_alpha_of_another_shape_is_refused(tmp_path):
    quantized("llama").save_pretrained(tmp_path)
    edited(tmp_path, put(f"{QUERY}.alpha", lambda a: a[:1]))
    with pytest.raises(RuntimeError, match="mismatch"):
        transformers.LlamaForCausalLM.from_pretrained(tmp_path)


def module(name, row):
    return lambda config: config["modules"].update({name: row})


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (module("model.layers.7.mlp.up_proj", [0, [1], 0, None, None]),
         "LlamaForCausalLM must have the quantized module model.layers.7.mlp.up_proj, got none"),
        (module("model.norm", [0, [1], 0, None, None]),
         "model.norm must be a module that can be quantized, got one that cannot: LlamaRMSNorm has no"),
        (module("lm_head", [0, [3], 0, None, None]), "alpha must have one element, one per row, shape (64, 1)"),
        (module("lm_head", [7, [1], 0, None, None]), "quantization_config must be as quantize_model writes it"),
        (module("lm_head", [0, [1]]), "quantization_config must be as quantize_model writes it"),
        (module("lm_head", [0, [1], 0, "abacus", None]), "'abacus'"),
        (lambda config: config.pop("modules"), "quantization_config must be as quantize_model writes it"),
        (lambda config: config["quantizers"][0].update(version=2), "the quantizer must be of version 1, got 2"),
    ],
)  # fmt: skip
def test_a_damaged_config_is_named(edit, message, tmp_path):
    quantized("llama").save_pretrained(tmp_path)
    configured(tmp_path, edit)
    with pytest.raises(ValueError, match=re.escape(message)):
        transformers.LlamaForCausalLM.from_pretrained(tmp_path)


def test_a_checkpoint_without_modules_of_the_model_is_refused(tmp_path):
    model = transformers.LlamaForCausalLM(llama_config(False))
    fk.quantize_model(model, None, rules=[("lm_head", GROUPS)])
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="LlamaModel must have one of the quantized modules lm_head, got none"):
        transformers.LlamaModel.from_pretrained(tmp_path)


def test_a_part_that_the_config_does_not_name_is_refused(tmp_path):
    model = plain("llama")
    fk.quantize_model(model.model, ROWS)
    model.save_pretrained(tmp_path / "1")
    assert set(parts(type(model).from_pretrained(tmp_path / "1"))) == set(parts(model))
    fk.quantize_model(model.lm_head, ROWS)  # which knows of no config
    model.save_pretrained(tmp_path / "2")
    with pytest.raises(ValueError, match="quantization_config must name lm_head, whose quantizer the"):
        type(model).from_pretrained(tmp_path / "2")
    assert set(parts(transformers.LlamaModel.from_pretrained(tmp_path / "2"))) == set(parts(model.model))


def test_quantizing_while_loading_is_refused(tmp_path):
    model = quantized("llama")
    config = model.config.quantization_config
    model.save_pretrained(tmp_path / "quantized")
    fk.dequantize_model(model).save_pretrained(tmp_path / "plain")
    for given in (config, hub.FogzoConfig.from_dict(config)):
        with pytest.raises(
            ValueError, match="quantization_config must not be given for a checkpoint that is not"
        ):
            type(model).from_pretrained(tmp_path / "plain", quantization_config=given)
    with pytest.warns(UserWarning, match="The `quantization_config` from the model will be used"):
        loaded = type(model).from_pretrained(
            tmp_path / "quantized", quantization_config=hub.FogzoConfig.from_dict(config)
        )
    assert set(parts(loaded)) == set(config["modules"])


def test_a_model_that_another_library_quantizes_is_refused():
    model = plain("llama")
    for found in ({"quant_method": "awq"}, transformers.BitsAndBytesConfig(load_in_8bit=True)):
        model.config.quantization_config = found
        with pytest.raises(
            ValueError, match="model must not be quantized by another library, got quant_method"
        ):
            fk.quantize_model(model, ROWS)
    assert not parts(model)
