"""Second moment of per-example gradients."""

from torch import Tensor

from perexample.extension import Extension, ParameterView


class SumGradSquared(Extension):
    """Elementwise sum of the squared gradients of the examples' own losses.

    ``p.sum_grad_squared = sum_n (d loss_n / d p)^2``, shape ``[*p.shape]``, unit (loss / parameter)^2: a sum, not a
    mean. Each backward overwrites it.

    References:
        Dangel et al. 2020, arXiv:1912.10985, section 2.2.

    Example:
        >>> import torch
        >>> from perexample import extend, perex
        >>> layer = extend(torch.nn.Linear(3, 2))
        >>> with perex(SumGradSquared()):
        ...     layer(torch.ones(5, 3)).sum(1).mean().backward()
        >>> layer.bias.sum_grad_squared
        tensor([5., 5.])
    """

    field = "sum_grad_squared"

    def compute(self, view: ParameterView) -> Tensor:
        """From the gradients."""
        return view.grad_batch().square().sum(0)

    def of_first(self, field: Tensor, n: int) -> Tensor:
        """The others have added zeros."""
        return field
