"""Whatever is wrong in private training is told by one clear error (R10): what, by its name, and what to do instead."""

import copy
import pickle
import re
from collections import UserDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from audit import save_scores
from naive import Lambda
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from perexample import (
    DP_SGD,
    BatchAxisError,
    ConfigurationError,
    CrossExampleError,
    ExtensionError,
    LossError,
    PerExampleError,
    PrivacyBudgetError,
    RecordedStep,
    StaleGradientError,
    UncoveredParameterError,
    UnsupportedModuleError,
    check,
    extend,
    perex,
    privatize,
    register_rule,
)
from perexample.extensions import AdaptiveClippedGrad, ClippedGrad
from perexample.privacy import (
    EmptyBatches,
    Ledger,
    Noise,
    PhysicalBatches,
    PoissonBatchSampler,
    Processes,
    Release,
    epsilon,
    make_optimizer,
    make_private,
    noise_multiplier_for,
    replace_batchnorm,
    split_batch,
    steps_for,
)

N = 8


def data():
    return TensorDataset(torch.ones(N, 3), torch.zeros(N, dtype=torch.long))


def linear():
    return nn.Linear(3, 2)


def sgd(model, **options):
    return torch.optim.SGD(model.parameters(), lr=0.1, **options)


def private(model=None, optimizer=None, dataset=None, **options):
    """`make_private` with what it needs, and with what is wrong."""
    model = linear() if model is None else model
    settings = {
        "batch_size": N,  # all of them in each batch
        "public_size": N,
        "max_norm": 1.0,
        "noise_multiplier": 1.0,
        "target_delta": 1e-3,
        "steps": 2,
    } | options
    optimizer = sgd(model) if optimizer is None else optimizer
    return make_private(model, optimizer, data() if dataset is None else dataset, **settings)


def private_sgd(model=None, **options):
    """`privatize` with what it needs, and with what is wrong."""
    model = extend(linear() if model is None else model)
    settings = {"clipping": ClippedGrad(1.0), "noise_multiplier": 1.0, "expected_batch_size": 4} | options
    return model, settings["clipping"], privatize(sgd(model), **settings)


def train(p, model=None):
    """One step."""
    for x, y in p.loader:
        with p:
            F.cross_entropy((model or p.model)(x), y).backward()
        p.step()


def backward(model, clipping, x=None, **settings):
    x = torch.ones(4, 3) if x is None else x
    with perex(clipping, **({"grad": False} | settings)):
        model(x).square().mean().backward()


# ------------------------------------------------------------------------------------------------------------ the table

CASES = []
SCORES = {"cases": 0, "clear": 0, "swept": 0, "swept_clear": 0}


def case(error, what, remedy):
    """Add a function that does something wrong, with its error, and what the message says is wrong, and what to do."""

    def add(function):
        name = function.__name__.removeprefix("bad_")
        CASES.append(pytest.param(function, error, what, remedy, id=name))
        return function

    return add


@pytest.mark.parametrize(("bad", "error", "what", "remedy"), CASES)
def test_bad_input(bad, error, what, remedy, tmp_path):
    SCORES["cases"] += 1
    with pytest.raises(PerExampleError) as caught:
        bad(tmp_path) if bad.__code__.co_argcount else bad()
    assert type(caught.value) is error
    message = str(caught.value)
    assert re.search(what, message), message
    assert re.search(remedy, message), message
    SCORES["clear"] += 1


# ------------------------------------------------------------------------------------------ the table: models, datasets


@case(UnsupportedModuleError, r"`1\.body\.0` \(BatchNorm1d\)", r"GroupNorm.*\.eval\(\)")
def bad_batchnorm_in_a_nested_module():
    body = nn.ModuleDict({"body": nn.Sequential(nn.BatchNorm1d(3))})
    private(nn.Sequential(linear(), body))


@case(UnsupportedModuleError, r"`1` \(LazyLinear\) has no shape yet", "one forward before")
def bad_lazy_module():
    private(nn.Sequential(linear(), nn.LazyLinear(2)))


@case(UnsupportedModuleError, r"`0` \(InstanceNorm1d\)", "track_running_stats=False")
def bad_running_statistics():
    private(nn.Sequential(nn.InstanceNorm1d(3, affine=True, track_running_stats=True), linear()))


@case(
    UnsupportedModuleError,
    r"`0` \(.*complex.*`weight`|complex parameter \(`weight`\)",
    r"view_as_complex of it in the forward",
)
def bad_complex_parameter():
    private(nn.Sequential(nn.Linear(3, 2, dtype=torch.complex64)))


@case(UnsupportedModuleError, "`DataParallel`", r"extend\(model\.module\)")
def bad_data_parallel():
    private(nn.DataParallel(linear()))


@case(UnsupportedModuleError, "compiled model", r"without torch\.compile")
def bad_compiled_model():
    private(torch.compile(linear(), backend="eager"))


@case(UncoveredParameterError, "`0.weight`.*does not depend on the batch|`0.weight`.*penalt", "weight_decay")
def bad_penalty_on_the_weights():
    """A functional use of a parameter that belongs to no example."""
    p = private(nn.Sequential(linear()))
    x, y = next(iter(p.loader))
    with p:
        (F.cross_entropy(p.model(x), y) + p.model[0].weight.square().sum()).backward()


@case(UncoveredParameterError, "belongs to no extended model", r"extend\(\)")
def bad_second_model():
    p, head = private(), nn.Linear(2, 2)
    x, y = next(iter(p.loader))
    with p:
        F.cross_entropy(head(p.model(x)), y).backward()


@case(CrossExampleError, "mix", "example")
def bad_model_that_mixes_examples():
    train(private(Lambda(lambda self, x: self.body(x - x.mean(0)) * 1.0, body=linear())))


@case(BatchAxisError, "number of examples in the call of `Lambda`", "batch_dim=|tensor")
def bad_model_without_a_batch():
    p = private(Lambda(lambda self, n: self.body(torch.ones(n, 3)), body=linear()))
    with p:
        p.model(4).square().mean().backward()


@case(LossError, "trainable parameter", "frozen|no_grad")
def bad_everything_frozen():
    p = private()
    p.model.requires_grad_(False)
    train(p)


@case(ConfigurationError, "model has no trainable parameter", "requires_grad_")
def bad_everything_frozen_is_found_at_once():
    private(linear().requires_grad_(False))


@case(ConfigurationError, "Parameter `weight` is on the meta device", "to_empty")
def bad_model_on_the_meta_device():
    train(private(nn.Linear(3, 2, device="meta")))


@case(LossError, "no graph", "no_grad")
def bad_forward_without_a_graph():
    p = private()
    x, y = next(iter(p.loader))
    with p, torch.no_grad():
        F.cross_entropy(p.model(x), y).backward()


