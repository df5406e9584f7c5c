"""Small models of ``transformers``, the one call that quantizes each, and a step of FOGZO in plain PyTorch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

import fogzo_kernels as fk
from fogzo_kernels.spec.scale import FixedScale

from .tolerances import N_TOLERANCE, estimate_error

#: Sums in another order, over some hundred terms at most, in float32.
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 2.0**-19, 2.0**-16

# ---- models, as docs/models.md has them


def mean_of_row(weight):
    return weight.abs().mean(1, keepdim=True).clamp(min=1e-6)


def widest_of_row(weight):
    return weight.abs().amax(1, keepdim=True).clamp(min=1e-6) / 127


low = fk.Quantizer(fk.Grid.uniform(3), fk.Scale.fixed(mean_of_row), fk.StraightThrough("identity"))
eight = fk.Quantizer(
    fk.Grid.uniform(8), fk.Scale.fixed(widest_of_row), fk.StraightThrough("identity", clip=False)
)


@dataclass(frozen=True)
class Case:
    """A model: how it is made, quantized by one call, and what a batch of it is."""

    make: Callable[..., nn.Module]
    quantize: Callable[[nn.Module], fk.Report]
    batch: Callable[[], dict[str, Tensor]]
    learning_rate: float = 3e-3

    def plain(self, **options) -> nn.Module:
        """The same weights each time."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self.make(**options)


def llama(tied):
    def make(**options):
        config = transformers.LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=32,
            tie_word_embeddings=tied,
            **options,
        )
        return transformers.LlamaForCausalLM(config)

    return make


def gpt2(**options):
    config = transformers.GPT2Config(
        vocab_size=64,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=32,
        bos_token_id=0,
        eos_token_id=0,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        **options,
    )
    return transformers.GPT2LMHeadModel(config)


def patches(kind, config_kind):
    def make(**options):
        config = config_kind(
            image_size=16,
            patch_size=4,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            num_labels=10,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            **options,
        )
        return kind(config)

    return make


def resnet(**options):
    config = transformers.ResNetConfig(
        layer_type="basic",
        depths=[2, 2, 2, 2],
        embedding_size=16,
        hidden_sizes=[16, 32, 48, 64],
        num_labels=10,
        **options,
    )
    return transformers.ResNetForImageClassification(config)


def text():
    tokens = torch.randint(64, (4, 12), generator=torch.Generator().manual_seed(1))
    return {"input_ids": tokens, "labels": tokens}


def images(size=16):
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(8, 3, size, size, generator=generator)
    return {"pixel_values": pixels, "labels": torch.randint(10, (8,), generator=generator)}


vit = patches(transformers.ViTForImageClassification, transformers.ViTConfig)
deit = patches(transformers.DeiTForImageClassification, transformers.DeiTConfig)

CASES = {
    "llama": Case(
        llama(tied=False), lambda m: fk.quantize_model(m, low, skip=["model.embed_tokens", "lm_head"]), text
    ),
    "tied_llama": Case(
        llama(tied=True),
        lambda m: fk.quantize_model(m, low, rules=[("model.embed_tokens", eight), ("lm_head", eight)]),
        text,
    ),
    "gpt2": Case(
        gpt2, lambda m: fk.quantize_model(m, low, rules=[(nn.Embedding, eight), ("lm_head", eight)]), text
    ),
    "vit": Case(
        vit,
        lambda m: fk.quantize_model(m, low, rules=[("*.patch_embeddings", eight), ("classifier", eight)]),
        images,
    ),
    "deit": Case(deit, lambda m: fk.quantize_model(m, low), images),
    "resnet": Case(
        resnet,
        lambda m: fk.quantize_model(m, low, rules=[("resnet.embedder", eight), ("classifier", eight)]),
        lambda: images(32),
    ),
}


# ---- what a step of Fogzo showed


@dataclass
class Observed:
    """Of one step: losses and effective weights of each pass, straight-through gradients, estimates."""

    losses: list[Tensor]
    effective: list[dict[str, Tensor]]
    guides: dict[str, Tensor]
    estimates: dict[str, Tensor]


def quantized_modules(model) -> dict[str, nn.Module]:
    """Modules with quantized weights by name, one for each weight."""
    names = {f"{name}.weight" for name, m in model.named_modules() if hasattr(m, "quantizer")}
    return {n: model.get_submodule(n.rpartition(".")[0]) for n, _ in model.named_parameters() if n in names}


