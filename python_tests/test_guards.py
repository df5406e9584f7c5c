"""Each guard that docs/guards.md lists has a test that fails when the guard is taken out of the source."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from shutil import ignore_patterns

import pytest

import fogzo_kernels

TESTS = Path(__file__).parent
PACKAGE = Path(fogzo_kernels.__file__).parent
PAGE = TESTS.parent / "docs/guards.md"

#: By row of the page: a file of the package, a guard in it, what comes in its place, and a test.
GUARDS = {
    "A quantized and a plain module share a weight": (
        "nn/weights.py", "    check_raw_uses(model)", "    pass",
        "test_traps.py::test_a_weight_tied_to_a_plain_module_later_is_refused"),
    "Modules that share a weight have different quantizers or alphas": (
        "nn/weights.py", "if not (same and alike):", "if False:",
        "test_traps.py::test_modules_that_share_a_weight_must_agree"),
    "A forward makes the weight anew (`weight_norm`, `prune`)": (
        "nn/weights.py", "            raise ValueError(\n                f\"{name} must be a Parameter",
        "            continue\n            raise ValueError(\n                f\"{name} must be a Parameter",
        "test_traps.py::test_a_quantized_weight_that_is_made_anew_is_an_error"),
    "A plain module takes the place of a quantized one (`resize_token_embeddings`)": (
        "nn/replaced.py", "    if is_left_plain(module):\n        vars", "    if False:\n        vars",
        "test_adapters.py::test_a_resized_model_is_quantized_again_and_loads"),
    "Another weight takes the place of the one that alpha was made for (`fuse_conv_bn_eval`)": (
        "nn/module.py", "self.weight_quantizer.stale = True", "pass", "test_module_changes.py"),
    "A weight gets another number of rows than its alphas have": (
        "nn/weight.py", "return rows and not module", "return not module", "test_module_changes.py"),
    "An adapter is merged into a quantized layer (`peft`)": (
        "nn/replaced.py", "if isinstance(base, QuantizedModule):\n        raise", "if False:\n        raise",
        "test_adapters.py::test_every_kind_of_adapter_refuses_to_merge_until_dequantized"),
    "Weights are initialized in place after `quantize_model`": (
        "nn/weight.py", "    if far:\n", "    if False:\n", "test_module_changes.py"),
    "A weight is replaced, frozen, unfrozen or tied after `Fogzo(model)`": (
        "nn/weights.py", "    if changed:\n", "    if False:\n",
        "test_traps.py::test_a_change_of_the_weights_is_an_error_at_the_next_step"),
    "`quantize_model`'s report is used as the model": (
        "nn/report.py", "raise TypeError(NO_MODEL)", "raise TypeError", "test_module_changes.py"),
    "The encoder layers' fast path of evaluation would read the latents": (
        "nn/replaced.py", "if quantized and not", "if False and not",
        "test_traps.py::test_encoder_layers_evaluate_what_they_train"),
    "Experts hide the input of their second product, which is to be quantized": (
        "nn/held.py", "if down is not None and not seen and", "if False and",
        "test_experts.py::test_experts_that_hide_the_input_of_their_second_product_say_so"),
    "The loss reads a quantized weight beside its module": (
        "train/guards/graph_reads.py", "if reader is not None:\n            raise",
        "if False:\n            raise",
        "test_traps.py::test_a_loss_that_reads_a_weight_itself_is_an_error"),
    "`functional_call` gives a module another weight in a pass": (
        "nn/quantized.py", "if of_pass is not None and of_pass.weight is not self.latent:", "if False:",
        "test_traps.py::test_functional_call_with_other_weights_is_refused_inside_a_pass"),
    "`.grad` holds the last estimate, or the gradient of another backward": (
        "train/guards/gradients.py", "if grads and not all_zero", "if False and not all_zero",
        "test_step_traps.py::test_gradients_that_were_not_cleared_are_an_error"),
    "The closure calls `backward`": (
        "train/guards/gradients.py", "raise RuntimeError(BACKWARD_IN_A_PASS)", "pass",
        "test_step_traps.py::test_a_closure_that_calls_backward_is_an_error"),
    "The closure calls `zero_grad`": (
        "train/guards/gradients.py", "if any(p.grad is not grad", "if False and any(p.grad is not grad",
        "test_closures.py::test_zero_grad_in_the_closure_is_named"),
    "The loop runs passes, and an optimizer has guided noise by `attach`": (
        "train/fogzo.py", "        if self._run.attached is not None:\n", "        if False:\n",
        "test_attach.py::test_remove_ends_it"),
    "The loss does not depend on the weights": (
        "train/step.py", "if self.estimates and not self.groups and", "if False and",
        "test_step_traps.py::test_a_closure_of_another_model_is_an_error"),
    "Passes see other batches, masks or states, and the loss shows it": (
        "train/guards/fingerprints.py", "    if names:\n        warnings", "    if False:\n        warnings",
        "test_closures.py::test_the_first_step_looks_into_functions_that_the_closure_calls"),
    "Passes get losses of different scales": (
        "train/stats.py", "if not 1 / FAR", "if False and not 1 / FAR",
        "test_step_traps.py::test_a_pass_that_is_scaled_otherwise_draws_a_warning"),
    "The two losses of a probe differ by rounding alone": (
        "train/stats.py", "if difference <", "if False and difference <", "test_stats.py"),
    "The processes of a group train different models or settings": (
        "distributed/group.py", "            if high != low:", "            if False:",
        "test_distributed.py::test_processes_that_train_another_model_are_told"),
    "`.grad` changes between passes and estimate, also through `.data`": (
        "train/guards/gradients.py", "        if not same:\n", "        if False:\n",
        "test_unseen_edits.py::test_an_edited_gradient_is_an_error"),
    "The loss or a gradient is not finite": (
        "train/step.py", "*part, lost, was_edited = flags.tolist()",
        "*part, lost, was_edited = flags.tolist(); lost = False",
        "test_lost_steps.py::test_a_lost_fused_step_changes_nothing"),
    "A weight has no gradient, or one of zeros": (
        "train/step.py", "if part[place]}", "if w.parameter.grad is not None}",
        "test_taking_part.py::test_none_zeros_and_no_tokens_are_alike"),
    "A gradient scaler has scaled the losses of a fused step": (
        "optim/scaling.py", "return cls(scale,", "return cls(None,",
        "test_scalers.py::test_every_scale_gives_the_same_step"),
    "`scaler.unscale_` comes between passes and a fused step": (
        "optim/scaling.py", "if passes and self.scale is None", "if False and self.scale is None",
        "test_scalers.py::test_gradients_unscaled_before_a_fused_step_are_an_error"),
    "A fused step follows a plain backward": (
        "train/guards/gradients.py", "            if bool(local(p.grad).any()):", "            if False:",
        "test_step_traps.py::test_a_fused_step_after_a_plain_backward_is_an_error"),
    "The estimate of a step was forgotten": (
        "train/fogzo.py", "        if self.pending:\n", "        if False:\n",
        "test_step_traps.py::test_a_forgotten_estimate_is_an_error_at_the_next_step"),
    "A fused optimizer lacks some of the quantized weights": (
        "optim/fused.py", "        if others:\n            raise", "        if False:\n            raise",
        "test_optim.py"),
    "An optimizer that `fogzo` is attached to lacks some of the quantized weights": (
        "train/attached.py", "        if others:\n", "        if False:\n",
        "test_attach.py::test_a_bad_attach_is_named_and_leaves_no_hook"),
    "`step` of an optimizer with guided noise runs twice on one gradient": (
        "train/attached.py", "        if run.gradients.all_estimates:\n", "        if False:\n",
        "test_attach.py::test_a_step_without_a_new_backward_adds_no_noise_again"),
    "No optimizer has the learned alphas": (
        "train/guards/unmoved_alphas.py", "            if left:\n", "            if False:\n",
        "test_unmoved.py"),
    "Latents of master weights were loaded or written": (
        "optim/fused.py", "            follow(master, latent)", "            pass",
        "test_unseen_edits.py::test_masters_follow_what_is_put_into_latents"),
    "A checkpoint has other settings than its `Fogzo`": (
        "train/settings.py", "    if differ:\n", "    if False:\n",
        "test_longer_runs.py::test_a_run_with_other_settings_is_refused_and_says_how_to_go_on"),
}  # fmt: skip
#: What runs without being asked for; the others have their like among them.
ALWAYS = {"The closure calls `zero_grad`", "The loss or a gradient is not finite"}


def package_with(folder, file, old, new):
    """The package in a folder, where one file has another text."""
    shutil.copytree(
        PACKAGE, folder / PACKAGE.name, copy_function=os.symlink, ignore=ignore_patterns("__pycache__")
    )
    text = (PACKAGE / file).read_text()
    assert text.count(old) == 1, f"{file} must have {old!r} once"
    (folder / PACKAGE.name / file).unlink()
    (folder / PACKAGE.name / file).write_text(text.replace(old, new))


def test_the_page_lists_these_guards():
    rows = [
        re.split(r" \| ", line.strip("| ")) for line in PAGE.read_text().splitlines() if line.startswith("| ")
    ]
    assert [row[0] for row in rows if row[0] != "Mistake"] == list(GUARDS)


@pytest.mark.parametrize("mistake", GUARDS)
def test_the_guard_is_where_it_was(mistake):
    """Whose mutant is made by the slow tests alone."""
    file, old, _, test = GUARDS[mistake]
    assert (PACKAGE / file).read_text().count(old) >= 1
    assert (TESTS / test.partition("::")[0]).exists()


@pytest.mark.parametrize(
    "mistake", [m if m in ALWAYS else pytest.param(m, marks=pytest.mark.everything) for m in GUARDS]
)
def test_a_test_fails_without_the_guard(mistake, tmp_path):
    *change, test = GUARDS[mistake]
    package_with(tmp_path, *change)
    options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-o", "pythonpath="]
    command = [sys.executable, "-m", "pytest", *options, str(TESTS / test)]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(TESTS.parent)])}
    done = subprocess.run(command, cwd=TESTS, env=env, capture_output=True, text=True)
    assert done.returncode == pytest.ExitCode.TESTS_FAILED, done.stdout[-3000:] + done.stderr[-3000:]
    assert " failed" in done.stdout
