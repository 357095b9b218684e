"""HTML of the page What does it mean?, for the app and the exported page."""

from __future__ import annotations

from latentact.reporting.html import text
from latentact.studio.images import pairs
from latentact.studio.meaning import Gallery, Survey

PALETTE = (
    *("#4269d0", "#efb118", "#ff725c", "#3ca951", "#a463f2", "#6cc5b0", "#ff8ab7", "#9c6b4e", "#97bbf5"),
    *("#9498a0", "#d6604d", "#1b9e77", "#7570b3", "#e7298a", "#66a61e", "#e6ab02", "#a6761d", "#1f78b4"),
    *("#b2df8a", "#fb9a99", "#cab2d6", "#ffcf5c", "#8dd3c7", "#bc80bd"),
)
"""Colors of groups, as in studio.js."""


def groups_html(found: Survey, shown: list[Gallery]) -> str:
    """Return all groups with their words, examples and transfer."""
    lead = found.trust or "The data has no labeled actions, so groups have no words."
    cards = []
    for group, gallery in enumerate(shown):
        share = (found.group == group).mean()
        words = found.words(group)
        parts = [
            f"<h3>{text(found.title(group))}<small>{100 * share:.0f} % of transitions</small></h3>",
            f"<p>{text(words)}</p>" if words else "",
            f"<h4>examples: now, next</h4>{pairs(gallery.now, gallery.next)}",
        ]
        if gallery.transfer is not None:
            parts.append(
                f"<h4>applied to other scenes: now, predicted</h4>{pairs(gallery.scenes, gallery.transfer)}"
            )
        color = PALETTE[group % len(PALETTE)]
        cards.append(f'<div class="st-group" style="--key:{color}">{"".join(parts)}</div>')
    body = f'<p class="st-what">{text(lead)}</p><div class="st-groups">{"".join(cards)}</div>'
    return f'<div class="st-html">{body}</div>'
