"""The steps of recurrent layers: what each kind computes in one, and its derivatives."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .unrolled import State, Trace, Unrolled, first_of

_through_sigmoid = torch.ops.aten.sigmoid_backward.grad_input  # of a gradient and the output: g y (1 - y)
_through_tanh = torch.ops.aten.tanh_backward.grad_input  # g (1 - y^2)


class Tanh(Unrolled):
    """``h' = tanh(a + b)``."""

    gates = blocks = 1

    def _prepared(self) -> Tensor:
        self._keep()
        self.a = self.out.unsqueeze(1)
        return self.a

    def _views(self) -> list[tuple[Tensor, ...]]:
        return self._each(self.out)

    def _step(self, h: Tensor, *views: Tensor) -> Tensor:
        return views[0].tanh_()

    def kept(self) -> list[Tensor]:
        """The outputs."""
        return [self.hidden.whole]

    def _restore(self, kept: Iterator[Tensor]) -> None:
        self._keep(next(kept))

    def _keep(self, whole: Tensor | None = None) -> None:
        self.hidden = Trace(self, self.h, whole)
        self.out = self.hidden.after

    def _slopes(self, into: Tensor, place: slice) -> list[Tensor]:
        return [_through_tanh(torch.ones_like(self.out[place]), self.out[place], grad_input=into[:, :, 0])]

    def _back(self, d: Tensor, *views: Tensor) -> bool:
        views[0].mul_(d)
        return False


class Relu(Tanh):
    """``h' = max(a + b, 0)``."""

    def _step(self, h: Tensor, *views: Tensor) -> Tensor:
        return views[0].relu_()

    def _slopes(self, into: Tensor, place: slice) -> list[Tensor]:
        return [into[:, :, 0].copy_(self.out[place] > 0)]


class LSTM(Unrolled):
    """``c' = f c + i g`` and ``h' = o tanh(c')``; blocks are i, f, g, o."""

    gates = blocks = 4

    def _prepared(self) -> Tensor:
        self.a, self.cells, self.hidden = self._blocks(4), Trace(self, self.c), Trace(self, self.h)
        self.out = self.hidden.after if self.w_hr is None else self._filled()
        return self.a

    def _views(self) -> list[tuple[Tensor, ...]]:
        i, f, g, o = self.a.unbind(1)
        both = self._each(self.a[:, :2], axis=1)
        rest = self._each(i, f, g, o, self.cells.after, self.out)
        return [(*x, *y) for x, y in zip(both, rest, strict=True)]

    def _run(self, into: Tensor) -> None:
        self.state_c = State(self.c, self.active is None)
        super()._run(into)
        self.last.append(self.state_c.now)

    def _step(self, h: Tensor, *views: Tensor) -> Tensor:
        i_f, i, f, g, o, cell, out = views
        i_f.sigmoid_()
        g.tanh_()
        o.sigmoid_()
        torch.mul(f, self.state_c.before(len(f)), out=cell)
        cell.addcmul_(i, g)
        self.state_c.after(cell)
        return torch.mul(o, cell.tanh(), out=out)

    def _traces(self) -> list[Trace]:
        return [self.cells]

    def kept(self) -> list[Tensor]:
        """Gates, cell states, results, and what was projected to these."""
        return [self.a, self.cells.whole, self.hidden.whole, *([] if self.w_hr is None else [self.out])]

    def _restore(self, kept: Iterator[Tensor]) -> None:
        self.a = next(kept)
        self.cells, self.hidden = Trace(self, self.c, next(kept)), Trace(self, self.h, next(kept))
        self.out = self.hidden.after if self.w_hr is None else next(kept)

    def _slopes(self, into: Tensor, place: slice) -> list[Tensor]:
        i, f, g, o = self.a[place].unbind(1)
        of_i, of_f, of_g, of_o = into.unbind(2)
        tanh_c = self.cells.after[place].tanh()
        _through_sigmoid(g, i, grad_input=of_i)
        _through_sigmoid(self.past[0][place], f, grad_input=of_f)
        _through_tanh(i, g, grad_input=of_g)
        _through_sigmoid(tanh_c, o, grad_input=of_o)
        by_c = _through_tanh(o, tanh_c, grad_input=tanh_c)  # of h' by c'
        return [into[:, :, :3], of_o, by_c, f]

    def _back(self, d: Tensor, *views: Tensor) -> bool:
        of_c, of_o, by_c, f = views
        d_c = first_of(self.d_c, len(d)).addcmul_(d, by_c)
        of_c.mul_(d_c.unsqueeze(1))
        of_o.mul_(d)
        d_c.mul_(f)
        return False


class GRU(Unrolled):
    """``h' = (1 - z) n + z h`` with ``n = tanh(a + r b)``; blocks are b, r, z and a, which becomes n.

    Their gradients are in the order r, z, b and a: the first three are those of ``W_hh h + b_hh``.
    """

    gates, blocks = 3, 4

    def _bias(self) -> Tensor | None:
        """All but the part of ``b_hh`` that is in b."""
        if "bias_ih" not in self.weights:
            return None
        return self.weights["bias_ih"] + F.pad(self.weights["bias_hh"][: 2 * self.size], (0, self.size))

    def _inner(self) -> Tensor:
        return super()._inner().roll(1, 0)

    def _prepared(self) -> Tensor:
        self.a, self.hidden = self._blocks(4), Trace(self, self.h)
        self.out = self.hidden.after
        self.a[:, 0] = self.weights["bias_hh"][2 * self.size :] if "bias_hh" in self.weights else 0.0
        return self.a[:, 1:]

    def _views(self) -> list[tuple[Tensor, ...]]:
        both = self._each(self.a[:, 1:3], axis=1)
        rest = self._each(*self.a.unbind(1), self.out)
        return [(*x, *y) for x, y in zip(both, rest, strict=True)]

    def _step(self, h: Tensor, *views: Tensor) -> Tensor:
        r_z, b, r, z, n, out = views
        r_z.sigmoid_()
        n.addcmul_(r, b).tanh_()
        return torch.lerp(n, h, z, out=out)

    def kept(self) -> list[Tensor]:
        """Gates and outputs."""
        return [self.a, self.hidden.whole]

    def _restore(self, kept: Iterator[Tensor]) -> None:
        self.a, self.hidden = next(kept), Trace(self, self.h, next(kept))
        self.out = self.hidden.after

    def _slopes(self, into: Tensor, place: slice) -> list[Tensor]:
        b, r, z, n = self.a[place].unbind(1)
        of_r, of_z, of_b, of_a = into.unbind(2)
        _through_tanh(1 - z, n, grad_input=of_a)
        _through_sigmoid(of_a * b, r, grad_input=of_r)
        _through_sigmoid(self.past[0][place] - n, z, grad_input=of_z)
        torch.mul(of_a, r, out=of_b)
        return [into, z]

    def _back(self, d: Tensor, *views: Tensor) -> bool:
        slopes, z = views
        slopes.mul_(d.unsqueeze(1))
        d.mul_(z)
        return True

    def _traces(self) -> list[Trace]:
        return [self.hidden]

    def _inputs(self, grads: Tensor) -> Tensor:
        rows = grads.flatten(2).transpose(0, 1)
        return torch.cat([rows[:, :, : 2 * self.size], rows[:, :, 3 * self.size :]], 2).transpose(0, 1)
