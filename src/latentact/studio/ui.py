"""Helpers of all pages: the workspace, a user's state, and handlers that report progress and errors.

The state of a user is in `gr.State`, per browser tab. Long work is a generator that yields progress; Gradio
closes it where the page's Stop button cancels the event.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Generator
from typing import Any

import gradio as gr

from latentact.errors import UserError
from latentact.reporting.html import text
from latentact.studio.meaning import Survey, local_survey, survey
from latentact.studio.workspace import Take, Work, WorkProgress, Workspace

EVERY_S = 0.15
"""Seconds between two reports of progress."""
IDLE_S = 3600
"""Seconds after which the state of a closed page is dropped."""

type Updates = Generator[dict[Any, Any], None, Any]
"""New values of components."""


class Shared:
    """The workspace and its survey, of all users; and the components that hold a user's state.

    Args:
        work: the workspace.
    """

    def __init__(self, work: Workspace) -> None:
        self.work = work
        self.take, self.found = gr.State(None, time_to_live=IDLE_S), gr.State(None, time_to_live=IDLE_S)
        self._survey: Survey | None = None

    def survey(self, take: Take | None, status: gr.HTML) -> Generator[dict[Any, Any], None, Survey]:
        """Return the survey of the data, which is computed once; without data that of a demonstration.

        Raises:
            UserError: there is neither.
        """
        if self.work.store is None and take is not None:
            return local_survey(take.guide, self.work.gap(take.fps))
        if self._survey is None:
            self._survey = yield from report(status, survey(self.work))
        return self._survey


def guarded(status: gr.HTML, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a handler that shows a UserError as one sentence on the page."""

    @functools.wraps(function)  # Gradio recognizes events by the annotation of a parameter
    def handler(*values: Any) -> Updates:
        try:
            yield from function(*values)
        except UserError as error:
            yield {status: f'<div class="st-warn" role="alert">{text(error)}</div>'}

    return handler


def report[T](status: gr.HTML, work: Work[T]) -> Generator[dict[Any, Any], None, T]:
    """Run work and show its progress."""
    last = 0.0
    try:
        while True:
            progress = next(work)
            if (now := time.monotonic()) - last > EVERY_S:
                last = now
                yield {status: bar(progress)}
    except StopIteration as stop:
        return stop.value
    finally:
        work.close()


def bar(progress: WorkProgress) -> str:
    """Return a progress bar."""
    value = f' value="{progress.done}" max="{progress.total}"' if progress.total else ""
    count = f" {progress.done} of {progress.total}" if progress.total else ""
    label = f"<span>{text(progress.what)}{count}</span>"
    return f'<div class="st-bar" role="status">{label}<progress{value}></progress></div>'


def starting(what: str) -> str:
    """Return a progress bar of unknown length."""
    return bar(WorkProgress(what=what, done=0, total=0))


def done(message: str) -> str:
    """Return a message."""
    return f'<div class="st-done" role="status">{text(message)}</div>'


def what(message: str) -> str:
    """Return an explanation."""
    return f'<p class="st-what">{text(message)}</p>'


def stop(button: gr.Button, status: gr.HTML, events: list[Any], message: str = "Stopped.") -> None:
    """Let a button cancel events."""
    button.click(functools.partial(done, message), None, status, cancels=events, show_progress="hidden")


def tools() -> gr.Row:
    """Return a row of fields and buttons."""
    return gr.Row(elem_classes="st-tools")


def html(value: str = "") -> gr.HTML:
    """Return a component of HTML."""
    return gr.HTML(value, apply_default_css=False, elem_classes="st-html")


def widget(page: str, *events: str) -> gr.HTML:
    """Return a component that studio.js draws from JSON, with its events."""
    named = " ".join(f"'{event}'" for event in events)
    return gr.HTML(
        "",
        html_template='<div class="st-root st-card"></div>',
        js_on_load=f"latentact.mount('{page}', element, props, trigger, watch); /* {named} */",
        apply_default_css=False,
        elem_id=f"studio-{page}",
    )


def sent(event: gr.EventData, name: str) -> int:
    """Return a whole number that a widget sent; -1 for anything else."""
    value = event._data.get(name) if isinstance(event._data, dict) else None
    return value if isinstance(value, int) and abs(value) < 2**31 else -1


def whole(number: float | None) -> int:
    """Return the content of a number field, 0 where it is empty."""
    value = number or 0
    if not -(2.0**53) < value < 2.0**53 or value != int(value):
        raise UserError(f"the number must be whole, got {number}. Change it.")
    return int(value)
