"""
Clipping in the plane
=====================

A model with two parameters, so that each example's gradient is an arrow. What three clip functions make of the arrows,
how far one example can move their sum, and the noise that hides it.
"""

# %%
# Two parameters, 24 examples
# ---------------------------
#
# A linear model and a squared loss. The gradient of example n is its residual times its input; a few
# arrows are long.

import matplotlib.pyplot as plt
import torch
from matplotlib.patches import Circle
from matplotlib.ticker import MultipleLocator
from torch import nn

from perexample import DP_SGD, extend, perex
from perexample.extensions import BatchGrad, ClippedGrad

C, SIGMA, N = 1.0, 1.5, 24
generator = torch.Generator().manual_seed(3)
x = torch.randn(N, 2, dtype=torch.float64, generator=generator)
y = x @ torch.tensor([1.0, 0.6], dtype=torch.float64) + torch.randn(N, dtype=torch.float64, generator=generator)
model = extend(nn.Linear(2, 1, bias=False, dtype=torch.float64))
weight = model.weight
START = torch.tensor([[0.5, 0.3]], dtype=torch.float64)
weight.data = START.clone()


def backward(*extensions, examples=slice(None)):
    """One backward, of all examples or of some."""
    with perex(*extensions, grad=False):
        ((model(x[examples]).squeeze(1) - y[examples]).square().mean() / 2).backward()


backward(BatchGrad())
arrows = weight.grad_batch.squeeze(1)
norms = arrows.norm(dim=1)
print(f"norms from {norms.min():.2f} to {norms.max():.2f}, {int((norms > C).sum())} of {N} above C = {C:g}")

# %%
# Three clip functions
# --------------------
#
# * ``"flat"``: the factor is :math:`\min(1, C / \lVert g_n \rVert)`. Long gradients are shortened to C, others stay.
# * ``"automatic"``: :math:`C / (\lVert g_n \rVert + 0.01)`. Every gradient gets nearly the length C, short ones too, so
#   that C is only a unit, as the learning rate is (`Bu et al. 2022 <https://arxiv.org/abs/2206.07136>`_).
# * ``"global"``: 1 up to C, else 0. Long gradients are dropped; those that stay keep their directions and ratios
#   (`Bu et al. 2021 <https://arxiv.org/abs/2106.07830>`_).
#
# The library forms the sums only. The arrows of one example are the sums of batches of one, and they add up to the sum
# of the whole batch.


def clipped_sum(clip, examples=slice(None)):
    """Sum of the clipped gradients of some examples."""
    backward(ClippedGrad(C, clip=clip), examples=examples)
    return weight.clipped_sum.flatten()


clipped, sums = {}, {}
for clip in ("flat", "automatic", "global"):
    clipped[clip] = torch.stack([clipped_sum(clip, slice(n, n + 1)) for n in range(N)])
    sums[clip] = clipped_sum(clip)
    assert (clipped[clip].norm(dim=1) <= C * (1 + 1e-9)).all()
    torch.testing.assert_close(sums[clip], clipped[clip].sum(0), atol=1e-9, rtol=1e-9)

factors = (C / norms).clamp(max=1).unsqueeze(1)
torch.testing.assert_close(clipped["flat"], factors * arrows, atol=1e-9, rtol=1e-9)

# %%
# Before in gray, after in color. A dot at the origin is a gradient that was dropped.


def draw(axis, ends, **style):
    """Arrows from the origin."""
    zeros = torch.zeros(len(ends))
    axis.quiver(zeros, zeros, ends[:, 0], ends[:, 1], angles="xy", scale_units="xy", scale=1, **style)


reach = 1.08 * arrows.abs().max().item()
figure, axes = plt.subplots(1, 3, figsize=(8, 3.1), sharex=True, sharey=True, layout="constrained")
colors = {"flat": "tab:blue", "automatic": "tab:green", "global": "tab:orange"}
for axis, (clip, after) in zip(axes, clipped.items(), strict=True):
    draw(axis, arrows, color="0.8", width=0.008)
    draw(axis, after, color=colors[clip], width=0.010)
    axis.add_patch(Circle((0, 0), C, fill=False, color="tab:red", linestyle="--", linewidth=1.2))
    axis.set(title=f'clip="{clip}"', xlabel="gradient of $w_1$", xlim=(-reach, reach), ylim=(-reach, reach))
    axis.set_aspect("equal")
    dropped = int((after.norm(dim=1) == 0).sum())
    if dropped:
        axis.plot(0, 0, "o", color=colors[clip], markersize=5)
        axis.text(0.97, 0.03, f"{dropped} dropped", ha="right", transform=axis.transAxes, fontsize=9)
