"""FSDP2: several processes with the same batch train with the bits of one, whoever holds which rows."""

import functools

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from support.processes import needs_gloo, spawned
from support.sharded_models import (
    CASES,
    ONLY_BEFORE,
    STEPS,
    batch_of,
    cut,
    made,
    optimizer_of,
    run,
    train,
    values_of,
    with_inputs,
)
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import fogzo_kernels as fk
from fogzo_kernels.nn.view import local

pytestmark = needs_gloo
#: Of these the sums of a scale or its gradient are made in another order than in one process.
ROUNDED = {"learned"}


def shard(model, mesh=None, **options):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),)) if mesh is None else mesh
    options |= {"ignored_params": fk.learned_alphas(model)} if fk.learned_alphas(model) else {}
    for part in (*model.blocks, model):
        fully_shard(part, mesh=mesh, **options)


def hybrid(model):
    shard(model, init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "rows")))


def everything(rank, cases=tuple(CASES)):
    """By case and order, losses, and the model at the end."""
    found = {}
    for case in cases:
        for before in (True, False)[: 2 - (case in ONLY_BEFORE)]:
            model = made(case, shard, before)
            found[case, before] = train(model, case), values_of(model)
    for case, how in (("learned row", "estimate_"), ("guided", "attached")):
        model = made(case, shard)
        found[case, how] = run(model, case, how), values_of(model)
    if dist.get_world_size() == 4:
        model = made("learned row", hybrid)
        found["learned row", "hybrid"] = train(model, "learned row"), values_of(model)
    return found


@functools.cache
def one_process(case, how="fused"):
    model = made(case)
    return run(model, case, how), values_of(model)


SOME = ("learned row", "images")  # what four processes run by default


@pytest.mark.slow_first
@pytest.mark.parametrize(
    ("processes", "cases"),
    [(2, tuple(CASES)), (4, SOME), pytest.param(4, tuple(CASES), marks=pytest.mark.everything)],
    ids=["2-all", "4-some", "4-all"],
)
def test_many_processes_have_the_bits_of_one(tmp_path, processes, cases):
    """Dropout, BatchNorm, tied weights, checkpointing, rows that do not divide, every kind of scale."""
    for found in spawned(functools.partial(everything, cases=cases), tmp_path, processes):
        assert len(found) == 2 * len(cases) - len(ONLY_BEFORE) + processes // 2 + 1
        for (case, how), (losses, values) in found.items():
            expected, state = one_process(case, how)
            close = {"rtol": 1e-4, "atol": 1e-5} if case in ROUNDED else {"rtol": 0, "atol": 0}
            torch.testing.assert_close(losses, expected, **close, msg=f"{case} {how}: {losses} {expected}")
            assert values.keys() == state.keys()
            for name in values:
                torch.testing.assert_close(values[name], state[name], **close, msg=f"{case} {how}: {name}")
            assert losses[-1] < losses[0]


def of_inputs(rank):
    return with_inputs(shard)


def test_learned_inputs_and_checks_are_those_of_one_process(tmp_path):
    expected, state, said = with_inputs()
    assert said == []
    for losses, values, found in spawned(of_inputs, tmp_path):
        assert found == said
        assert losses == expected
        assert all(torch.equal(values[name], state[name]) for name in values)


# ---- each process with a batch of its own


OWN = 8  # its rows: of two, BatchNorm would make little but signs, and the rounding of sums decide


def apart(rank):
    """A run of FSDP2 and one of DDP, each process with its rows and its own dropout."""
    rows, count = slice(rank * OWN, (rank + 1) * OWN), dist.get_world_size() * OWN
    found = []
    for wrap in (shard, DistributedDataParallel):
        model = made("learned row", shard if wrap is shard else lambda model: None)
        model = model if wrap is shard else DistributedDataParallel(model)
        losses = train(model, "learned row", rows=rows, count=count, first=0, own=rank)
        found.append((losses, values_of(getattr(model, "module", model))))
    return found


