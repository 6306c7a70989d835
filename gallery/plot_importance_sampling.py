"""
Importance sampling by gradient norm
====================================

Once most images are learnt, most gradients of a uniform batch are close to zero. Drawing each image with probability
proportional to its gradient norm, and dividing by that probability, estimates the same mean gradient with less
variance (`Zhao and Zhang 2015 <https://arxiv.org/abs/1401.2753>`_,
`Katharopoulos and Fleuret 2018 <https://arxiv.org/abs/1803.00942>`_).
"""

# %%
# The estimator
# -------------
#
# Let :math:`g_n` be the gradient of example n's loss, and :math:`G = \frac1N \sum_n g_n` what a step is to follow. For
# any probabilities :math:`p_n > 0`, one draw gives an unbiased estimate:
#
# .. math::
#
#    \hat g = \frac{g_n}{N p_n}, \qquad
#    \mathrm{E}\,\hat g = \sum_n p_n \frac{g_n}{N p_n} = G, \qquad
#    \mathrm{E}\,\lVert \hat g - G \rVert^2 = \sum_n \frac{\lVert g_n \rVert^2}{N^2 p_n} - \lVert G \rVert^2 .
#
# The mean of B draws has this variance divided by B. By the inequality of Cauchy and Schwarz it is least for
# :math:`p_n \propto \lVert g_n \rVert`:
#
# .. math::
#
#    V_\text{uniform} = \frac1N \sum_n \lVert g_n \rVert^2 - \lVert G \rVert^2, \qquad
#    V_\text{norm} = \left( \frac1N \sum_n \lVert g_n \rVert \right)^2 - \lVert G \rVert^2 .

import time

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from digits import accuracy, load_data, make_model

from perexample import extend, perex
from perexample.extensions import BatchL2Grad

data = load_data()
N, B = len(data.x), 32
model = extend(make_model("mlp", seed=0))


def gradient_norms(model):
    """``[N]``: the norm of every training image's gradient, from one backward that makes no gradients."""
    with perex(BatchL2Grad(), grad=False):
        F.cross_entropy(model(data.x), data.y).backward()
    return sum(p.batch_l2 for p in model.parameters()).double().sqrt()


def estimate(model, p, count=B):
    """The mean gradient, ``[P]``, estimated from ``count`` images drawn with probabilities p."""
    drawn = torch.multinomial(p, count, replacement=True, generator=source)
    losses = F.cross_entropy(model(data.x[drawn]), data.y[drawn], reduction="none")
    return gradient((losses / (N * p[drawn])).mean())


def gradient(loss):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]).double()


def variance(norms, p, mean):
    """The formula above, for one draw."""
    return ((norms**2 / p).sum() / N**2 - mean.square().sum()).item()


# %%
# Measured against the formula
# ----------------------------
#
# The network is trained with ordinary batches. At five stages many batches are drawn in both ways, and their mean
# squared distance from the gradient of all data is compared with the formula. The mean of all these batches must come
# to the gradient of all data: its squared distance from it is 1 on average, in units of what the variance allows.

source = torch.Generator().manual_seed(0)
uniform = torch.full((N,), 1 / N, dtype=torch.float64)
stages, batches = [0, 10, 30, 100, 300], 300
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def train(steps):
    for _ in range(steps):
        chosen = torch.randint(N, (B,), generator=source)
        optimizer.zero_grad()
        F.cross_entropy(model(data.x[chosen]), data.y[chosen]).backward()
        optimizer.step()


found, distribution = [], {}
for stage, before in zip(stages, [0, *stages], strict=False):
    train(stage - before)
    norms, mean = gradient_norms(model), gradient(F.cross_entropy(model(data.x), data.y))
    distribution[stage] = norms
    ways = {}
    for name, p in [("uniform", uniform), ("norm", norms / norms.sum())]:
        exact = variance(norms, p, mean) / B
        estimates = torch.stack([estimate(model, p) for _ in range(batches)])
        distances = (estimates - mean).square().sum(1)
        measured, error = distances.mean().item(), distances.std().item() / batches**0.5
        offset = (estimates.mean(0) - mean).square().sum().item() / (exact / batches)
        assert abs(measured - exact) < 4 * error, (stage, name, measured, exact, error)
        assert offset < 3, (stage, name, offset)
        ways[name] = exact, measured, error, offset
    found.append(ways)
    (u, mu, _, bu), (n, mn, _, bn) = ways["uniform"], ways["norm"]
    print(
        f"step {stage:3}: variance {u:.4f} (measured {mu:.4f}) uniform, {n:.4f} ({mn:.4f}) by norm, "
        f"ratio {u / n:5.2f}; offset of the mean {bu:.2f} and {bn:.2f}"
    )
share = 1 - (p.sort().values.cumsum(0) < 0.1).double().mean().item()
print(f"at the last stage nine of ten draws by norm are from {share:.0%} of the images")
print(f"test accuracy {accuracy(model, data.x_test, data.y_test):.1%}")

# %%
# Without the division by :math:`N p_n` the estimate would be of another gradient, dominated by the hardest images:

p = norms / norms.sum()
losses = F.cross_entropy(model(data.x), data.y, reduction="none")
biased = gradient((p * losses).sum())
offset = (biased - mean).square().sum().item() / (ways["norm"][0] / batches)
print(f"without weights the gradient is {biased.norm() / mean.norm():.0f} times as long, and the offset {offset:.0f}")
assert offset > 1000

