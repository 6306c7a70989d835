"""What a GPU would refuse, on machines without one: tests of any device on one that is made of the CPU."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import elsewhere
import pytest

FILES = {  # which tests of it, and how many pass at least
    "test_gpu.py": ("", 960),
    "test_recorded.py": ("", 110),
    "test_recorded_changes.py": ("", 90),
    "test_recorded_gradients.py": ("", 55),
    "test_recorded_model.py": ("", 35),
    "test_models.py": ("test_exact", 170),
}
OF_MODELS = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs transformers"),
]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    if elsewhere.compiler() is None:
        pytest.skip("needs a C++ compiler")
    return elsewhere.build(tmp_path_factory.mktemp("elsewhere"))


@pytest.mark.parametrize(
    "file", [pytest.param(file, marks=OF_MODELS if file == "test_models.py" else []) for file in FILES]
)
def test_on_a_device_that_is_not_the_cpu(file, library):
    environment = os.environ | {elsewhere.LIBRARY: str(library)}
    which, least = FILES[file]
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-p", "no:xdist", "-rN", "-k", which]
    run = subprocess.run(
        [*command, str(Path(__file__).with_name(file))], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed is not None
    assert int(passed[1]) >= least