def together(processes):
    """The same in one process: rows one after the other in each pass, each with dropout of its own."""
    model = made("learned row")
    fogzo = fk.Fogzo(model, total_steps=STEPS, kappa=0.1, seed=3, directions=1)
    optimizer = optimizer_of(model, fogzo)
    states = [torch.manual_seed(rank).get_state() for rank in range(processes)]
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        before = list(states)
        for probe in fogzo.probes():
            with probe:
                for rank in range(processes):
                    tokens, labels = batch_of(step, slice(rank * OWN, (rank + 1) * OWN), processes * OWN)
                    torch.set_rng_state(before[rank])
                    loss = F.cross_entropy(model(tokens), labels) / processes
                    states[rank] = torch.get_rng_state() if probe.sign == 0 else states[rank]
                    probe.backward(loss)
        optimizer.step()
        losses.append(fogzo.stats()["loss"])
    return losses, values_of(model)


@pytest.mark.parametrize("processes", [2, 4])
def test_batches_of_their_own_are_one_batch(tmp_path, processes):
    expected, state = together(processes)
    for found in spawned(apart, tmp_path, processes):
        for losses, values in found:
            torch.testing.assert_close(losses, expected, rtol=1e-3, atol=1e-4)
            for name in [name for name in values if name.endswith((".weight", ".alpha"))]:
                torch.testing.assert_close(values[name], state[name], rtol=1e-2, atol=1e-3, msg=name)


# ---- what is gathered


class Counting:
    """Counts what the collectives of FSDP send."""

    def __init__(self):
        self.sent = 0

    def __enter__(self):
        from torch.distributed.fsdp._fully_shard import _fsdp_collectives as collectives

        self._module = collectives
        inputs = collectives._get_param_all_gather_inputs

        def counted(parameters):
            found = inputs(parameters)
            for parameter, tensors in zip(parameters, found, strict=True):
                if hasattr(local(parameter.sharded_param), "fsdp_pre_all_gather"):
                    self.sent += sum(t.numel() * t.element_size() for t in tensors)
            return found

        self._inputs, collectives._get_param_all_gather_inputs = inputs, counted
        return self

    def __exit__(self, *_):
        self._module._get_param_all_gather_inputs = self._inputs


def gathered(rank):
    """Bytes that this process sends in the passes of a step, by case, and elements of the weights."""
    found = {}
    for case in ("fixed", "ternary", "sign", "half_offset(8)"):
        model = made(case, shard)
        fogzo = fk.Fogzo(model, total_steps=STEPS, kappa=0.1, directions=1)
        tokens, labels = batch_of(0)
        with Counting() as counting:
            fogzo.run(lambda: F.cross_entropy(model(tokens), labels))  # noqa: B023
        found[case] = counting.sent / fogzo.total_weights
    return found


def test_few_bits_are_gathered(tmp_path):
    """Weights are gathered four times: forward, backward and two probes; in bfloat16, 2 bytes each time.

    The root's stay gathered from forward to backward, and rows are filled up to as many on each process.
    """
    most = {"fixed": 2, "ternary": 2, "sign": 1, "half_offset(8)": 8}
    for found in spawned(gathered, tmp_path):
        for case, sent in found.items():
            bytes_of_a_gather = most[case] / 8 / 2  # of two processes
            assert 3 * bytes_of_a_gather <= sent <= 4.5 * bytes_of_a_gather, case
            if case != "half_offset(8)":
                assert sent <= 0.25 * (4 * 2 / 2)


