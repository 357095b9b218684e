"""Tests that run in a process of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import OWN_PROCESS, THREADED

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(
    "PYTEST_XDIST_WORKER" not in os.environ, reason="without workers they run in this process"
)
def test_suites_with_threads():
    alone = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    alone["XLA_FLAGS"] = "--xla_backend_optimization_level=0"  # most of the time is spent on compiling
    chosen = ("-k", " or ".join(THREADED), *OWN_PROCESS)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *chosen]
    done = subprocess.run(command, cwd=ROOT, env=alone, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
