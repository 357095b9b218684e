"""The pages Drive and Live in Gradio."""

from __future__ import annotations

import contextlib
import json
import time

import gradio as gr

from latentact.errors import UserError
from latentact.studio import drive
from latentact.studio.drive import Driver
from latentact.studio.live import live, open_live
from latentact.studio.ui import (
    EVERY_S,
    IDLE_S,
    Shared,
    Updates,
    done,
    guarded,
    html,
    sent,
    starting,
    stop,
    tools,
    what,
    whole,
    widget,
)
from latentact.studio.workspace import Take


class DrivePage:
    """Forward dynamics and the environment, a step per button.

    Args:
        shared: workspace and state.
    """

    def __init__(self, shared: Shared) -> None:
        self.shared, self.work = shared, shared.work
        has_env = bool(self.work.env)
        self.driver = gr.State(None, time_to_live=IDLE_S, delete_callback=_close)
        html(
            what(
                "Each button, or its key, is one latent action for forward dynamics, which imagines the next "
                "frame, and one robot action for the environment beside it. Errors of imagined frames add up."
            )
        )
        with tools():
            self.by = gr.Radio([*drive.BY], value=drive.BY[0], label="Drive by")
            self.seed = gr.Number(0, label="seed of the environment", precision=0, visible=has_env)
            self.begin = gr.Button("Start", variant="primary")
            self.real = gr.Button("Imagine from the real frame", visible=has_env)
        self.status = html()
        self.widget = widget("drive", "press")

    def wire(self) -> None:
        """Connect the events."""
        status, shared = self.status, self.shared
        inputs, outputs = [self.driver, shared.take, self.by, self.seed], [self.driver, self.widget, status]
        self.begin.click(guarded(status, self.start), inputs, outputs, show_progress="hidden")
        self.real.click(
            guarded(status, self.follow_reality), self.driver, outputs[1:], show_progress="hidden"
        )
        self.widget.press(
            guarded(status, self.press),
            self.driver,
            outputs[1:],
            show_progress="hidden",
            trigger_mode="multiple",
        )

    def start(self, driver: Driver | None, take: Take | None, by: str, seed: float | None) -> Updates:
        """Start again: at the environment's first frame, or at that of the demonstration."""
        _close(driver)
        yield {self.driver: None, self.status: starting("starting")}
        found = yield from self.shared.survey(take, self.status)
        first = None if take is None else take.frames[0]
        made = Driver(self.work, found, by, first, whole(seed))
        yield {self.driver: made, self.widget: json.dumps(made.page()), self.status: what(made.note)}

    def press(self, driver: Driver | None, event: gr.EventData) -> Updates:
        """Take one step."""
        _require(driver).press(sent(event, "index"))
        yield {self.widget: json.dumps(_require(driver).page())}

    def follow_reality(self, driver: Driver | None) -> Updates:
        """Imagine from the environment's frame on."""
        _require(driver).follow_reality()
        yield {self.widget: json.dumps(_require(driver).page())}


class LivePage:
    """A camera, or the open demonstration while it is played, and the policy that follows.

    Args:
        shared: workspace and state.
    """

    def __init__(self, shared: Shared) -> None:
        self.shared, self.work = shared, shared.work
        follows = bool(self.work.policy and self.work.env)
        about = "The latent actions of a demonstration while it happens"
        html(what(f"{about}, and the policy that follows it." if follows else f"{about}."))
        sources = ["play the open demonstration", *(["camera"] if self.work.live else [])]
        with tools():
            self.source = gr.Radio(sources, value=sources[-1], label="Source")
            self.seconds = gr.Number(60, label="seconds at most")
            self.seed = gr.Number(0, label="seed of the environment", precision=0, visible=follows)
            self.start = gr.Button("Start", variant="primary")
            self.stop = gr.Button("Stop")
        self.status, self.shown = html(), html()

    def wire(self) -> None:
        """Connect the events."""
        event = self.start.click(
            guarded(self.status, self.run),
            [self.shared.take, self.source, self.seconds, self.seed],
            [self.shown, self.status],
            show_progress="hidden",
        )
        stop(self.stop, self.status, [event])

    def run(self, take: Take | None, source: str, seconds: float | None, seed: float | None) -> Updates:
        """Follow a camera or the open demonstration."""
        yield {self.status: starting("starting")}
        opened = open_live(self.work, take, source == "camera")
        last, page, pages = 0.0, "", live(self.work, opened, whole(seed), float(seconds or 0))
        with contextlib.closing(pages):
            for page in pages:
                if (now := time.monotonic()) - last > EVERY_S:
                    last = now
                    yield {self.shown: page, self.status: ""}
        yield {self.shown: page, self.status: done("The demonstration has ended.")}


def _require(driver: Driver | None) -> Driver:
    if driver is None:
        raise UserError("there is nothing to drive. Press Start.")
    return driver


def _close(driver: Driver | None) -> None:
    if driver is not None:
        driver.close()
