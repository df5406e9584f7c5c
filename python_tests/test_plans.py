"""Plans of a GPU backend: what a table holds, and how long one lives that a CUDA graph may read."""

import struct

import pytest
import torch

from fogzo_kernels.backends.gpu import plans
from fogzo_kernels.spec.call import Draw


@pytest.fixture(autouse=True)
def process(monkeypatch):
    """As in a process that has no plans yet; capture(True) begins a capture of a CUDA graph."""
    monkeypatch.setattr(plans, "_plans", plans.Recent())
    for name, empty in (("_captured", {}), ("_of_states", plans.Recent()), ("_uploads", {}), ("_arena", [])):
        monkeypatch.setattr(plans, name, empty)


@pytest.fixture
def capture(monkeypatch):
    return lambda on: monkeypatch.setattr(plans, "capturing", lambda _: on)


def lists(count=2, numel=40):
    return {name: [torch.zeros(numel) for _ in range(count)] for name in ("latents", "grads")}


def entries(plan):
    """Rows by column."""
    rows = plan.table.view(-1, len(plans.COLUMNS)).tolist()
    return [dict(zip(plans.COLUMNS, row, strict=True)) for row in rows]


def test_a_row_holds_what_its_columns_say():
    given = lists()
    states = [[torch.zeros(40) for _ in range(2)] for _ in range(2)]
    alphas = [torch.ones(1), torch.ones(5)]
    draw = Draw("uniform", torch.tensor(0), torch.tensor(0), [3, 4], [(0, 40, 40), (16, 8, 24)])
    found = plans.plan(given["latents"], **given, alphas=alphas, states=states, draw=draw)
    one, two = entries(found)
    for name, tensors in zip(
        ("LATENT", "GRAD", "ALPHA", "STATE_1", "STATE_2"), (*given.values(), alphas, *states), strict=True
    ):
        assert [one[name], two[name]] == [t.data_ptr() for t in tensors], name
    assert (one["PLUS"], one["MINUS"]) == (0, 0)
    assert [(row["TENSOR_ID"], row["NUMEL"], row["FIRST"]) for row in (one, two)] == [(3, 40, 0), (4, 40, 1)]
    assert (one["INNER"], one["SKIP"]) == (40, 0)
    assert (two["OFFSET"], two["INNER"], two["SKIP"]) == (16, 8, 16)
    assert (two["SPAN"], two["SCALE_LENGTH"]) == (plans.SHORTEST, 8)
    assert found.owner.tolist() == [0, 1]
    assert (found.programs, found.per_tensor, found.shard) == (2, False, True)


def test_a_row_holds_the_states_that_are_given():
    given, state = lists(), [torch.zeros(40) for _ in range(2)]
    one = entries(plans.plan(given["latents"], **given, states=[state]))
    assert [row["STATE_1"] for row in one] == [t.data_ptr() for t in state]
    assert [row["STATE_2"] for row in one + entries(plans.plan(given["latents"], **given))] == [0] * 4
    with pytest.raises(ValueError, match="zip"):
        plans.plan(given["latents"], **given, states=[state] * 3)


def test_a_row_of_learned_scales_holds_gradients_and_factors():
    """Gradients of alphas lie anywhere; that of a tensor without elements is 0, with no program."""
    given, memory = lists(3), torch.full((9,), 7.0)
    given = {name: [*tensors[:2], torch.zeros(0)] for name, tensors in given.items()}
    alpha_grads, alphas = [memory[1:2], memory[2:7], memory[7:9]], [torch.ones(n) for n in (1, 5, 2)]
    latents, grads = given["latents"], given["grads"]
    given = {"latents": latents, "grads": grads, "plus": grads, "alphas": alphas, "alpha_grads": alpha_grads}
    found = plans.plan(latents, **given, factors=[0.5, -2.0, 3.0])
    rows = entries(found)
    assert [row["ALPHA_GRAD"] for row in rows] == [t.data_ptr() for t in alpha_grads]
    assert [struct.unpack("<d", struct.pack("<q", row["FACTOR"]))[0] for row in rows] == [0.5, -2.0, 3.0]
    assert [row["FAST"] for row in rows] == [40, 40, 0]
    assert found.owner.tolist() == [0, 1]
    assert memory.tolist() == [7.0] * 7 + [0.0] * 2
    assert plans.plan(latents, **given, factors=[0.5, -2.0, 3.0]) is found
    assert plans.plan(latents, **given, factors=[0.5, 2.0, 3.0]) is not found


@pytest.mark.parametrize(("numels", "span"), [
    ([], 2048), ([0, 1], 2048), ([2**21 - 2048], 2048), ([2**21], 2048), ([2**22 - 4096], 2048),
    ([2**22], 4096), ([2**23], 8192), ([2**23] * 2, 16384), ([5] * 1024, 16384), ([2**33], 16384),
])  # fmt: skip
def test_spans_are_as_long_as_enough_programs_let_them_be(numels, span):
    assert plans.span_of(numels) == span


def test_owners_have_their_programs():
    assert plans.owners([2, 0, 3, 1]).tolist() == [0, 0, 2, 2, 2, 3]
    assert plans.owners([]).tolist() == []


