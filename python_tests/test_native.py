"""Bad input to the native CPU ops, past the checks in Python: an error with the argument's name, no write."""

import math
import re

import pytest
import torch
from fuzz_spoil import cut, freed, misaligned

from fogzo_kernels import _C  # noqa: F401  registers the ops
from fogzo_kernels.spec.noise import DISTRIBUTIONS

native = torch.ops.fogzo_cpu
BIG = 2**63 - 1
N = 4000


def arguments(op):
    """A valid call by the schema's names; outputs hold 99."""
    known = {
        **{name: [torch.full((N,), 99.0)] for name in ("plus", "minus", "quantized")},
        **{name: [torch.ones(N)] for name in ("latents", "grads", "first", "second")},
        "masters": [], "counters": [torch.zeros(3, dtype=torch.int64)], "alphas": [torch.full((4,), 0.5)],
        "losses_plus": torch.ones(2), "losses_minus": torch.zeros(2), "norm": torch.tensor(2.0),
        "seed": 1, "step": 2, "one_minus_beta": 0.1, "direction": 0, "tensor_ids": [0],
        "layouts": [0, N, N], "layout": [0, N, N], "tensor_id": 0, "qmin": -2, "qmax": 1, "offset": 0.0,
        "r": 1, "distribution": "uniform", "noise_scale": DISTRIBUTIONS["uniform"], "scale": 1.0,
        "epsilon": 0.5, "rule": "adamw", "hyperparameters": [0.1, 0.9, 0.99, 1e-8, 0.0, 0.0], "lr": 0.1,
        "count": 1, "kind": "tanh", "clip": False,
        "out": {"noise": torch.full((N,), 99.0), "guide_sumsq": torch.tensor(99.0).double()}.get(
            op, [torch.full((N,), 99.0)]
        ),
    }  # fmt: skip
    return {a.name: known[a.name] for a in getattr(native, op).default._schema.arguments}


def tensors(args):
    found = [x for v in args.values() for x in (v if isinstance(v, list) else [v])]
    return [x for x in found if isinstance(x, torch.Tensor) and x.device.type == "cpu" and not x.is_mkldnn]


