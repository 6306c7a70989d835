"""
DP-SGD on real digits
=====================

Differentially private training of a small convolutional network: every image's gradient is clipped to norm C, the
clipped gradients are added up, and Gaussian noise in proportion to C hides what any one of them contributed
(`Abadi et al. 2016 <https://arxiv.org/abs/1607.00133>`_).
"""

# %%
# The loop
# --------
#
# ``make_private`` calibrates the noise to the privacy budget (with Google's ``dp-accounting``), and makes a loader of
# Poisson samples: every image is in a batch with the same probability, by itself.
#
# .. literalinclude:: ../../gallery/training/digits.py
#    :pyobject: train_private
#    :start-at: private = make_private
#    :end-at: private.step()
#    :dedent: 4
#
# Three things to note:
#
# * The factor of an example is ``min(1, C / norm)``. Written the other way round, as ``norm / C``, it would leave long
#   gradients as they are, and nothing would bound what one image can do.
# * The noise is scaled by C, and drawn once per step: its standard deviation is ``noise_multiplier * C`` on the sum.
# * The sum is divided by the *expected* batch size, a public number. The size of the batch that was drawn is itself
#   private, and an empty batch still makes a step, of noise alone.

import matplotlib.pyplot as plt
import torch
from digits import accuracy, load_data, make_model, train_private

from perexample.privacy import epsilon

data = load_data()
model = make_model("cnn", seed=0)
history, private = train_private(model, data, epsilon=3.0, delta=1e-4)
print(private)
print(f"test accuracy {accuracy(model, data.x_test, data.y_test):.1%} at epsilon {private.epsilon():.2f}")
assert private.epsilon() <= 3.0
assert accuracy(model, data.x_test, data.y_test) > 0.88

# %%
# What happened
# -------------
#
# Loss and norms are those of the private images without noise. They are shown to learn from; a real run must not
# release them.

every = range(0, private.steps + 1, max(1, private.steps // 12))
settings = {"noise_multiplier": private.noise_multiplier, "sample_rate": private.sample_rate}
spent = [epsilon(private.delta, steps=t, **settings) for t in every]

figure, axes = plt.subplots(2, 2, figsize=(8, 6), layout="constrained")
axes[0, 0].plot(history.loss)
axes[0, 0].set(xlabel="step", ylabel="training loss", ylim=(0, None))
axes[0, 1].plot(history.accuracy, color="tab:green")
axes[0, 1].set(xlabel="step", ylabel="test accuracy", ylim=(0, 1))
axes[1, 0].plot(every, spent, marker="o", color="tab:purple")
axes[1, 0].axhline(3.0, color="gray", linestyle=":")
axes[1, 0].set(xlabel="step", ylabel=f"epsilon spent (delta {private.delta:g})", ylim=(0, None))
early, late = torch.cat(history.norms[:10]), torch.cat(history.norms[-10:])
bins = torch.linspace(0, float(early.quantile(0.99)), 40).tolist()
axes[1, 1].hist(early, bins=bins, alpha=0.7, label="first 10 steps")
axes[1, 1].hist(late, bins=bins, alpha=0.7, label="last 10 steps")
axes[1, 1].set_yscale("log")
axes[1, 1].axvline(private.clipping.max_norm, color="tab:red", label="C")
axes[1, 1].set(xlabel="norm of an image's gradient", ylabel="images")
axes[1, 1].legend()
plt.show()

# %%
# Accuracy against epsilon
# ------------------------
#
# The same training with other budgets, three times each: what changes between runs is the noise, the batches, and the
# first weights. Less privacy buys accuracy, up to that of training without noise.

budgets = [0.3, 1.0, 3.0, 10.0]
found = []
for budget in budgets:
    runs = []
    for seed in range(3):
        model = make_model("cnn", seed)
        _, private = train_private(model, data, epsilon=budget)
        assert private.epsilon() <= budget
        runs.append(accuracy(model, data.x_test, data.y_test))
    found.append(runs)
    print(f"epsilon {budget:4}: noise multiplier {private.noise_multiplier:5.2f}, accuracy {sum(runs) / 3:.1%}")

model = make_model("cnn", 0)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
for _ in range(100):
    optimizer.zero_grad()
    torch.nn.functional.cross_entropy(model(data.x), data.y).backward()
    optimizer.step()
plain = accuracy(model, data.x_test, data.y_test)

figure, axis = plt.subplots(figsize=(8, 3.4), layout="constrained")
axis.axhline(plain, color="gray", linestyle=":", label="without privacy")
axis.plot(budgets, [sum(runs) / 3 for runs in found], color="tab:blue", label="mean of three runs")
for budget, runs in zip(budgets, found, strict=True):
    axis.plot([budget] * 3, runs, "o", color="tab:blue", alpha=0.5)
axis.set(xscale="log", xticks=budgets, xlabel="epsilon (delta 0.0001)", ylabel="test accuracy")
axis.set_xticklabels([f"{budget:g}" for budget in budgets])
axis.minorticks_off()
axis.legend(frameon=False)
assert sum(found[0]) < sum(found[-1])
plt.show()