def observe(model, fogzo, batch) -> Observed:
    seen = Observed([], [], {}, {})
    modules = quantized_modules(model)
    for probe in fogzo.probes():
        with probe:
            seen.effective.append({n: m.effective_weight().detach().clone() for n, m in modules.items()})
            probe.backward(model(**batch).loss)
        seen.losses.append(probe.loss.clone())
        if not probe.sign:
            seen.guides = {n: p.grad.clone() for n, p in model.named_parameters()}
    fogzo.estimate_()
    seen.estimates = {n: p.grad.clone() for n, p in model.named_parameters()}
    return seen


# ---- the same step by hand (docs/contract.md, section 1), in a plain model


class Through(torch.autograd.Function):
    """A value in place of a latent; the gradient passes times the derivative."""

    @staticmethod
    def forward(ctx, latent, value, derivative):
        ctx.save_for_backward(derivative)
        return value.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0], None, None


class Weight:
    """A quantized weight of the plain model: what the contract needs of it, as rows, in float64."""

    def __init__(self, plain_module, quantized_module):
        self.transposed = isinstance(plain_module, Conv1D)
        self.looked_up = isinstance(plain_module, nn.Embedding)
        self.channels_last = isinstance(plain_module, nn.Conv2d) and not quantized_module.weight.is_contiguous()
        self.shape = plain_module.weight.shape
        self.latent = self.rows(plain_module.weight.detach()).double()
        q = quantized_module.quantizer
        self.grid, self.ste, self.tensor_id = q.grid, q.straight_through, quantized_module.tensor_id
        assert q.transform is None
        fixed = isinstance(q.scale, FixedScale)  # else alpha is what the step measured, or learned
        alpha = q.scale.of(self.latent.float()) if fixed else quantized_module.alpha.detach()
        self.delta = (self.grid.r * alpha).double()
        z = self.latent * (1 / self.delta.float()).double() - self.grid.offset
        self.z = z.float().double()  # rounded as it is pinned
        inside = (self.z > self.grid.qmin) & (self.z < self.grid.qmax)
        self.derivative = inside.double() if self.ste.clip else torch.ones_like(self.z)

    def rows(self, tensor):
        return tensor.t().contiguous() if self.transposed else tensor.flatten(1)

    def shaped(self, rows):
        return rows.t().contiguous() if self.transposed else rows.reshape(self.shape)

    def codes(self, y):
        return y.clamp(self.grid.qmin, self.grid.qmax).round()

    def values(self, codes):
        return self.shaped((self.delta * (codes + self.grid.offset)).float())

    def noise(self, **names):
        u = fk.noise(self.latent.numel(), self.ste.distribution, tensor_id=self.tensor_id, **names)
        if self.channels_last:  # the elements are numbered as they lie in memory
            out, channels, *window = self.shape
            u = u.view(out, *window, channels).movedim(-1, 1).flatten(1)
        return u.double().view(self.latent.shape)


