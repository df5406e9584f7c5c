"""TensorList: the results and errors of plain lists, whatever happens to the tensors between calls."""

import copy
import gc
import pickle
import threading
from functools import partial

import pytest
import torch
from support.compiling import compiled
from support.samples import OPS, prepared, tensors
from support.samples import arguments as samples
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fogzo_kernels as fk
from fogzo_kernels import _C
from fogzo_kernels.backends import cpu, held
from fogzo_kernels.backends.gpu import plans

GRID = fk.Grid.uniform(2)
UPDATES = {"estimate_adamw_": ("exp_avgs", "exp_avg_sqs"), "estimate_sgd_": ("momentum_buffers",)}
LISTS = [op for op in OPS if op.endswith("_") or op.startswith("guide")]


def arguments(op, device):
    """A valid call of an op over lists."""
    if op not in UPDATES:
        return samples(op, device)
    args = samples("perturb_quantize_", device)
    args = {n: args[n] for n in args if n not in ("plus", "minus", "direction")} | {"quantized": args["plus"]}
    args |= {n: v for n, v in samples("estimate_gradient_", device).items() if n.startswith(("loss", "count"))}
    args |= {name: [torch.zeros_like(t) for t in args["latents"]] for name in UPDATES[op]}
    args |= {"lr": 0.1, "optimizer_step": 1} | ({"momentum": 0.5} if op == "estimate_sgd_" else {})
    args |= {name: [*args[name], torch.ones(5, device=device)] for name in ("latents", "grads", *UPDATES[op])}
    return args | {"tensor_ids": [4, 5], "layouts": [(0, 3, 3), (8, 8, 16)]}


def outcome(op, args, backend, change=lambda args: None):
    """What the second of two calls, between which tensors change, writes and returns; or its error."""
    call = partial(getattr(fk, op), **args, backend=backend)
    call()
    change(args)
    try:
        result = call()
    except (TypeError, ValueError, RuntimeError) as error:
        return type(error), str(error)
    return [*tensors(args), *([] if result is None else [result])]


