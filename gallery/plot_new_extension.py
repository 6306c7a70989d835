"""
A new extension
===============

An extension is one short class too: a quantity of each parameter, from its per-example gradients, whatever layer it
belongs to. Here the influence of training images on a test image, as in TracIn
(`Pruthi et al. 2020 <https://arxiv.org/abs/2002.08484>`_): the inner product of their gradients.
"""

# %%
# The extension
# -------------
#
# ``compute`` is called once for each parameter, as soon as its gradients are complete. ``field`` names the attribute
# that it fills.

import matplotlib.pyplot as plt
import torch
from digits import load_data, make_model
from torch import nn

from perexample import Extension, extend, perex


class Influence(Extension):
    """``p.influence[n] = <d loss_n / d p, reference>``, ``[N]``, for a reference gradient of each parameter."""

    field = "influence"

    def __init__(self, reference):
        self.reference = reference

    def compute(self, view):
        return view.grad_batch().reshape(view.n, -1) @ self.reference[view.name].flatten()


# %%
# Use it
# ------
#
# A network that has seen the training images for a while, and a test image that it gets wrong.

data = load_data()
model = extend(make_model("mlp", seed=0))
loss_fn = nn.CrossEntropyLoss()
optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
for _ in range(60):
    optimizer.zero_grad()
    loss_fn(model(data.x), data.y).backward()
    optimizer.step()

losses = nn.functional.cross_entropy(model(data.x_test), data.y_test, reduction="none")
hardest = int(losses.argmax())
image, label = data.x_test[hardest : hardest + 1], data.y_test[hardest : hardest + 1]
assert model(image).argmax() != label
names, params = zip(*model.named_parameters(), strict=True)
reference = dict(zip(names, torch.autograd.grad(loss_fn(model(image), label), params), strict=True))

with perex(Influence(reference), grad=False):
    loss_fn(model(data.x), data.y).backward()
influence = sum(p.influence for p in model.parameters())

# %%
# Verified against a loop
# -----------------------

for n in (0, 1, 2, 500, 1499):
    gradients = torch.autograd.grad(loss_fn(model(data.x[n : n + 1]), data.y[n : n + 1]), params)
    by_hand = sum((g * reference[name]).sum() for name, g in zip(names, gradients, strict=True))
    torch.testing.assert_close(influence[n], by_hand, atol=1e-5, rtol=1e-4)

# %%
# What helps, what harms
# ----------------------
#
# A step on an image with positive influence lowers the loss of the test image, one with negative influence raises it.

order = influence.argsort(descending=True)
figure, axes = plt.subplots(2, 6, figsize=(8, 3.4), layout="constrained")
for axis in axes.flat:
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)
for row, (word, chosen) in enumerate([("helps", order[:5]), ("harms", order.flip(0)[:5])]):
    axes[row, 0].imshow(image[0, 0], cmap="Blues" if row == 0 else "Reds")
    axes[row, 0].set_title(f"test image: a {int(label)}\nwhat {word}:", fontsize=9)
    for axis, n in zip(axes[row, 1:], chosen.tolist(), strict=True):
        axis.imshow(data.x[n, 0], cmap="gray_r")
        axis.set_title(f"{int(data.y[n])}", fontsize=9)
        axis.set_xlabel(f"{influence[n]:+.2g}", fontsize=8)
assert influence[order[0]] > 0 > influence[order[-1]]
plt.show()