@case(LossError, r"shape \[8\]", r"mean\(\)")
def bad_loss_for_each_example():
    p = private()
    x, y = next(iter(p.loader))
    with p:
        F.cross_entropy(p.model(x), y, reduction="none").backward()


@case(LossError, "sums over its elements", "loss_reduction='sum'")
def bad_sum_where_a_mean_was_said():
    p = private()
    x, y = next(iter(p.loader))
    with p:
        F.cross_entropy(p.model(x), y, reduction="sum").backward()


@case(ConfigurationError, "optimizer", "privatize|new|Make")
def bad_optimizer_that_is_private_already():
    model = linear()
    optimizer = sgd(model)
    private(model, optimizer)
    private(model, optimizer)


@case(ConfigurationError, r"shape \[2, 3\] that is not the model's|`weight`", "copied or converted|Give it")
def bad_optimizer_of_another_model():
    private(linear(), sgd(linear()))


@case(ConfigurationError, r"shape \[2, 3\] that is not the model's", "copied")
def bad_optimizer_of_a_model_and_another():
    model = linear()
    private(model, torch.optim.SGD([*model.parameters(), *linear().parameters()], lr=0.1))


@case(ConfigurationError, "`bias` is trainable", "Give it to the optimizer, or freeze it")
def bad_optimizer_of_a_part():
    model = linear()
    private(model, torch.optim.SGD([model.weight], lr=0.1))


@case(ConfigurationError, "`1.weight` is trainable", "Give it to the optimizer, or freeze it")
def bad_parameter_that_was_replaced():
    model = nn.Sequential(linear(), nn.Linear(2, 2))
    optimizer = sgd(model)
    model[1].weight = nn.Parameter(torch.ones(2, 2))
    private(model, optimizer)


@case(ConfigurationError, "params.*more than one parameter group", "each parameter once")
def bad_parameter_in_two_groups():
    model = linear()
    groups = [{"params": model.parameters()}, {"params": [model.weight]}]
    DP_SGD(groups, clipping=ClippedGrad(1.0), noise_multiplier=1.0, expected_batch_size=4)


@case(ConfigurationError, "No private SGD can be made of these params", r"model\.parameters\(\)")
def bad_params_none():
    DP_SGD(None, clipping=ClippedGrad(1.0), noise_multiplier=1.0, expected_batch_size=4)


@case(ConfigurationError, "SparseAdam cannot be private", "use SGD, Adam")
def bad_sparse_optimizer():
    model = linear()
    private(model, torch.optim.SparseAdam(list(model.parameters())))


@case(ConfigurationError, "LBFGS cannot be private", "use SGD, Adam")
def bad_optimizer_class_with_closure():
    model = linear()
    options = {"clipping": ClippedGrad(1.0), "noise_multiplier": 1.0, "expected_batch_size": 4}
    make_optimizer(torch.optim.LBFGS)(model.parameters(), **options)


@case(ConfigurationError, "make_optimizer takes a class of optimizers", r"such as torch\.optim\.Adam")
def bad_optimizer_instance_in_place_of_a_class():
    make_optimizer(sgd(linear()))


@case(ConfigurationError, "optimizer must be a torch.optim.Optimizer, not type", "must be a torch.optim.Optimizer")
def bad_optimizer_class_in_place_of_an_instance():
    private(linear(), torch.optim.SGD)


@case(ConfigurationError, "model", r"torch\.nn\.Module")
def bad_function_in_place_of_a_model():
    make_private(
        lambda x: x, sgd(linear()), data(), batch_size=4, public_size=N, max_norm=1.0, noise_multiplier=1.0,
        target_delta=1e-3, steps=2,
    )  # fmt: skip


class Stream(IterableDataset):
    def __iter__(self):
        yield torch.ones(3), 0


class Unsized(Dataset):
    def __getitem__(self, index):
        return torch.ones(3), 0


class Items(Dataset):
    """Items that are ``make(index)``."""

    def __init__(self, make):
        self.make = make

    def __len__(self):
        return N

    def __getitem__(self, index):
        return self.make(index)


@case(ConfigurationError, "dataset must have __len__ and __getitem__, and Stream", "index")
def bad_stream_of_examples():
    private(dataset=Stream())


@case(ConfigurationError, "dataset must have __len__ and __getitem__, and Unsized", "index")
def bad_dataset_without_a_length():
    private(dataset=Unsized())


@case(ConfigurationError, "dataset must have __len__ and __getitem__, and DataLoader", r"Give loader\.dataset")
def bad_loader_in_place_of_a_dataset():
    private(dataset=DataLoader(data()))


@case(ConfigurationError, "dataset is empty", "Give|give|needs")
def bad_empty_dataset():
    private(dataset=TensorDataset(torch.ones(0, 3)))


@case(ConfigurationError, "collate_fn failed.*object", "Give an example as the data set gives it")
def bad_items_that_cannot_be_collated():
    private(dataset=Items(lambda index: (torch.ones(3), object())))


@case(ConfigurationError, "dataset must have __len__ and __getitem__, and dict", "by its index")
def bad_dataset_that_is_a_mapping():
    private(dataset={f"row {i}": (torch.ones(3), 0) for i in range(N)})


@case(ConfigurationError, r"dataset\[0\] failed: KeyError: 0", "an item for each of the indices")
def bad_dataset_that_is_indexed_by_names():
    private(dataset=Items({"row 0": (torch.ones(3), 0)}.__getitem__))