Q, P, E, U = "quantize", "perturb_quantize", "estimate_gradient", "estimate_update"
ONES = torch.ones(N)
ROWS = [
    (Q, "latents", lambda: [freed(torch.ones(N))],
     "latents[0] must have a storage of at least 16000 bytes, got 0"),
    (Q, "out", lambda: [freed(torch.ones(N))], "out[0] must have a storage of at least 16000 bytes, got 0"),
    (E, "alphas", lambda: [cut(torch.ones(4))], "alphas[0] must have a storage of at least 16 bytes, got 8"),
    (Q, "latents", lambda: [misaligned(ONES)], "latents[0] must be aligned to its elements of 4 bytes"),
    (Q, "latents", lambda: [ONES.to_mkldnn()], "latents[0] must have the strided layout"),
    (Q, "latents", lambda: [ONES.to("meta")], "latents[0] must be a tensor on the CPU"),
    (Q, "latents", lambda: [ONES.view(2, -1).t()], "latents[0] must be contiguous"),
    (Q, "latents", lambda: [ONES.double()],
     "latents[0] must be float32, bfloat16, float16, or int8 for codes, got Double"),
    (Q, "latents", lambda: [ONES.to(torch.int8)], "latents[0] must be float32, bfloat16 or float16, got int8"),
    (Q, "alphas", lambda: [torch.ones(3)], "alphas[0] must have a number of elements that divides 4000, got 3"),
    (Q, "alphas", lambda: [torch.ones(4).half()], "alphas[0] must be Float, got Half"),
    (Q, "alphas", list, "alphas must have 1 tensors, got 0"),
    (Q, "qmax", lambda: 2**40, "qmax must be in -2..127, got 1099511627776"),
    (Q, "qmin", lambda: -129, "qmin must be in -128..127, got -129"),
    (Q, "offset", lambda: math.nan, "offset must be 0 or 0.5, got nan"),
    (Q, "r", lambda: 3, "r must be in 1..2, got 3"),
    (P, "minus", lambda: [torch.full((N,), 99, dtype=torch.int8)], "minus[0] must be Float, got Char"),
    (P, "direction", lambda: 2**16, "direction must be in 0..65535, got 65536"),
    (P, "step", lambda: 2**32, "step must be in 0..4294967295, got 4294967296"),
    (P, "step", lambda: -1, "step must be in 0..4294967295, got -1"),
    (P, "tensor_ids", lambda: [2**32 - 1], "tensor_ids[0] must be in 0..4294967294, got 4294967295"),
    (P, "layouts", lambda: [0, 1, 2**51 - 1], "layouts[0] must keep element indices below 2^51, got (0, 1, "),
    (P, "layouts", lambda: [0, 2, BIG], "layouts[0] must keep element indices below 2^51"),
    (P, "layouts", lambda: [BIG, BIG, BIG], "layouts[0] must keep element indices below 2^51"),
    (P, "layouts", lambda: [0, 2, 1],
     "layouts[0] must be (offset >= 0, inner >= 1, stride >= inner), got (0, 2, 1)"),
    (P, "distribution", lambda: "Uniform", "distribution must be a known one, got Uniform"),
    ("noise", "layout", lambda: [2**51 - 1, N, N], "layouts[0] must keep element indices below 2^51"),
    ("guide_sumsq", "out", lambda: torch.zeros(2).double(), "out must have 1 element, got 2"),
    ("straight_through_backward", "kind", lambda: "relu", "straight_through must be a known one, got relu"),
    (E, "losses_plus", lambda: torch.ones(3), "losses_minus must have 3 elements, got 2"),
    (E, "losses_plus", lambda: torch.ones(0), "the number of losses_plus must be in 1..65536, got 0"),
    (E, "norm", lambda: torch.ones(1).double(), "norm must be Float, got Double"),
    (U, "norm", lambda: torch.ones(2), "norm must have 1 element, got 2"),
    (E, "counters", lambda: [torch.zeros(2, dtype=torch.int64)], "counters must have 3 elements, got 2"),
    (E, "counters", lambda: [torch.zeros(3, dtype=torch.int64)] * 2,
     "counters must have at most 1 tensor, got 2"),
    (U, "count", lambda: 0, "count must be >= 1, got 0"),
    (U, "hyperparameters", lambda: [0.1], "hyperparameters must be 6 numbers, got 1"),
    (U, "rule", lambda: "lion", "rule must be a known one, got lion"),
    (U, "second", list, "second must have 1 tensors for adamw, got 0"),
    (U, "masters", lambda: [ONES.half()], "masters[0] must be Float, got Half"),
    (U, "alphas", lambda: [torch.ones(1)] * 2, "alphas must have at most 1 tensors, got 2"),
]  # fmt: skip


@pytest.mark.parametrize(("op", "name", "bad", "message"), ROWS)
def test_bad_input_is_named_and_nothing_is_written(op, name, bad, message):
    args = {**arguments(op), name: bad()}
    before = [t.clone() if t.untyped_storage().nbytes() >= t.nbytes else None for t in tensors(args)]
    with pytest.raises(RuntimeError, match=re.escape(message)):
        getattr(native, op)(*args.values())
    for t, old in zip(tensors(args), before, strict=True):
        assert old is None or torch.equal(t, old)


@pytest.mark.parametrize("op", [Q, P, E, U, "noise", "guide_sumsq", "straight_through_backward"])
def test_the_call_that_is_spoiled_is_valid(op):
    args = arguments(op)
    getattr(native, op)(*args.values())
    out = next(iter(args.values()))
    assert not torch.equal(out[0] if isinstance(out, list) else out, torch.full((N,), 99.0))


def test_the_last_element_index_is_taken():
    for layout in ([2**51 - N, N, N], [2**51 - N, BIG, 1], [0, 1, (2**51 - 1) // (N - 1)]):
        native.noise(*{**arguments("noise"), "layout": layout}.values())
