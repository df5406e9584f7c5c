"""Valid calls of the public ops, of their schemas and of the native CPU ops; grids and scales for them."""

import copy
import math
from contextlib import suppress
from functools import partial

import torch
from torch import Tensor

import fogzo_kernels as fk
from fogzo_kernels.spec import noise
from fogzo_kernels.spec.update import UpdateRule

SHAPES = ((3,), (4, 8))
GUIDE = ("guide_sumsq", "guide_norm")
MIX = ("perturb_quantize_", "estimate_gradient_")
MIXING = "norm grid straight_through one_minus_beta seed step tensor_ids layouts epsilon_scale noise_factors"
OPS = {
    "noise": "numel distribution seed step direction tensor_id layout device",
    "direction_sign": "seed step direction",
    "guide_sumsq": "grads alphas grid per_tensor",
    "guide_norm": "grads alphas grid",
    "perturb_quantize_": f"plus minus latents grads alphas direction {MIXING}",
    "estimate_gradient_": f"grads losses_plus losses_minus alphas counters {MIXING}",
    "quantize": "latent alpha grid straight_through",
    "quantize_": "out latents alphas grid",
    "dequantize": "codes alpha grid dtype",
    "straight_through_backward_": "grads latents alphas grid straight_through",
    "measure_alphas_": "alphas tensors statistic factor add least",
    "learned_backward_": "grads alpha_grads latents alphas grid straight_through factors",
    "hadamard": "x block",
    "hadamard_": "out tensors block",
}
ON_BACKENDS = tuple(op for op in OPS if op not in ("direction_sign", "dequantize"))
NAN, INF = math.nan, math.inf
ADAMW = UpdateRule("adamw", weight_decay=0.1, beta1=0.8, beta2=0.95, eps=1e-6)
native = torch.ops.fogzo_cpu
f64, i64 = (partial(torch.tensor, dtype=d) for d in (torch.float64, torch.int64))
IDENTITY = fk.StraightThrough("identity", clip=False)
#: Grids with straight-through estimators: each kind of both occurs.
GRID_CASES = [
    (fk.Grid.uniform(2), fk.StraightThrough("identity")),
    (fk.Grid.uniform(8), fk.StraightThrough("identity", noise="gaussian")),
    (fk.Grid.half_offset(1), fk.StraightThrough("identity", noise="rademacher")),
    (fk.Grid.half_offset(4), IDENTITY),
    (fk.Grid.ternary(), IDENTITY),
    (fk.Grid.sign(), fk.StraightThrough("hardtanh")),
    (fk.Grid.sign(), fk.StraightThrough("tanh")),
    (fk.Grid.sign(), fk.StraightThrough("approxsign")),
]
GRID_IDS = [f"{s.kind}-{s.distribution}-{g.levels}" for g, s in GRID_CASES]


def arguments(op, device):
    """A valid call; what it would write is poisoned with NaN."""
    generator = torch.Generator().manual_seed(3)
    latents, grads = ([torch.randn(s, generator=generator).to(device) for s in SHAPES] for _ in "ab")
    plus, minus, out = ([torch.full(s, NAN, device=device) for s in SHAPES] for _ in "abc")
    losses_plus, losses_minus = (torch.tensor(x, device=device) for x in ([2.0, 1.0], [0.5, 3.0]))
    known = {
        "plus": plus, "minus": minus, "out": out, "latents": latents, "grads": grads,
        "alphas": [torch.tensor(0.5, device=device), torch.full((4, 1), 0.25, device=device)],
        "norm": torch.tensor(2.0, device=device), "losses_plus": losses_plus,
        "losses_minus": losses_minus, "counters": torch.zeros(3, dtype=torch.int64, device=device),
        "latent": latents[1], "alpha": torch.tensor(0.5, device=device),
        "codes": torch.ones(SHAPES[1], dtype=torch.int8, device=device), "dtype": torch.float32,
        "grid": fk.Grid.uniform(2), "straight_through": fk.StraightThrough(), "seed": 1, "step": 2,
        "direction": 3, "one_minus_beta": 0.25, "epsilon_scale": 1.0, "tensor_ids": [4, 5],
        "layouts": [(0, 3, 3), (8, 8, 16)], "numel": 4, "distribution": "uniform", "tensor_id": 4,
        "layout": (0, 4, 4), "device": device, "tensors": latents, "statistic": "rms", "factor": 1.5,
        "add": 1e-8, "least": 1e-5, "factors": [0.5, 2.0], "block": 16, "per_tensor": False,
        "noise_factors": torch.tensor([0.5, 2.0], device=device),
        "x": torch.randn(2, 32, generator=generator).to(device),
        "alpha_grads": [torch.full((), NAN, device=device), torch.full((4, 1), NAN, device=device)],
    }  # fmt: skip
    if op == "hadamard_":
        known["tensors"] = [torch.randn(s, generator=generator).to(device) for s in ((16,), (3, 48))]
        known["out"] = [torch.full_like(t, NAN) for t in known["tensors"]]
    return {name: known[name] for name in OPS[op].split()}


def prepared(args):
    """The call with a TensorList for each list of tensors; the one that noise is drawn for has the names."""
    names = {name: args[name] for name in ("tensor_ids", "layouts") if name in args}
    like = "latents" if "latents" in args else "grads"
    lists = {
        name: value
        for name, value in args.items()
        if isinstance(value, list) and value and all(isinstance(t, Tensor) for t in value)
    }
    made = {name: fk.TensorList(value) for name, value in lists.items()}
    with suppress(TypeError, ValueError, KeyError):  # of names that are bad: they are given to the op
        made[like] = fk.TensorList(lists[like], **names)
        args = {name: value for name, value in args.items() if name not in names}
    return args | made


