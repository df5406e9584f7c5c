"""Mixtures of experts of ``transformers``: each expert of a stack is a weight, as a linear layer would be."""

import copy
import functools

import pytest
import torch
import torch.distributed as dist
from support.processes import leave, needs_gloo, spawned
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fogzo_kernels as fk
from fogzo_kernels.nn.view import whole

pytest.importorskip("transformers", reason="transformers is not installed")

from support.mixtures import (
    CONFIGS,
    EXPERTS,
    SKIP,
    both,
    experts_of,
    loss_of,
    mixture,
    same,
    tokens,
)
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

ROW, TENSOR = fk.presets.lsq(2, "row"), fk.presets.lsq(2)
SCALES = {
    "row": ROW,
    "tensor": TENSOR,
    "group": fk.presets.lsq(2, 4),
    "measured": fk.Quantizer(fk.Grid.ternary(), fk.Scale.absmax(), fk.StraightThrough("identity")),
}
ROTATED = fk.Quantizer(
    fk.Grid.uniform(2), fk.Scale.rms("row"), fk.StraightThrough("identity"), transform=fk.Hadamard(16)
)
FOGZO = {
    "guided/tensor": {"directions": 0, "noise_per": "tensor"},
    "guided/model": {"directions": 0, "noise_per": "model"},
    "probes": {"directions": 1},
    "two probes/tensor": {"directions": 2, "noise_per": "tensor"},
}


def quantized(name="mixtral", quantizer=TENSOR, implementation="grouped_mm", **options):
    model = mixture(name, implementation)
    fk.quantize_model(model, quantizer, skip=SKIP, **options)
    return model


def estimator(model, how, steps=20, **options):
    return fk.Fogzo(model, total_steps=steps, seed=3, kappa=1.0, schedule="constant", **FOGZO[how], **options)


def groups(model, alpha_lr=1e-3):
    return fk.parameter_groups(model, weight_decay=0.0, alpha_lr=alpha_lr)


def take_steps(model, fogzo, optimizer, seeds, rows=1):
    """Losses of steps with a batch each; the optimizer is fused where it has the estimator."""
    losses = []
    for seed in seeds:
        ids = tokens(seed, rows)
        optimizer.zero_grad()
        if getattr(optimizer, "fogzo", None) is not None:
            losses.append(float(optimizer.step(lambda ids=ids: loss_of(model, ids))))
        else:
            losses.append(float(fogzo.backward(lambda ids=ids: loss_of(model, ids))))
            optimizer.step()
    return losses


# ---- an expert is a weight


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("how", FOGZO)
@pytest.mark.parametrize(
    ("name", "quantizer"),
    [
        *[("mixtral", q) for q in SCALES.values()],
        *[("qwen3", q) for q in (TENSOR, ROW)],
        *[("gpt-oss", q) for q in (ROW, SCALES["group"])],
    ],
    ids=str,
)
def test_a_stack_trains_as_a_linear_layer_for_each_expert(name, quantizer, how, fused):
    """Losses have the same bits, weights, gradients and alphas are equal up to the sum of N."""
    losses, models = [], both(name, quantizer)
    for model in models:
        fogzo = estimator(model, how)
        optimizer = (
            fk.AdamW(groups(model, alpha_lr=0.0), lr=1e-2, fogzo=fogzo)
            if fused
            else torch.optim.AdamW(groups(model), lr=1e-2)
        )
        own = []
        for seed in range(3):
            ids = tokens(seed)
            for p in model.parameters():  # or an idle linear layer would have no gradient, and no momentum
                p.grad = torch.zeros_like(p)
            if fused:
                own.append(optimizer.step(lambda ids=ids, model=model: loss_of(model, ids)))
            else:
                own.append(fogzo.backward(lambda ids=ids, model=model: loss_of(model, ids)))
                optimizer.step()
        losses.append(own)
    for a, b in zip(*losses, strict=True):
        assert torch.equal(a, b)
    worst, idle = same(*models)
    assert worst <= 4e-7
    assert len(idle) >= 4


@pytest.mark.parametrize("name", ["mixtral", "gpt-oss"])
def test_rotated_experts_have_the_losses_of_rotated_linear_layers(name):
    """Experts are rotated back before their products, and linear layers rotate their inputs."""
    found = []
    for model in both(name, ROTATED):
        fogzo = estimator(model, "probes")
        found.append([probe_loss(model, probe) for probe in fogzo.probes()])
    torch.testing.assert_close(*map(torch.stack, found), rtol=1e-5, atol=0)


