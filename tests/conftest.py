"""What several files of tests need."""

from __future__ import annotations

import pytest

from perexample.privacy.noise import Noise


@pytest.fixture
def noise_of_any_sums(monkeypatch):
    """Noise of a generator that was given is the same beside sums that were rounded in another way."""
    monkeypatch.setattr(Noise, "begin", lambda self, content: None)
