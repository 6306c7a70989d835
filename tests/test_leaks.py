"""Private training holds on to nothing (R14): no growth over many steps, no captured tensor after the ``with``."""

import gc
import tracemalloc
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from audit import save_scores
from torch import nn
from torch.utils.data import TensorDataset

from perexample import NonFiniteExampleWarning, PerExampleError, perex
from perexample.extensions import AdaptiveClippedGrad, BatchGrad, ClippedGrad
from perexample.privacy import make_private

N, MIB = 40, 2**20
SCORES: dict[str, float] = {}


def data(n=N):
    g = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(n, 6, generator=g), torch.randint(0, 2, (n,), generator=g))


class Fragile(nn.Module):
    """Fails in its forward or backward, if it is told to."""

    fails: str | None = None

    def forward(self, x):
        if self.fails == "forward":
            raise KeyError("forward")
        if self.fails == "backward" and x.requires_grad:
            x.register_hook(self.fail)
        return x.tanh()

    def fail(self, grad):
        raise KeyError("backward")


def network():
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), Fragile(), nn.Dropout(0.2), nn.Linear(8, 2))


def private(steps=10**6, **options):
    model = network()
    settings = {"physical_batch_size": 4, "max_norm": 0.5} | options
    return make_private(
        model,
        torch.optim.AdamW(model.parameters(), lr=0.01),
        data(),
        batch_size=10,
        public_size=N,
        noise_multiplier=1.0,
        target_delta=1e-3,
        steps=steps,
        sampling_generator=torch.Generator().manual_seed(3),
        **settings,
    )


def piece(p, x, y):
    with p:
        F.cross_entropy(p.model(x), y).backward()
    p.step()


def train(p, steps):
    """So many steps, epoch after epoch, from wherever the iteration is."""
    last = p.steps + steps
    while p.steps < last:
        for x, y in p.loader:
            piece(p, x, y)
            if p.steps >= last:
                return


def resident():
    """Bytes of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def tensors():
    """Tensors that are alive, graph nodes let go."""
    gc.collect()
    return {id(o): o for o in gc.get_objects() if issubclass(type(o), torch.Tensor)}


def new_since(before, *kept):
    """Shapes of what is alive now and was not before, but for the things that are meant to stay."""
    known = {*before, *(id(t) for t in kept)}
    return sorted(str(list(t.shape)) for key, t in tensors().items() if key not in known)


def meant_to_stay(p):
    """Parameters, their sums and gradients, moments, the last norms; what these are views of, if that is no larger."""
    own = [*p.model.parameters(), p.clipping.norms, *p.clipping.group_norms.values()]
    own += [getattr(w, name, None) for w in p.model.parameters() for name in ("grad", "clipped_sum")]
    own += [t for state in p.optimizer.state.values() for t in state.values()]
    own = [t for t in own if t is not None]
    return [*own, *(t._base for t in own if t._base is not None and t._base.numel() == t.numel())]


# ------------------------------------------------------------------------------------------------------------ growth


def growth(p, measure, warm, steps):
    train(p, warm)
    gc.collect()
    before = measure()
    train(p, steps)
    gc.collect()
    return (measure() - before) / MIB


def traced():
    return tracemalloc.get_traced_memory()[0]


WAYS = {
    "pieces": {},
    "ledger": {"ledger": "a file"},
    "adaptive": {
        "max_norm": None,
        "clipping": lambda: AdaptiveClippedGrad(0.5, expected_batch_size=10, count_noise=2.0),
    },
    "system": {"noise": "os", "physical_batch_size": None},
}


@pytest.fixture
def make(tmp_path):
    """A run of one of the ways."""

    def made(way):
        options = dict(WAYS[way])
        if "ledger" in options:
            options["ledger"] = tmp_path / "ledger"
        if "clipping" in options:
            options["clipping"] = options["clipping"]()
        return private(**options)

    return made


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc")
def test_a_thousand_steps_need_no_more_memory(make):
    """By the system's count, in which all allocations are."""
    SCORES["rss_mib_1000_steps"] = growth(make("pieces"), resident, 50, 1000)
    assert SCORES["rss_mib_1000_steps"] < 1


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc")
def test_steps_need_no_more_memory(make):
    SCORES["rss_mib_100_steps"] = growth(make("pieces"), resident, 50, 100)
    assert SCORES["rss_mib_100_steps"] < 1


@pytest.mark.parametrize("way", [pytest.param(way, marks=pytest.mark.slow) for way in WAYS])
def test_a_thousand_steps_leave_no_objects(make, way):
    """By Python's count, which sees small things too."""
    check_traced(make(way), way, 1000)


@pytest.mark.parametrize("way", WAYS)
def test_steps_leave_no_objects(make, way):
    check_traced(make(way), way, 50)


def check_traced(p, way, steps):
    train(p, 3)
    tracemalloc.start()
    try:
        grown = growth(p, traced, 50, steps)  # Python keeps some freed objects for reuse; until then it grows
    finally:
        tracemalloc.stop()
    SCORES[f"traced_mib_{steps}_steps_{way}"] = grown
    assert grown < 0.05  # measured: 0.01 to 0.04


def own_objects():
    """How many objects of the library's own classes are alive, by class."""
    gc.collect()
    return Counter(type(o).__qualname__ for o in gc.get_objects() if str(type(o).__module__).startswith("perexample"))


def test_the_number_of_tensors_and_of_our_objects_stays(make):
    p = make("pieces")
    train(p, 10)  # until losses of as many numbers of examples are remembered as ever are
    before, ours = len(tensors()), own_objects()
    train(p, 20)
    SCORES["tensors_20_steps"] = len(tensors()) - before
    assert SCORES["tensors_20_steps"] == 0
    assert ours == own_objects()


