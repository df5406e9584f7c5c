"""Small mixtures of experts of ``transformers``, and the same models with a linear layer for each expert."""

import copy

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    GptOssConfig,
    MixtralConfig,
    OlmoeConfig,
    Qwen3MoeConfig,
)

import fogzo_kernels as fk

EXPERTS = 8  # three tokens, two experts each, leave two of them idle at least
SIZE = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "vocab_size": 32, "num_experts_per_tok": 2, "pad_token_id": None, "bos_token_id": None,
    "eos_token_id": None,
}  # fmt: skip
TWO = {"num_key_value_heads": 2}
CONFIGS = {
    "mixtral": (MixtralConfig, {"num_local_experts": EXPERTS, **TWO}),
    "qwen3": (Qwen3MoeConfig, {"num_experts": EXPERTS, "moe_intermediate_size": 16, "head_dim": 8, **TWO}),
    "olmoe": (OlmoeConfig, {"num_experts": EXPERTS, **TWO}),
    "gpt-oss": (GptOssConfig, {"num_local_experts": EXPERTS, "head_dim": 8, **TWO}),
    "deepseek": (
        DeepseekV3Config,
        {
            "n_routed_experts": EXPERTS, "moe_intermediate_size": 16, "n_group": 2, "topk_group": 2,
            "first_k_dense_replace": 0, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 4, "v_head_dim": 8, "n_shared_experts": 1, **TWO,
        },
    ),
}  # fmt: skip
SKIP = ["model.embed_tokens", "lm_head"]


def mixture(name, implementation="grouped_mm", **options):
    """A model with random weights, the same for each call."""
    kind, own = CONFIGS[name]
    torch.manual_seed(0)
    config = kind(**{**SIZE, **own, **options})
    config._experts_implementation = implementation
    return AutoModelForCausalLM.from_config(config)


def tokens(seed, rows=1, length=3):
    return torch.randint(SIZE["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(seed))


def loss_of(model, ids):
    return model(ids, labels=ids).loss


class PerExpert(nn.Module):
    """Experts as a linear layer for each product of each expert."""

    def __init__(self, experts):
        super().__init__()
        self.gate = lambda x: experts._apply_gate(x)
        self.transposed = experts.is_transposed
        for name in ("gate_up_proj", "down_proj"):
            stack = getattr(experts, name).detach()
            bias = getattr(experts, f"{name}_bias", None)
            layers = nn.ModuleList()
            for e, matrix in enumerate(stack.mT if self.transposed else stack):
                layer = nn.Linear(matrix.shape[1], matrix.shape[0], bias=bias is not None)
                layer.weight = nn.Parameter(matrix.clone().contiguous())
                if bias is not None:
                    layer.bias = nn.Parameter(bias[e].detach().clone())
                layers.append(layer)
            self.add_module(name, layers)

    def forward(self, hidden, chosen, weights):
        out = torch.zeros_like(hidden)
        for e in range(EXPERTS):
            token, place = torch.where(chosen == e)
            if len(token):
                found = self.down_proj[e](self.gate(self.gate_up_proj[e](hidden[token])))
                out.index_add_(0, token, found * weights[token, place, None])
        return out


def taken_apart(model):
    """The same model with PerExpert in the places of its experts."""
    model = copy.deepcopy(model)
    for layer in model.model.layers:
        layer.mlp.experts = PerExpert(layer.mlp.experts)
    return model


def both(name, quantizer):
    """A quantized mixture, and the same taken apart, whose weights draw the same noise."""
    whole = mixture(name, "eager")
    apart = taken_apart(whole)
    for model in (whole, apart):
        fk.quantize_model(model, quantizer, skip=SKIP)
    modules = dict(whole.named_modules())
    for path, module in apart.named_modules():
        if hasattr(module, "tensor_id"):
            parent, _, last = path.rpartition(".")
            stack = modules.get(f"{parent}_quantizer")
            module.tensor_id = modules[path].tensor_id if stack is None else stack.tensor_id + int(last)
    return whole, apart


def experts_of(model):
    """Each weight of a stack, its gradient and its alphas, by the name of a layer of the model taken apart."""
    found = {}
    for path, module in model.named_modules():
        if hasattr(module, "dims"):
            name = path.removesuffix("_quantizer")
            weight, grad = module.latent.detach(), module.latent.grad
            for e in range(EXPERTS):
                own = [None if t is None else t[e] for t in (weight, grad, module.alpha.detach())]
                if module.dims.letters == "eio":
                    own[:2] = [None if t is None else t.mT for t in own[:2]]
                found[f"{name}.{e}"] = own
        elif hasattr(module, "tensor_id"):
            found[path] = [module.weight.detach(), module.weight.grad, module.alpha.detach()]
    return found


def same(whole, apart):
    """Largest relative difference of weights, gradients and alphas of the two models, and who was idle."""
    ours, theirs = experts_of(whole), experts_of(apart)
    assert set(ours) == set(theirs)
    worst, idle = 0.0, set()
    for name, tensors in ours.items():
        if not theirs[name][1].any():
            assert not tensors[1].any(), name
            idle.add(name)
        for a, b in zip(tensors, theirs[name], strict=True):
            if a is None:
                assert b is None or not b.any(), name
                continue
            worst = max(
                worst, float((a.reshape(-1) - b.reshape(-1)).abs().max() / b.abs().max().clamp(min=1e-30))
            )
    return worst, idle
