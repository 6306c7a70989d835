"""Training where people train: the code of docs/howto.rst, and each against one backward per example.

The page is run as it stands, in float64; only C and the seeds of batches and noise are given from here. The reference
is a plain loop that knows neither hooks nor trainers: for every example of a batch one ``torch.autograd.grad``.
"""

import contextlib
import copy
import importlib.util
import itertools
import math
import pathlib
import re
import sys
import textwrap
import warnings

import pytest
import test_timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import perexample.privacy
from perexample import LossError, PerExampleError, StaleGradientError, UnsupportedModuleError, extend, perex, privatize
from perexample.extensions import BatchGrad, ClippedGrad
from perexample.privacy import Noise, PhysicalBatches, PoissonBatchSampler, Release, make_private

PAGE = (pathlib.Path(__file__).parent.parent / "docs" / "howto.rst").read_text()
TITLES = re.split(r"^(.+)\n[=\-^]+\n", PAGE, flags=re.M)
SECTIONS = dict(zip(TITLES[1::2], TITLES[2::2], strict=True))
PREAMBLE = "How-to guides"
BOUNDS = {  # median norms, about, so that some gradients are clipped and others not; 1.5 elsewhere
    "Hugging Face Trainer": 0.76,
    "Checkpoints": 0.76,
    "Language models": 2.2,
    "LoRA with peft": 0.2,
    "timm": 8.6,
    "Discriminators and critics": 9.0,
}


def blocks(section):
    found = re.findall(r"\.\. code-block:: python\n\n((?:   .*\n|\n)+)", SECTIONS[section])
    assert found
    return [textwrap.dedent(block) for block in found]


def needs(*packages):
    for package in packages:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")


pytestmark = pytest.mark.usefixtures("noise_of_any_sums")


def generator(seed):
    return torch.Generator().manual_seed(seed)


