"""What several files of tests need."""

from __future__ import annotations

import gc

import pytest
import torch

from perexample.privacy.noise import Noise
from perexample.rule import registry as rules


@pytest.fixture
def registry(monkeypatch):
    """Rules registered in a test are gone after it."""
    monkeypatch.setattr(rules, "_REGISTRY", dict(rules._REGISTRY))
    monkeypatch.setattr(rules, "_FUNCTIONS", dict(rules._FUNCTIONS))
    yield
    rules._REFUSING.clear()  # what was found out with those rules
    rules._WITHOUT_RULE.clear()


@pytest.fixture
def fresh_dynamo():
    """Nothing that was compiled before counts, or after."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def no_collection():
    """Torch keeps a generator locked while it makes a tensor of its state.

    A garbage collection right there lets another thread run, which waits for that generator with the interpreter
    locked, for ever (torch 2.13). The library asks for the state in every forward.
    """
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.fixture
def noise_of_any_sums(monkeypatch):
    """Noise of a generator that was given is the same beside sums that were rounded in another way."""
    monkeypatch.setattr(Noise, "begin", lambda self, content: None)
