"""What a valid call of a native op must give: by the reference, and by how much it may differ."""

import math

import torch

import fogzo_kernels as fk
from fogzo_kernels.backends import reference
from fogzo_kernels.spec.call import Draw, Losses, Measure, Mix, Update
from fogzo_kernels.spec.noise import DISTRIBUTIONS
from fogzo_kernels.spec.update import UpdateRule

from .fuzz_errors import alpha_errors, estimate_errors, one_code, slope_error
from .tolerances import M_TOLERANCE

native = torch.ops.fogzo_cpu
RULES = {
    "adamw": {"kind": "adamw", "weight_decay": 0.1, "beta1": 0.8, "beta2": 0.95, "eps": 1e-6},
    "sgd": {"kind": "sgd", "weight_decay": 0.05},
    "momentum": {"kind": "sgd", "momentum": 0.9, "dampening": 0.25},
    "nesterov": {"kind": "sgd", "momentum": 0.9, "nesterov": True},
}


def rule_of(case):
    return UpdateRule(**RULES[case["rule"]])


def draw_of(case):
    ids, layouts = ([t[k] for t in case["tensors"]] for k in ("id", "layout"))
    seed, step = torch.tensor(case["noise_seed"]), torch.tensor(case["step"])
    return Draw(case["distribution"], seed, step, ids, [tuple(x) for x in layouts])


def mix_of(a):
    return Mix(a["norm"], a["one_minus_beta"], a["epsilon"], next(iter(a["factors"]), None))


def losses_of(a):
    return Losses(a["losses_plus"], a["losses_minus"], next(iter(a["counters"]), None), a["guided"])


def expected(case, args):
    """What the arguments of a valid call become, by the reference; and by how much they may differ."""
    op, a = case["op"], {k: copied(v) for k, v in args.items()}
    grid, draw, block = fk.Grid(*case["grid"]), draw_of(case), case["block"]
    m_off = M_TOLERANCE["cpu"][draw.distribution] + M_TOLERANCE["reference"][draw.distribution]
    if op == "noise":
        u = reference.noise(a["out"].numel(), draw, a["direction"], torch.device("cpu"))
        return {"out": [u]}, {"out": [torch.full_like(u, DISTRIBUTIONS[draw.distribution] * m_off)]}
    if not case["tensors"]:
        return {"out": [torch.zeros_like(a["out"])]} if op == "guide_sumsq" else {}, {}
    if op == "guide_sumsq":
        total = reference.guide_sumsq(a["grads"], a["alphas"], grid.r, False, case["per_tensor"])
        return {"out": [total]}, {"out": [2e-6 * total]}
    if op == "perturb_quantize":
        reference.perturb_quantize_(
            a["plus"],
            a["minus"],
            a["latents"],
            a["grads"],
            a["alphas"],
            draw,
            mix_of(a),
            a["direction"],
            grid,
            block,
        )
        outs = zip(a["alphas"], a["plus"] or a["minus"], strict=True)
        off = [one_code(*pair, grid, draw.distribution) for pair in outs]
        return {k: a[k] for k in ("plus", "minus") if a[k]}, {"plus": off, "minus": off}
    if op == "measure_alphas":
        reference.measure_alphas_(a["alphas"], a["tensors"], Measure(*case["measure"]))
        return {"alphas": a["alphas"]}, {"alphas": [2e-6 * alpha.nan_to_num(0, 0) for alpha in a["alphas"]]}
    if op == "hadamard":
        reference.hadamard_(a["out"], a["tensors"], block)
        return {"out": a["out"]}, {}
    if op == "quantize":
        reference.quantize_(a["out"], a["latents"], a["alphas"], grid, block)
        return {"out": a["out"]}, {}
    if op in ("straight_through_backward", "learned_backward"):
        straight_through, lists = fk.StraightThrough(*case["kind"]), (a["grads"], a["latents"], a["alphas"])
        reference.straight_through_backward_(a["out"], *lists, grid, straight_through, block)
        tanh, found = case["kind"][0] == "tanh", {"out": a["out"]}
        off = {"out": list(map(slope_error, a["out"], a["grads"]))} if tanh else {}
        if op == "learned_backward":
            found["alpha_grads"], factors = a["alpha_grads"], a["factors"]
            reference.learned_backward_(*found.values(), *lists, grid, straight_through, factors, block)
            off["alpha_grads"] = alpha_errors(*lists, factors, grid, block)
        return found, off
    if op == "estimate_gradient":
        off = estimate_errors(a, mix_of(a), losses_of(a), draw, grid, m_off, block)
        reference.estimate_gradient_(a["grads"], a["alphas"], draw, mix_of(a), losses_of(a), grid.r, block)
        return {"grads": a["grads"], "counters": a["counters"]}, {"grads": off}
    return updated(case, a, draw, grid), {}


def updated(case, a, draw, grid):
    """The fused tail: to the bit what the reference makes of the G that the native estimate gives."""
    G, lists = [g.float() for g in a["grads"]], ("latents", "masters", "first", "second")
    quantizing, mix, block = len(a["alphas"]), mix_of(a), case["block"]
    directions = losses_of(a).directions
    skip = directions and not math.isfinite(a["norm"])
    if directions:
        drawn = [a[k] for k in ("distribution", "noise_scale", "seed", "step", "tensor_ids", "layouts")]
        mixed = a["norm"], a["one_minus_beta"], a["epsilon"], a["factors"]
        losses = a["losses_plus"], a["losses_minus"], [], a["guided"]
        native.estimate_gradient(G[:quantizing], a["alphas"], *drawn, *mixed, *losses, grid.r, block)
        reference.coefficients(a["grads"], a["alphas"], draw, mix, losses_of(a))
    if not skip:
        rule = rule_of(case)
        states = [a["first"], a["second"]][: rule.states]
        update = Update(rule, a["lr"], a["optimizer_step"], a["masters"], states)
        none = Losses(torch.zeros(0), torch.zeros(0), None, False)
        reference.estimate_update_(a["latents"], [], G, a["alphas"], draw, mix, none, grid, update, block)
    if a["quantized"]:
        reference.quantize_(a["quantized"], a["latents"][:quantizing], a["alphas"], grid, block)
    return {k: a[k] for k in (*lists, "quantized", "counters")}


def copied(value):
    if isinstance(value, list):
        return [copied(x) for x in value]
    return value.clone() if isinstance(value, torch.Tensor) else value