@case(ConfigurationError, r"batch\[0\].*cannot be told", r"Let collate_fn itself handle \[\]")
def bad_collate_fn_that_pads_to_the_batch():
    private(
        dataset=Items(lambda index: torch.ones(3)),
        collate_fn=lambda items: [torch.ones(len(items) ** 2 + 3 // len(items))],
    )


@case(ConfigurationError, "collate_fn must be callable or None, not 3", "callable or None")
def bad_collate_fn():
    private(collate_fn=3)


# --------------------------------------------------------------------------------------------- the table: make_private


@case(ConfigurationError, "needs public_size", r"pass public_size=len\(dataset\)")
def bad_public_size_left_out():
    private(public_size=None)


@case(ConfigurationError, "batch_size=9 is more than public_size=8", "expected number of examples")
def bad_batch_size_above_the_size_of_the_data():
    private(batch_size=9)


@case(ConfigurationError, "batch_size=1e-300 is too little for public_size=8", r"more than 2\^53 steps")
def bad_batch_size_of_nearly_nothing():
    private(batch_size=1e-300)


@case(ConfigurationError, "epochs must be .*, not 1e[+]300", r"at most 2\^53 steps")
def bad_epochs_without_an_end():
    private(steps=None, epochs=1e300)


@case(ConfigurationError, "needs one of epochs and steps", "one of")
def bad_epochs_and_steps():
    private(epochs=1, steps=1)


@case(ConfigurationError, "needs one of epochs and steps", "one of")
def bad_neither_epochs_nor_steps():
    private(steps=None)


@case(ConfigurationError, r"steps must be a whole number from 1 to 2\^53, not 1.5", "a whole number")
def bad_half_a_step():
    private(steps=1.5)


@case(ConfigurationError, "needs one of max_norm and clipping", "one of")
def bad_two_clippings():
    private(clipping=ClippedGrad(1.0))


@case(ConfigurationError, "needs one of max_norm and clipping", "one of")
def bad_no_clipping():
    private(max_norm=None)


@case(ConfigurationError, "clipping must be an instance of ClippedGrad, not <class", "an instance")
def bad_clipping_that_is_a_class():
    private(max_norm=None, clipping=ClippedGrad)


@case(ConfigurationError, "max_norm must be a finite number greater than 0, not 0", "greater than 0")
def bad_max_norm():
    private(max_norm=0)


@case(ConfigurationError, "needs one of target_epsilon and noise_multiplier", "one of")
def bad_budget_and_noise():
    private(target_epsilon=1.0)


@case(ConfigurationError, "needs one of target_epsilon and noise_multiplier", "one of")
def bad_neither_budget_nor_noise():
    private(noise_multiplier=None)


@case(ConfigurationError, "target_epsilon", "> 0")
def bad_target_epsilon():
    private(noise_multiplier=None, target_epsilon=-1.0)


@case(ConfigurationError, "target_delta", "below 1")
def bad_target_delta():
    private(target_delta=1.0)


@case(ConfigurationError, "noise_multiplier must be a finite number >= 0, not -1", ">= 0")
def bad_noise_multiplier():
    private(noise_multiplier=-1)


@case(ConfigurationError, "accountant must be one of 'pld', 'rdp', not 'moments'", "one of")
def bad_accountant():
    private(accountant="moments")


@case(ConfigurationError, "physical_batch_size", ">= 1")
def bad_physical_batch_size():
    private(physical_batch_size=0)


@case(ConfigurationError, "sampling_generator", r"torch\.Generator")
def bad_sampling_generator():
    private(sampling_generator=0)


@case(ConfigurationError, "noise_generator", r"torch\.Generator")
def bad_noise_generator():
    private(noise_generator=0)


@case(ConfigurationError, "noise.*'torch' or 'os', not 'gauss'", "must be 'torch' or 'os'")
def bad_noise():
    private(noise="gauss")


@case(ConfigurationError, "'torch' or 'os', not .*Generator.*goes to noise_generator=", "must be 'torch' or 'os'")
def bad_noise_that_is_a_generator():
    private(noise=torch.Generator())


@case(ConfigurationError, "noise='os'.*takes no generator", "takes no generator")
def bad_noise_of_the_system_with_a_generator():
    private(noise="os", noise_generator=torch.Generator())


@case(ConfigurationError, "loss_reduction must be 'mean' or 'sum', not 'none'", "must be")
def bad_loss_reduction():
    private(loss_reduction="none")


@case(ConfigurationError, "loss_reduction must be 'mean' or 'sum', not 'none'", "must be")
def bad_loss_reduction_is_found_before_the_first_forward():
    with private(loss_reduction="none"):
        pass


@case(ConfigurationError, "batch_dim must be an axis number", r"0, 1, \.\.\.")
def bad_batch_dim():
    private(batch_dim=-1)


@case(ConfigurationError, "processes", "Processes")
def bad_processes():
    private(processes=2)


@case(ConfigurationError, "'shuffle', which it sets itself", "Poisson samples")
def bad_loader_option_that_is_ours():
    private(shuffle=True)


@case(ConfigurationError, "'sampler', which it sets itself", "Poisson samples")
def bad_sampler_option():
    private(sampler=PoissonBatchSampler(N, 0.5))


@case(ConfigurationError, "no option 'num_worker', and torch.utils.data.DataLoader", "migration")
def bad_option_that_does_not_exist():
    private(num_worker=2)


@case(ConfigurationError, "timeout", "torch.utils.data.DataLoader.*values")
def bad_value_of_an_option():
    private(timeout=-1)


@case(ConfigurationError, "Ledger.*line 1 is no entry", "Give the file of an earlier ledger, or a path")
def bad_ledger_file(folder):
    Path(folder, "notes").write_text("no ledger\n")
    private(ledger=Path(folder, "notes"))


@case(ConfigurationError, "Ledger.*line 1 is no entry", "Give the file of an earlier ledger, or a path")
def bad_ledger_file_of_bytes(folder):
    Path(folder, "weights").write_bytes(bytes(range(128, 256)))
    private(ledger=Path(folder, "weights"))


@case(ConfigurationError, "Ledger.*line 1 is no entry", "Give the file of an earlier ledger, or a path")
def bad_ledger_file_of_a_number_that_is_no_float(folder):
    Path(folder, "notes").write_text(f'{{"noise_multiplier": {10**400}, "sample_rate": null}}\n')
    private(ledger=Path(folder, "notes"))


@case(ConfigurationError, "Ledger|ledger", "folder|directory")
def bad_ledger_in_a_folder_that_does_not_exist(folder):
    private(ledger=Path(folder, "missing", "ledger"))


@case(ConfigurationError, "Ledger|ledger", "folder|directory|file")
def bad_ledger_that_is_a_folder(folder):
    private(ledger=folder)


@case(ConfigurationError, "ledger", "Ledger")
def bad_ledger():
    private(ledger=3)


@case(PrivacyBudgetError, "The 2 steps that were planned", r"plan more steps \(epochs\)")
def bad_step_too_many_with_a_ledger_of_ones_own():
    p = private(ledger=Ledger())
    train(p)
    train(p)
    train(p)


@case(PrivacyBudgetError, "The 2 steps that were planned", r"plan more steps \(epochs\)")
def bad_step_too_many():
    p = private()
    train(p)
    train(p)
    train(p)


@case(StaleGradientError, "no backward in `with private:` and no", "Take the step of every batch")
def bad_loop_without_steps():
    for _ in private():
        pass


@case(ExtensionError, "do not nest", "Give all extensions to one")
def bad_context_in_a_context():
    p = private()
    with p, p:
        pass


@case(StaleGradientError, "A batch came, and no backward", "cannot be unpacked: model, optimizer, and loader are its")
def bad_unpacking():
    _model, _optimizer, _loader = private()


@case(StaleGradientError, "parameter 0 .*no clipped sum", "no backward ran in .* `with private:`")
def bad_backward_outside_of_the_context():
    p = private()
    x, y = next(iter(p.loader))
    F.cross_entropy(p.model(x), y).backward()
    p.step()


@case(StaleGradientError, "`weight` was used", "another backward")
def bad_step_twice():
    p = private()
    train(p)
    p.step()


@case(ConfigurationError, "delta must be a number above 0 and below 1", "far below 1 / size")
def bad_delta_to_ask_for():
    private().epsilon(delta=2.0)


@case(ConfigurationError, "noise_multiplier=1.0, this one 2.0", "resumed with the settings it was begun with")
def bad_state_of_another_plan():
    private(noise_multiplier=2.0).load_state_dict(private().state_dict())


@case(ConfigurationError, "plan|state", "state_dict")
def bad_state_of_a_model_in_place_of_a_run():
    p = private()
    p.load_state_dict(p.model.state_dict())


@case(ConfigurationError, r"'.*checkpoint' is no checkpoint", r"private\.save\(path\)")
def bad_file_in_place_of_a_checkpoint(folder):
    Path(folder, "checkpoint").write_text("no checkpoint")
    private().load(Path(folder, "checkpoint"))


@case(ConfigurationError, r"cannot be written to '.*missing/run'", "no such folder; make it")
def bad_folder_of_a_checkpoint(folder):
    private().save(Path(folder, "missing", "run"))


@case(ConfigurationError, r"shape \[5, 3\] of `weight`, this one shape \[2, 3\]", "a model like the one")
def bad_state_of_another_model():
    private().load_state_dict(private(nn.Linear(3, 5)).state_dict())


# ---------------------------------------------------------------------------------------------- the table: optimizers


@case(ConfigurationError, "privatize takes a torch.optim.Optimizer, not Linear", "takes a torch.optim.Optimizer")
def bad_model_in_place_of_an_optimizer():
    privatize(linear(), clipping=ClippedGrad(1.0), noise_multiplier=1.0, expected_batch_size=4)


@case(ConfigurationError, "SGD is private already", "privatize|new|Make")
def bad_privatized_twice():
    _, clipping, optimizer = private_sgd()
    privatize(optimizer, clipping=clipping, noise_multiplier=1.0, expected_batch_size=4)


@case(
    ConfigurationError, "expected_batch_size must be a finite number > 0, not nan", "must not be computed from the data"
)
def bad_expected_batch_size():
    private_sgd(expected_batch_size=float("nan"))


@case(ConfigurationError, r"noise_multiplier .*not tensor\(1\.\)", "a finite number")
def bad_noise_multiplier_that_is_a_tensor():
    private_sgd(noise_multiplier=torch.tensor(1.0))


@case(ConfigurationError, "noise_multiplier must be the same in all param_groups", "the same in all")
def bad_noise_that_differs_between_groups():
    model, clipping, optimizer = private_sgd()
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "noise_multiplier": 2.0})
    backward(model, clipping)
    optimizer.step()


