"""The native CPU ops by themselves, past the checks in Python: they write what the reference does, and refuse
all that fogzo_kernels/ops refuses, by an error that names the reason, before anything is written."""

import pytest
import torch
from support.fuzz_spoil import cut
from support.native_calls import both, inside, listed, of_list, refusal
from support.samples import ADAMW, INF, NAN, SHAPES, f64, i64, native, native_arguments
from support.spoiled import item, joined, one, put
from torch import Tensor

import fogzo_kernels as fk
from fogzo_kernels import _C
from fogzo_kernels.backends import cpu, reference
from fogzo_kernels.spec import noise, scale, straight_through, update
from fogzo_kernels.spec.call import Draw, Losses, Mix, Update

BIG = 2**63 - 1
NOISE, SUMSQ, PERTURB, ESTIMATE = "noise", "guide_sumsq", "perturb_quantize", "estimate_gradient"
UPDATE, QUANTIZE, BACKWARD = "estimate_update", "quantize", "straight_through_backward"
OPS = (NOISE, SUMSQ, PERTURB, ESTIMATE, UPDATE, QUANTIZE, BACKWARD)
WRITTEN = {
    NOISE: {"out"}, SUMSQ: {"out"}, PERTURB: {"plus", "minus"}, ESTIMATE: {"grads", "counters"},
    UPDATE: {"latents", "first", "second", "quantized", "counters"}, QUANTIZE: {"out"}, BACKWARD: {"out"},
}  # fmt: skip


# ---- what they write


def by_the_reference(op, a):
    """What the arguments of that call become."""
    grid = fk.Grid(a.get("qmin", -2), a.get("qmax", 1), a.get("offset", 0.0), a["r"]) if "r" in a else None
    if "seed" in a:
        triples = [tuple(a["layouts"][i : i + 3]) for i in range(0, len(a["layouts"]), 3)]
        draw = Draw(a["distribution"], a["seed"], a["step"], a["tensor_ids"], triples)
    if "norm" in a:
        mix = Mix(a["norm"], a["one_minus_beta"], a["epsilon"], next(iter(a["factors"]), None))
    if "losses_plus" in a:
        losses = Losses(a["losses_plus"], a["losses_minus"], a["counters"][0], a["guided"])
    match op:
        case "noise":
            a["out"] = reference.noise(32, draw, a["direction"], torch.device("cpu"))
        case "guide_sumsq":
            a["out"] = reference.guide_sumsq(a["grads"], a["alphas"], a["r"], False, a["out"].dim() > 0)
        case "perturb_quantize":
            lists = [a[k] for k in ("plus", "minus", "latents", "grads", "alphas")]
            reference.perturb_quantize_(*lists, draw, mix, a["direction"], grid, 0)
        case "estimate_gradient":
            reference.estimate_gradient_(a["grads"], a["alphas"], draw, mix, losses, a["r"], 0)
        case "estimate_update":
            rule = Update(ADAMW, a["lr"], a["optimizer_step"], [], [a["first"], a["second"]])
            lists = [a[k] for k in ("latents", "quantized", "grads", "alphas")]
            reference.estimate_update_(*lists, draw, mix, losses, grid, rule, 0)
        case "quantize":
            reference.quantize_(a["out"], a["latents"], a["alphas"], grid, 0)
        case "straight_through_backward":
            lists = [a[k] for k in ("out", "grads", "latents", "alphas")]
            reference.straight_through_backward_(*lists, grid, fk.StraightThrough(), 0)
    return a


def copied(args):
    def copy(value):
        return value.clone() if isinstance(value, Tensor) else value

    return {k: [copy(x) for x in v] if isinstance(v, list) else copy(v) for k, v in args.items()}


@pytest.mark.parametrize("op", OPS)
def test_a_valid_call_writes_what_the_reference_does_and_nothing_else(op):
    args = native_arguments(op)
    before = copied(args)
    getattr(native, op)(*args.values())
    wanted = by_the_reference(op, copied(before))
    for name, value in args.items():
        for found, old, new in zip(listed(value), listed(before[name]), listed(wanted[name]), strict=True):
            if name in WRITTEN[op]:
                assert not torch.equal(found, old), name
                torch.testing.assert_close(found, new, rtol=2e-6, atol=2e-6, msg=name)
            elif isinstance(found, Tensor):
                assert torch.equal(found, old), name


