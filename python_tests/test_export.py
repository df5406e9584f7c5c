"""Exported files: what others load, or decode by a few lines of NumPy, is Q(weight), bit for bit."""

import errno
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.exported import GRIDS, SCALES, llama, logits, mlp, quantizer, spans, values_of
from support.gguf_files import gguf_of
from torch import nn
from transformers import AutoModelForCausalLM

import fogzo_kernels as fk
from fogzo_kernels import export
from fogzo_kernels.distributed import packing
from fogzo_kernels.export import files
from fogzo_kernels.export.__main__ import main

# ---- compressed-tensors, by the loader of transformers


def from_pretrained(folder, dtype):
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", [name for name in GRIDS if name != "half_offset(8)"])
def test_from_pretrained_has_the_same_logits(name, scale, tmp_path):
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    model = llama(quantizer(GRIDS[name], scale))
    if scale in ("tensor", "row"):
        assert spans(model)
    export.compressed_tensors(model, tmp_path / "out")
    assert torch.equal(logits(from_pretrained(tmp_path / "out", torch.float32)), logits(model))


@pytest.mark.parametrize("name", ["uniform(2)", "uniform(8)", "half_offset(2)", "sign"])
def test_in_bfloat16_scales_are_frozen_first(name, tmp_path):
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    model = llama(quantizer(GRIDS[name]), dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"alpha must hold numbers of bfloat16 for this format, got others"):
        export.compressed_tensors(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    export.freeze_scales_(model, torch.bfloat16)
    export.compressed_tensors(model, tmp_path / "out")
    assert torch.equal(logits(from_pretrained(tmp_path / "out", torch.bfloat16)), logits(model))


def test_mixed_bits_and_tied_embeddings_keep_the_logits(tmp_path):
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    rules = [("*.down_proj", quantizer(GRIDS["uniform(4)"], "group")), ("*.q_proj", None)]
    model = llama(quantizer(GRIDS["uniform(2)"]), tie=True, rules=rules)
    for _ in range(2):  # an export of before is replaced
        export.compressed_tensors(model, tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert len(config["config_groups"]) == 2
    assert torch.equal(logits(from_pretrained(tmp_path / "out", torch.float32)), logits(model))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def refused():
    two = quantizer(GRIDS["uniform(2)"])
    return {
        "it holds linear layers only, got QuantEmbedding": llama(two, skip=("lm_head",)),
        "takes 9 bits as odd numbers": llama(quantizer(GRIDS["half_offset(8)"])),
        "it has no transforms, got Hadamard": llama(quantizer(GRIDS["uniform(2)"], transform=fk.Hadamard(32))),
        "does not load a head that is quantized and tied": llama(two, tie=True, skip=()),
    }


def test_what_compressed_tensors_cannot_hold_is_named(tmp_path):
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    for message, model in refused().items():
        if "tied" in message:
            model.model.embed_tokens.to_plain()
        with pytest.raises(ValueError, match=rf"must fit compressed-tensors: .*{message}"):
            export.compressed_tensors(model, tmp_path / "out")
    with pytest.raises(TypeError, match="model must be one of transformers, with a config, got Sequential"):
        export.compressed_tensors(mlp(GRIDS["uniform(2)"], "row"), tmp_path / "out")
    assert not list(tmp_path.iterdir())
    (tmp_path / "mine").write_text("kept")
    with pytest.raises(FileExistsError, match="folder must be new, empty or an export of before"):
        export.compressed_tensors(llama(quantizer(GRIDS["uniform(2)"])), tmp_path)
    assert (tmp_path / "mine").read_text() == "kept"


# ---- torchao


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", GRIDS)
def test_torchao_has_the_same_outputs(name, dtype):
    pytest.importorskip("torchao", reason="torchao is not installed")
    for scale in SCALES:
        model = llama(quantizer(GRIDS[name], scale), dtype=dtype)
        export.freeze_scales_(model, dtype)
        expected = logits(model)
        assert export.torchao(model) is model
        up = model.model.layers[0].mlp.up_proj
        assert type(up) is nn.Linear
        assert type(up.weight.data).__name__ == "IntxUnpackedToInt8Tensor"
        assert torch.equal(logits(model), expected), scale


def test_what_torchao_cannot_hold_is_named():
    pytest.importorskip("torchao", reason="torchao is not installed")
    two = quantizer(GRIDS["uniform(2)"])
    model = llama(two, skip=("lm_head",))
    with pytest.raises(ValueError, match="embed_tokens must fit torchao's tensor: it stands for linear layers"):
        export.torchao(model)
    assert isinstance(model.model.layers[0].mlp.up_proj, fk.QuantLinear)
    rotated = llama(quantizer(GRIDS["uniform(2)"], transform=fk.Hadamard(32)))
    with pytest.raises(ValueError, match="it has neither transforms nor these inputs, got Hadamard"):
        export.torchao(rotated)


# ---- plain safetensors


class Cnn(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2)
        self.head = nn.Linear(6 * 8 * 8, 5)

    def forward(self, x):
        return self.head(self.up(F.relu(self.conv(x))).flatten(1))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(17, 32), nn.Linear(32, 17, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(self.embed(tokens))


def round_trip(model, fresh, x, path):
    export.safetensors(model, path)
    with torch.no_grad():
        expected = model(x)
        found = export.load(path, fresh).eval()(x)
    assert torch.equal(found, expected)
    return fresh


@pytest.mark.parametrize("scale", ["tensor", "row", "learned"])
@pytest.mark.parametrize("name", GRIDS)
def test_a_file_gives_the_same_outputs(name, scale, tmp_path):
    torch.manual_seed(0)
    how = quantizer(GRIDS[name], scale)
    model = mlp(GRIDS[name], scale)
    fresh = nn.Sequential(nn.Linear(64, 48), nn.BatchNorm1d(48), nn.ReLU(), nn.Linear(48, 10, bias=False))
    loaded = round_trip(model, fresh, torch.randn(5, 64), tmp_path / "mlp")
    assert type(loaded[0]) is nn.Linear
    cnn = Cnn()
    fk.quantize_model(cnn, how)
    round_trip(cnn.eval(), Cnn(), torch.randn(2, 3, 4, 4), tmp_path / "cnn")
    tied = Tied()
    fk.quantize_model(tied, how)
    loaded = round_trip(tied, Tied(), torch.arange(9), tmp_path / "tied")
    assert loaded.head.weight is loaded.embed.weight


def test_transforms_and_inputs_stay_quantized(tmp_path):
    torch.manual_seed(0)
    for activation in (fk.presets.quest(4), fk.presets.lsq(4)):
        transform = activation.transform and fk.Hadamard(16)
        activation = fk.Quantizer(
            activation.grid, activation.scale, activation.straight_through, transform=transform
        )
        x = torch.randn(5, 64)
        models = [mlp(GRIDS["uniform(3)"], "row", activation, transform) for _ in "ab"]
        for model in models:
            if isinstance(activation.scale, type(fk.presets.lsq(2).scale)):
                fk.calibrate_inputs_(model, lambda: model(x))  # noqa: B023
        loaded = round_trip(models[0], models[1], x, tmp_path / "out")
        assert isinstance(loaded[0], fk.QuantLinear)


def test_a_file_gives_a_transformer_the_same_logits_and_is_small(tmp_path):
    model, fresh = (llama(quantizer(GRIDS["ternary"])) for _ in "ab")
    export.safetensors(model, tmp_path / "out")
    assert torch.equal(logits(export.load(tmp_path / "out", fresh)), logits(model))
    assert (tmp_path / "out").stat().st_size < 0.45 * sum(p.numel() for p in model.parameters()) * 4


def test_what_does_not_fit_changes_nothing(tmp_path):
    model = mlp(GRIDS["uniform(2)"], "row")
    path = tmp_path / "file"
    export.safetensors(model, path)
    other = nn.Sequential(nn.Linear(64, 40), nn.BatchNorm1d(40), nn.ReLU(), nn.Linear(40, 10, bias=False))
    deeper = nn.Sequential(*other, nn.Linear(10, 3))
    data = path.read_bytes()
    (tmp_path / "cut").write_bytes(data[:-100])
    (tmp_path / "text").write_text("no tensors at all, but long enough to hold a header")
    foreign = tmp_path / "foreign"
    from safetensors.torch import save_file

    save_file({"weight": torch.ones(3)}, foreign)
    for target, file, message in [
        (other, path, r"file must fit the model, got 0.bias of shape \(48,\) in"),
        (deeper, path, r"file must fit the model, got 4.bias of shape None in"),
        (model, tmp_path / "cut", "file must be of safetensors and whole, got"),
        (model, tmp_path / "text", "file must be of safetensors and whole, got"),
        (model, foreign, "file must be of format fogzo and version 1 or 2, got"),
    ]:
        before = {name: t.clone() for name, t in target.state_dict().items()}
        with pytest.raises(ValueError, match=message):
            export.load(file, target)
        assert all(torch.equal(t, before[name]) for name, t in target.state_dict().items())
    with pytest.raises(FileNotFoundError, match="file must be there"):
        export.load(tmp_path / "none", model)
    with pytest.raises(ValueError, match="model must have quantized modules to export, got none"):
        export.safetensors(other, path)
    assert path.read_bytes() == data


@pytest.mark.parametrize("name", ["safetensors", "gguf", "compressed_tensors"])
def test_a_full_disk_leaves_no_part(name, tmp_path, monkeypatch):
    pytest.importorskip({"compressed_tensors": "compressed_tensors"}.get(name, name), reason=f"no {name}")
    model = llama(quantizer(GRIDS["uniform(2)"]))
    export.freeze_scales_(model, torch.float16)
    target = tmp_path / "out"
    getattr(export, name)(model, target)
    before = sorted((path, path.read_bytes()) for path in tmp_path.rglob("*") if path.is_file())

    def full(file):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "_to_disk", full)
    with pytest.raises(OSError, match="No space left on device"):
        getattr(export, name)(model, target)
    assert sorted((path, path.read_bytes()) for path in tmp_path.rglob("*") if path.is_file()) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_frozen_scales_are_numbers_of_the_dtype(dtype):
    for scale in SCALES:
        model = mlp(GRIDS["uniform(3)"], scale)
        first = model[0].alpha.detach().clone()
        export.freeze_scales_(model, dtype)
        assert torch.equal(model[0].alpha, first.to(dtype).float())
        with torch.no_grad():
            model[0].weight.mul_(2)
            model(torch.randn(4, 64))
        assert torch.equal(model[0].alpha, first.to(dtype).float())
        assert not isinstance(model[0].alpha, nn.Parameter)
    with pytest.raises(ValueError, match="dtype must be one of"):
        export.freeze_scales_(model, torch.int8)


def test_a_frozen_model_is_saved_and_loaded(tmp_path):
    import fogzo_kernels.integrations.transformers  # noqa: F401  reads it

    model = llama(fk.presets.lsq(2, "row"))
    export.freeze_scales_(model, torch.float16)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path).eval()), logits(model))