@case(ConfigurationError, "sampler must be a PoissonBatchSampler or PhysicalBatches, not RandomSampler", "Leave it out")
def bad_sampler():
    private_sgd(sampler=torch.utils.data.RandomSampler(range(N)))


@case(ConfigurationError, "sampler belongs to another private optimizer", "Make one sampler for each optimizer")
def bad_sampler_of_two_optimizers():
    sampler = PoissonBatchSampler(N, 0.5)
    private_sgd(sampler=sampler)
    private_sgd(sampler=sampler)


@case(ConfigurationError, "ledger must be a perexample.privacy.Ledger, not 'steps.json'", "must be a")
def bad_ledger_that_is_a_path():
    private_sgd(ledger="steps.json")


@case(StaleGradientError, "no batch of it is left", r"DataLoader\(batch_sampler=\.\.\.\)")
def bad_batches_of_another_loader():
    model, clipping, optimizer = private_sgd(sampler=PoissonBatchSampler(N, 0.5))
    backward(model, clipping)
    optimizer.step()


@case(StaleGradientError, "drew a batch of 8 examples, the backward saw 1", "Do not drop or repeat")
def bad_sampler_in_place_of_a_batch_sampler():
    sampler = PoissonBatchSampler(N, 1.0)
    model, clipping, optimizer = private_sgd(sampler=sampler)
    for x, _ in DataLoader(data(), sampler=sampler):
        backward(model, clipping, x)
        optimizer.step()


@case(ConfigurationError, r"SGD\.step was called in torch\.inference_mode", "outside of that block")
def bad_step_in_inference_mode():
    model, clipping, optimizer = private_sgd()
    backward(model, clipping)
    try:
        with torch.inference_mode():
            optimizer.step()
    finally:
        assert not optimizer.ledger.steps
        optimizer.step()  # the sums are still there


@case(PerExampleError, r"SGD\.step got a closure", r"call step\(\) without arguments")
def bad_closure():
    *_, optimizer = private_sgd()
    optimizer.step(lambda: 1.0)


@case(PerExampleError, r"SGD\.step got a tensor.*no backward", r"losses\.mean\(\)\.backward\(\)")
def bad_loss_given_to_step():
    *_, optimizer = private_sgd()
    optimizer.step(loss=torch.ones(3))


@case(StaleGradientError, "private SGD cannot be pickled or copied", r"load optimizer\.state_dict\(\) into it")
def bad_copy_of_an_optimizer():
    copy.deepcopy(private_sgd()[2])


@case(StaleGradientError, "no entry 'privacy'", r"Save optimizer\.state_dict\(\) whole")
def bad_state_of_a_public_optimizer():
    model, _, optimizer = private_sgd()
    optimizer.load_state_dict(sgd(model).state_dict())


@case(
    ConfigurationError, "saved with a sampler, and this optimizer was made without one", "given in both runs or in none"
)
def bad_state_of_a_sampled_run():
    private_sgd()[2].load_state_dict(private_sgd(sampler=PoissonBatchSampler(N, 0.5))[2].state_dict())


@case(ConfigurationError, "'privacy'|privacy", "state_dict")
def bad_state_without_its_parts():
    *_, optimizer = private_sgd()
    optimizer.load_state_dict(optimizer.state_dict() | {"privacy": {}})


@case(StaleGradientError, "`0.bias` takes part in some of them only", "after a step or zero_grad")
def bad_freezing_between_pieces():
    model, clipping, _ = private_sgd(nn.Sequential(linear()))
    backward(model, clipping)
    model[0].bias.requires_grad_(False)
    backward(model, clipping)


# ------------------------------------------------------------------------------- the table: samplers, batches, ledgers


@case(ConfigurationError, "sample_rate must be a number with 0 < sample_rate <= 1, not 256", "expected size of a batch")
def bad_batch_size_in_place_of_a_rate():
    PoissonBatchSampler(50_000, 256)


@case(ConfigurationError, "data_size must be an integer >= 0, not a TensorDataset", "Give the length of the data set")
def bad_dataset_in_place_of_its_size():
    PoissonBatchSampler(data(), 0.5)


