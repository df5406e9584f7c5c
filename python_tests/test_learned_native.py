"""The native learned_backward by itself, past the checks in Python: what it refuses and writes."""

import pytest
import torch
from test_native import (
    INF,
    NAN,
    SHAPES,
    Tensor,
    arguments,
    inside,
    item,
    joined,
    names_of,
    native,
    of_list,
    one,
    put,
    refused,
)

L = "learned_backward"
ROWS = [
    *of_list("latents", (L,), first=True), *of_list("grads", (L,)), *of_list("out", (L,)),
    ((L,), item("alphas", 0, Tensor.half), "alphas[0] must be float32, got float16"),
    ((L,), one("alphas", lambda v: v[:1]), "alphas must have 2 tensors, got 1"),
    ((L,), item("alphas", 1, lambda t: torch.full((1, 8), 0.5)), "alphas[1] must have one element, "),
    ((L,), put(alphas=[torch.tensor(0.0), torch.ones(4, 1)]), "alphas[0] must be finite, > 0 and in "),
    # alpha_grads
    ((L,), one("alpha_grads", lambda v: v[:1]), "alpha_grads must have 2 tensors, got 1"),
    ((L,), item("alpha_grads", 1, Tensor.double), "alpha_grads[1] must be float32, got float64"),
    ((L,), item("alpha_grads", 0, Tensor.bfloat16), "alpha_grads[0] must be float32, got bfloat16"),
    ((L,), item("alpha_grads", 1, lambda t: torch.ones(4)), "alpha_grads[1] must have shape (4, 1), got (4,)"),
    ((L,), item("alpha_grads", 0, lambda t: torch.ones(1)), "alpha_grads[0] must have shape (), got (1,)"),
    ((L,), item("alpha_grads", 1, lambda t: torch.ones(4, 2)[:, :1]), "alpha_grads[1] must be contiguous"),
    ((L,), item("alpha_grads", 1, lambda t: t.to("meta")), "alpha_grads[1] must be a tensor on the CPU"),
    # the rest
    *(((L,), put(factors=x), f"factors must have 2 entries, got {len(x)}") for x in ([], [1.0], [1.0] * 3)),
    *(((L,), put(factors=[1.0, x]), f"factors[1] must be finite, got {text}")
      for x, text in ((NAN, ""), (INF, "inf"), (-INF, "-inf"))),
    ((L,), put(straight_through="unheard"), "straight_through must be one of identity_clipped"),
    ((L,), put(qmin=-129), "qmin must be in -128..127, got -129"),
    ((L,), put(offset=0.25), "offset must be 0 or 0.5, got 0.25"),
    ((L,), put(r=3), "r must be in 1..2, got 3"),
    # memory
    *(((L,), joined(a, b), f"{a}[1] must not share memory with {b}[{0 if a == b else 1}]")
      for a, b in (("out", "latents"), ("out", "grads"), ("out", "out"))),
    *(((L,), inside(name, (4, 1), of), message) for name, of, message in (
        ("alphas", "out", "out[1] must not share memory with alphas[1]"),
        ("alpha_grads", "latents", "alpha_grads[1] must not share memory with latents[1]"),
        ("alpha_grads", "grads", "alpha_grads[1] must not share memory with grads[1]"))),
    ((L,), lambda a: {"alpha_grads": a["alphas"]}, "alpha_grads["),
    ((L,), inside("alpha_grads", (4, 1), "out"), ""),  # either may be named first
]  # fmt: skip


def valid():
    """A valid call by the schema's names; what it writes holds 99."""
    known = arguments("straight_through_backward") | {
        "factors": [0.5, 2.0],
        "alpha_grads": [torch.tensor(99.0), torch.full((4, 1), 99.0)],
    }
    return {name: known[name] for name in names_of(L)}


@pytest.mark.parametrize(("change", "message"), [(change, message) for _, change, message in ROWS])
def test_bad_input_is_named_and_nothing_is_written(change, message):
    args = valid()
    changed = args | change(args)
    found = refused(L, {name: changed[name] for name in args})
    assert found.startswith(message) or (not message and "must not share memory with" in found)


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
