"""
Private training in two processes
=================================

Two processes train one model privately: each draws its share of every Poisson batch, clips its own images' gradients,
and the sums are added up, with noise that is drawn once. The page runs it, and compares it with one process.
"""

# %%
# The script
# ----------
#
# It is the same for one process and for several. What makes them several is ``torchrun``, and
# ``init_process_group`` before anything else; ``make_private`` finds the processes by itself.
#
# .. literalinclude:: ../../gallery/training/two_processes.py
#    :pyobject: main
#
# .. literalinclude:: ../../gallery/training/two_processes.py
#    :pyobject: train
#
# The seed makes batches repeatable, for the comparison below. Leave it out in a real run: the accountant counts on
# samples that nobody knows.

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import two_processes

from perexample.privacy import epsilon

# %%
# Run it
# ------
#
# From a shell: ``torchrun --standalone --nproc-per-node 2 two_processes.py FOLDER``. The same from Python:

folder = Path(tempfile.mkdtemp())
start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
environment = os.environ | {"OMP_NUM_THREADS": "1"}
subprocess.run([*start, two_processes.__file__, str(folder)], env=environment, check=True, timeout=120)

ranks = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]
for report in ranks:
    print(
        f"process {report['rank']} of {report['processes']}: {report['seconds']:.1f} s, accuracy "
        f"{report['accuracy'][-1]:.1%}, epsilon {report['epsilon']:.3f}, parameters {report['checksum'][:12]}"
    )

# %%
# One model, one epsilon
# ----------------------
#
# The parameters are the same in both to the last bit: sums are formed in one process and sent to the other. Epsilon is
# that of the plan, whatever the number of processes.

assert ranks[0]["checksum"] == ranks[1]["checksum"]
steps, multiplier = len(ranks[0]["pieces"]), ranks[0]["noise_multiplier"]
planned = epsilon(1e-4, noise_multiplier=multiplier, sample_rate=0.2, steps=40)
assert steps == 40
assert all(report["epsilon"] == planned <= 3.0 for report in ranks)

# %%
# One sample, noise once
# ----------------------
#
# With the same seed one process draws the same batches: they are those of the two together. What the first step has
# released, less the clipped sums of both processes, is its noise. It is as large as one noise: with one of each process
# it would be 1.41 times that.

_, report = two_processes.train()
shares = [[sum(pieces) for pieces in rank["pieces"]] for rank in ranks]
batches = [sum(pieces) for pieces in report["pieces"]]
assert [a + b for a, b in zip(*shares, strict=True)] == batches

sums = torch.tensor(ranks[0]["sums"]) + torch.tensor(ranks[1]["sums"])
size = ((torch.tensor(ranks[0]["released"]) - sums).std() / multiplier).item()
one = torch.tensor(report["released"]) - torch.tensor(report["sums"])
print(f"noise, in units of noise_multiplier C: two processes {size:.2f}, one {(one.std() / multiplier).item():.2f}")
assert ranks[0]["released"] == ranks[1]["released"]
assert abs(size - 1) < 0.1
torch.testing.assert_close(sums, torch.tensor(report["sums"]), rtol=1e-3, atol=1e-3)

# %%
# What the processes did
# ----------------------
#
# A share varies from step to step, as a Poisson sample does, and the two are independent of each other. Each is cut
# into pieces of at most 100 images, for memory; the processes need not have equally many pieces in a step.

figure, axes = plt.subplots(1, 2, figsize=(8, 3.4), layout="constrained")
x = range(1, steps + 1)
axes[0].bar(x, shares[0], width=1.0, color="tab:blue", alpha=0.85, label="process 0")
axes[0].bar(x, shares[1], width=1.0, bottom=shares[0], color="tab:orange", alpha=0.85, label="process 1")
axes[0].axhline(300, color="black", linestyle=":", label="expected batch size")
axes[0].set(xlabel="step", ylabel="images in the batch", xlim=(0.5, steps + 0.5), ylim=(0, 460))
axes[0].legend(frameon=False, ncols=2, fontsize=9)
axes[1].plot(ranks[0]["accuracy"], color="tab:green", linewidth=4, alpha=0.4, label="two processes")
axes[1].plot(report["accuracy"], color="black", linestyle="--", linewidth=1, label="one process")
axes[1].set(xlabel="step", ylabel="test accuracy", ylim=(0, 1))
axes[1].legend(frameon=False, loc="lower right")
assert ranks[0]["accuracy"][-1] > 0.85
plt.show()
