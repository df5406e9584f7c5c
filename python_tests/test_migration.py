"""The page on migration: its programs train alike, and what it calls equal is equal, with the real packages."""

import contextlib
import copy
import io
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fogzo_kernels as fk

PAGE = Path(__file__).parents[1] / "docs/migrate.md"
PROGRAMS = [found[1] for found in re.finditer(r"^```python\n((?:.*\n)*?)```$", PAGE.read_text(), re.MULTILINE)]
TORCHAO, AFTER_TORCHAO, LSQ, AFTER_LSQ, CARRIED, MEZO, AFTER_MEZO, MEZO_HERE = PROGRAMS
SEED = "torch.manual_seed(0)\n"
GUIDED, PLAINLY = "total_steps=300)", "total_steps=300, kappa=0)"
FEW = ("range(300)", "range(20)")


def needs_torchao():
    return pytest.importorskip("torchao.quantization.qat", reason="torchao is not installed")


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs a program in an empty folder, with changes; returns its names and, as ``printed``, its output."""
    monkeypatch.chdir(tmp_path)

    def run(code, *changes):
        for old, new in changes:
            assert code.count(old) == 1, old
            code = code.replace(old, new)
        names, printed = {"__name__": "program"}, io.StringIO()
        with torch.random.fork_rng(), contextlib.redirect_stdout(printed):
            exec(code, names)
        return names | {"printed": printed.getvalue()}

    return run


def loss_of(names):
    """Of the model at the end of a program."""
    with torch.no_grad():
        return float(F.cross_entropy(names["model"](names["x"]), names["y"]))


def start():
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def gradients(model, x, y):
    F.cross_entropy(model(x), y).backward()
    return [model[0].weight.grad, model[2].weight.grad]


# ---- torchao


@pytest.fixture
def prepared():
    """One model, prepared by torchao and by this package as the page does it, with inputs as they are."""
    qat = needs_torchao()
    from torchao.quantization import quantize_

    plain = start()
    theirs, ours = copy.deepcopy(plain), copy.deepcopy(plain)
    quantize_(theirs, qat.QATConfig(weight_config=qat.IntxFakeQuantizeConfig(torch.int4, group_size=32)))
    scale = fk.Scale.absmax(32, factor=1 / 7.5)
    fk.quantize_model(
        ours, fk.Quantizer(fk.Grid.uniform(4), scale, fk.StraightThrough("identity", clip="trust"))
    )
    return theirs, ours


def largest(weight):
    """Where the largest weight of each group of 32 is."""
    size = weight.detach().abs().unflatten(1, (-1, 32))
    return (size == size.amax(-1, keepdim=True)).flatten(1)


def test_torchao_has_the_same_scales_and_weights_but_the_largest_of_a_group(prepared):
    theirs, ours = prepared
    theirs(torch.zeros(1, 64))
    for i in (0, 2):
        quantizer, weight = theirs[i].weight_fake_quantizer, ours[i].weight
        torch.testing.assert_close(quantizer.scale, ours[i].alpha, rtol=1e-6, atol=0)
        a, b, end = quantizer(weight), ours[i].effective_weight(), largest(weight)
        assert end.sum() == weight.numel() // 32
        torch.testing.assert_close(a[~end], b[~end], rtol=1e-6, atol=0)
        steps = (a - b)[end].abs() / ours[i].alpha.flatten()
        assert steps.max() < 1.01
        assert a.unique().numel() > 16


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_torchao_has_the_same_weights_for_its_own_scales(bits, generator):
    """With its scales as fixed ones nothing differs, but for values that lie on a tie."""
    qat = needs_torchao()
    weight = torch.randn(48, 64, generator=generator)
    quantizer = qat.FakeQuantizerBase.from_config(
        qat.IntxFakeQuantizeConfig(getattr(torch, f"int{bits}"), group_size=32)
    )
    a = quantizer(weight)
    torch.testing.assert_close(
        quantizer.scale, weight.unflatten(1, (-1, 32)).abs().amax(-1) * 2 / (2**bits - 1)
    )
    b = fk.quantize(weight, quantizer.scale, grid=fk.Grid.uniform(bits), straight_through=fk.StraightThrough())
    position = (weight.unflatten(1, (-1, 32)) / quantizer.scale[..., None]).flatten(1)
    tie = (position.frac().abs() - 0.5).abs() < 1e-4
    assert tie.sum() < 0.1 * tie.numel()
    torch.testing.assert_close(a[~tie], b[~tie], rtol=1e-6, atol=0)


def test_torchao_has_the_same_gradient_also_where_weights_saturate(generator):
    """For half of its own scale, where many codes are at the ends; what lies on a tie may go either way."""
    qat = needs_torchao()
    config = qat.IntxFakeQuantizeConfig(torch.int4, group_size=32, is_dynamic=False)
    quantizer = qat.FakeQuantizerBase.from_config(config)
    weight = torch.randn(48, 64, generator=generator)
    quantizer(weight)
    quantizer.scale = quantizer.scale / 2
    upstream = torch.randn(48, 64, generator=generator)
    theirs, ours = (weight.clone().requires_grad_() for _ in range(2))
    quantizer(theirs).backward(upstream)
    trust = fk.StraightThrough("identity", clip="trust")
    fk.quantize(ours, quantizer.scale, grid=fk.Grid.uniform(4), straight_through=trust).backward(upstream)
    position = (weight.unflatten(1, (-1, 32)) / quantizer.scale[..., None]).flatten(1)
    tie = (position.frac().abs() - 0.5).abs() < 1e-4
    assert (ours.grad == 0).sum() > 50
    assert tie.sum() < 0.1 * tie.numel()
    torch.testing.assert_close(theirs.grad[~tie], ours.grad[~tie])


def test_a_checkpoint_of_torchao_loads(prepared):
    theirs, ours = prepared
    with torch.no_grad():
        for p in theirs.parameters():
            p.mul_(1.5)
    ours.load_state_dict(theirs.state_dict())
    assert torch.equal(ours[0].weight, theirs[0].weight)
    theirs(torch.zeros(1, 64))
    torch.testing.assert_close(theirs[0].weight_fake_quantizer.scale, ours[0].alpha)


def test_torchao_counts_inputs_from_the_least_one(generator):
    """The table's symmetric codes: of inputs that are never negative, half are used."""
    qat = needs_torchao()
    x = torch.rand(8, 64, generator=generator)
    tokens = qat.IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False)
    theirs = qat.FakeQuantizerBase.from_config(tokens)
    theirs(x)
    dynamic = fk.presets.dynamic(8)
    torch.testing.assert_close(theirs.scale.flatten(), x.amax(1) / 255)
    assert dynamic.scale.factor == pytest.approx(1 / 127)
    assert theirs.zero_point.unique().tolist() == [-128]


