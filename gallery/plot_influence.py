"""
What taught the network this?
=============================

TracIn over several checkpoints (`Pruthi et al. 2020 <https://arxiv.org/abs/2002.08484>`_, TracInCP) traces the loss of
a test image to the training images. Here for several test images at once, verified by training again without the
images that helped most.
"""

# %%
# The idea
# --------
#
# A step on training image n with learning rate :math:`\eta` lowers the loss of a test image by about
# :math:`\eta \langle g_n, g_\text{test} \rangle`. Summed over checkpoints t:
#
# .. math::
#
#    I(n, \text{test}) = \sum_t \eta_t \langle g_n(\theta_t), g_\text{test}(\theta_t) \rangle .
#
# The gradients of all training images together would be a matrix of N rows and as many columns as there are parameters.
# It is not needed: an extension's ``compute`` sees one parameter at a time, keeps ``[N, M]`` for M test images, and the
# gradients it has formed are freed.

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from digits import accuracy, load_data, make_model

from perexample import Extension, extend, perex
from perexample.extensions import BatchGrad, BatchL2Grad


class Influence(Extension):
    """``p.influence[n, m] = <d loss_n / d p, d loss_m / d p>``, ``[N, M]``, for M gradients of each parameter."""

    field = "influence"

    def __init__(self, references):
        self.references = references

    def compute(self, view):
        return view.grad_batch().flatten(1) @ self.references[view.name].flatten(1).T


# %%
# Training, with checkpoints
# --------------------------
#
# 600 images, and full batches from one seed, so that training again differs in nothing but the images left out.

data = load_data()
N, LR, STEPS = 600, 0.2, 150
CHECKPOINTS = [10, 25, 50, 75, 100, 150]
x, y = data.x[:N], data.y[:N]


def train(left_out=(), checkpoints=()):
    """The trained network, and its states at the checkpoints."""
    kept = torch.ones(N, dtype=torch.bool)
    kept[torch.as_tensor(left_out, dtype=torch.long)] = False
    inputs, labels = x[kept], y[kept]
    model, states = make_model("mlp", seed=0), []
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    for step in range(1, STEPS + 1):
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
        if step in checkpoints:
            states.append({name: value.clone() for name, value in model.state_dict().items()})
    return model, states


def losses(model, inputs, labels):
    with torch.no_grad():
        return F.cross_entropy(model(inputs), labels, reduction="none")


model, states = train(checkpoints=CHECKPOINTS)
print(f"test accuracy {accuracy(model, data.x_test, data.y_test):.1%}")

# %%
# The test images are the first eight that the network is not sure about: a loss between 0.1 and 3.

all_losses = losses(model, data.x_test, data.y_test)
chosen = ((all_losses > 0.1) & (all_losses < 3)).nonzero().flatten()[:8]
x_test, y_test, before = data.x_test[chosen], data.y_test[chosen], all_losses[chosen]

# %%
# Influence
# ---------
#
# For each checkpoint one backward over the test images, and one over the training images. The squared norms beside it,
# summed in the same way, are each training image's influence on itself.

model = extend(make_model("mlp", seed=0))
influence, on_itself = torch.zeros(N, len(chosen)), torch.zeros(N)
for state in states:
    model.load_state_dict(state)
    with perex(BatchGrad(), grad=False):
        F.cross_entropy(model(x_test), y_test).backward()
    references = {name: p.grad_batch for name, p in model.named_parameters()}
    with perex(Influence(references), BatchL2Grad(), grad=False):
        F.cross_entropy(model(x), y).backward()
    influence += LR * sum(p.influence for p in model.parameters())
    on_itself += LR * sum(p.batch_l2 for p in model.parameters())

# %%
# Three entries by hand, with two backwards for each checkpoint:


def gradient(inputs, labels):
    return torch.cat([g.flatten() for g in torch.autograd.grad(F.cross_entropy(model(inputs), labels), parameters)])


parameters = list(model.parameters())
for n, m in [(0, 0), (17, 3), (N - 1, 7)]:
    by_hand = 0.0
    for state in states:
        model.load_state_dict(state)
        by_hand += LR * (gradient(x[n : n + 1], y[n : n + 1]) @ gradient(x_test[m : m + 1], y_test[m : m + 1]))
    torch.testing.assert_close(influence[n, m], by_hand, atol=1e-4, rtol=1e-4)

# %%
# What helped, what harmed
# ------------------------
#
# Images that helped have the label of the test image and look like it. Those that harmed look like it too, and have
# another label.

order = influence.argsort(dim=0, descending=True)
figure, axes = plt.subplots(4, 9, figsize=(8, 4.4), layout="constrained")
for axis in axes.flat:
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)
for row, m in enumerate(before.argsort(descending=True)[:4].tolist()):
    axes[row, 0].imshow(x_test[m, 0], cmap="Purples")
    axes[row, 0].set_ylabel(f"a {int(y_test[m])}", fontsize=10)
    axes[row, 0].set_xlabel(f"loss {before[m]:.2g}", fontsize=8)
    for column, n in enumerate([*order[:4, m].tolist(), *order.flip(0)[:4, m].tolist()], start=1):
        axes[row, column].imshow(x[n, 0], cmap="Blues" if column < 5 else "Reds")
        axes[row, column].set_xlabel(f"{int(y[n])}: {influence[n, m]:+.2g}", fontsize=8)
