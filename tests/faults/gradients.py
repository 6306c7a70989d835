"""Faults of per-example gradients and their norms: tied weights, repeated calls, reductions, precision."""

from __future__ import annotations

from .mutant import Edit, mutant

VIEW = "perexample._engine.view:ParameterView"
TERMS = "perexample.terms"
TRUST = "perexample._trust"
BACKWARD = "perexample._engine.backward:Backward"

MUTANTS = (
    mutant(
        "F5-bias-by-position",
        "adds up a bias's gradient over positions by its size",
        Edit(
            "perexample.rules.linear:bias_term", ("g.flatten(1, -2).sum(1)", "g.flatten(1, -2).square().sum(1).sqrt()")
        ),
        killers="test_faults.py::test_f05_norm_of_the_bias[shape2-None]",
    ),
    mutant(
        "F5-one-position",
        "takes the first position's gradient for a bias",
        Edit("perexample.rules.linear:bias_term", ("g.flatten(1, -2).sum(1)", "g.flatten(1, -2)[:, 0]")),
        killers="test_faults.py::test_f05_norm_of_the_bias[shape2-None]",
    ),
    mutant(
        "F6-no-cross-term",
        "leaves the inner product of a tied table and output layer out of the norm",
        Edit(f"{TERMS}:Sum._of_the_parts", (" + 2 * rows.inner(outer)", "")),
        killers="test_faults.py::test_f06_tied_weights[_tied_embedding]",
    ),
    mutant(
        "F6-norm-of-each-use",
        "adds up the squared norms of the uses of a weight, as Opacus does",
        Edit(
            f"{VIEW}.batch_l2",
            (
                "l2, self._combined = term.settled(self._choice)",
                "l2 = __import__('torch').stack([t.batch_l2() for t in self._terms]).sum(0)",
            ),
        ),
        killers=[
            "test_faults.py::test_finding_2_tied_weight_in_a_module_without_rule_of_its_own",
            "test_faults.py::test_f06_tied_weights[_called_twice]",
        ],
    ),
    mutant(
        "F6-last-use",
        "keeps the last use of a weight only",
        Edit(f"{VIEW}.add", ("self._terms.append(term)", "self._terms = [term]")),
        killers="test_faults.py::test_finding_5_a_weight_used_by_its_module_and_functionally_is_no_silent_omission",
    ),
    mutant(
        "F7-positions-as-examples",
        "takes the steps of a sequence for examples of their own",
        Edit(f"{TERMS}:Outer.methods", ("if positions == 1:", "if True:")),
        killers=["test_faults.py::test_f07_recurrent_calls[Linear-3]", "test_recurrent.py::test_padded"],
    ),
    mutant(
        "F7-first-call",
        "takes the first of several calls of a module for all",
        Edit(
            f"{BACKWARD}._add_terms",
            ("self.views[key].add(term)", "self.views[key].add(term) if not self.views[key]._terms else None"),
        ),
        killers="test_faults.py::test_f07_recurrent_calls[Linear-3]",
    ),
    mutant(
        "F8-other-rows",
        "joins forwards of different numbers of examples in one loss",
        Edit("perexample._engine.coverage:number_of_examples", ("if len(set(sizes.values())) > 1:", "if False:")),
        killers="test_errors.py::test_bad_use[different_n]",
    ),
    mutant(
        "F9-sum-taken-for-a-mean",
        "does not look how a loss was reduced",
        Edit("perexample._engine.context:_check_loss", ('if summed and reduction == "mean":', "if False:")),
        killers="test_losses.py::test_a_sum_of_one_example_declared_as_mean_is_refused_too",
    ),
    mutant(
        "F9-mean-as-it-is",
        "leaves the 1 / N of a mean in every gradient",
        Edit(f"{BACKWARD}.__init__", ("(self.n if mean else 1.0)", "1.0")),
        killers=[
            "test_faults.py::test_f09_reductions[mean]",
            "test_faults.py::test_finding_5_sum_of_rows_is_the_gradient[mean-mlp]",
        ],
    ),
    mutant(
        "F9-sum-as-a-mean",
        "multiplies a sum by N, too",
        Edit(f"{BACKWARD}.__init__", ("(self.n if mean else 1.0)", "self.n")),
        killers="test_faults.py::test_f09_reductions[sum]",
    ),
    mutant(
        "F14-scaled",
        "clips gradients with the factor of the loss in them",
        Edit(f"{BACKWARD}.__init__", ("self.seed / loss_scale", "self.seed")),
        killers="test_faults.py::test_f14_the_scale_of_the_loss_is_undone_before_clipping[65536.0-scaler]",
    ),
    mutant(
        "F14-norms-only",
        "undoes the factor of the loss in the norms alone",
        Edit(f"{VIEW}._sum", ("w.scaled(device, self._scale, dtype)", "w.scaled(device, 1.0, dtype)")),
        killers="test_faults.py::test_f14_the_scale_of_the_loss_is_undone_before_clipping[65536.0-number]",
    ),
    mutant(
        "F31-gram-trusted",
        "trusts Gram norms in float32, whatever cancels",
        Edit(f"{TRUST}:inner", ("if blind() else excess, raised)", "if blind() else 0 * excess, raised)")),
        killers="test_faults.py::test_finding_1_gram_norms_do_not_cancel[32-256-1e-06]",
    ),
    mutant(
        "F31-products-underflow",
        "takes Gram norms for exact whose products are too small for float32",
        Edit(f"{TRUST}:inner", (".add_(lost)", "")),
        killers="test_methods.py::test_gram_norms_of_factors_whose_products_are_lost_in_float32[0--11]",
    ),
    mutant(
        "F31-squares-underflow",
        "takes factors too small for their squares to be zero",
        Edit("perexample._norms:of_grams", ("clamp_min_(least)", "clamp_min_(0.0)")),
        killers="test_methods.py::test_gram_norms_of_factors_whose_products_are_lost_in_float32[15--6]",
    ),
    mutant(
        "F31-sums-trusted",
        "trusts norms of sums in float32, whatever cancels",
        Edit(
            "perexample._trust:direct_norms",
            ("_in_doubt(excess, norms)", "_in_doubt(0 * excess, norms)"),
        ),
        killers="test_laws.py::test_float32_norms_are_never_too_small[0.0-size0]",
    ),
    mutant(
        "F31-not-raised",
        "leaves what rounding may have taken off in a norm",
        Edit(f"{TRUST}:inner", ("return raised, _in_doubt", "return l2, _in_doubt")),
        killers=[
            "test_methods.py::test_float32_norms_of_long_constant_rows_are_not_below_the_truth",
            "test_laws.py::test_float32_norms_are_never_too_small",
        ],
    ),
    mutant(
        "F31-sum-in-float32",
        "adds what cancels in float32 after its norm was taken in float64",
        Edit(f"{VIEW}._sum", ("doubtful = term.doubtful\n", "doubtful = None\n")),
        killers=[
            "test_faults.py::test_finding_1_clipped_rows_are_no_longer_than_the_bound[10000.0-1.0-1e-07]",
        ],
    ),
    mutant(
        "F40-no-contract",
        "takes gradients of any shape from a rule",
        Edit(
            "perexample.rule.contract:checked",
            ("if not isinstance(value, Tensor) or tuple(value.shape) != shape:", "if False:"),
        ),
        killers="test_faults.py::test_f40_shape_contract_of_custom_rules",
    ),
    mutant(
        "F40-no-names",
        "takes whatever names a rule returns",
        Edit("perexample.rule.contract:_check_names", ("if result.keys() != call.params.keys():", "if False:")),
        killers="test_faults.py::test_f40_shape_contract_of_custom_rules",
    ),
    mutant(
        "F39-other-numbers",
        "draws random numbers anew where a forward is repeated",
        Edit("perexample.rules.generic:restored", ("set_random_states(states, devices)", "pass")),
        killers=[
            "test_recurrent.py::test_dropout_draws_the_same_numbers[batch_first-tanh-dtype0]",
            "test_faults.py::test_f39_random_masks_are_replayed",
        ],
    ),
    mutant(
        "F39-mask-of-another",
        "gives an example the gradient of another, whose sum over all is right",
        Edit(
            "perexample.rules.generic:GenericRule._one_at_a_time",
            ("torch.stack([row[name] for row in rows])", "torch.stack([row[name] for row in rows]).roll(1, 0)"),
        ),
        killers="test_faults.py::test_f39_random_masks_are_replayed",
    ),
    mutant(
        "F39-one-mask",
        "repeats the forward of one example at a time, which draws the mask of the first for all",
        Edit(
            "perexample.rules.generic:GenericRule.grad_batch",
            (
                'self._masked(call, upstream) if call.saved.get("rng") else self._repeated(call, upstream)',
                "self._repeated(call, upstream)",
            ),
        ),
        killers="test_faults_models.py::test_f39_the_generic_rule_replays_too",
    ),
)
