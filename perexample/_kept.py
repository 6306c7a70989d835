"""A model that is as it was, whatever is tried with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ._private import version
from .extension import Extension


@contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Buffers that are written to in place become what they were."""
    before = {name: b.clone() for name, b in model.named_buffers()}
    versions = {name: version(b) for name, b in model.named_buffers()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, b in model.named_buffers():
                if name in before and version(b) != versions[name]:
                    b.copy_(before[name])


@contextmanager
def fields_kept(parameters: Mapping[str, Tensor], extensions: Sequence[Extension]) -> Iterator[None]:
    """Gradients of parameters, and fields of extensions, become what they were; meanwhile there are no gradients."""
    kept = [(p, e.field, getattr(p, e.field, None)) for p in parameters.values() for e in extensions]
    grads = [(p, p.grad) for p in parameters.values()]
    without_grads(parameters)
    try:
        yield
    finally:
        for p, field, value in kept:
            if value is not None:
                setattr(p, field, value)
            elif hasattr(p, field):
                delattr(p, field)
        for p, gradient in grads:
            p.grad = gradient


def without_grads(parameters: Mapping[str, Tensor]) -> None:
    """Take the gradients off."""
    for p in parameters.values():
        p.grad = None


__all__ = ["buffers_kept", "fields_kept", "without_grads"]