def mixed(rank):
    """In bfloat16: what is gathered is Q(weight) rounded once; gradients and updates are float32."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    model = made("images", functools.partial(shard, mp_policy=policy))
    losses = train(model, "images")
    conv, grid = model.blocks[0], model.blocks[0].quantizer.grid
    conv.unshard()
    weight = conv.weight.detach().clone()
    conv.reshard()
    assert local(conv.weight).dtype == torch.float32
    return losses, weight, fk.dequantize(conv.codes(), conv.alpha, grid=grid, dtype=torch.bfloat16)


def test_mixed_precision_stays_near_the_losses_of_one_process(tmp_path):
    expected, _ = one_process("images")
    for losses, weight, values in spawned(mixed, tmp_path):
        assert torch.equal(weight.flatten(1), values)
        torch.testing.assert_close(losses, expected, rtol=0.1, atol=0.1)


def compiled(rank):
    def compiled_and_sharded(model):
        for block in model.blocks:
            block.compile(backend="aot_eager", fullgraph=True)
        shard(model)

    model = made("learned row", compiled_and_sharded)
    return train(model, "learned row"), values_of(model)


def test_compiled_blocks_train_as_one_process(tmp_path):
    expected, state = one_process("learned row")
    for losses, values in spawned(compiled, tmp_path):
        torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-5)
        for name in values:
            torch.testing.assert_close(values[name], state[name], rtol=1e-3, atol=1e-4)


# ---- what goes wrong


def broken_probe(rank):
    """A probe that fails leaves the model as it was, and training goes on with the bits of a run without it."""
    model = made("learned row", shard)
    fogzo = fk.Fogzo(model, total_steps=STEPS, kappa=0.1, seed=3, directions=1)
    optimizer = optimizer_of(model, fogzo)
    for broken in (0, 1, 2):  # the gradient pass and both probes
        calls = iter(range(3))
        before = torch.get_rng_state()

        def closure(broken=broken, calls=calls):
            loss = model(batch_of(0)[0]).sum()
            if next(calls) == broken:
                raise KeyError("broken")
            return loss

        with pytest.raises(KeyError, match="broken"):
            fogzo.run(closure)
        assert broken or torch.equal(torch.get_rng_state(), before)
        optimizer.zero_grad()
    model.norm.reset_running_stats()
    return train(model, "learned row", fogzo=fogzo, optimizer=optimizer), values_of(model)


def test_a_step_that_fails_leaves_nothing(tmp_path):
    expected, state = one_process("learned row")
    for losses, values in spawned(broken_probe, tmp_path):
        assert losses == expected
        assert all(torch.equal(values[name], state[name]) for name in values)


def messages(rank):
    found = {}

    def says(name, error, run):
        with pytest.raises(error) as caught:
            run()
        found[name] = str(caught.value)

    def half(model):
        fully_shard(model.blocks[0])

    def with_alphas(model):
        for part in (*model.blocks, model):
            fully_shard(part)

    def by_columns(model):
        from torch.distributed.tensor import Shard

        shard(model, shard_placement_fn=lambda p: Shard(1) if p.ndim == 2 and p.shape[1] % 2 == 0 else None)

    options = {"total_steps": 2, "kappa": 0.1}
    says(
        "half",
        ValueError,
        lambda: fk.Fogzo(made("fixed", half), process_group=dist.group.WORLD, **{"directions": 1} | options),
    )
    says(
        "alphas", ValueError, lambda: fk.Fogzo(made("learned row", with_alphas), **{"directions": 1} | options)
    )
    says("columns", ValueError, lambda: fk.Fogzo(made("fixed", by_columns), **{"directions": 1} | options))
    says(
        "alone",
        ValueError,
        lambda: fk.Fogzo(made("fixed", shard), loss_reduction=None, **{"directions": 1} | options),
    )
    says("by itself", ValueError, lambda: made("images", shard, before=False))
    says(
        "measured",
        ValueError,
        lambda: fk.Fogzo(made("ternary", cut, before=False), **{"directions": 1} | options),
    )
    says("cut", ValueError, lambda: fk.Fogzo(made("learned row", cut), **{"directions": 1} | options))
    model = made("fixed", shard)
    says("part", RuntimeError, lambda: model.blocks[0].up(torch.randn(2, 16)))
    says("probe", RuntimeError, lambda: setattr(model.blocks[0].up, "probe", torch.randn(5, 16)))
    says("plain", ValueError, lambda: fk.dequantize_model(model))
    with torch.no_grad():
        model(batch_of(0)[0])
    says("backward", RuntimeError, lambda: model(batch_of(0)[0]).sum().backward())
    return found


def test_unsupported_models_and_calls_are_errors(tmp_path):
    for found in spawned(messages, tmp_path):
        assert found["half"].startswith("model must have all its quantized weights under fully_shard")
        assert found["alphas"].startswith("embed.alpha must be whole in every process, got a shard")
        assert found["columns"].startswith("embed.weight must be sharded by its rows")
        assert found["alone"] == "loss_reduction must be 'mean' or 'sum' for a sharded model, got None"
        assert found["by itself"].startswith("model must be quantized before fully_shard is given one")
        parallel = "blocks.0.up.weight must be, for tensor parallelism, "
        assert found["measured"].startswith(f"{parallel}with a fixed or learned scale, got Scale.absmax()")
        assert found["cut"].startswith(f"{parallel}quantized after parallelize_module")
        assert found["part"].startswith("weight must be gathered before it is used")
        assert found["probe"].startswith("probe must not be set under fully_shard")
        assert found["plain"].startswith("model must not be under fully_shard to be dequantized")
        assert found["backward"].startswith("a quantized weight under fully_shard gets its straight-through")


def from_meta(rank):
    """Made without values, sharded, then loaded, as large models are; rows do not divide."""
    with torch.device("meta"):
        model = made("fixed", shard)
    model.to_empty(device="cpu")
    whole_state = made("fixed").state_dict()
    set_model_state_dict(model, whole_state, options=StateDictOptions(full_state_dict=True))
    model.head.weight = model.embed.weight
    return train(model, "fixed"), values_of(model)


def test_a_model_from_the_meta_device_has_the_bits_of_one_process(tmp_path):
    expected, state = one_process("fixed")
    for losses, values in spawned(from_meta, tmp_path):
        assert losses == expected
        assert all(torch.equal(values[name], state[name]) for name in values)


# ---- checkpoints


def state_of(model, optimizer, fogzo):
    weights, numbers = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": numbers, "fogzo": fogzo.state_dict()}


def save_half_way(folder, rank):
    model = made("learned row", shard)
    fogzo = fk.Fogzo(model, total_steps=STEPS, kappa=0.1, seed=3, directions=1)
    optimizer = optimizer_of(model, fogzo)
    train(model, "learned row", STEPS // 2, fogzo=fogzo, optimizer=optimizer)
    dcp.save(state_of(model, optimizer, fogzo), checkpoint_id=folder)


def go_on(folder, rank):
    torch.manual_seed(5)
    model = made("learned row", shard)
    with torch.no_grad():
        for t in model.state_dict().values():
            t.zero_() if t.is_floating_point() else None
    fogzo = fk.Fogzo(model, total_steps=STEPS, kappa=0.1, seed=3, directions=1)
    optimizer = optimizer_of(model, fogzo)
    state = state_of(model, optimizer, fogzo)
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    fogzo.load_state_dict(state["fogzo"])
    losses = train(model, "learned row", STEPS // 2, first=STEPS // 2, fogzo=fogzo, optimizer=optimizer)
    return losses, values_of(model)


def test_a_checkpoint_of_two_processes_goes_on_in_any_number(tmp_path):
    """To the bit, noise and all: in one process, in two and in four."""
    model = made("learned row")
    fogzo = fk.Fogzo(model, total_steps=STEPS, kappa=0.1, seed=3, directions=1)
    optimizer = optimizer_of(model, fogzo)
    train(model, "learned row", STEPS // 2, fogzo=fogzo, optimizer=optimizer)
    expected = train(model, "learned row", STEPS // 2, first=STEPS // 2, fogzo=fogzo, optimizer=optimizer)
    folders = [tmp_path / name for name in ("save", "1", "2", "4")]
    for folder in folders:
        folder.mkdir()
    spawned(functools.partial(save_half_way, tmp_path / "checkpoint"), folders[0])
    for folder in folders[1:]:
        for losses, values in spawned(
            functools.partial(go_on, tmp_path / "checkpoint"), folder, int(folder.name)
        ):
            assert losses == expected
            assert all(torch.equal(values[name], t) for name, t in values_of(model).items())
