"""What a tape has recorded, run again: as Python code that calls the operations one by one, or compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ._calls import Call, Form, Pause, Slot, code_of, slots_of
from ._fused import DoesNotHold, Fused, Halves, is_faster, through, why_not_fused, writes_over_the_pause
from ._graph import graph_of
from ._private import undispatched
from ._tree import map_tensors
from .errors import ConfigurationError


class Program:
    """Operations that are done again on other inputs, all at once or with a pause.

    Args:
        calls: The operations.
        roots: Of each tensor that they make the one whose memory it shows, or the address of a constant.
        forms: Of the same tensors.
        number: Of inputs, which come first among these tensors.
        wanted: What is returned, with slots in the place of tensors; a pair, with what is handed out at the pause
            before, if there is one.
        later: How many of the inputs, the last ones, are given after the pause; 0 without one.

    Attributes:
        random: Whether random numbers are drawn.

    Raises:
        ConfigurationError: If what is handed out is made of what would be given then.
    """

    def __init__(
        self, calls: list[Call], roots: Sequence[int], forms: Sequence[Form], number: int, wanted: Any, later: int
    ) -> None:
        """Write the code."""
        self._calls, self._roots, self._forms, self._number = calls, roots, forms, number
        self._shown: Any  # handed out at the pause
        self._shown, self._wanted = wanted if later else (None, wanted)
        self._copied: set[int] = set()  # of what is shown, what the rest of the computation needs as it is
        self._pause = self._paused(range(number - later, number)) if later else None
        self._code = code_of(calls, number, numbers_of(self._wanted), self._pause)
        self._fused: Fused | Halves | None = None
        self.random = any(torch.Tag.nondeterministic_seeded in call.function.tags for call in calls)

    def fuse(self, inputs: Sequence[Tensor], *, always: bool) -> str | None:
        """Let `torch.compile` fuse the operations, and replay what it makes of them if that is faster.

        Args:
            inputs: As for `replay`.
            always: Also where it is slower, or has not been timed.

        Returns:
            Why operations are replayed as they were, if they are.

        Raises:
            ConfigurationError: If it cannot be done.
        """
        calls, forms, number, pause = self._calls, self._forms, self._number, self._pause
        wanted = numbers_of(self._wanted)
        if (why := why_not_fused(calls, self._roots, forms)) is not None:
            return why
        if pause is not None and writes_over_the_pause(calls, self._roots, pause):
            return "what its forward has computed is written to in its backward"
        with undispatched(), torch.no_grad():  # both are timed as `replay` does them
            fused: Any
            one: Callable[..., tuple]
            try:
                if pause is None:
                    fused = Fused(graph_of(calls, forms, range(number), wanted), inputs)
                    one, other = fused, self._code
                else:
                    fused = Halves(calls, forms, number, wanted, pause, inputs)
                    one, other = partial(through, fused, pause), partial(through, self._code, pause)
            except DoesNotHold:
                return "on the batch that it was recorded with they have to be done one by one"
            if always or is_faster(one, other, inputs):
                self._fused = fused
                return None
        return "fused they take longer on the batch that it was recorded with"

    def unfuse(self) -> None:
        """Replay the operations as they were recorded."""
        self._fused = None

    def replay(self, inputs: Sequence[Tensor] = ()) -> Any:
        """Do it again.

        Args:
            inputs: As many as it was recorded with, of the same shapes, strides and types.

        Returns:
            What the function returned, new tensors.

        Raises:
            DoesNotHold: If what it was compiled to cannot be used for these, after random numbers were drawn.
        """
        if self._pause is not None:
            early = len(inputs) - len(self._pause.given)
            shown, finish = self.begin(inputs[:early])
            return shown, finish(inputs[early:])
        with undispatched(), torch.no_grad():  # function modes, as a default device, have been recorded
            return _filled(self._wanted, self._code_for_now()(*inputs))

    def _code_for_now(self) -> Callable[..., Any]:
        return self._code if self._fused is None or not self._fused.fits else self._fused

    def begin(self, inputs: Sequence[Tensor]) -> tuple[Any, Callable[[Sequence[Tensor]], Any]]:
        """Do it as far as it can be done without the inputs that are given later.

        Args:
            inputs: The others.

        Returns:
            What is shown, tensors that may be written to; and what goes on from there, once, when it is given the rest.
        """
        assert self._pause is not None
        with undispatched(), torch.no_grad():
            under_way = self._code_for_now()(*inputs)
            found = next(under_way)
            pairs = zip(self._pause.shown, found, strict=True)
            shown = _filled(self._shown, [t.clone() if number in self._copied else t for number, t in pairs])
            found.clear()

        def finish(rest: Sequence[Tensor]) -> Any:
            try:
                with undispatched(), torch.no_grad():
                    under_way.send(tuple(rest))
            except StopIteration as end:
                return _filled(self._wanted, end.value)
            raise AssertionError("there is one pause")

        return shown, finish

    def constants(self, *, later: bool) -> list[Tensor]:
        """The tensors that were there before, and may be written to, that it reads behind the pause, or before it."""
        assert self._pause is not None
        calls, place = self._calls, self._pause.place
        slots = slots_of([(call.args, call.kwargs) for call in (calls[place:] if later else calls[:place])])
        found = [slot.tensor for slot in slots if slot.tensor is not None and not slot.lasting]
        return list({id(t): t for t in found if not t.is_inference()}.values())

    def _paused(self, given: Sequence[int]) -> Pause:
        """Where it has to wait for these inputs."""
        calls = self._calls
        place = next(place for place, call in enumerate(calls) if not set(given).isdisjoint(call.uses()))
        shown = numbers_of(self._shown)
        roots = [self._roots[number] for number in shown]
        used = {self._roots[number] for call in calls[place:] for number in call.uses()}
        again = {number for at, number in enumerate(shown) if roots[at] in used or roots[at] in roots[:at]}
        if not {*shown} <= {*range(max(given) + 1), *(number for call in calls[:place] for number in call.results)}:
            raise ConfigurationError(
                "This step cannot be recorded: what it is to hand out is made of what it would be given then. Run it "
                "as usual."
            )
        self._copied = again | {number for number in shown if number <= max(given)}
        return Pause(place, shown, given)


def numbers_of(tree: Any) -> list[int]:
    """Those of a structure's slots, constants left out."""
    return [slot.number for slot in slots_of(tree) if slot.number >= 0]


def _filled(tree: Any, values: Iterable[Tensor]) -> Any:
    """A structure with tensors in the place of their slots."""
    every = iter(values)
    return map_tensors(lambda slot: next(every) if slot.number >= 0 else slot.tensor, tree, Slot)


__all__ = ["Program", "numbers_of"]
