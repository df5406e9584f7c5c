"""The trainer of byte-level language models: what it leaves, and that no kill changes what it ends with."""

import math
import os
import signal

import pytest
import torch
from support.lm_runs import STEPS, die_in, moments, rows, same, train
from support.processes import server

from bench.evidence import record, text, train_lm

pytest.importorskip("transformers", reason="transformers is not installed")


def state(out):
    return record.load(out, torch.device("cpu"))


def killed(moment, out, options):
    die_in(*moment)
    train(out, *options)


def test_killed_again_and_again_it_ends_with_the_same_bits(tmp_path):
    """At moments of no choosing: while it builds, steps, logs or saves."""
    options = ["--steps", str(STEPS), "--save-every", "7", "--log-every", "5",
               "--evaluate-every", str(STEPS // 4), "--kappa", "1.0"]  # fmt: skip
    for moment in moments():
        run = server().Process(target=killed, args=(moment, tmp_path / "killed", [*options, "--resume"]))
        run.start()
        run.join()
        assert run.exitcode == -signal.SIGALRM, f"it ended before it was killed: {moment}"
    assert train(tmp_path / "killed", *options, "--resume") == 0
    assert train(tmp_path / "whole", *options) == 0
    assert same(state(tmp_path / "killed"), state(tmp_path / "whole"))
    found, expected = rows(tmp_path / "killed"), rows(tmp_path / "whole")
    for name in ("step", "loss", "validation_loss", "learning_rate", "difference", "cosine"):
        assert [row[name] for row in found] == [row[name] for row in expected]
    assert not list((tmp_path / "killed").glob("*.tmp")) + list((tmp_path / "killed").glob("checkpoint.pt.*"))


@pytest.mark.parametrize(
    "options",
    [
        ["--estimator", "ste", "--micro-batches", "2", "--clip", "0"],
        ["--micro-batches", "4", "--directions", "2", "--clip", "0"],
        ["--dtype", "bf16", "--preset", "quest-w2a2", "--hidden", "128", "--start", "0.5", "--decay", "linear"],
        ["--preset", "none", "--estimator", "ste", "--decay", "constant"],
    ],
)
def test_runs_stop_and_go_on(options, tmp_path):
    """After any number of steps; all that they are made with is in the checkpoint, and a loss that falls."""
    options = [*options, "--steps", "12", "--save-every", "5", "--log-every", "1"]
    assert train(tmp_path / "whole", *options) == 0
    assert train(tmp_path / "parts", *options, "--stop-after", "4") == 0
    assert state(tmp_path / "parts")["step"] == 4
    assert train(tmp_path / "parts", *options, "--resume") == 0
    assert same(state(tmp_path / "parts"), state(tmp_path / "whole"))
    losses = [float(row["loss"]) for row in rows(tmp_path / "parts")]
    assert len(losses) == 12
    assert losses[-1] < losses[0] < 1.2 * math.log(256)


def test_a_run_logs_rows_events_validation_and_a_sample(tmp_path, capsys):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert train(tmp_path, "--steps", "6", "--log-every", "2", "--evaluate-every", "4", "--sample", "30") == 0
    found = rows(tmp_path)
    assert [row["step"] for row in found] == ["2", "4", "6"]
    assert [math.isnan(float(row["validation_loss"])) for row in found] == [True, False, False]
    for name in (*train_lm.STATS, "tokens_per_second", "seconds", "learning_rate"):
        assert all(math.isfinite(float(row[name])) for row in found[1:]), name
    events = EventAccumulator(str(tmp_path / record.EVENTS)).Reload()
    assert [event.step for event in events.Scalars("loss")] == [2, 4, 6]
    assert "--- 30 bytes that it writes" in capsys.readouterr().out


def test_a_signal_ends_the_step_and_saves(tmp_path, monkeypatch):
    original = train_lm.take_step

    def signalled(run):
        loss = original(run)
        if run.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss

    monkeypatch.setattr(train_lm, "take_step", signalled)
    before = signal.getsignal(signal.SIGTERM)
    assert train(tmp_path, "--steps", "9") == 1
    assert signal.getsignal(signal.SIGTERM) is before
    assert state(tmp_path)["step"] == 3


def test_a_failed_save_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    record.save(tmp_path, {"step": 1})

    def failing(state, file):
        file.write(b"half")
        raise OSError("no space")

    monkeypatch.setattr(record.torch, "save", failing)
    with pytest.raises(OSError, match="no space"):
        record.save(tmp_path, {"step": 2})
    assert state(tmp_path) == {"step": 1}
    assert [path.name for path in tmp_path.iterdir()] == [record.CHECKPOINT]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--out must have no checkpoint, or be given with --resume"),
        (["--resume", "--steps", "7"], "--steps must be 4, as in the run to resume, got 7"),
        (["--resume", "--kappa", "0.5"], "--kappa must be 0.1, as in the run to resume, got 0.5"),
    ],
)
def test_another_run_is_refused(options, message, tmp_path):
    assert train(tmp_path, "--steps", "4") == 0
    before = state(tmp_path)
    with pytest.raises(SystemExit, match=message):
        train(tmp_path, *(options if "--steps" in options else ["--steps", "4", *options]))
    assert same(state(tmp_path), before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--preset", "none"], "--preset must quantize for --estimator fogzo, got none"),
        (["--bytes", "1"], "size must hold one of Python's sources, got 1 bytes"),
    ],
)
def test_what_cannot_run_is_refused(options, message, tmp_path):
    with pytest.raises((SystemExit, ValueError), match=message):
        train(tmp_path, *options)


def test_bad_numbers_are_named(tmp_path, capsys):
    for options in (["--rows", "6", "--micro-batches", "4"], ["--save-every", "0"], ["--seed", "-1"]):
        with pytest.raises(SystemExit):
            train(tmp_path, *options)
        assert f"{options[-2] if options[0] != '--rows' else '--rows'} must be" in capsys.readouterr().err


def test_files_are_parted_each(tmp_path):
    """The last one is cut where the text is longer than was asked for."""
    for name, data in (("a", b"a" * 20), ("b", b"b" * 20)):
        (tmp_path / name).write_bytes(data)
    found = text.files([tmp_path / "a", tmp_path / "b"], 30)
    assert bytes(found.train.tolist()) == b"a" * 18 + b"b" * 9
    assert bytes(found.validation.tolist()) == b"a" * 2 + b"b"
    with pytest.raises(SystemExit, match="--text must have more than --context 32 bytes for train, got 27"):
        train(tmp_path / "out", "--text", str(tmp_path / "a"), str(tmp_path / "b"), "--bytes", "30")


def test_every_seed_and_step_has_batches_of_its_own():
    """A CPU's generator takes 32 bits of its seed: seeds above others would be lost."""
    data = torch.arange(256, dtype=torch.uint8)
    found = {
        tuple(text.batch(data, 4, 8, text.generator_of(seed, step)).flatten().tolist())
        for seed in (0, 1, 600, 2**31)
        for step in (0, 1, 10_000)
    }
    assert len(found) == 12
