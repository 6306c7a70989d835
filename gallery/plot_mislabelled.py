"""
Mislabelled images
==================

An image with a wrong label pulls at the network against all the others like it, so its gradient is long. Here the
norms of per-example gradients find labels that were changed, as in GraNd
(`Paul et al. 2021 <https://arxiv.org/abs/2107.07075>`_), and are compared with what the loss alone would say.
"""

# %%
# Labels that are wrong, and known to be
# --------------------------------------
#
# 75 of 1500 training labels, 5%, become one of the nine other digits.

import matplotlib.pyplot as plt
import torch
from digits import load_data, make_model
from sklearn.metrics import roc_auc_score
from torch import nn

from perexample import extend, perex
from perexample.extensions import BatchL2Grad

data = load_data()
loss_fn = nn.CrossEntropyLoss()
FLIPPED = 75


def flipped(seed):
    """Which labels are wrong, and all labels as they are given."""
    generator = torch.Generator().manual_seed(seed)
    wrong = torch.zeros(len(data.y), dtype=torch.bool)
    wrong[torch.randperm(len(data.y), generator=generator)[:FLIPPED]] = True
    shift = torch.randint(1, 10, data.y.shape, generator=generator)
    return wrong, torch.where(wrong, (data.y + shift) % 10, data.y)


# %%
# Short training, then one backward
# ---------------------------------
#
# The training is short on purpose: a network that has learnt the wrong labels by heart is no longer surprised by them.
# ``grad=False`` leaves no ``p.grad`` behind; only norms are wanted. ``batch_l2`` is the SQUARED norm of one parameter's
# gradient, so the norm over all parameters is the root of the sum.


def scores(labels, seed):
    """Each image's gradient norm, loss, and length of the prediction error."""
    model = extend(make_model("mlp", seed))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    for _ in range(80):
        optimizer.zero_grad()
        loss_fn(model(data.x), labels).backward()
        optimizer.step()
    with perex(BatchL2Grad(), grad=False):
        logits = model(data.x)
        loss_fn(logits, labels).backward()
    norms = sum(p.batch_l2 for p in model.parameters()).sqrt()
    losses = nn.functional.cross_entropy(logits.detach(), labels, reduction="none")
    errors = model[-1].bias.batch_l2.sqrt()
    by_hand = (logits.detach().softmax(1) - nn.functional.one_hot(labels, 10)).norm(dim=1)
    torch.testing.assert_close(errors, by_hand, atol=1e-5, rtol=1e-3)
    return {"gradient norm": norms, "loss": losses, "prediction error": errors}


# %%
# The third score comes for free: the gradient of the last layer's bias is the prediction minus the one-hot label, so
# ``batch_l2`` of that one parameter is the squared error of the prediction, known as EL2N. ``scores`` verifies that.
#
# How well do they find them?
# ---------------------------
#
# AUC is the probability that a wrong label ranks above a right one: 0.5 by chance. Precision is the share of wrong
# labels among the 75 images that rank highest: 5% by chance.

measured = {name: [] for name in ("gradient norm", "loss", "prediction error")}
for seed in (2, 1, 0):
    wrong, labels = flipped(seed)
    found = scores(labels, seed)
    for name, score in found.items():
        precision = wrong[score.topk(FLIPPED).indices].float().mean().item()
        measured[name].append((roc_auc_score(wrong, score), precision))
for name, runs in measured.items():
    auc, precision = torch.tensor(runs).mean(0).tolist()
    print(f"{name:17} AUC {auc:.4f}, precision among the top {FLIPPED} {precision:.0%}")
assert all(auc > 0.98 and precision > 0.8 for auc, precision in measured["gradient norm"])

# %%
# The loss does as well, and slightly better: here nobody needs gradients to find wrong labels. A norm weighs the error
# by the activations and by the layers behind it, which has nothing to do with labels. It is the right number where the
# question is what an example does to the parameters: how far it moves them, what clipping would take from it, how
# often to draw it.

assert abs(measured["gradient norm"][0][0] - measured["loss"][0][0]) < 0.02

# %%
# Norms of right and wrong labels
# -------------------------------
#
# The last of the three runs. On the right, the precision among the images that rank highest: the first ones are nearly
# all wrong.

norms = found["gradient norm"]
order = norms.argsort(descending=True)

figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.4), layout="constrained")
bins = torch.linspace(0, norms.max().item(), 40).tolist()
left.hist(norms[~wrong], bins=bins, color="tab:blue", alpha=0.7, label="right label")
left.hist(norms[wrong], bins=bins, color="tab:red", alpha=0.7, label="wrong label")
left.set(xlabel="norm of the image's gradient", ylabel="images", yscale="log")
left.legend(frameon=False)
ranks = torch.arange(1, 111)
for (name, score), color in zip(found.items(), ("tab:red", "black", "tab:gray"), strict=True):
    hits = wrong[score.argsort(descending=True)[:110]].cumsum(0)
    right.plot(ranks, hits / ranks, color=color, linestyle="-" if name == "gradient norm" else "--", label=name)
right.axvline(FLIPPED, color="gray", linestyle=":")
right.annotate("as many as\nare wrong", (FLIPPED, 0.62), xytext=(5, 0), textcoords="offset points", fontsize=9)
right.set(xlabel="images that rank highest", ylabel="share with a wrong label", xlim=(0, 110), ylim=(0.6, 1.02))
right.legend(frameon=False, loc="lower left")
plt.show()

# %%
# The longest gradients
# ---------------------
#
# The given label, and the true one where it differs.

figure, axes = plt.subplots(2, 8, figsize=(8, 2.9), layout="constrained")
for axis, n in zip(axes.flat, order[:16].tolist(), strict=True):
    axis.imshow(data.x[n, 0], cmap="gray_r")
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_color("tab:red" if wrong[n] else "tab:blue")
    axis.set_title(f"given: {labels[n]}", fontsize=9)
    axis.set_xlabel(f"true: {data.y[n]}", fontsize=9, color="tab:red" if wrong[n] else "tab:blue")
assert wrong[order[:16]].float().mean() > 0.8
plt.show()
