"""Faults of the accountant."""

from __future__ import annotations

from .mutant import Body, Edit, mutant

ACCOUNTING = "perexample.privacy.accounting"
COMPOSITION = "perexample.privacy.composition"
ONE_STEP = "test_accounting.py::test_one_step_has_the_hockey_stick_divergence_of_its_mixtures[0.2-0.8-add-or-remove]"
GAUSSIAN = "test_accounting.py::test_without_amplification_it_is_the_gaussian_mechanism[1.0-10-1e-05]"
RUN = "test_privacy_faults.py::test_f42_epsilon_of_a_run"

MUTANTS = (
    mutant(
        "F42-central-limit",
        "takes the privacy loss for the Gaussian that it tends to, and exceeds",
        Body(
            f"{COMPOSITION}:_pld_epsilon",
            """
            variance = sum(e.steps * e.rate**2 * math.expm1(e.noise**-2) for e in events)
            return _gaussian_epsilon(math.sqrt(variance), delta, neighbours)
            """,
        ),
        killers=[ONE_STEP, "test_accounting.py::test_published_figures"],
    ),
    mutant(
        "F42-rounded-down",
        "rounds the noise that a budget needs to two digits, down",
        Edit(f"{ACCOUNTING}:noise_multiplier_for", ("return 1 / precision", "return (100 / precision // 1) / 100")),
        killers=[
            RUN,
            "test_accounting.py::test_calibrated_noise_keeps_the_budget_and_is_nearly_the_least[0.1-0.1-1-1e-08-pld]",
        ],
    ),
    mutant(
        "F42-one-step-more",
        "allows a step more than the budget does",
        Edit(f"{ACCOUNTING}:steps_for", (" or 0)", " or 0) + 1")),
        killers="test_accounting.py::test_affordable_steps_are_the_most[0.1-0.1-1-1e-08-pld]",
    ),
    mutant(
        "F42-replaced-as-removed",
        "takes the replacement of an example for its removal",
        Edit(f"{COMPOSITION}:_gaussian_epsilon", ('2 if neighbours == "replace" else 1', "1")),
        killers=GAUSSIAN,
    ),
    mutant(
        "F42-rounded-losses",
        "rounds privacy losses to the grid in both directions",
        Edit(f"{COMPOSITION}:_pld_epsilon", ("sampling_prob=rate,", "sampling_prob=rate, pessimistic_estimate=False,")),
        killers=ONE_STEP,
    ),
    mutant(
        "F42-roundoff",
        "trusts a delta that is all roundoff",
        Edit(f"{COMPOSITION}:_pld_epsilon", ("delta - ROUNDOFF * (steps + 4 * len(events))", "delta")),
        killers="test_accounting.py::test_delta_near_roundoff_is_not_trusted_to_pld",
    ),
    mutant(
        "F42-last-entry",
        "counts the last of several entries of one kind only",
        Edit(f"{COMPOSITION}:_merged", ("counts.get((noise, rate), 0) + count", "count")),
        killers="test_accounting.py::test_neither_order_nor_pieces_matter[rdp]",
    ),
    mutant(
        "F42-asked-and-forgotten",
        "empties the ledger when epsilon is asked for",
        Edit(f"{ACCOUNTING}:epsilon_of", ("    return spent(", "    runs.clear()\n    return spent(")),
        killers=RUN,
    ),
    mutant(
        "F42-amplified",
        "amplifies steps that saw every example",
        Edit(f"{ACCOUNTING}:_rate", ("1.0 if value is None", "0.5 if value is None")),
        killers=[GAUSSIAN, "test_privacy_faults.py::test_f42_a_gaussian_in_closed_form"],
    ),
    mutant(
        "F42-no-noise",
        "leaves steps without noise out",
        Edit(f"{COMPOSITION}:spent", ("if event.steps]", "if event.steps and event.noise]")),
        killers="test_accounting.py::test_what_saw_nothing_or_never_happened_is_free_and_what_had_no_noise_is_not[rdp]",
    ),
)