def test_a_leak_would_be_found(make):
    """One activation of each step that is kept."""
    p, kept = make("pieces"), []
    p.model[2].register_forward_hook(lambda module, args, output: kept.append(output))
    train(p, 3)
    before, resting = len(tensors()), traced_growth(p, kept)
    assert len(tensors()) - before > 20
    assert resting > 0.02


def traced_growth(p, kept):
    tracemalloc.start()
    try:
        return growth(p, traced, 2, 20)
    finally:
        tracemalloc.stop()


# ---------------------------------------------------------------------------------------------- nothing after the with


@pytest.fixture
def batch():
    x, y = data(4).tensors
    return x, y


def ready(**options):
    """A run that has taken a step with a batch that is ours, so that whatever is made once is there."""
    p = private(**options)
    train(p, 2)
    return p


def left_behind(p, work):
    """What is alive after ``work``, and was not before; the loss and whatever else it held is gone."""
    p.zero_grad()
    before = tensors()
    work()
    return new_since(before, *meant_to_stay(p))


def score(name, found):
    SCORES[f"tensors_{name}"] = len(found)
    assert found == []


def test_nothing_is_alive_after_a_backward(batch):
    def work():
        x, y = batch
        with p:
            F.cross_entropy(p.model(x), y).backward()

    p = ready()
    score("after_backward", left_behind(p, work))


def test_nothing_is_alive_after_a_forward_without_a_backward(batch):
    def work():
        with p:
            p.model(batch[0])

    p = ready()
    score("after_forward", left_behind(p, work))


def test_nothing_is_alive_after_forwards_without_a_graph(batch):
    def work():
        with torch.no_grad():
            p.model(batch[0])
        with p, torch.no_grad():
            p.model(batch[0])
        with p, torch.inference_mode():
            p.model(batch[0])
        p.model.eval()
        p.model(batch[0])
        p.model.train()

    p = ready()
    score("no_grad", left_behind(p, work))


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_nothing_is_alive_after_an_error(batch, where):
    def work():
        x, y = batch
        p.model[2].fails = where
        try:
            with p:
                F.cross_entropy(p.model(x), y).backward()
        except KeyError as error:
            assert error.args == (where,)  # noqa: PT017
            error.__traceback__ = None
        else:
            raise AssertionError("no error")
        p.model[2].fails = None

    p = ready()
    score(f"after_error_in_{where}", left_behind(p, work))


def test_nothing_is_alive_after_an_error_of_the_library(batch):
    """Of a loss that sums."""

    def work():
        x, y = batch
        with suppress(PerExampleError), p:
            F.cross_entropy(p.model(x), y, reduction="sum").backward()

    p = ready()
    score("after_own_error", left_behind(p, work))


def test_nothing_is_alive_after_an_error_in_the_clip_function(batch):
    def work():
        x, y = batch
        clipping = ClippedGrad(1.0, clip=lambda norms: 1.0)
        with suppress(PerExampleError), perex(clipping, grad=False):
            F.cross_entropy(p.model(x), y).backward()

    p = ready()
    score("after_error_in_clip", left_behind(p, work))


def test_nothing_is_alive_after_an_error_in_the_middle_of_pieces(batch):
    """The sum of the pieces before stays; zero_grad lets it go."""

    def work():
        x, y = batch
        with p:
            F.cross_entropy(p.model(x), y).backward()
        p.model[2].fails = "backward"
        with suppress(KeyError), p:
            F.cross_entropy(p.model(x), y).backward()
        p.model[2].fails = None
        p.clipping.zero_grad()

    p = ready()
    score("after_error_in_pieces", left_behind(p, work))


@pytest.mark.filterwarnings("ignore::perexample.NonFiniteExampleWarning")
def test_nothing_is_alive_after_examples_that_are_not_finite(batch):
    def work():
        x, y = batch[0].clone(), batch[1]
        x[0] = float("nan")
        with p:
            F.cross_entropy(p.model(x), y).backward()

    assert issubclass(NonFiniteExampleWarning, UserWarning)
    p = ready()
    score("after_nonfinite", left_behind(p, work))


def test_nothing_is_alive_after_a_loop_that_is_left(batch):
    """By an error of the user's, in the middle of an epoch."""

    def work():
        with suppress(ZeroDivisionError):
            for x, y in p.loader:
                with p:
                    F.cross_entropy(p.model(x), y).backward()
                    raise ZeroDivisionError

    p = ready()
    found = left_behind(p, work)
    pending = [f"[{len(torch.get_rng_state())}]"]  # the state of the sampler that draws this batch again
    SCORES["tensors_after_break"] = len(found) - len(pending)
    assert found == pending


def test_a_run_that_is_dropped_is_gone():
    """Model, optimizer, ledger and sampler hold each other; the collector lets them go."""

    def work():
        train(private(), 3)

    work()
    before = tensors()
    work()
    score("of_a_dropped_run", new_since(before))


def test_other_extensions_beside_the_sum(batch):
    """What they leave is in their field, and nowhere else."""

    def work():
        x, y = batch
        with perex(p.clipping, BatchGrad()):
            F.cross_entropy(p.model(x), y).backward()
        for w in p.model.parameters():
            del w.grad_batch
            w.grad = None

    p = ready()
    score("after_others", left_behind(p, work))


def test_scores():
    """The figures of this run; those of a thousand steps are of the slow set."""
    save_scores("leaks", SCORES)
    assert all(value < 1 for value in SCORES.values())
