"""Bad input to every public op: an error that names the argument, and nothing is written."""

import math
import re

import pytest
import torch
from support.samples import GUIDE, INF, MIX, NAN, ON_BACKENDS, OPS, arguments, f64, i64, tensors
from support.spoiled import item, joined, one, put, raises_and_writes_nothing, transposed_memory
from torch import Tensor

import fogzo_kernels as fk

PERTURB, ESTIMATE = MIX[:1], MIX[1:]
BACKWARD = ("straight_through_backward_", "learned_backward_")
MEASURE = ("measure_alphas_",)
LISTS = (*GUIDE, *MIX, "quantize_", *BACKWARD)
NAMED = (*MIX, "noise", "direction_sign")
DIRECTED = ("perturb_quantize_", "noise", "direction_sign")
SMOOTHED = (*MIX, "quantize", *BACKWARD)
FLOATS = "float32 or bfloat16 or float16"


# ---- how a valid call is spoiled


def shorter(name):
    return lambda args: {name: args[name][:-1]}


def of_list(name, ops, expects=FLOATS, like=True):
    """What is wrong with a list of tensors, whatever it holds."""
    rows = [
        (ops, item(name, 0, Tensor.double), TypeError, f"{name}[0] must be {expects}, got float64"),
        (ops, item(name, 1, Tensor.half), TypeError,
         f"{name}[1] must have the dtype of {name}[0], float32, got float16"),
        (ops, item(name, 1, transposed_memory), ValueError,
         f"{name}[1] must be contiguous, got strides (1, 4)"),
        (ops, item(name, 1, Tensor.tolist), TypeError, f"{name}[1] must be a tensor, got list"),
        (ops, item(name, 1, lambda t: t.to("meta")), ValueError, f"{name}[1] must be on "),
        (ops, put(**{name: 3.5}), TypeError, f"{name} must be"),
    ]  # fmt: skip
    if like:
        rows += [
            (ops, shorter(name), ValueError, f"{name} must have 2 tensors, got 1"),
            (ops, item(name, 1, lambda t: t.t().contiguous()), ValueError,
             f"{name}[1] must have shape (4, 8), got (8, 4)"),
            (ops, item(name, 0, lambda t: t[:2]), ValueError,
             f"{name}[0] must have shape (3,), got (2,)"),
        ]  # fmt: skip
    return rows


def of_int(name, ops, limit):
    """What is wrong with a number of the noise's name."""
    wanted, wrong_type = f"{name} must be in 0..{limit - 1}, got ", f"{name} must be an int, got "
    rows = [(ops, put(**{name: x}), ValueError, f"{wanted}{x}") for x in (-1, limit)]
    return rows + [(ops, put(**{name: x}), TypeError, wrong_type + type(x).__name__) for x in (1.5, "1", None)]


def of_python_int(name, ops):
    """Of numbers that the op's schema, which takes these for an int, never sees."""
    wanted = f"{name} must be an int, got "
    return [(ops, put(**{name: x}), TypeError, wanted + type(x).__name__) for x in (True, 1.5)]


def of_int_tensor(name):
    ops, wanted = (*MIX, "noise"), f"{name} must be a 0-dim int64 tensor, got "
    return [
        (ops, put(**{name: torch.tensor(1.0)}), TypeError, wanted + "float32 ()"),
        (ops, put(**{name: i64([1, 2])}), TypeError, wanted + "int64 (2,)"),
        (("direction_sign",), put(**{name: i64(1)}), TypeError, f"{name} must be an int, got T"),
    ]


def of_layouts(layout, wanted):
    """The same bad layout of tensor 1 of the lists, and of noise."""
    return [
        (MIX, put(layouts=[(0, 3, 3), layout]), ValueError, f"layouts[1] must {wanted}"),
        (("noise",), put(layout=layout, numel=32), ValueError, f"layout must {wanted}"),
    ]


def view_of_grads(name, shape):
    """Argument ``name`` becomes a view of grads[1], which holds ones."""

    def change(args):
        grads = [args["grads"][0], torch.ones_like(args["grads"][1])]
        view = grads[1].flatten()[: math.prod(shape)].view(shape)
        listed = isinstance(args[name], list)
        return {"grads": grads, name: [args[name][0], view] if listed else view}

    return change


