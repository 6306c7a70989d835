"""Variance of per-example gradients."""

from torch import Tensor

from perexample.extension import Extension, ParameterView


class Variance(Extension):
    """Elementwise variance of the gradients of the examples' own losses within the batch.

    ``p.variance = 1/N sum_n (g_n - mean g)^2``, shape ``[*p.shape]``, unit (loss / parameter)^2, divided by N, not by
    N - 1; zeros for an empty batch. Each backward overwrites it.

    References:
        Dangel et al. 2020, arXiv:1912.10985, section 2.2.

    Example:
        >>> import torch
        >>> from perexample import extend, perex
        >>> layer = extend(torch.nn.Linear(1, 1, bias=False))
        >>> with perex(Variance()):
        ...     layer(torch.tensor([[1.0], [3.0]])).mean().backward()
        >>> layer.weight.variance
        tensor([[1.]])
    """

    field = "variance"

    def compute(self, view: ParameterView) -> Tensor:
        """From the gradients, centred first so that nothing cancels."""
        if view.n == 0:
            return view.zeros(*view.param.shape)
        return view.grad_batch().var(0, unbiased=False)
