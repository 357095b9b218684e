"""A package outside of ours that adds an entry by one file and an entry point, and data for its stages."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from conftest import cli, run_python
from latentact.io.video_writer import write_video

STAGES = """
import json, sys
from latentact.cli import main

commands, expected = json.loads(sys.argv[1]), int(sys.argv[2])
for command in commands:
    sys.argv = ["latentact", *command]
    try:
        main()
    except SystemExit as stop:
        if (stop.code or 0) != expected:
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

    def run(self, code: str, *arguments: str) -> str:
        """Run Python code with the package, and return what it printed."""
        return run_python(code, *arguments)

    def stages(self, *commands: list[str], code: int = 0) -> str:
        """Run latentact commands that end with an exit code, and return what they printed."""
        return self.run(STAGES, json.dumps(commands), str(code))
