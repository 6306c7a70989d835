"""Faults of what sees forward and backward: mixing, hooks, state that stays, threads, copies, compiled models."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from .mutant import Body, Edit, Put, mutant

COVERAGE = "perexample._engine.coverage"
BACKWARD = "perexample._engine.backward:Backward"
OPTIMIZER = "perexample.privacy.optimizer"


def shared_by_threads(state: Any) -> Any:
    """The same without a copy for each thread."""
    return SimpleNamespace(**vars(state), silent=type(state).silent.__get__(state))


UNREACHED = "for key, p, name in trainable if any(t is p for tap in found.taps for t in tap.params.values())}"

MUTANTS = (
    mutant(
        "F10-not-separable",
        "says of a loss in which examples move each other that all is right",
        Edit("perexample.check:check", ("if raises and report.mixed:", "if False:")),
        killers="test_faults.py::test_f10_losses_that_are_not_separable",
    ),
    mutant(
        "F10-mixing-operation",
        "lets the backward run where an operation has mixed examples",
        Edit("perexample._engine.walk:walk", ("found.lost = found.lost or notes.get(LOST)", "pass")),
        killers="test_faults.py::test_finding_4_a_module_with_parameters_that_subtracts_the_batch_mean",
    ),
    mutant(
        "F9-outputs-beside-targets",
        "lets outputs [N, 1] meet targets [N]",
        Body("perexample._engine.broadcasts:check_broadcasts", "return None"),
        killers="test_broadcasts.py::test_outputs_that_meet_the_targets_of_others_are_an_error[square]",
    ),
    mutant(
        "F9-a-factor-that-counts",
        "lets a loss be scaled by the number of examples",
        Body("perexample._engine.shares:check_shares", "return None"),
        killers="test_shares.py::test_factors_that_follow_the_number_of_examples_are_an_error[(64, 37)-short batches]",
    ),
    mutant(
        "F9-a-mean-for-a-sum",
        "clips the N-th parts of gradients",
        Body("perexample._engine.shares:refuse_means", "return None"),
        killers="test_shares.py::test_a_mean_that_is_to_be_clipped_was_not_said_to_be_a_sum",
    ),
    mutant(
        "F10-coupled",
        "runs the backward of a loss in which examples meet",
        Body("perexample._engine.couplings:check_couplings", "return None"),
        killers="test_losses.py::test_examples_that_meet_in_the_loss_are_an_error",
    ),
    mutant(
        "F10-one-half",
        "compares the examples of two halves only",
        Edit("perexample._engine.couplings:_coupled", ("(n - 1).bit_length()", "1")),
        killers="test_losses.py::test_examples_that_meet_in_the_loss_are_an_error[a single pair-dtype0]",
    ),
    mutant(
        "F10-common-divisor",
        "takes a mean whose divisor depends on all targets for one of losses of their own",
        Body(f"{COVERAGE}:check_divisors", "return None"),
        killers="test_surprises.py::test_a_common_divisor_anywhere_in_the_loss",
    ),
    mutant(
        "F11-batchnorm",
        "takes BatchNorm in training mode",
        Body("perexample.rules.norm:BatchNormRule.refuse", "return None"),
        killers="test_faults.py::test_f11_batchnorm_in_training_mode",
    ),
    mutant(
        "F11-instance-norm",
        "takes InstanceNorm that tracks statistics of the data",
        Body("perexample.rules.norm:InstanceNormRule.refuse", "return None"),
        killers="test_errors.py::test_bad_use[instance_norm_that_tracks]",
    ),
    mutant(
        "F11-buffers",
        "lets a forward write data into buffers",
        Body("perexample._engine.written:refuse_written", "return None"),
        killers="test_faults.py::test_f11_a_module_that_writes_its_buffers",
    ),
    mutant(
        "F32-activations-pile-up",
        "keeps what a forward has saved after its backward",
        Body("perexample._engine.tap:Tap.release", "return None"),
        killers=[
            "test_engine.py::test_saved_tensors_go_with_the_backward_though_the_loss_stays",
            "test_methods.py::test_inputs_are_freed_as_the_backward_goes",
            "test_errors.py::test_bad_use[second_backward]",
        ],
    ),
    mutant(
        "F32-last-forward",
        "takes the input of the last forward, as a hook that writes on the module does",
        Edit(
            "perexample._engine.tap:Tap.call",
            ("= self._unpacked()", "= getattr(self.module, '_last', self)._unpacked()"),
        ),
        Edit(
            "perexample._engine.tap:Tap.__init__",
            ("= _save(tensors)", "= _save(tensors)\n    vars(module)['_last'] = self"),
        ),
        killers="test_faults.py::test_f32_forwards_between_forward_and_backward[train]",
    ),
    mutant(
        "F33-crash",
        "does not close the call of a forward that has failed",
        Edit("perexample.model:extend", ("always_call=True", "always_call=False")),
        Body("perexample._engine.hooks:forget_forwards", "return None"),
        killers=[
            "test_faults.py::test_f33_a_crash_in_the_forward_leaves_nothing",
            "test_faults.py::test_finding_10_state_after_an_aborted_forward",
        ],
    ),
    mutant(
        "F33-half-done",
        "adds the sums of a backward that has failed",
        Edit(
            f"{BACKWARD}.execute",
            ("self._finish(views)\n", "self._finish(views); [e.commit() for e in self.context.extensions]\n"),
        ),
        killers=[
            "test_engine.py::test_a_failed_backward_adds_nothing_to_clipped_sums",
            "test_adaptive.py::test_a_backward_that_fails_counts_nothing",
        ],
    ),
    mutant(
        "F34-changed-input",
        "uses an input that was written to since its forward",
        Edit(
            "perexample._engine.tap:_Kept.saved_tensors",
            ("if any(version(t) != count", "if False and any(version(t) != count"),
        ),
        killers="test_errors.py::test_bad_use[input_modified]",
    ),
    mutant(
        "F34-view",
        "loses a layer whose output is changed in place",
        Body("perexample._private:whole_base", "return tensor"),
        killers=["test_faults.py::test_f34_in_place_operations", "test_habits.py::test_activations_in_place"],
    ),
    mutant(
        "F35-repeated-forward",
        "does not see what a checkpoint runs again",
        Body("perexample._engine.follow:note_checkpoint", "return None"),
        killers=["test_faults.py::test_f35_activation_checkpointing[True]", "test_habits.py::test_checkpointing"],
    ),
    mutant(
        "F35-reentrant",
        "runs reentrant checkpoints, whose graph is hidden",
        Body("perexample._private:reentrant_checkpoint", "return False"),
        killers="test_faults.py::test_f35_reentrant_checkpoints_are_refused",
    ),
    mutant(
        "F36-unused",
        "has no sums for parameters that a loss does not reach",
        Edit(f"{BACKWARD}._prepare", ("for key, p, name in trainable}", UNREACHED)),
        killers="test_optim.py::test_unreached_parameters_get_noise_of_the_same_scale",
    ),
    mutant(
        "F36-old-values",
        "leaves the values of an earlier backward where a loss does not reach a parameter",
        Edit(f"{BACKWARD}._write", ("elif hasattr(p, field):", "elif False:")),
        Edit(f"{BACKWARD}._prepare", ("for key, p, name in trainable}", UNREACHED)),
        killers="test_faults.py::test_f36_not_reached_in_one_backward_only",
    ),
    mutant(
        "F38-frozen",
        "leaves the sum of a parameter that was frozen",
        Edit(f"{BACKWARD}._write", ("elif hasattr(p, field):", "elif False:")),
        killers=[
            "test_faults.py::test_f38_freeze_unfreeze_and_add_between_steps",
            "test_engine.py::test_frozen_between_steps_loses_its_fields",
        ],
    ),
    mutant(
        "F45-one-context",
        "has one context for all threads",
        Put("perexample._engine.context:_ACTIVE", lambda old: SimpleNamespace()),
        killers=[
            "test_engine.py::test_threads_with_models_of_their_own",
            "test_habits.py::test_two_models_in_two_threads",
        ],
    ),
    mutant(
        "F45-one-stack-of-calls",
        "has one stack of calls for all threads",
        Put("perexample._engine.state:STATE", shared_by_threads),
        killers=[
            "test_engine.py::test_threads_with_models_of_their_own",
            "test_habits.py::test_two_models_in_two_threads",
        ],
    ),
    mutant(
        "F46-copied-optimizer",
        "lets a private optimizer be copied, and the copy step without noise",
        Body(f"{OPTIMIZER}:_refuse_copies", "return None"),
        killers=[
            "test_errors.py::test_a_copy_of_a_privatized_optimizer_never_steps_without_noise",
            "test_errors.py::test_bad_use[optimizer_copied]",
        ],
    ),
    mutant(
        "F46-other-parameters",
        "takes an optimizer of other parameters than the model's",
        Body("perexample.privacy.prepare:_check_optimized", "return None"),
        killers="test_make_private.py::test_the_optimizer_must_hold_the_models_parameters",
    ),
    mutant(
        "F46-by-number",
        "tells parameters by their number, which a new one may have",
        Edit(
            "perexample.extensions.clipped_grad:ClippedGrad._fresh",
            (
                "if entry is None or entry.param() is not p or value is None or entry.sum() is not value:",
                "entry = entry or next(iter(self._entries.values()), None)\n"
                "    value = value if value is not None else torch.zeros_like(p)\n"
                "    if entry is None:",
            ),
        ),
        Edit(
            "perexample.extensions.clipped_grad:ClippedGrad.consume",
            ("for p in params:", "for p in [p for p in params if id(p) in self._entries]:"),
        ),
        killers=[
            "test_errors.py::test_bad_use[parameter_replaced_after_the_optimizer]",
            "test_errors.py::test_bad_use[optimizer_over_other_parameters]",
        ],
    ),
    mutant(
        "F47-compiled-model",
        "extends a compiled model, which no hook sees",
        Edit("perexample.model:_refuse", ('if kind == "OptimizedModule" or', "if")),
        killers="test_errors.py::test_bad_use[extend_after_compile]",
    ),
    mutant(
        "F47-uncovered",
        "runs where parameters reach the loss past all that is seen",
        Edit(f"{COVERAGE}:check_coverage", ("if found.uncovered:", "if False:")),
        killers=[
            "test_errors.py::test_bad_use[penalty_added]",
            "test_errors.py::test_bad_use[model_not_extended]",
            "test_errors.py::test_bad_use[second_model_not_extended]",
        ],
    ),
    mutant(
        "F50-shared-divisor",
        "gives an example less weight if others have more labels that count",
        Body(f"{COVERAGE}:check_divisors", "return None"),
        killers="test_privacy_faults.py::test_f50_a_mean_over_all_labels_that_count_is_refused",
    ),
    mutant(
        "F50-number-of-tokens",
        "divides a sum over the tokens of all examples by their number, which others change",
        Body(f"{COVERAGE}:check_sums", "return None"),
        killers="test_losses.py::test_a_sum_over_tokens_is_not_divided_by_their_number",
    ),
    mutant(
        "F50-nothing-divided-by-nothing",
        "lets the 0 / 0 of an example without labels reach the sum",
        Edit(
            "perexample.extensions.clipped_grad:ClippedGrad._weights",
            ("torch.where(finite, factors, torch.zeros_like(factors))", "factors"),
        ),
        killers="test_privacy_faults.py::test_f50_an_example_without_labels_adds_nothing",
    ),
)
