"""The page Look: a demonstration's frames, latent actions, predictions, and its place among all others."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float, Int64, UInt8

from latentact.data.decode.resize import resize
from latentact.guidance.guide import Guide
from latentact.studio.images import pairs, shaded, sheet, uri
from latentact.studio.meaning import Survey
from latentact.studio.workspace import Take, Work, WorkProgress, Workspace, predict_next

CELLS = 8
"""Cells per image side that are grayed out in turn."""
NEIGHBORS = 4


def rows_of(guide: Guide, found: Survey) -> dict[str, Any]:
    """Return what a timeline shows of a guide: the group of each step, its text, and three components."""
    groups = found.nearest(guide.vectors)
    texts = groups + 1 if guide.codes is None else [" ".join(map(str, row)) for row in guide.codes]
    components = np.clip(found.components(guide.vectors) / 2, -1, 1).T
    used = components[np.abs(found.axes).sum(1) > 0]
    return {
        "groups": groups.tolist(),
        "texts": [str(each) for each in texts],
        "components": np.round(used, 3).tolist(),
        "coded": guide.codes is not None,
    }


def look(work: Workspace, take: Take, found: Survey, start: int = 0) -> Work[dict[str, Any]]:
    """Return the data of the page for one demonstration."""
    gap, guide = found.gap if take.episode is not None else work.gap(take.fps), take.guide
    n = len(guide)
    page = rows_of(guide, found) | {
        "frames": sheet(take.frames),
        "fps": take.fps,
        "gap": gap,
        "start": start,
        "predicted": None,
        "error": None,
        "copy": None,
    }
    if work.model.generative:
        predicted = yield from predict_next(work, take)
        recorded = _fitted(take.frames[gap:], predicted.shape[1:3])
        current = _fitted(take.frames[:n], predicted.shape[1:3])
        page |= {
            "predicted": sheet(predicted),
            "error": np.round(_error(predicted, recorded), 6).tolist(),
            "copy": np.round(_error(current, recorded), 6).tolist(),
        }
    places, own = found.components(found.vectors), found.components(guide.vectors)
    page["map"] = {
        "x": np.round(places[:, 0], 2).tolist(),
        "y": np.round(places[:, 1], 2).tolist(),
        "group": found.group.tolist(),
    }
    page["point"] = {"x": np.round(own[:, 0], 2).tolist(), "y": np.round(own[:, 1], 2).tolist()}
    page["labels"] = _labels(take, n)
    page["facts"] = [_facts(take, found, page, i) for i in range(n)]
    note = "Click or drag to choose a step. "
    if page["error"]:
        note += "Error: of the prediction (green), and of copying the current frame (gray)."
    page["note"] = note
    return page


def _labels(take: Take, n: int) -> list[int] | None:
    """Return the discrete action of each step; None without."""
    if take.labels is None or take.labels.ndim > 1 or np.ma.getmaskarray(take.labels)[: n - 1].any():
        return None
    return np.ma.getdata(take.labels)[:n].tolist()


def _facts(take: Take, found: Survey, page: dict[str, Any], i: int) -> str:
    group = page["groups"][i]
    parts = [f"step {i} of {len(page['groups'])}"]
    if take.fps:
        parts.append(f"{i / take.fps:.2f} s")
    title = f"code {page['texts'][i]}" if page["coded"] else found.title(group)
    words = found.words(group)
    parts.append(f"{title}: {words}" if words else title)
    if page["labels"]:
        parts.append(f"recorded action: {found.action_name(page['labels'][i])}")
    if page["error"] and page["copy"][i] > 0:
        parts.append(f"error {page['error'][i] / page['copy'][i]:.2f} of copying")
    return " · ".join(parts)


def _fitted(frames: UInt8[np.ndarray, "t h w 3"], size: tuple[int, int]) -> UInt8[np.ndarray, "t h2 w2 3"]:
    return frames if frames.shape[1:3] == size else resize(frames, size[0])


def _error(a: UInt8[np.ndarray, "n h w 3"], b: UInt8[np.ndarray, "n h w 3"]) -> Float[np.ndarray, " n"]:
    """Return the mean squared error of each frame on a 0..1 scale."""
    return np.array([np.square((x - y.astype(np.float32)) / 255).mean() for x, y in zip(a, b, strict=True)])


def saliency(work: Workspace, take: Take, steps: Int64[np.ndarray, " n"]) -> Work[Float[np.ndarray, "n c c"]]:
    """Return how much the latent action of each step responds when a cell of both its frames is grayed out.

    The strongest response of each step is 1.
    """
    gap, context = work.gap(take.fps), work.model.context
    height, width = take.frames.shape[1:3]
    cells = min(CELLS, height, width)
    y, x = (np.linspace(0, side, cells + 1).astype(int) for side in (height, width))
    found = np.zeros((len(steps), cells, cells))
    for row, step in enumerate(steps):
        window = step + np.arange(-context, 2) * gap
        inside = np.maximum(window, 0)
        clip = take.frames[inside]
        batch = np.repeat(clip[None], cells * cells + 1, axis=0)
        gray = clip[-2:].mean((1, 2), keepdims=True).astype(np.uint8)
        for cell in range(cells * cells):
            i, j = divmod(cell, cells)
            batch[cell, -2:, y[i] : y[i + 1], x[j] : x[j + 1]] = gray
        states = None
        if work.model.state_size and take.states is not None:
            states = np.repeat(take.states[inside][None].astype(np.float32), len(batch), axis=0)
        valid = np.repeat((window == inside)[None], len(batch), axis=0)
        latents = work.lam.encode_last(batch, valid, states)[0].reshape(len(batch), -1)
        change = np.linalg.norm(latents[:-1] - latents[-1], axis=1).reshape(cells, cells)
        found[row] = change / max(change.max(), 1e-9)
        yield WorkProgress(what="measuring saliency", done=row + 1, total=len(steps))
    return found


def neighbors(work: Workspace, take: Take, found: Survey, step: int) -> np.ndarray:
    """Return the transitions of the survey with the most similar latent actions, each of another episode."""
    distance = np.square(found.vectors - take.guide.vectors[step]).sum((1, 2))
    order = np.argsort(distance, kind="stable")
    order = order[found.episode[order] != (-1 if take.episode is None else take.episode)]
    _, first = np.unique(found.episode[order], return_index=True)
    return order[np.sort(first)[:NEIGHBORS]]


def detail(work: Workspace, take: Take, found: Survey, step: int) -> Work[str]:
    """Return HTML about one step: what its latent action responds to, and similar transitions elsewhere.

    Raises:
        UserError: the demonstration has no such step.
    """
    parts = ['<div class="st-card">']
    if work.model.uses_images:
        response = (yield from saliency(work, take, np.array([step])))[0]
        both = (shaded(take.frames[i], response) for i in (step, step + work.gap(take.fps)))
        shown = "".join(
            f'<figure><img class="st-frame" src="{uri(each)}" alt="saliency"></figure>' for each in both
        )
        parts.append(f"<h4>Saliency of step {step}: what the latent action responds to</h4>")
        parts.append(f'<div class="st-films">{shown}</div>')
    if work.store is not None:
        rows = found.rows[neighbors(work, take, found, step)]
        if len(rows):
            parts.append("<h4>The most similar transitions of other episodes</h4>")
            parts.append(
                pairs(np.array(work.store.frames[rows]), np.array(work.store.frames[rows + found.gap]))
            )
    return "".join([*parts, "</div>"])