# %%
# At the start all norms are alike, and nothing is gained. Later they spread over several orders of magnitude, and a
# uniform batch must be many times as large for the same variance.

ratios = [ways["uniform"][0] / ways["norm"][0] for ways in found]
measured = [ways["uniform"][1] / ways["norm"][1] for ways in found]
errors = [
    2 * m * sum((ways[name][2] / ways[name][1]) ** 2 for name in ways) ** 0.5
    for m, ways in zip(measured, found, strict=True)
]
figure, axes = plt.subplots(1, 2, figsize=(8, 3.4), layout="constrained")
places = range(len(stages))
axes[0].axhline(1, color="gray", linestyle=":")
axes[0].plot(places, ratios, color="tab:blue", label="formula")
axes[0].errorbar(places, measured, errors, fmt="o", color="tab:orange", capsize=3, label="measured, 2 standard errors")
axes[0].set(xticks=places, xticklabels=stages, xlabel="step of training", yscale="log", yticks=[1, 2, 5, 10, 20])
axes[0].set(ylabel="variance, uniform / by norm")
axes[0].yaxis.set_major_formatter("{x:g}")
axes[0].minorticks_off()
axes[0].legend(frameon=False)
bins = torch.logspace(-4, 2, 49).tolist()
for stage, color in [(0, "tab:gray"), (30, "tab:cyan"), (300, "tab:blue")]:
    axes[1].hist(distribution[stage], bins, histtype="stepfilled", alpha=0.6, color=color, label=f"step {stage}")
axes[1].set(xscale="log", yscale="log", xlabel="norm of an image's gradient", ylabel="images", ylim=(0.7, 2e3))
axes[1].legend(frameon=False, loc="upper left")
assert ratios[0] < 1.1
assert ratios[-1] > 5
plt.show()

# %%
# What the norms cost
# -------------------
#
# A pass over all data for the norms is as much work as :math:`N / B` steps, less the gradients of the weights that it
# need not make. To renew the norms for every step cannot pay. Norms of some steps ago may: the estimate is unbiased for
# any :math:`p_n > 0`, and only its variance grows. Images that were learnt, and no longer are, are then rarely drawn
# and get very large weights. Mixing in the uniform distribution bounds the weights, here by 2:
# :math:`p_n = \frac12 \lVert g_n \rVert / \sum_m \lVert g_m \rVert + \frac12 / N`.

ages = [0, 1, 2, 5, 10, 20, 50, 100, 200]
ways = ["uniform", "norms alone", "half uniform"]
relative = torch.zeros(len(ways), len(ages), dtype=torch.float64)  # variance in units of that of uniform batches
seconds = {"pass": 0.0, "step": 0.0}
for _ in range(8):
    started = time.perf_counter()
    old = gradient_norms(model)
    seconds["pass"] += time.perf_counter() - started
    by_norm = old / old.sum()
    for column, (age, before) in enumerate(zip(ages, [0, *ages], strict=False)):
        started = time.perf_counter()
        train(age - before)
        seconds["step"] += (time.perf_counter() - started) / ages[-1]
        norms, mean = gradient_norms(model), gradient(F.cross_entropy(model(data.x), data.y))
        for row, p in enumerate([uniform, by_norm, (by_norm + uniform) / 2]):
            relative[row, column] += variance(norms, p, mean) / variance(norms, uniform, mean) / 8
print(f"a pass for the norms takes {seconds['pass'] / 8 * 1e3:.1f} ms, a step {seconds['step'] / 8 * 1e3:.1f} ms")

# %%
# Norms renewed every k steps add :math:`N / (B k)` steps of work to each. The gain in variance over the k steps,
# divided by this work, is what is left. It bounds what training can gain: half the variance is not half the steps, and
# where a batch twice as large takes hardly more time, larger uniform batches are the simpler way. Katharopoulos and
# Fleuret avoid the pass: they draw from a few uniform batches, by a bound on the norm that the forward alone gives.
# Norms alone mostly have the smaller variance here; the mixture is for the steps in which they do not.

net = []
for i, k in enumerate(ages[1:], start=1):
    average = torch.trapezoid(relative[2, : i + 1], torch.tensor(ages[: i + 1])) / k
    net.append(1 / average.item() / (1 + N / (B * k)))
    print(f"norms every {k:3} steps: gain {1 / average:5.2f}, per unit of work {net[-1]:.2f}")

gains = 1 / relative
figure, axes = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
axes[0].plot(ages, gains[1], color="tab:gray", linestyle="--", marker="o", label=ways[1])
axes[0].plot(ages, gains[2], color="tab:blue", marker="o", label=ways[2])
axes[0].set(xlabel="age of the norms, steps", ylabel="variance, uniform / by old norms")
axes[0].legend(frameon=False)
axes[1].plot(ages[1:], net, color="tab:green", marker="o")
axes[1].set(xlabel="steps between passes for the norms", ylabel="the same, per unit of work")
for axis in axes:
    axis.axhline(1, color="gray", linestyle=":")
    axis.set_ylim(0, None)
assert net[0] < 0.5
assert max(net) > 1
plt.show()
