"""What a GPU would refuse, on machines without one: the tables of `test_gpu` on a device that is made of the CPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import elsewhere
import pytest


@pytest.mark.skipif(elsewhere.compiler() is None, reason="needs a C++ compiler")
def test_tables_on_a_device_that_is_not_the_cpu(tmp_path):
    environment = os.environ | {elsewhere.LIBRARY: str(elsewhere.build(tmp_path))}
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-p", "no:xdist", "-rN"]
    run = subprocess.run(
        [*command, str(Path(__file__).with_name("test_gpu.py"))], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed is not None
    assert int(passed[1]) > 950
