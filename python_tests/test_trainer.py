"""transformers' Trainer, the real one: its steps are FOGZO's, accumulated, clipped, saved and resumed."""

import os

import pytest
import torch
from support.processes import as_launched, fresh_accelerate, leave, needs_gloo, two_of  # noqa: F401

import fogzo_kernels as fk

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
pytestmark = pytest.mark.usefixtures("fresh_accelerate")

from fogzo_kernels.integrations.trainer import STATE, FogzoTrainer, FogzoTrainerMixin  # noqa: E402

STEPS, TOKENS = 6, 24
OPTIONS = {"directions": 1, "kappa": 0.5, "seed": 3}


def network():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    model = transformers.LlamaForCausalLM(config)
    fk.quantize_model(model, fk.presets.lsq(2), skip=["lm_head", "model.embed_tokens"])
    return model


def rows(count=96):
    generator = torch.Generator().manual_seed(1)
    found = torch.randint(64, (count, TOKENS), generator=generator)
    return [{"input_ids": row, "labels": row} for row in found]


class StockInOrder(transformers.Trainer):
    """Takes the rows as they come."""

    def _get_train_sampler(self, *args, **kwargs):
        return torch.utils.data.SequentialSampler(self.train_dataset)


class InOrder(FogzoTrainerMixin, StockInOrder):
    """Of any Trainer."""


def trainer_of(folder, model=None, kind=InOrder, fogzo=OPTIONS, optimizers=(None, None), **arguments):
    given = {
        "output_dir": str(folder), "max_steps": STEPS, "per_device_train_batch_size": 8, "learning_rate": 3e-3,
        "lr_scheduler_type": "constant", "use_cpu": True, "report_to": [], "disable_tqdm": True,
        "logging_steps": 1, "save_strategy": "no", "optim": "adamw_torch", "weight_decay": 0.0,
        "max_grad_norm": 1.0,
    } | arguments  # fmt: skip
    options = {"fogzo": fogzo} if issubclass(kind, FogzoTrainerMixin) else {}
    args = transformers.TrainingArguments(**given)
    return kind(model=model or network(), args=args, train_dataset=rows(), optimizers=optimizers, **options)


def weights_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)


def sgd(model):
    """Linear in the gradients, so that what rounding makes of small ones stays small."""
    return torch.optim.SGD(model.parameters(), lr=0.5)


def by_hand(clip=1.0, size=8, micro=1, optimizer_of=adamw, lengths=(STEPS,)):
    """The same steps without a Trainer, to the bit: losses are sums over the count of all, as it makes them.

    A run that goes on for more steps has several lengths.

    Another rounding would sooner or later move a code, and what follows would not be close at all.
    """
    model, data = network(), rows()
    fogzo = fk.Fogzo(model, total_steps=lengths[0], **OPTIONS)
    optimizer, losses = optimizer_of(model), []
    count = torch.tensor(size * (TOKENS - 1))  # of predictions in a step
    for step in range(lengths[-1]):
        if step == lengths[0]:
            state, fogzo = fogzo.state_dict(), fk.Fogzo(model, total_steps=lengths[-1], **OPTIONS)
            fogzo.load_state_dict(state, may_differ=["total_steps"])
        tokens = torch.stack([row["input_ids"] for row in data[step * size : (step + 1) * size]])
        optimizer.zero_grad()
        parts = tokens.chunk(micro)
        for probe in fogzo.probes():
            with probe:
                for part in parts:
                    given = {"input_ids": part, "labels": part, "num_items_in_batch": count}
                    probe.backward(model(**given, use_cache=False).loss)  # as it does: of other strides
        losses.append(float(fogzo.estimate_()))
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    return losses, weights_of(model)


def logged(trainer, name="loss"):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@pytest.mark.parametrize("clip", [1.0, 0.05])
def test_the_trainer_takes_the_steps_of_a_loop_by_hand(tmp_path, clip):
    """What is clipped is the estimate."""
    model = network()
    trainer = trainer_of(tmp_path, model, max_grad_norm=clip)
    trainer.optimizer = sgd(model)
    trainer.train()
    losses, weights = by_hand(clip, optimizer_of=sgd)
    assert logged(trainer) == losses
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert trainer.fogzo.steps == STEPS
    assert not trainer.fogzo.pending


