"""Two models in one loss: what is done to the outputs of the first before the second is given them."""

import pytest
import torch
from harness import assert_exact, assert_refused, jittered, rand
from torch import nn

from perexample import CrossExampleError, extend, perex
from perexample.extensions import BatchGrad

I, H, D = 3, 4, 2  # noqa: E741


def models():
    torch.manual_seed(0)
    enc = nn.Sequential(nn.Linear(I, H), nn.Tanh(), nn.Linear(H, 2 * D))
    return jittered(nn.ModuleDict({"enc": enc, "dec": nn.Sequential(nn.Linear(D, H), nn.Tanh(), nn.Linear(H, I))}))


def moments(m, x):
    mean, log = m["enc"](x).chunk(2, -1)
    return mean, (log / 2).exp()


def _samples_first(m, x, e):
    mean, std = moments(m, x)
    return m["dec"](mean + std * e.transpose(0, 1)).transpose(0, 1)


def _samples_behind(m, x, e):
    mean, std = moments(m, x)
    return m["dec"](mean[:, None] + std[:, None] * e)


def _one_sample(m, x, e):
    mean, std = moments(m, x)
    return m["dec"](mean + std * e[:, 0])


RIGHT = {
    "one sample": _one_sample,
    "samples behind": _samples_behind,
    "as it is": lambda m, x, e: m["dec"](m["enc"](x)[:, :D]),
    "ordered twice": lambda m, x, e: m["dec"](moments(m, x)[0].flip(0).tanh().flip(0)),
    "softmax": lambda m, x, e: m["dec"](moments(m, x)[0].softmax(1)),
    "product": lambda m, x, e: m["dec"]((moments(m, x)[0].unsqueeze(1) @ e.mT).squeeze(1)[:, :D]),
}
WRONG = {
    "samples first": _samples_first,
    "flip": lambda m, x, e: m["dec"](moments(m, x)[0].flip(0)),
    "roll": lambda m, x, e: m["dec"](moments(m, x)[1].roll(1, 0)),
    "centred": lambda m, x, e: m["dec"]((lambda z: z - z.mean(0))(moments(m, x)[0])),
    "one for all": lambda m, x, e: m["dec"](moments(m, x)[0][:1].expand(len(x), -1)),
    "swapped": lambda m, x, e: m["dec"](moments(m, x)[0][torch.arange(len(x)) ^ 1]),
}


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("name", RIGHT)
def test_what_leaves_each_example_by_itself_is_exact(name, n):
    assert_exact(models(), (rand(n, I), rand(n, n, D)), forward=RIGHT[name])


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("name", WRONG)
def test_what_mixes_or_moves_examples_is_refused(name, n):
    settings = {"forward": WRONG[name]}
    assert_refused(models(), (rand(n, I), rand(n, n, D)), CrossExampleError, "`dec` was given .*`enc` had", **settings)


def test_an_example_that_is_not_finite_is_no_sign_of_another():
    model, x = extend(models()), rand(4, I)
    x[1] = float("nan")
    with perex(BatchGrad()):
        RIGHT["softmax"](model, x, None).square().sum(1).mean().backward()
    rows = model["enc"][0].weight.grad_batch.flatten(1)
    assert rows.isnan().any(1).tolist() == [False, True, False, False]


@pytest.mark.parametrize("right", [True, False])
def test_a_model_that_is_called_on_its_own_output(right):
    model = jittered(nn.Sequential(nn.Linear(I, I), nn.Tanh()))
    if right:
        assert_exact(model, (rand(4, I),), forward=lambda m, x: m(m(x).softmax(1)))
    else:
        assert_refused(model, (rand(4, I),), CrossExampleError, "had them", forward=lambda m, x: m(m(x).flip(0)))
