"""
A rule for a new module
=======================

A rule is one short class: the per-example gradients of a module's own parameters. Here for a layer that scales and
shifts each feature, then verified.
"""

# %%
# The module
# ----------

import time

import matplotlib.pyplot as plt
import torch
from einops import reduce
from torch import nn

from perexample import CheckFailedError, Rule, check, extend, perex, plan, register_rule
from perexample.extensions import BatchL2Grad


class Affine(nn.Module):
    """``y = gain * x + shift``, feature by feature, for inputs ``[N, T, features]``."""

    def __init__(self, features):
        super().__init__()
        self.gain = nn.Parameter(torch.randn(features))
        self.shift = nn.Parameter(torch.zeros(features))

    def forward(self, x):
        return self.gain * x + self.shift


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), Affine(64), nn.Tanh(), nn.Linear(64, 5))


x, y = torch.randn(32, 16, 64), torch.randn(32, 16, 5)
print(plan(make_model()))

# %%
# Without a rule it is exact already: its operations are followed, and each that is given a parameter is differentiated
# by itself. A rule of its own is faster.


def seconds(model):
    """Median time of a backward with squared norms."""
    times = []
    for _ in range(15):
        loss = nn.functional.mse_loss(model(x), y)
        started = time.perf_counter()
        with perex(BatchL2Grad()):
            loss.backward()
        times.append(time.perf_counter() - started)
    return sorted(times)[7]


generic = seconds(extend(make_model()))

# %%
# The rule
# --------
#
# ``call.x`` is the input, ``[N, T, features]``, and ``g`` the gradient of the loss with respect to the output. The
# batch is on axis 0, and everything between it and the features is summed over, with ``reduce`` of einops:
# ``[N, features]`` for each parameter.


@register_rule(Affine)
class AffineRule(Rule):
    """Gain ``sum_t g_nt x_nt``, shift ``sum_t g_nt``."""

    def grad_batch(self, call, g):
        both = {
            "gain": reduce(g * call.x, "n ... d -> n d", "sum"),
            "shift": reduce(g, "n ... d -> n d", "sum"),
        }
        return {name: both[name] for name in call.params}  # frozen parameters are not asked for


print(plan(make_model()))
own = seconds(extend(make_model()))

# %%
# Is it right?
# ------------
#
# ``check`` compares with one backward per example in float64, and exchanges examples to see that none moves another.

report = check(make_model(), nn.MSELoss(), x[:6], y[:6])
print(report)
assert report.ok

# %%
# A wrong rule does not pass. This one leaves the input out of the gain's gradient:


@register_rule(Affine, overwrite=True)
class WrongRule(Rule):
    """Forgets the input."""

    def grad_batch(self, call, g):
        return {name: reduce(g, "n ... d -> n d", "sum") for name in call.params}


try:
    check(make_model(), nn.MSELoss(), x[:6], y[:6])
except CheckFailedError as error:
    print(error)
else:
    raise AssertionError("the wrong rule has passed")
register_rule(Affine, overwrite=True)(AffineRule)

# %%
# What it saves
# -------------

figure, axis = plt.subplots(figsize=(6, 2.2), layout="constrained")
bars = axis.barh(["no rule", "rule of its own"], [1e3 * generic, 1e3 * own], color=["tab:gray", "tab:blue"])
axis.bar_label(bars, fmt="%.1f ms", padding=4)
axis.set(xlabel="backward with BatchL2Grad, milliseconds", xlim=(0, 1.25e3 * max(generic, own)))
plt.show()
