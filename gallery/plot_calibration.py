"""
Calibrating the noise
=====================

How much noise a privacy budget asks for, what a run has spent, and how many steps a budget allows, by two accountants:
privacy loss distributions (PLD, tight) and Rényi divergences (RDP, looser). Both give upper bounds of the
same epsilon. No training here: the accountant needs four public numbers.
"""

# %%
# From a budget to noise
# ----------------------
#
# Poisson samples at rate q = 0.02 (about 1000 of 50 000 examples), 2000 steps, delta 1e-5. ``noise_multiplier_for``
# gives the least standard deviation, in units of C, with which the run keeps within epsilon.

import matplotlib.pyplot as plt

from perexample.privacy import epsilon, noise_multiplier_for, steps_for

DELTA, RATE, STEPS = 1e-5, 0.02, 2000
ACCOUNTANTS = {"pld": "tab:blue", "rdp": "tab:orange"}

budgets = [1.0, 2.0, 4.0, 8.0]
noise = {}
for accountant in ACCOUNTANTS:
    run = {"sample_rate": RATE, "steps": STEPS, "accountant": accountant}
    noise[accountant] = [noise_multiplier_for(budget, DELTA, **run) for budget in budgets]
    for budget, sigma in zip(budgets, noise[accountant], strict=True):
        cost = epsilon(DELTA, noise_multiplier=sigma, **run)
        assert 0.98 * budget < cost <= budget  # never more than the target, and hardly less

print("epsilon   noise by PLD   by RDP")
for budget, tight, loose in zip(budgets, *noise.values(), strict=True):
    assert tight <= loose
    print(f"{budget:7}   {tight:12.2f}   {loose:6.2f}")

# %%
# From steps to epsilon
# ---------------------
#
# At a fixed noise multiplier of 1, epsilon grows more slowly than the number of steps, and RDP is always above. The
# first steps show it most: to become epsilon and delta, RDP pays ``log(1 / delta) / (order - 1)`` once, and orders that
# are large enough to make it small are costly with Poisson samples.

counts = [1, 3, 10, 30, 100, 300, 1000, 2000, 4000]
spent = {
    accountant: [
        epsilon(DELTA, noise_multiplier=1.0, sample_rate=RATE, steps=count, accountant=accountant) for count in counts
    ]
    for accountant in ACCOUNTANTS
}
assert all(tight <= loose for tight, loose in zip(*spent.values(), strict=True))

# %%
# From a budget to steps
# ----------------------
#
# What the tighter bound is worth: with the same noise and the same budget, more steps.

allowed = {
    accountant: [
        steps_for(budget, DELTA, noise_multiplier=1.0, sample_rate=RATE, accountant=accountant) for budget in budgets
    ]
    for accountant in ACCOUNTANTS
}
for budget, tight, loose in zip(budgets, *allowed.values(), strict=True):
    assert tight >= loose
    assert epsilon(DELTA, noise_multiplier=1.0, sample_rate=RATE, steps=tight) <= budget
    assert epsilon(DELTA, noise_multiplier=1.0, sample_rate=RATE, steps=tight + 1) > budget
    more = f"{tight / loose - 1:+.0%}" if loose else "RDP allows none"
    print(f"epsilon {budget:3}: {tight:5} steps by PLD, {loose:5} by RDP, {more}")

# %%
# All three
# ---------

figure, (first, second, third) = plt.subplots(1, 3, figsize=(8, 3.3), layout="constrained")
for accountant, color in ACCOUNTANTS.items():
    style = {"color": color, "marker": "o", "markersize": 4, "label": accountant.upper()}
    first.plot(budgets, noise[accountant], **style)
    second.plot(counts, spent[accountant], **style)
first.set(xscale="log", xlabel="target epsilon", ylabel="noise multiplier", ylim=(0, None))
first.set_title(f"noise for {STEPS} steps", fontsize=10)
second.set(xscale="log", yscale="log", xlabel="steps", ylabel="epsilon", ylim=(0.35, 12))
second.set_xticks([1, 10, 100, 1000], ["1", "10", "100", "1000"])
second.set_yticks([0.5, 1, 2, 5, 10], ["0.5", "1", "2", "5", "10"])
second.set_title("cost at noise multiplier 1", fontsize=10)
for shift, (accountant, color) in zip((-0.2, 0.2), ACCOUNTANTS.items(), strict=True):
    places = [place + shift for place in range(len(budgets))]
    third.bar(places, allowed[accountant], 0.4, color=color)
for place, (tight, loose) in enumerate(zip(*allowed.values(), strict=True)):
    third.annotate(
        f"{tight / loose - 1:+.0%}" if loose else "PLD only",
        (place, tight),
        xytext=(0, 2),
        textcoords="offset points",
        ha="center",
        fontsize=8,
    )
third.set(yscale="log", ylim=(0.8, 20000), xlabel="budget epsilon", ylabel="steps allowed")
third.set_xticks(range(len(budgets)), [f"{budget:g}" for budget in budgets])
third.set_title("steps at noise multiplier 1", fontsize=10)
first.set_xticks(budgets, [f"{budget:g}" for budget in budgets])
first.legend(frameon=False)
for axis in (first, second):
    axis.minorticks_off()
    axis.grid(alpha=0.3)
plt.show()

# %%
# Without Poisson sampling
# ------------------------
#
# ``sample_rate=None`` is a run whose batches are not Poisson samples, such as shuffled ones: every step counts as one
# that saw all examples. Amplification by sampling is what makes private training affordable.

sigma = noise["pld"][budgets.index(2.0)]
unamplified = epsilon(DELTA, noise_multiplier=sigma, sample_rate=None, steps=STEPS)
print(f"noise multiplier {sigma:.2f}, {STEPS} steps: epsilon 2 at q = {RATE}, {unamplified:.0f} without amplification")
needed = noise_multiplier_for(2.0, DELTA, sample_rate=None, steps=STEPS)
print(f"for epsilon 2 without amplification: noise multiplier {needed:.0f}")
assert needed > 10 * sigma
assert unamplified > 100