def test_accumulation_is_one_step_of_all_micro_batches(tmp_path):
    """Against a loop by hand over the same four."""
    trainer = trainer_of(tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=4)
    trainer.train()
    losses, weights = by_hand(size=16, micro=4)
    assert logged(trainer) == losses
    assert all(torch.equal(p, weights[name]) for name, p in trainer.model.named_parameters())
    assert trainer.fogzo.steps == STEPS


def test_without_probes_a_run_is_that_of_the_plain_trainer(tmp_path):
    """start=1: the passes are straight-through ones, to the bit what the Trainer does alone."""
    plain = trainer_of(tmp_path / "a", kind=transformers.Trainer)
    ours = trainer_of(tmp_path / "b", kind=FogzoTrainer)
    ours._options = {"directions": 1, "kappa": 0.5, "start": 1.0}
    for trainer in (plain, ours):
        trainer.train()
    assert logged(plain) == logged(ours)
    theirs = weights_of(plain.model)
    assert all(torch.equal(p, theirs[name]) for name, p in ours.model.named_parameters())


@pytest.mark.parametrize("options", [{"bf16": True}, {"gradient_checkpointing": True}])
def test_bfloat16_and_checkpointing_keep_the_losses(tmp_path, options):
    trainer = trainer_of(tmp_path, **options)
    trainer.train()
    losses, _ = by_hand()
    assert logged(trainer) == pytest.approx(losses, rel=0.02 if "bf16" in options else 1e-4)
    assert logged(trainer)[-1] < logged(trainer)[0]


def test_logs_have_the_stats(tmp_path):
    trainer = trainer_of(tmp_path)
    trainer.train()
    for name in ("cosine", "difference", "guide_norm", "lost_steps", "alphas_at_floor"):
        assert logged(trainer, f"fogzo_{name}")
    assert logged(trainer, "fogzo_one_minus_beta") == sorted(logged(trainer, "fogzo_one_minus_beta"))
    assert trainer.fogzo.stats()["lost_steps"] == 0


def test_a_resumed_run_ends_with_the_bits_of_the_whole_one(tmp_path):
    whole = trainer_of(tmp_path / "whole")
    whole.train()
    saved = {"save_strategy": "steps", "save_steps": 2}
    cut = trainer_of(tmp_path / "cut", **saved)
    cut.train()
    for later in ("checkpoint-4", "checkpoint-6"):
        (tmp_path / "cut" / later).rename(tmp_path / later)
    resumed = trainer_of(tmp_path / "cut", **saved)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.fogzo.steps == STEPS
    expected = weights_of(whole.model)
    assert all(torch.equal(p, expected[name]) for name, p in resumed.model.named_parameters())
    assert logged(resumed)[-4:] == logged(whole)[-4:]


@pytest.mark.parametrize("longer", [{"max_steps": STEPS}, {"max_steps": -1, "num_train_epochs": 1}])
def test_a_finished_run_goes_on_for_more_steps(tmp_path, longer):
    """From its end, in the Trainer's own way; without a word it is refused."""
    short = trainer_of(tmp_path, max_steps=4, save_strategy="steps", save_steps=4)
    short.train()
    with pytest.raises(ValueError, match=r"state\['total_steps'\] must be \d+, got 4.* may_differ="):
        trainer_of(tmp_path, **longer).train(resume_from_checkpoint=True)
    resumed = trainer_of(tmp_path, fogzo={**OPTIONS, "may_differ": ["total_steps"]}, **longer)
    resumed.train(resume_from_checkpoint=True)
    total = resumed.state.max_steps
    assert resumed.fogzo.steps == resumed.state.global_step == total > 4
    expected = by_hand(lengths=(4, total))
    assert logged(resumed)[-2:] == expected[0][-2:]
    assert all(torch.equal(p, expected[1][name]) for name, p in resumed.model.named_parameters())