def test_the_last_element_index_is_taken():
    for layout in ([2**51 - 32, 32, 32], [2**51 - 32, BIG, 1], [0, 1, (2**51 - 1) // 31]):
        args = {**native_arguments(NOISE), "layouts": layout}
        wanted = by_the_reference(NOISE, copied(args))["out"]
        native.noise(*args.values())
        assert torch.equal(args["out"], wanted), layout


# ---- what they refuse


def halves(*names):
    """As bfloat16, which masters go with."""
    return lambda args: {name: [t.bfloat16() for t in args[name]] for name in names}


MASTERED = both(halves("latents"), put(masters=[torch.ones(s) for s in SHAPES]))  # valid


LISTS, MIXED = (SUMSQ, PERTURB, ESTIMATE, UPDATE, QUANTIZE, BACKWARD), (PERTURB, ESTIMATE, UPDATE)
DRAWN, GRIDS = (NOISE, *MIXED), (PERTURB, UPDATE, QUANTIZE, BACKWARD)
SCALARS = (
    (DRAWN, "seed"), (DRAWN, "step"), (MIXED, "one_minus_beta"), ((UPDATE,), "lr"),
    ((UPDATE,), "optimizer_step"),
)  # fmt: skip
NAMES, VALUES = list(ADAMW.hyperparameters), list(ADAMW.hyperparameters.values())
ROWS = [
    *of_list("latents", GRIDS, first=True), *of_list("grads", (SUMSQ, ESTIMATE), first=True),
    *of_list("grads", (PERTURB, UPDATE, BACKWARD)), *of_list("plus", (PERTURB,)),
    *of_list("quantized", (UPDATE,)), *of_list("out", (QUANTIZE, BACKWARD)), *of_list("minus", (PERTURB,)),
    *of_list("minus", (PERTURB,), before=put(plus=[])),
    *of_list("first", (UPDATE,)), *of_list("second", (UPDATE,)),
    *of_list("masters", (UPDATE,), before=MASTERED),
    ((PERTURB, QUANTIZE, BACKWARD), put(latents=[torch.ones(3, dtype=torch.int8), torch.ones(4, 8)]), "dtype"),
    ((PERTURB,), put(plus=[], minus=[]), "length"),
    ((UPDATE,), put(masters=[torch.ones(s) for s in SHAPES]), "dtype"),
    ((UPDATE,), put(rule="sgd"), "length"),
    ((UPDATE,), put(rule="momentum"), "length"),
    ((UPDATE,), put(second=[]), "length"),
    # alphas
    (LISTS, item("alphas", 0, Tensor.half), "dtype"),
    ((SUMSQ, PERTURB, ESTIMATE, QUANTIZE, BACKWARD), one("alphas", lambda v: v[:1]), "length"),
    ((UPDATE,), one("alphas", lambda v: [*v, v[0]]), "length"),
    (LISTS, item("alphas", 1, lambda t: torch.full((4, 2), 0.5)[:, :1]), "memory"),
    (LISTS, item("alphas", 1, lambda t: t.to("meta")), "memory"),
    (LISTS, item("alphas", 1, lambda t: cut(t.clone())), "memory"),
    *((LISTS, item("alphas", 1, lambda t, s=s: torch.full(s, 0.5)), "shape")
      for s in ((0,), (3,), (5, 1), (64,), (1, 8), (8,), (16,), (32,), (8, 1), (4, 3), (4, 1, 2))),
    *((LISTS, item("alphas", 1, lambda t, x=x: torch.tensor([0.5, 0.5, x, 0.5])), "alphas")
      for x in (-0.5, 0.0, NAN, INF, 2.0**-101, 2.0**101)),
    (LISTS, both(put(r=2), item("alphas", 0, lambda t: torch.tensor(2.0**100))), "alphas"),
    # names of noise
    *((DRAWN, put(step=i64(x)), "step") for x in (-1, 2**32, BIG)),
    *(((NOISE, PERTURB), put(direction=x), "direction") for x in (-1, 2**16)),
    *((DRAWN, one("tensor_ids", lambda v, x=x: [x, *v[1:]]), "tensor_ids") for x in (-1, 2**32 - 1)),
    (MIXED, one("tensor_ids", lambda v: v[:1]), "length"),
    ((NOISE,), one("tensor_ids", lambda v: v * 2), "length"),
    (MIXED, one("layouts", lambda v: v[:-1]), "length"),
    *((DRAWN, one("layouts", lambda v, w=w: [*w, *v[3:]]), "layouts")
      for w in ((-1, 3, 3), (0, 0, 3), (0, 1, 0), (0, 2, 1), (0, -BIG, 1), (2**51 - 2, 3, 3),
                (0, 1, 2**51 - 1), (0, 2, BIG), (BIG, BIG, BIG))),
    *((MIXED, put(tensor_ids=[4, 4], layouts=[8, 3, 3, 8, 8, stride]), "tensor_ids") for stride in (8, 16)),
    (DRAWN, put(distribution="Uniform"), "distribution"),
    # norm, 1 - beta, losses, counters
    (MIXED, one("norm", Tensor.double), "dtype"),
    (MIXED, one("norm", lambda t: t.view(1)), "shape"),
    *((ops, one(name, lambda t: t.to("meta")), "memory") for ops, name in ((MIXED, "norm"), *SCALARS)),
    *((ops, one(name, lambda t: t.view(1)), "shape") for ops, name in SCALARS),
    *((ops, one(name, Tensor.float), "dtype") for ops, name in SCALARS),
    *(((SUMSQ,), put(out=torch.zeros(s).double()), "shape") for s in ((1,), (3,), (2, 1))),
    (MIXED, one("factors", lambda v: v * 2), "length"),
    *((MIXED, item("factors", 0, change), reason)
      for change, reason in ((Tensor.double, "dtype"), (lambda t: t.to("meta"), "memory"),
                             (lambda t: t.repeat(2)[::2], "memory"),
                             (lambda t: t[:1].clone(), "noise_factors"),
                             (lambda t: t.view(2, 1), "noise_factors"),
                             (lambda t: t.new_tensor([0.5, -1.0]), "noise_factors"),
                             (lambda t: t.new_tensor([NAN, 1.0]), "noise_factors"),
                             (lambda t: t.new_tensor([0.5, INF]), "noise_factors"))),
    ((ESTIMATE, UPDATE), put(guided=True), "losses"),
    *((MIXED, put(one_minus_beta=f64(x)), "one_minus_beta") for x in (-0.5, 1.5, NAN, INF)),
    *(((ESTIMATE, UPDATE), one(name, change), reason)
      for name in ("losses_plus", "losses_minus")
      for change, reason in ((Tensor.double, "dtype"), (lambda t: t.view(1, 3), "losses"),
                             (torch.sum, "losses"), (lambda t: t.repeat(2)[::2], "memory"))),
    ((ESTIMATE,), put(losses_plus=torch.ones(0), losses_minus=torch.ones(0)), "losses"),
    ((ESTIMATE, UPDATE), put(losses_plus=torch.ones(2**16 + 1), losses_minus=torch.ones(2**16 + 1)), "losses"),
    ((ESTIMATE, UPDATE), one("losses_minus", lambda t: t[:1]), "losses"),
    *(((ESTIMATE, UPDATE), item("counters", 0, change), reason)
      for change, reason in ((Tensor.float, "dtype"), (lambda t: t[:2], "shape"),
                             (lambda t: t.view(3, 1), "shape"), (lambda t: t.to("meta"), "memory"))),
    ((ESTIMATE, UPDATE), one("counters", lambda v: v * 2), "length"),
    # numbers
    *((GRIDS, put(qmin=x), "grid") for x in (-129, 128, BIG)),
    *((GRIDS, put(qmax=x), "grid") for x in (-3, 128, 2**40)),
    *((GRIDS, put(offset=x), "grid") for x in (NAN, 0.25)),
    *((LISTS, put(r=x), "grid") for x in (0, 3)),
    ((BACKWARD,), put(straight_through="relu"), "straight_through"),
    ((UPDATE,), put(rule="lion"), "rule"),
    ((UPDATE,), put(names=NAMES[:-1], values=VALUES[:-1]), "hyperparameters"),
    ((UPDATE,), put(names=["weight_decay", *NAMES[:-1]]), "hyperparameters"),
    ((UPDATE,), put(names=["decay", *NAMES[1:]]), "hyperparameters"),
    ((UPDATE,), put(values=VALUES[:-1]), "length"),
    *(((UPDATE,), put(lr=f64(x)), "lr") for x in (-0.1, NAN, INF)),
    *(((UPDATE,), put(optimizer_step=i64(x)), "optimizer_step") for x in (0, -1)),
    # memory
    ((PERTURB,), lambda args: {"plus": args["latents"]}, "overlap"),
    *(((op,), joined(a, b), "overlap")
      for op, a, b in ((PERTURB, "plus", "minus"), (PERTURB, "minus", "grads"), (PERTURB, "plus", "plus"),
                       (ESTIMATE, "grads", "grads"), (QUANTIZE, "out", "latents"), (QUANTIZE, "out", "out"),
                       (BACKWARD, "out", "latents"), (BACKWARD, "out", "grads"), (UPDATE, "latents", "grads"),
                       (UPDATE, "first", "latents"), (UPDATE, "second", "first"),
                       (UPDATE, "quantized", "second"))),
    *((ops, inside("alphas", (4, 1), of), "overlap")
      for ops, of in (((PERTURB,), "plus"), ((ESTIMATE,), "grads"), ((UPDATE,), "latents"),
                      ((QUANTIZE, BACKWARD), "out"))),
    *((ops, inside(name, shape, of), "overlap")
      for ops, of in (((ESTIMATE,), "grads"), ((UPDATE,), "first"))
      for name, shape in (("norm", ()), ("losses_plus", (3,)), ("losses_minus", (3,)))),
]  # fmt: skip


def expanded(rows):
    return [
        pytest.param(op, change, reason, id=f"{op}-{reason}-{i}")
        for i, (ops, change, reason) in enumerate(rows)
        for op in ops
    ]


@pytest.mark.parametrize(("op", "change", "reason"), expanded(ROWS))
def test_bad_input_is_refused_and_nothing_is_written(op, change, reason):
    args = native_arguments(op)
    changed = args | change(args)
    assert refusal(op, {name: changed[name] for name in args}) == reason


def many(count):
    """Latents, outputs and alphas of a list that is sorted by its digits, in no order in memory."""
    memory = torch.zeros(count, 3, 2)
    memory[:, 2] = 1.0
    order = torch.randperm(count, generator=torch.Generator().manual_seed(1)).tolist()
    latents, out = ([memory[i, k] for i in order] for k in (0, 1))
    alphas = [memory[i, 2, :1] for i in order]
    return {**native_arguments(QUANTIZE), "latents": latents, "out": out, "alphas": alphas}


def test_long_lists_are_told_apart():
    args = many(1000)
    args["latents"][700].fill_(0.9)
    native.quantize(*args.values())
    assert [i for i, t in enumerate(args["out"]) if t.any()] == [700]


@pytest.mark.parametrize("place", [0, 1, 500, 999])
def test_one_overlap_in_a_long_list_is_seen(place):
    args = many(1000)
    args["latents"][(place + 300) % 1000] = args["out"][place]
    assert refusal(QUANTIZE, args) == "overlap"


def test_an_output_in_a_long_input_behind_a_short_one():
    """Inputs may overlap, so the neighbour below an output is not the one that reaches furthest."""
    memory = torch.ones(31)
    args = {
        **native_arguments(QUANTIZE), "latents": [memory[:30], memory[2:7], torch.ones(3)],
        "alphas": [torch.tensor(0.5)] * 3,
        "out": [torch.full((30,), NAN), torch.full((5,), NAN), memory[28:]],
    }  # fmt: skip
    assert refusal(QUANTIZE, args) == "overlap"


def test_names_differ_behind_an_empty_tensor():
    """An empty tensor draws nothing, and must not hide two others of one name."""
    args = {
        **native_arguments(ESTIMATE), "grads": [torch.ones(3), torch.zeros(0), torch.ones(3)],
        "tensor_ids": [4, 4, 4], "alphas": [torch.tensor(0.5)] * 3, "layouts": [0, 3, 3] * 3, "factors": [],
    }  # fmt: skip
    assert refusal(ESTIMATE, args) == "tensor_ids"
    args["grads"][2] = torch.zeros(0)
    native.estimate_gradient(*args.values())
    args["grads"], args["layouts"] = [torch.ones(3) for _ in "abc"], [0, 3, 3, 3, 3, 3, 6, 3, 3]
    native.estimate_gradient(*args.values())  # shards of one parameter


@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1), (4,), (4, 1), (4, 1, 1), (4, 4), (4, 2), (4, 8)])
def test_every_shape_of_alphas_that_fits_is_taken(shape, generator):
    args = native_arguments(QUANTIZE)
    args["alphas"][1] = 0.1 + torch.rand(shape, generator=generator)
    native.quantize(*args.values())
    wanted = by_the_reference(QUANTIZE, copied(args))["out"]
    assert all(map(torch.equal, args["out"], wanted))


def test_enumerations_and_constants_are_those_of_python():
    found = _C.names()
    assert found["distributions"] == list(noise.DISTRIBUTIONS)
    assert found["straight_throughs"] == list(straight_through.VARIANTS)
    assert found["statistics"] == list(scale.STATISTICS)
    assert found["rules"] == update.VARIANTS
    assert list(found["rules"]) == list(update.VARIANTS)
    assert found["hyperparameters"] == list(ADAMW.hyperparameters)
    assert found["dtypes"] == ["float32", "bfloat16", "float16", "int8"]
    constants = found["constants"]
    limits = {name for name in vars(noise) if name.startswith(("PHILOX_", "MAX_"))} - {"MAX_SEED"}
    assert set(constants) == {*limits, "SIGN_TENSOR_ID"}  # every 64-bit number is a seed
    assert constants == {name: getattr(noise, name) for name in constants}


def test_the_backend_says_that_it_checks_lists():
    assert cpu.CHECKS_LISTS is True
