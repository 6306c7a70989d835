"""The first run of a step that is to be recorded: what it does that no replay may do."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ._chance import random_bytes
from ._private import version
from ._tree import tensors_of
from ._unchanged import settings_of
from ._watched import Watched
from .errors import ConfigurationError, ExtensionError
from .extension import Extension, ParameterView


@dataclass(frozen=True)
class Seen:
    """What was seen of a step.

    Attributes:
        random: Whether it draws random numbers, as far as generators tell, which other threads may use too.
        drew: The same, as far as operations tell.
        half: Whether it computes something in 16 bits.
        called: The modules that are called.
    """

    random: bool = False
    drew: bool = False
    half: bool = False
    called: tuple[nn.Module, ...] = ()


class _Reached(Extension):
    """Tells which parameters a loss depends on."""

    field = "perexample_reached"
    parameters: Sequence[tuple[str, Tensor]] = ()

    def start(self, views: Sequence[ParameterView]) -> None:
        self.parameters = [(view.name, view.param) for view in views]

    def compute(self, view: ParameterView) -> None:
        """Nothing."""


def first_run(
    run: Callable[[Extension], Any],
    model: nn.Module,
    parameters: Mapping[str, Tensor],
    batch: Any,
    device: torch.device,
) -> Seen:
    """Take a step as usual, and look what it does.

    Args:
        run: Takes it, with one more extension.
        model: The model.
        parameters: Of the model, by their names.
        batch: What the step is given.
        device: Where the model is.

    Returns:
        What was seen.

    Raises:
        ConfigurationError: If it writes into something that was there before, which a replay would do again where the
            step has to be run as usual, or depends on parameters of another model.
    """
    states, watched, reached = random_bytes(device), Watched(), _Reached()
    buffers = {name: version(b) for name, b in model.named_buffers()}
    kept = {name: (p.detach().clone(), version(p)) for name, p in parameters.items()}
    called: dict[nn.Module, None] = {}
    elsewhere = _other_generators()
    noting = [
        module.register_forward_pre_hook(lambda module, _: called.setdefault(module), prepend=True)
        for module in model.modules()
    ]
    try:
        with watched:
            run(reached)
    finally:
        for handle in noting:
            handle.remove()
    if _other_generators() != elsewhere:
        raise ConfigurationError(
            "This step cannot be recorded: it draws random numbers of Python or NumPy, which would be those of the "
            "recording for ever. Draw them with torch, or run it as usual."
        )
    _refuse_written_parameters(parameters, kept)
    _refuse_written(model, buffers, watched.written, batch)
    _refuse_others(parameters, reached)
    drew = watched.drew
    return Seen(drew or random_bytes(device) != states, drew, watched.half, tuple(called))


def _other_generators() -> Any:
    """Where the random numbers of Python and NumPy are."""
    numpy = sys.modules.get("numpy")
    return random.getstate(), None if numpy is None else repr(numpy.random.get_state())


def _refuse_written_parameters(parameters: Mapping[str, Tensor], kept: Mapping[str, tuple[Tensor, int]]) -> None:
    written = [name for name, p in parameters.items() if version(p) != kept[name][1]]
    for name in written:
        with torch.no_grad():
            parameters[name].copy_(kept[name][0])
    if written:
        raise ConfigurationError(
            f"This step cannot be recorded: its forward writes into the parameter `{written[0]}`. Run it as usual."
        )


def _refuse_written(model: nn.Module, buffers: Mapping[str, int], t: Tensor | None, batch: Any) -> None:
    for name, b in model.named_buffers():
        if version(b) != buffers.get(name, version(b)):
            raise ConfigurationError(
                f"This step cannot be recorded: it changes the buffer `{name}`, and would do so twice where a replay "
                f"has to be run as usual. Run it as usual."
            )
    if t is None:
        return
    if t.untyped_storage().data_ptr() in {own.untyped_storage().data_ptr() for own in tensors_of(batch)}:
        raise ConfigurationError(
            "This step cannot be recorded: it writes into its batch in place, which would be done to the caller's; let "
            "it work on a copy."
        )
    raise ConfigurationError(
        f"This step cannot be recorded: it writes into a tensor of shape {list(t.shape)} that was there before, such "
        f"as a running mean, and would do so twice where a replay has to be run as usual. Run it as usual."
    )


def _refuse_others(parameters: Mapping[str, Tensor], reached: _Reached) -> None:
    own = {id(p) for p in parameters.values()}
    others = [name for name, p in reached.parameters if id(p) not in own]
    if others:
        raise ConfigurationError(
            f"This step cannot be recorded: its loss depends on the parameter `{others[0]}`, which is not one of the "
            f"model's that was given, or this is one of another extended model, with which it shares parameters; give "
            f"a module that holds both models (a RecordedModel an extended one, whose forward calls what it is to "
            f"replay of them)."
        )


def refuse_remembering(run: Callable[[], Any], extensions: Sequence[Extension]) -> None:
    """Take the step again, after the first run has filled what is found out once.

    Args:
        run: Takes it.
        extensions: Those that are asked.

    Raises:
        ExtensionError: If one keeps something of it, which would be that of the recording for ever.
    """
    before = settings_of(extensions)
    run()
    after = settings_of(extensions)
    for key in after:
        if key not in before or after[key] != before[key]:
            _, kind, name = key
            raise ExtensionError(
                f"{kind} remembers what its backwards have found (`{name}`), and cannot be recorded; override "
                f"recording and replayed (docs/extending)."
            )


__all__ = ["Seen", "first_run", "refuse_remembering"]
