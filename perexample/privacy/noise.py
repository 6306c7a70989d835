"""Gaussian noise for private steps."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from .._arguments import is_word, real, shown
from .._private import generator_of, system_generator
from ..errors import ConfigurationError
from .normal import Bits, bits_of, bits_of_bytes, plus_normal

_FEW = 4096  # numbers on the CPU that torch makes in less time


class Noise:
    """Gaussian numbers in float64 that ``torch.manual_seed`` neither repeats nor reveals.

    Args:
        generator: Where they come from; by default a generator of its own for each device, seeded by the operating
            system. A generator of your own makes the noise repeatable: for tests, since whoever knows the seed can
            take the noise off.
        source: ``"torch"`` uses torch's generators, on CPU with a whole state from the operating system (a seed
            would choose among 2^32 streams only). They are fast, and not made to withstand someone who sees part of
            the stream. ``"os"`` draws every bit from the operating system's cryptographic source (``os.urandom``).

    Raises:
        ConfigurationError: For arguments without meaning, or both a generator and ``source="os"``.

    Guarantees:
        Every number is a function of at least 53 random bits, so that ``|z|`` reaches 8.57 (float32 noise ends at
        5.77, inside of what a delta of 1e-5 asks for over a training). Not offered: resistance to attacks on the low
        bits of floating-point noise (Mironov 2012; Jin et al. 2022) or on timing.

    References:
        Box and Muller 1958; Mironov 2012, "On significance of the least significant bits"; Jin et al. 2022,
        arXiv:2112.05307.

    Example:
        >>> from perexample.privacy import Noise
        >>> Noise(source="os").like(torch.zeros(2, 3), std=1.5).shape
        torch.Size([2, 3])
    """

    def __init__(self, generator: torch.Generator | None = None, source: str = "torch") -> None:
        """Check the arguments."""
        if generator is not None and not isinstance(generator, torch.Generator):
            raise ConfigurationError(f"generator must be a torch.Generator or None, not {generator!r}.")
        if not is_word(source, ("torch", "os")):
            hint = (
                "; a generator goes to noise_generator= (make_private) or generator="
                if isinstance(source, torch.Generator)
                else ""
            )
            raise ConfigurationError(f"The source of noise must be 'torch' or 'os', not {shown(source)}{hint}.")
        if generator is not None and source == "os":
            raise ConfigurationError("noise='os' draws from the operating system, and takes no generator.")
        if generator is not None:
            refuse_public_seed(generator)
        self.given, self.source = generator, source
        self._of_step: torch.Generator | None = None
        self._own: dict[tuple[int, torch.device], torch.Generator] = {}

    def like(self, tensor: Tensor, std: float) -> Tensor:
        """Noise for a tensor.

        Args:
            tensor: Gives shape and device.
            std: Standard deviation.

        Returns:
            Independent numbers, float64, of the tensor's shape.

        Raises:
            ConfigurationError: If ``std`` is no finite number >= 0.
        """
        return self.plus(torch.zeros_like(tensor, dtype=torch.float64), std)

    def plus(self, tensor: Tensor, std: float) -> Tensor:
        """A tensor with noise.

        Args:
            tensor: The tensor.
            std: Standard deviation of the noise.

        Returns:
            The sum, a new tensor in float64.

        Raises:
            ConfigurationError: If ``std`` is no finite number >= 0.
        """
        tensor, std = tensor.detach(), real("std", std, "a finite number >= 0", lambda x: x >= 0)
        given = self._of_step or self.given
        device = tensor.device if given is None else given.device
        if self.source == "os":
            return _plus(tensor, std, bits_of_bytes(os.urandom))
        generator = self._for(device) if given is None else given
        if device.type == "cpu" and tensor.numel() > _FEW:
            return _plus(tensor, std, bits_of(generator))
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64, device=device)
        return noise.to(tensor.device).mul_(std).add_(tensor)

    def begin(self, content: bytes) -> None:
        """Let the noise of a step depend on what it is added to, where it might come again.

        What follows is drawn from a generator of its own, made of the given one's next numbers and of the content. A
        training that is resumed may add the same noise to the same sums, as nobody learns anything by that; to others
        it must add another, or the difference of the two steps would be that of the sums.

        Args:
            content: Of the step.
        """
        if self.given is not None:
            bits = torch.randint(256, (64,), dtype=torch.uint8, generator=self.given, device=self.given.device)
            self._of_step = generator_of(bytes(bits.tolist()) + content, self.given.device)

    def number(self, std: float) -> float:
        """One Gaussian number.

        Args:
            std: Standard deviation.

        Returns:
            The number.
        """
        device = self.given.device if self.given is not None else "cpu"
        return float(self.plus(torch.zeros((), device=device), std))

    def state(self) -> Tensor | None:
        """State of a generator that was given; none of the others, whose numbers must not come again.

        Returns:
            A byte tensor, or nothing.
        """
        return None if self.given is None else self.given.get_state()

    def is_at(self, state: Tensor) -> bool:
        """Whether a generator that was given is in some state, which it then need not be set to.

        Args:
            state: From `state`.

        Returns:
            Whether it is.
        """
        return self.given is not None and torch.equal(self.given.get_state(), state.cpu())

    def set_state(self, state: Tensor | None) -> None:
        """Continue a stream, where a generator was given here and where the state comes from.

        Args:
            state: From `state`.
        """
        if self.given is not None and state is not None:
            self.given.set_state(state.cpu())
            self._of_step = None

    def renew(self) -> None:
        """Go on with numbers that nobody can repeat, where a generator was given."""
        if self.given is not None:
            self.given.set_state(system_generator(self.given.device).get_state())
            self._of_step = None

    def _for(self, device: torch.device) -> torch.Generator:
        key = os.getpid(), device  # a forked process must not go on with the numbers of its parent
        if key not in self._own:
            self._own[key] = system_generator(device)
        return self._own[key]


def _plus(tensor: Tensor, std: float, source: Bits) -> Tensor:
    return plus_normal(tensor.to("cpu").reshape(-1), std, source).view(tensor.shape).to(tensor.device)


def refuse_public_seed(generator: torch.Generator) -> None:
    """A generator that nobody has seeded has the seed that all have: the same numbers in every run of everybody."""
    if generator.initial_seed() == torch.Generator(generator.device).initial_seed():
        raise ConfigurationError(
            "generator is a torch.Generator that was never seeded, whose numbers are those of every other such one, "
            "and known to all. Leave it out for numbers from the operating system's seed; or seed it, for tests: "
            "torch.Generator().manual_seed(0)."
        )