class Made:
    """A call of `make_private`: what it was given, as it was then, with C and the seeds of batches and noise."""

    def __init__(self, number, model, optimizer, data, bound):
        self.seeds, self.bound = (2 * number + 1, 2 * number + 2), bound
        self.model, self.optimizer = copy.deepcopy((model, optimizer))
        self.data, self.private = data, None

    def train(self, loss, schedule=None, epochs=2, batches=None):
        """The same training, example by example; gives the parameters by name."""
        sampler, noise = (
            PoissonBatchSampler(40, 0.2, generator=generator(self.seeds[0])),
            Noise(generator(self.seeds[1])),
        )
        schedule = schedule and schedule(self.optimizer)
        params = [p for group in self.optimizer.param_groups for p in group["params"]]
        norms = []
        for indices in batches or [batch for _ in range(epochs) for batch in sampler]:
            sums = [torch.zeros_like(p) for p in params]
            for i in indices:
                grads = torch.autograd.grad(loss(self.model, self.data[i]), params)
                norm = math.sqrt(sum(float(g.square().sum()) for g in grads))
                norms.append(norm)
                for total, g in zip(sums, grads, strict=True):
                    total += min(1.0, self.bound / norm) * g
            for p, total in zip(params, sums, strict=True):
                p.grad = (total + noise.like(p, self.bound)) / 8
            self.optimizer.step()
            if schedule is not None:
                schedule.step()
        assert 0.05 < sum(norm > self.bound for norm in norms) / len(norms) < 0.95, sorted(norms)[len(norms) // 2]
        return parameters(self.model)


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


def in_float32(space):
    """Model and data of a section; the reference stays in float64."""
    torch.set_default_dtype(torch.float32)
    space["model"].float()
    x, y = space["data"].tensors
    space["data"] = TensorDataset(x.float(), y)


def parameters(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_equal(found, wanted, tolerance=1e-10):
    assert found.keys() == wanted.keys()
    assert max(float((found[name] - wanted[name]).abs().max()) for name in found) <= tolerance


@pytest.fixture
def made():
    return []


@pytest.fixture
def run(made, monkeypatch, tmp_path):
    """Run sections of the page after its preamble; dropout is off, since the reference draws other masks."""

    bound = [1.5]

    def repeatable(model, optimizer, data, **options):
        made.append(Made(len(made), model, optimizer, data, *bound))
        sampling, noise = map(generator, made[-1].seeds)
        options |= {"max_norm": made[-1].bound, "sampling_generator": sampling, "noise_generator": noise}
        made[-1].private = make_private(model, optimizer, data, **options)
        return made[-1].private

    def runner(*parts):
        space = {"__name__": "page"}
        for part in (PREAMBLE, *parts):
            section, _, only = part.partition("|")
            bound[:] = [BOUNDS.get(section, 1.5)]
            for block in blocks(section)[: int(only) if only else None]:
                exec(compile(block, f"howto.rst: {section}", "exec"), space)
                without_dropout(space.get("model", nn.Identity()))
        return space

    monkeypatch.setattr(perexample.privacy, "make_private", repeatable)
    monkeypatch.chdir(tmp_path)
    before = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield runner
    torch.set_default_dtype(before)


@pytest.fixture(autouse=True)
def _no_state_of_accelerate():
    """A test that ends in the middle of an accumulation would leave that to the next one."""
    yield
    state = sys.modules.get("accelerate.state")
    if state is not None:
        state.AcceleratorState._reset_state(reset_partial_state=True)
        state.GradientState._reset_state()


def own_loss(model, example):
    x, y = example
    return F.cross_entropy(model(x[None]), y[None])


# ----------------------------------------------------------------------------------------------- Hugging Face Trainer


def bert_loss(model, example):
    return model(input_ids=example["input_ids"][None], labels=example["labels"][None]).loss


def token_loss(model, example):
    """Mean over an example's own tokens that count."""
    ids, labels = example["input_ids"], example["labels"]
    count = labels[1:] != -100
    return F.cross_entropy(model(input_ids=ids[None]).logits[0, :-1][count], labels[1:][count])


def linear(optimizer):
    """The Trainer's own schedule."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 10)


def test_trainer(run, made):
    needs("transformers", "accelerate")
    space = run("Hugging Face Trainer")
    assert_equal(parameters(space["model"]), made[0].train(bert_loss, linear))
    trainer = space["trainer"]
    assert space["private"].steps == trainer.state.global_step == 10
    assert space["private"].optimizer.param_groups[0]["lr"] == 0


def test_trainer_does_not_clip_the_private_gradient(run, made):
    """Its max_grad_norm is 1 by default, and the noise alone is longer; it logs a norm of 0."""
    needs("transformers", "accelerate")
    space = run("Hugging Face Trainer|1")
    private = perexample.privacy.make_private(
        space["model"], torch.optim.SGD(space["model"].parameters(), lr=0.1), space["dataset"], **space["plan"]
    )
    longest = []
    private.optimizer.register_step_post_hook(
        lambda optimizer, *_: longest.append(
            math.sqrt(sum(float(p.grad.square().sum()) for group in optimizer.param_groups for p in group["params"]))
        )
    )
    arguments = space["TrainingArguments"](
        "runs", num_train_epochs=2, save_strategy="no", report_to=[], use_cpu=True, max_grad_norm=0.01, logging_steps=1
    )
    trainer = space["PrivateTrainer"](private, args=arguments)
    with private:
        trainer.train()
    assert min(longest) > 1
    assert {entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry} == {0.0}
    assert_equal(parameters(space["model"]), made[0].train(bert_loss, linear))


def test_trainer_with_a_language_model(run, made):
    needs("transformers", "accelerate")
    space = run("Hugging Face Trainer|1", "Language models|1")
    space["arguments"] = space["TrainingArguments"](
        "runs", num_train_epochs=2, save_strategy="no", report_to=[], use_cpu=True
    )
    exec(blocks("Language models")[1], space)
    assert len({int((labels != -100).sum()) for labels in space["labels"]}) > 3
    assert_equal(parameters(space["model"]), made[0].train(token_loss, linear))


def language_trainer(space, optimizer, **options):
    """A Trainer of the language model, with the page's loss if it is given."""
    own = {"compute_loss_func": options.pop("compute_loss_func", None)}
    loader = options.pop("loader")
    arguments = space["TrainingArguments"](
        "runs", num_train_epochs=1, save_strategy="no", report_to=[], use_cpu=True, **options
    )

    class Loading(space["Trainer"]):
        def get_train_dataloader(self):
            return loader

    return Loading(space["model"], args=arguments, optimizers=(optimizer, None), **own)


@pytest.mark.parametrize("steps", [1, 2], ids=["no accumulation", "accumulated"])
def test_trainer_dividing_by_all_tokens_is_refused(run, steps):
    """The Trainer's default for language models: the divisor is that of the batch, or of several."""
    needs("transformers", "accelerate")
    space = run("Hugging Face Trainer|1", "Language models|1")
    clipping = ClippedGrad(1.0)
    optimizer = torch.optim.SGD(extend(space["model"]).parameters(), lr=0.1)
    privatize(optimizer, clipping=clipping, noise_multiplier=0.0, expected_batch_size=8)
    trainer = language_trainer(
        space, optimizer, loader=DataLoader(space["dataset"], batch_size=8), gradient_accumulation_steps=steps
    )
    with pytest.raises(LossError, match="none a loss of its own"), perex(clipping, grad=False):
        trainer.train()


TARGETS = torch.tensor([0, 1, 2, 3, 0])
WEIGHTS = torch.tensor([1.0, 2.0, 0.5, 1.0])


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("options", [{"ignore_index": 2}, {"weight": WEIGHTS}], ids=["ignored", "class weights"])
def test_sums_divided_by_what_all_examples_share(options, reduction):
    """A sum times a constant is exact, and over what the targets add up to it is refused, as the mean is."""
    shared = 4.0 if "ignore_index" in options else float(WEIGHTS[TARGETS].sum())
    own, scale = (5.0 if reduction == "mean" else 1.0), 1024.0

    def run(factor):
        model = wide()
        with perex(BatchGrad(), loss_reduction=reduction, loss_scale=scale):
            out = model[1](model[0](torch.ones(5, 4) * torch.arange(5.0).unsqueeze(1)))[:, :4]
            total = F.cross_entropy(out, TARGETS, reduction="sum", **options)
            (scale * total * factor).backward()
        return model[0].weight.grad_batch

    losses = F.cross_entropy(torch.zeros(5, 4), TARGETS, reduction="none", **options)
    found = run(1 / own)
    assert [bool(rows.any()) for rows in found[1:]] == [bool(loss) for loss in losses[1:]]  # the first input is 0
    for factor in (1 / shared, 1 / (2 * shared)):  # of one batch, and of two that are accumulated
        with pytest.raises(LossError, match="none a loss of its own"):
            run(factor)


def test_trainer_accumulates_without_a_sampler(run):
    """With a loss of one's own the Trainer divides nothing, so that pieces add up to the whole batch."""
    needs("transformers", "accelerate")
    space = run("Hugging Face Trainer|1", "Language models|1")
    other = Made(0, space["model"], torch.optim.SGD(space["model"].parameters(), lr=0.1), space["dataset"], 2.2)
    clipping = ClippedGrad(2.2)
    optimizer = torch.optim.SGD(extend(space["model"]).parameters(), lr=0.1)
    privatize(
        optimizer, clipping=clipping, noise_multiplier=1.0, expected_batch_size=8, generator=generator(other.seeds[1])
    )
    trainer = language_trainer(
        space,
        optimizer,
        loader=DataLoader(space["dataset"], batch_size=4),
        gradient_accumulation_steps=2,
        compute_loss_func=space["mean_over_examples"],
    )
    with perex(clipping, grad=False):
        trainer.train()
    batches = [range(start, start + 8) for start in range(0, 40, 8)]
    wanted = other.train(
        token_loss, lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 - step / 5), batches=batches
    )
    assert_equal(parameters(space["model"]), wanted)
    assert optimizer.ledger.steps == 5


@pytest.mark.parametrize(
    ("mistake", "match"),
    [
        ("accumulation", "the backward saw 18"),
        ("another loader", "did not come from this sampler"),
        ("no context", "no clipped sum"),
    ],
)
def test_mistakes_with_the_trainer(run, mistake, match):
    needs("transformers", "accelerate")
    space = run("Hugging Face Trainer|1")
    private = perexample.privacy.make_private(
        space["model"], torch.optim.SGD(space["model"].parameters(), lr=0.1), space["dataset"], **space["plan"]
    )
    arguments = space["TrainingArguments"](
        "runs",
        num_train_epochs=2,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        gradient_accumulation_steps=2 if mistake == "accumulation" else 1,
    )
    trainer = space["PrivateTrainer"](private, args=arguments)
    if mistake == "another loader":
        trainer.get_train_dataloader = lambda: DataLoader(space["dataset"], batch_size=8)
    before = parameters(space["model"])
    context = contextlib.nullcontext() if mistake == "no context" else private
    with context, pytest.raises(StaleGradientError, match=match):
        trainer.train()
    assert_equal(parameters(space["model"]), before, 0)


def test_trainer_resumes_bit_by_bit(run, made):
    """As on the page, with dropout; the second run is made with other seeds."""
    needs("transformers", "accelerate")
    run("Hugging Face Trainer|1", "Checkpoints")
    whole, resumed = (call.private for call in made)
    assert made[0].seeds != made[1].seeds
    assert whole.steps == resumed.steps == 10
    assert any(isinstance(module, nn.Dropout) and module.p for module in whole.model.modules())
    assert_equal(parameters(resumed.model), parameters(whole.model), 0)


@pytest.mark.slow
def test_trainer_resumes_with_a_prepared_loader(run, made):
    """accelerate draws one batch ahead, which the state must not count as taken."""
    needs("transformers", "accelerate")
    space = run("Hugging Face Trainer|1", "Checkpoints|1")

    def train(**options):
        private, trainer = space["start"]()
        for model in (private.model, made[-1].model):
            without_dropout(model)
        loader = trainer.accelerator.prepare(private.loader)
        trainer.get_train_dataloader = lambda: loader
        with private:
            trainer.train(**options)
        return parameters(private.model)

    whole = train()
    assert_equal(train(resume_from_checkpoint="runs/checkpoint-7"), whole, 0)
    assert_equal(whole, made[0].train(bert_loss, linear))


def test_trainer_skipping_batches_twice(run):
    needs("transformers", "accelerate")
    space = run("Hugging Face Trainer|1", "Checkpoints|1")
    private, trainer = space["start"]()
    trainer.args.max_steps = 7
    with private:
        trainer.train()
    private, trainer = space["start"]()
    trainer.args.ignore_data_skip = False
    with private, pytest.raises(StaleGradientError, match="skip no batch"):
        trainer.train(resume_from_checkpoint="runs/checkpoint-7")
    assert private.steps == 7


def test_trainer_with_empty_batches(run):
    """About every second batch is empty; models of transformers cannot be run on one."""
    needs("transformers", "accelerate")
    space = run("Hugging Face Trainer|1")
    model, sizes = space["model"], []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    plan = {**space["plan"], "batch_size": 0.8, "epochs": None, "steps": 20}
    private = perexample.privacy.make_private(model, optimizer, space["dataset"], **plan)
    arguments = space["TrainingArguments"]("runs", max_steps=20, save_strategy="no", report_to=[], use_cpu=True)
    trainer = space["PrivateTrainer"](private, args=arguments)
    plain = trainer.training_step
    trainer.training_step = lambda m, inputs, n=None: (sizes.append(len(inputs["labels"])), plain(m, inputs, n))[1]
    with private:
        trainer.train()
    assert private.steps == len(sizes) == 20
    assert 4 < sizes.count(0) < 16
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_an_empty_batch_needs_no_backward():
    """Noise alone, as with a backward of no rows; what is left of an earlier batch is not used again."""

    def train(backward):
        torch.manual_seed(0)
        model, clipping = extend(nn.Linear(3, 2)), ClippedGrad(1.0)
        sampler = PoissonBatchSampler(10, 0.1, steps=12, generator=generator(1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        privatize(
            optimizer,
            clipping=clipping,
            noise_multiplier=1.0,
            expected_batch_size=1,
            sampler=sampler,
            generator=generator(2),
        )
        sizes = []
        for batch in sampler:
            if batch or backward:
                with perex(clipping, grad=False):
                    model(torch.ones(len(batch), 3)).square().sum(1).mean().backward()
            optimizer.step()
            sizes.append(len(batch))
        assert {0, 1, 2} <= set(sizes)
        return parameters(model)

    assert_equal(train(False), train(True), 0)


def test_only_an_empty_batch_needs_no_backward():
    model, clipping = extend(nn.Linear(3, 2)), ClippedGrad(1.0)
    sampler = PoissonBatchSampler(10, 0.9, generator=generator(1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    privatize(optimizer, clipping=clipping, noise_multiplier=1.0, expected_batch_size=9, sampler=sampler)
    assert next(iter(sampler))
    with pytest.raises(StaleGradientError, match="no clipped sum"):
        optimizer.step()


# ---------------------------------------------------------------------------------------------- accelerate, Lightning


def test_accelerate(run, made):
    needs("accelerate")
    space = run("accelerate")
    assert_equal(parameters(space["model"]), made[0].train(own_loss))
    assert type(space["optimizer"]).__name__ == "AcceleratedOptimizer"
    assert space["private"].steps == 10


def test_accelerate_clips_and_accumulates(run, made):
    """`clip_grad_norm_` finds nothing to clip; the division by the number of backwards is taken back."""
    needs("accelerate")
    space = run("accelerate|1")
    model = space["model"]
    reference = Made(0, model, torch.optim.SGD(model.parameters(), lr=0.1), space["data"], 1.5)
    clipping = ClippedGrad(1.5)
    optimizer = torch.optim.SGD(extend(model).parameters(), lr=0.1)
    privatize(
        optimizer,
        clipping=clipping,
        noise_multiplier=1.0,
        expected_batch_size=8,
        generator=generator(reference.seeds[1]),
    )
    accelerator = space["Accelerator"](cpu=True, gradient_accumulation_steps=2)
    loader = DataLoader(space["data"], batch_size=4)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for x, y in loader:
        with accelerator.accumulate(model), perex(clipping, grad=False, loss_scale=1 / 2):
            accelerator.backward(F.cross_entropy(model(x), y))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1e-6)
            optimizer.step()
            optimizer.zero_grad()
    batches = [range(start, start + 8) for start in range(0, 40, 8)]
    assert_equal(parameters(model), reference.train(own_loss, batches=batches))


@pytest.mark.filterwarnings("ignore")  # of Lightning, about itself
def test_lightning(run, made):
    needs("lightning")
    space = run("Lightning|2")
    wanted = made[0].train(own_loss, lambda o: torch.optim.lr_scheduler.StepLR(o, 1, 0.9))
    assert_equal(parameters(space["private"].model), wanted)
    assert space["trainer"].global_step == space["private"].steps == 10


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("clip", [None, 1e-6])
def test_lightning_in_pieces(run, made, clip):
    needs("lightning")
    space = run("Lightning|1", "Lightning|0")
    exec(blocks("Lightning")[2], space)
    model = space["model"]
    private = perexample.privacy.make_private(
        model, torch.optim.AdamW(model.parameters(), lr=1e-2), space["data"], **space["plan"]
    )
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = space["lightning"].Trainer(accelerator="cpu", max_epochs=2, gradient_clip_val=clip, **quiet)
    trainer.fit(space["InPieces"](private), private.loader)
    wanted = made[0].train(own_loss, lambda o: torch.optim.lr_scheduler.StepLR(o, 1, 0.9))
    assert_equal(parameters(model), wanted)


@pytest.mark.filterwarnings("ignore")
def test_lightning_resumes(run, made):
    """Between two epochs, from Lightning's own checkpoint."""
    needs("lightning")
    space = run("Lightning|1")
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    first = copy.deepcopy(space["model"])

    def fit(epochs, path=None):
        model = copy.deepcopy(first)
        private = perexample.privacy.make_private(
            model, torch.optim.AdamW(model.parameters(), lr=1e-2), space["data"], **space["plan"]
        )
        trainer = space["lightning"].Trainer(accelerator="cpu", max_epochs=epochs, **quiet)
        trainer.fit(space["Private"](private), private.loader, ckpt_path=path)
        return private, trainer

    _, trainer = fit(1)
    trainer.save_checkpoint("one.ckpt")
    private, trainer = fit(2, "one.ckpt")
    assert private.steps == trainer.global_step == 10
    wanted = made[0].train(own_loss, lambda o: torch.optim.lr_scheduler.StepLR(o, 1, 0.9))
    assert_equal(parameters(private.model), wanted)


@pytest.mark.filterwarnings("ignore")
def test_lightning_without_the_two_lines_is_refused(run):
    needs("lightning")
    space = run("Lightning|1")

    class Plain(space["Private"]):
        optimizer_step = space["lightning"].LightningModule.optimizer_step

    private = perexample.privacy.make_private(
        space["model"], torch.optim.SGD(space["model"].parameters(), lr=0.1), space["data"], **space["plan"]
    )
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = space["lightning"].Trainer(accelerator="cpu", max_epochs=1, **quiet)
    with pytest.raises(PerExampleError, match="closure"), private:
        trainer.fit(Plain(private), private.loader)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("inner", [True, False])
def test_lightning_by_hand(run, inner):
    """Lightning's own optimizers hand on a closure that does nothing."""
    needs("lightning")
    space = run("Lightning|1")

    class ByHand(space["Private"]):
        automatic_optimization = False

        def training_step(self, batch, index):
            with self.private:
                self.manual_backward(super().training_step(batch, index))
            optimizer = self.optimizers()
            (optimizer.optimizer if inner else optimizer).step()

    private = perexample.privacy.make_private(
        space["model"], torch.optim.SGD(space["model"].parameters(), lr=0.1), space["data"], **space["plan"]
    )
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = space["lightning"].Trainer(accelerator="cpu", max_epochs=2, **quiet)
    if inner:
        trainer.fit(ByHand(private), private.loader)
        assert private.steps == 10
    else:
        with pytest.raises(PerExampleError, match=r"hand on a closure: call optimizer\.optimizer\.step\(\)"):
            trainer.fit(ByHand(private), private.loader)


# ----------------------------------------------------------------------------------------------------- peft, schedules


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # of transformers, in peft
def test_lora(run, made):
    needs("transformers", "peft")
    space = run("Hugging Face Trainer|1", "Language models|1", "LoRA with peft|1")
    model = space["model"]
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p)  # zero else, and with it the gradients of the other factor
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    exec(blocks("LoRA with peft")[1], space)
    assert_equal(parameters(model), made[0].train(token_loss))
    assert len(parameters(model)) == 2
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if not p.requires_grad)


SCHEDULES = {
    "one cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.5, total_steps=10),
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
    "cyclic": lambda o: torch.optim.lr_scheduler.CyclicLR(o, 0.01, 0.5, step_size_up=3),
    "exponential": lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.8),
    "warmup": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o,
        [torch.optim.lr_scheduler.LinearLR(o, 0.1, total_iters=3), torch.optim.lr_scheduler.StepLR(o, 2)],
        milestones=[3],
    ),
}


