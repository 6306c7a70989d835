"""Per-example gradients."""

from torch import Tensor

from perexample.extension import Extension, ParameterView


class BatchGrad(Extension):
    """Gradient of each example's own loss.

    ``p.grad_batch[n] = d loss_n / d p``, shape ``[N, *p.shape]``, unit loss / parameter, in at least float32. Not
    divided by N, whatever the reduction of the loss. Each backward overwrites it.

    Cost:
        N times the memory of the model.

    References:
        Goodfellow 2015, arXiv:1510.01799; Dangel et al. 2020, arXiv:1912.10985, section 2.2.

    Example:
        >>> import torch
        >>> from perexample import extend, perex
        >>> layer = extend(torch.nn.Linear(3, 2))
        >>> with perex(BatchGrad()):
        ...     layer(torch.ones(5, 3)).sum(1).mean().backward()
        >>> layer.weight.grad_batch.shape
        torch.Size([5, 2, 3])
    """

    field = "grad_batch"

    def compute(self, view: ParameterView) -> Tensor:
        """The view's gradients."""
        return view.grad_batch()

    def of_first(self, field: Tensor, n: int) -> Tensor:
        """Their rows."""
        return field[:n]