def test_the_pair_of_torchao_ends_alike_and_is_served_alike(run):
    """Within 1.5, with guided noise and without; without it, the first steps have almost the same losses."""
    needs_torchao()
    before, after = run(TORCHAO), run(AFTER_TORCHAO)
    plainly = run(AFTER_TORCHAO, (GUIDED, PLAINLY))
    assert 1 / 1.5 < loss_of(after) / loss_of(before) < 1.5
    assert 1 / 1.5 < loss_of(plainly) / loss_of(before) < 1.5
    first = run(TORCHAO, FEW)["loss"], run(AFTER_TORCHAO, (GUIDED, PLAINLY), FEW)["loss"]
    torch.testing.assert_close(*first, rtol=0.02, atol=0)
    assert first[0] < 0.9 * run(TORCHAO, ("range(300)", "range(1)"))["loss"]
    assert plainly["loss"] != after["loss"]
    for names in (before, after):
        kinds = {type(names["model"][i].weight).__name__ for i in (0, 2)}
        assert kinds == {"IntxUnpackedToInt8Tensor"}
        assert names["printed"].count("step") == 3
        assert loss_of(names) < 1.1 * names["loss"].item()


# ---- LSQ


@pytest.fixture
def by_hand(run):
    """The page's LSQ layers around a model, and the same model quantized."""
    layer = run(LSQ)["LSQLinear"]
    plain = start()
    theirs, ours = copy.deepcopy(plain), copy.deepcopy(plain)
    theirs[0], theirs[2] = layer(theirs[0], bits=2), layer(theirs[2], bits=2)
    fk.quantize_model(ours, fk.presets.lsq(2))
    return theirs, ours


def test_lsq_by_hand_has_the_same_outputs_and_gradients(by_hand, generator):
    theirs, ours = by_hand
    x, y = torch.randn(64, 64, generator=generator), torch.arange(64) % 10
    torch.testing.assert_close(theirs(x), ours(x))
    for a, b in zip(gradients(theirs, x, y), gradients(ours, x, y), strict=True):
        torch.testing.assert_close(a, b)
        assert a.count_nonzero() > 0
    for i in (0, 2):
        assert theirs[i].step.grad != 0
        torch.testing.assert_close(theirs[i].step.grad, ours[i].alpha.grad, rtol=1e-4, atol=1e-8)


