"""
Physical batches
================

DP-SGD likes large batches, and a Poisson batch may be any size. ``physical_batch_size`` cuts each batch into pieces
that fit into memory: clipped sums add up over the pieces, and only the last piece takes a step. Here the memory and the
time of several piece sizes, and that they compute the same.
"""

# %%
# How it is used
# --------------
#
# .. code-block:: python
#
#    private = make_private(model, optimizer, dataset, ..., batch_size=750, physical_batch_size=128)
#    for x, y in private:        # pieces of at most 128 images
#        with private:
#            F.cross_entropy(model(x), y).backward()
#        if private.step():      # true at the last piece of a batch
#            scheduler.step()
#
# By hand it is ``PhysicalBatches(sampler, 128)`` in place of the ``PoissonBatchSampler``, for the ``DataLoader`` and
# for ``privatize(sampler=...)`` both. Privacy is accounted for the Poisson batch, whatever it is cut into.

import json
import tempfile
import time
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from digits import load_data, make_model
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import TensorDataset

from perexample import extend, perex
from perexample.extensions import ClippedGrad
from perexample.privacy import PhysicalBatches, PoissonBatchSampler, make_private

digits = load_data()
x, y = digits.x.double(), digits.y
loss_fn = nn.CrossEntropyLoss()

# %%
# One Poisson batch, cut in several ways
# --------------------------------------
#
# Samplers with equal generators draw equal batches. That is for comparisons like this one: a generator that is known
# voids amplification.


def pieces_of(size):
    """The same logical batch of about 750 images, in pieces."""
    sampler = PoissonBatchSampler(len(x), 0.5, steps=1, generator=torch.Generator().manual_seed(0))
    return list(PhysicalBatches(sampler, size))


for size in (128, 256, 1500):
    print(f"at most {size}: {[len(piece) for piece in pieces_of(size)]}")

# %%
# Peak memory
# -----------
#
# ``torch.profiler`` sees each allocation and each release of a tensor on the CPU, temporary ones inside of operations
# included. Their running total, at its highest, is the peak over what was there before: activations, gradients of
# activations, and the sums. On a GPU ``torch.cuda.max_memory_allocated`` tells the same.


def peak_of(action):
    """Most bytes that an action held at once."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        action()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        run.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    changes = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e["name"] == "[memory]")
    return torch.tensor([change for _, change in changes]).cumsum(0).max().item()


assert 4e6 <= peak_of(lambda: torch.ones(1000, 500, dtype=torch.float64).sum()) < 4.1e6

# %%
# Measured
# --------
#
# The model is in float64, so that equal sums look equal: the order of additions is all that differs.

model = extend(make_model("cnn", seed=0).double())


def clipped_sums(pieces):
    """Clipped sums of a logical batch, added up over its pieces."""
    clipping = ClippedGrad(0.5)
    for piece in pieces:
        with perex(clipping, grad=False):
            loss_fn(model(x[piece]), y[piece]).backward()
    assert clipping.examples == sum(len(piece) for piece in pieces)
    return [p.clipped_sum.clone() for p in model.parameters()]


def seconds_of(pieces):
    """How long a logical batch takes."""
    start = time.perf_counter()
    clipped_sums(pieces)
    return time.perf_counter() - start


sizes = [16, 32, 64, 128, 256, 1500]
sums, seconds, peaks = {}, [], []
for size in sizes:
    pieces = pieces_of(size)
    sums[size] = clipped_sums(pieces)  # the first time also tries ways to the sums
    seconds.append(min(seconds_of(pieces) for _ in range(3)))
    peaks.append(peak_of(lambda pieces=pieces: clipped_sums(pieces)) / 2**20)
    print(f"at most {size:4}: {len(pieces):3} pieces, peak {peaks[-1]:6.2f} MiB, {1000 * seconds[-1]:4.0f} ms")
for size in sizes:
    for ours, whole in zip(sums[size], sums[1500], strict=True):
        torch.testing.assert_close(ours, whole, atol=1e-9, rtol=1e-9)
assert peaks == sorted(peaks)
assert peaks[-1] > 10 * peaks[sizes.index(32)]

# %%
# Memory grows about in proportion to the piece: it is that of activations. Time hardly changes while pieces are large,
# and rises where they are so small that each backward's own overhead shows. So choose the largest piece that fits.

drawn = len(pieces_of(1500)[0])
ticks = [*sizes[:-1], drawn]
figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.4), layout="constrained")
left.plot(ticks, peaks, "o-", color="tab:blue")
left.set(ylabel="peak memory, MiB", yscale="log")
left.set_yticks([1, 3, 10, 30], ["1", "3", "10", "30"])
right.plot(ticks, [1000 * s for s in seconds], "o-", color="tab:orange")
right.set(ylabel="time of the logical batch, ms", ylim=(0, None))
for axis in (left, right):
    axis.set(xlabel="physical batch size")
    axis.set_xscale("log", base=2)
    axis.minorticks_off()
    axis.set_xticks(ticks, [*map(str, sizes[:-1]), f"{drawn}\n(whole)"])
    axis.grid(alpha=0.3)
plt.show()

# %%
# Only the last piece takes a step
# --------------------------------
#
# A private training in pieces of 200: ``step`` tells whether it was one. Parameters stay as they are until then.


def train(size, noise_multiplier=1.0):
    """Three private steps on batches that repeat; also what each call of ``step`` returned."""
    model = make_model("cnn", seed=0).double()
    private = make_private(
        model,
        torch.optim.SGD(model.parameters(), lr=1.0),
        TensorDataset(x, y),
        noise_multiplier=noise_multiplier,
        target_delta=1e-4,
        steps=3,
        batch_size=750,
        public_size=1500,
        max_norm=1.0,
        physical_batch_size=size,
        sampling_generator=torch.Generator().manual_seed(0),
    )
    calls = []
    for images, labels in private:
        before = model[0].weight.detach().clone()
        with private:
            loss_fn(model(images), labels).backward()
        stepped = private.step()
        assert stepped != torch.equal(model[0].weight, before)
        calls.append((len(images), stepped))
    return calls, [p.detach() for p in model.parameters()], private.epsilon()


calls, _, spent = train(200)
print("  ".join(f"{size}{' STEP' if stepped else ''}" for size, stepped in calls))
assert [stepped for _, stepped in calls].count(True) == 3

# %%
# Whole batches cost the same epsilon, as noise is drawn once for a step. Without noise, for the sake of the comparison,
# they give the same parameters.

whole_calls, _, whole_spent = train(1500)
assert len(whole_calls) == 3
assert spent == whole_spent
for ours, theirs in zip(train(200, 0.0)[1], train(1500, 0.0)[1], strict=True):
    torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-9)
print(f"{len(calls)} pieces or {len(whole_calls)}: the same model, epsilon {spent:.2f}")
