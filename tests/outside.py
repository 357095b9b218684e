"""A package outside of ours that adds an entry by one file and an entry point, and data for its stages."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from conftest import cli
from latentact.io.video_writer import write_video

STAGES = """
import json, sys
from latentact.cli import main

for command in json.loads(sys.argv[1]):
    sys.argv = ["latentact", *command]
    try:
        main()
    except SystemExit as stop:
        if stop.code:
            raise
"""


class OutsidePackage:
    """The installed package in a folder that also holds `data`, a dataset, and `demo.mp4`."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, group: str, source: str) -> None:
        info = folder / "package/outside-0.1.dist-info"
        info.mkdir(parents=True)
        (folder / "package/outside_module.py").write_text(source)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: outside\nVersion: 0.1\n")
        (info / "entry_points.txt").write_text(f"[{group}]\noutside = outside_module\n")
        monkeypatch.setenv("PYTHONPATH", str(folder / "package"))
        monkeypatch.chdir(folder)
        done = cli(
            "collect", "babyai/GoToLocal", "--episodes", "6", "--workers", "1", "--out", folder / "data"
        )
        assert done.returncode == 0, done.stderr
        frames = np.random.default_rng(0).integers(256, size=(12, 64, 64, 3), dtype=np.uint8)
        write_video(folder / "demo.mp4", frames, 10.0)

    def run(self, code: str, *arguments: str) -> None:
        """Run Python code with the package."""
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-2000:]

    def stages(self, *commands: list[str]) -> None:
        """Run latentact commands with the package."""
        self.run(STAGES, json.dumps(commands))
