"""llama.cpp, the real one: it reads the blocks as they were meant, and its logits are near the model's.

It takes minutes to build, so only `make test-gguf` installs it.
"""

import ctypes
import glob
import os

import numpy as np
import pytest
import torch
from support.exported import GRIDS, llama, quantizer, values_of

from fogzo_kernels import export
from fogzo_kernels.export.llama import block_for, encoded

llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: make test-gguf")
pytest.importorskip("gguf", reason="gguf is not installed")
TOKENS = [1, 72, 101, 108, 108, 111, 44, 32, 119, 111, 114, 108, 100]
#: Of each grid, the blocks that are tried; float32 where there is none.
CASES = [
    ("uniform(2)", "Q2_0"), ("uniform(2)", "TQ2_0"), ("uniform(2)", "Q4_0"), ("uniform(2)", "Q8_0"),
    ("ternary", "Q2_0"), ("ternary", "TQ2_0"), ("sign", "Q1_0"), ("half_offset(2)", "Q2_K"),
    ("half_offset(2)", "Q4_0"), ("uniform(4)", "Q4_0"), ("uniform(8)", "Q8_0"),
]  # fmt: skip


def ggml_values(block, raw, count):
    """What ggml itself makes of blocks."""
    folder = os.path.join(os.path.dirname(llama_cpp.__file__), "lib")
    (path,) = glob.glob(os.path.join(folder, "libggml-base.so"))
    name = {"Q2_K": "q2_K"}.get(block, block.lower())
    out = np.empty(count, np.float32)
    at = [array.ctypes.data_as(ctypes.c_void_p) for array in (raw, out)]
    getattr(ctypes.CDLL(path), f"dequantize_row_{name}")(*at, ctypes.c_int64(count))
    return out


def logits_of(path):
    model = llama_cpp.Llama(
        str(path), n_ctx=64, logits_all=True, verbose=False, n_threads=2, type_k=0, type_v=0
    )
    model.eval(TOKENS)
    return torch.tensor(np.array(model.scores[: len(TOKENS)]))


@pytest.mark.parametrize(("name", "block"), CASES)
def test_llama_cpp_decodes_the_blocks_and_gives_the_logits(name, block, tmp_path):
    """Blocks to the bit; logits as far as products of inputs rounded to 8 bits go."""
    model = llama(quantizer(GRIDS[name]), hidden=256)
    export.freeze_scales_(model, torch.float16)
    up = model.model.layers[0].mlp.up_proj
    raw = encoded(up, block_for("up", up, block), torch.arange(up.weight.shape[0])).numpy()
    expected = values_of(up).numpy()
    assert np.array_equal(ggml_values(block, raw, expected.size), expected.reshape(-1))
    export.gguf(model, tmp_path / "model.gguf", block=block)
    found = logits_of(tmp_path / "model.gguf")
    with torch.no_grad():
        wanted = model(torch.tensor([TOKENS])).logits[0]
    divergence = (wanted.softmax(-1) * (wanted.log_softmax(-1) - found.log_softmax(-1))).sum(-1).mean()
    print(
        f"{name} {block}: logits within {(found - wanted).abs().max() / wanted.std():.1e} of their spread,"
        f" KL {divergence:.1e}"
    )
    assert (found - wanted).abs().max() < 0.1 * wanted.std()
    assert divergence < 1e-4


def test_llama_cpp_writes_text_with_an_exported_model(tmp_path):
    from support.lm_runs import train

    from bench.evidence import save_run
    from fogzo_kernels.export.__main__ import main

    train(tmp_path / "run", "--steps", "200", "--hidden", "256", "--rate", "0.004")
    assert save_run.main([str(tmp_path / "run"), str(tmp_path / "saved")]) == 0
    assert main([str(tmp_path / "saved"), "--format", "gguf", "--out", str(tmp_path / "out.gguf")]) == 0
    model = llama_cpp.Llama(str(tmp_path / "out.gguf"), n_ctx=32, verbose=False, n_threads=2)
    assert model.tokenize(b"def", add_bos=False) == [100, 101, 102]
    said = model.create_completion("def ", max_tokens=20, temperature=0)["choices"][0]["text"]
    print(repr(said))
    assert len(said) >= 10
