"""The native learned_backward by itself, past the checks in Python: what it refuses and writes."""

import pytest
import torch
from support.native_calls import inside, of_list, refusal
from support.samples import INF, NAN, SHAPES, names_of, native, native_arguments
from support.spoiled import item, joined, one, put
from torch import Tensor

LEARNED = ("learned_backward",)
ROWS = [
    *of_list("latents", LEARNED, first=True), *of_list("grads", LEARNED), *of_list("out", LEARNED),
    (LEARNED, item("alphas", 0, Tensor.half), "dtype"),
    (LEARNED, one("alphas", lambda v: v[:1]), "length"),
    (LEARNED, item("alphas", 1, lambda t: torch.full((1, 8), 0.5)), "shape"),
    (LEARNED, put(alphas=[torch.tensor(0.0), torch.ones(4, 1)]), "alphas"),
    # alpha_grads
    (LEARNED, one("alpha_grads", lambda v: v[:1]), "length"),
    (LEARNED, item("alpha_grads", 1, Tensor.double), "dtype"),
    (LEARNED, item("alpha_grads", 0, Tensor.bfloat16), "dtype"),
    (LEARNED, item("alpha_grads", 1, lambda t: torch.ones(4)), "shape"),
    (LEARNED, item("alpha_grads", 0, lambda t: torch.ones(1)), "shape"),
    (LEARNED, item("alpha_grads", 1, lambda t: torch.ones(4, 2)[:, :1]), "memory"),
    (LEARNED, item("alpha_grads", 1, lambda t: t.to("meta")), "memory"),
    # the rest
    *((LEARNED, put(factors=x), "length") for x in ([], [1.0], [1.0] * 3)),
    *((LEARNED, put(factors=[1.0, x]), "factors") for x in (NAN, INF, -INF)),
    (LEARNED, put(straight_through="unheard"), "straight_through"),
    (LEARNED, put(qmin=-129), "grid"),
    (LEARNED, put(offset=0.25), "grid"),
    (LEARNED, put(r=3), "grid"),
    # memory
    *((LEARNED, joined(a, b), "overlap") for a, b in (("out", "latents"), ("out", "grads"), ("out", "out"))),
    *((LEARNED, inside(name, (4, 1), of), "overlap") for name, of in (
        ("alphas", "out"), ("alpha_grads", "latents"), ("alpha_grads", "grads"), ("alpha_grads", "out"))),
    (LEARNED, lambda a: {"alpha_grads": a["alphas"]}, "overlap"),
]  # fmt: skip


def valid():
    """A valid call by the schema's names; what it writes holds 99."""
    known = native_arguments("straight_through_backward") | {
        "factors": [0.5, 2.0],
        "alpha_grads": [torch.tensor(99.0), torch.full((4, 1), 99.0)],
    }
    return {name: known[name] for name in names_of(*LEARNED)}


@pytest.mark.parametrize(("change", "reason"), [(change, reason) for _, change, reason in ROWS])
def test_bad_input_is_refused_and_nothing_is_written(change, reason):
    args = valid()
    changed = args | change(args)
    assert refusal(*LEARNED, {name: changed[name] for name in args}) == reason


def test_the_call_that_is_spoiled_is_valid():
    args = valid()
    native.learned_backward(*args.values())
    assert not any((t == 99.0).any() for t in [*args["alpha_grads"], *args["out"]])
    assert [t.shape for t in args["out"]] == [torch.Size(s) for s in SHAPES]


def test_g_may_be_written_in_place():
    apart, together = valid(), valid()
    together["out"] = together["grads"]
    for args in (apart, together):
        native.learned_backward(*args.values())
    for name in ("out", "alpha_grads"):
        assert all(map(torch.equal, apart[name], together[name]))