@case(ConfigurationError, "rank=0 and world_size=None", r"given together|torch\.distributed tells them")
def bad_rank_alone():
    PoissonBatchSampler(N, 0.5, rank=0)


@case(ConfigurationError, "rank must be less than world_size, not 2 of 2", "less than")
def bad_rank():
    PoissonBatchSampler(N, 0.5, rank=2, world_size=2)


@case(ConfigurationError, "steps must be given", r"1 / sample_rate is not finite")
def bad_rate_that_has_no_inverse():
    PoissonBatchSampler(N, 1e-310)


@case(ConfigurationError, "generator must be a torch.Generator or None, not 0", "must be a torch.Generator")
def bad_seed_in_place_of_a_generator():
    PoissonBatchSampler(N, 0.5, generator=0)


@case(ConfigurationError, "PoissonBatchSampler cannot be copied or pickled", r"load its state_dict\(\)")
def bad_pickled_sampler():
    pickle.dumps(PoissonBatchSampler(N, 0.5))


@case(StaleGradientError, "A newer iteration over this sampler has begun", "make a second sampler")
def bad_two_iterations():
    sampler = PoissonBatchSampler(N, 0.5)
    first = iter(sampler)
    next(iter(sampler))
    next(first)


@case(ConfigurationError, "sample_rate is 0.5 there and 0.25 here", "Make the sampler as it was")
def bad_state_of_another_sampler():
    PoissonBatchSampler(N, 0.25, 3).load_state_dict(PoissonBatchSampler(N, 0.5, 3).state_dict())


@case(ConfigurationError, r"generator \(of the state\) is not the state of a torch\.Generator", "of a torch.Generator")
def bad_state_of_a_generator():
    sampler = PoissonBatchSampler(N, 0.25)
    sampler.load_state_dict(sampler.state_dict() | {"generator": torch.zeros(3, dtype=torch.uint8)})


@case(ConfigurationError, "size must be an integer >= 1, not 0", ">= 1")
def bad_size_of_pieces():
    PhysicalBatches(PoissonBatchSampler(N, 0.5), 0)


@case(ConfigurationError, "sampler must be a PoissonBatchSampler, not", "must be a PoissonBatchSampler")
def bad_sampler_to_cut():
    PhysicalBatches([[0, 1], [2]], 1)


@case(ConfigurationError, "collate_fn failed for 1 x the given example", "Give an example as the data set gives it")
def bad_example():
    EmptyBatches(example={"x": None})


@case(ConfigurationError, r"batch\['mask'\].*cannot be told", r"Let collate_fn itself handle \[\]")
def bad_collating_that_joins_examples():
    def collate(examples):
        return {"x": torch.stack(examples), "mask": torch.ones(len(examples), len(examples))}

    EmptyBatches(collate, example=torch.ones(3))


@case(ConfigurationError, r"batch\[0\] is for 4 examples and batch\[1\] for 3", "Cut it before it is collated")
def bad_batch_of_unequal_parts():
    split_batch((torch.ones(4), torch.ones(3)), 2)


@case(ConfigurationError, "batch has no tensor, array or list", "number of examples")
def bad_batch_of_a_number():
    split_batch(UserDict(x=3), 2)


@case(ConfigurationError, "size must be an integer >= 1, not 1.5", ">= 1")
def bad_size_of_a_split():
    split_batch(torch.ones(3), 1.5)


@case(ConfigurationError, r"Ledger\(limit=\.\.\.\) must be a whole number of steps", "1 or more")
def bad_limit():
    Ledger(limit=0)


@case(ConfigurationError, "path", "path")
def bad_path_of_a_ledger():
    Ledger(path=3)


@case(ConfigurationError, "release must be a Release", r"Release\(1\.1, 0\.01\)")
def bad_release():
    Ledger().record((1.0, 0.5))


@case(ConfigurationError, "noise_multiplier", ">= 0")
def bad_release_of_less_than_no_noise():
    Ledger().record(Release(-1.0, 0.5))


@case(ConfigurationError, "runs|state", "state_dict")
def bad_state_of_a_ledger():
    Ledger().load_state_dict({})


@case(
    StaleGradientError, "1 steps, the state that is loaded has 2.*different runs", "Load the state into a new optimizer"
)
def bad_state_of_another_ledger():
    one, other = Ledger(), Ledger()
    one.record(Release(1.0))
    other.record(Release(2.0))
    other.record(Release(2.0))
    one.load_state_dict(other.state_dict())


@case(ConfigurationError, "source of noise must be 'torch' or 'os', not 'urandom'", "must be")
def bad_source():
    Noise(source="urandom")


@case(ConfigurationError, "std must be .*, not '1.0'", "a finite number >= 0")
def bad_std():
    Noise().like(torch.ones(2), "1.0")


@case(
    ConfigurationError,
    r"Processes\(group=\.\.\.\) must be .*, not 'world'",
    "a torch.distributed.ProcessGroup.* or None",
)
def bad_group():
    Processes("world")


@case(ConfigurationError, "processes", "Processes")
def bad_processes_of_an_optimizer():
    private_sgd(processes=2)


# ------------------------------------------------------------------------------- the table: accounting, norms, clipping


@case(ConfigurationError, "delta must be a number above 0 and below 1.*, not 0", "far below 1 / size of the data")
def bad_delta():
    epsilon(0, noise_multiplier=1.0, sample_rate=0.1, steps=1)


@case(ConfigurationError, "sample_rate must be a probability.*not 1.5", "or None for no amplification")
def bad_sample_rate():
    epsilon(1e-5, noise_multiplier=1.0, sample_rate=1.5, steps=1)


@case(ConfigurationError, "steps must be a whole number.*, not 1.5", "a whole number")
def bad_steps():
    epsilon(1e-5, noise_multiplier=1.0, sample_rate=0.5, steps=1.5)


@case(ConfigurationError, "neighbours must be one of 'add-or-remove', 'replace', not 'bounded'", "one of")
def bad_neighbours():
    epsilon(1e-5, noise_multiplier=1.0, sample_rate=0.5, steps=1, neighbours="bounded")


@case(ConfigurationError, "accountant='rdp' knows no bound for neighbours='replace'", "use accountant='pld'")
def bad_accountant_for_the_neighbours():
    epsilon(1e-5, noise_multiplier=1.0, sample_rate=0.5, steps=1, neighbours="replace", accountant="rdp")


@case(ConfigurationError, "epsilon must be a finite number > 0, not '3'", "> 0")
def bad_epsilon():
    noise_multiplier_for("3", 1e-5, sample_rate=0.1, steps=10)


