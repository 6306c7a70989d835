"""
The gradient noise scale
========================

How large should a batch be? The noise scale of `McCandlish et al. 2018 <https://arxiv.org/abs/1812.06162>`_ says from
which batch size on more examples hardly make the gradient better. Per-example norms and the mean gradient of one
batch, both from one backward, are enough to estimate it.
"""

# %%
# Definition and estimator
# ------------------------
#
# Let :math:`G` be the mean gradient of all data and :math:`\Sigma` the covariance of the per-example gradients
# :math:`g_n`. The gradient of a batch of B examples, drawn independently, has the variance
# :math:`\mathrm{tr}(\Sigma) / B`. It equals the squared length of what is estimated at the batch size
#
# .. math::
#
#    B_\text{simple} = \frac{\mathrm{tr}(\Sigma)}{\lVert G \rVert^2} .
#
# For a batch of B examples let :math:`m = \frac1B \sum_n \lVert g_n \rVert^2`, and :math:`q` the squared norm of the
# mean gradient. Since :math:`\mathrm{E}\,m = \lVert G \rVert^2 + \mathrm{tr}(\Sigma)` and
# :math:`\mathrm{E}\,q = \lVert G \rVert^2 + \mathrm{tr}(\Sigma) / B`, both parts have unbiased estimators (appendix A.1
# of the paper, with a small batch of 1):
#
# .. math::
#
#    \widehat{\mathrm{tr}(\Sigma)} = \frac{B}{B - 1} (m - q), \qquad
#    \widehat{\lVert G \rVert^2} = \frac{B q - m}{B - 1} .
#
# Their ratio is not unbiased, and the second can be negative: average each over steps first, and divide then.

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from digits import accuracy, load_data, make_model

from perexample import extend, perex
from perexample.extensions import BatchL2Grad

data = load_data()
N = len(data.x)
model = extend(make_model("mlp", seed=0))
source = torch.Generator().manual_seed(0)


def moments(x, y):
    """m and q of a batch; its gradient is left in ``p.grad``."""
    model.zero_grad()
    with perex(BatchL2Grad()):
        F.cross_entropy(model(x), y).backward()
    m = sum(p.batch_l2.double().mean() for p in model.parameters())
    q = sum(p.grad.double().square().sum() for p in model.parameters())
    return torch.stack([m, q])


def exact():
    """tr(Sigma) and squared length of G, of all data."""
    m, q = moments(data.x, data.y)
    return torch.stack([m - q, q])


def estimated(x, y):
    """The same two, unbiased, from one batch."""
    (m, q), count = moments(x, y), len(x)
    return torch.stack([count / (count - 1) * (m - q), (count * q - m) / (count - 1)])


def draw(count):
    chosen = torch.randint(N, (count,), generator=source)
    return data.x[chosen], data.y[chosen]


# %%
# Over training
# -------------
#
# Batches of 256, and in each step the norms, in the backward that training makes anyway. The estimates are averaged
# over about 20 steps; every tenth step all data tell the true value.

BATCH, STEPS, DECAY = 256, 300, 0.95
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
average, weight = torch.zeros(2, dtype=torch.float64), 0.0
single, smooth, true, scores, stages = [], [], {}, {}, {}
for step in range(STEPS):
    if step in (40, 200):
        stages[step] = {name: value.clone() for name, value in model.state_dict().items()}
    if step % 10 == 0:
        trace, length = exact()
        true[step], scores[step] = (trace / length).item(), accuracy(model, data.x_test, data.y_test)
    now = estimated(*draw(BATCH))
    optimizer.step()
    average, weight = DECAY * average + (1 - DECAY) * now, DECAY * weight + 1 - DECAY
    single.append((now[0] / now[1]).item() if now[1] > 0 else float("nan"))
    smooth.append((average[0] / average[1]).item())