def tensors(args):
    """Every tensor of a call that holds data."""
    values = [x for v in args.values() for x in (v if isinstance(v, list | tuple) else [v])]
    return [x for x in values if isinstance(x, Tensor) and not x.is_meta]


def samples(device, dtype, backend):
    """Arguments of every op, in the order of its schema."""
    args = arguments("perturb_quantize_", device)
    lists = {x: [t.to(dtype) for t in args[x]] for x in ("latents", "grads")}
    latents, grads, alphas = lists["latents"], lists["grads"], args["alphas"]
    out = [[torch.zeros_like(t) for t in latents] for _ in "ab"]
    losses = [torch.tensor(x, device=device) for x in ([2.0, 1.0], [0.5, 3.0])]
    states = [[torch.ones(t.shape, device=device) for t in latents] for _ in "mv"]
    counters = [torch.zeros(3, dtype=torch.int64, device=device)]
    names = (args["norm"], i64(1), i64(2), f64(0.25))
    where = ([4, 5], [0, 3, 3, 8, 8, 16])
    grid, drawn = (-2, 1, 0.0, 1), ("uniform", 0.29)
    smooth, learned = (*grid, "identity_clipped", backend), torch.full((4, 1), 0.25, device=device)
    blocks = [torch.randn(s, device=device).to(dtype) for s in ((2, 32), (16,))]
    return {
        "noise": (5, "uniform", i64(1), i64(2), 3, 4, [0, 5, 5], device, backend),
        "guide_sumsq": (grads, alphas, 1, False, backend),
        "perturb_quantize_": (
            *out, latents, grads, alphas, *names, 3, *where, *grid, *drawn, backend,
        ),
        "estimate_gradient_": (
            grads, counters, *losses, alphas, *names, *where, 1, *drawn, backend,
        ),
        "estimate_update_": (
            latents, [], out[0], counters, *states, grads, *losses, alphas, *names, *where, *grid,
            *drawn, f64(0.1), i64(3), "adamw", [*ADAMW.hyperparameters], [*ADAMW.hyperparameters.values()],
            False, backend,
        ),
        "quantize_": (out[0], latents, alphas, *grid, backend),
        "straight_through_backward_": (grads, latents, alphas, *smooth),
        "measure_alphas_": ([t.clone() for t in alphas], latents, "rms", 1.5, 1e-8, 1e-5, backend),
        "learned_backward_": (grads, copy.deepcopy(alphas), latents, alphas, *smooth[:-1], [0.5, 2.0], backend),
        "quantize": (latents[1].clone().requires_grad_(), learned.requires_grad_(), *smooth, 0.5),
        "straight_through_backward": (grads[1], latents[1], alphas[1], *smooth),
        "learned_backward": (grads[1], latents[1], alphas[1], *smooth[:-1], 0.5, backend),
        "hadamard_": ([torch.zeros_like(t) for t in blocks], blocks, 16, backend),
        "hadamard": (blocks[0].clone().requires_grad_(), 16, backend),
    }  # fmt: skip


def names_of(op):
    return [a.name for a in getattr(native, op).default._schema.arguments if a.name != "held"]


def native_arguments(op):
    """A valid call of a native op by the schema's names; what it writes without reading holds 99."""
    generator = torch.Generator().manual_seed(3)
    latents, grads, first = ([torch.randn(s, generator=generator) for s in SHAPES] for _ in "abc")
    poison = {name: [torch.full(s, 99.0) for s in SHAPES] for name in ("plus", "minus", "quantized", "out")}
    known = {
        **poison, "latents": latents, "grads": grads, "first": first, "second": [t.square() for t in first],
        "masters": [], "counters": [torch.tensor([5, 6, 7])],
        "alphas": [torch.tensor(0.5), torch.full((4, 1), 0.25)], "losses_plus": torch.tensor([2.0, 1.0, INF]),
        "losses_minus": torch.tensor([0.5, 3.0, 1.0]), "norm": torch.tensor(2.0), "seed": i64(1),
        "step": i64(2), "one_minus_beta": f64(0.25), "direction": 3, "tensor_ids": [4, 5],
        "layouts": [0, 3, 3, 8, 8, 16], "factors": [torch.tensor([0.5, 2.0])], "guided": False,
        "qmin": -2, "qmax": 1, "offset": 0.0, "r": 1, "block": 0,
        "distribution": "uniform", "noise_scale": noise.DISTRIBUTIONS["uniform"], "epsilon": 0.5,
        "rule": ADAMW.variant, "names": list(ADAMW.hyperparameters), "lr": f64(0.1), "optimizer_step": i64(2),
        "values": list(ADAMW.hyperparameters.values()), "straight_through": "identity_clipped",
    }  # fmt: skip
    if op == "noise":
        known |= {"out": torch.full((32,), 99.0), "tensor_ids": [5], "layouts": [8, 8, 16]}
    if op == "guide_sumsq":
        known["out"] = torch.tensor(99.0).double()
    return {name: known[name] for name in names_of(op)}


def poisoned(like, dtype):
    return torch.full(like.shape, float("nan"), device=like.device).to(dtype)


def alphas_for(shape, kind, generator):
    """One scale per tensor, row, or group of 4 of the last dimension."""
    sizes = {"tensor": (), "row": (*shape[:-1], 1), "group": (*shape[:-1], shape[-1] // 4)}
    return 0.05 + torch.rand(sizes[kind], generator=generator)
