"""What native code does beside the ops: the results of Python, with and without the native module."""

import pytest
import torch

import fogzo_kernels as fk
from fogzo_kernels.ops import native
from fogzo_kernels.ops.native import ABSENT, ANY, Objects, outside, put
from fogzo_kernels.train.memory import ProbeMemory


@pytest.fixture(params=["native", "python"])
def either(request, monkeypatch):
    if request.param == "python":
        monkeypatch.setattr(native, "native", lambda: None)


class Thing:
    flag = True


def facts():
    d, thing = {"a": 1000, "b": None}, Thing()
    entries = (d, "a", d["a"], d, "b", None, d, "c", ABSENT, d, "a", ANY)
    return d, thing, Objects(entries, (d, 2), (thing, "flag", True), (thing, Thing))


CHANGES = {
    "value": lambda d, thing: d.update(a=object()),
    "none": lambda d, thing: d.update(b=0),
    "new key": lambda d, thing: d.update(c=1),
    "other key": lambda d, thing: (d.pop("b"), d.update(e=None)),
    "size": lambda d, thing: d.update(e=1),
    "attribute": lambda d, thing: setattr(thing, "flag", False),
    "type": lambda d, thing: setattr(thing, "__class__", type("Other", (Thing,), {})),
}


@pytest.mark.parametrize("change", CHANGES)
def test_each_change_is_seen(change, either):
    d, thing, objects = facts()
    assert objects.holds()
    CHANGES[change](d, thing)
    assert not objects.holds()


def test_nothing_is_held_in_empty_facts(either):
    assert Objects((), (), (), ()).holds()


def test_what_cannot_be_compared_is_an_error():
    with pytest.raises(AttributeError, match="nope"):
        Objects((), (), (Thing(), "nope", 1), ()).holds()
    with pytest.raises(TypeError):
        Objects(({}, [], 1), (), (), ()).holds()
    with pytest.raises(SystemError):
        Objects((), ([], 0), (), ()).holds()


def test_dicts_get_their_values_or_one(either):
    dicts = {}, {"k": 1}
    put(dicts, "k", (5, 6))
    assert [d["k"] for d in dicts] == [5, 6]
    put(dicts, "k", None)
    assert [d["k"] for d in dicts] == [None, None]
    run_with = fk.nn.view.PassWeight(None, None, True)
    put(dicts, "k", run_with)  # a tuple, too, but one value
    assert all(d["k"] is run_with for d in dicts)
    with pytest.raises(ValueError, match=r"values must be one for each dict|zip"):
        put(dicts, "k", (1,))


@pytest.mark.parametrize(("values", "count"), [([0.5, 2.0], 0), ([0.05, 2.0], 1), ([float("nan"), 11.0], 2)])
def test_elements_out_of_range_are_counted(values, count):
    tensors = fk.functional.TensorList([torch.tensor(v) for v in values])
    least = fk.functional.TensorList([torch.tensor(0.1)] * 2)
    assert outside(tensors, least, 10.0) == count


def test_what_native_code_cannot_count_is_left_to_python(monkeypatch):
    lists = [fk.functional.TensorList([torch.ones(2, dtype=d)]) for d in (torch.float64, torch.float32)]
    assert outside(*lists, 10.0) is None
    assert outside([torch.ones(2)], [torch.ones(2)], 10.0) is None
    monkeypatch.setattr(native, "native", lambda: None)
    assert outside(lists[1], lists[1], 10.0) is None


# ---- memory of the second probe


def like():
    return [torch.randn(3, 5), torch.randn(7, 1)]


def test_probe_memory_keeps_its_tensors_and_frees_their_memory():
    memory = ProbeMemory(like())
    first = memory.take()
    assert [t.shape for t in first] == [(3, 5), (7, 1)]
    assert all(t.data_ptr() % 64 == 0 for t in first)
    for t in first:
        t.fill_(1)
    memory.begin()
    memory.free()
    assert all(t.untyped_storage().nbytes() == 0 for t in first)
    again = memory.take()
    assert again is first
    assert all(t.untyped_storage().nbytes() for t in again)


@pytest.mark.parametrize(
    "keep", [lambda t: t, lambda t: t.view(-1), lambda t: t.detach()], ids=["it", "view", "alias"]
)
def test_a_tensor_that_somebody_holds_keeps_its_memory(keep):
    memory = ProbeMemory(like())
    tensors = memory.take()
    for t in tensors:
        t.fill_(3)
    memory.begin()
    held = keep(tensors[1])
    memory.free()
    assert held.eq(3).all()
    new = memory.take()
    assert new is not tensors
    for t in new:
        t.fill_(4)
    assert held.eq(3).all()


def test_rows_of_a_probe_stay_with_a_closure_that_holds_them():
    model, x = torch.nn.Linear(8, 4), torch.randn(2, 8)
    fk.quantize_model(model, fk.presets.lsq(2))
    fogzo = fk.Fogzo(model, total_steps=4, directions=1, one_minus_beta=1.0, schedule="constant")
    rows, copies = [], []

    def closure():
        rows.append(model.effective_weight().detach())
        copies.append(rows[-1].clone())
        return model(x).square().mean()

    for _ in range(3):
        model.zero_grad()
        rows.clear()
        copies.clear()
        fogzo.backward(closure)
        assert torch.equal(rows[-1], copies[-1])
