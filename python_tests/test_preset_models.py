"""FOGZO steps on LLaMA, DeiT and ResNet with each preset, at 2 bits: weights alone, and inputs too."""

import copy

import pytest
import torch

import fogzo_kernels as fk

pytest.importorskip("transformers", reason="transformers is not installed")

from support.models import (
    CASES,
    GRADIENT_TOLERANCE,
    LOSS_TOLERANCE,
    Reference,
    check_losses_and_guides,
    observe,
    quantized_modules,
)

QUEST = fk.presets.quest(2, block=16)
PRESETS = {
    "lsq": fk.presets.lsq(2),
    "lsq-rows": fk.presets.lsq(2, "row"),
    "seq": fk.presets.seq(2),
    "seq-ternary": fk.presets.seq(1.58),
    "bitnet": fk.presets.bitnet(),
    "fixed": fk.presets.fixed(2, 0.05),
    "quest": QUEST,
}
INPUTS = {"w2": None, "w2a2": fk.presets.dynamic(2), "w2a2-lsq": fk.presets.lsq(2), "w2a2-quest": QUEST}
MODELS = ("llama", "deit", "resnet")
WHICH = {"one_minus_beta": 1e-2, "directions": 2, "seed": 11}
STEP = 5


def quantized(name, preset, inputs=None, backend=None):
    """A plain model, and the same one quantized; rows of ResNet's first convolution, of 147, have no blocks."""
    plain = CASES[name].plain()
    model = copy.deepcopy(plain)
    first = [("resnet.embedder", fk.presets.lsq(2), None)] if name == "resnet" else []
    skip = ["model.embed_tokens", "lm_head"] if name == "llama" else []
    fk.quantize_model(model, preset, activation=inputs, rules=first, skip=skip, backend=backend)
    if inputs is not None and any(n.endswith("input_alpha") for n, _ in model.named_parameters()):
        fk.calibrate_inputs_(model, lambda: model(**CASES[name].batch()))
    return plain, model


def observed(model, name):
    fogzo = fk.Fogzo(model, total_steps=100, schedule="constant", **WHICH)
    fogzo.load_state_dict({**fogzo.state_dict(), "steps": STEP})
    return observe(model, fogzo, CASES[name].batch())


@pytest.mark.parametrize("preset", [p for p in PRESETS if p != "quest"])
@pytest.mark.parametrize("name", MODELS)
def test_a_step_is_the_contract_by_hand(name, preset):
    """Of weights: losses, guides and estimates of a plain PyTorch program."""
    plain, model = quantized(name, PRESETS[preset])
    seen = observed(model, name)
    reference = Reference(plain, model, seen, CASES[name].batch(), step=STEP, **WHICH)
    check_losses_and_guides(reference)
    assert reference.total.keys() == quantized_modules(model).keys()
    for path in reference.total:
        assert reference.excess(path) <= 1, path


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", MODELS)
def test_a_step_is_the_reference_estimators(name, preset, inputs):
    """Of weights and inputs: what the fast backend does is what the reference does."""
    found, wanted = (
        observed(quantized(name, PRESETS[preset], INPUTS[inputs], backend)[1], name)
        for backend in ("cpu", "reference")
    )
    turned = QUEST in (
        PRESETS[preset],
        INPUTS[inputs],
    )  # sums of squares differ in their last bits, and so do codes
    for ours, theirs in zip(found.losses, wanted.losses, strict=True):
        assert (ours - theirs).abs() <= (1e-2 if turned else LOSS_TOLERANCE) * theirs.abs()
    for before, after in ((wanted.guides, found.guides), (wanted.estimates, found.estimates)):
        for path, grad in before.items():
            allowed = (0.1 if turned else 16 * GRADIENT_TOLERANCE) * grad.norm() + 1e-7
            assert (after[path] - grad).norm() <= allowed, path


@pytest.mark.parametrize("inputs", ["w2", "w2a2-lsq"])
@pytest.mark.parametrize("name", MODELS)
def test_learned_scales_get_their_own_gradient(name, inputs):
    """That of a plain backward, to the bit; the estimate is of weights alone."""
    _, model = quantized(name, PRESETS["lsq"], INPUTS[inputs])
    twin = copy.deepcopy(model)
    seen = observed(model, name)
    twin(**CASES[name].batch()).loss.backward()
    learned = [n for n, _ in twin.named_parameters() if n.endswith("alpha")]
    assert len(learned) >= len(quantized_modules(model)) * (1 + (inputs != "w2")) - 1
    for path in learned:
        assert torch.equal(seen.estimates[path], twin.get_parameter(path).grad), path
        assert seen.estimates[path].any(), path


@pytest.mark.parametrize("preset", ["lsq", "quest"])
@pytest.mark.parametrize("name", MODELS)
def test_training_lowers_the_loss(name, preset):
    _, model = quantized(name, PRESETS[preset])
    batch = CASES[name].batch()
    fogzo = fk.Fogzo(model, total_steps=25, kappa=1.0, seed=1, directions=1)
    optimizer = fk.AdamW(model.parameters(), lr=3e-3, fogzo=fogzo)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        losses.append(float(optimizer.step(lambda: model(**batch).loss)))
    assert losses[-1] < 0.9 * losses[0]
