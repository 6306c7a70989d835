"""Faults of clipped sums: what is clipped, to what, and what an example that is not finite adds."""

from __future__ import annotations

from .mutant import Body, Edit, mutant

CLIPPED = "perexample.extensions.clipped_grad:ClippedGrad"
ADAPTIVE = "perexample.extensions.adaptive_clipped_grad:AdaptiveClippedGrad"
CLIP = "perexample.extensions.clip"
VIEW = "perexample._engine.view:ParameterView"

UNCHECKED = Edit(f"{CLIPPED}._weights", ("torch.where(finite, factors, torch.zeros_like(factors))", "factors"))

MUTANTS = (
    mutant(
        "F2-clipped-mean",
        "clips the mean of the gradients instead of each",
        Edit(
            f"{CLIPPED}.finish",
            (
                "Weights(factors, most=self._bound(group), largest=largest)",
                "Weights(torch.ones_like(total) * min(1.0, self._bound(group) * max(1, len(total)) / max(1e-300, float("
                "sum(v.weighted_sum(torch.ones_like(total)).square().sum() for v in vs) ** 0.5))))",
            ),
        ),
        killers=[
            "test_faults.py::test_f02_clip_each_gradient_not_their_mean",
            "test_audit.py::test_correct_code_keeps_its_claim[flat]",
        ],
    ),
    mutant(
        "F3-billed-once",
        "clips each group to C, and reports C for all of them together",
        Edit(
            f"{CLIPPED}.sensitivity",
            ("math.sqrt(sum(bound**2 for bound in self._bounds.values()))", "max(self._bounds.values())"),
        ),
        killers=["test_faults.py::test_f03_one_bound_for_all_parameters", "test_optim.py::test_bounds_by_group"],
    ),
    mutant(
        "F3-per-parameter",
        "clips each parameter by its own norm, and not all by the joint one",
        Edit(
            f"{CLIPPED}.finish",
            (
                "view.summed(weights,",
                "view.summed(self._weights(view.batch_l2().sqrt(), finite, self._bound(group)),",
            ),
        ),
        killers=[
            "test_faults.py::test_f03_one_bound_for_all_parameters",
            "test_optim.py::test_the_joint_norm_is_that_of_all_groups",
        ],
    ),
    mutant(
        "F3-last-group",
        "takes the norm of the last group alone for that of all",
        Edit(
            f"{CLIPPED}.finish",
            (
                "self._weights(staged.group_norms[group], finite",
                "self._weights(staged.group_norms[sorted(members)[-1]], finite",
            ),
        ),
        killers="test_optim.py::test_groups[0.0-per-parameter]",
    ),
    mutant(
        "F4-second-pass",
        "fills sums that come in a second backward in without their factors",
        Edit(f"{VIEW}.fulfil", ("self.weighted_sum(late.w,", "self.weighted_sum(torch.ones_like(late.w.values),")),
        killers=[
            "test_methods.py::test_a_bound_on_memory_changes_no_result",
            "test_audit.py::test_correct_code_keeps_its_claim[second backward]",
        ],
    ),
    mutant(
        "F4-doubtful",
        "adds gradients whose norm was computed in float64 without their factors",
        Edit(f"{VIEW}._sum", ("values[doubtful].double()", "torch.ones_like(values[doubtful])")),
        killers="test_faults.py::test_finding_1_clipped_rows_are_no_longer_than_the_bound[1.0-1.0-0.01]",
    ),
    mutant(
        "F4-tables",
        "adds the rows of a table without their factors",
        Edit("perexample.terms:Rows.weighted_sum", ("self.rows * w[self.example].unsqueeze(1)", "self.rows")),
        killers="test_faults.py::test_f06_tied_weights[_tied_embedding]",
    ),
    mutant(
        "F4-formed",
        "adds gradients that were formed for their norms without their factors",
        Edit(
            "perexample.terms:Formed.weighted_sum",
            ("w.to(self.value.dtype)", "torch.ones_like(w, dtype=self.value.dtype)"),
        ),
        killers="test_faults.py::test_f04_the_bound_holds_on_every_path[True-True-0.001]",
    ),
    mutant(
        "F4-own-function",
        "trusts a clip function of the user's own with the bound",
        Edit(f"{CLIP}:bounded", (".minimum(bound / norms)", "")),
        killers=[
            "test_optim.py::test_no_clip_function_exceeds_the_bound[0.01-too-long]",
            "test_audit.py::test_correct_code_keeps_its_claim[custom]",
        ],
    ),
    mutant(
        "F8-retained",
        "reports C for an example that was added twice, by two backwards through one forward",
        Edit(f"{CLIPPED}.sensitivity", ("self._repeats * math.sqrt", "math.sqrt")),
        killers="test_make_private.py::test_two_backwards_of_one_forward_count_their_examples_once",
    ),
    mutant(
        "F12-not-checked",
        "multiplies gradients that are not finite as others",
        UNCHECKED,
        killers=[
            "test_faults.py::test_finding_3_one_nan_example_contributes_exactly_nothing[mlp]",
            "test_optim.py::test_nonfinite_examples_contribute_exactly_zero[flat-dtype1-nan]",
        ],
    ),
    mutant(
        "F12-zero-times-nan",
        "gives a NaN the factor zero, and adds their product",
        Edit(f"{VIEW}._sum", ("used = None if w.all else w.used.to(device)", "used = None")),
        killers=[
            "test_faults.py::test_finding_3_one_nan_example_contributes_exactly_nothing[mlp]",
            "test_faults.py::test_f12_extreme_examples[0.001-input-inf]",
        ],
    ),
    mutant(
        "F12-made-zero-in-the-sum",
        "makes a sum that a NaN has reached zero, and with it what all others have added",
        UNCHECKED,
        Edit(f"{CLIPPED}.finish", ("self._before(view.param))", "self._before(view.param)).nan_to_num(0.0, 0.0, 0.0)")),
        killers="test_faults.py::test_finding_3_one_nan_example_contributes_exactly_nothing[mlp]",
    ),
    mutant(
        "F12-made-zero-after-noise",
        "makes coordinates that a NaN has reached zero when the noise is in, as fastDP does",
        UNCHECKED,
        Edit(
            "perexample.privacy.privatizer:Privatizer.__call__",
            ("total.div_(expected_batch_size)", "total.div_(expected_batch_size).nan_to_num(0.0, 0.0, 0.0)"),
        ),
        killers="test_audit.py::test_a_poisoned_example_shows_in_no_coordinate[nan-dtype0-one]",
    ),
    mutant(
        "F12-infinite-only",
        "looks for infinities and not for NaN",
        Edit(f"{CLIPPED}.finish", ("torch.isfinite(total)", "~torch.isinf(total)")),
        killers="test_faults.py::test_finding_3_one_nan_example_contributes_exactly_nothing[mlp]",
    ),
    mutant(
        "F12-one-parameter",
        "drops an example where one group of its gradient is not finite, and keeps its other groups",
        Edit(
            f"{CLIPPED}.finish",
            (
                "self._weights(staged.group_norms[group], finite",
                "self._weights(staged.group_norms[group], torch.isfinite(squares[group])",
            ),
        ),
        killers=[
            "test_optim.py::test_nonfinite_in_one_parameter_only_drops_the_whole_example",
            "test_privacy_faults.py::test_f12_an_example_that_is_not_finite_is_dropped_as_a_whole",
        ],
    ),
    mutant(
        "F13-half",
        "computes norms, factors and sums in half precision",
        Body("perexample.rule:at_least_float32", "return tensor"),
        killers=[
            "test_faults.py::test_finding_9_low_precision_does_not_overshoot[how0]",
            "test_faults.py::test_f13_half_precision_norms",
        ],
    ),
    mutant(
        "F13-squares",
        "squares in float32, which end at 1e19",
        Edit("perexample._norms:norms_of", ("dim=-1, dtype=torch.float64)\n    norms", "dim=-1).double()\n    norms")),
        killers="test_optim.py::test_very_large_and_very_small_gradients_are_exact[1-1e+30]",
    ),
    mutant(
        "F23-used-again",
        "steps on the same sums again",
        Edit(f"{CLIPPED}._fresh", ("if entry.used:", "if False:")),
        killers="test_faults.py::test_f23_a_clipped_sum_serves_one_step",
    ),
    mutant(
        "F23-never-marked",
        "does not note that sums were used",
        Edit(f"{CLIPPED}.consume", ("self._entries[id(p)].used = True", "pass")),
        killers=[
            "test_faults.py::test_f23_a_clipped_sum_serves_one_step",
            "test_peers.py::test_peer_07_a_closure_is_refused",
        ],
    ),
    mutant(
        "F26-carried",
        "adds the sums of an earlier step to those of this one",
        Edit(f"{CLIPPED}._before", ("entry.used or ", "")),
        Edit(f"{CLIPPED}._begin", ("if not entry.used and entry.alive()", "if entry.alive()")),
        killers=[
            "test_faults.py::test_f23_a_clipped_sum_serves_one_step",
            "test_make_private.py::test_accumulation_by_hand_is_one_step",
        ],
    ),
    mutant(
        "F26-lost",
        "keeps the last of several backwards only",
        Edit(f"{CLIPPED}.finish", ("self._before(view.param)", "None")),
        killers="test_optim.py::test_accumulation_over_backwards[2]",
    ),
    mutant(
        "F37-raw",
        "steps on the raw gradient of a parameter that has no clipped sum",
        Edit(
            f"{CLIPPED}._fresh",
            (
                "    if entry is None or",
                "    if entry is None and p.grad is not None:\n        return p.grad\n    if entry is None or",
            ),
        ),
        Edit(f"{CLIPPED}.consume", ("for p in params:", "for p in [p for p in params if id(p) in self._entries]:")),
        killers="test_faults.py::test_f37_no_parameter_of_the_optimizer_is_updated_unclipped",
    ),
    mutant(
        "F38-parts",
        "adds up backwards in which different parameters take part",
        Body(f"{CLIPPED}._same_parameters", "return None"),
        killers="test_optim.py::test_parameters_that_take_part_in_some_of_the_accumulated_backwards",
    ),
    mutant(
        "F41-epsilon",
        "divides by the norm and a small number, so that no factor is exact",
        Edit(f"{CLIP}:Flat.__call__", ("bound / norms", "bound / (norms + 1e-6)")),
        killers=["test_optim.py::test_factors_by_hand", "test_optim.py::test_groups[0.0-all]"],
    ),
    mutant(
        "F41-zero-norm",
        "divides by a norm of zero",
        Edit(f"{CLIP}:bounded", (".nan_to_num(0.0, 0.0, 0.0)", "")),
        killers=["test_faults.py::test_f41_norm_zero_needs_no_epsilon", "test_optim.py::test_zero_gradients"],
    ),
    mutant(
        "F41-no-bound",
        "takes bounds that are zero, negative or not finite",
        Body("perexample._arguments:positive", "return float(value)"),
        killers="test_faults.py::test_f41_configurations_without_meaning[max_norm=0]",
    ),
    mutant(
        "F44-norms-in-the-state",
        "puts the mean norm of the examples into the state that is saved",
        Body(f"{CLIPPED}.state_dict", "return {'norm': None if self.norms is None else float(self.norms.mean())}"),
        killers="test_privacy_faults.py::test_f44_nothing_exact_is_in_the_state",
    ),
    mutant(
        "F44-exact-count",
        "shows the share of clipped examples without noise",
        Edit(f"{ADAPTIVE}.after_step", ("t.double() + draw(std)", "t.double()")),
        killers=[
            "test_adaptive.py::test_noise_enters_the_count",
            "test_privacy_faults.py::test_f44_the_share_is_noisy",
        ],
    ),
    mutant(
        "F1-count-for-nothing",
        "gives gradients the whole of the noise multiplier, and the count its noise as well",
        Body(f"{ADAPTIVE}.noise_share", "return noise_multiplier"),
        killers="test_adaptive.py::test_accounting_identity",
    ),
    mutant(
        "F1-count-noise",
        "adds half of the noise to the count",
        Edit(f"{ADAPTIVE}.after_step", ("self._repeats * self.count_noise", "self._repeats * self.count_noise / 2")),
        killers="test_adaptive.py::test_several_backwards_through_one_forward",
    ),
    mutant(
        "F17-count-of-the-batch",
        "divides the count by the number of examples that came",
        Edit(
            f"{ADAPTIVE}.after_step",
            ("self._repeats * self.expected_batch_size", "self._repeats * max(1, self._examples)"),
        ),
        killers="test_adaptive.py::test_the_update_by_hand",
    ),
)
