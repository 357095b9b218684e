"""The studio as a Gradio app."""

from __future__ import annotations

import gradio as gr

from latentact.reporting.html import text
from latentact.studio.drive_page import DrivePage, LivePage
from latentact.studio.edit_page import EditPage
from latentact.studio.label_page import LabelPage
from latentact.studio.look_page import LookPage, MeaningPage
from latentact.studio.ui import IDLE_S, Shared, html
from latentact.studio.workspace import Workspace


def build(work: Workspace) -> gr.Blocks:
    """Return the app of a workspace."""
    with gr.Blocks(title="latentact studio", analytics_enabled=False, delete_cache=(600, IDLE_S)) as app:
        shared = Shared(work)
        html(_head(work))
        with gr.Tabs():
            with gr.Tab("Look"):
                look = LookPage(shared)
            with gr.Tab("What does it mean?") as tab:
                meaning = MeaningPage(shared)
            with gr.Tab("Edit"):
                edit = EditPage(shared)
            with gr.Tab("Drive"):
                drive = DrivePage(shared)
            with gr.Tab("Live"):
                live = LivePage(shared)
            with gr.Tab("Label"):
                label = LabelPage(shared)
        look.wire(app, edit.opened, edit.opened_outputs)
        meaning.wire(tab)
        for page in (edit, drive, live, label):
            page.wire()
    return app


def _head(work: Workspace) -> str:
    spec = work.model.spec
    codes = f"{spec.codebook_size} codes" if spec.codebook_size else "no codes"
    parts = [
        spec.model,
        f"{spec.tokens} x {spec.token_dim} values, {codes}",
        f"{spec.frame_gap_s:g} s per latent action",
        f"{work.store.num_episodes} episodes" if work.store else "no data",
        *(f"{name} {value}" for name, value in (("policy", work.policy), ("in", work.env)) if value),
    ]
    return f'<div class="st-head"><h1>{text(work.name)}</h1><p>{text(" · ".join(parts))}</p></div>'
