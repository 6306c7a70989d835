"""
DP-SGD on real digits
=====================

Differentially private training of a small convolutional network: every image's gradient is clipped to norm C, the
clipped gradients are added up, and Gaussian noise in proportion to C hides what any one of them contributed
(`Abadi et al. 2016 <https://arxiv.org/abs/1607.00133>`_).
"""

# %%
# The network is the small CNN of BackPACK's example of DP-SGD, with tanh in the place of ReLU; the 8x8 pixels are
# scaled up to the 28x28 that it is made for.
#
# The parts
# ---------
#
# Data and network are those of the training script, ``gallery/training/digits.py``. ``make_private`` calibrates the
# noise to the privacy budget (with Google's ``dp-accounting``), and makes a loader of Poisson samples: every image is
# in a batch with the same probability, by itself.

import matplotlib.pyplot as plt
import torch
from digits import accuracy, load_data, make_model, parse_arguments, train_private

from perexample.privacy import epsilon

options = parse_arguments(["--lr", "1"])
data = load_data()

# %%
# The loop
# --------
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

model = make_model("cnn28", seed=0)
history, private = train_private(model, data, options)
print(private)
print(f"test accuracy {accuracy(model, data.x_test, data.y_test):.1%} at epsilon {private.epsilon():.2f}")
assert private.epsilon() <= options.epsilon
assert accuracy(model, data.x_test, data.y_test) > 0.85

# %%
# What happened
# -------------
#
# Loss and norms are those of the private images without noise. They are shown to learn from; a real run must not
# release them.

every = range(0, private.steps + 1, max(1, private.steps // 12))
settings = {"noise_multiplier": private.noise_multiplier, "sample_rate": private.sample_rate}
spent = [epsilon(options.delta, steps=t, **settings) for t in every]

figure, axes = plt.subplots(2, 2, figsize=(8, 6), layout="constrained")
axes[0, 0].plot(history.loss)
axes[0, 0].set(xlabel="step", ylabel="training loss", ylim=(0, None))
axes[0, 1].plot(history.accuracy, color="tab:green")
axes[0, 1].set(xlabel="step", ylabel="test accuracy", ylim=(0, 1))
axes[1, 0].plot(every, spent, marker="o", color="tab:purple")
axes[1, 0].axhline(options.epsilon, color="gray", linestyle=":")
label = f"epsilon spent (delta {options.delta:g})"
axes[1, 0].set(xlabel="step", ylabel=label, ylim=(0, None))
early, late = torch.cat(history.norms[:10]), torch.cat(history.norms[-10:])
bins = torch.linspace(0, float(early.quantile(0.99)), 40).tolist()
axes[1, 1].hist(early, bins=bins, alpha=0.7, label="first 10 steps")
axes[1, 1].hist(late, bins=bins, alpha=0.7, label="last 10 steps")
axes[1, 1].set_yscale("log")
axes[1, 1].axvline(options.max_norm, color="tab:red", label="C")
axes[1, 1].set(xlabel="norm of an image's gradient", ylabel="images")
axes[1, 1].legend()
plt.show()
