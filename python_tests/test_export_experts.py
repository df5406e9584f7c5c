"""Export of mixtures of experts, in formats that others load; of codes in more bits than they need."""

import copy
import json

import pytest
import torch
from torch import nn

import fogzo_kernels as fk

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")

from safetensors.torch import safe_open, save_file
from support.mixtures import CONFIGS, SKIP, mixture, tokens
from transformers import AutoModelForCausalLM

PER_EXPERT = [name for name in CONFIGS if name != "gpt-oss"]  # whose checkpoints have a tensor for each expert
SCALES = {"tensor": fk.presets.lsq(2), "row": fk.presets.lsq(2, "row"), "group": fk.presets.lsq(3, 8)}


def quantized(name, quantizer=SCALES["row"]):
    model = mixture(name).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4)  # codes of both ends, and different experts
    fk.quantize_model(model, quantizer, skip=SKIP)
    return model


@torch.no_grad()
def logits_of(model):
    return model(tokens(0, 2, 8)).logits


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", PER_EXPERT)
def test_transformers_loads_experts_with_the_same_logits(name, scale, bits, tmp_path):
    model = quantized(name, SCALES[scale])
    if name == "deepseek" and scale == "group":  # some of its matrices have one group in a row
        with pytest.raises(ValueError, match="one kind of bits and scales for all experts"):
            fk.export.compressed_tensors(model, tmp_path / "folder", bits=bits)
        assert not (tmp_path / "folder").exists()
        return
    fk.export.compressed_tensors(model, tmp_path / "folder", bits=bits)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "folder").eval()
    assert torch.equal(logits_of(loaded), logits_of(model))
    schemes = json.loads((tmp_path / "folder" / "config.json").read_text())["quantization_config"]
    needed = SCALES[scale].grid.bits
    for group in schemes["config_groups"].values():
        assert group["weights"]["num_bits"] == (bits or needed)
    with safe_open(tmp_path / "folder" / "model.safetensors", "pt") as file:
        assert json.loads(file.metadata()["code_bits"]) == [needed]
        packed = [key for key in file.keys() if ".experts.3." in key and "packed" in key]  # noqa: SIM118
    assert len(packed) == 3 * 2  # gate, up and down of two layers


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_file_of_a_mixture_gives_the_same_logits(name, scale, tmp_path):
    """It loads into a plain model and into one that is quantized in another way."""
    model = quantized(name, SCALES[scale])
    fk.export.safetensors(model, tmp_path / "file")
    for prepare in (lambda model: None, lambda model: fk.quantize_model(model, fk.presets.bitnet(), skip=SKIP)):
        other = mixture(name).eval()
        prepare(other)
        fk.export.load(tmp_path / "file", other)
        assert torch.equal(logits_of(other), logits_of(model))


@pytest.mark.parametrize("name", ["mixtral", "gpt-oss"])
def test_a_file_keeps_transforms_and_quantized_inputs_of_experts(name, tmp_path):
    rotated = fk.Quantizer(
        fk.Grid.uniform(2), fk.Scale.rms("row"), fk.StraightThrough("identity"), transform=fk.Hadamard(16)
    )
    inputs = fk.Quantizer(
        fk.Grid.uniform(8), fk.Scale.absmax("row", factor=1 / 127, least=1e-5), fk.StraightThrough("identity")
    )
    model = mixture(name).eval()
    fk.quantize_model(model, rotated, activation=inputs, skip=SKIP)
    fk.export.safetensors(model, tmp_path / "file")
    loaded = fk.export.load(tmp_path / "file", mixture(name).eval())
    assert torch.equal(logits_of(loaded), logits_of(model))


def test_a_file_of_attention_gives_the_same_outputs(tmp_path):
    torch.manual_seed(0)
    plain = nn.MultiheadAttention(16, 2, batch_first=True).eval()
    model, x = copy.deepcopy(plain), torch.randn(2, 5, 16)
    fk.quantize_model(model, SCALES["row"])
    fk.export.safetensors(model, tmp_path / "file")
    loaded = fk.export.load(tmp_path / "file", plain)
    with torch.no_grad():
        assert torch.equal(loaded(x, x, x)[0], model(x, x, x)[0])


def test_a_file_of_version_1_loads(tmp_path):
    model = nn.Sequential(nn.Linear(8, 4), nn.ConvTranspose2d(1, 2, 2))
    fk.quantize_model(model, SCALES["row"])
    fk.export.safetensors(model, tmp_path / "new")
    with safe_open(tmp_path / "new", "pt") as file:
        tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
    quantized = json.loads(metadata["quantized"])
    for entry in quantized.values():
        entry["outputs"] = entry.pop("order")[0]
        del entry["dims"]
    save_file(tensors, tmp_path / "old", metadata | {"version": "1", "quantized": json.dumps(quantized)})
    loaded = nn.Sequential(nn.Linear(8, 4), nn.ConvTranspose2d(1, 2, 2))
    fk.export.load(tmp_path / "old", loaded)
    fk.dequantize_model(model)
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value)


@pytest.mark.parametrize("name", ["mixtral", "gpt-oss"])
@pytest.mark.parametrize("form", ["gguf", "torchao", "compressed_tensors"])
def test_what_a_format_cannot_hold_is_refused_with_a_remedy(form, name, tmp_path):
    if (form, name) == ("compressed_tensors", "mixtral"):
        pytest.skip("compressed-tensors holds its experts")
    pytest.importorskip({"gguf": "gguf", "torchao": "torchao"}.get(form, "compressed_tensors"))
    model = quantized(name)
    before = copy.deepcopy(model.state_dict())
    where = [] if form == "torchao" else [tmp_path / "out"]
    with pytest.raises(ValueError, match=r"experts\.\w+_proj\S* must fit .*fk\.dequantize_model\(model\)"):
        getattr(fk.export, form)(model, *where)
    assert not (tmp_path / "out").exists()
    for key, value in model.state_dict().items():
        assert torch.equal(before[key], value)


def test_bits_that_are_too_few_are_refused(tmp_path):
    model = quantized("mixtral", fk.presets.lsq(4))
    for bits, match in ((3, "takes 4 bits, and bits=3"), (9, "bits must be None or an int from 2 to 8, got 9")):
        with pytest.raises(ValueError, match=match):
            fk.export.compressed_tensors(model, tmp_path / "folder", bits=bits)
    assert not (tmp_path / "folder").exists()
