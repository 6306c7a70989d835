"""Run by .ci/run on an ordinary (wheel) install, from a directory without the sources."""

import importlib.util
import pathlib

import torch
from torch import nn

import perexample
from perexample import DP_SGD, extend, perex
from perexample.extensions import BatchGrad, ClippedGrad
from perexample.privacy import PhysicalBatches, PoissonBatchSampler

assert "site-packages" in perexample.__file__, perexample.__file__
assert importlib.util.find_spec("extensions") is None, "the folder extensions must not be a package of its own"
assert (pathlib.Path(perexample.__file__).parent / "py.typed").exists()

model, clipping = extend(nn.Linear(3, 2)), ClippedGrad(1.0)
optimizer = DP_SGD(model.parameters(), lr=0.1, clipping=clipping, noise_multiplier=1.0, expected_batch_size=4)
with perex(BatchGrad(), clipping, grad=False):
    model(torch.randn(4, 3)).square().sum(1).mean().backward()
optimizer.step()
assert importlib.util.find_spec("dp_accounting") is None, "an extra, which only epsilon needs"
assert optimizer.ledger.steps == 1
batches = list(PhysicalBatches(PoissonBatchSampler(20, 0.5, steps=4), 3))
assert all(len(batch) <= 3 for batch in batches)
message = ""
try:
    optimizer.ledger.epsilon(1e-5)
except ImportError as error:
    message = str(error)
assert "pip install dp-accounting" in message
print("installed:", perexample.__version__, model.weight.grad_batch.shape)