@case(ConfigurationError, "epsilon=1e-12 with delta.* cannot be reached", "Allow a larger epsilon or delta")
def bad_epsilon_that_no_noise_reaches():
    noise_multiplier_for(1e-12, 1e-300, sample_rate=None, steps=10**9)


@case(ConfigurationError, "noise_multiplier must be a finite number >= 0, not -1", ">= 0")
def bad_noise_to_count_steps_for():
    steps_for(1.0, 1e-5, noise_multiplier=-1, sample_rate=0.1)


@case(ConfigurationError, "noise_multiplier=100000.0 .* allows more than", "lower one of epsilon")
def bad_budget_without_an_end():
    steps_for(100.0, 1e-5, noise_multiplier=1e5, sample_rate=None)


@case(ConfigurationError, r"noise_multiplier must be .*, not 2\^1328 or more", "a finite number >= 0")
def bad_number_that_is_no_float():
    epsilon(1e-5, noise_multiplier=10**400, sample_rate=0.5, steps=1)


@case(ConfigurationError, r"replace_batchnorm takes a torch\.nn\.Module, not list", r"takes a torch\.nn\.Module")
def bad_model_to_replace_in():
    replace_batchnorm([nn.BatchNorm1d(3)])


@case(ConfigurationError, "groups must be a whole number of 1 or more, not 0", "1 or more")
def bad_groups_of_channels():
    replace_batchnorm(nn.BatchNorm1d(3), groups=0)


@case(ConfigurationError, "`0` is extended already", "call replace_batchnorm first and extend after it")
def bad_replacing_after_extend():
    replace_batchnorm(extend(nn.Sequential(nn.BatchNorm1d(3)).eval())[0:1])


@case(UnsupportedModuleError, r"`0` \(LazyBatchNorm1d\) has no shape yet", "run one forward before")
def bad_lazy_batchnorm():
    replace_batchnorm(nn.Sequential(nn.LazyBatchNorm1d()))


@case(ConfigurationError, "make must return a module other than BatchNorm.*`0`", "must return a module")
def bad_norm_that_is_made():
    replace_batchnorm(nn.Sequential(nn.BatchNorm1d(3)), make=lambda channels: nn.BatchNorm1d(channels))


@case(ConfigurationError, "max_norm must be a finite number greater than 0, not inf", "greater than 0")
def bad_infinite_norm():
    ClippedGrad(float("inf"))


@case(ConfigurationError, r"max_norm\['head'\] must be a finite number greater than 0, not '1'", "greater than 0")
def bad_norm_of_a_group():
    ClippedGrad({"head": "1"}, groups={"weight": "head"})


@case(ConfigurationError, "clip must be one of 'flat', 'automatic', 'global'.*not 'soft'", "a function from norms")
def bad_clip():
    ClippedGrad(1.0, clip="soft")


@case(ConfigurationError, "groups must be 'all', 'per-parameter'.*not 'per-layer'", "or a mapping from parameter names")
def bad_groups():
    ClippedGrad(1.0, groups="per-layer")


@case(ConfigurationError, "parameter `bias` belongs to no group", "name it, or a module that holds it")
def bad_parameter_without_a_group():
    backward(extend(linear()), ClippedGrad(1.0, groups={"weight": "head"}))


@case(ConfigurationError, "there is no bound for the group 'tail'", r"ClippedGrad\(max_norm")
def bad_group_without_a_bound():
    backward(extend(linear()), ClippedGrad({"head": 1.0}, groups={"weight": "head", "bias": "tail"}))


@case(CrossExampleError, r"ClippedGrad\(clip=\.\.\.\)", "must depend on the norm of its own example only")
def bad_clip_that_looks_at_others():
    clipping = ClippedGrad(1.0, clip=lambda norms: 1 / (norms + norms.sum()))
    backward(extend(linear()), clipping, torch.arange(12.0).view(4, 3))


@case(ConfigurationError, r"ClippedGrad\(clip=\.\.\.\): the function returned float", "one factor for each norm")
def bad_clip_that_gives_a_number():
    backward(extend(linear()), ClippedGrad(1.0, clip=lambda norms: 1.0))


@case(ConfigurationError, "count_noise=0.2.*noise_multiplier 1", "Give more count_noise, or use larger batches")
def bad_count_noise():
    private_sgd(clipping=AdaptiveClippedGrad(1.0, expected_batch_size=4))


@case(ConfigurationError, "quantile must be a number above 0 and below 1, not 1", "above 0 and below 1")
def bad_quantile():
    AdaptiveClippedGrad(1.0, expected_batch_size=4, quantile=1)


@case(ConfigurationError, "max_norm is 5, outside of bounds", "bounds=")
def bad_bounds():
    AdaptiveClippedGrad(5.0, expected_batch_size=4, bounds=(0.1, 1.0))


@case(ConfigurationError, "groups must be 'all', not 'per-module'", "use ClippedGrad for several groups")
def bad_groups_of_an_adaptive_norm():
    AdaptiveClippedGrad(1.0, expected_batch_size=4, groups="per-module")


@case(ConfigurationError, "holds no 'max_norm'", "Resume with the one that the run began with")
def bad_state_of_an_adaptive_norm():
    AdaptiveClippedGrad(1.0, expected_batch_size=4).load_state_dict({})


@case(ExtensionError, "got the class ClippedGrad", r"pass an instance: ClippedGrad\(\.\.\.\)")
def bad_extension_that_is_a_class():
    perex(ClippedGrad)


@case(ExtensionError, "Two extensions write the field `clipped_sum`", "use one of them")
def bad_two_sums():
    perex(ClippedGrad(1.0), ClippedGrad(2.0))


@case(ConfigurationError, "strategy must be one of .*not 'fast'", "one of")
def bad_strategy():
    perex(ClippedGrad(1.0), strategy="fast")


@case(ConfigurationError, "perex.max_memory=.* holds as little as it can", "leave room out")
def room_and_a_bound():
    perex(ClippedGrad(1.0), max_memory=0, room=2)


@case(ConfigurationError, "max_memory must be a number of bytes, 0 or more, not '1 GB'", "0 or more")
def bad_memory():
    perex(ClippedGrad(1.0), max_memory="1 GB")


@case(ConfigurationError, "loss_scale must be a positive number or a GradScaler, not -1", "a positive number")
def bad_loss_scale():
    backward(extend(linear()), ClippedGrad(1.0), loss_scale=-1)


@pytest.mark.parametrize("wrong", [{"weight": ["a"]}, {"weight": torch.ones(2)}, {"weight": None}, {1: "a"}], ids=repr)
def test_groups_are_names_of_names(wrong):
    with pytest.raises(ConfigurationError, match=r"groups must map names .* not .* to "):
        ClippedGrad(1.0, groups={"bias": "b", **wrong})


