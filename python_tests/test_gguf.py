"""GGUF files, by a reader and decoders of their own: each block holds Q(weight), bit for bit."""

import numpy as np
import pytest
import torch
from support.exported import GRIDS, llama, mlp, quantizer, spans, values_of
from support.gguf_files import gguf_of

import fogzo_kernels as fk
from fogzo_kernels import export

#: Of each grid, the blocks that hold it.
HELD_BY = {
    "uniform(2)": ["Q2_0", "TQ2_0", "Q4_0", "Q8_0"], "uniform(4)": ["Q4_0", "Q8_0"], "uniform(8)": ["Q8_0"],
    "ternary": ["Q2_0", "TQ2_0"], "sign": ["Q1_0", "Q2_0"], "half_offset(1)": ["Q1_0"],
    "half_offset(2)": ["Q2_K", "Q4_0", "Q8_0"], "half_offset(4)": ["Q8_0"],
}  # fmt: skip
NAMES = {
    "blk.0.attn_q": "self_attn.q_proj", "blk.0.attn_k": "self_attn.k_proj", "blk.0.attn_v": "self_attn.v_proj",
    "blk.0.attn_output": "self_attn.o_proj", "blk.0.ffn_up": "mlp.up_proj", "blk.0.ffn_down": "mlp.down_proj",
    "blk.0.ffn_gate": "mlp.gate_proj",
}  # fmt: skip


def pairs(weight, heads):
    """Rows of q and k as llama.cpp has them: of a head, those of both halves in turns."""
    size = weight.shape[0] // heads
    order = [h * size + half * size // 2 + i for h in range(heads) for i in range(size // 2) for half in (0, 1)]
    return weight[order]


@pytest.mark.parametrize("scale", ["row", "tensor"])
@pytest.mark.parametrize(
    ("name", "block"), [(name, block) for name, blocks in HELD_BY.items() for block in (None, *blocks)]
)
def test_blocks_hold_q_of_the_weight(name, block, scale, tmp_path):
    pytest.importorskip("gguf", reason="gguf is not installed")
    model = llama(quantizer(GRIDS[name], scale), hidden=256)
    export.freeze_scales_(model, torch.float16)
    assert spans(model)
    export.gguf(model, tmp_path / "out.gguf", block=block)
    known, found = gguf_of(tmp_path / "out.gguf")
    assert known["general.architecture"] == "llama"
    assert known["llama.attention.head_count_kv"] == 2
    for target, source in NAMES.items():
        expected = values_of(model.model.layers[0].get_submodule(source))
        heads = {"blk.0.attn_q": 4, "blk.0.attn_k": 2}.get(target)
        expected = expected if heads is None else pairs(expected, heads)
        assert np.array_equal(found[f"{target}.weight"], expected.numpy()), target
    plain_ones = {"token_embd": "model.embed_tokens", "output": "lm_head", "output_norm": "model.norm"}
    for target, source in plain_ones.items():
        expected = model.get_submodule(source).weight.detach().numpy()
        assert np.array_equal(found[f"{target}.weight"], expected)


def test_a_file_holds_groups_embeddings_tied_heads_and_byte_tokens(tmp_path):
    pytest.importorskip("gguf", reason="gguf is not installed")
    model = llama(fk.presets.lsq(2, 64), tie=True, skip=())
    export.freeze_scales_(model, torch.float16)
    export.gguf(model, tmp_path / "out.gguf", tokenizer="bytes")
    known, found = gguf_of(tmp_path / "out.gguf")
    assert np.array_equal(found["token_embd.weight"], values_of(model.model.embed_tokens).numpy())
    assert "output.weight" not in found
    assert known["tokenizer.ggml.tokens"][65] == "<0x41>"
    assert known["general.file_type"] == 41


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block": "Q2_K"}, "q_proj must fit a block of GGUF Q2_K, got Grid"),
        ({"block": "Q3"}, "block must be None or one of Q1_0, Q2_0, TQ2_0, Q2_K, Q4_0, Q8_0, got 'Q3'"),
        ({"tokenizer": "bpe"}, "tokenizer must be one of none, bytes, got 'bpe'"),
    ],
)
def test_what_gguf_cannot_hold_is_named(options, message, tmp_path):
    pytest.importorskip("gguf", reason="gguf is not installed")
    model = llama(quantizer(GRIDS["uniform(2)"]))
    with pytest.raises(ValueError, match=r"q_proj.alpha must hold numbers of .*float16"):
        export.gguf(model, tmp_path / "out.gguf")
    export.freeze_scales_(model, torch.float16)
    with pytest.raises(ValueError, match=message):
        export.gguf(model, tmp_path / "out.gguf", **options)
    rotated = llama(quantizer(GRIDS["uniform(2)"], transform=fk.Hadamard(32)))
    with pytest.raises(ValueError, match="must have neither transform nor quantized inputs for GGUF"):
        export.gguf(rotated, tmp_path / "out.gguf")
    with pytest.raises(TypeError, match="model must be a LlamaForCausalLM of transformers, got Sequential"):
        export.gguf(mlp(GRIDS["uniform(2)"], "row"), tmp_path / "out.gguf")
    assert not list(tmp_path.iterdir())
