"""The pages Look and What does it mean? in Gradio."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr

from latentact.errors import UserError
from latentact.studio import look, meaning
from latentact.studio.meaning import Survey
from latentact.studio.pages import groups_html
from latentact.studio.ui import (
    Shared,
    Updates,
    guarded,
    html,
    report,
    sent,
    starting,
    stop,
    tools,
    what,
    widget,
)
from latentact.studio.workspace import Take

VIDEOS = [".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".gif"]


class LookPage:
    """A demonstration, its latent actions and predictions.

    Args:
        shared: workspace and state.
    """

    def __init__(self, shared: Shared) -> None:
        self.shared, self.work = shared, shared.work
        self._also: Callable[[Take, Survey], dict[Any, Any]] = lambda take, found: {}
        last = self.work.store.num_episodes - 1 if self.work.store else 0
        has_data = self.work.store is not None
        with tools():
            self.episode = gr.Number(0, label=f"Episode, 0 to {last}", precision=0, scale=2, visible=has_data)
            self.open = gr.Button("Open episode", visible=has_data)
            self.upload = gr.UploadButton("Open a video", file_types=VIDEOS)
            self.stop = gr.Button("Stop", scale=0, min_width=90)
        self.status = html()
        self.widget = widget("look", "select", "point")
        self.detail = html()

    def wire(
        self, app: gr.Blocks, also: Callable[[Take, Survey], dict[Any, Any]], outputs: list[Any]
    ) -> None:
        """Connect the events.

        Args:
            app: the app, which opens the first episode when it loads.
            also: what else changes when a demonstration is opened.
            outputs: the components of `also`.
        """
        self._also, shared = also, self.shared
        opened = [shared.take, shared.found, self.widget, self.detail, self.status, self.episode, *outputs]
        events = [
            bind(guarded(self.status, function), inputs, opened, show_progress="hidden")
            for bind, function, inputs in (
                (app.load, self.first, None),
                (self.open.click, self.number, self.episode),
                (self.episode.submit, self.number, self.episode),
                (self.upload.upload, self.video, self.upload),
                (self.widget.point, self.point, shared.found),
            )
        ]
        selected = self.widget.select(
            guarded(self.status, self.select),
            [shared.take, shared.found],
            [self.detail, self.status],
            show_progress="hidden",
            trigger_mode="always_last",
        )
        stop(self.stop, self.status, [*events, selected])

    def first(self) -> Updates:
        """Open the first episode, or say what to do."""
        if self.work.store is None:
            yield {self.status: what("Open a video to start.")}
        else:
            yield from self._opened(self.work.episode(0))

    def number(self, number: float | None) -> Updates:
        """Open an episode."""
        value = -1 if number is None or abs(number) > 2**31 else int(number)
        yield from self._opened(self.work.episode(value))

    def video(self, path: str | None) -> Updates:
        """Open an uploaded video."""
        if not path:
            raise UserError("there is no video. Choose a file.")
        yield {self.status: starting("reading the video")}
        yield from self._opened(self.work.video(Path(path), Path(path).name))

    def point(self, found: Survey | None, event: gr.EventData) -> Updates:
        """Open the episode of a point of the map, at its step."""
        index, store = sent(event, "index"), self.work.store
        if found is None or store is None or not 0 <= index < len(found.rows):
            raise UserError("there is no such point. Choose another.")
        number = int(found.episode[index])
        take = self.work.episode(number)
        step = int(found.rows[index] - store.starts[number])
        yield {self.episode: number}
        yield from self._opened(take, min(step, len(take.guide) - 1))

    def select(self, take: Take | None, found: Survey | None, event: gr.EventData) -> Updates:
        """Show details of a step."""
        step = sent(event, "step")
        if take is None or found is None or not 0 <= step < len(take.guide):
            raise UserError("there is no such step. Open a demonstration.")
        yield from self._detailed(take, found, step)

    def _opened(self, take: Take, start: int = 0) -> Updates:
        found = yield from self.shared.survey(take, self.status)
        page = yield from report(self.status, look.look(self.work, take, found, start))
        yield {
            self.shared.take: take,
            self.shared.found: found,
            self.widget: json.dumps(page),
            self.detail: "",
            self.status: what(f"{take.name}, {len(take.frames)} frames"),
            **self._also(take, found),
        }
        yield from self._detailed(take, found, start)

    def _detailed(self, take: Take, found: Survey, step: int) -> Updates:
        shown = yield from report(self.detail, look.detail(self.work, take, found, step))
        yield {self.detail: shown}


class MeaningPage:
    """Codes or clusters in words.

    Args:
        shared: workspace and state.
    """

    def __init__(self, shared: Shared) -> None:
        self.shared, self._html = shared, ""
        html(
            what(
                "Each code, or each cluster of latent actions, in words of the recorded robot actions, with "
                "typical transitions, and applied to other scenes by forward dynamics."
            )
        )
        self.stop = gr.Button("Stop", size="sm", visible=False)
        self.status, self.shown = html(), html()

    def wire(self, tab: gr.Tab) -> None:
        """Fill the page when its tab is opened."""
        event = tab.select(
            guarded(self.status, self.explain),
            None,
            [self.shown, self.status, self.stop],
            show_progress="hidden",
        )
        stop(self.stop, self.status, [event], "Stopped. Open this page again to go on.")

    def explain(self) -> Updates:
        """Name all groups and show examples; computed once for all users."""
        if not self._html:
            yield {self.stop: gr.update(visible=True)}
            found = yield from self.shared.survey(None, self.status)
            shown = yield from report(self.status, meaning.galleries(self.shared.work, found))
            self._html = groups_html(found, shown)
        yield {self.shown: self._html, self.status: "", self.stop: gr.update(visible=False)}