def test_step_sizes_are_carried_over_and_back(by_hand, run, generator):
    theirs, ours = by_hand
    with torch.no_grad():
        for i in (0, 2):
            theirs[i].weight.mul_(1.3)
            theirs[i].step.mul_(0.7)
    x = torch.randn(8, 64, generator=generator)
    names = {
        name.removesuffix("step") + "alpha" * name.endswith("step"): t
        for name, t in theirs.state_dict().items()
    }
    found = ours.load_state_dict(names, strict=False)
    assert found.unexpected_keys == []
    assert {key.rpartition(".")[2] for key in found.missing_keys} == {"alpha_least", "_extra_state"}
    torch.testing.assert_close(theirs(x), ours(x))
    assert ours[0].alpha == theirs[0].step
    carried = run(CARRIED)
    assert "step sizes 0.21, 0.18" in carried["printed"]
    with torch.no_grad():
        theirs[0].step.fill_(1.0)
        theirs[0].step.copy_(ours[0].alpha)
    torch.testing.assert_close(theirs(x), ours(x))


def test_the_pair_of_lsq_ends_alike(run):
    """Within 1.25, with guided noise and without; without it the first steps have the same losses."""
    before, after = run(LSQ), run(AFTER_LSQ)
    plainly = run(AFTER_LSQ, (GUIDED, PLAINLY))
    assert 1 / 1.25 < loss_of(after) / loss_of(before) < 1.25
    assert 1 / 1.25 < loss_of(plainly) / loss_of(before) < 1.25
    first = run(LSQ, FEW)["loss"], run(AFTER_LSQ, (GUIDED, PLAINLY), FEW)["loss"]
    torch.testing.assert_close(*first, rtol=1e-3, atol=0)
    assert first[0] < 0.8 * run(LSQ, ("range(300)", "range(1)"))["loss"]
    assert plainly["loss"] != after["loss"]
    assert before["printed"].count("step") == after["printed"].count("step") == 3
    state = torch.load("lsq.pt")
    assert sorted(state) == ["0.bias", "0.step", "0.weight", "2.bias", "2.step", "2.weight"]


# ---- MeZO


def test_a_step_is_mezo_s_for_the_same_noise(run):
    """Of the page's two programs, with the noise of one drawn by the other."""
    short = ("range(1000)", "range(1)")
    theirs = run(MEZO, short, ("    torch.manual_seed(seed)\n    for w in", "    for w in"),
                 ("model.parameters():", "enumerate(model.parameters()):"), ("for w in", "for i, w in"),
                 ("torch.randn_like(w)", "noise(i, w)"), (SEED, SEED + NOISE))  # fmt: skip
    ours = run(MEZO_HERE, short)
    first = start_of(theirs)
    for w, mine, old in zip(theirs["model"].parameters(), ours["model"].parameters(), first, strict=True):
        moved = mine.detach() - old
        assert moved.count_nonzero() > 0.99 * old.numel()
        torch.testing.assert_close(moved, w.detach() - old, rtol=1e-3, atol=1e-7)


#: Noise as this package draws it in step 0, in the place of PyTorch's.
NOISE = """
import fogzo_kernels as fk


def noise(i, w):
    return fk.noise(w.numel(), "gaussian", seed=0, step=0, tensor_id=i).view_as(w)


"""


def start_of(names):
    """The weights with which a program of this section begins."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.randn(512, 64)
        nn.Linear(64, 16), nn.Linear(16, 10)
        return [nn.Linear(64, 32, bias=False).weight.detach(), nn.Linear(32, 10, bias=False).weight.detach()]


def test_the_programs_of_mezo_end_alike(run):
    """Those of one method within 1.1; FOGZO, after a quarter of the steps, between 0.6 and 1 of MeZO."""
    before, same, after = run(MEZO), run(MEZO_HERE), run(AFTER_MEZO)
    assert 1 / 1.1 < loss_of(same) / loss_of(before) < 1.1
    assert 0.6 < loss_of(after) / loss_of(before) < 1
    assert before["printed"].count("step") == same["printed"].count("step") == 4
    assert after["printed"].count("step") == 5


def test_mezo_s_loop_moves_a_model_that_was_taken_back(run):
    model = run(AFTER_MEZO, ("range(250)", "range(3)"))["model"]
    latents = [p.detach().clone() for p in model.parameters()]
    fk.dequantize_model(model, latents=True)
    assert [type(m) for m in model] == [nn.Linear, nn.ReLU, nn.Linear]
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), latents, strict=True))