SHAPE_OF_ALPHA = "shape (4, groups), for a tensor of shape (4, 8), got shape "
LAYOUT = "be (offset >= 0, inner >= 1, stride >= inner), got "
LOSSES = "must be a contiguous float32 tensor of shape (n,), got "
COUNTERS = "counters must be an int64 tensor of shape (3,), got "
FACTORS = "noise_factors must be a contiguous float32 tensor of shape (2,), got "
NO_LOSSES = "must be a Tensor where the other losses are one, got None"

# ops, how the call is spoiled, exception, message
CASES = [
    *of_list("grads", (*GUIDE, "estimate_gradient_"), like=False),
    *of_list("grads", ("perturb_quantize_", *BACKWARD)),
    *of_list("latents", ("perturb_quantize_", "quantize_", *BACKWARD), like=False),
    *of_list("tensors", MEASURE, like=False),
    *of_list("plus", PERTURB, f"{FLOATS} or int8"),
    *of_list("minus", PERTURB, f"{FLOATS} or int8"),
    *of_list("out", ("quantize_",), f"{FLOATS} or int8"),
    (PERTURB, one("minus", lambda ts: [t.bfloat16() for t in ts]), TypeError,
     "minus must have the dtype of plus, float32, got bfloat16"),
    (PERTURB, put(plus=None, minus=None), ValueError, "plus and minus must not both be None"),
    # the one latent of quantize
    (("quantize",), one("latent", Tensor.double), TypeError, f" must be {FLOATS}, got float64"),
    (("quantize",), one("latent", Tensor.t), ValueError, " must be contiguous, got strides (1, 8)"),
    (("quantize",), put(latent=3.5), TypeError, "latent must be a Tensor, got float"),
    (("quantize",), one("alpha", Tensor.half), TypeError, " must be float32, got float16"),
    (("quantize", "dequantize"), put(alpha=0.5), TypeError, "alpha must be a Tensor, got float"),
    (("dequantize",), one("alpha", lambda t: t.expand(3).clone()), ValueError, "shape (4, 8), got"),
    (("dequantize",), one("alpha", Tensor.double), TypeError, "must be float32, got float64"),
    (("dequantize",), one("codes", Tensor.float), TypeError, "codes must be int8, got float32"),
    (("dequantize",), put(codes=3), TypeError, "codes must be"),
    (("dequantize",), put(dtype=torch.int8), TypeError, f"dtype must be {FLOATS}, got int8"),
    # alphas
    ((*LISTS, *MEASURE), shorter("alphas"), ValueError, "alphas must have 2 tensors, got 1"),
    ((*LISTS, *MEASURE), put(alphas=0.5), TypeError, "alphas must be"),
    ((*LISTS, *MEASURE), put(alphas=[0.5, 0.5]), TypeError, "alphas[0] must be a tensor, got float"),
    ((*LISTS, *MEASURE), item("alphas", 1, Tensor.bfloat16), TypeError, "alphas[1] must be float32, got b"),
    ((*LISTS, *MEASURE), item("alphas", 1, lambda t: t.to("meta")), ValueError, "alphas[1] must be on "),
    ((*LISTS, *MEASURE), item("alphas", 1, lambda t: t[:3]), ValueError,
     "alphas[1] must have one element, one per row, shape (4, 1), or one per group of the last dimension,"
     f" {SHAPE_OF_ALPHA}(3, 1)"),
    ((*LISTS, *MEASURE), item("alphas", 1, lambda t: t[:2]), ValueError, SHAPE_OF_ALPHA + "(2, 1)"),
    ((*LISTS, *MEASURE), item("alphas", 1, lambda t: t[:0]), ValueError, SHAPE_OF_ALPHA + "(0, 1)"),
    ((*LISTS, *MEASURE), item("alphas", 1, lambda t: t.repeat(1, 16)), ValueError, SHAPE_OF_ALPHA + "(4, 16)"),
    ((*LISTS, *MEASURE), item("alphas", 1, lambda t: t[:1].expand(4, 1)), ValueError,
     "alphas[1] must be contiguous, got strides "),
    # the names of noise
    *of_int("seed", NAMED, 2**64), *of_int_tensor("seed"), *of_python_int("seed", NAMED),
    *of_int("step", NAMED, 2**32), *of_int_tensor("step"), *of_python_int("step", NAMED),
    ((*MIX, "noise"), put(step=i64(-1)), ValueError, "step must be in 0..4294967295, got -1"),
    ((*MIX, "noise"), put(step=i64(2**32)), ValueError, "step must be in 0..4294967295, got 42949"),
    *of_int("direction", DIRECTED, 2**16), *of_python_int("direction", ("direction_sign",)),
    *of_int("tensor_id", ("noise",), 2**32 - 1),
    *of_int("numel", ("noise",), 2**51), *of_python_int("numel", ("noise",)),
    (("noise",), put(distribution="cauchy"), ValueError, "distribution must be one of uniform, "),
    (MIX, put(tensor_ids=[4]), ValueError, "tensor_ids must have 2 entries, got 1"),
    (MIX, put(tensor_ids=[4, -1]), ValueError, "tensor_ids[1] must be in 0..4294967294, got -1"),
    (MIX, put(tensor_ids=[2**32 - 1, 4]), ValueError, "tensor_ids[0] must be in 0..4294"),
    (MIX, put(tensor_ids=[4, 0.5]), TypeError, "tensor_ids[1] must be an int, got float"),
    (MIX, put(tensor_ids=7), TypeError, "tensor_ids must"),
    (MIX, put(tensor_ids=[4, 4], layouts=None), ValueError,
     "tensor_ids[1] must differ from tensor_ids[0] unless the two are shards at different offsets,"
     " got 4 at offset 0 for both"),
    (MIX, put(layouts=[(0, 3, 3)]), ValueError, "layouts must have 2 entries, got 1"),
    (MIX, put(layouts=[(0, 3, 3), (0, 8)]), ValueError,
     "layouts[1] must be (offset, inner, stride), got (0, 8)"),
    (MIX, put(layouts=[(0, 3, 3), 5]), TypeError, "layouts[1] must be (offset, inner, stride)"),
    (MIX, put(layouts=[(0, 3, 3), (0.5, 8, 8)]), TypeError, "layouts[1][0] must be an int, got float"),
    (("noise",), put(layout=(0, 4)), ValueError, "must be (offset, inner, stride), got (0, 4)"),
    *of_layouts((-1, 32, 32), LAYOUT + "(-1, 32, 32)"),
    *of_layouts((0, 0, 8), LAYOUT + "(0, 0, 8)"),
    *of_layouts((0, 8, 7), LAYOUT + "(0, 8, 7)"),
    *of_layouts((0, 32, 0), LAYOUT + "(0, 32, 0)"),
    *of_layouts((2**51 - 31, 32, 32), f"keep element indices below 2^51, got {2**51}"),
    *of_layouts((7, 8, 2**50), f"keep element indices below 2^51, got {3 * 2**50 + 14}"),
    # the mixing of guide and noise
    (MIX, one("norm", Tensor.double), TypeError,
     "norm must be a 0-dim float32 tensor, got float64 ()"),
    (MIX, one("norm", lambda t: t.view(1)), TypeError,
     "norm must be a 0-dim float32 tensor, got float32 (1,)"),
    (MIX, put(norm=2.0), TypeError, "norm must be a Tensor, got float"),
    (MIX, one("norm", lambda t: t.to("meta")), ValueError, "norm must be on "),
    *((MIX, put(one_minus_beta=x), ValueError, f"one_minus_beta must be in 0..1, got {float(x)}")
      for x in (-0.5, 1.5, NAN, INF, f64(-0.5), f64(1.5), f64(NAN))),
    (MIX, put(one_minus_beta=torch.tensor(0.5)), TypeError,
     "one_minus_beta must be a 0-dim float64 tensor, got float32 ()"),
    (MIX, put(one_minus_beta=f64([0.5])), TypeError,
     "one_minus_beta must be a 0-dim float64 tensor, got float64 (1,)"),
    (MIX, put(one_minus_beta="0.5"), TypeError, "one_minus_beta must be"),
    *((MIX, put(epsilon_scale=x), ValueError, f"epsilon_scale must be finite and >= 0, got {x}")
      for x in (-1.0, NAN, INF)),
    (MIX, put(epsilon_scale="1"), TypeError, "epsilon_scale must be"),
    *((MIX, one("noise_factors", change), TypeError, FACTORS + got)
      for change, got in ((Tensor.double, "float64 (2,)"), (lambda t: t.view(2, 1), "float32 (2, 1)"),
                          (lambda t: t[:1], "float32 (1,)"), (lambda t: t.repeat(2)[::2], "float32 (2,)"))),
    (MIX, one("noise_factors", lambda t: t.to("meta")), ValueError, "noise_factors must be on "),
    (MIX, put(noise_factors=2.0), TypeError, "noise_factors must be a Tensor, got float"),
    *((MIX, put(noise_factors=torch.tensor([0.5, x])), ValueError,
       "noise_factors must be finite and >= 0, got ")
      for x in (-1.0, NAN, INF, -INF)),
    (("guide_sumsq",), put(per_tensor=1), TypeError, "per_tensor must be "),
    # losses and counters
    (ESTIMATE, put(losses_plus=None), TypeError, f"losses_plus {NO_LOSSES}"),
    (ESTIMATE, put(losses_minus=None), TypeError, f"losses_minus {NO_LOSSES}"),
    *((ESTIMATE, change, TypeError, f"{name} {LOSSES}{got}")
      for name in ("losses_plus", "losses_minus")
      for change, got in ((one(name, Tensor.double), "float64 (2,)"),
                          (one(name, lambda t: t.view(1, 2)), "float32 (1, 2)"),
                          (one(name, torch.sum), "float32 ()"),
                          (one(name, lambda t: t.repeat(2)[::2]), "float32 (2,)"))),
    (ESTIMATE, put(losses_plus=2.0), TypeError, "losses_plus must be a Tensor, got float"),
    (ESTIMATE, one("losses_plus", lambda t: t[:0]), ValueError,
     "losses_plus must have 1..65536 entries, got 0"),
    (ESTIMATE, one("losses_plus", lambda t: t.repeat(2**15 + 1)), ValueError,
     "losses_plus must have 1..65536 entries, got 65538"),
    (ESTIMATE, one("losses_minus", lambda t: t[:1]), ValueError,
     "losses_minus must have shape (2,), got (1,)"),
    (ESTIMATE, one("losses_minus", lambda t: t.to("meta")), ValueError, "losses_minus must be on "),
    (ESTIMATE, one("counters", Tensor.int), TypeError, COUNTERS + "int32 (3,)"),
    (ESTIMATE, one("counters", lambda t: t[:2]), TypeError, COUNTERS + "int64 (2,)"),
    (ESTIMATE, one("counters", lambda t: t.to("meta")), ValueError, "counters must be on "),
    # the grid and its straight-through estimator
    (SMOOTHED, put(grid=fk.Grid.sign()), ValueError,
     "straight_through must be 'identity' for rounding grids and one of hardtanh, tanh, approxsign"
     " for the sign grid, got 'identity' with Grid(qmin=-1,"),
    (SMOOTHED, put(straight_through=fk.StraightThrough("tanh")), ValueError,
     "straight_through must be 'identity' for rounding grids"),
    (SMOOTHED, put(straight_through="identity"), TypeError, "straight_through must be"),
    ((*LISTS, "quantize", "dequantize"), put(grid="sign"), TypeError, "grid must be"),
    # alphas from data
    (MEASURE, put(statistic="median"), ValueError,
     "statistic must be one of absmax, absmean, rms, got 'median'"),
    (MEASURE, put(statistic=None), TypeError, "statistic must be a str, got NoneType"),
    *((MEASURE, put(factor=x), ValueError, f"factor must be in 1.17549e-38..3.40282e+38, got {x}")
      for x in (0.0, -1.0, 1e-39, 1e39, NAN, INF)),
    *((MEASURE, put(**{name: x}), ValueError, f"{name} must be in 0..3.40282e+38, got {x}")
      for name in ("add", "least") for x in (-1e-9, 1e39, NAN, INF)),
    *((MEASURE, put(**{name: x}), TypeError, f"{name} must be a number, got ")
      for name in ("factor", "add", "least") for x in ("1", True, torch.tensor(1.0))),
    # memory
    (MEASURE, joined("alphas", "tensors"), ValueError,
     "alphas[1] must not share memory with tensors[1]"),
    (MEASURE, joined("alphas", "alphas"), ValueError,
     "alphas[1] must not share memory with alphas[0]"),
    (PERTURB, lambda args: {"plus": args["latents"]}, ValueError,
     "] must not share memory with latents["),
    (PERTURB, lambda args: {"minus": args["grads"]}, ValueError,
     "] must not share memory with grads["),
    (PERTURB, joined("plus", "minus"), ValueError,
     "minus[1] must not share memory with plus[1]"),
    (PERTURB, joined("plus", "plus"), ValueError,
     "plus[1] must not share memory with plus[0]"),
    (("estimate_gradient_", *BACKWARD), joined("grads", "grads"), ValueError,
     "grads[1] must not share memory with grads[0]"),
    (("quantize_",), joined("out", "latents"), ValueError,
     "out[1] must not share memory with latents[1]"),
    (("quantize_",), joined("out", "out"), ValueError,
     "out[1] must not share memory with out[0]"),
    (BACKWARD, joined("grads", "latents"), ValueError,
     "grads[1] must not share memory with latents[1]"),
    (("estimate_gradient_", *BACKWARD), view_of_grads("alphas", (4, 1)), ValueError,
     "grads[1] must not share memory with alphas[1]"),
    *((ESTIMATE, view_of_grads(name, shape), ValueError,
       f"grads[1] must not share memory with {name}[0]")
      for name, shape in (("norm", ()), ("losses_plus", (2,)), ("losses_minus", (2,)),
                          ("noise_factors", (2,)))),
    # backends
    (ON_BACKENDS, put(backend="abacus"), ValueError, "backend must be one of cpu, triton, "),
    (ON_BACKENDS, put(backend=3), TypeError, "backend must be a string or None, got int"),
]  # fmt: skip
# What only the host can read: a backend on a device counts bad alphas instead of waiting for them.
ALPHA_CASES = [
    (op, value, fk.Grid.uniform(2))
    for op in (*LISTS, "quantize", "dequantize")
    for value in (-0.5, 0.0, NAN, INF, 2.0**-101, 2.0**101)
] + [("guide_norm", 2.0**100, fk.Grid.sign())]  # delta = 2 alpha