def test_schedule(run, made):
    """As on the page: one cycle of learning rate and momentum, over pieces."""
    space = run("Learning-rate schedules")
    assert_equal(parameters(space["model"]), made[0].train(own_loss, SCHEDULES["one cycle"]))


def test_augmentation_multiplicity(run, made):
    def both_ways(model, example):
        x, y = example
        return F.cross_entropy(model(torch.stack([x, x.flip(0)])[None, :, None])[0], y.expand(2))

    space = run("Augmentation multiplicity")
    assert_equal(parameters(space["model"]), made[0].train(both_ways))


def test_persons(run, made):
    """The gradient of a person, the mean over the rows that are there, is clipped as one."""

    def of_a_person(model, person):
        x, y, there = person
        return F.cross_entropy(model.network(x[there]), y[there])

    space = run("Augmentation multiplicity|1", "Several rows of one person")
    assert 0 < space["persons"].tensors[2].double().mean() < 1
    assert_equal(parameters(space["model"]), made[0].train(of_a_person))


def test_federated_averaging(run, made):
    """Each person's steps are taken by hand, and what they moved is clipped as one."""

    def of_a_person(model, person):
        x, y, there = person
        params = dict(model.network.named_parameters())
        moved = {name: p.detach().clone().requires_grad_() for name, p in params.items()}
        for _ in range(3):
            loss = F.cross_entropy(torch.func.functional_call(model.network, moved, (x[there],)), y[there])
            steps = torch.autograd.grad(loss, list(moved.values()))
            moved = {name: p - 0.5 * g for (name, p), g in zip(moved.items(), steps, strict=True)}
        return sum((p * (p.detach() - moved[name].detach())).sum() for name, p in params.items())

    space = run("Augmentation multiplicity|1", "Several rows of one person|1", "Federated averaging")
    assert_equal(parameters(space["model"]), made[0].train(of_a_person))
    assert space["private"].ledger.runs == [(Release(1.0, 0.2), 10)]