def test_a_name_in_groups_that_the_model_has_not():
    groups = {"weight": "a", "bias": 1, "wieght": "b"}
    with pytest.raises(ConfigurationError, match=r"no parameter or module `wieght`.*named_parameters"):
        private(clipping=ClippedGrad(1.0, groups=groups), max_norm=None)
    del groups["wieght"]
    assert private(clipping=ClippedGrad(1.0, groups=groups), max_norm=None).clipping.sensitivity() == 2**0.5


def test_the_table_is_long_enough():
    assert len(CASES) >= 100


# ------------------------------------------------------------------------- every argument, with what it can never be

NAN = float("nan")
NOT_A_NUMBER = ["x", b"1", [], {}, NAN, float("inf"), -1, True, object(), 1j, int, np.float64(NAN), torch.ones(2)]
NOT_AN_OBJECT = ["x", 3, 1.5, object(), int, 1j, torch.ones(2)]
NOT_A_WORD = [3, 1.5, "x", object(), int, [], torch.ones(2), np.ones(2)]
NOT_A_FLAG = ["False", 0, 1.0, None, [], object(), torch.ones(2), np.ones(2)]
NOT_A_FUNCTION = ["x", 3, object(), None, [], torch.ones(2), nn.CrossEntropyLoss]


def called(function, names, *batch, **wrong):
    """What takes a model, a function and a batch."""
    model = extend(linear())
    arguments = {"model": model, "loss_fn": nn.CrossEntropyLoss()} | wrong
    if function is RecordedStep:
        del arguments["loss_fn"]
        losses = lambda x, y: F.cross_entropy(model(x), y, reduction="none")  # noqa: E731
        arguments = {"losses": losses, "extensions": ClippedGrad(1.0)} | arguments
    return function(*(arguments.pop(name) for name in names), *batch, **arguments)


GOOD = {
    "make_private": lambda **wrong: private(**wrong),
    "privatize": lambda **wrong: private_sgd(**wrong),
    "DP_SGD": lambda **wrong: DP_SGD(
        **{
            "params": linear().parameters(),
            "clipping": ClippedGrad(1.0),
            "noise_multiplier": 1.0,
            "expected_batch_size": 4,
        }
        | wrong
    ),
    "PoissonBatchSampler": lambda **wrong: PoissonBatchSampler(**{"data_size": N, "sample_rate": 0.5} | wrong),
    "PhysicalBatches": lambda **wrong: PhysicalBatches(**{"sampler": PoissonBatchSampler(N, 0.5), "size": 2} | wrong),
    "EmptyBatches": lambda **wrong: EmptyBatches(**{"example": torch.ones(3)} | wrong),
    "split_batch": lambda **wrong: split_batch(**{"batch": torch.ones(3), "size": 2} | wrong),
    "Ledger": lambda **wrong: Ledger(**wrong),
    "Noise": lambda **wrong: Noise(**wrong),
    "epsilon": lambda **wrong: epsilon(
        **{"delta": 1e-3, "noise_multiplier": 2.0, "sample_rate": 0.5, "steps": 3} | wrong
    ),
    "noise_multiplier_for": lambda **wrong: noise_multiplier_for(
        **{"epsilon": 3.0, "delta": 1e-3, "sample_rate": 0.5, "steps": 3} | wrong
    ),
    "steps_for": lambda **wrong: steps_for(
        **{"epsilon": 3.0, "delta": 1e-3, "noise_multiplier": 2.0, "sample_rate": 0.5} | wrong
    ),
    "replace_batchnorm": lambda **wrong: replace_batchnorm(**{"model": nn.Sequential(nn.BatchNorm1d(4))} | wrong),
    "ClippedGrad": lambda **wrong: ClippedGrad(**{"max_norm": 1.0} | wrong),
    "AdaptiveClippedGrad": lambda **wrong: AdaptiveClippedGrad(**{"max_norm": 1.0, "expected_batch_size": 4} | wrong),
    "perex": lambda **wrong: perex(ClippedGrad(1.0), **wrong),
    "check": lambda **wrong: called(check, ["model", "loss_fn"], *data().tensors, **wrong),
    "RecordedStep": lambda **wrong: called(RecordedStep, ["model", "losses"], *data().tensors, **wrong),
    "Private.recorded": lambda **wrong: private().recorded(**{"losses": torch.sum} | wrong),
    "register_rule": lambda **wrong: register_rule(nn.Hardtanh, **wrong),
}
SWEPT = {
    "make_private": {
        "batch_size": NOT_A_NUMBER, "public_size": NOT_A_NUMBER, "steps": NOT_A_NUMBER,
        "max_norm": [x for x in NOT_A_NUMBER if x != {}],
        "noise_multiplier": NOT_A_NUMBER, "target_delta": NOT_A_NUMBER, "physical_batch_size": NOT_A_NUMBER,
        "accountant": NOT_A_WORD, "noise": NOT_A_WORD, "loss_reduction": NOT_A_WORD, "strategy": NOT_A_WORD,
        "collate_fn": NOT_AN_OBJECT[:4],
        "sampling_generator": NOT_AN_OBJECT, "noise_generator": NOT_AN_OBJECT, "processes": NOT_AN_OBJECT,
        "ledger": NOT_AN_OBJECT[1:], "batch_dim": NOT_A_NUMBER,
    },
    "privatize": {
        "clipping": NOT_AN_OBJECT, "noise_multiplier": NOT_A_NUMBER, "expected_batch_size": NOT_A_NUMBER,
        "sampler": NOT_AN_OBJECT, "ledger": NOT_AN_OBJECT, "generator": NOT_AN_OBJECT, "noise": NOT_A_WORD,
        "processes": NOT_AN_OBJECT,
    },
    "DP_SGD": {
        "clipping": NOT_AN_OBJECT, "noise_multiplier": NOT_A_NUMBER, "expected_batch_size": NOT_A_NUMBER,
        "sampler": NOT_AN_OBJECT, "ledger": NOT_AN_OBJECT, "generator": NOT_AN_OBJECT, "noise": NOT_A_WORD,
    },
    "PoissonBatchSampler": {
        "data_size": NOT_A_NUMBER, "sample_rate": NOT_A_NUMBER, "steps": NOT_A_NUMBER,
        "generator": NOT_AN_OBJECT, "rank": NOT_AN_OBJECT, "world_size": NOT_AN_OBJECT,
    },
    "PhysicalBatches": {"sampler": NOT_AN_OBJECT, "size": NOT_A_NUMBER},
    "EmptyBatches": {"collate_fn": NOT_AN_OBJECT[:4]},
    "split_batch": {"batch": NOT_AN_OBJECT[:-1], "size": NOT_A_NUMBER},
    "Ledger": {"path": NOT_AN_OBJECT[1:], "limit": NOT_A_NUMBER},
    "Noise": {"generator": NOT_AN_OBJECT, "source": NOT_A_WORD},
    "epsilon": {
        "delta": NOT_A_NUMBER, "noise_multiplier": NOT_A_NUMBER, "sample_rate": [*NOT_A_NUMBER, 1.5],
        "steps": NOT_A_NUMBER, "accountant": NOT_A_WORD, "neighbours": NOT_A_WORD,
    },
    "noise_multiplier_for": {
        "epsilon": NOT_A_NUMBER, "delta": NOT_A_NUMBER, "sample_rate": [*NOT_A_NUMBER, 1.5], "steps": NOT_A_NUMBER,
        "accountant": NOT_A_WORD, "neighbours": NOT_A_WORD,
    },
    "steps_for": {
        "epsilon": NOT_A_NUMBER, "delta": NOT_A_NUMBER, "sample_rate": [*NOT_A_NUMBER, 1.5],
        "noise_multiplier": NOT_A_NUMBER, "accountant": NOT_A_WORD, "neighbours": NOT_A_WORD,
    },
    "replace_batchnorm": {"groups": NOT_A_NUMBER, "make": NOT_AN_OBJECT[:4]},
    "ClippedGrad": {"max_norm": [x for x in NOT_A_NUMBER if x != {}], "clip": NOT_A_WORD, "groups": NOT_A_WORD},
    "AdaptiveClippedGrad": {
        "max_norm": NOT_A_NUMBER, "expected_batch_size": NOT_A_NUMBER, "quantile": NOT_A_NUMBER,
        "learning_rate": NOT_A_NUMBER, "count_noise": NOT_A_NUMBER, "bounds": [*NOT_A_WORD, (1, 2, 3), (2, 1)],
        "clip": NOT_A_WORD, "groups": NOT_A_WORD,
    },
    "perex": {
        "loss_reduction": NOT_A_WORD, "strategy": NOT_A_WORD, "max_memory": NOT_A_NUMBER,
        "loss_scale": NOT_A_NUMBER, "room": [*NOT_A_NUMBER, 0.5], "grad": NOT_A_FLAG,
    },
    "check": {
        "loss_fn": NOT_A_FUNCTION, "named": [3, "x", [], torch.ones(2)], "loss_reduction": NOT_A_WORD,
        "tolerance": NOT_A_NUMBER, "raises": NOT_A_FLAG,
    },
    "RecordedStep": {
        "losses": NOT_A_FUNCTION, "strategy": NOT_A_WORD, "room": [*NOT_A_NUMBER, 0.5], "compiled": NOT_A_FLAG,
    },
    "Private.recorded": {"losses": NOT_A_FUNCTION, "compiled": NOT_A_FLAG},
    "register_rule": {"overwrite": NOT_A_FLAG},
}  # fmt: skip
NUMPY: dict[str, dict[str, Any]] = {
    "make_private": {
        "batch_size": np.int64(4), "public_size": np.int64(8), "max_norm": np.float32(1), "steps": np.int64(2),
        "noise_multiplier": np.float32(1), "target_delta": np.float32(1e-3), "physical_batch_size": np.int64(2),
    },
    "privatize": {"noise_multiplier": np.float32(1), "expected_batch_size": np.int64(4)},
    "PoissonBatchSampler": {"data_size": np.int64(8), "sample_rate": np.float32(0.5), "steps": np.int32(2)},
    "PhysicalBatches": {"size": np.int64(2)},
    "split_batch": {"size": np.int64(2)},
    "Ledger": {"limit": np.int64(2)},
    "epsilon": {"delta": np.float32(1e-3), "noise_multiplier": np.int64(1), "steps": np.int64(2)},
    "noise_multiplier_for": {"epsilon": np.float32(1), "steps": np.int16(2)},
    "steps_for": {"epsilon": np.float64(1), "sample_rate": np.float32(0.5)},
    "replace_batchnorm": {"groups": np.int64(2)},
    "ClippedGrad": {"max_norm": np.float32(1)},
    "AdaptiveClippedGrad": {"max_norm": np.float32(1), "quantile": np.float64(0.5)},
    "perex": {"loss_scale": np.float32(2), "max_memory": np.int64(2), "room": np.float32(2)},
}  # fmt: skip