@pytest.mark.parametrize("length", [1, 8, 100, 1024, 2047, 2048, 2049, 3000, 4096, 5000, 20480, 61440])
@pytest.mark.parametrize("count", [1, 2, 7, 30])
def test_a_program_is_named_once_where_an_alpha_begins_that_others_hold(length, count):
    row = {"NUMEL": length * count, "SCALE_LENGTH": length, "SPAN": 2048, "FIRST": 5}
    ends = [((i * length) // 2048, ((i + 1) * length - 1) // 2048) for i in range(count)]
    found = plans.crossing(row)
    assert found.dtype == torch.int32
    assert found.tolist() == [5 + first for first, last in ends if first < last]


def test_nothing_crosses_in_a_tensor_without_elements():
    assert plans.crossing({"NUMEL": 0, "SCALE_LENGTH": 1, "SPAN": 2048, "FIRST": 5}).tolist() == []


def test_a_plan_that_is_not_of_learned_scales_has_no_crossing_alphas():
    given = lists(2, 5000)
    assert plans.plan(given["latents"], **given).crossing.numel() == 0
    alphas = [torch.ones(1) for _ in range(2)]
    given |= {"alphas": alphas, "alpha_grads": alphas}
    found = plans.plan(given["latents"], **given, factors=[1.0, 1.0])
    assert found.crossing.tolist() == [0, 3]
    assert found.crossing.data_ptr() % 16 == 0


def test_a_tensor_that_is_not_aligned_still_goes_by_chunks():
    memory = torch.zeros(49)
    found = plans.plan([memory[:40]], latents=[memory[:40]], grads=[memory[1:41]])
    (row,) = entries(found)
    assert (row["ALIGNED"], row["FAST"], found.aligned) == (0, 40, False)
    (row,) = entries(plans.plan([memory[:40]], latents=[memory[:40]], alphas=[memory[48:]]))
    assert (row["ALIGNED"], row["FAST"]) == (1, 40)  # alphas are read one by one


#: Of a plan of lists(), with its table and its owners.
BYTES = plans.PLAN_BYTES + 2 * 8 * len(plans.COLUMNS) + 2 * 4


def test_the_last_plans_are_kept(monkeypatch):
    monkeypatch.setattr(plans, "KEPT_BYTES", 2 * BYTES)
    given = [lists() for _ in range(3)]
    first, second = (plans.plan(x["latents"], **x) for x in given[:2])
    assert plans.plan(given[0]["latents"], **given[0]) is first
    plans.plan(given[2]["latents"], **given[2])
    assert plans.plan(given[0]["latents"], **given[0]) is first
    assert plans.plan(given[1]["latents"], **given[1]) is not second
    assert plans._captured == {}


def test_a_plan_that_a_graph_reads_stays_and_is_kept_once(monkeypatch, capture):
    monkeypatch.setattr(plans, "KEPT_BYTES", BYTES)
    given, other = lists(), lists()
    capture(False)
    before = plans.plan(given["latents"], **given)
    for _ in range(3):
        capture(True)
        assert plans.plan(given["latents"], **given) is before
        capture(False)
        plans.plan(other["latents"], **other)  # whose plan replaces it
        assert list(plans._captured.values()) == [before]
        assert plans.plan(given["latents"], **given) is before  # its memory is not there twice
    assert plans._uploads == {}


def test_what_a_capture_uploads_is_its_own_and_is_read_from_memory_that_stays(monkeypatch, capture):
    monkeypatch.setattr(plans, "ARENA_WORDS", 1000)
    plans.replenish(pinned=False)
    capture(True)
    given = lists()
    first = plans.plan(given["latents"], **given)
    assert plans._plans == plans._captured == {}
    left = plans._arena[0].numel()
    assert left == 1000 - (2 * len(plans.COLUMNS) + 2)
    (words,) = plans._uploads.values()
    expected = words.clone()
    again = plans.plan(given["latents"], **given)  # of another graph: the same words serve
    assert again is not first
    assert plans._arena[0].numel() == left
    other = lists(count=20)
    plans.plan(other["latents"], **other)
    assert len(plans._uploads) == 2
    assert torch.equal(words, expected)
    assert entries(first) == entries(again)
    assert entries(first)[0]["LATENT"] == given["latents"][0].data_ptr()


def test_an_arena_that_is_half_used_is_replaced_outside_a_capture(monkeypatch, capture):
    monkeypatch.setattr(plans, "ARENA_WORDS", 200)
    plans.replenish(pinned=False)
    arena = plans._arena[0]
    plans.replenish(pinned=False)
    assert plans._arena[0] is arena
    capture(True)
    given = lists(count=6)
    found = entries(plans.plan(given["latents"], **given))
    (words,) = plans._uploads.values()
    assert words.untyped_storage().data_ptr() == arena.untyped_storage().data_ptr()
    plans.replenish(pinned=False)
    assert plans._arena[0].numel() == 200
    assert plans._arena[0].untyped_storage().data_ptr() != words.untyped_storage().data_ptr()
    assert words.tolist()[: len(plans.COLUMNS)] == list(found[0].values())


def test_a_capture_without_a_warm_up_says_so(monkeypatch, capture):
    monkeypatch.setattr(plans, "ARENA_WORDS", 100)
    given, many = lists(), lists(count=6)
    capture(True)
    with pytest.raises(RuntimeError, match="run the step before the capture, as a warm-up"):
        plans.plan(given["latents"], **given)
    plans.replenish(pinned=False)
    with pytest.raises(
        RuntimeError, match="must have at most 100 words until the next op outside a capture, got 130"
    ):
        plans.plan(many["latents"], **many)
    plans.plan(given["latents"], **given)
