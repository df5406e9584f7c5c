"""Calls of the fused tail, and the optimizer's step that it makes (docs/contract.md, section 4)."""

import torch
from conftest import device_of

import fogzo_kernels as fk

from .samples import GRID_CASES, alphas_for, poisoned

F32, BF16, F16, INT8 = torch.float32, torch.bfloat16, torch.float16, torch.int8
SHAPES = ((33, 20), (8, 64), (7, 4), (1, 4), (0, 4), (5,), (17, 3), ())  # the last three: not quantized
QUANTIZED = 5
RULES = {
    "adamw": {"betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1},
    "adamw-zero": {"betas": (0.0, 0.0), "eps": 1e-3, "weight_decay": 0.0},
    "sgd": {"weight_decay": 0.05},
    "momentum": {"momentum": 0.9, "dampening": 0.25, "weight_decay": 0.05},
    "nesterov": {"momentum": 0.9, "nesterov": True},
}
#: latents, grads, quantized, master copies
DTYPES = [(F32, BF16, BF16, False), (F32, F32, F32, False), (BF16, BF16, INT8, True), (F16, F16, F16, False)]


def fused(rule, latents, grads, states, *args, **options):
    if rule.startswith("adamw"):
        fk.estimate_adamw_(latents, grads, *states, *args, **RULES[rule], **options)
    else:
        buffers = states[0] if RULES[rule].get("momentum") else None
        fk.estimate_sgd_(latents, grads, buffers, *args, **RULES[rule], **options)


def shards_of(tensors, parts):
    """Cut matrices into rows, then into columns: the dimension, the parts of each, and their layouts."""
    columns = tensors[0].shape[1]
    for dim in (0, 1):
        size = tensors[0].shape[dim] // parts
        layouts = [(i * size * columns, size * columns, size * columns) for i in range(parts)]
        if dim == 1:
            layouts = [(i * size, size, columns) for i in range(parts)]
        yield dim, [[x.contiguous() for x in t.chunk(parts, dim)] for t in tensors], layouts


def fma(a, b, c):
    return (
        (a.double() * b + c.double()).float() if isinstance(c, torch.Tensor) else (a.double() * b + c).float()
    )


def f32(x):
    return torch.tensor(x, dtype=torch.float64).float().double().item()


def stepped(rule, theta, G, states, lr, t):
    """The contract's update in float32, with float64 inside each fma."""
    o = {"weight_decay": 0.0, "momentum": 0.0, "dampening": 0.0, "nesterov": False, **RULES[rule]}
    if rule.startswith("adamw"):
        (b1, b2), (m, v) = o["betas"], states
        m = fma(G - m, f32(1 - b1), m)
        v = fma(G * f32(1 - b2), G.double(), v * f32(b2))
        denominator = fma(v.double().sqrt().float(), f32(1 / (1 - b2**t) ** 0.5), f32(o["eps"]))
        return fma(m / denominator, -f32(lr / (1 - b1**t)), theta * f32(1 - lr * o["weight_decay"])), [m, v]
    d = fma(theta, f32(o["weight_decay"]), G)
    if not o["momentum"]:
        return fma(d, -f32(lr), theta), []
    b = fma(d, f32(1.0 if t == 1 else 1 - o["dampening"]), states[0] * f32(o["momentum"]))
    return fma(fma(b, f32(o["momentum"]), d) if o["nesterov"] else b, -f32(lr), theta), [b]


class Setup:
    """Fresh tensors on the backend's device; ``options`` are those that all calls share."""

    def __init__(self, backend, generator, dtypes, kind="row", case=GRID_CASES[0], shapes=SHAPES):
        device, (latent, grad, out, master) = device_of(backend), dtypes
        self.grid, straight_through = case

        def draw(scale=1.0, dtype=F32):
            return [(torch.randn(s, generator=generator) * scale).to(dtype).to(device) for s in shapes]

        self.latents, self.grads = draw(dtype=latent), draw(1e-2, grad)
        # master copies that are not the latents' values: only a skipped step can tell the two apart
        self.masters = [t.float() + 1e-3 for t in self.latents] if master else None
        self.states = [draw(1e-2), [t.square() for t in draw(1e-2)]]
        self.alphas = [alphas_for(s, kind, generator).to(device) for s in shapes[:QUANTIZED]]
        self.quantized = [poisoned(t, out) for t in self.latents[:QUANTIZED]]
        self.norm = fk.guide_norm(self.grads[:QUANTIZED], self.alphas, grid=self.grid, backend="reference")
        self.losses = [1 + torch.rand(2, generator=generator).to(device) for _ in "+-"]
        self.options = {
            "grid": self.grid, "straight_through": straight_through, "one_minus_beta": 1e-2,
            "seed": 77, "step": 4, "backend": backend, "tensor_ids": [3, 1, 4, 15, 9][: len(self.alphas)],
        }  # fmt: skip

    def estimates(self):
        """G in float32: a float32 copy of the gradients keeps every bit of the estimate."""
        G = [g.float().clone() for g in self.grads]
        if self.losses[0] is None or len(self.losses[0]):
            fk.estimate_gradient_(G[:QUANTIZED], *self.losses, self.alphas, self.norm, **self.options)
        return G

    def run(self, rule, lr=0.03, t=1, **more):
        fused(
            rule,
            self.latents,
            self.grads,
            self.states,
            *self.losses,
            self.alphas,
            self.norm,
            lr=lr,
            optimizer_step=t,
            masters=self.masters,
            quantized=self.quantized,
            **self.options,
            **more,
        )

    def thetas(self):
        return [t.float().clone() for t in self.masters or self.latents]

    def prepare(self):
        """Make the lists prepared ones, of which the latents have the names of the noise."""
        ids = [*self.options.pop("tensor_ids"), *range(100, 100 + len(self.latents))][: len(self.latents)]
        self.latents = fk.TensorList(self.latents, tensor_ids=ids)
        self.grads, self.alphas, self.quantized = map(fk.TensorList, (self.grads, self.alphas, self.quantized))
        self.states = [fk.TensorList(ts) for ts in self.states]

    def q_is_that_of_the_latents(self):
        """Whether the quantized weights are those of the latents as they are."""
        expected = [poisoned(q, q.dtype) for q in self.quantized]
        latents = self.latents[: len(expected)]
        fk.quantize_(expected, latents, self.alphas, grid=self.grid, backend=self.options["backend"])
        return all(map(torch.equal, self.quantized, expected))
