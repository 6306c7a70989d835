"""Squared norms of per-example gradients."""

import torch
from torch import Tensor

from perexample.extension import Extension, ParameterView


class BatchL2Grad(Extension):
    """SQUARED L2 norm of each example's gradient, for each parameter by itself.

    ``p.batch_l2[n] = ||d loss_n / d p||^2``, shape ``[N]``, unit (loss / parameter)^2, in at least float32; squares
    above 3e38 are infinite in float32. Each backward overwrites it. The squared norm over the whole model is the sum
    over its parameters.

    Cost:
        Gradients are not kept, and not even formed where Gram matrices are cheaper.

    References:
        Goodfellow 2015, arXiv:1510.01799, section 4; Dangel et al. 2020, arXiv:1912.10985, section 2.2.

    Example:
        >>> import torch
        >>> from perexample import extend, perex
        >>> layer = extend(torch.nn.Linear(3, 2))
        >>> with perex(BatchL2Grad()):
        ...     layer(torch.ones(5, 3)).sum(1).mean().backward()
        >>> layer.weight.batch_l2.round()
        tensor([6., 6., 6., 6., 6.])
    """

    field = "batch_l2"

    def compute(self, view: ParameterView) -> Tensor:
        """The view's squared norms, in the parameter's precision."""
        return view.batch_l2().to(torch.promote_types(view.param.dtype, torch.float32))

    def of_first(self, field: Tensor, n: int) -> Tensor:
        """Their rows."""
        return field[:n]