def expanded(cases):
    return [
        pytest.param(op, change, exception, message, id=f"{op}-{message[:60]}-{i}")
        for i, (ops, change, exception, message) in enumerate(cases)
        for op in ops
    ]


@pytest.mark.parametrize("chosen", ["cpu", "reference"])
@pytest.mark.parametrize(("op", "change", "exception", "message"), expanded(CASES))
def test_a_bad_argument_is_named_and_nothing_is_written(op, change, exception, message, chosen):
    """On a backend that checks its lists, and Python words what it refused; on one that does not."""
    args = arguments(op, "cpu") | ({"backend": chosen} if op in ON_BACKENDS else {})
    raises_and_writes_nothing(op, args | change(args), exception, re.escape(message))


@pytest.mark.parametrize("op", OPS)
def test_the_call_that_is_spoiled_is_valid(op, backend, device):
    """Else the cases above could fail for another reason; and it writes all that was poisoned."""
    args = arguments(op, device)
    before = [t.clone() for t in tensors(args)]
    getattr(fk, op)(**args, **({"backend": backend} if op in ON_BACKENDS else {}))
    unchanged = [torch.equal(t, old) for t, old in zip(tensors(args), before, strict=True)]
    assert all(unchanged) != op.endswith("_")
    assert not any(t.isnan().any() for t in tensors(args))


