"""What a model returns beside data, computed from parameters alone: the scale of a policy, the volume of a flow."""

import pytest
import torch
from harness import Net, assert_exact, assert_refused, jittered, par, rand
from torch import nn
from torch.distributions import Normal
from torch.utils.checkpoint import checkpoint

from perexample import RecordedStep, UncoveredParameterError, extend, perex
from perexample.extensions import BatchGrad

I, A = 3, 2  # noqa: E741


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def _negative_log_likelihood(distribution):
    actions = torch.linspace(-1, 1, A, dtype=torch.float64).expand(distribution.mean.shape)
    return -distribution.log_prob(actions).sum(-1) - 0.1 * distribution.entropy().sum(-1)


POLICIES = {
    "Normal": lambda self, x: Normal(self.mean(x), self.log_std.exp()),
    "expand_as": lambda self, x: (lambda mean: Normal(mean, self.log_std.expand_as(mean).exp()))(self.mean(x)),
    "one for all": lambda self, x: Normal(self.mean(x), self.scalar.exp()),
    "broadcast": lambda self, x: Normal(*torch.broadcast_tensors(self.mean(x), self.log_std.exp())),
    "a row": lambda self, x: Normal(self.mean(x), self.log_std.exp().unsqueeze(0)),
}


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("name", POLICIES)
def test_policies(name, n):
    model = jittered(Net(POLICIES[name], mean=nn.Linear(I, A), log_std=par(A), scalar=par(1)))
    assert_exact(model, (rand(n, I),), loss=_negative_log_likelihood)


def _evaluated(self, x, actions):
    """As an actor-critic is evaluated."""
    mean = self.mean(x)
    distribution = Normal(mean, self.log_std.expand_as(mean).exp())
    return distribution.log_prob(actions).sum(1), distribution.entropy().sum(1), self.value(x)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_the_entropy_of_a_policy(n):
    model = jittered(Net(_evaluated, mean=nn.Linear(I, A), log_std=par(A), value=nn.Linear(I, 1)))
    assert_exact(model, (rand(n, I), rand(n, A)))


def _flow(self, x):
    log_det = self.log_s.sum() + torch.linalg.slogdet(self.w)[1]
    return (x * self.log_s.exp()) @ self.w, log_det.expand(len(x))


RETURNED = {
    "flow": _flow,
    "mapping": lambda self, x: dict(zip("zd", _flow(self, x), strict=True)),
    "list": lambda self, x: [self.mean(x), self.w[0].expand(len(x), I)],
    "rows": lambda self, x: (self.mean(x), self.w.exp().expand(len(x), -1, -1)),
    "alone": lambda self, x: self.w[0].exp().expand(len(x), -1),
    "repeated": lambda self, x: (self.mean(x), self.w[0].expand(len(x), -1).expand_as(x)),
}


@pytest.mark.parametrize("n", [0, 1, 2, 3])
@pytest.mark.parametrize("name", RETURNED)
def test_outputs_that_are_the_same_for_all(name, n):
    model = jittered(Net(RETURNED[name], mean=nn.Linear(I, A), log_s=par(I), w=par(I, I)))
    assert_exact(model, (rand(n, I),))


def test_time_major():
    model = jittered(
        Net(lambda self, x: (self.mean(x), self.log_std.expand(*x.shape[:2], -1)), mean=nn.Linear(I, A), log_std=par(A))
    )
    assert_exact(model, (rand(4, 3, I),), batch_dim=1)


USES = {
    "a shape of one example, for all": lambda self, x: x + self.p.expand_as(x[0]),
    "a shape of some, for others": lambda self, x: torch.cat([c + self.p.expand_as(x[:2]) for c in x.chunk(2)]),
    "joined to itself": lambda self, x: torch.cat([x, self.p.expand_as(x)], 1) * 2,
    "into data": lambda self, x: torch.where(x > 0, x, self.p.expand_as(x)),
    "written to": lambda self, x: self.p.expand_as(x).clone().mul_(x),
    "by position": lambda self, x: torch.mul(*torch.broadcast_tensors(self.table, x)),
    "of two parameters": lambda self, x: x * self.p.expand_as(self.table).sum(0),
}


@pytest.mark.parametrize("name", USES)
def test_parameters_in_the_shape_of_data_within_a_model(name):
    model = jittered(Net(USES[name], p=par(I), table=par(4, I)))
    assert_exact(model, (rand(4, 4, I) if name == "by position" else rand(4, I),))


NOBODYS = {
    "rows by sizes": lambda self, x: (self.mean(x), self.log_std.repeat(len(x), 1)),
    "zeros": lambda self, x: (self.mean(x), torch.zeros_like(self.mean(x)) + self.log_std),
    "a table as long as the batch": lambda self, x: (self.mean(x), self.table.exp()),
}


@pytest.mark.parametrize("name", NOBODYS)
def test_rows_that_belong_to_nobody_are_named(name):
    model = jittered(Net(NOBODYS[name], mean=nn.Linear(I, A), log_std=par(A), table=par(4, A)))
    assert_refused(model, (rand(4, I),), UncoveredParameterError, "output 2 of `Net`, of shape .4, 2., .*expand_as")


def _checkpointed(self, x):
    def run(x):
        mean = self.mean(x)
        return mean, mean * self.log_std.expand_as(mean), self.log_std.exp().expand_as(mean)

    return checkpoint(run, x, use_reentrant=False)


def test_in_an_activation_checkpoint():
    model = jittered(Net(_checkpointed, mean=nn.Linear(I, A), log_std=par(A)))
    assert_exact(model, (rand(4, I),))


@pytest.mark.parametrize("function", [_evaluated, lambda self, x, a: (self.mean(x), self.log_std.expand(len(x), -1))])
def test_in_a_recorded_step(function):
    model = jittered(Net(function, mean=nn.Linear(I, A), log_std=par(A), value=nn.Linear(I, 1)))
    x, actions = rand(4, I), rand(4, A)
    step = RecordedStep(
        extend(model),
        lambda x, actions: sum(t.square().flatten(1).sum(1) if t.dim() > 1 else t for t in model(x, actions)),
        x, actions, extensions=BatchGrad(),
    )  # fmt: skip
    losses = step(x, actions)
    found = model.log_std.grad_batch.clone()
    with perex(BatchGrad()):
        values = sum(t.square().flatten(1).sum(1) if t.dim() > 1 else t for t in model(x, actions))
        values.mean().backward()
    torch.testing.assert_close(losses, values.detach())
    torch.testing.assert_close(found, model.log_std.grad_batch)


@pytest.mark.parametrize("n", [0, 1, 2, 3])
def test_what_comes_from_data_by_a_way_that_is_not_followed(n):
    """For one example too it is nothing that was computed from parameters alone."""
    model = Net(lambda self, x: torch.vmap(lambda row: row.outer(row))(self.a(x)).flatten(1), a=nn.Linear(I, I))
    assert_exact(jittered(model), (rand(n, I),))


def test_its_errors_do_not_say_that_it_comes_from_parameters_alone():
    model = extend(Net(lambda self, x: torch.vmap(lambda row: row @ self.w)(self.a(x)), a=nn.Linear(I, I), w=par(I, A)))
    with perex(BatchGrad()), pytest.raises(UncoveredParameterError, match=r"`w`.*torch\.func") as error:
        model.double()(rand(4, I)).sum(1).mean().backward()
    assert "parameters alone" not in str(error.value)
