"""The extensions that come with the library, one file each."""

if __name__ != "perexample.extensions":
    raise ImportError(
        "Import perexample.extensions instead of extensions; this folder is a part of the package perexample."
    )

from .adaptive_clipped_grad import AdaptiveClippedGrad
from .batch_dot_grad import BatchDotGrad
from .batch_grad import BatchGrad
from .batch_l2_grad import BatchL2Grad
from .clip import Automatic, Clip, Flat, Global
from .clipped_grad import ClippedGrad
from .sum_grad_squared import SumGradSquared
from .variance import Variance

__all__ = [
    "AdaptiveClippedGrad",
    "Automatic",
    "BatchDotGrad",
    "BatchGrad",
    "BatchL2Grad",
    "Clip",
    "ClippedGrad",
    "Flat",
    "Global",
    "SumGradSquared",
    "Variance",
]
