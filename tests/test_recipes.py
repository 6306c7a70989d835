"""The code of docs/recipes.rst, and what comes out of it against one backward per example."""

import pathlib
import re
import textwrap

import pytest
import torch
import torch.nn.functional as F

PAGE = (pathlib.Path(__file__).parent.parent / "docs" / "recipes.rst").read_text()
TITLES = re.split(r"^(.+)\n[=\-]+\n", PAGE, flags=re.M)
CODE = {
    title: "\n".join(map(textwrap.dedent, re.findall(r"\.\. code-block:: python\n\n((?:   .*\n|\n)+)", text)))
    for title, text in zip(TITLES[1::2], TITLES[2::2], strict=True)
}


@pytest.fixture
def run():
    """Run a section after the page's first; gives the names that it made."""
    before = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)

    def runner(title):
        space = {"__name__": "page"}
        for code in (CODE["Recipes"], CODE[title]):
            exec(compile(code, f"recipes.rst: {title}", "exec"), space)
        return space

    yield runner
    torch.set_default_dtype(before)


def each(numbers, params):
    """The gradients of each number of ``[N]``, one after another, with respect to each parameter."""
    params = list(params)
    rows = [torch.autograd.grad(number, params, retain_graph=True) for number in numbers]
    return [torch.stack(of_one) for of_one in zip(*rows, strict=True)]


def vectors(space, numbers=None):
    numbers = losses(space) if numbers is None else numbers
    return torch.cat([g.flatten(1) for g in each(numbers, space["model"].parameters())], 1)


def losses(space, model="model", labels="y"):
    return F.cross_entropy(space[model](space["x"]), space[labels], reduction="none")


def test_norms(run):
    space = run("Losses, and norms over the whole model")
    norms = vectors(space).norm(dim=1)
    torch.testing.assert_close(space["norms"], norms)
    torch.testing.assert_close(space["losses"], losses(space))
    assert set(space["hardest"].tolist()) == set(norms.argsort()[-3:].tolist())
    assert all(p.grad is None for p in space["model"].parameters())


def test_vectors(run):
    space = run("One vector for each example")
    torch.testing.assert_close(space["vectors"], vectors(space))


def test_cosines(run):
    space = run("Cosines between examples")
    unit = F.normalize(vectors(space))
    torch.testing.assert_close(space["cosines"], unit @ unit.T)


def test_fisher(run):
    space = run("The diagonal of the Fisher information")
    rows = each(losses(space, labels="drawn"), space["model"].parameters())
    for found, wanted in zip(space["fisher"].values(), rows, strict=True):
        torch.testing.assert_close(found, wanted.square().mean(0))


def test_jacobians(run):
    space = run("Jacobians and neural tangent kernels")
    outputs = space["model"](space["x"])
    for k in range(3):
        rows = each(outputs[:, k], space["model"].parameters())
        for found, wanted in zip(space["jacobian"], rows, strict=True):
            torch.testing.assert_close(found[:, k], wanted)
        of_all = vectors(space, outputs[:, k])
        torch.testing.assert_close(space["kernel"][k], of_all @ of_all.T)


def test_activations(run):
    space = run("Inputs and activations")
    hidden, rows = space["hidden"].detach(), []
    for h, y in zip(hidden, space["y"], strict=True):
        h.requires_grad_()
        rows += torch.autograd.grad(F.cross_entropy(space["model"][2](h[None]), y[None]), h)
    torch.testing.assert_close(space["of_hidden"], torch.stack(rows))


def test_a_part(run):
    space = run("A part of the parameters")
    torch.testing.assert_close(space["of_last"], each(losses(space), [space["model"][2].weight])[0])
    assert not hasattr(space["model"][0].weight, "grad_batch")
    biases = each(losses(space), [space["model"][0].bias, space["model"][2].bias])
    torch.testing.assert_close(space["of_biases"], torch.cat(biases, 1).norm(dim=1))
    assert not hasattr(space["model"][2].weight, "batch_l2")
    torch.testing.assert_close(space["model"][2].weight.grad, space["of_last"].mean(0))


def test_a_function(run):
    space = run("A function of parameters and data")
    torch.testing.assert_close(space["of_a"], each(losses(space, "mine"), [space["mine"].params["a"]])[0])


def test_several_backwards(run):
    """Norms of each example, and the gradient of the mean of all, though the last piece is shorter."""
    space = run("Several backwards for one step")
    torch.testing.assert_close(space["norms"], vectors(space).norm(dim=1))
    grads = torch.cat([p.grad.flatten() for p in space["model"].parameters()])
    torch.testing.assert_close(grads, vectors(space).mean(0))


def test_derivatives_in_the_loss(run):
    space = run("Derivatives in the loss")
    residual, points = space["residual"], space["points"]
    rows = each(residual(points).square().squeeze(1), residual.parameters())
    torch.testing.assert_close(space["of_points"], torch.cat([g.flatten(1) for g in rows], 1).norm(dim=1))


def test_clipping(run):
    """Two steps from the first weights, with nothing of the first sum in the second."""
    space, start = run("Clipping without privacy"), {}
    torch.manual_seed(0)
    exec(CODE["Recipes"], start)
    for _ in range(2):
        rows = vectors(start)
        step = (rows * (1 / rows.norm(dim=1, keepdim=True)).clamp(max=1)).mean(0)
        params = list(start["model"].parameters())
        for p, g in zip(params, step.split([p.numel() for p in params]), strict=True):
            p.data -= 0.1 * g.view_as(p)
    for found, wanted in zip(space["model"].parameters(), start["model"].parameters(), strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.fixture
def every_warning():
    """Torch gives its own each time, not once in a process."""
    before = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    yield
    torch.set_warn_always(before)


@pytest.mark.usefixtures("every_warning")
def test_what_is_not_there(run):
    """Fields have no graph, `torch.autograd.grad` leaves them, and `torch.func` is differentiated again."""
    space = run("One vector for each example")
    model, x, y, perex = (space[name] for name in ("model", "x", "y", "perex"))
    weight, before = model[0].weight, model[0].weight.grad_batch
    with perex(space["BatchGrad"]()):
        torch.autograd.grad(losses(space).sum(), weight)
        assert weight.grad_batch is before
        with pytest.warns(UserWarning, match="create_graph"):
            losses(space).mean().backward(create_graph=True)
    assert not weight.grad_batch.requires_grad
    weight.grad = None

    def loss(params, x, y):
        return F.cross_entropy(torch.func.functional_call(model, params, (x[None],)), y[None])

    params = dict(model.named_parameters())
    rows = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(params, x, y)
    torch.testing.assert_close(rows["0.weight"], before)
    assert torch.autograd.grad(rows["0.weight"].square().sum(), weight)[0].abs().max() > 0


def test_every_section_is_tested():
    source = pathlib.Path(__file__).read_text()
    assert all(f'run("{title}")' in source for title, code in CODE.items() if code and title != "Recipes")
