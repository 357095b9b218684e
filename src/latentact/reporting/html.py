"""HTML elements of reports; all content from files is escaped by `text`."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

from latentact.errors import missing_extra

if TYPE_CHECKING:
    import numpy as np
    from jaxtyping import UInt8


@dataclass(frozen=True, kw_only=True)
class Section:
    """One part of the page."""

    anchor: str
    """Its id."""
    title: str
    """Its heading."""
    what: str
    """One or two sentences: what it shows and how to read it."""
    body: str
    """HTML."""

    def html(self) -> str:
        """Return the section with its heading."""
        return (
            f'<section id="{self.anchor}" aria-labelledby="{self.anchor}-title">'
            f'<h2 id="{self.anchor}-title">{text(self.title)}</h2>'
            f'<p class="what">{text(self.what)}</p>{self.body}</section>'
        )


def page(
    *,
    command: str,
    name: str,
    headline: str,
    lead: str,
    numbers: Sequence[tuple[str, str, str]],
    sections: Sequence[Section],
) -> str:
    """Return a complete page that works offline.

    Args:
        command: command that wrote the page.
        name: name of its subject.
        headline: the result in one sentence.
        lead: HTML below the headline.
        numbers: key figures: name, value, remark.
        sections: sections in order.

    Raises:
        UserError: plotly is missing.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise missing_extra("plotly", "report") from error
    asset = files("latentact.reporting").joinpath
    return Template(asset("report.html").read_text(encoding="utf-8")).substitute(
        command=command,
        name=text(name),
        headline=text(headline),
        lead=lead,
        tiles=tiles(numbers),
        links="".join(f'<li><a href="#{s.anchor}">{text(s.title)}</a></li>' for s in sections),
        sections="\n".join(section.html() for section in sections),
        css=asset("report.css").read_text(encoding="utf-8"),
        js=asset("report.js").read_text(encoding="utf-8"),
        plotly=get_plotlyjs(),
    )


def text(value: object) -> str:
    """Return `value` as text that is safe in HTML, also inside an attribute."""
    return escape(str(value), quote=True)


def figure(body: str, caption: str) -> str:
    """Return a figure with a caption."""
    return f"<figure>{body}<figcaption>{text(caption)}</figcaption></figure>"


def chart(content: dict[str, Any], *, label: str, height: int = 320) -> str:
    """Return a Plotly chart that the page's script draws; `label` is the text for screen readers."""
    data = json.dumps(content, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return (
        f'<div class="chart" role="img" aria-label="{text(label)}" style="height:{height}px"></div>'
        f'<script type="application/json">{data}</script>'
    )


def image(pixels: UInt8[np.ndarray, "h w 3"], alt: str) -> str:
    """Return an image that is embedded in the page."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png", optimize=True)
    height, width = pixels.shape[:2]
    return (
        f'<img src="data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}" alt="{text(alt)}" '
        f'width="{width}" height="{height}">'
    )


def video(path: Path, label: str) -> str:
    """Return an embedded video that loops silently, with controls."""
    data = base64.b64encode(path.read_bytes()).decode()
    return (
        f'<video controls autoplay muted loop playsinline aria-label="{text(label)}" '
        f'src="data:video/mp4;base64,{data}"></video>'
    )


def tiles(items: Iterable[tuple[str, str, str]]) -> str:
    """Return tiles of key figures, from (name, value, remark); empty without items."""
    cells = [
        f"<div><dt>{text(what)}</dt><dd>{text(number)}<small>{text(beside)}</small></dd></div>"
        for what, number, beside in items
    ]
    return f'<dl class="tiles">{"".join(cells)}</dl>' if cells else ""


def bars(items: Iterable[tuple[str, str, float, tuple[float, float], bool]]) -> str:
    """Return horizontal bars on a 0..1 scale with 95 % intervals.

    Args:
        items: name, explanation, score, interval, and whether it is a control.
    """
    rows = []
    for name, why, score, (low, high), control in items:
        left, right = (min(max(edge, 0.0), 1.0) * 100 for edge in (low, high))
        interval = f"left:{left:.1f}%;width:{max(right - left, 0.6):.1f}%"
        filled = f"width:{min(max(score, 0.0), 1.0) * 100:.1f}%"
        rows.append(
            f'<li{" class=control" if control else ""}><div class="row"><b>{text(name)}</b>'
            f'<span class="value">{score:.2f} <small>({low:.2f} to {high:.2f})</small></span></div>'
            f'<span class="why">{text(why)}</span><div class="track" aria-hidden="true">'
            f'<i style="{filled}"></i><u style="{interval}"></u></div></li>'
        )
    return f'<ul class="bars">{"".join(rows)}</ul>'


def table(head: Sequence[str], rows: Iterable[tuple[str, Sequence[str], bool]], label: str) -> str:
    """Return a table that scrolls sideways on narrow screens.

    Args:
        head: column names; the first is for the names of rows.
        rows: name, cells and whether the row is highlighted; name and cells are HTML.
        label: description of the table.
    """
    top = "".join(
        f'<th scope="col"{" class=n" if i else ""}>{text(name)}</th>' for i, name in enumerate(head)
    )
    lines = "".join(
        f'<tr{" class=win" if wins else ""}><th scope="row">{name}</th>'
        f"{''.join(f'<td class=n>{cell}</td>' for cell in cells)}</tr>"
        for name, cells, wins in rows
    )
    return scroll(f"<table><thead><tr>{top}</tr></thead><tbody>{lines}</tbody></table>", label)


def scroll(body: str, label: str) -> str:
    """Return an element that scrolls sideways on narrow screens, also by keyboard."""
    return f'<div class="scroll" role="region" tabindex="0" aria-label="{text(label)}">{body}</div>'


def fold(summary: str, body: str, *, unfolded: bool = False) -> str:
    """Return a collapsible element."""
    return f"<details{' open' if unfolded else ''}><summary>{text(summary)}</summary>{body}</details>"