def test_public_data(run, made):
    """A usual step after each private one."""
    space = run("Public data")

    class Usual:
        def __init__(self, _):
            self.optimizer = torch.optim.SGD(made[0].model.parameters(), lr=0.05)

        def step(self):
            self.optimizer.zero_grad()
            F.cross_entropy(made[0].model(space["public_x"]), space["public_y"]).backward()
            self.optimizer.step()

    assert_equal(parameters(space["model"]), made[0].train(own_loss, Usual))
    assert space["private"].ledger.runs == [(Release(1.0, 0.2), 10)]


def test_watching(run, made):
    """More extensions in the context change nothing."""
    space = run("Watching a training")
    private, model = space["private"], space["model"]
    assert_equal(parameters(model), made[0].train(own_loss))
    assert space["of_a_layer"].shape == private.clipping.norms.shape == space["losses"].shape
    assert 0 <= space["clipped"] == int((private.clipping.norms > 1.5).sum())
    assert space["averaged"].n_averaged == private.steps == 10
    assert private.epsilon() < 20


def test_critic(run, made):
    """As on the page; the reference is given the pairs that the critic has seen, which depend on the steps before."""
    section, seen = "Discriminators and critics", []
    space = run(f"{section}|1")

    def watched(*inputs):
        seen.append([t.detach().clone() for t in inputs])
        return space["model"](*inputs)

    space["watched"] = watched
    exec(blocks(section)[1].replace("model(x, ", "watched(x, "), space)
    assert len(seen) == 10
    sizes = [len(batch[0]) for batch in seen]
    made[0].data = [example for batch in seen for example in zip(*batch, strict=True)]
    reference = made[0].train(
        lambda model, example: model(*(t[None] for t in example)).mean(),
        batches=[range(end - size, end) for size, end in zip(sizes, itertools.accumulate(sizes), strict=True)],
    )
    assert_equal(parameters(space["model"]), reference)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("pieces", [None, 3])
