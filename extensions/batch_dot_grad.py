"""Inner products of per-example gradients."""

from torch import Tensor

from perexample.extension import Extension, ParameterView


class BatchDotGrad(Extension):
    """Inner product of the gradients of each two examples, for each parameter by itself.

    ``p.batch_dot[n, m] = <d loss_n / d p, d loss_m / d p>``, shape ``[N, N]``, unit (loss / parameter)^2; its diagonal
    is ``batch_l2``. Each backward overwrites it.

    References:
        Dangel et al. 2020, arXiv:1912.10985, section 2.2.

    Example:
        >>> import torch
        >>> from perexample import extend, perex
        >>> layer = extend(torch.nn.Linear(1, 1, bias=False))
        >>> with perex(BatchDotGrad()):
        ...     layer(torch.tensor([[1.0], [3.0]])).mean().backward()
        >>> layer.weight.batch_dot
        tensor([[1., 3.],
                [3., 9.]])
    """

    field = "batch_dot"

    def compute(self, view: ParameterView) -> Tensor:
        """The view's inner products."""
        return view.batch_dot()

    def of_first(self, field: Tensor, n: int) -> Tensor:
        """Their rows and columns."""
        return field[:n, :n]
