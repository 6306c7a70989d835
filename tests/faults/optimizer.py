"""Faults of the private step: noise, divisor, schedule, closures, and what is saved."""

from __future__ import annotations

from .mutant import Body, Edit, mutant

OPTIMIZER = "perexample.privacy.optimizer"
PRIVATIZER = "perexample.privacy.privatizer"
PIECES = "perexample.privacy.pieces"
STEP = f"{PRIVATIZER}:Privatizer"
NOISE = "perexample.privacy.noise"
NORMAL = "perexample.privacy.normal"
LEDGER = "perexample.privacy.ledger"
PREPARE = "perexample.privacy.prepare"

SIZE = "total.div_(expected_batch_size)"
FIRST = "_refuse_closure(optimizer, args, kwargs)"
DRAW = "self.noise.plus(t, std)"
LABEL = "test_make_private.py::test_pieces_change_nothing[SGD-3]"

MUTANTS = (
    mutant(
        "F1-noise-by-batch",
        "divides the sensitivity by the number of examples",
        Edit(f"{STEP}._taken", ("self.clipping.sensitivity()", "self.clipping.sensitivity() / max(1, examples)")),
        killers=[
            "test_audit.py::test_correct_code_keeps_its_claim[flat]",
            "test_optim.py::test_the_noise_is_public_scale_whatever_the_batch",
        ],
    ),
    mutant(
        "F1-noise-by-divisor",
        "divides the noise twice",
        Edit(f"{STEP}.__call__", (DRAW, "self.noise.plus(t, std / expected_batch_size)")),
        killers="test_optim.py::test_scale_and_distribution_of_the_noise[2.5-0.01-16.0]",
    ),
    mutant(
        "F1-unit-noise",
        "takes C for 1",
        Edit(f"{STEP}._taken", ("share, self.clipping.sensitivity(), noise", "share, 1.0, noise")),
        killers="test_optim.py::test_scale_and_distribution_of_the_noise[0.7-3.0-1.0]",
    ),
    mutant(
        "F1-two-percent",
        "draws noise that is 2% too small",
        Edit(f"{NOISE}:Noise.plus", ("tensor.detach(), real(", "tensor.detach(), 0.98 * real(")),
        killers=[
            "test_optim.py::test_scale_and_distribution_of_the_noise[1.0-1.0-1.0]",
            "test_audit.py::test_noise_of_a_given_generator_has_the_claimed_size",
        ],
    ),
    mutant(
        "F1-two-percent-of-the-system",
        "the same for many numbers, and those of the operating system",
        Edit(f"{NORMAL}:_to_normal", ("mul_(-2)", "mul_(-1.92)")),
        killers=["test_noise.py::test_distribution[os]", "test_noise.py::test_distribution[torch]"],
    ),
    mutant(
        "F1-biases-without-noise",
        "adds no noise to vectors",
        Edit(
            "perexample.privacy.distributed:Processes.total",
            ("noised if self.rank == 0 else None", "noised if self.rank == 0 and t.dim() > 1 else None"),
        ),
        killers="test_optim.py::test_accumulation_over_backwards[1]",
    ),
    mutant(
        "F15-grad-scaler",
        "lets a GradScaler skip the step of a batch with an infinite gradient",
        Edit(f"{OPTIMIZER}:privatize", ("optimizer._step_supports_amp_scaling = True", "pass")),
        killers=[
            "test_privacy_faults.py::test_f15_a_grad_scaler_skips_no_step[True-SGD]",
            "test_privacy_faults.py::test_f15_a_grad_scaler_skips_no_step[False-AdamW]",
        ],
    ),
    mutant(
        "F15-scaler-of-fused-steps",
        "lets a GradScaler divide noisy gradients by its scale",
        Body(f"{PRIVATIZER}:refuse_scaler", "return None"),
        killers="test_privacy_faults.py::test_f15_a_grad_scaler_skips_no_step[True-fused]",
    ),
    mutant(
        "F15-skipped-step",
        "skips the step of a batch with an infinite gradient, as a GradScaler does",
        Edit(f"{STEP}.__call__", (FIRST, f"{FIRST}\n    if self.clipping.nonfinite:\n        return")),
        killers="test_privacy_faults.py::test_f15_a_batch_that_is_not_finite_is_a_step",
    ),
    mutant(
        "F16-empty-batch-skipped",
        "takes no step on an empty batch, draws no noise and counts nothing",
        Edit(
            f"{STEP}.__call__",
            (FIRST, f"{FIRST}\n    if not self.clipping.examples and self.clipping._entries:\n        return"),
        ),
        killers=["test_faults.py::test_f16_empty_batch[mlp-0]", "test_make_private.py::test_empty_batches_are_steps"],
    ),
    mutant(
        "F17-actual-batch-size",
        "divides by the number of examples that came",
        Edit(f"{STEP}.__call__", (SIZE, "total.div_(max(1, self.clipping._examples))")),
        killers=[
            "test_privacy_faults.py::test_f17_the_divisor_is_the_same_for_neighbours",
            "test_optim.py::test_dp_sgd_is_sgd_on_the_clipped_sum[plain]",
        ],
    ),
    mutant(
        "F18-rate-from-the-data",
        "computes the sample rate from the length of the data set",
        Edit(
            f"{PREPARE}:make_private",
            (
                "rate = sample_rate(batch_size, public_size)",
                "sample_rate(batch_size, public_size)\n    rate = sample_rate(batch_size, len(dataset))",
            ),
        ),
        killers="test_make_private.py::test_the_public_numbers_do_not_depend_on_the_data",
    ),
    mutant(
        "F18-divisor-from-the-data",
        "computes the divisor from the length of the data set, as Opacus does",
        Edit(
            f"{PREPARE}:make_private",
            ("        expected_batch_size=batch_size,", "        expected_batch_size=rate * len(dataset),"),
        ),
        killers="test_make_private.py::test_the_public_numbers_do_not_depend_on_the_data",
    ),
    mutant(
        "F18-length-by-default",
        "takes the length of the data set for public if nothing is said",
        Edit(
            f"{PREPARE}:make_private",
            (
                "rate = sample_rate(batch_size, public_size)",
                "rate = sample_rate(batch_size, public_size or len(dataset))",
            ),
        ),
        killers="test_make_private.py::test_arguments_without_meaning",
    ),
    mutant(
        "F21-drawn-twice",
        "draws the noise of a step twice",
        Edit(f"{STEP}.__call__", (DRAW, f"{DRAW} + self.noise.like(t, std)")),
        killers=[
            "test_make_private.py::test_noise_is_drawn_once_for_each_logical_batch[2]",
            "test_privacy_faults.py::test_f21_one_noise_for_any_number_of_pieces",
        ],
    ),
    mutant(
        "F21-each-piece",
        "adds noise to each piece of a batch",
        Edit(
            "perexample.extensions.clipped_grad:ClippedGrad.finish",
            (
                "view.let_go()",
                "value = value + torch.randn(value.shape); view.let_go()",
            ),
        ),
        killers=["test_privacy_faults.py::test_f21_one_noise_for_any_number_of_pieces", LABEL],
    ),
    mutant(
        "F22-first-piece-steps",
        "steps on the first piece of a batch",
        Edit(
            f"{PIECES}:Pieces.wait",
            ("if examples < due:", "if examples < due and before:"),
            ("if came != piece:", "if False:"),
        ),
        Edit("perexample.privacy.sampling:PoissonBatchSampler.take", ("if examples != due:", "if False:")),
        killers=[LABEL, "test_privacy_faults.py::test_f22_nothing_moves_before_the_last_piece"],
    ),
    mutant(
        "F24-each-piece-counted",
        "counts pieces of batches as steps",
        Edit(
            f"{PIECES}:step_on_the_last",
            (
                "return None if pieces.wait() else plain(*args, **kwargs)",
                "release = __import__('perexample').privacy.Release(1.0, pieces.sampler.sample_rate)\n"
                "        return self.ledger.record(release) if pieces.wait() else plain(*args, **kwargs)",
            ),
        ),
        killers=[LABEL, "test_privacy_faults.py::test_f24_as_many_entries_as_draws_of_noise"],
    ),
    mutant(
        "F24-not-counted",
        "counts a step that equals the one before once only",
        Edit(f"{LEDGER}:_add", ("runs[-1][1] + count", "runs[-1][1]")),
        killers="test_ledger.py::test_entries_are_kept_in_order_and_joined",
    ),
    mutant(
        "F24-never-counted",
        "takes steps that the ledger knows nothing of",
        Edit(f"{STEP}.__call__", ("    with self.processes.together():\n        self.ledger.record(release)\n", "")),
        killers=["test_make_private.py::test_steps_instead_of_epochs_and_a_file_for_the_ledger", LABEL],
    ),
    mutant(
        "F25-closure",
        "runs a closure that computes gradients anew after the noise",
        Body(f"{PRIVATIZER}:_refuse_closure", "return None"),
        killers=[
            "test_errors.py::test_bad_use[closure]",
            "test_peers.py::test_peer_07_a_closure_is_refused",
            "test_privacy_faults.py::test_f25_no_closure_runs_after_the_noise",
        ],
    ),
    mutant(
        "F25-closure-by-name",
        "looks for a closure among the unnamed arguments only",
        Edit(f"{PRIVATIZER}:_refuse_closure", ("(*args[1:], *kwargs.values())", "args[1:]")),
        killers="test_errors.py::test_bad_use[closure_by_name]",
    ),
    mutant(
        "F25-lbfgs",
        "makes LBFGS private, which calls a closure many times",
        Edit(
            f"{OPTIMIZER}:_check_optimizer", ("(torch.optim.LBFGS, torch.optim.SparseAdam)", "torch.optim.SparseAdam")
        ),
        killers=["test_errors.py::test_bad_use[lbfgs]", "test_make_private.py::test_make_optimizer_of_lbfgs"],
    ),
    mutant(
        "F26-forgotten-between-pieces",
        "forgets the pieces so far when gradients are set to zero between them",
        Edit(
            f"{PIECES}:clear_sums_too",
            ("if pieces is None or not (clipping.examples and pieces.incomplete()):", "if True:"),
        ),
        killers="test_make_private.py::test_zero_grad_between_pieces_keeps_them",
    ),
    mutant(
        "F28-same-each-step",
        "begins the same stream of noise in each step",
        Edit(
            f"{STEP}.__call__",
            (FIRST, f"{FIRST}\n    self.noise.given = __import__('torch').Generator().manual_seed(7)"),
        ),
        killers=[
            "test_privacy_faults.py::test_f28_noise_differs_between_steps_and_parameters",
            "test_optim.py::test_noise_is_independent_over_steps_and_parameters",
        ],
    ),
    mutant(
        "F28-same-each-draw",
        "begins the same stream of noise for each parameter",
        Edit(
            f"{NOISE}:Noise.plus",
            ("    noise = torch.randn", "    generator.manual_seed(7)\n    noise = torch.randn"),
        ),
        killers=[
            "test_noise.py::test_successive_draws_differ",
            "test_optim.py::test_noise_is_independent_over_steps_and_parameters",
        ],
    ),
    mutant(
        "F28-shared-along-an-axis",
        "repeats the noise along the last axis",
        Edit(
            f"{NOISE}:Noise.plus",
            ("torch.randn(tensor.shape,", "torch.randn((*tensor.shape[:-1], 1),"),
            ("noise.to(tensor.device).mul_", "noise.expand(tensor.shape).clone().mul_"),
        ),
        killers=[
            "test_noise.py::test_few_numbers_differ[given]",
            "test_audit.py::test_noise_of_a_given_generator_has_the_claimed_size",
        ],
    ),
    mutant(
        "F28-one-uniform",
        "makes radius and angle of one uniform number",
        Edit(
            f"{NORMAL}:_to_normal",
            ("= numbers.split(len(spare))", "= numbers.split(len(spare))\n    angle.copy_(radius)"),
        ),
        killers="test_noise.py::test_distribution[os]",
    ),
    mutant(
        "F29-fixed-seed",
        "seeds the noise with a constant",
        Body("perexample._private:system_generator", "return torch.Generator(device).manual_seed(0)"),
        killers=[
            "test_noise.py::test_no_seed_repeats_it[torch]",
            "test_privacy_faults.py::test_f29_no_seed_of_torch_repeats_noise_or_samples",
        ],
    ),
    mutant(
        "F29-global-generator",
        "draws noise from the generator that torch.manual_seed sets",
        Body(f"{NOISE}:Noise._for", "return torch.default_generator"),
        killers=[
            "test_privacy_faults.py::test_f29_no_seed_of_torch_repeats_noise_or_samples",
            "test_optim.py::test_noise_cannot_be_predicted_from_the_global_seed",
        ],
    ),
    mutant(
        "F22-a-piece-for-another",
        "takes the first piece of the next batch for one that is missing",
        Edit(f"{PIECES}:Pieces.wait", ("if came != piece:", "if False:")),
        killers=[
            "test_make_private.py::test_the_first_piece_of_a_batch_takes_the_place_of_none",
            "test_make_private.py::test_a_piece_that_is_run_twice_is_an_error",
        ],
    ),
    mutant(
        "F29-noise-again",
        "repeats the noise of a step beside other sums, when a training is resumed",
        Body(f"{STEP}._may_come_again", "return False"),
        killers="test_make_private.py::test_noise_that_comes_again_comes_beside_the_same_sums[0.1]",
    ),
    mutant(
        "F29-32-bits",
        "seeds the noise with 32 bits, all of which can be tried",
        Edit("perexample._private:generator_of", ('if generator.device.type == "cpu":', "if False:")),
        killers="test_sampling.py::test_all_of_the_state_comes_from_the_operating_system",
    ),
    mutant(
        "F30-float32",
        "draws noise in float32, which ends at 5.8 standard deviations",
        Edit(
            f"{NOISE}:Noise.plus",
            ("dtype=torch.float64", "dtype=torch.float32"),
            ("noise.to(tensor.device).mul_", "noise.to(tensor.device).double().mul_"),
        ),
        killers=[
            "test_optim.py::test_noise_is_drawn_in_float64",
            "test_privacy_faults.py::test_f30_noise_is_of_53_bits",
        ],
    ),
    mutant(
        "F30-24-bits",
        "makes noise of uniforms of 24 bits",
        Edit(f"{NORMAL}:plus_normal", ("copy_(bits[:even])", "copy_(bits[:even] >> 39 << 39)")),
        killers=[
            "test_noise.py::test_the_least_and_the_largest_bits_give_finite_numbers",
            "test_privacy_faults.py::test_f30_noise_is_of_53_bits",
        ],
    ),
    mutant(
        "F36-no-noise-where-nothing-is",
        "adds noise only where a sum is not zero",
        Edit(f"{STEP}.__call__", (DRAW, f"{DRAW} * (t != 0)")),
        killers=[
            "test_faults.py::test_f36_an_unused_parameter_gets_zeros_and_noise",
            "test_optim.py::test_a_step_on_an_empty_batch_is_noise_alone",
        ],
    ),
    mutant(
        "F37-frozen-with-gradient",
        "steps on the raw gradient of a parameter that was frozen since",
        Edit(f"{STEP}.__call__", ("for p in frozen:", "for p in []:")),
        killers="test_faults.py::test_f37_a_raw_gradient_never_reaches_the_step",
    ),
    mutant(
        "F41-settings",
        "takes settings that are negative or not finite",
        Edit(f"{PRIVATIZER}:checked_setting", ("number >= least", "True")),
        Edit("perexample._arguments:_finite", ("number if math.isfinite(number) else None", "number")),
        killers=[
            "test_faults.py::test_f41_configurations_without_meaning",
            "test_make_private.py::test_arguments_without_meaning",
        ],
    ),
    mutant(
        "F41-rate-above-one",
        "takes a sample rate above 1",
        Edit("perexample.privacy.sampling:_checked_rate", ("0 < rate <= 1", "0 < rate")),
        killers="test_sampling.py::test_arguments_without_meaning",
    ),
    mutant(
        "F43-no-ledger",
        "saves an empty ledger",
        Edit(f"{STEP}.state", ('"ledger": self.ledger.state_dict()', '"ledger": Ledger().state_dict()')),
        killers=[
            "test_privacy_faults.py::test_f43_a_resumed_run_knows_what_was_spent",
            "test_make_private.py::test_a_resumed_run_is_the_uninterrupted_one",
        ],
    ),
    mutant(
        "F43-repeated-noise",
        "saves the system's noise, and draws it again when it is resumed",
        Edit(
            f"{NOISE}:Noise.state",
            (
                "None if self.given is None else self.given.get_state()",
                "(self.given or self._for(torch.device('cpu'))).get_state()",
            ),
        ),
        Edit(
            f"{NOISE}:Noise.set_state",
            ("if self.given is not None and state is not None:", "if True:"),
            ("self.given.set_state(", "(self.given or self._for(torch.device('cpu'))).set_state("),
        ),
        Edit(f"{STEP}.end_load", ('state["noise"] is not None and self.noise.given is not None', "True")),
        killers=[
            "test_make_private.py::test_noise_of_the_system_is_not_repeated_by_a_resumed_run",
            "test_privacy_faults.py::test_f43_a_resumed_run_draws_other_noise",
        ],
    ),
    mutant(
        "F43-sampler-from-the-start",
        "resumes the samples from the start",
        Edit(f"{STEP}.end_load", ('sampler.get("generator") if repeats else None', "None")),
        killers="test_make_private.py::test_a_resumed_run_is_the_uninterrupted_one",
    ),
    mutant(
        "F43-noise-from-the-start",
        "resumes the stream of a given generator from the start",
        Edit(f"{STEP}.end_load", ('self.noise.set_state(state["noise"])', "pass")),
        killers="test_make_private.py::test_a_resumed_run_is_the_uninterrupted_one",
    ),
    mutant(
        "F43-steps-forgotten",
        "forgets steps that were taken after the checkpoint",
        Edit(f"{LEDGER}:Ledger.load_state_dict", ("self.runs = list(long)", "self.runs = runs")),
        killers=[
            "test_ledger.py::test_what_is_known_beyond_a_state_is_kept_and_other_histories_are_refused",
            "test_make_private.py::test_going_back_in_one_process_does_not_forget_steps",
        ],
    ),
    mutant(
        "F43-not-on-the-disk",
        "takes a step before its entry is on the disk",
        Edit(f"{LEDGER}:_append", ("os.fsync(file.fileno())", "pass")),
        killers="test_ledger.py::test_an_entry_is_forced_to_the_disk_before_record_returns",
    ),
    mutant(
        "F43-state-without-ledger",
        "resumes from the state of an optimizer that was not private",
        Edit(
            f"{PRIVATIZER}:keep_state",
            ("if _KEY not in state:", "if _KEY not in state:\n            return state\n        if False:"),
        ),
        killers="test_make_private.py::test_a_state_without_ledger_is_refused",
    ),
    mutant(
        "F43-half-a-file",
        "writes a checkpoint in place, so that a crash leaves half of it",
        Edit(
            "perexample.privacy.checkpoint:save_file",
            ('beside = path.with_name(f"{path.name}.{os.getpid()}.partial")', "beside = path"),
        ),
        killers="test_make_private.py::test_a_failed_save_leaves_the_old_file",
    ),
    mutant(
        "F49-bad-batch-skipped",
        "takes no step on a batch with an example that is not finite",
        Edit(f"{STEP}.__call__", (FIRST, f"{FIRST}\n    if self.clipping.nonfinite:\n        return")),
        killers="test_privacy_faults.py::test_f49_neighbours_cannot_be_told_by_what_is_done",
    ),
    mutant(
        "F49-no-noise-without-gradient",
        "draws noise for parameters that have a gradient only",
        Edit(f"{STEP}.__call__", (DRAW, f"{DRAW} if bool((t != 0).any()) else t.double()")),
        killers="test_privacy_faults.py::test_f49_neighbours_cannot_be_told_by_what_is_done",
    ),
    mutant(
        "F49-noise-of-the-batch",
        "scales noise with the number of examples",
        Edit(f"{STEP}._taken", ("self.clipping.sensitivity()", "self.clipping.sensitivity() * (1 + examples % 2)")),
        killers="test_privacy_faults.py::test_f49_neighbours_cannot_be_told_by_what_is_done",
    ),
)