def same(found, wanted):
    if isinstance(wanted, tuple):
        assert found == wanted
        return
    for x, y in zip(found, wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


def in_list(args):
    """The call with prepared lists; the fused tail has a latent without noise, whose name is not used."""
    if "exp_avgs" in args or "momentum_buffers" in args:
        args = args | {"tensor_ids": [*args["tensor_ids"], 0], "layouts": [*args["layouts"], (0, 1, 1)]}
    return prepared(args)


# ---- the same results and errors


@pytest.mark.parametrize("op", [*LISTS, *UPDATES])
def test_a_prepared_list_gives_the_bits_of_a_plain_one(op, backend, device):
    args = in_list(arguments(op, device))
    same(outcome(op, args, backend), outcome(op, arguments(op, device), backend))
    assert all(
        "hold" in vars(value) for value in args.values() if isinstance(value, fk.TensorList)
    )  # the fast way


@pytest.mark.parametrize("op", ["perturb_quantize_", *UPDATES])
def test_names_are_those_of_the_list_unless_others_are_given(op, backend, device):
    plain, names = arguments(op, device), {"tensor_ids": [7, 6], "layouts": [(8, 3, 3), (0, 4, 8)]}
    same(outcome(op, in_list(plain) | names, backend), outcome(op, arguments(op, device) | names, backend))
    none = {"tensor_ids": None, "layouts": None}
    bare = {n: fk.TensorList(v) if n == "latents" else v for n, v in arguments(op, device).items()} | none
    same(outcome(op, bare, backend), outcome(op, arguments(op, device) | none, backend))


def transposed(t):
    t.set_(torch.randn(8, 8, device=t.device))
    t.t_()


def refilled(t):
    """Its storage is freed and comes back, at the same address or at another."""
    data = t.clone()
    t.untyped_storage().resize_(0)
    t.untyped_storage().resize_(data.nbytes)
    t.copy_(data)


CHANGES = {
    "data": lambda t: setattr(t, "data", torch.linspace(-1, 1, t.numel(), device=t.device).view(t.shape)),
    "values": lambda t: t.mul_(2), "refilled": refilled,
    "storage": lambda t: t.set_(torch.linspace(-1, 1, t.numel(), device=t.device).view(t.shape)),
    "view": lambda t: setattr(t, "data", torch.ones(100, device=t.device)[1 : 1 + t.numel()].view(t.shape)),
    "shape": lambda t: setattr(t, "data", torch.ones(2, 3, device=t.device)), "resize": lambda t: t.resize_(5),
    "flat": lambda t: setattr(t, "data", t.detach().flatten()), "unsqueezed": lambda t: t.unsqueeze_(0),
    "dtype": lambda t: setattr(t, "data", t.detach().half()), "transposed": transposed,
    "bits": lambda t: setattr(t, "data", t.detach().view(torch.int32)),
    "device": lambda t: setattr(t, "data", t.detach().cpu()),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("op", ["perturb_quantize_", "estimate_gradient_", "learned_backward_"])
@pytest.mark.every_combination
def test_a_change_under_the_list_is_found(op, change, backend, device):
    """The right result, or the error of plain lists."""

    def changed(name):
        return lambda args: CHANGES[change](args[name][1])

    for name in ("latents", "grads", "plus", "alphas", "alpha_grads"):
        plain = arguments(op, device)
        if name in plain:
            found = outcome(op, prepared(arguments(op, device)), backend, changed(name))
            same(found, outcome(op, plain, backend, changed(name)))


@pytest.mark.parametrize("change", [lambda size: 0, lambda size: size // 2])
def test_memory_that_is_freed_under_the_list_is_refused(change):
    """Where plain lists are refused: on the CPU."""
    args = arguments("quantize_", "cpu")

    def cut(args):
        storage = args["latents"][1].untyped_storage()
        storage.resize_(change(len(storage)))

    wanted = outcome("quantize_", args, "cpu", cut)
    assert wanted[0] is RuntimeError
    assert outcome("quantize_", prepared(arguments("quantize_", "cpu")), "cpu", cut) == wanted


def test_what_is_written_may_not_come_to_lie_in_what_is_read(backend, device):
    for op, first, second in (("quantize_", "out", "latents"), ("estimate_gradient_", "grads", "norm")):
        for make in (dict, prepared):
            args = make(samples(op, device) | {"norm": torch.ones((), device=device)})
            args = {name: args[name] for name in args if name != "norm" or op != "quantize_"}
            getattr(fk, op)(**args, backend=backend)
            target = args[second] if isinstance(args[second], Tensor) else args[second][1]
            target.data = args[first][1].detach().flatten()[0] if second == "norm" else args[first][1].detach()
            with pytest.raises(ValueError, match=rf"{first}\[1\] must not share memory with {second}\["):
                getattr(fk, op)(**args, backend=backend)


def test_scalars_are_checked_in_each_call(backend, device):
    """Though the lists are known."""
    args = prepared(samples("estimate_gradient_", device))
    fk.estimate_gradient_(**args, backend=backend)
    for name, value, message in (
        ("step", 2**32, "step must be"), ("one_minus_beta", 2.0, "one_minus_beta must be"),
        ("norm", torch.ones(1, device=device), "norm must be"),
        ("losses_minus", torch.ones(3, device=device), "losses_minus must have shape"),
        ("counters", args["losses_plus"].new_zeros(3), "counters must be"),
        ("losses_plus", args["grads"][1].flatten()[:2], "must not share memory with losses_plus"),
        ("counters", torch.as_strided(args["grads"][1], (6,), (1,), 0).view(torch.int64), "share memory"),
    ):  # fmt: skip
        with pytest.raises((TypeError, ValueError), match=message):
            fk.estimate_gradient_(**args | {name: value}, backend=backend)


def test_calls_count_as_changes():
    out = nn.Parameter(torch.ones(4))
    squared = out * out.detach()
    fk.quantize_(fk.TensorList(out), fk.TensorList(torch.randn(4)), torch.tensor(0.5), grid=GRID)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squared.sum().backward()


# ---- what a list is


def test_a_list_is_an_immutable_sequence_of_its_tensors():
    given = [torch.ones(2), torch.ones(3)]
    made = fk.TensorList(given, tensor_ids=[3, 4], layouts=[(0, 2, 2), (8, 3, 3)])
    assert list(made) == given
    assert (len(made), made[1] is given[1], made.tensor_ids) == (2, True, (3, 4))
    with pytest.raises(TypeError):
        made[0] = given[1]
    for other in (copy.copy(made), copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert (type(other), other.tensor_ids, other.layouts) == (fk.TensorList, made.tensor_ids, made.layouts)
        torch.testing.assert_close([*other], given)
        fk.quantize_([torch.empty_like(t) for t in other], other, [torch.tensor(0.5)] * 2, grid=GRID)
    assert len(fk.TensorList([])) == 0
    fk.quantize_(fk.TensorList([]), fk.TensorList([]), fk.TensorList([]), grid=GRID)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"tensors": 3}, TypeError, "tensors must be a tensor or a list of tensors, got int"),
        ({"tensors": [1]}, TypeError, r"tensors\[0\] must be a tensor, got int"),
        ({"tensor_ids": 3}, TypeError, "tensor_ids must be a list of int, got int"),
        ({"tensor_ids": [1.0]}, TypeError, r"tensor_ids\[0\] must be an int, got float"),
        ({"tensor_ids": []}, ValueError, "tensor_ids must have 1 entries, got 0"),
        ({"layouts": [(0, 1)]}, ValueError, r"layouts\[0\] must be \(offset, inner, stride\)"),
        ({"layouts": [(0, 1, 1)] * 2}, ValueError, "layouts must have 1 entries, got 2"),
    ],
)
def test_bad_arguments_are_refused(given, error, message):
    with pytest.raises(error, match=message):
        fk.TensorList(**{"tensors": torch.ones(3), **given})


def test_a_list_like_another_has_its_names():
    first = fk.TensorList([torch.ones(2), torch.ones(3)], tensor_ids=[4, 5], layouts=[(0, 2, 2), (3, 3, 3)])
    other = first.like([torch.zeros(2), torch.zeros(3)])
    assert (other.tensor_ids, other.layouts, other.plain) == ((4, 5), ((0, 2, 2), (3, 3, 3)), True)
    assert other.number != first.number
    with pytest.raises(ValueError, match="tensors must have 2 entries, got 1"):
        first.like([torch.ones(2)])
    with pytest.raises(TypeError, match=r"tensors\[1\] must be a tensor, got int"):
        first.like([torch.ones(2), 3])


def test_native_code_lets_go_with_the_list():
    gc.collect()
    before, t = _C.held_lists(), torch.ones(3)
    for _ in range(3):
        made = fk.TensorList([t])
        fk.quantize_([torch.empty(3)], made, [torch.tensor(0.5)], grid=GRID)
        assert _C.held_lists() == before + 1
        with pytest.raises(ValueError, match="must have shape"):
            fk.quantize_([torch.empty(4)], made, [torch.tensor(0.5)], grid=GRID)
        del made
        assert _C.held_lists() == before
    assert t._use_count() == 1


def test_what_is_remembered_is_bounded(backend, device, monkeypatch):
    """Though each call has new lists."""
    monkeypatch.setattr(plans, "KEPT_BYTES", 1 << 16)
    monkeypatch.setattr(plans, "_of_states", plans.Recent())
    op = fk.ops.quantize.op_of_lists
    for _ in range(300 if backend == "cpu" else 70):
        fk.quantize_(**prepared(arguments("quantize_", device)), backend=backend)
    assert len(op.known) <= 64
    assert plans._of_states.bytes <= plans.KEPT_BYTES
    assert plans._of_states.bytes == sum(size for _, size in plans._of_states.values())


def test_threads_may_share_a_list():
    args, errors = prepared(arguments("quantize_", "cpu")), []

    def calls():
        try:
            for i in range(300):
                fk.quantize_(**args, backend="cpu")
                args["latents"][0].data = torch.full((3,), float(i % 2))
                fk.TensorList([*args["latents"]]).number  # noqa: B018
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=calls) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