def probe_loss(model, probe):
    with probe:
        probe.backward(loss_of(model, tokens(0)))
    return probe.loss.clone()


@pytest.mark.parametrize("name", CONFIGS)
def test_nearly_all_of_a_mixture_is_quantized_and_trains(name):
    model = mixture(name)
    report = fk.quantize_model(model, TENSOR, skip=SKIP)
    named = {n: p for n, p in model.named_parameters() if p.ndim > 1 and not n.startswith(tuple(SKIP))}
    body = sum(p.numel() for n, p in named.items() if not n.endswith(("gate.weight", "router.weight", "_bias")))
    assert report.quantized_numel / body >= 0.95
    assert f"{EXPERTS} x " in str(report)
    loss = loss_of(model, tokens(0))
    assert torch.equal(loss, loss_of(fk.dequantize_model(copy.deepcopy(model)), tokens(0)))
    fogzo = estimator(model, "guided/tensor", 30)
    losses = take_steps(model, fogzo, fk.AdamW(groups(model), lr=1e-2, fogzo=fogzo), [0] * 30)
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("how", FOGZO)
@pytest.mark.parametrize("fused", [True, False])
def test_experts_without_a_token_stay_as_they_are(fused, how):
    """20 steps of AdamW without decay leave their weights and their alphas as they were, to the bit."""
    model = quantized()
    before = {name: [t.clone() for t in (w, alpha)] for name, (w, _, alpha) in experts_of(model).items()}
    fogzo = estimator(model, how, 40)
    kind = functools.partial(fk.AdamW, fogzo=fogzo) if fused else torch.optim.AdamW
    optimizer, used = kind(groups(model), lr=1e-2), set()
    for _ in range(20):
        optimizer.zero_grad()
        with torch.no_grad():  # the batch decides who is idle: one token
            ids = tokens(0, 1, 1).repeat(1, 3)
        if fused:
            optimizer.step(lambda ids=ids: loss_of(model, ids))
        else:
            fogzo.backward(lambda ids=ids: loss_of(model, ids))
            used |= {name for name, (_, grad, _) in experts_of(model).items() if grad.any()}
            optimizer.step()
        used |= {name for name, (_, grad, _) in experts_of(model).items() if grad.any()}
    moved = 0
    for name, (weight, _, alpha) in experts_of(model).items():
        if name in used:
            moved += not torch.equal(weight, before[name][0])
        else:
            assert torch.equal(weight, before[name][0]), name
            assert torch.equal(alpha, before[name][1]), name
    assert moved >= 8
    assert len(used) < len(before)


def test_an_alpha_rests_while_its_expert_does():
    """The fused step leaves alphas of experts without a token alone, whatever momentum they have."""
    model = quantized()
    fogzo = estimator(model, "guided/tensor")
    optimizer = fk.AdamW(groups(model), lr=1e-2, fogzo=fogzo)
    for seed in range(6):
        before = {name: alpha.clone() for name, (_, _, alpha) in experts_of(model).items()}
        optimizer.zero_grad()
        optimizer.step(lambda seed=seed: loss_of(model, tokens(seed)))
        found = experts_of(model)
        idle = [name for name, (_, grad, _) in found.items() if not grad.any()]
        assert idle
        for name in idle:
            assert torch.equal(found[name][2], before[name]), (seed, name)
        assert any(not torch.equal(found[name][2], before[name]) for name in found)


# ---- rules and reports


def test_rules_name_parameters_of_any_module():
    model = mixture("mixtral")
    rules = [("*.experts.down_proj", fk.presets.lsq(4)), ("*.gate.weight", fk.presets.lsq(8))]
    report = fk.quantize_model(model, TENSOR, rules=rules, skip=[*SKIP, "*.layers.0.mlp.experts.gate_up_proj"])
    bits = {row.name: row.bits for row in report.quantized if ".mlp." in row.name}
    path = "model.layers.{}.mlp.{}".format
    assert bits == {
        path(0, "gate.weight"): 8, path(0, "experts.down_proj"): 4,
        path(1, "gate.weight"): 8, path(1, "experts.down_proj"): 4, path(1, "experts.gate_up_proj"): 2,
    }  # fmt: skip
    assert {row.name: row.shape for row in report.quantized}[path(1, "experts.gate_up_proj")] == "8 x (64, 16)"
    assert path(0, "experts.gate_up_proj") in {row.name for row in report.left}
    again = fk.quantize_model(model, None, rules=[("*.0.*.gate_up_proj", TENSOR)])
    assert path(0, "experts.gate_up_proj") in {row.name for row in again.quantized}
    fogzo = estimator(model, "probes")
    ids = [w.tensor_id for w in fogzo._run.pieces]
    assert len(set(ids)) == len(ids)
    fogzo.backward(lambda: loss_of(model, tokens(0)))