def test_schedules(run, made, name, pieces):
    space = run("Learning-rate schedules|1")
    optimizer = torch.optim.SGD(space["model"].parameters(), lr=0.1, momentum=0.9)
    private = perexample.privacy.make_private(
        space["model"], optimizer, space["data"], **space["plan"], physical_batch_size=pieces
    )
    schedule = SCHEDULES[name](optimizer)
    for x, y in private:
        with private:
            F.cross_entropy(space["model"](x), y).backward()
        if private.step():
            schedule.step()
    assert private.steps == 10
    assert_equal(parameters(space["model"]), made[0].train(own_loss, SCHEDULES[name]))


def test_a_plateau_of_public_data(run, made):
    space = run("Learning-rate schedules|1")
    model, public = space["model"], (torch.randn(9, 4), torch.randint(0, 3, (9,)))
    private = perexample.privacy.make_private(
        model, torch.optim.SGD(model.parameters(), lr=0.1), space["data"], **space["plan"]
    )
    rates = []

    class Plateau:
        """Steps as the loss of the public data has it; with a patience of 0 every rise halves the rate."""

        def __init__(self, optimizer, model):
            self.optimizer, self.model = optimizer, model
            self.schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)

        def step(self):
            with torch.no_grad():
                self.schedule.step(F.cross_entropy(self.model(public[0]), public[1]))

    plateau = Plateau(private.optimizer, model)
    for x, y in private:
        with private:
            F.cross_entropy(model(x), y).backward()
        private.step()
        plateau.step()
        rates.append(private.optimizer.param_groups[0]["lr"])
    assert rates[-1] < 0.1
    assert_equal(parameters(model), made[0].train(own_loss, lambda o: Plateau(o, made[0].model)))