def rows(table):
    """Each argument of a table."""
    for function, arguments in table.items():
        for name, values in arguments.items():
            yield pytest.param(function, name, values, id=f"{function}-{name}")


def shown(value):
    return "10**many" if isinstance(value, int) and value > 10**300 else repr(value)


def outcome(function, name, value):
    """What is wrong with how a value is refused; nothing if it is refused as it should."""
    try:
        made = GOOD[function](**{name: value})
        if function == "perex":  # some of it is looked at in the backward only
            made.loss_scale  # noqa: B018
    except PerExampleError as error:
        return None if re.search(rf"\b{name}\b", str(error)) else f"{shown(value)}: no `{name}` in: {error}"
    except Exception as error:  # noqa: BLE001 - that is what is looked for
        return f"{shown(value)}: {type(error).__name__}: {error}"
    return f"{shown(value)} was accepted"


@pytest.mark.parametrize(("function", "name", "values"), list(rows(SWEPT)))
def test_what_an_argument_can_never_be(function, name, values):
    found = [outcome(function, name, value) for value in values]
    SCORES["swept"] += len(found)
    SCORES["swept_clear"] += found.count(None)
    assert not list(filter(None, found))


def test_integers_that_are_no_floats():
    numeric = [(f, name) for f, arguments in SWEPT.items() for name, values in arguments.items() if is_numeric(values)]
    assert len(numeric) > 30
    for size in (400, 5000):  # Python does not even write out the second
        found = {(f, name): outcome(f, name, 10**size) for f, name in numeric}
        assert not {call: text for call, text in found.items() if text is not None}


def is_numeric(values):
    return values[:3] == NOT_A_NUMBER[:3]


@pytest.mark.parametrize(("function", "name", "value"), list(rows(NUMPY)))
def test_numbers_of_numpy_are_numbers(function, name, value):
    made = GOOD[function](**{name: value})
    assert function != "perex" or name != "loss_scale" or made.loss_scale == value  # looked at in the backward


@pytest.mark.parametrize(
    ("function", "name"), [(f, a) for f, names in NUMPY.items() for a in names if f != "perex"], ids="-".join
)
def test_tensors_that_hold_a_number_are_numbers_or_refused_by_name(function, name):
    """They may be on another device, or need a graph, so that they are refused."""
    value = NUMPY[function][name]
    whole = isinstance(value, np.integer)
    assert outcome(function, name, torch.tensor(int(value) if whole else float(value))) is None


def test_scores():
    """The figures of this run, for a scorecard."""
    save_scores("bad_input", SCORES)
    assert SCORES["clear"] <= SCORES["cases"]