ratios = torch.tensor([smooth[step] / true[step] for step in true])
print(f"noise scale {true[0]:.0f} at first, {true[290]:.0f} in the end; accuracy {scores[290]:.1%}")
print(f"smoothed estimate / true value: {ratios.min():.2f} to {ratios.max():.2f}, median {ratios.median():.2f}")
figure, axis = plt.subplots(figsize=(8, 3.4), layout="constrained")
axis.plot(single, ".", color="tab:gray", alpha=0.5, markersize=4, label="one batch of 256")
axis.plot(smooth, color="tab:blue", label="averaged over about 20 steps")
axis.plot(true.keys(), true.values(), "o", color="tab:orange", markersize=4, label="all data")
axis.axhline(BATCH, color="gray", linestyle=":")
axis.set(xlabel="step", ylabel="noise scale, examples", yscale="log", ylim=(20, 5e4))
axis.text(2, 1.1 * BATCH, "batch size", color="gray", fontsize=9)
axis.legend(frameon=False, loc="upper left", ncols=3)
assert 0.6 < ratios.median() < 1.5
assert true[290] > 3 * true[0]
plt.show()

# %%
# At first a few dozen examples tell where to go, in the end hundreds or thousands do not: the mean gradient becomes
# shorter, the gradients of the hard images do not. A single batch that is much smaller than the noise scale says little
# about it, since it hardly sees the mean gradient. The average says more, and follows with a delay.
#
# Is the variance tr(Sigma) / B?
# ------------------------------
#
# At two of these stages, batches of several sizes are drawn, 200 of each. The mean squared distance of their gradients
# from that of all data is compared with the definition. Where it meets the squared length of the mean gradient is the
# noise scale.

sizes, repeats = [1, 4, 16, 64, 256, 1024], 200
figure, axes = plt.subplots(1, 2, figsize=(8, 3.6), layout="constrained", sharey=True)
for axis, (step, state) in zip(axes, stages.items(), strict=True):
    model.load_state_dict(state)
    trace, length = (value.item() for value in exact())
    mean = [p.grad.clone() for p in model.parameters()]
    for size in sizes:
        distances, estimates = [], []
        for _ in range(repeats):
            x, y = draw(size)
            if size == BATCH:
                estimates.append(estimated(x, y))
            else:
                model.zero_grad()
                F.cross_entropy(model(x), y).backward()
            pairs = zip(model.parameters(), mean, strict=True)
            distances.append(sum((p.grad - g).square().sum() for p, g in pairs))
        distances = torch.stack(distances).double()
        measured, error = distances.mean().item(), distances.std().item() / repeats**0.5
        assert abs(measured - trace / size) < 4 * error, (step, size, measured, trace / size, error)
        axis.errorbar(size, measured, 2 * error, fmt="o", color="tab:orange", capsize=3)
        if size == BATCH:
            one_batch = torch.stack(estimates)
    axis.plot(sizes, [trace / size for size in sizes], color="tab:blue", label="tr(Sigma) / B")
    axis.axhline(length, color="tab:green", linestyle="--", label="squared length of G")
    axis.axvline(trace / length, color="gray", linestyle=":", label=f"noise scale, {trace / length:.0f}")
    axis.set(xscale="log", yscale="log", xlabel="batch size B", ylim=(3e-4, 60), title=f"step {step}")
    axis.legend(frameon=False, fontsize=9, loc="lower left")

    # What one batch of 256 says, 200 times: unbiased, and with this spread.
    truth, spread = torch.tensor([trace, length], dtype=torch.float64), one_batch.std(0)
    assert ((one_batch.mean(0) - truth).abs() < 4 * spread / repeats**0.5).all()
    within = ((one_batch - truth).abs() < 2 * spread).double().mean(0)
    assert (within > 0.9).all()
    pooled = one_batch.mean(0)
    print(
        f"step {step}: one batch of 256 gives tr(Sigma) {trace:.1f} +- {2 * spread[0]:.1f} and the squared length "
        f"{length:.3f} +- {2 * spread[1]:.3f} in {within.min():.0%} of all cases; noise scale "
        f"{trace / length:.0f}, from the mean of 200 batches {pooled[0] / pooled[1]:.0f}"
    )
    assert abs(pooled[0] / pooled[1] / (trace / length) - 1) < 0.25
axes[0].set_ylabel("variance of the batch's gradient")
axes[0].errorbar([], [], [], fmt="o", color="tab:orange", capsize=3, label="measured, 2 standard errors")
axes[0].legend(frameon=False, fontsize=9, loc="lower left")
plt.show()