# -------------------------------------------------------------------------------------------------------- low precision


def wide():
    torch.manual_seed(0)
    return extend(nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 3)).float())


def half_precision(dtype, scale=1.0, bound=1.0, factor=1.0, overflow=False):
    """Norms, clipped sums, and gradients of one backward under autocast; the exact gradients, in float64."""
    model, clipping = wide(), ClippedGrad(bound)
    x, y = torch.randn(16, 4), torch.randint(0, 3, (16,))
    weight = torch.full((16,), factor)
    if overflow:
        weight[3] = 1e38
    with perex(clipping, BatchGrad(), grad=False, loss_scale=scale):
        with torch.autocast("cpu", dtype):
            out = model(x)
        (scale * (weight * F.cross_entropy(out.float(), y, reduction="none")).mean()).backward()
    rows = torch.cat([p.grad_batch.double().flatten(1) for p in model.parameters()], 1)
    sums = [p.clipped_sum for p in model.parameters()]
    exact = copy.deepcopy(model).double()
    with perex(BatchGrad(), grad=False):
        (weight.double() * F.cross_entropy(exact(x.double()), y, reduction="none")).mean().backward()
    return clipping, sums, rows, torch.cat([p.grad_batch.flatten(1) for p in exact.parameters()], 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    """Against the gradients as autocast has them: float32. Against the exact ones: rounding of the data type."""
    clipping, sums, rows, exact = half_precision(dtype, scale=1024.0 if dtype == torch.float16 else 1.0, bound=2.0)
    factors = (2.0 / rows.norm(dim=1)).clamp_max(1)
    assert 0 < int((factors < 1).sum()) < 16
    assert clipping.norms.dtype == torch.float64
    assert {total.dtype for total in sums} == {torch.float32}
    found = torch.cat([total.flatten() for total in sums]).double()
    torch.testing.assert_close(clipping.norms, rows.norm(dim=1), rtol=1e-5, atol=0)
    torch.testing.assert_close(found, factors @ rows, rtol=0, atol=1e-5)
    unit = torch.finfo(dtype).eps
    assert ((rows - exact).norm(dim=1) / exact.norm(dim=1)).max() <= 4 * unit
    wanted = (2.0 / exact.norm(dim=1)).clamp_max(1) @ exact
    assert (found - wanted).norm() <= 16 * 2.0 * 8 * unit


def test_bfloat16_on_the_page(run, made):
    """The masters are float32 and the noise float64: the same training in float64, up to bfloat16's rounding."""
    space = run("bfloat16|1")
    in_float32(space)
    exec(blocks("bfloat16")[1].replace("Adam(", "SGD("), space)
    torch.set_default_dtype(torch.float64)
    made[0].model.double()
    wanted = made[0].train(lambda model, example: own_loss(model, (example[0].double(), example[1])))
    assert {p.dtype for p in space["model"].parameters()} == {torch.float32}
    assert_equal({k: v.double() for k, v in parameters(space["model"]).items()}, wanted, 10 * 1e-2 * 2**-7)


@pytest.mark.parametrize("scale", [1.0, 2.0**-6, 1024.0, 65536.0])
def test_a_fixed_loss_scale_is_divided_out(scale):
    """Exactly, where nothing overflows or vanishes."""
    clipping, sums, *_ = half_precision(torch.bfloat16, scale=scale)
    other, wanted, *_ = half_precision(torch.bfloat16)
    assert torch.equal(clipping.norms, other.norms)
    assert all(torch.equal(total, same) for total, same in zip(sums, wanted, strict=True))


def test_float16_without_a_scale_loses_small_gradients():
    """Why there is a loss scale at all."""
    _, _, lost, exact = half_precision(torch.float16, factor=1e-6)
    _, _, kept, _ = half_precision(torch.float16, scale=2.0**20, factor=1e-6)
    assert (lost - exact).norm() > 0.1 * exact.norm()
    assert (kept - exact).norm() < 0.01 * exact.norm()


@pytest.mark.filterwarnings("ignore::perexample.NonFiniteExampleWarning")
def test_float16_overflow_of_an_example_drops_that_example():
    clipping, sums, *_ = half_precision(torch.float16, scale=1024.0, overflow=True)
    assert clipping.nonfinite == 1
    assert all(torch.isfinite(total).all() for total in sums)


def test_float16_on_the_page(run):
    space = run("float16|1")
    in_float32(space)
    before = parameters(space["model"])
    exec(blocks("float16")[1], space)
    after = parameters(space["model"])
    assert space["optimizer"].ledger.steps == 5
    assert all(torch.isfinite(p).all() and not torch.equal(p, before[name]) for name, p in after.items())


def scaled_step(grad, optimizer, scaler, model, clipping, overflow=False, before=lambda scaler, optimizer: None):
    with perex(clipping, grad=grad, loss_scale=scaler):
        loss = F.cross_entropy(model(torch.randn(5, 4)), torch.tensor([0, 1, 2, 0, 1]))
        scaler.scale(loss * (math.inf if overflow else 1)).backward()
    before(scaler, optimizer)
    scaler.step(optimizer)


@pytest.mark.filterwarnings("ignore::perexample.NonFiniteExampleWarning")
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("overflow", [False, True])
@pytest.mark.parametrize("unscaled", [False, True])
@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam], ids=lambda cls: cls.__name__)
def test_grad_scaler_is_refused(make, grad, overflow, unscaled):
    """With the remedy, whether it would have skipped the step or not; nothing is stepped and nothing counted."""
    model, clipping = wide(), ClippedGrad(1.0)
    optimizer = make(model.parameters(), lr=0.1)
    privatize(optimizer, clipping=clipping, noise_multiplier=1.0, expected_batch_size=5)
    scaler, start = torch.amp.GradScaler("cpu", init_scale=1024.0), parameters(model)
    unscale = (lambda s, o: s.unscale_(o)) if unscaled else (lambda s, o: None)
    with pytest.raises(PerExampleError, match=r"GradScaler.*loss_scale=1024.*bfloat16"):
        scaled_step(grad, optimizer, scaler, model, clipping, overflow, unscale)
    assert_equal(parameters(model), start, 0)
    assert optimizer.ledger.steps == 0
    optimizer.step()  # the remedy works at once
    assert optimizer.ledger.steps == 1