axes[0].set_ylabel("gradient of $w_2$")
axes[0].text(0.97, 0.03, f"radius C = {C:g}", ha="right", transform=axes[0].transAxes, fontsize=9, color="tab:red")
plt.show()

# %%
# One example more or less
# ------------------------
#
# With every arrow within C, removing any one example moves the sum by at most C. That is the sensitivity, and it holds
# for all three.

without = {}
for clip, total in sums.items():
    rows = [clipped_sum(clip, [m for m in range(N) if m != n]) for n in range(N)]
    without[clip] = torch.stack(rows)
    moved = (without[clip] - total).norm(dim=1)
    print(f"{clip:9} one example moves the sum by {moved.min():.2f} to {moved.max():.2f}")
    assert (moved <= C * (1 + 1e-9)).all()
    assert ClippedGrad(C, clip=clip).sensitivity() == C
assert norms.max() > 2 * C  # what it would be without clipping

# %%
# The noise
# ---------
#
# A private step adds Gaussian noise of standard deviation ``noise_multiplier * C`` to each coordinate of the sum, once.
# With a learning rate of 1 and an expected batch size of 1 the step is the noisy sum itself. Here the same step is
# taken 200 times to see where the noise falls; the noise does not depend on the data. A real run takes each step once,
# and its generator is not known to anybody.


def noisy_sums(clip, count):
    """What a private optimizer makes of the same batch, again and again."""
    clipping = ClippedGrad(C, clip=clip)
    noise = torch.Generator().manual_seed(0)
    optimizer = DP_SGD(
        [weight], lr=1.0, clipping=clipping, noise_multiplier=SIGMA, expected_batch_size=1, generator=noise
    )
    found = []
    for _ in range(count):
        weight.data.copy_(START)
        backward(clipping)
        optimizer.step()
        found.append((START - weight.detach()).flatten())
    weight.data.copy_(START)
    return torch.stack(found)


angles = torch.linspace(0, 2 * torch.pi, 200, dtype=torch.float64)
ring = torch.stack([angles.cos(), angles.sin()], dim=1)
figure, axes = plt.subplots(1, 3, figsize=(8, 3.3), layout="constrained")
for axis, (clip, total) in zip(axes, sums.items(), strict=True):
    cloud = noisy_sums(clip, 200)
    spread = (cloud - total).square().mean().sqrt()
    assert abs(spread / (SIGMA * C) - 1) < 0.15
    axis.plot(*cloud.T, ".", color="0.8", markersize=3, label="noisy sums")
    axis.plot(*(total + C * ring).T, "--", color="tab:red", linewidth=1.2, label="radius C")
    axis.plot(*without[clip].T, ".", color=colors[clip], markersize=4, label="without one example")
    axis.plot(*total, "k+", markersize=9, label="sum of all")
    axis.plot(*cloud[0], "*", color="tab:purple", markersize=10, label="one noisy draw")
    (a, b), width = total.tolist(), 3 * SIGMA * C
    axis.set(title=f'clip="{clip}"', xlabel="sum, $w_1$", xlim=(a - width, a + width), ylim=(b - width, b + width))
    axis.set_aspect("equal")
    axis.xaxis.set_major_locator(MultipleLocator(2))
    axis.yaxis.set_major_locator(MultipleLocator(2))
axes[0].set_ylabel("sum, $w_2$")
handles, names = axes[0].get_legend_handles_labels()
figure.legend(handles, names, loc="outside lower center", ncols=5, frameon=False, fontsize=9, markerscale=1.3)
plt.show()

# %%
# All the sums without one example are within the red circle, and the noise is as wide as that or wider: from the noisy
# draw one cannot tell well which of the sums it came from. How well, over all steps of a training, is epsilon.