@pytest.mark.parametrize(("op", "value", "grid"), ALPHA_CASES)
def test_an_alpha_out_of_range_is_named(op, value, grid):
    args = arguments(op, "cpu") | {"grid": grid}
    if "alphas" in args:  # one row of many is enough
        args["alphas"][1][2] = value
    else:
        args["alpha"] = torch.tensor(value)
    limits = r"3.9443e-31..6.33825e\+29" if grid.is_sign else r"7.88861e-31..1.26765e\+30"
    message = rf"alphas?(\[[01]\])? must be finite, > 0 and in {limits}, got"
    raises_and_writes_nothing(op, args, ValueError, message)


def test_a_duplicate_id_behind_an_empty_tensor_is_named():
    """An empty tensor draws nothing, and must not hide two others of one name."""
    args = arguments("estimate_gradient_", "cpu") | {"tensor_ids": [4, 4, 4], "layouts": None}
    args["grads"] = [torch.zeros(0), torch.ones(3), torch.ones(3)]
    args["alphas"], args["noise_factors"] = [torch.tensor(0.5)] * 3, torch.ones(3)
    message = r"tensor_ids\[2\] must differ from tensor_ids\[1\]"
    raises_and_writes_nothing("estimate_gradient_", args, ValueError, message)


def test_an_output_in_a_long_input_behind_a_short_one_is_named():
    """Inputs may overlap, so the neighbour below an output is not the one that reaches furthest."""
    memory = torch.ones(31)
    latents, alphas = [memory[:30], memory[2:7], torch.ones(3)], [torch.tensor(0.5)] * 3
    args = {"latents": latents, "alphas": alphas, "grid": fk.Grid.uniform(2)}
    args["out"] = [torch.full((30,), NAN), torch.full((5,), NAN), memory[28:]]
    message = r"out\[2\] must not share memory with latents\[0\]"
    raises_and_writes_nothing("quantize_", args, ValueError, message)