def test_inputs_of_both_products_of_experts_are_quantized():
    """The plain model with Q of weights and inputs by hand gives the same loss."""
    activation = fk.Quantizer(
        fk.Grid.uniform(4), fk.Scale.absmax("row", factor=1 / 7, least=1e-5), fk.StraightThrough("identity")
    )
    model = quantized(activation=activation)
    plain = fk.dequantize_model(copy.deepcopy(model))
    quantize = functools.partial(
        fk.quantize, grid=activation.grid, straight_through=activation.straight_through
    )

    def rounded(x):
        rows = x.detach().flatten(0, -2)
        return quantize(x.flatten(0, -2), rows.abs().amax(1, keepdim=True) * (1 / 7)).view(x.shape)

    for layer in plain.model.layers:
        experts, gate = layer.mlp.experts, layer.mlp.experts._apply_gate
        experts._apply_gate = lambda x, gate=gate: rounded(gate(x))
        experts.register_forward_pre_hook(lambda module, args: (rounded(args[0]), *args[1:]))
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            linear = getattr(layer.self_attn, name)
            linear.register_forward_pre_hook(lambda module, args: (rounded(args[0]),))
    torch.testing.assert_close(loss_of(model, tokens(0)), loss_of(plain, tokens(0)), rtol=1e-6, atol=0)


def test_experts_that_hide_the_input_of_their_second_product_say_so():
    activation = fk.Quantizer(
        fk.Grid.uniform(8), fk.Scale.absmax("row", least=1e-5), fk.StraightThrough("identity")
    )
    model = quantized(implementation="eager", activation=activation)
    with pytest.raises(RuntimeError, match="set the model's experts implementation to 'grouped_mm'"):
        loss_of(model, tokens(0))


# ---- checkpoints


@pytest.mark.parametrize("name", CONFIGS)
def test_a_saved_mixture_loads_with_its_quantizers(name, tmp_path):
    import fogzo_kernels.integrations.transformers  # noqa: F401  from_pretrained knows the type then

    model = quantized(name, ROW).eval()
    fogzo = estimator(model, "guided/tensor")
    take_steps(model, fogzo, torch.optim.AdamW(groups(model), lr=1e-2), range(3))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(loaded.model.layers[0].mlp.experts) is type(model.model.layers[0].mlp.experts)
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key
    assert torch.equal(loss_of(loaded, tokens(0)), loss_of(model, tokens(0)))
    ids = [[m.tensor_id for m in x.modules() if hasattr(m, "tensor_id")] for x in (model, loaded)]
    assert ids[0] == ids[1]  # in one order, so that N has the same bits


def test_a_plain_checkpoint_loads_and_its_alphas_are_made():
    plain = mixture("qwen3")
    with torch.no_grad():
        for p in plain.parameters():
            p.mul_(3)
    model = quantized("qwen3", ROW)
    model.load_state_dict(plain.state_dict())
    fk.quantize_model(plain, ROW, skip=SKIP)
    for key, value in plain.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key


@pytest.mark.parametrize("fused", [True, False])
def test_a_run_that_is_resumed_has_the_bits_of_one_that_was_not(fused):
    def begin():
        model = quantized()
        fogzo = estimator(model, "probes")
        kind = functools.partial(fk.AdamW, fogzo=fogzo) if fused else torch.optim.AdamW
        return model, fogzo, kind(groups(model), lr=1e-2)

    first, second = begin(), begin()
    take_steps(*first, range(3))
    for old, new in zip(first, second, strict=True):
        new.load_state_dict(copy.deepcopy(old.state_dict()))
    assert take_steps(*first, range(3, 6)) == take_steps(*second, range(3, 6))
    for key, value in first[0].state_dict().items():
        assert torch.equal(second[0].state_dict()[key], value), key


# ---- with what else trains models