def test_grad_scaler_is_refused_at_the_first_piece():
    model, clipping = wide(), ClippedGrad(1.0)
    sampler = PhysicalBatches(PoissonBatchSampler(10, 1.0), 5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    privatize(optimizer, clipping=clipping, noise_multiplier=1.0, expected_batch_size=10, sampler=sampler)
    assert len(next(iter(sampler))) == 5
    with pytest.raises(PerExampleError, match="GradScaler"):
        scaled_step(False, optimizer, torch.amp.GradScaler("cpu", init_scale=1024.0), model, clipping)


def test_a_fused_optimizer_refuses_a_grad_scaler_too():
    model, clipping = wide(), ClippedGrad(1.0)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1, fused=True)
    privatize(optimizer, clipping=clipping, noise_multiplier=1.0, expected_batch_size=5)
    with pytest.raises(PerExampleError, match="GradScaler"):
        scaled_step(False, optimizer, torch.amp.GradScaler("cpu", init_scale=1024.0), model, clipping)
    optimizer.step()


def test_accelerate_with_a_grad_scaler_is_refused():
    needs("accelerate")
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer

    Accelerator(cpu=True)  # sets accelerate's own state
    model, clipping = wide(), ClippedGrad(1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    privatize(optimizer, clipping=clipping, noise_multiplier=1.0, expected_batch_size=5)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    wrapped = AcceleratedOptimizer(optimizer, scaler=scaler)
    with perex(clipping, grad=False, loss_scale=scaler):
        scaler.scale(model(torch.randn(5, 4)).square().sum(1).mean()).backward()
    with pytest.raises(PerExampleError, match="GradScaler"):
        wrapped.step()


def test_a_grad_scaler_that_is_disabled_changes_nothing():
    model, clipping = wide(), ClippedGrad(1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    privatize(optimizer, clipping=clipping, noise_multiplier=1.0, expected_batch_size=5)
    scaled_step(False, optimizer, torch.amp.GradScaler("cpu", enabled=False), model, clipping)
    assert optimizer.ledger.steps == 1


# ------------------------------------------------------------------------------------------------- timm, torch.compile


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_timm_model(run, made):
    needs("timm")
    with test_timm._torchvision(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importlib.import_module("timm")
    space = run("timm")
    assert not any(isinstance(module, nn.BatchNorm2d) for module in space["model"].modules())
    assert_equal(parameters(space["model"]), made[0].train(own_loss, epochs=1))


def test_recorded_models_and_steps(run, made):
    """Pieces of Poisson batches, against one backward per example."""
    space = run("Recorded models and steps")
    assert space["recorded"].repeated == space["backward"]._step.repeated == space["norms"].repeated == 0
    assert made[0].private.steps == space["private"].steps == 10
    assert_equal(parameters(made[0].private.model), made[0].train(own_loss))
    assert_equal(parameters(space["model"]), made[1].train(own_loss))
    assert space["model"][0].weight.batch_l2.shape == (5,)
    assert space["output"].shape[1] == 3


def test_a_compiled_model_is_refused(run):
    run()
    model = torch.compile(nn.Sequential(nn.Linear(4, 3)), backend="eager")
    data = TensorDataset(torch.randn(40, 4), torch.randint(0, 3, (40,)))
    with pytest.raises(UnsupportedModuleError, match=r"without torch\.compile"):
        make_private(
            model,
            torch.optim.SGD(model.parameters(), lr=0.1),
            data,
            batch_size=8,
            public_size=40,
            epochs=1,
            max_norm=1.0,
            noise_multiplier=1.0,
            target_delta=1e-3,
        )


def test_every_section_of_the_page_is_tested():
    source = pathlib.Path(__file__).read_text()
    for section in SECTIONS:
        if "code-block" in SECTIONS[section]:
            assert source.count(f'"{section}') or section == PREAMBLE, section