class Reference:
    """One step in a plain model: the estimates, and how far those of Fogzo may be from them.

    Codes of a probe may differ only where y lies so near a tie that float32 rounding decides; there, those
    that Fogzo ran with are taken.
    """

    def __init__(self, plain, model, seen, batch, *, one_minus_beta, directions, seed, step):
        self.plain, self.seen, self.batch = copy.deepcopy(plain), seen, batch
        self.weights = {
            name: Weight(plain.get_submodule(name.rpartition(".")[0]), m)
            for name, m in quantized_modules(model).items()
        }
        self.losses = [self.gradients()]
        self.buffers = {n: b.clone() for n, b in self.plain.named_buffers()}
        self.spread = {n: (self.rows(n, seen.guides[n]) - g).abs() for n, g in self.guides.items()}
        self.norm = sum((w.delta * self.guides[n]).square().sum() for n, w in self.weights.items()).sqrt()
        apart = sum((w.delta * self.spread[n]).square().sum() for n, w in self.weights.items()).sqrt()
        self.norm_error = N_TOLERANCE + apart / self.norm  # relative; the seen one is of the seen guides
        self.ambiguous = 0
        self.total = dict.fromkeys(self.weights, 0.0)
        self.error = dict.fromkeys(self.weights, 0.0)
        (eps,) = {w.ste.epsilon(w.grid) for w in self.weights.values()}
        names = {"seed": seed, "step": step}
        for i in range(directions):
            sign = fk.direction_sign(seed, step, i)
            guide = {
                n: (1 - one_minus_beta) ** 0.5 * sign * w.delta * self.guides[n] / self.norm
                for n, w in self.weights.items()
            }
            noise = {
                n: (one_minus_beta**0.5 * w.noise(direction=i, **names)).masked_fill(
                    self.still[n].unsqueeze(1), 0
                )
                for n, w in self.weights.items()
            }
            for j in (0, 1):
                self.losses.append(self.probe(guide, noise, (1 - 2 * j) * eps, 1 + 2 * i + j))
            self.add(guide, noise, i, eps, directions)

    def rows(self, name, tensor):
        return self.weights[name].rows(tensor).double()

    def gradients(self):
        """The gradient pass: the loss, g of quantized weights as rows, plain gradients of the others."""
        leaves = {n: p.detach().clone().requires_grad_() for n, p in self.plain.named_parameters()}
        used = dict(leaves)
        for n, w in self.weights.items():
            value = w.values(w.codes(w.z))
            assert torch.equal(value, self.seen.effective[0][n]), n
            used[n] = Through.apply(leaves[n], value, w.shaped(w.derivative).float())
        loss = functional_call(self.plain, used, (), self.batch).loss
        loss.backward()
        self.guides = {n: self.rows(n, leaves[n].grad) for n in self.weights}
        #: Of embeddings, the rows that got no gradient: they get no estimate.
        self.still = {n: ~g.ne(0).any(1) & self.weights[n].looked_up for n, g in self.guides.items()}
        self.others = {n: leaf.grad for n, leaf in leaves.items() if n not in self.weights}
        return loss.detach()

    @torch.no_grad()
    def probe(self, guide, noise, eps, number):
        """The loss with Q(w + eps v), set into the plain model."""
        for n, w in self.weights.items():
            y = w.z + eps * (guide[n] + noise[n])
            share = self.spread[n] * w.delta / self.norm + self.norm_error * guide[n].abs()
            error = abs(eps) * share + 2.0**-22 * (w.z.abs() + abs(eps) * (guide[n].abs() + noise[n].abs()))
            found = (self.rows(n, self.seen.effective[number][n]) / w.delta - w.grid.offset).round()
            near = ((y - y.floor()) - 0.5).abs() <= error
            assert torch.equal(found[~near], w.codes(y)[~near]), n
            codes = torch.where(near, found, w.codes(y))
            self.ambiguous += int(near.sum())
            values = w.values(codes)
            assert torch.equal(values, self.seen.effective[number][n]), n
            self.plain.get_parameter(n).copy_(values)
        return self.plain(**self.batch).loss

    def add(self, guide, noise, i, eps, directions):
        """A direction's part of G, and of its error: rounding, and what g, N and the losses differ by."""
        plus, minus = (x.double() for x in self.losses[1 + 2 * i : 3 + 2 * i])
        c = (plus - minus) / (2 * eps)
        seen_plus, seen_minus = (x.double() for x in self.seen.losses[1 + 2 * i : 3 + 2 * i])
        c_error = (c - (seen_plus - seen_minus) / (2 * eps)).abs()
        for n, w in self.weights.items():
            v = [part / w.delta / directions for part in (guide[n], noise[n])]
            largest = [(c.abs() + c_error) * part.abs() for part in v]
            self.total[n] = self.total[n] + c * sum(v).masked_fill(self.still[n].unsqueeze(1), 0)
            self.error[n] = (
                self.error[n]
                + estimate_error(largest, sum(largest), torch.zeros(()), 0.0, torch.float32)
                + self.norm_error * largest[0]
                + (c.abs() + c_error) * self.spread[n] / self.norm / directions
                + c_error * sum(part.abs() for part in v)
            )

    def excess(self, name):
        """The largest error of Fogzo's estimate, in units of what is allowed; rows without one have 0."""
        found = self.rows(name, self.seen.estimates[name])
        assert not found[self.still[name]].any(), name
        return ((found - self.total[name]).abs() / self.error[name]).max()


def check_losses_and_guides(reference):
    seen = reference.seen
    for ours, theirs in zip(seen.losses, reference.losses, strict=True):
        assert (ours - theirs).abs() <= LOSS_TOLERANCE * theirs.abs()
    for name, spread in reference.spread.items():
        assert spread.max() <= GRADIENT_TOLERANCE * reference.guides[name].abs().max(), name
