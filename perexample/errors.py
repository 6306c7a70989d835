"""Every error that perexample raises on purpose.

Each message is one sentence or two: what is wrong, where (module path or parameter name), why, and what to do.
"""


class PerExampleError(RuntimeError):
    """Base class of all errors of this library."""


class UnsupportedModuleError(PerExampleError):
    """A module cannot have per-example gradients as it is set up, for example BatchNorm in training mode."""


class CrossExampleError(PerExampleError):
    """A computation mixes examples, so that a gradient of one example alone does not exist."""


class UncoveredParameterError(PerExampleError):
    """A trainable parameter reaches the loss in a way that no rule sees."""


class BatchAxisError(PerExampleError):
    """The number of examples, or the axis that holds them, cannot be told."""


class LossError(PerExampleError):
    """The loss handed to ``backward`` is not one that per-example gradients are defined for."""


class RuleContractError(PerExampleError):
    """A rule returned something other than one ``[N, *p.shape]`` tensor for each trainable parameter."""


class ExtensionError(PerExampleError):
    """An extension, or the context it was given to, is used in a way that cannot work."""


class StaleGradientError(PerExampleError):
    """A clipped sum is missing, was used already, or belongs to a state that no longer exists."""


class PrivacyBudgetError(PerExampleError):
    """Another step would cost more privacy than was planned."""


class CheckFailedError(PerExampleError):
    """`check` found a difference; the report is in the attribute ``report``."""

    def __init__(self, message: str, report: object = None) -> None:
        """Keep the report beside the message."""
        super().__init__(message)
        self.report = report


class ConfigurationError(PerExampleError, ValueError):
    """An argument has a value that makes no sense; the message names the argument."""


class NonFiniteExampleWarning(UserWarning):
    """Some examples had a gradient with NaN or infinity; each contributed exactly zero."""


class MemoryBoundWarning(UserWarning):
    """More was held until the clip factors were known than ``perex(max_memory=...)`` allows."""
