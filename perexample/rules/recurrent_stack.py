"""The layers of a recurrent module, one after another, and how its inputs and outputs hold the examples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from .generic import only
from .unrolled import Unrolled


@dataclass
class Layout:
    """How a module's inputs and outputs hold N examples: padded in either order, or packed, longest first.

    Everything is computed on ``[T, N, F]``, the examples in the order in which they are packed.
    """

    batch_first: bool = False
    batch_sizes: Tensor | None = None
    order: Tensor | None = None  # of the packed examples
    back: Tensor | None = None  # from there to the original order

    def active(self, device: torch.device) -> Tensor | None:
        """Which examples take part in which step, ``[T, N]``, where not all do."""
        if self.batch_sizes is None:
            return None
        return (torch.arange(int(self.batch_sizes[0]), device="cpu") < self.batch_sizes[:, None]).to(device)

    def time_major(self, data: Tensor) -> Tensor:
        """``[T, N, F]``, zeros beyond the end of a sequence, from what the module takes or gives."""
        active = self.active(data.device)
        if active is None:
            return data.transpose(0, 1) if self.batch_first else data
        return data.new_zeros(*active.shape, data.shape[1]).masked_scatter(active[:, :, None], data)

    def as_given(self, sequence: Tensor) -> Tensor:
        """The reverse of `time_major`."""
        active = self.active(sequence.device)
        if active is None:
            return sequence.transpose(0, 1) if self.batch_first else sequence
        return sequence[active]

    def sorted(self, states: Tensor) -> Tensor:
        """States ``[..., N, H]`` in the order of the packed examples."""
        return states if self.order is None else states.index_select(-2, self.order)

    def examples(self, sequence: Tensor) -> Tensor:
        """``[N, T, F]`` in the original order."""
        return (sequence if self.back is None else sequence.index_select(1, self.back)).transpose(0, 1)

    def only(self, g: Tensor, n: int, states: bool) -> Tensor:
        """A gradient with all examples but one set to zero, be it of the output or of states ``[L, N, H]``."""
        if self.batch_sizes is not None and not states:
            place = n if self.back is None else int(self.back[n])
            return self.as_given(only(self.time_major(g), 1, place))
        return only(g, 0 if self.batch_first and not states else 1, n)


@dataclass(frozen=True)
class Kind:
    """What a stack of recurrent layers is made of.

    Attributes:
        algebra: What one layer computes.
        layers: How many there are.
        directions: 1 or 2.
        dropout: Probability of the dropout between layers, 0 if nothing is dropped.
    """

    algebra: type[Unrolled]
    layers: int
    directions: int
    dropout: float

    def places(self) -> list[tuple[int, int]]:
        """Layer and direction of each row of the states, in order."""
        return [(layer, direction) for layer in range(self.layers) for direction in range(self.directions)]


class Stack:
    """The layers of a recurrent module, run.

    Args:
        kind: What they are made of.
        layout: Where the examples are.
        x: The input, ``[T, N, I]``.
        states: Initial states, ``[layers * directions, N, H]``, in the order of the layout.
        weights: The parameters of each layer and direction by kind.
        dtype: In what dtype random numbers are drawn.
        kept: What `kept` gave after the forward, if it is not to be run again.

    Attributes:
        runs: The layers, for each its directions.
        noise: What dropout multiplied the output of each layer but the last with; empty without dropout.
        x: What the last layer gave, ``[T, N, F]``.
        of_input: After `pull`, the gradient of the input, ``[T, N, I]``, where it was wanted.
        of_initial: After `pull`, those of the initial states, by layer and direction.
    """

    of_input: Tensor

    def __init__(
        self,
        kind: Kind,
        layout: Layout,
        x: Tensor,
        states: Sequence[Tensor],
        weights: Sequence[Mapping[str, Tensor]],
        dtype: torch.dtype,
        kept: Sequence[Tensor] | None = None,
    ) -> None:
        self.kind, self.layout, self.x, self.dtype = kind, layout, x, dtype
        self.active = layout.active(x.device)
        self.runs: list[list[Unrolled]] = []
        self.noise: list[Tensor] = []
        self.of_initial: dict[tuple[int, int], list[Tensor]] = {}
        parts = None if kept is None else iter(kept)
        for layer in range(kind.layers):
            if layer and kind.dropout:
                self.noise.append(self._drawn() if parts is None else next(parts))
                self.x = self.x * self.noise[-1]
            self._run(layer, states, weights, parts)

    def _run(
        self,
        layer: int,
        states: Sequence[Tensor],
        weights: Sequence[Mapping[str, Tensor]],
        parts: Iterator[Tensor] | None,
    ) -> None:
        runs = []
        for direction in range(self.kind.directions):
            place = layer * self.kind.directions + direction
            h, c = states[0][place], states[-1][place]
            runs.append(self.kind.algebra(weights[place], self.x, h, c, self.active, bool(direction), parts))
        self.runs.append(runs)
        self.x = torch.cat([run.result for run in runs], 2) if len(runs) > 1 else runs[0].result

    def kept(self) -> list[Tensor]:
        """What a backward needs beside the arguments: random numbers and what each layer keeps, as they come."""
        parts: list[Tensor] = []
        for layer, runs in enumerate(self.runs):
            parts += self.noise[layer - 1 : layer] if layer else []
            parts += [t for run in runs for t in run.kept()]
        return parts

    def last(self) -> list[Tensor]:
        """The states after the last step, ``[layers * directions, N, H]``."""
        return [torch.stack(states) for states in zip(*(run.last for runs in self.runs for run in runs), strict=True)]

    def _drawn(self) -> Tensor:
        """The factors of a dropout, drawn as the module does: on a tensor of the shape and dtype that it has there."""
        shape = self.x.shape if self.active is None else (int(self.active.sum()), self.x.shape[2])
        noise = F.dropout(torch.ones(shape, dtype=self.dtype, device=self.x.device), self.kind.dropout, training=True)
        noise = noise.to(self.x.dtype)
        return noise if self.active is None else self.layout.time_major(noise)

    def pull(
        self, g: Tensor, states: Sequence[Tensor], lowest: int = 0, inputs: bool = False
    ) -> Iterator[tuple[tuple[int, int], Unrolled]]:
        """Go back through the layers, the last first; a layer is let go of when the next one is asked for.

        Args:
            g: Gradient of the output, ``[T, N, F]``.
            states: Those of the last states, in the order of the layout.
            lowest: The layer at which to stop.
            inputs: Whether the gradient of its input is wanted too.

        Yields:
            Layer and direction, and the layer after its own `Unrolled.pull`.
        """
        for layer in range(self.kind.layers - 1, lowest - 1, -1):
            runs = self.runs.pop()
            for direction, (run, d) in enumerate(zip(runs, g.chunk(len(runs), 2), strict=True)):
                run.pull(d, *(state[layer * len(runs) + direction] for state in states))
                self.of_initial[layer, direction] = run.of_initial
                yield (layer, direction), run
            if layer > lowest or inputs:
                g = reduce(torch.add, (run.to_inputs() for run in runs))
                g = g * self.noise[layer - 1] if layer and self.noise else g
        self.of_input = g
