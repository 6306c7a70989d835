"""Faults of the samples that batches are made of, and of what is taken for a Poisson sample."""

from __future__ import annotations

from .mutant import Edit, mutant

SAMPLING = "perexample.privacy.sampling"
DRAWN = f"{SAMPLING}:PoissonBatchSampler._draw"
NEXT = f"{SAMPLING}:_Iteration.__next__"
BATCH = "torch.cat(found).tolist()"
POISSON = "test_sampling.py::test_batches_are_poisson_samples[53-0.1-0]"

MUTANTS = (
    mutant(
        "F16-empty-batch-left-out",
        "draws again where a sample is empty",
        Edit(
            DRAWN,
            (
                "    self._pending.append",
                "    if not batch and self.data_size:\n        return self._draw()\n    self._pending.append",
            ),
        ),
        killers=[POISSON, "test_make_private.py::test_empty_batches_are_steps"],
    ),
    mutant(
        "F16-empty-batch-crashes",
        "leaves an empty batch to the collate function",
        Edit("perexample.privacy.collate:EmptyBatches.__call__", (" if len(examples) else fresh(self._empty)", "")),
        killers="test_make_private.py::test_empty_batches_are_steps",
    ),
    mutant(
        "F19-unamplified-as-amplified",
        "counts steps of any loader as steps on Poisson samples",
        Edit(
            "perexample.privacy.privatizer:Privatizer.__call__",
            ("None if self.sampler is None else self.sampler.sample_rate", "0.25"),
        ),
        killers=[
            "test_make_private.py::test_without_a_sampler_nothing_is_amplified",
            "test_privacy_faults.py::test_f19_only_poisson_samples_are_amplified",
        ],
    ),
    mutant(
        "F19-any-sampler",
        "takes any sampler for a Poisson sampler",
        Edit(
            "perexample.privacy.optimizer:privatize",
            (
                "        _check_sampler(sampler)\n        _check_shard(sampler, processes)\n        sampler.claim(",
                "        id(",
            ),
        ),
        killers="test_make_private.py::test_other_samplers_are_no_poisson_samplers",
    ),
    mutant(
        "F19-fixed-size",
        "draws samples of one size",
        Edit(
            DRAWN,
            (
                BATCH,
                "torch.randperm(self.data_size, generator=self._generator)"
                "[: round(self.data_size * self.sample_rate)].sort().values.tolist()",
            ),
        ),
        killers=POISSON,
    ),
    mutant(
        "F19-other-batch",
        "steps on batches of another size than the sampler has drawn",
        Edit(f"{SAMPLING}:PoissonBatchSampler.take", ("if examples != due:", "if False:")),
        killers=[
            "test_make_private.py::test_a_batch_that_was_changed_is_refused",
            "test_make_private.py::test_several_views_of_an_example_are_refused",
        ],
    ),
    mutant(
        "F19-other-loader",
        "steps on batches that the sampler has not drawn",
        Edit(
            f"{SAMPLING}:PoissonBatchSampler.take",
            ("if due is None:", "if due is None:\n        return\n    if False:"),
        ),
        killers="test_make_private.py::test_a_batch_of_another_loader_is_refused",
    ),
    mutant(
        "F19-two-optimizers",
        "gives one sample to two optimizers",
        Edit(f"{SAMPLING}:PoissonBatchSampler.claim", ("if self._claimed:", "if False:")),
        killers="test_make_private.py::test_one_sampler_for_one_optimizer",
    ),
    mutant(
        "F19-repeated-samples",
        "lets a sampler be copied, and the copy draw the same samples",
        Edit(
            f"{SAMPLING}:PoissonBatchSampler.__reduce_ex__",
            ("raise ConfigurationError(", "return object.__reduce_ex__(self, protocol)\n    raise ConfigurationError("),
        ),
        killers="test_sampling.py::test_copies_are_refused",
    ),
    mutant(
        "F20-last-example",
        "never draws the last example",
        Edit(DRAWN, ("min(_CHUNK, self.data_size - start)", "max(0, min(_CHUNK, self.data_size - 1 - start))")),
        killers=[POISSON, "test_sampling.py::test_extreme_sizes_and_rates"],
    ),
    mutant(
        "F20-every-rank-all",
        "gives every process all examples of a sample",
        Edit(DRAWN, ("indices[indices % self.world_size == self.rank]", "indices")),
        killers="test_sampling.py::test_more_processes_than_examples",
    ),
    mutant(
        "F20-equal-shards",
        "cuts samples so that all processes have as many examples",
        Edit(DRAWN, (BATCH, f"{BATCH}[: int(self.data_size * self.sample_rate / self.world_size)]")),
        killers="test_sampling.py::test_the_union_of_ranks_is_a_poisson_sample",
    ),
    mutant(
        "F26-last-piece-lost",
        "drops the last piece of a batch where it is smaller",
        Edit(NEXT, ("range(0, max(len(batch), 1), size)", "range(0, max(len(batch) - size + 1, 1), size)")),
        killers=[
            "test_sampling.py::test_pieces_are_the_logical_batches",
            "test_make_private.py::test_pieces_change_nothing[SGD-3]",
        ],
    ),
    mutant(
        "F29-predictable-samples",
        "draws samples from the generator that torch.manual_seed sets",
        Edit(f"{SAMPLING}:_own_generator", ("return system_generator()", "return torch.default_generator")),
        killers=[
            "test_sampling.py::test_global_seeds_do_not_tell_the_samples",
            "test_privacy_faults.py::test_f29_no_seed_of_torch_repeats_noise_or_samples",
        ],
    ),
    mutant(
        "F43-batches-drawn-ahead",
        "does not draw batches again that no step was taken on",
        Edit(
            f"{SAMPLING}:PoissonBatchSampler.state_dict",
            ("self._pending[0].state if self._pending else self._generator.get_state()", "self._generator.get_state()"),
        ),
        killers="test_sampling.py::test_resuming_with_workers",
    ),
    mutant(
        "F48-truncated",
        "cuts samples to what fits, one more than is expected",
        Edit(DRAWN, (BATCH, f"{BATCH}[: round(self.data_size * self.sample_rate) + 1]")),
        killers=[POISSON, "test_privacy_faults.py::test_f48_no_sample_is_cut"],
    ),
    mutant(
        "F48-truncated-pieces",
        "keeps the first pieces of a batch only",
        Edit(
            NEXT,
            (
                "    self.left -= 1\n        batch = sampler._draw()",
                "    self.left -= 1\n        batch = sampler._draw()[: 2 * (self.size or 10**9)]",
            ),
        ),
        killers=[
            "test_privacy_faults.py::test_f48_no_sample_is_cut",
            "test_sampling.py::test_pieces_are_the_logical_batches",
        ],
    ),
    mutant(
        "F49-unlucky-batch",
        "draws again where a sample is too large",
        Edit(
            DRAWN,
            (
                "    self._pending.append",
                "    if len(batch) > 1.3 * self.data_size * self.sample_rate:\n"
                "        return self._draw()\n"
                "    self._pending.append",
            ),
        ),
        killers=POISSON,
    ),
)