def test_codes_of_any_width_are_unpacked_as_packed():
    for grid in GRIDS.values():
        codes = torch.randint(grid.qmin, grid.qmax + 1, (3, 13)).to(torch.int8)
        for bits in {packing.code_bits(grid), 8}:
            packed = packing.pack_codes(codes, grid, bits)
            assert packed.shape == (3, -(-13 * bits // 8))
            assert torch.equal(packing.unpack_codes(packed, 13, grid, bits), codes)


# ---- the command


@pytest.mark.parametrize("form", ["gguf", "compressed-tensors", "safetensors"])
def test_a_saved_model_is_exported_by_the_command(form, tmp_path, capsys):
    pytest.importorskip({"gguf": "gguf", "compressed-tensors": "compressed_tensors"}.get(form, "safetensors"))
    model = llama(fk.presets.lsq(2, "row"))
    model.save_pretrained(tmp_path / "run")
    assert main([str(tmp_path / "run"), "--format", form, "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "MiB; the model in memory has" in said
    export.freeze_scales_(model, torch.float16 if form == "gguf" else torch.float32)
    up = model.model.layers[0].mlp.up_proj
    if form == "gguf":
        assert np.array_equal(gguf_of(tmp_path / "out")[1]["blk.0.ffn_up.weight"], values_of(up).numpy())
    elif form == "safetensors":
        assert torch.equal(
            logits(export.load(tmp_path / "out", llama(fk.presets.lsq(2, "row")))), logits(model)
        )
    else:
        assert torch.equal(logits(from_pretrained(tmp_path / "out", torch.float32)), logits(model))


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(SystemExit, match=r"RUN must have a config.json, as save_pretrained"):
        main([str(tmp_path), "--format", "gguf", "--out", str(tmp_path / "out")])