# ---- calls that take it as a plain one


def test_without_the_native_module_it_is_a_plain_list(monkeypatch):
    monkeypatch.setattr(fk.ops.listop, "native", lambda: None)
    args = prepared(arguments("perturb_quantize_", "cpu"))
    same(outcome("perturb_quantize_", args, "reference"),
         outcome("perturb_quantize_", arguments("perturb_quantize_", "cpu"), "reference"))  # fmt: skip
    assert "number" not in vars(args["latents"])


def test_fake_tensors_reach_the_op():
    with FakeTensorMode():
        lists = [fk.TensorList(torch.empty(4)), fk.TensorList(torch.empty(4)), fk.TensorList(torch.empty(()))]
        fk.quantize_(*lists, grid=GRID)
    fk.quantize_(*lists, grid=GRID)


@pytest.mark.parametrize("inside", [False, True])
def test_a_compiled_function_takes_it(inside):
    make = fk.TensorList if inside else list

    def function(args):
        lists = {n: make(v) if n in ("plus", "latents", "grads", "alphas") else v for n, v in args.items()}
        fk.perturb_quantize_(**lists)

    names = {"seed": torch.tensor(1), "step": torch.tensor(2)}
    names["one_minus_beta"] = torch.tensor(0.25, dtype=torch.float64)
    plain = arguments("perturb_quantize_", "cpu") | names
    found = arguments("perturb_quantize_", "cpu") | names
    if not inside:
        found |= {n: fk.TensorList(found[n]) for n in ("plus", "latents", "grads", "alphas")}
    compiled(function)[0](found)
    function(plain)
    same(tensors(found), tensors(plain))


def test_a_subclass_makes_it_a_plain_list():
    class Own(Tensor):
        pass

    latents = fk.TensorList([torch.ones(3).as_subclass(Own)])
    out = torch.empty(3)
    fk.quantize_(out, latents, torch.tensor(0.5), grid=GRID)
    assert out.tolist() == [0.5] * 3
    assert "number" not in vars(latents)


def test_tensors_cannot_be_swapped_under_the_list():
    """Their handles would be those of the others."""
    latents = fk.TensorList([torch.ones(3)])
    fk.quantize_([torch.empty(3)], latents, [torch.tensor(0.5)], grid=GRID)
    with pytest.raises(RuntimeError):
        torch.utils.swap_tensors(latents[0], torch.zeros(3))


def test_an_unknown_number_is_refused():
    with pytest.raises(ValueError, match="numbers must name lists that are held, got 123456789"):
        _C.generations([123456789])
    with pytest.raises(RuntimeError, match="refused"):
        cpu.native.hadamard([], [], 16, [123456789, 123456789])


def test_states_tell_lists_apart():
    a, b = fk.TensorList([torch.ones(3)]), fk.TensorList([torch.ones(3)])
    first = held.generations([a, b, []])
    assert first == held.generations([a, b, []])
    assert (first[2], len(set(first))) == (0, 3)
    a[0].data = torch.ones(3)
    second = held.generations([a, b, []])
    assert second[0] > first[0]
    assert second[1:] == first[1:]
    assert held.generations([a, [torch.ones(3)]]) is None