def test_a_compiled_mixture_trains_alike():
    losses = []
    for wrap in (lambda model: model, torch.compile):
        model = quantized()
        called = wrap(model)
        fogzo = estimator(model, "probes")
        own = []
        optimizer = torch.optim.AdamW(groups(model), lr=1e-2)
        for seed in range(3):
            optimizer.zero_grad()
            own.append(fogzo.backward(lambda seed=seed, called=called: loss_of(called, tokens(seed))))
            optimizer.step()
        losses.append(torch.stack(own))
    torch.testing.assert_close(*losses, rtol=1e-4, atol=0)


def test_gradient_checkpointing_changes_no_bit():
    found = []
    for recompute in (False, True):
        model = quantized().train()
        if recompute:
            model.gradient_checkpointing_enable()
        fogzo = estimator(model, "probes")
        found.append(take_steps(model, fogzo, fk.AdamW(groups(model), lr=1e-2, fogzo=fogzo), range(3)))
    assert found[0] == found[1]


def test_the_stock_trainer_trains_a_mixture(tmp_path):
    model = quantized()
    optimizer = torch.optim.AdamW(groups(model), lr=1e-2)
    fk.Fogzo(model, total_steps=6).attach(optimizer)
    data = [{"input_ids": tokens(0)[0], "labels": tokens(0)[0]}] * 12
    args = TrainingArguments(
        tmp_path, max_steps=6, per_device_train_batch_size=2, report_to=[], use_cpu=True, logging_steps=1,
        disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model, args, train_dataset=data, optimizers=(optimizer, None))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]


# ---- several processes


def shard(model):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for part in (*model.model.layers, model):
        fully_shard(part, mesh=mesh, ignored_params=fk.learned_alphas(model))
    return model


def on_one(rank, wrap, how, fused):
    """A process that sees its own tokens, so that it has experts which no other process uses."""
    model = quantized("gpt-oss" if how == "gpt-oss" else "mixtral")
    wrapped = wrap(model)
    model_of = wrapped if isinstance(wrapped, DistributedDataParallel) else model
    fogzo = fk.Fogzo(
        model_of,
        total_steps=20,
        seed=3,
        kappa=1.0,
        schedule="constant",
        **FOGZO.get(how, FOGZO["guided/tensor"]),
    )
    losses = take_steps(wrapped, fogzo, sgd(model, fogzo, fused), range(rank, 8, 2))
    values = {name: whole(p).detach().clone() for name, p in model.named_parameters()}
    if wrap is DistributedDataParallel:
        leave()
    return losses, values


def sgd(model, fogzo, fused):
    kind = functools.partial(fk.SGD, fogzo=fogzo) if fused else torch.optim.SGD
    return kind(groups(model), lr=0.1, momentum=0.9)


@functools.cache
def alone(how, fused):
    """One process with both batches of each step as micro-batches."""
    model = quantized("gpt-oss" if how == "gpt-oss" else "mixtral")
    fogzo = estimator(model, how if how in FOGZO else "guided/tensor")
    optimizer = sgd(model, fogzo, fused)
    losses = []
    for seed in range(0, 8, 2):
        optimizer.zero_grad()
        for probe in fogzo.probes():
            with probe:
                for rank in range(2):
                    probe.backward(loss_of(model, tokens(seed + rank)) / 2)
        losses.append(float(optimizer.step() if fused else fogzo.estimate_()))
        if not fused:
            optimizer.step()
    return losses, {name: p.detach() for name, p in model.named_parameters()}


@needs_gloo
@pytest.mark.slow_first
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("how", ["guided/tensor", "probes", "gpt-oss"])
@pytest.mark.parametrize("wrap", [DistributedDataParallel, shard], ids=["ddp", "fsdp"])
def test_two_processes_with_experts_of_their_own_train_as_one(wrap, how, fused, tmp_path):
    first, second = spawned(functools.partial(on_one, wrap=wrap, how=how, fused=fused), tmp_path)
    losses, values = alone(how, fused)
    for found, own in (first, second):
        torch.testing.assert_close(torch.tensor(found), torch.tensor(losses), rtol=1e-5, atol=0)
        for name, value in values.items():
            torch.testing.assert_close(own[name], value, rtol=1e-4, atol=1e-6)
    assert first[0] == second[0]
    for name, value in first[1].items():
        assert torch.equal(second[1][name], value), name
