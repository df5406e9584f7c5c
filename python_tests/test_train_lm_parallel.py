"""The trainer of language models on many processes: what it ends with, and that no kill changes that."""

import signal

import pytest
import torch
from support.exported import logits
from support.lm_runs import SMALL, STEPS, die_in, moments, rows, same, train
from support.processes import as_launched, meeting_point, needs_gloo, server
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from bench.evidence import record, train_lm
from bench.evidence.processes import CHECKPOINT, Processes

pytestmark = needs_gloo
pytest.importorskip("transformers", reason="transformers is not installed")
COUNT = 2


def as_process(rank, count, port, out, options, moment):
    as_launched(rank, port, count)
    if moment is not None:
        die_in(*moment)
    raise SystemExit(train_lm.main(["--out", str(out), *SMALL, *options]))


def run(out, options, count=COUNT, dying=None, moment=None):
    """What each process left with. One may die, and the others are killed as soon as it has."""
    point = meeting_point()
    found = [
        server().Process(
            target=as_process, args=(rank, count, point.port, out, options, moment if rank == dying else None)
        )
        for rank in range(count)
    ]
    for one in found:
        one.start()
    if dying is not None:
        found[dying].join()
        for one in found:
            one.kill()
    for one in found:
        one.join()
    return [one.exitcode for one in found]


def state(out, tmp_path):
    """All that the last checkpoint holds, by names, whole."""
    dcp_to_torch_save(out / CHECKPOINT, tmp_path / "whole.pt")
    return {"step": 0, "all": torch.load(tmp_path / "whole.pt", weights_only=False)}


@pytest.mark.slow_first
def test_killed_again_and_again_two_processes_end_with_the_same_bits(tmp_path):
    """Both at once, at moments of no choosing: while they build, step, log, save or rename."""
    options = ["--parallel", "fsdp", "--steps", str(STEPS), "--save-every", "3", "--log-every", "5",
               "--evaluate-every", str(STEPS // 4), "--kappa", "1.0"]  # fmt: skip
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    for kill, moment in enumerate(moments()):
        dying = kill % COUNT
        left = run(killed, [*options, "--resume"], dying=dying, moment=moment)
        assert left[dying] == -signal.SIGALRM, f"it ended before it was killed: {moment}"
    assert run(killed, [*options, "--resume"]) == [0] * COUNT
    assert run(whole, options) == [0] * COUNT
    assert same(state(killed, tmp_path), state(whole, tmp_path))
    found, expected = rows(killed), rows(whole)
    for name in ("step", "loss", "validation_loss", "learning_rate", "difference", "cosine"):
        assert [row[name] for row in found] == [row[name] for row in expected]
    assert sorted(path.name for path in killed.glob(f"{CHECKPOINT}*")) == [CHECKPOINT, f"{CHECKPOINT}-{STEPS}"]


def losses(out):
    return [float(row["loss"]) for row in rows(out)]


LSQ = ["--micro-batches", "2", "--clip", "0", "--preset", "lsq"]
STE = ["--estimator", "ste"]
FLOAT = ["--estimator", "ste", "--preset", "none"]
QUEST = ["--preset", "quest-w2a2", "--hidden", "128", "--directions", "2"]


@pytest.mark.parametrize(
    ("way", "options"),
    [
        ("ddp", LSQ),
        ("fsdp", QUEST),
        ("ddp", FLOAT),
        *(
            pytest.param(*one, marks=pytest.mark.everything)
            for one in [("fsdp", LSQ), ("ddp", STE), ("fsdp", STE), ("fsdp", FLOAT), ("ddp", QUEST)]
        ),
    ],
)
def test_losses_are_those_of_one_process(way, options, tmp_path):
    """And a run of two processes goes on with four, from a signal on. Sums are rounded in another order.

    Few steps: a code of an input that rounding turned into its neighbour changes all that follows.
    """
    options = [*options, "--steps", "6", "--log-every", "1", "--rows", "8"]
    assert train(tmp_path / "one", *options) == 0
    out, shared = tmp_path / "many", [*options, "--parallel", way]
    assert run(out, [*shared, "--stop-after", "3"]) == [0] * COUNT
    assert run(out, [*shared, "--resume"], 4) == [0] * 4
    torch.testing.assert_close(losses(out), losses(tmp_path / "one"), rtol=3e-3, atol=0)


@pytest.mark.parametrize(
    ("environment", "way", "message"),
    [
        ({"WORLD_SIZE": "2"}, "none", "--parallel must be ddp or fsdp with 2 processes, got none"),
        ({}, "fsdp", "--parallel fsdp must be run by torchrun --nproc-per-node N -m ..., got no torchrun"),
    ],
)
def test_what_processes_do_is_said(environment, way, message, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match=message):
        Processes(way, "cpu")


def test_a_checkpoint_of_another_kind_is_refused(tmp_path):
    assert train(tmp_path, "--steps", "2") == 0
    assert run(tmp_path, ["--steps", "2", "--parallel", "ddp", "--resume"]) == [1] * COUNT
    (tmp_path / record.CHECKPOINT).unlink()
    assert run(tmp_path, ["--steps", "2", "--parallel", "ddp"]) == [0] * COUNT
    with pytest.raises(SystemExit, match="--parallel must be ddp or fsdp, as in the run whose checkpoint"):
        train(tmp_path, "--steps", "2", "--resume")


@pytest.mark.parametrize("way", ["none", "fsdp"])
def test_a_run_is_exported(way, tmp_path):
    """A run of one process or many is saved and exported by the commands, with the logits of the run."""
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    from transformers import AutoModelForCausalLM

    from bench.evidence import save_run
    from fogzo_kernels.export.__main__ import main

    options = ["--steps", "4", "--parallel", way]
    out = tmp_path / "run"
    assert (train(out, *options) if way == "none" else max(run(out, options))) == 0
    assert save_run.main([str(out), str(tmp_path / "saved")]) == 0
    assert (
        main([str(tmp_path / "saved"), "--format", "compressed-tensors", "--out", str(tmp_path / "out")]) == 0
    )
    tokens = torch.arange(20)[None]
    found = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32), tokens)
    assert torch.equal(found, logits(save_run.read(out), tokens))
