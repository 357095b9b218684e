"""The notebook in `examples` runs, with fewer episodes and steps."""

import json
from pathlib import Path

import matplotlib as mpl
import pytest

from conftest import ok
from latentact import Guide

NOTEBOOK = Path(__file__).parents[2] / "examples/latent_actions.ipynb"
SMALLER = {"--episodes 300": "--episodes 40 --workers 1", "training.steps=300": "training.steps=2"}


def test_all_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    mpl.use("agg")
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    variables: dict[str, object] = {}
    for cell in cells:
        text = "".join(cell["source"])
        for size, smaller in SMALLER.items():
            text = text.replace(size, smaller)
        if text.startswith("!"):
            for line in text.splitlines():
                ok(*line.removeprefix("!latentact ").split())
        else:
            exec(text, variables)
    assert len(Guide.load("edited.safetensors")) == 8
