"""The page Label in Gradio."""

from __future__ import annotations

import json
from typing import Any

import gradio as gr

from latentact.errors import UserError
from latentact.evaluation.lam.selection import METHODS, Candidates
from latentact.reporting.html import text
from latentact.studio import label
from latentact.studio.label import Actions, LabelDraft
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


class LabelPage:
    """Episodes that a plan proposes, and a form for their actions.

    Args:
        shared: workspace and state.
    """

    def __init__(self, shared: Shared) -> None:
        self.shared, self.work = shared, shared.work
        self._candidates: Candidates | None = None
        self._actions: Actions | None = None
        self.draft = gr.State(None, time_to_live=IDLE_S)
        html(
            what(
                "The episodes whose labels help most, because they represent the others. Open one, accept "
                "the decoder's actions where they are right, set the others, and save."
            )
        )
        with tools():
            self.budget = gr.Number(5, label="budget", precision=0)
            self.method = gr.Dropdown([*METHODS], value="coverage", label="method")
            self.propose = gr.Button("Propose episodes", variant="primary")
            self.stop = gr.Button("Stop", scale=0, min_width=90)
        self.proposed = html()
        last = self.work.store.num_episodes - 1 if self.work.store else 0
        with tools():
            self.episode = gr.Number(0, label=f"episode to label, 0 to {last}", precision=0)
            self.open = gr.Button("Open for labeling")
        self.status = html()
        self.widget = widget("label", "range")
        with tools():
            self.start = gr.Number(0, label="first step", precision=0)
            self.end = gr.Number(1, label="before step", precision=0)
            self.chosen = gr.Dropdown([], label="action", visible=False)
            self.typed = gr.Textbox("", label="action", visible=False, max_length=500)
        with tools():
            self.set = gr.Button("Set", variant="primary", min_width=90)
            self.accept = gr.Button("Accept pseudo-labels", min_width=90)
            self.accept_all = gr.Button("Accept all", min_width=90)
            self.clear = gr.Button("Clear", min_width=90)
            self.save = gr.Button("Save episode", min_width=90)
            self.write = gr.Button("Write the dataset", min_width=90)
        self.outputs = [self.draft, self.widget, self.status, self.start, self.end, self.chosen, self.typed]

    def wire(self) -> None:
        """Connect the events."""
        status, found = self.status, self.shared.found
        steps = [self.start, self.end]
        proposed = self.propose.click(
            guarded(status, self.suggest),
            [self.budget, self.method],
            [self.proposed, self.status, self.episode],
            show_progress="hidden",
        )
        stop(self.stop, status, [proposed])
        self.widget.range(self.select, None, steps, show_progress="hidden")
        for button, function, inputs in (
            (self.open, self.opened, [self.episode, found]),
            (self.set, self.change, [self.draft, found, *steps, self.chosen, self.typed]),
            (self.accept, self.take_over, [self.draft, found, *steps]),
            (self.accept_all, self.take_all, [self.draft, found]),
            (self.clear, self.forget, [self.draft, found, *steps]),
        ):
            button.click(guarded(status, function), inputs, self.outputs, show_progress="hidden")
        self.save.click(guarded(status, self.store), self.draft, status, show_progress="hidden")
        self.write.click(guarded(status, self.copy), None, status, show_progress="hidden")

    def suggest(self, budget: float | None, method: str) -> Updates:
        """Propose episodes; the data is encoded once for all users."""
        if self._candidates is None:
            self._candidates = yield from report(self.status, label.candidates(self.work, self._known()))
        chosen = label.proposals(self.work, self._candidates, whole(budget), method)
        store = label.require_data(self.work)
        rows = "".join(
            f"<tr><th>{text(store.episode_ids[number])}</th><td>{number}</td><td>{store.lengths[number]}</td>"
            f"<td>{max(covered, 0):.2f}</td></tr>"
            for number, covered in chosen
        )
        head = "<tr><th>episode</th><td>number</td><td>frames</td><td>coverage with it</td></tr>"
        yield {
            self.proposed: f'<table class="st-table">{head}{rows}</table>',
            self.status: "",
            self.episode: chosen[0][0],
        }

    def opened(self, number: float | None, found: Any) -> Updates:
        """Open an episode with its saved labels."""
        yield {self.status: starting("opening the episode")}
        actions = self._known()
        drawn = label.draft(self.work, actions, whole(number))
        found = found or (yield from self.shared.survey(drawn.take, self.status))
        names = [actions.name(action) for action in range(actions.space.size)]
        discrete = actions.space.discrete
        yield {
            **self._shown(drawn, found),
            self.start: 0,
            self.end: len(drawn),
            self.chosen: gr.update(choices=names, value=names[0], visible=True) if discrete else gr.update(),
            self.typed: gr.update(visible=not discrete),
        }

    def select(self, event: gr.EventData) -> dict[Any, Any]:
        """Take over the steps that were selected on the timeline."""
        return {self.start: sent(event, "start"), self.end: sent(event, "stop")}

    def change(
        self,
        drawn: LabelDraft | None,
        found: Any,
        start: float | None,
        end: float | None,
        chosen: str | None,
        typed: str | None,
    ) -> Updates:
        """Set the action of the selected steps."""
        actions = self._known()
        value = actions.parse((chosen if actions.space.discrete else typed) or "")
        yield self._shown(_require(drawn).set(range(whole(start), whole(end)), value), found)

    def take_over(
        self, drawn: LabelDraft | None, found: Any, start: float | None, end: float | None
    ) -> Updates:
        """Accept the decoder's actions of the selected steps."""
        yield self._shown(_require(drawn).accept(range(whole(start), whole(end))), found)

    def take_all(self, drawn: LabelDraft | None, found: Any) -> Updates:
        """Accept the decoder's actions of the whole episode."""
        yield self._shown(_require(drawn).accept(range(len(_require(drawn)))), found)

    def forget(self, drawn: LabelDraft | None, found: Any, start: float | None, end: float | None) -> Updates:
        """Remove the labels of the selected steps."""
        yield self._shown(_require(drawn).set(range(whole(start), whole(end)), None), found)

    def store(self, drawn: LabelDraft | None) -> Updates:
        """Save the labels of the episode."""
        yield {self.status: done(f"Saved: {label.save(self.work, _require(drawn))}")}

    def copy(self) -> Updates:
        """Write the dataset with all saved labels."""
        yield {self.status: starting("writing the dataset")}
        yield {self.status: done(f"Written: {label.write_copy(self.work)}")}

    def _known(self) -> Actions:
        if self._actions is None:
            self._actions = label.actions_of(self.work)
        return self._actions

    def _shown(self, drawn: LabelDraft, found: Any) -> dict[Any, Any]:
        shown = label.page(drawn, self._known(), found)
        labeled = f"{drawn.take.name}: {shown['labeled']} of {len(drawn)} steps labeled"
        return {self.draft: drawn, self.widget: json.dumps(shown), self.status: what(labeled)}


def _require(drawn: LabelDraft | None) -> LabelDraft:
    if drawn is None:
        raise UserError("there is no episode to label. Open one.")
    return drawn
