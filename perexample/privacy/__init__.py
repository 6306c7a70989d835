"""Private training: Poisson sampling, noise, accounting, and one call for all of it."""

from .accounting import epsilon, epsilon_of, noise_multiplier_for, steps_for
from .batchnorm import replace_batchnorm
from .collate import EmptyBatches, split_batch
from .distributed import Processes
from .ledger import Ledger, Release
from .noise import Noise
from .optimizer import make_optimizer, privatize
from .prepare import make_private
from .private import Private
from .sampling import PhysicalBatches, PoissonBatchSampler

__all__ = [
    "EmptyBatches",
    "Ledger",
    "Noise",
    "PhysicalBatches",
    "PoissonBatchSampler",
    "Private",
    "Processes",
    "Release",
    "epsilon",
    "epsilon_of",
    "make_optimizer",
    "make_private",
    "noise_multiplier_for",
    "privatize",
    "replace_batchnorm",
    "split_batch",
    "steps_for",
]