for column, title in [(0, "test image"), (1, "helped most"), (5, "harmed most")]:
    axes[0, column].set_title(title, fontsize=10, loc="left" if column else "center")
same = (y[order[:10]] == y_test).double().mean()
other = (y[order[-10:]] != y_test).double().mean()
print(f"of the ten that helped most {same:.0%} have the label of the test image; of those that harmed {1 - other:.0%}")
assert same > 0.9
plt.show()

# %%
# Is it true?
# -----------
#
# The network is trained again without the 30 images that helped a test image most: its loss should rise. Without the 30
# that harmed most it should fall. Beside them, what 30 images drawn at random do, and 30 drawn at random among those
# with the test image's own label, which is the harder comparison. Means of three draws.

LEFT_OUT, DRAWS = 30, 3
source = torch.Generator().manual_seed(0)


def drawn(among):
    """LEFT_OUT of these indices."""
    return among[torch.randperm(len(among), generator=source)[:LEFT_OUT]]


def loss_without(left_out):
    """``[M]``: what the losses of the test images become."""
    return losses(train(left_out)[0], x_test, y_test)


helpful, harmful, same_label = (torch.empty(len(chosen)) for _ in range(3))
anywhere = sum(loss_without(drawn(torch.arange(N))) for _ in range(DRAWS)) / DRAWS
for label in y_test.unique():
    found = sum(loss_without(drawn((y == label).nonzero().flatten())) for _ in range(DRAWS)) / DRAWS
    same_label[y_test == label] = found[y_test == label]
for m in range(len(chosen)):
    helpful[m] = loss_without(order[:LEFT_OUT, m])[m]
    harmful[m] = loss_without(order[-LEFT_OUT:, m])[m]

columns = {
    "helped most": (helpful, "tab:blue"),
    "random, same label": (same_label, "tab:cyan"),
    "random": (anywhere, "tab:gray"),
    "harmed most": (harmful, "tab:red"),
}
for name, (after, _) in columns.items():
    print(f"without 30 that are {name:18}: loss {after.mean() - before.mean():+.2f} on average")

figure, axis = plt.subplots(figsize=(8, 3.6), layout="constrained")
places = torch.arange(len(chosen), dtype=torch.float64)
for i, (name, (after, color)) in enumerate(columns.items()):
    axis.bar(places + 0.19 * (i - 1.5), after, width=0.19, color=color, label=f"without 30: {name}")
for place, loss in zip(places.tolist(), before.tolist(), strict=True):
    label = "without none" if place == 0 else None
    axis.plot([place - 0.4, place + 0.4], [loss, loss], color="black", linewidth=1.5, label=label)
axis.set(xticks=places, xticklabels=[f"a {int(label)}" for label in y_test], ylabel="loss of the test image")
axis.set(xlabel="test image", yscale="log")
axis.legend(frameon=False, ncols=3, fontsize=9, loc="lower center", bbox_to_anchor=(0.5, 1.0))
assert (helpful > same_label).all()
assert (helpful > anywhere).all()
assert (harmful < anywhere).double().mean() > 0.8  # of these eight, seven
plt.show()

# %%
# Influence on itself
# -------------------
#
# An image whose own gradient stays long over training is one that the others do not explain: it is atypical, or its
# label is wrong. Here 30 of the 600 labels are changed, and the images are looked at in the order of their influence on
# themselves.

truth, wrong = y.clone(), torch.zeros(N, dtype=torch.bool)
wrong[torch.randperm(N, generator=source)[:30]] = True
y = torch.where(wrong, (truth + torch.randint(1, 10, (N,), generator=source)) % 10, truth)
_, states = train(checkpoints=CHECKPOINTS)
with_wrong = torch.zeros(N)
for state in states:
    model.load_state_dict(state)
    with perex(BatchL2Grad(), grad=False):
        F.cross_entropy(model(x), y).backward()
    with_wrong += LR * sum(p.batch_l2 for p in model.parameters())
by_influence = with_wrong.argsort(descending=True)
share_found = wrong[by_influence].cumsum(0) / wrong.sum()
print(f"the first 30 of 600 images hold {share_found[29]:.0%} of the wrong labels, the first 60 {share_found[59]:.0%}")
assert share_found[59] > 0.8

figure = plt.figure(figsize=(8, 3.2), layout="constrained")
grid = figure.add_gridspec(2, 7, width_ratios=[1.6, 1.6, 0.3, 1, 1, 1, 1])
axis = figure.add_subplot(grid[:, :2])
axis.plot([0, 100], [0, 1], color="gray", linestyle=":", label="in random order")
axis.plot(torch.arange(1, N + 1) / N * 100, share_found, color="tab:blue", label="by influence on itself")
axis.set(xlabel="images looked at, %", ylabel="wrong labels found", xlim=(0, 100), ylim=(0, 1.03))
axis.legend(frameon=False, loc="lower right")
typical = on_itself.argsort(descending=True)
for row, (title, picked) in enumerate([("most, right labels", typical[:4]), ("least", typical[-4:])]):
    for column, n in enumerate(picked.tolist()):
        axis = figure.add_subplot(grid[row, 3 + column])
        axis.imshow(x[n, 0], cmap="gray_r")
        axis.set(xticks=[], yticks=[])
        axis.set_xlabel(f"a {int(truth[n])}: {on_itself[n]:.0f}", fontsize=8)
        if column == 0:
            axis.set_title(title, fontsize=10, loc="left")
plt.show()
