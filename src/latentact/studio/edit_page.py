"""The page Edit in Gradio."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import gradio as gr

from latentact.errors import UserError
from latentact.guidance.guide import Guide
from latentact.reporting.html import text
from latentact.studio import edit
from latentact.studio.edit import DEFAULT, OPERATIONS, OTHER, SELECTION, GuideDraft
from latentact.studio.meaning import Survey
from latentact.studio.ui import (
    IDLE_S,
    Shared,
    Updates,
    done,
    guarded,
    html,
    report,
    sent,
    starting,
    stop,
    tools,
    what,
    whole,
    widget,
)
from latentact.studio.workspace import Take, imagine

LISTED = 200
"""Episodes in the list of guides."""


class EditPage:
    """The guide of the open demonstration, as an editable timeline.

    Args:
        shared: workspace and state.
    """

    def __init__(self, shared: Shared) -> None:
        self.shared, self.work = shared, shared.work
        has_env = bool(self.work.env)
        self.draft = gr.State(None, time_to_live=IDLE_S)
        self.widget = widget("edit", "range")
        self.status = html()
        with tools():
            self.operation = gr.Dropdown([*OPERATIONS], value="scale", label="Operation", scale=2)
            self.start = gr.Number(0, label="from step", precision=0, visible=False)
            self.end = gr.Number(1, label="to before step", precision=0, visible=False)
            self.number = gr.Number(DEFAULT["scale"], label="number")
            self.code = gr.Textbox("0", label="code", visible=False, max_length=200)
            self.other = gr.Dropdown(self._guides(), label="other guide", visible=False)
        self.explained = html(what(OPERATIONS["scale"]))
        with tools():
            self.apply = gr.Button("Apply", variant="primary", min_width=90)
            self.undo = gr.Button("Undo", min_width=90)
            self.redo = gr.Button("Redo", min_width=90)
            self.preview = gr.Button("Preview", min_width=90)
            self.run = gr.Button("Run the policy", visible=has_env and bool(self.work.policy), min_width=90)
            self.stop = gr.Button("Stop", min_width=90)
        with tools():
            self.seed = gr.Number(0, label="seed of the environment", precision=0, visible=has_env)
            self.name = gr.Textbox("", label="name", placeholder="my guide", max_length=60)
            self.save = gr.Button("Save guide and video")
        self.history = html()
        self.opened_outputs = [self.draft, self.widget, self.history, self.status, self.start, self.end]

    def wire(self) -> None:
        """Connect the events."""
        state, status = [self.draft, self.shared.found], self.status
        inputs = [self.operation, self.start, self.end, self.number, self.code, self.other]
        self.operation.change(
            self.choose, self.operation, [*inputs[1:], self.explained], show_progress="hidden"
        )
        self.widget.range(self.select, None, [self.start, self.end], show_progress="hidden")
        events = [
            button.click(guarded(status, function), given, self.opened_outputs, show_progress="hidden")
            for button, function, given in (
                (self.apply, self.change, [*state, *inputs]),
                (self.undo, self.move(-1), state),
                (self.redo, self.move(1), state),
                (self.preview, self.imagine, state),
                (self.run, self.follow, [*state, self.seed]),
            )
        ]
        stop(self.stop, status, events)
        self.save.click(
            guarded(status, self.store),
            [self.draft, self.name],
            [status, self.other],
            show_progress="hidden",
        )

    def opened(self, take: Take, found: Survey) -> dict[Any, Any]:
        """Return the page of a demonstration that was just opened."""
        return self._shown(edit.draft(take), found)

    def choose(self, operation: str) -> dict[Any, Any]:
        """Show the inputs of an operation."""
        ranged = gr.update(visible=operation in SELECTION)
        return {
            self.start: ranged,
            self.end: ranged,
            self.number: gr.update(visible=operation in DEFAULT, value=DEFAULT.get(operation, 0)),
            self.code: gr.update(visible=operation == "set code"),
            self.other: gr.update(visible=operation in OTHER, choices=self._guides()),
            self.explained: what(OPERATIONS.get(operation, "")),
        }

    def select(self, event: gr.EventData) -> dict[Any, Any]:
        """Take over the steps that were selected on the timeline."""
        return {self.start: sent(event, "start"), self.end: sent(event, "stop")}

    def change(
        self,
        draft: GuideDraft | None,
        found: Survey | None,
        operation: str,
        start: float | None,
        end: float | None,
        number: float | None,
        code: str | None,
        other: str | None,
    ) -> Updates:
        """Apply the chosen operation."""
        draft = _require(draft)
        guide = self._other(other or "") if operation in OTHER else None
        steps = range(whole(start), whole(end))
        made = edit.apply(draft.guide, operation, steps, float(number or 0), code or "", guide)
        yield from self._changed(draft.edited(made), found)

    def move(self, by: int) -> Callable[[GuideDraft | None, Survey | None], Updates]:
        """Return the handler that goes back (-1) or forth (1)."""

        def moved(draft: GuideDraft | None, found: Survey | None) -> Updates:
            yield from self._changed(_require(draft).moved(by), found)

        return moved

    def imagine(self, draft: GuideDraft | None, found: Survey | None) -> Updates:
        """Show what forward dynamics predicts for the guide, from the demonstration's first frame."""
        draft = _require(draft)
        shown = yield from report(self.status, imagine(self.work, draft.take.frames[0], draft.guide))
        yield self._shown(replace(draft, imagined=shown), found)

    def follow(self, draft: GuideDraft | None, found: Survey | None, seed: float | None) -> Updates:
        """Roll out the policy with the guide."""
        draft = _require(draft)
        yield {self.status: starting("loading the policy")}
        rollout = yield from report(self.status, edit.follow(self.work, draft.guide, whole(seed)))
        shown = self._shown(replace(draft, rollout=rollout), found)
        yield {**shown, self.status: done(f"Rollout: {rollout.summary()}")}

    def store(self, draft: GuideDraft | None, name: str | None) -> Updates:
        """Save the guide and its video."""
        files = edit.save(self.work, _require(draft), (name or "").strip())
        yield {
            self.status: done(f"Saved: {', '.join(map(str, files))}"),
            self.other: gr.update(choices=self._guides()),
        }

    def _changed(self, draft: GuideDraft, found: Survey | None) -> Updates:
        """Show a draft, then its preview, if the LAM predicts frames."""
        yield self._shown(draft, found)
        if self.work.model.generative:
            yield from self.imagine(draft, found)

    def _shown(self, draft: GuideDraft, found: Survey | None) -> dict[Any, Any]:
        assert found is not None
        lines = "".join(f"<li>{text(line)}</li>" for line in draft.guide.provenance)
        where = f"version {draft.current + 1} of {len(draft.versions)}, {len(draft.guide)} steps"
        return {
            self.draft: draft,
            self.widget: json.dumps(edit.page(draft, found)),
            self.history: f'<h4>{where}</h4><ol class="st-history">{lines}</ol>',
            self.status: "",
            self.start: 0,
            self.end: len(draft.guide),
        }

    def _guides(self) -> list[str]:
        count = min(self.work.store.num_episodes, LISTED) if self.work.store else 0
        return [*(f"saved {name}" for name in edit.saved(self.work)), *(f"episode {i}" for i in range(count))]

    def _other(self, chosen: str) -> Guide | None:
        kind, _, name = chosen.partition(" ")
        if kind == "saved":
            return edit.load(self.work, name)
        return self.work.episode(int(name)).guide if name.isascii() and name.isdigit() else None


def _require(draft: GuideDraft | None) -> GuideDraft:
    if draft is None:
        raise UserError("there is no guide to edit. Open a demonstration on the page Look.")
    return draft
