"""Tests that run in a process of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import XLAND

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(
    "PYTEST_XDIST_WORKER" not in os.environ, reason="without workers they run in this process"
)
def test_xland():
    pytest.importorskip("xminigrid")
    alone = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "xland", *XLAND]
    done = subprocess.run(command, cwd=ROOT, env=alone, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
