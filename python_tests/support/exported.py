"""Small models of every grid and scale, for the tests of what is exported."""

import copy

import pytest
import torch
from torch import nn

import fogzo_kernels as fk

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
GRIDS = {
    **{f"uniform({bits})": fk.Grid.uniform(bits) for bits in range(2, 9)},
    **{f"half_offset({bits})": fk.Grid.half_offset(bits) for bits in range(1, 9)},
    "sign": fk.Grid.sign(),
    "ternary": fk.Grid.ternary(),
}
SCALES = {
    "tensor": lambda grid: fk.Scale.absmax(factor=-0.6 / grid.qmin),
    "row": lambda grid: fk.Scale.absmax("row", factor=-0.6 / grid.qmin),
    "group": lambda grid: fk.Scale.absmean(32),
    "learned": lambda grid: fk.Scale.learned("row"),
}
TOKENS = torch.tensor([[1, 72, 101, 108, 108, 111, 44, 32, 119, 111, 114, 108, 100]])


def quantizer(grid, scale="row", transform=None):
    straight_through = fk.StraightThrough("tanh" if grid.is_sign else "identity")
    return fk.Quantizer(grid, SCALES[scale](grid), straight_through, transform=transform)


def llama(how, tie=False, dtype=torch.float32, skip=("lm_head", "model.embed_tokens"), rules=(), hidden=128):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=1,
        bos_token_id=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tie,
    )
    model = transformers.LlamaForCausalLM._from_config(config, dtype=dtype).eval()
    fk.quantize_model(model, how, skip=skip, rules=rules)
    return model


def logits(model, tokens=TOKENS):
    """Of a copy, whose weights are aligned: a file's lie anywhere in it, and the bits of a product may tell."""
    with torch.no_grad():
        return copy.deepcopy(model)(tokens).logits


def values_of(module):
    return fk.dequantize(module.codes(), module.alpha.detach(), grid=module.quantizer.grid, dtype=torch.float32)


def spans(model):
    """Whether codes reach both ends of the grid somewhere, so that no bit of a code is untried."""
    for m in (m for m in model.modules() if hasattr(m, "quantizer")):
        codes, grid = m.codes(), m.quantizer.grid
        if int(codes.min()) == grid.qmin and int(codes.max()) == grid.qmax:
            return True
    return False


def mlp(grid, scale, activation=None, transform=None):
    model = nn.Sequential(nn.Linear(64, 48), nn.BatchNorm1d(48), nn.ReLU(), nn.Linear(48, 10, bias=False))
    fk.quantize_model(model, quantizer(grid, scale, transform), activation=activation, skip=["3"])
    return model.eval()
