"""
First steps
===========

Per-example gradients, their norms, and their clipped sum, of a small network on real digit images.
"""

# %%
# A model and some data
# ---------------------
#
# ``extend`` registers a rule for each layer. The model stays the object it is.

import matplotlib.pyplot as plt
import torch
from digits import load_data, make_model
from torch import nn

from perexample import extend, perex, plan
from perexample.extensions import BatchGrad, BatchL2Grad, ClippedGrad

data = load_data()
model = extend(make_model("mlp", seed=0))
loss_fn = nn.CrossEntropyLoss()
print(plan(model))

# %%
# One backward, three quantities
# ------------------------------
#
# Inside ``perex`` the backward fills a field of every parameter for each extension. ``p.grad`` is there as well.

x, y = data.x[:256], data.y[:256]
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for _ in range(200):  # some ordinary training first, so that most images are learnt
    optimizer.zero_grad()
    loss_fn(model(data.x), data.y).backward()
    optimizer.step()
optimizer.zero_grad()

clipping = ClippedGrad(1.0)
with perex(BatchGrad(), BatchL2Grad(), clipping):
    loss_fn(model(x), y).backward()

for name, p in model.named_parameters():
    print(f"{name:10} grad_batch {list(p.grad_batch.shape)}, batch_l2 {list(p.batch_l2.shape)}", end=", ")
    print(f"clipped_sum {list(p.clipped_sum.shape)}")

# %%
# What they mean
# --------------
#
# Row n of ``grad_batch`` is the gradient of example n's own loss. Their mean is ``p.grad``, because the loss is a mean.
# ``batch_l2`` is the SQUARED norm of each row. The clipped sum shortens each example's gradient, taken over all
# parameters together, to at most 1.

for p in model.parameters():
    torch.testing.assert_close(p.grad_batch.mean(0), p.grad, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(p.grad_batch.flatten(1).square().sum(1), p.batch_l2, atol=1e-6, rtol=1e-4)

norms = sum(p.batch_l2 for p in model.parameters()).sqrt()
factors = (1.0 / norms).clamp(max=1.0)
for p in model.parameters():
    torch.testing.assert_close(torch.tensordot(factors, p.grad_batch, dims=1), p.clipped_sum, atol=1e-5, rtol=1e-4)
torch.testing.assert_close(clipping.norms.float(), norms, atol=1e-6, rtol=1e-4)

# %%
# One of them by hand, with one backward for one example:

(by_hand,) = torch.autograd.grad(loss_fn(model(x[7:8]), y[7:8]), [model[1].weight])
torch.testing.assert_close(model[1].weight.grad_batch[7], by_hand, atol=1e-6, rtol=1e-4)

# %%
# Which images still pull at the network?
# ---------------------------------------
#
# Most images have a short gradient. The few with a long one are the hard ones, and what clipping is about.

order = norms.argsort(descending=True)
figure = plt.figure(figsize=(8, 4), layout="constrained")
grid = figure.add_gridspec(2, 7, width_ratios=[2.2, 2.2, 0.2, 1, 1, 1, 1])
axis = figure.add_subplot(grid[:, :2])
axis.hist(norms, bins=40, color="tab:blue")
axis.axvline(1.0, color="tab:red", label="clipping bound C")
axis.set(xlabel="norm of the image's gradient", ylabel="images", yscale="log")
axis.legend()
for row, (title, chosen) in enumerate([("longest", order[:4]), ("shortest", order[-4:])]):
    for column, n in enumerate(chosen.tolist()):
        axis = figure.add_subplot(grid[row, 3 + column])
        axis.imshow(x[n, 0], cmap="gray_r")
        axis.set(xticks=[], yticks=[], xlabel=f"{norms[n]:.2g}")
        axis.set_title(f"{title}: {int(y[n])}" if column == 0 else f"{int(y[n])}", fontsize=9, loc="left")
assert norms[order[0]] > 10 * norms.median()
plt.show()