def test_a_checkpoint_without_its_state_is_refused(tmp_path):
    trainer = trainer_of(tmp_path, save_strategy="steps", save_steps=3)
    trainer.train()
    (tmp_path / "checkpoint-3" / STATE).unlink()
    again = trainer_of(tmp_path)
    before = weights_of(again.model)
    with pytest.raises(
        FileNotFoundError, match=f"resume_from_checkpoint must have {STATE}, got .*checkpoint-3"
    ):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert before.keys() == weights_of(again.model).keys()


def test_settings_that_would_mislead_are_refused(tmp_path):
    with pytest.raises(ValueError, match="fogzo must not have total_steps"):
        FogzoTrainer(model=network(), fogzo={"total_steps": 5, "kappa": 1.0})
    trainer = trainer_of(tmp_path)
    with pytest.raises(
        ValueError, match="model must be plain or DistributedDataParallel for FOGZO, got DataParallel"
    ):
        trainer._new_fogzo(torch.nn.DataParallel(trainer.model))
    for kind in ("DEEPSPEED", "FSDP"):
        trainer.accelerator.state.distributed_type = accelerate.utils.DistributedType[kind]
        with pytest.raises(ValueError, match=f"for FOGZO, got {kind}"):
            trainer._new_fogzo(trainer.model)


def test_a_plain_trainer_with_a_fused_optimizer_says_what_is_missing(tmp_path):
    model = network()
    fogzo = fk.Fogzo(model, total_steps=STEPS, **OPTIONS)
    trainer = trainer_of(tmp_path, model, transformers.Trainer)
    trainer.optimizer = fk.AdamW(model.parameters(), lr=1e-3, fogzo=fogzo)
    with pytest.raises(RuntimeError, match="comes from a backward outside of the passes of fogzo"):
        trainer.train()


def test_a_fused_optimizer_takes_its_estimates(tmp_path):
    model = network()
    trainer = trainer_of(tmp_path, model)
    trainer.optimizer = fk.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    trainer.train()
    losses, _ = by_hand()
    assert logged(trainer) == pytest.approx(losses, rel=1e-3)


def worker(rank, folder, port):
    as_launched(rank, port)
    trainer = trainer_of(
        folder, per_device_train_batch_size=4, gradient_accumulation_steps=2, ddp_backend="gloo"
    )
    trainer.train()
    found = {"parallel": type(trainer.model_wrapped).__name__, "losses": logged(trainer)}
    torch.save(found | {"weights": weights_of(trainer.model)}, os.path.join(folder, f"{rank}.pt"))
    leave()


@needs_gloo
def test_two_processes_take_the_steps_of_one(tmp_path):
    """Two micro-batches of 4 on each of two processes: 16 rows a step."""
    first, second = two_of(worker, tmp_path)
    assert first["parallel"] == "DistributedDataParallel"
    assert all(torch.equal(w, second["weights"][name]) for name, w in first["weights"].items())
    losses, _ = by_hand(size=16, micro=4)
    assert first["losses"] == pytest.approx(losses, rel=1e-3)


def test_the_stock_trainer_takes_guided_noise_by_a_hook(tmp_path):
    """Accumulation, clipping and accelerate's wrapper of the optimizer; the same by a loop by hand."""

    def made():
        model = network()
        fogzo = fk.Fogzo(model, **OPTIONS | {"total_steps": 3, "directions": 0, "noise_per": "tensor"})
        optimizer = sgd(model)
        fogzo.attach(optimizer)
        return model, fogzo, optimizer

    model, fogzo, optimizer = made()
    more = {"max_steps": 3, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    more |= {"learning_rate": 0.5, "max_grad_norm": 0.05, "optimizers": (optimizer, None)}
    trainer_of(tmp_path, model, StockInOrder, **more).train()
    assert fogzo.steps == 3
    other, _, plain = made()
    count = torch.tensor(8 * (TOKENS - 1))
    for step in range(3):
        plain.zero_grad()
        tokens = torch.stack([row["input_ids"] for row in rows()[8 * step : 8 * step + 8]])
        for part in tokens.chunk(2):
            given = {"input_ids": part, "labels": part, "num_items_in_batch": count}
            other(**given, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(other.parameters(), 0.05)
        plain.step()
    weights = weights_of(other)
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
