"""The pages Look, What does it mean? and Drive as one HTML file that works offline."""

from __future__ import annotations

import base64
import json
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from latentact.errors import UserError
from latentact.io.atomic import atomic_write
from latentact.progress import Progress
from latentact.reporting.html import text
from latentact.studio.drive import BY, controls
from latentact.studio.graph import UnsupportedModelError, to_graph
from latentact.studio.look import look, saliency
from latentact.studio.meaning import Survey, galleries, survey
from latentact.studio.pages import groups_html
from latentact.studio.workspace import Work, Workspace

EPISODES = 3
SALIENT = 40
"""Steps of an episode whose saliency is measured; others show that of the last one before."""
SCENES = 4


def export(work: Workspace, folder: Path) -> Path:
    """Write index.html into a folder, atomically, and return its path.

    Raises:
        UserError: there is no data.
    """
    if work.store is None:
        raise UserError("--export needs data, got none. Give --data.")
    found = _run(survey(work))
    looks: list[dict[str, Any]] = []
    for number in np.unique(np.linspace(0, work.store.num_episodes - 1, EPISODES).astype(int)):
        take = work.episode(int(number))
        page = _run(look(work, take, found))
        if work.model.uses_images:
            steps = np.unique(np.linspace(0, len(take.guide) - 1, SALIENT).astype(int))
            response = _run(saliency(work, take, steps))
            values = (255 * response).astype(int).reshape(len(response), -1).tolist()
            page["saliency"] = {"side": response.shape[1], "steps": steps.tolist(), "values": values}
        looks.append({"name": take.name, "episode": int(number), "page": page})
    for each in looks[1:]:
        del each["page"]["map"]  # the same for all
    meaning = groups_html(found, _run(galleries(work, found)))
    content = {
        "looks": looks,
        "points": {"episode": found.episode.tolist(), "step": _steps(work, found)},
        "drive": _drive(work, found),
    }
    asset = files("latentact.studio").joinpath

    def read(name: str) -> str:
        return asset(name).read_text(encoding="utf-8")

    html = Template(read("export.html")).substitute(
        name=text(work.name),
        css=read("colors.css") + read("studio.css"),
        studio=read("studio.js"),
        fdm=read("fdm.js"),
        meaning=meaning,
        data=json.dumps(content, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c"),
    )
    path = folder / "index.html"
    with atomic_write(path) as partial:
        partial.write_text(html, encoding="utf-8")
    return path


def _run[T](work: Work[T]) -> T:
    """Run work with a progress bar."""
    try:
        first = next(work)
        with Progress(first.what, first.total, "steps") as bar:
            done = 0
            progress = first
            while True:
                bar.advance(progress.done - done)
                done, progress = progress.done, next(work)
    except StopIteration as stop:
        return stop.value


def _steps(work: Workspace, found: Survey) -> list[int]:
    assert work.store is not None
    return (found.rows - work.store.starts[found.episode]).tolist()


def _drive(work: Workspace, found: Survey) -> dict[str, Any]:
    """Return forward dynamics, its buttons and its start frames; or why it cannot run in a browser."""
    assert work.store is not None
    if not work.model.generative:
        return {"why": "The LAM predicts no frames."}
    try:
        graph = to_graph(work.model)
    except UnsupportedModelError as error:
        return {
            "why": f"Forward dynamics of this LAM does not run in the page: {error}. Use latentact studio."
        }
    starts = work.store.starts[np.linspace(0, work.store.num_episodes - 1, SCENES).astype(int)]
    scenes = np.array(work.store.frames[np.unique(starts)])
    return {
        "why": "",
        "graph": graph,
        "context": work.model.context,
        "side": scenes.shape[1],
        "scenes": [base64.b64encode(scene.transpose(2, 0, 1).tobytes()).decode() for scene in scenes],
        "controls": [
            {"name": c.name, "words": c.words, "group": c.group, "vectors": c.vectors.tolist()}
            for c in controls(found, BY[0])
        ],
    }
